"""The table of operations: all that a model definition may call. Backends differ in speed and in bits, not in meaning.

===============  =====================================================================================
`linear`         ``y = x W^T``
`logits`         ``y = x W^T`` in fp32, whatever the compute dtype
`rms_norm`       ``x / sqrt(mean(x^2) + eps) * w``
`add_rms_norm`   ``r' = r + x``; ``rms_norm(r')`` and ``r'``
`rope_store`     rotates q and k by their positions, writes k and v into their pages, gives q
`attend`         ``softmax(q K^T / sqrt(dim)) V`` over a sequence's keys up to each row's own position
`silu_mul`       ``gate * sigmoid(gate) * up``
===============  =====================================================================================

Backends: `kernels.reference` (plain torch, any device), `kernels.fast_cpu` and, where a compiler is at hand,
`kernels.native_cpu` on top of it, `kernels.exact_cpu`. A GPU backend is one more module with these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from kernels.batch import Batch


@dataclass(frozen=True, slots=True)
class Heads:
    """How a row of q, k, v is cut: `heads` query heads share `kv_heads` KV heads of `dim` numbers."""

    heads: int
    kv_heads: int
    dim: int

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight matrix ``[rows, cols]`` in whatever form a backend multiplies fastest."""

    rows: int
    cols: int
    data: Any


class Ops(Protocol):
    """One backend. Tensors are ``[row, ...]``, contiguous unless said otherwise."""

    @property
    def row_tile(self) -> int:
        """Rows of a step are padded to a multiple of this."""
        ...

    def pack(self, weight: Tensor) -> Packed:
        """`weight` ``[out, in]`` in this backend's form; the caller drops the original."""
        ...

    def plan(self, batch: Batch, pages: Tensor, heads: Heads) -> None:
        """Work out, once a step, what `attend` needs in every layer. `pages`: the arena, all layers."""
        ...

    def linear(self, x: Tensor, weight: Packed) -> Tensor:
        """``[row, out]`` in x's dtype."""
        ...

    def logits(self, x: Tensor, weight: Packed) -> Tensor:
        """``[row, out]`` in fp32."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalised rows in x's dtype; `weight` is fp32."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The normalised sum and the sum; `residual` may be overwritten."""
        ...

    def rope_store(self, qkv: Tensor, batch: Batch, layer: Tensor, heads: Heads) -> Tensor:
        """Rotated q ``[row, heads, dim]``; k, v go to `layer` ``[page, K|V, kv_head, token, dim]``. May reuse qkv."""
        ...

    def attend(self, q: Tensor, batch: Batch, layer: Tensor, heads: Heads) -> Tensor:
        """``[row, heads * dim]``; rows of padding are finite and mean nothing."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """``[row, inner]`` from gate and up side by side ``[row, 2 * inner]``."""
        ...
