"""The table of operations: all that a model definition may call. Backends differ in speed and in bits, not in meaning.

===============  =====================================================================================
`linear`         ``y = x W^T + b``
`logits`         ``y = x W^T + b`` in fp32, whatever the compute dtype
`soft_cap`       ``cap * tanh(x / cap)``
`rms_norm`       ``x / sqrt(mean(x^2) + eps) * w``
`add_rms_norm`   ``r' = r + x``; ``rms_norm(r')`` and ``r'``
`rope_store`     norms (if asked for) and rotates q and k, writes k and v into their pages, gives q
`attend`         ``softmax(soft_cap(q K^T * scale)) V`` over the keys that a row sees
`silu_mul`       ``gate * sigmoid(gate) * up``
`gelu_mul`       ``gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 gate^3))) / 2 * up``
===============  =====================================================================================

A row sees its own position and those before; with a window w, only the last w of them. Pages that lie wholly before
all windows of a step's rows of a sequence are not read.

Backends: `kernels.reference` (plain torch, any device), `kernels.fast_cpu` and, where a compiler is at hand,
`kernels.native_cpu` on top of it, `kernels.exact_cpu` and `kernels.exact_native`, and for GPUs `kernels.triton_ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from kernels.batch import Batch
from kernels.rope import Rope


@dataclass(frozen=True, slots=True)
class Heads:
    """How a row of q, k, v is cut, `heads` query heads sharing `kv_heads` KV heads of `dim` numbers, and attends."""

    heads: int
    kv_heads: int
    dim: int
    scale: float
    """What the scores are multiplied by."""
    window: int | None = None
    """Keys that a row sees, its own included; None: all before it."""
    cap: float | None = None
    """What the scores are soft-capped at."""

    @property
    def group(self) -> int:
        """Query heads for each KV head."""
        return self.heads // self.kv_heads

    def first(self, position: int) -> int:
        """The first position that the row at `position` sees."""
        return 0 if self.window is None else max(position - self.window + 1, 0)


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight matrix ``[rows, cols]`` in whatever form a backend multiplies fastest, and a bias ``[rows]``."""

    rows: int
    cols: int
    data: Any
    bias: Tensor | None = None
    plain: Tensor | None = None
    """The matrix as it was, for a backend that multiplies few rows with it."""


class Ops(Protocol):
    """One backend. Tensors are ``[row, ...]``, contiguous unless said otherwise."""

    @property
    def row_tile(self) -> int:
        """Rows of a step are padded to a multiple of this."""
        ...

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Packed:
        """`weight` ``[out, in]`` and `bias` in this backend's form; the caller drops the originals."""
        ...

    def pack_head(self, weight: Tensor) -> Packed:
        """Likewise, for `logits`; may be `weight` itself."""
        ...

    def plan(self, batch: Batch, pages: Tensor, heads: Heads) -> None:
        """Work out, once a step for each `heads`, what `attend` needs in every layer with it. `pages`: the arena."""
        ...

    def linear(self, x: Tensor, weight: Packed) -> Tensor:
        """``[row, out]`` in x's dtype."""
        ...

    def logits(self, x: Tensor, weight: Packed) -> Tensor:
        """``[row, out]`` in fp32."""
        ...

    def soft_cap(self, logits: Tensor, cap: float) -> Tensor:
        """``[row, vocab]`` in fp32; `logits` may be overwritten."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalised rows in x's dtype; `weight` is fp32."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The normalised sum and the sum; `residual` may be overwritten."""
        ...

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
        """Rotated q ``[row, heads, dim]``; k, v go to `layer` ``[page, K|V, kv_head, token, dim]``. May reuse qkv.

        `norms`: fp32 weights ``[dim]`` of `rms_norm` over every head of q, and of k, before they are rotated.
        """
        ...

    def attend(self, q: Tensor, batch: Batch, layer: Tensor, heads: Heads) -> Tensor:
        """``[row, heads * dim]``; rows of padding are finite and mean nothing."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """``[row, inner]`` from gate and up side by side ``[row, 2 * inner]``."""
        ...

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        """Likewise."""
        ...
