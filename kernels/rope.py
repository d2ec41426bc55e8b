"""Rotary positions: which angle a position turns a head's numbers by, tabulated. `kernels.rotate` does the turning.

The angle is ``position * theta^(-2i / dim)`` for the i-th pair; the ways of scaling to longer contexts change the
frequencies, and yarn also makes cosine and sine larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TABLE_BLOCK = 1024
"""Positions are tabulated in blocks of one size, so that a position's cosine has the same bits in every table."""


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation of each row of a step."""

    cos: Tensor
    """fp32 ``[padded, 1, dim / 2]``, and `sin` likewise."""
    sin: Tensor


def frequencies(dim: int, theta: float) -> Tensor:
    """``theta^(-2i / dim)``, fp64 ``[dim / 2]``."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def llama3_frequencies(base: Tensor, factor: float, low: float, high: float, original_context: int) -> Tensor:
    """`base`, with wavelengths above ``context / low`` stretched by `factor`, below ``context / high`` kept."""
    turns = original_context * base / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return base * (blend + (1 - blend) / factor)


def yarn_frequencies(
    base: Tensor, theta: float, factor: float, fast: float, slow: float, original_context: int, truncate: bool
) -> Tensor:
    """`base`, with pairs of fewer than `slow` turns in the context stretched by `factor`, of more than `fast` kept.

    Between the two the blend is linear in the pair's number, rounded outwards if `truncate`.
    """
    dim = 2 * len(base)
    low, high = (
        dim * math.log(original_context / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (fast, slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pair = torch.arange(len(base), dtype=torch.float64)
    blend = ((pair - low) / (high - low or 0.001)).clamp(0, 1)
    return base * (1 - blend + blend / factor)


def rope_table(frequency: Tensor, positions: int, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of all positions below `positions`, times `gain`, fp32 ``[positions, 1, dim / 2]``."""
    cos, sin = [], []
    for start in range(0, positions, TABLE_BLOCK):
        angle = torch.arange(start, start + TABLE_BLOCK, dtype=torch.float64)[:, None] * frequency
        cos.append((angle.cos() * gain).float())
        sin.append((angle.sin() * gain).float())
    return torch.cat(cos)[:positions, None].contiguous(), torch.cat(sin)[:positions, None].contiguous()
