"""The fast CPU backend with native code for attention, logits and the small operations: one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels.batch import Batch, Segment
from kernels.chunk_attention import chunk_attention
from kernels.fast_cpu import FastOps
from kernels.linear import tiles
from kernels.native import DTYPES, SIGNATURES, library, pairs_multiplied
from kernels.ops import Heads, Packed
from kernels.rope import Rope

FEW = 3
"""Most rows of x that are multiplied as fast as weights are read (`kFew`); from four on oneDNN is as quick."""
CHUNK_KEYS = {torch.bfloat16: 1 << 62, torch.float32: 2048}
"""Most keys of a chunk for which native attention is quicker than torch's."""
MAX_GROUP, MAX_DIM = 16, 256
"""Most query heads to a KV head, and numbers to a head, that the native attention has room for."""


@dataclass(slots=True)
class NativePlan:
    """Decode rows as the native loop wants them: all page tables end to end, int64."""

    chunks: list[Segment]
    pages: Tensor
    first: Tensor
    """Where each row's page table begins."""
    keys: Tensor
    """Keys of each row, its own included."""
    rows: Tensor


class NativeOps(FastOps):
    """See `kernels.ops`. Raises `NativeMissing` where `native.cpp` cannot be built."""

    def __init__(self) -> None:
        loaded = library()
        # In tiles oneDNN is quicker, though it reads the weights of logits twice.
        paired = pairs_multiplied(loaded) and not tiles()
        self._wide_product = loaded.wide_product if paired else None
        self._few_rows = {torch.float32: loaded.few_rows_float32}
        """By dtype: a product of few rows, as quick as memory is read; oneDNN reads it at half the speed."""
        self._attend_chunk = {torch.float32: loaded.attend_chunk_float32}
        """By dtype: attention of several rows of one sequence, up to `CHUNK_KEYS`."""
        if paired:
            self._few_rows[torch.bfloat16] = loaded.few_rows_bfloat16
            self._attend_chunk[torch.bfloat16] = loaded.attend_chunk_bfloat16
        self._calls: dict[tuple[str, torch.dtype], Callable[..., None]] = {
            (operation, getattr(torch, dtype)): getattr(loaded, f"{operation}_{dtype}")
            for operation in SIGNATURES
            for dtype in DTYPES
        }

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Packed:
        """Kept twice, unless this dtype is not multiplied here."""
        packed = super().pack(weight, bias)
        return replace(packed, plain=weight.contiguous()) if weight.dtype in self._few_rows else packed

    def linear(self, x: Tensor, weight: Packed) -> Tensor:
        plain, bias = weight.plain, weight.bias
        if plain is None or not 0 < len(x) <= FEW:
            return super().linear(x, weight)
        x, out = x.contiguous(), x.new_empty(len(x), weight.rows)
        added = 0 if bias is None else bias.data_ptr()
        self._few_rows[plain.dtype](x.data_ptr(), plain.data_ptr(), added, out.data_ptr(), *_sizes(x, weight))
        return out

    def pack_head(self, weight: Tensor) -> Packed:
        """bf16 that is multiplied here stays as it is, so that a tied embedding is kept once."""
        if weight.dtype != torch.bfloat16 or self._wide_product is None:
            return self.pack(weight)
        rows, cols = weight.shape
        return Packed(rows, cols, weight.contiguous())

    def logits(self, x: Tensor, weight: Packed) -> Tensor:
        if self._is_wide(weight):
            return self._wide(x, weight)
        return self.linear(x, weight) if x.dtype == torch.float32 else super().logits(x, weight)

    def _is_wide(self, weight: Packed) -> bool:
        plain = not weight.data.is_mkldnn and weight.data.dtype == torch.bfloat16 and weight.bias is None
        return plain and self._wide_product is not None

    def _wide(self, x: Tensor, weight: Packed) -> Tensor:
        assert self._wide_product is not None
        x, out = x.contiguous(), torch.empty(len(x), weight.rows)
        self._wide_product(x.data_ptr(), weight.data.data_ptr(), out.data_ptr(), *_sizes(x, weight))
        return out

    def plan(self, batch: Batch, pages: Tensor, heads: Heads) -> None:
        if heads.group > MAX_GROUP or heads.dim > MAX_DIM:
            return super().plan(batch, pages, heads)
        if batch.plans:  # the native loop skips what lies before a window by itself
            batch.plans[heads] = next(iter(batch.plans.values()))
            return None
        single = [segment for segment in batch.segments if segment.count == 1]
        used = [segment.start // pages.shape[4] + 1 for segment in single]
        tables = [segment.pages[:count] for segment, count in zip(single, used, strict=True)]
        batch.plans[heads] = NativePlan(
            chunks=[segment for segment in batch.segments if segment.count > 1],
            pages=torch.from_numpy(np.concatenate(tables)) if tables else torch.empty(0, dtype=torch.int64),
            first=torch.from_numpy(np.cumsum([0, *used])),
            keys=torch.tensor([segment.stop for segment in single], dtype=torch.int64),
            rows=torch.tensor([segment.row for segment in single], dtype=torch.int64),
        )
        return None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(None, x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._norm(x, residual, weight, eps), residual

    def _norm(self, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(residual)
        rows, cols = residual.shape
        self._calls["add_rms_norm", residual.dtype](
            None if x is None else x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            cols,
            eps,
            torch.get_num_threads(),
        )
        return out

    def soft_cap(self, logits: Tensor, cap: float) -> Tensor:
        rows, cols = logits.shape
        self._calls["soft_cap", logits.dtype](logits.data_ptr(), rows, cols, cap, torch.get_num_threads())
        return logits

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
        q_norm, k_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        self._calls["rope_store", qkv.dtype](
            qkv.data_ptr(),
            rope.cos.data_ptr(),
            rope.sin.data_ptr(),
            q_norm,
            k_norm,
            eps,
            batch.page.data_ptr(),
            batch.slot.data_ptr(),
            layer.data_ptr(),
            batch.rows,
            layer.stride(0),
            layer.shape[3],
            heads.heads,
            heads.kv_heads,
            heads.dim,
            torch.get_num_threads(),
        )
        return qkv.view(qkv.shape[0], -1, heads.dim)[:, : heads.heads]

    def attend(self, q: Tensor, batch: Batch, layer: Tensor, heads: Heads) -> Tensor:
        plan = batch.plans[heads]
        if not isinstance(plan, NativePlan):
            return super().attend(q, batch, layer, heads)
        out = q.new_empty(q.shape)
        out[batch.rows :] = 0
        for segment in plan.chunks:
            rows = slice(segment.row, segment.row + segment.count)
            if q.dtype in self._attend_chunk and segment.stop <= CHUNK_KEYS[q.dtype]:
                self._chunk(q[rows], segment, layer, heads, out[rows])
            else:
                out[rows] = chunk_attention(q[rows], segment, layer, heads)
        if len(plan.rows):
            self._calls["attend", q.dtype](
                q.data_ptr(),
                q.stride(0),
                layer.data_ptr(),
                plan.pages.data_ptr(),
                plan.first.data_ptr(),
                plan.keys.data_ptr(),
                plan.rows.data_ptr(),
                len(plan.rows),
                *_attention(layer, heads),
                out.data_ptr(),
                torch.get_num_threads(),
            )
        return out.flatten(1)

    def _chunk(self, q: Tensor, segment: Segment, layer: Tensor, heads: Heads, out: Tensor) -> None:
        pages = np.ascontiguousarray(segment.pages)
        self._attend_chunk[q.dtype](
            q.data_ptr(),
            q.stride(0),
            layer.data_ptr(),
            pages.ctypes.data,
            segment.start,
            segment.count,
            *_attention(layer, heads),
            out.data_ptr(),
            torch.get_num_threads(),
        )

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._gated("silu_mul", gate_up)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        return self._gated("gelu_mul", gate_up)

    def _gated(self, operation: str, gate_up: Tensor) -> Tensor:
        rows, both = gate_up.shape
        out = gate_up.new_empty(rows, both // 2)
        self._calls[operation, gate_up.dtype](
            gate_up.data_ptr(), out.data_ptr(), rows, both // 2, torch.get_num_threads()
        )
        return out


def _sizes(x: Tensor, weight: Packed) -> tuple[int, int, int, int]:
    """What native products want to know of both: rows, outputs, columns, and threads to use."""
    return len(x), weight.rows, weight.cols, torch.get_num_threads()


def _attention(layer: Tensor, heads: Heads) -> tuple[int, int, int, int, int, float, int, float]:
    """What native attention wants to know of a layer's pages and of its heads; no window and no cap are 0."""
    shape = layer.stride(0), layer.shape[3], heads.kv_heads, heads.group, heads.dim
    return *shape, heads.scale, heads.window or 0, heads.cap or 0.0
