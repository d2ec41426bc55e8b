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

import torch
from torch import Tensor

from kernels.batch import Segment
from kernels.ops import Heads

TILE_TOKENS = 8
BLOCK_TOKENS = 256


class ExactAttention:
    """Scratch memory and masks for one head shape; not for two threads at once."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        kv, tile, dim = heads.kv_heads, TILE_TOKENS * heads.group, heads.dim
        self._held = torch.zeros(2, kv, BLOCK_TOKENS, dim)
        self._scores = torch.zeros(kv, tile, BLOCK_TOKENS)
        self._product = torch.zeros(kv, tile, dim)
        own = torch.arange(BLOCK_TOKENS).view(-1, TILE_TOKENS, 1, 1)
        behind = torch.arange(BLOCK_TOKENS) > own
        self._behind = behind.expand(-1, -1, heads.group, -1).reshape(-1, tile, BLOCK_TOKENS).contiguous()

    def __call__(self, q: Tensor, segment: Segment, layer: Tensor) -> Tensor:
        """``[count, heads, dim]`` in q's dtype for the segment's q ``[count, heads, dim]``."""
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
        for block in range((first + tiles - 1) // block_tiles + 1):
            self._load(segment, block, layer)
            for tile in range(max(block * block_tiles - first, 0), tiles):
                in_block = first + tile - block * block_tiles
                behind = self._behind[in_block] if in_block < block_tiles else None
                self._step(queries[tile], behind, top[tile], total[tile], mixed[tile])
        mixed /= total
        out = mixed.view(tiles, heads.kv_heads, TILE_TOKENS, heads.group, heads.dim).transpose(1, 2)
        return out.reshape(-1, heads.heads, heads.dim)[at : at + segment.count].to(q.dtype)

    def _load(self, segment: Segment, block: int, layer: Tensor) -> None:
        """Copy one block of keys and values out of their pages; zeros where there is none."""
        page_tokens = layer.shape[3]
        start = block * BLOCK_TOKENS
        there = min(segment.stop - start, BLOCK_TOKENS)
        used = segment.pages[start // page_tokens : -(-(start + there) // page_tokens)]
        held = self._held.view(2, self.heads.kv_heads, -1, page_tokens, self.heads.dim)[:, :, : len(used)]
        held.copy_(layer[torch.from_numpy(used)].permute(1, 2, 0, 3, 4))
        self._held[:, :, there:] = 0

    def _step(self, q: Tensor, behind: Tensor | None, top: Tensor, total: Tensor, mixed: Tensor) -> None:
        """Fold the loaded block into one tile's running maximum, sum and mix."""
        scores = torch.bmm(q, self._held[0].transpose(1, 2), out=self._scores)
        if behind is not None:
            scores.masked_fill_(behind, -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        scores.sub_(new_top).exp_()
        shrink = (top - new_top).exp_()
        total.mul_(shrink).add_(scores.sum(-1, keepdim=True))
        mixed.mul_(shrink).add_(torch.bmm(scores, self._held[1], out=self._product))
        top.copy_(new_top)
