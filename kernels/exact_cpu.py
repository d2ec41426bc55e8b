"""The exact CPU backend: a row's bits depend on its own history only, not on the rest of the step.

Every product and every norm runs on tiles of exactly `TILE_ROWS` rows (padded), so that the library meets one shape;
attention has its own tile (`kernels.exact_attention`). Thread count and instruction set must be the same on all
workers that are to agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import linear
from kernels.batch import Batch
from kernels.exact_attention import ExactAttention, block_runs
from kernels.ops import Heads, Packed
from kernels.rope import rotate_and_store

TILE_ROWS = 32
SERIAL_NUMBERS = 16384
"""Numbers for one call of a transcendental: few enough that torch does not split the call between threads, and a
multiple of every vector length, so that no number is left to the scalar code, which rounds differently."""


class ExactOps:
    """See `kernels.ops`. All inputs have a multiple of `TILE_ROWS` rows."""

    row_tile = TILE_ROWS

    def __init__(self) -> None:
        self._attention: ExactAttention | None = None

    def pack(self, weight: Tensor) -> Packed:
        return linear.pack(weight)

    def plan(self, batch: Batch, pages: Tensor, heads: Heads) -> None:
        if self._attention is None or self._attention.heads != heads:
            self._attention = ExactAttention(heads)
        batch.plan = [block_runs(segment, pages.shape[4]) for segment in batch.segments]

    def linear(self, x: Tensor, weight: Packed) -> Tensor:
        return tiled_linear(x, weight)

    def logits(self, x: Tensor, weight: Packed) -> Tensor:
        return tiled_logits(x, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        for tile, normed in zip(_tiles(x), _tiles(out), strict=True):
            wide = tile.float()
            scale = torch.rsqrt((wide * wide).sum(-1, keepdim=True) / x.shape[-1] + eps)
            torch.mul(wide * scale, weight, out=normed)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual = residual.add_(x)
        return self.rms_norm(residual, weight, eps), residual

    def rope_store(self, qkv: Tensor, batch: Batch, layer: Tensor, heads: Heads) -> Tensor:
        return rotate_and_store(qkv, batch, layer, heads)

    def attend(self, q: Tensor, batch: Batch, layer: Tensor, heads: Heads) -> Tensor:
        assert self._attention is not None
        out = q.new_zeros(q.shape)
        for segment, blocks in zip(batch.segments, batch.plan, strict=True):
            rows = slice(segment.row, segment.row + segment.count)
            out[rows] = self._attention(q[rows], segment, blocks, layer)
        return out.flatten(1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        wide = gate_up.float()
        gate, up = wide.chunk(2, dim=-1)
        share = gate.clone(memory_format=torch.contiguous_format)
        flat = share.view(-1)
        for start in range(0, flat.numel(), SERIAL_NUMBERS):
            flat[start : start + SERIAL_NUMBERS].sigmoid_()
        return share.mul_(gate).mul_(up).to(gate_up.dtype)


def tiled_linear(x: Tensor, weight: Packed) -> Tensor:
    """``x W^T``, one tile of rows after the other."""
    return torch.cat([linear.linear(tile, weight) for tile in _tiles(x)])


def tiled_logits(x: Tensor, weight: Packed) -> Tensor:
    """``x W^T`` in fp32, one tile of rows after the other."""
    return torch.cat([linear.wide_linear(tile, weight) for tile in _tiles(x)])


def row_independent(weight: Packed, dtype: torch.dtype) -> bool:
    """True if, on this CPU, a row's product with `weight` has the same bits at every place of a tile.

    What exact mode rests on, and what no library promises: so it is tried, with every row at two places and among
    other rows.
    """
    tile = torch.randn(TILE_ROWS, weight.cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    mixed = torch.cat([tile[7:], torch.zeros_like(tile[:7])])
    there, elsewhere = linear.wide_linear(tile, weight), linear.wide_linear(mixed, weight)
    low, low_elsewhere = linear.linear(tile, weight), linear.linear(mixed, weight)
    return torch.equal(there[7:], elsewhere[:-7]) and torch.equal(low[7:], low_elsewhere[:-7])


def _tiles(x: Tensor) -> Tensor:
    """Views of `TILE_ROWS` rows each."""
    return x.view(-1, TILE_ROWS, x.shape[-1])
