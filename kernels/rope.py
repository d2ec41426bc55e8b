"""Rotary positions: ``(a, b) -> (a cos - b sin, b cos + a sin)``, a and b the two halves of a head's numbers.

The angle is ``position * theta^(-2i / dim)`` for the i-th pair; llama3 scaling divides slow frequencies by a factor
and blends those between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.batch import Batch
from kernels.ops import Heads

TABLE_BLOCK = 1024
"""Positions are tabulated in blocks of one size, so that a position's cosine has the same bits in every table."""


def frequencies(dim: int, theta: float) -> Tensor:
    """``theta^(-2i / dim)``, fp64 ``[dim / 2]``."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def llama3_frequencies(base: Tensor, factor: float, low: float, high: float, original_context: int) -> Tensor:
    """`base`, with wavelengths above ``context / low`` stretched by `factor`, below ``context / high`` kept."""
    turns = original_context * base / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (blend + (1 - blend) / factor)


def rope_table(frequency: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of all positions below `positions`, fp32 ``[positions, 1, dim / 2]``."""
    cos, sin = [], []
    for start in range(0, positions, TABLE_BLOCK):
        angle = torch.arange(start, start + TABLE_BLOCK, dtype=torch.float64)[:, None] * frequency
        cos.append(angle.cos().float())
        sin.append(angle.sin().float())
    return torch.cat(cos)[:positions, None].contiguous(), torch.cat(sin)[:positions, None].contiguous()


def rotate_and_store(qkv: Tensor, batch: Batch, layer: Tensor, heads: Heads) -> Tensor:
    """Rotate q and k inside `qkv`, copy the real rows' k and v to their slots, give q as a view.

    Multiplications and additions stand alone (nothing is fused), so the bits do not depend on the number of rows.
    """
    half = heads.dim // 2
    both = heads.heads + heads.kv_heads
    parts = qkv.view(qkv.shape[0], both + heads.kv_heads, heads.dim)
    a, b = parts[:, :both, :half], parts[:, :both, half:]
    rotated_a = a * batch.cos
    rotated_a -= b * batch.sin
    rotated_b = b * batch.cos
    rotated_b += a * batch.sin
    a.copy_(rotated_a)
    b.copy_(rotated_b)
    kv = parts[: batch.rows, heads.heads :].view(-1, 2, heads.kv_heads, heads.dim)
    layer.permute(0, 3, 1, 2, 4)[batch.page, batch.slot] = kv
    return parts[:, : heads.heads]
