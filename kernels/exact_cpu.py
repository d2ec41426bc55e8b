"""The exact CPU backend: a row's bits depend on its own history only, not on the rest of the step.

Every product and every norm runs on tiles of exactly `TILE_ROWS` rows (padded), so that the library meets one shape;
attention has its own tile (`kernels.exact_attention`). Thread count and instruction set must be the same on all
workers that are to agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import linear
from kernels.batch import Batch
from kernels.exact_attention import ExactAttention, block_runs
from kernels.ops import Heads, Packed
from kernels.rope import Rope
from kernels.rotate import norm_heads, rotate_and_store

TILE_ROWS = 32
SERIAL_NUMBERS = 16384
"""Numbers for one call of a transcendental: few enough that torch does not split the call between threads, and a
multiple of every vector length, so that no number is left to the scalar code, which rounds differently."""


class ExactOps:
    """See `kernels.ops`. All inputs have a multiple of `TILE_ROWS` rows."""

    row_tile = TILE_ROWS

    def __init__(self) -> None:
        self._attention: dict[Heads, ExactAttention] = {}

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Packed:
        return linear.pack(weight, bias)

    def pack_head(self, weight: Tensor) -> Packed:
        return self.pack(weight)

    def plan(self, batch: Batch, pages: Tensor, heads: Heads) -> None:
        if heads not in self._attention:
            self._attention[heads] = ExactAttention(heads)
        batch.plans[heads] = [block_runs(segment, pages.shape[4], heads) for segment in batch.segments]

    def linear(self, x: Tensor, weight: Packed) -> Tensor:
        return tiled_linear(x, weight)

    def logits(self, x: Tensor, weight: Packed) -> Tensor:
        return tiled_logits(x, weight)

    def soft_cap(self, logits: Tensor, cap: float) -> Tensor:
        for part in _serial(logits.div_(cap)):
            part.tanh_()
        return logits.mul_(cap)

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

    def rope_store(
        self,
        qkv: Tensor,
        batch: Batch,
        layer: Tensor,
        heads: Heads,
        rope: Rope,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> Tensor:
        if norms is not None:
            norm_heads(qkv, heads, norms, eps, self.rms_norm)
        return rotate_and_store(qkv, batch, layer, heads, rope)

    def attend(self, q: Tensor, batch: Batch, layer: Tensor, heads: Heads) -> Tensor:
        attention = self._attention[heads]
        out = q.new_zeros(q.shape)
        for segment, blocks in zip(batch.segments, batch.plans[heads], strict=True):
            rows = slice(segment.row, segment.row + segment.count)
            out[rows] = attention(q[rows], segment, blocks, layer)
        return out.flatten(1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return _gated(gate, gate.clone(memory_format=torch.contiguous_format), up).to(gate_up.dtype)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        # 0.5 x (1 + tanh(u)) is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        inner = gate * gate
        inner.mul_(0.044715).add_(1).mul_(gate).mul_(2 * (2 / math.pi) ** 0.5)
        return _gated(gate, inner, up).to(gate_up.dtype)


def tiled_linear(x: Tensor, weight: Packed) -> Tensor:
    """``x W^T + b``, one tile of rows after the other."""
    return torch.cat([linear.linear(tile, weight) for tile in _tiles(x)])


def tiled_logits(x: Tensor, weight: Packed) -> Tensor:
    """``x W^T + b`` in fp32, one tile of rows after the other."""
    return torch.cat([linear.wide_linear(tile, weight) for tile in _tiles(x)])


def row_independent(product: Callable[[Tensor, Packed], Tensor], weight: Packed, dtype: torch.dtype) -> bool:
    """True if, on this CPU, a row's product with `weight` has the same bits at every place of a tile.

    What exact mode rests on, and what no library promises: so it is tried, with every row at two places and among
    other rows.
    """
    tile = torch.randn(TILE_ROWS, weight.cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    mixed = torch.cat([tile[7:], torch.zeros_like(tile[:7])])
    return torch.equal(product(tile, weight)[7:], product(mixed, weight)[:-7])


def _gated(gate: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    """``gate * sigmoid(inner) * up``, in `inner`."""
    for part in _serial(inner):
        part.sigmoid_()
    return inner.mul_(gate).mul_(up)


def _serial(x: Tensor) -> Sequence[Tensor]:
    """Views of `SERIAL_NUMBERS` numbers each, the last one shorter."""
    return torch.split(x.view(-1), SERIAL_NUMBERS)


def _tiles(x: Tensor) -> Tensor:
    """Views of `TILE_ROWS` rows each."""
    return x.view(-1, TILE_ROWS, x.shape[-1])
