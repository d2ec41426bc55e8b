"""Attention whose bits depend on a row's position and keys only: one tile shape, one order of blocks, one code path.

A tile is `TILE_TOKENS` query tokens, counted from absolute position 0, times the heads of a group; a block is
`BLOCK_TOKENS` keys, counted from absolute position 0. For each block in order, in fp32::

    s = q K^T / sqrt(dim), minus infinity behind the row's own position
    m' = max(m, max s);  p = exp(s - m');  l' = l exp(m - m') + sum p;  o' = o exp(m - m') + p V

and o / l at the end. A token always sits in the same row of its tile, every product and reduction has one shape, and
rows of a tile that are not asked for are there as zeros: a token computed alone, in a batch, or in any chunk takes
the same additions in the same order. Slots behind the last key that exists are zeroed in the copy of a block, so
stale NaNs do not matter, nor does the page size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels.batch import Segment
from kernels.ops import Heads

TILE_TOKENS = 8
BLOCK_TOKENS = 256

LEAST_EXPONENT = -80.0
"""exp is five times slower where it underflows; a key this far below the best weighs nothing (e^-80 = 2e-35)."""

Runs = list[tuple[int, int, int]]
"""Where a block's keys lie: (place in the block, first page of the arena, neighbouring pages), places in pages."""


def block_runs(segment: Segment, page_tokens: int) -> list[Runs]:
    """For each block of the segment's keys, its runs of neighbouring pages; the same in every layer."""
    block_pages = BLOCK_TOKENS // page_tokens
    pages = segment.pages[: -(-segment.stop // page_tokens)]
    splits = np.zeros(len(pages), dtype=bool)
    splits[1:] = np.diff(pages) != 1
    splits[::block_pages] = True
    starts = np.flatnonzero(splits)
    counts = np.diff(np.append(starts, len(pages)))
    blocks: list[Runs] = [[] for _ in range(-(-len(pages) // block_pages))]
    for start, page, count in zip(starts.tolist(), pages[starts].tolist(), counts.tolist(), strict=True):
        blocks[start // block_pages].append((start % block_pages, page, count))
    return blocks


class ExactAttention:
    """Scratch memory and masks for one head shape; not for two threads at once."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        kv, tile, dim = heads.kv_heads, TILE_TOKENS * heads.group, heads.dim
        self._held = torch.zeros(2, kv, BLOCK_TOKENS, dim)
        self._scores = torch.zeros(kv, tile, BLOCK_TOKENS)
        self._product = torch.zeros(kv, tile, dim)
        own = torch.arange(BLOCK_TOKENS).view(-1, TILE_TOKENS, 1, 1)
        seen = torch.arange(BLOCK_TOKENS) <= own
        self._seen = seen.expand(-1, -1, heads.group, -1).reshape(-1, tile, BLOCK_TOKENS).float()
        self._unseen = torch.zeros_like(self._seen).masked_fill_(self._seen == 0, -torch.inf)

    def __call__(self, q: Tensor, segment: Segment, blocks: list[Runs], layer: Tensor) -> Tensor:
        """``[count, heads, dim]`` for the segment's q of that shape and dtype; `blocks` by `block_runs`."""
        heads = self.heads
        first = segment.start // TILE_TOKENS
        tiles = (segment.stop - 1) // TILE_TOKENS + 1 - first
        at = segment.start - first * TILE_TOKENS
        rows = torch.zeros(tiles * TILE_TOKENS, heads.kv_heads, heads.group, heads.dim)
        rows[at : at + segment.count] = q.reshape(-1, heads.kv_heads, heads.group, heads.dim)
        rows *= heads.dim**-0.5
        queries = rows.view(tiles, TILE_TOKENS, heads.kv_heads, heads.group, heads.dim)
        queries = queries.transpose(1, 2).reshape(tiles, heads.kv_heads, TILE_TOKENS * heads.group, heads.dim)
        top = torch.full((*queries.shape[:3], 1), -torch.inf)
        total = torch.zeros_like(top)
        mixed = torch.zeros_like(queries)
        block_tiles = BLOCK_TOKENS // TILE_TOKENS
        for block, runs in enumerate(blocks):
            self._load(runs, min(segment.stop - block * BLOCK_TOKENS, BLOCK_TOKENS), layer)
            for tile in range(max(block * block_tiles - first, 0), tiles):
                in_block = first + tile - block * block_tiles
                own = in_block if in_block < block_tiles else None
                self._step(queries[tile], own, top[tile], total[tile], mixed[tile])
        mixed /= total
        out = mixed.view(tiles, heads.kv_heads, TILE_TOKENS, heads.group, heads.dim).transpose(1, 2)
        return out.reshape(-1, heads.heads, heads.dim)[at : at + segment.count].to(q.dtype)

    def _load(self, runs: Runs, there: int, layer: Tensor) -> None:
        """Copy one block of keys and values out of their pages; zeros where there is none."""
        held = self._held.view(2, self.heads.kv_heads, -1, layer.shape[3], self.heads.dim)
        for place, page, count in runs:
            held[:, :, place : place + count].copy_(layer[page : page + count].permute(1, 2, 0, 3, 4))
        if there < BLOCK_TOKENS:
            self._held[:, :, there:].zero_()

    def _step(self, q: Tensor, own: int | None, top: Tensor, total: Tensor, mixed: Tensor) -> None:
        """Fold the loaded block into one tile's running maximum, sum and mix; `own`: the tile's place in this block."""
        scores = torch.bmm(q, self._held[0].transpose(1, 2), out=self._scores)
        if own is not None:
            scores.add_(self._unseen[own])
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        scores.sub_(new_top).clamp_(min=LEAST_EXPONENT).exp_()
        if own is not None:
            scores.mul_(self._seen[own])
        shrink = (top - new_top).exp_()
        total.mul_(shrink).add_(scores.sum(-1, keepdim=True))
        mixed.mul_(shrink).add_(torch.bmm(scores, self._held[1], out=self._product))
        top.copy_(new_top)
