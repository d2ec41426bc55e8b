"""Attention whose bits depend on a row's position and keys only: one tile shape, one order of blocks, one code path.

A tile is `TILE_TOKENS` query tokens, counted from absolute position 0, times the heads of a group; a block is
`BLOCK_TOKENS` keys, counted from absolute position 0. For each block in order, in fp32::

    s = soft_cap(q K^T * scale), far below any number where the row does not see
    m' = max(m, max s);  p = exp(s - m');  l' = l exp(m - m') + sum p;  o' = o exp(m - m') + p V

and o / l at the end. A token always sits in the same row of its tile, every product and reduction has one shape, and
rows of a tile that are not asked for are there as zeros: a token computed alone, in a batch, or in any chunk takes
the same additions in the same order. Blocks that a tile does not see are left out; folding one in would change no bit.
Slots behind the last key that exists are zeroed in the copy of a block, so stale NaNs do not matter, nor does the page
size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.batch import Segment
from kernels.ops import Heads

TILE_TOKENS = 8
BLOCK_TOKENS = 256

UNSEEN = -1e30
"""The score of a key that is not seen: finite, so that a row may see nothing of a block."""
LEAST_EXPONENT = -80.0
"""exp is five times slower where it underflows; a key this far below the best weighs nothing (e^-80 = 2e-35)."""

Runs = list[tuple[int, int, int]]
"""Where a block's keys lie: (place in the block, first page of the arena, neighbouring pages), places in pages."""


def block_runs(segment: Segment, page_tokens: int, heads: Heads) -> list[Runs]:
    """For each block of the segment's keys, its runs of neighbouring pages; the same in every layer.

    Pages before all windows are in no run.
    """
    block_pages = BLOCK_TOKENS // page_tokens
    unseen = heads.first(segment.start) // page_tokens
    pages = segment.pages[: -(-segment.stop // page_tokens)]
    splits = np.zeros(len(pages), dtype=bool)
    splits[1:] = np.diff(pages) != 1
    splits[::block_pages] = True
    starts = np.flatnonzero(splits)
    counts = np.diff(np.append(starts, len(pages)))
    blocks: list[Runs] = [[] for _ in range(-(-len(pages) // block_pages))]
    for start, page, count in zip(starts.tolist(), pages[starts].tolist(), counts.tolist(), strict=True):
        late = min(max(unseen - start, 0), count)
        if late < count:
            blocks[start // block_pages].append((start % block_pages + late, page + late, count - late))
    return blocks


class ExactAttention:
    """Scratch memory and masks for one head shape; not for two threads at once."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        kv, tile, dim = heads.kv_heads, TILE_TOKENS * heads.group, heads.dim
        self._held = torch.zeros(2, kv, BLOCK_TOKENS, dim)
        self._scores = torch.zeros(kv, tile, BLOCK_TOKENS)
        self._product = torch.zeros(kv, tile, dim)
        self._masks: dict[int, tuple[Tensor, Tensor] | None] = {}

    def __call__(self, q: Tensor, segment: Segment, blocks: list[Runs], layer: Tensor) -> Tensor:
        """``[count, heads, dim]`` for the segment's q of that shape and dtype; `blocks` by `block_runs`."""
        heads = self.heads
        first = segment.start // TILE_TOKENS
        tiles = (segment.stop - 1) // TILE_TOKENS + 1 - first
        at = segment.start - first * TILE_TOKENS
        rows = torch.zeros(tiles * TILE_TOKENS, heads.kv_heads, heads.group, heads.dim)
        rows[at : at + segment.count] = q.reshape(-1, heads.kv_heads, heads.group, heads.dim)
        rows *= heads.scale
        queries = rows.view(tiles, TILE_TOKENS, heads.kv_heads, heads.group, heads.dim)
        queries = queries.transpose(1, 2).reshape(tiles, heads.kv_heads, TILE_TOKENS * heads.group, heads.dim)
        top = torch.full((*queries.shape[:3], 1), UNSEEN)
        total = torch.zeros_like(top)
        mixed = torch.zeros_like(queries)
        block_tiles = BLOCK_TOKENS // TILE_TOKENS
        for block, runs in enumerate(blocks):
            last = segment.stop - 1 if heads.window is None else (block + 1) * BLOCK_TOKENS - 2 + heads.window
            seeing = range(max(block * block_tiles - first, 0), min(last // TILE_TOKENS + 1 - first, tiles))
            if not (runs and seeing):
                continue
            self._load(runs, min(segment.stop - block * BLOCK_TOKENS, BLOCK_TOKENS), layer)
            for tile in seeing:
                mask = self._mask(first + tile - block * block_tiles)
                self._step(queries[tile], mask, top[tile], total[tile], mixed[tile])
        mixed /= total
        out = mixed.view(tiles, heads.kv_heads, TILE_TOKENS, heads.group, heads.dim).transpose(1, 2)
        return out.reshape(-1, heads.heads, heads.dim)[at : at + segment.count].to(q.dtype)

    def _mask(self, ahead: int) -> tuple[Tensor, Tensor] | None:
        """What a tile that begins `ahead` tiles after a block sees of it: 1 or 0, and 0 or `UNSEEN`; None if all."""
        if self.heads.window is None and ahead >= BLOCK_TOKENS // TILE_TOKENS:
            return None
        if ahead not in self._masks:
            own = ahead * TILE_TOKENS + torch.arange(TILE_TOKENS).view(1, -1, 1, 1)
            there = torch.arange(BLOCK_TOKENS)
            seen = there <= own
            if self.heads.window is not None:
                seen &= there > own - self.heads.window
            wide = seen.expand(1, -1, self.heads.group, -1).reshape(1, -1, BLOCK_TOKENS).float()
            self._masks[ahead] = None if seen.all() else (wide, (1 - wide) * UNSEEN)
        return self._masks[ahead]

    def _load(self, runs: Runs, there: int, layer: Tensor) -> None:
        """Copy one block of keys and values out of their pages; zeros where there is none, or none is seen."""
        held = self._held.view(2, self.heads.kv_heads, -1, layer.shape[3], self.heads.dim)
        for place, page, count in runs:
            held[:, :, place : place + count].copy_(layer[page : page + count].permute(1, 2, 0, 3, 4))
        if runs[0][0]:
            held[:, :, : runs[0][0]].zero_()
        if there < BLOCK_TOKENS:
            self._held[:, :, there:].zero_()

    def _step(self, q: Tensor, mask: tuple[Tensor, Tensor] | None, top: Tensor, total: Tensor, mixed: Tensor) -> None:
        """Fold the loaded block into one tile's running maximum, sum and mix; `mask` by `_mask`."""
        scores = torch.bmm(q, self._held[0].transpose(1, 2), out=self._scores)
        if self.heads.cap is not None:
            scores.div_(self.heads.cap).tanh_().mul_(self.heads.cap)
        if mask is not None:
            scores.add_(mask[1])
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        scores.sub_(new_top).clamp_(min=LEAST_EXPONENT).exp_()
        if mask is not None:
            scores.mul_(mask[0])
        shrink = (top - new_top).exp_()
        total.mul_(shrink).add_(scores.sum(-1, keepdim=True))
        mixed.mul_(shrink).add_(torch.bmm(scores, self._held[1], out=self._product))
        top.copy_(new_top)
