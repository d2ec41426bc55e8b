"""Prefill attention: a chunk of one sequence against its own pages, in blocks of keys, merged by log-sum-exp.

Keys before the chunk are read in blocks that all queries see whole; the chunk's own keys are one causal block. Only
keys that exist are read, so stale slots never enter, and memory is bounded by one block. With a window, queries are
taken a tile at a time, and the keys that any of a tile sees are one masked block.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.batch import Segment
from kernels.ops import Heads

BLOCK_TOKENS = 4096
"""Most keys copied out of their pages at once (with a window: beside a window): bounds the memory of a long prompt."""
TILE_TOKENS = 256
"""Most queries at once where their scores or a mask lie in memory."""


def chunk_attention(q: Tensor, segment: Segment, layer: Tensor, heads: Heads) -> Tensor:
    """``[count, heads, dim]`` for the segment's q ``[count, heads, dim]``; `layer` is ``[page, 2, kv, token, dim]``."""
    if (heads.window or heads.cap) and segment.count > TILE_TOKENS:
        tiles = []
        for row in range(0, segment.count, TILE_TOKENS):
            count = min(segment.count - row, TILE_TOKENS)
            tile = Segment(row, count, segment.start + row, segment.pages)
            tiles.append(chunk_attention(q[row : row + count], tile, layer, heads))
        return torch.cat(tiles)
    queries = q.reshape(-1, heads.kv_heads, heads.group, heads.dim).permute(1, 2, 0, 3)
    if heads.window is not None:
        first = heads.first(segment.start)
        keys, values = _held(segment, first, segment.stop, layer, heads)
        out, _ = _partial(queries, keys, values, heads, _window_mask(segment, first, heads.window, q.dtype))
        return out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    page_tokens = layer.shape[3]
    block = max(BLOCK_TOKENS // page_tokens, 1) * page_tokens
    edges = [*range(0, segment.start, block), segment.start, segment.stop]
    merged: tuple[Tensor, Tensor] | None = None
    for start, stop in pairwise(edges):
        if start == stop:
            continue
        keys, values = _held(segment, start, stop, layer, heads)
        part, part_lse = _partial(queries, keys, values, heads, causal=start == segment.start)
        if merged is None:
            merged = part, part_lse
            continue
        out, lse = merged
        both = torch.logaddexp(lse, part_lse)
        merged = out * (lse - both).exp_()[..., None] + part * (part_lse - both).exp_()[..., None], both
    assert merged is not None
    return merged[0].permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)


def capped_attention(
    q: Tensor, keys: Tensor, values: Tensor, heads: Heads, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``softmax(soft_cap(q K^T * scale) + mask) V`` over the last two dimensions, fp32, and the log of the sums."""
    assert heads.cap is not None
    scores = q.float() @ keys.float().transpose(-1, -2)
    scores.mul_(heads.scale / heads.cap).tanh_().mul_(heads.cap)
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_() @ values.float(), lse


def _partial(
    q: Tensor, keys: Tensor, values: Tensor, heads: Heads, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """One block's attention and the log of its sums; every row sees some key of it."""
    if heads.cap is not None:
        if causal:
            mask = torch.full((q.shape[-2], q.shape[-2]), -torch.inf).triu_(1)
        return capped_attention(q, keys, values, heads, mask)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, keys, values, 0.0, causal, attn_mask=mask, scale=heads.scale
    )
    return out, lse


def _window_mask(segment: Segment, first: int, window: int, dtype: torch.dtype) -> Tensor:
    """0 where a row of the segment sees a position from `first` on, else minus infinity."""
    own = torch.arange(segment.start, segment.stop)[:, None]
    there = torch.arange(first, segment.stop)
    unseen = (there > own) | (there <= own - window)
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)


def _held(segment: Segment, start: int, stop: int, layer: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """K and V of positions [start, stop) as ``[kv, group, token, dim]``; a group's heads are one memory."""
    page_tokens = layer.shape[3]
    first = start // page_tokens
    used = torch.from_numpy(segment.pages[first : -(-stop // page_tokens)])
    held = layer.index_select(0, used).permute(1, 2, 0, 3, 4).flatten(2, 3)
    held = held[:, :, start - first * page_tokens : stop - first * page_tokens]
    wide = held.unsqueeze(2).expand(2, heads.kv_heads, heads.group, stop - start, heads.dim)
    return wide[0], wide[1]
