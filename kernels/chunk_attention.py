"""Prefill attention: a chunk of one sequence against its own pages, in blocks of keys, merged by log-sum-exp.

Keys before the chunk are read in blocks that all queries see whole; the chunk's own keys are one causal block. Only
keys that exist are read, so stale slots never enter, and memory is bounded by one block.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.batch import Segment
from kernels.ops import Heads

BLOCK_TOKENS = 4096
"""Most keys copied out of their pages at once: bounds the memory of a long prompt."""


def chunk_attention(q: Tensor, segment: Segment, layer: Tensor, heads: Heads) -> Tensor:
    """``[count, heads, dim]`` for the segment's q ``[count, heads, dim]``; `layer` is ``[page, 2, kv, token, dim]``."""
    page_tokens = layer.shape[3]
    queries = q.reshape(-1, heads.kv_heads, heads.group, heads.dim).permute(1, 2, 0, 3)
    block = max(BLOCK_TOKENS // page_tokens, 1) * page_tokens
    edges = [*range(0, segment.start, block), segment.start, segment.stop]
    out: Tensor | None = None
    lse: Tensor | None = None
    for start, stop in pairwise(edges):
        if start == stop:
            continue
        keys, values = _held(segment, start, stop, layer, heads)
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, start == segment.start
        )
        if out is None or lse is None:
            out, lse = part, part_lse
            continue
        both = torch.logaddexp(lse, part_lse)
        out = out * (lse - both).exp_()[..., None] + part * (part_lse - both).exp_()[..., None]
        lse = both
    assert out is not None
    return out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)


def _held(segment: Segment, start: int, stop: int, layer: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """K and V of positions [start, stop) as ``[kv, group, token, dim]``; a group's heads are one memory."""
    page_tokens = layer.shape[3]
    first = start // page_tokens
    used = torch.from_numpy(segment.pages[first : -(-stop // page_tokens)])
    held = layer.index_select(0, used).permute(1, 2, 0, 3, 4).flatten(2, 3)
    held = held[:, :, start - first * page_tokens : stop - first * page_tokens]
    wide = held.unsqueeze(2).expand(2, heads.kv_heads, heads.group, stop - start, heads.dim)
    return wide[0], wide[1]
