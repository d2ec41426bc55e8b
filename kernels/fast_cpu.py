"""The fast CPU backend: prepacked oneDNN products, attention on pages in place. Bits depend on the shape of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear
from kernels.batch import Batch, Segment
from kernels.chunk_attention import chunk_attention
from kernels.ops import Heads, Packed
from kernels.page_attention import PagePlan, page_attention, page_plan
from kernels.rope import Rope
from kernels.rotate import norm_heads, rotate_and_store


@dataclass(slots=True)
class _Plan:
    chunks: list[Segment]
    decode: PagePlan | None


class FastOps:
    """See `kernels.ops`."""

    row_tile = 1

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Packed:
        return linear.pack(weight, bias)

    def pack_head(self, weight: Tensor) -> Packed:
        return self.pack(weight)

    def plan(self, batch: Batch, pages: Tensor, heads: Heads) -> None:
        single = [segment for segment in batch.segments if segment.count == 1 and segment.newest]
        chunks = [segment for segment in batch.segments if segment.count > 1 or not segment.newest]
        decode = page_plan(single, pages.shape[4], pages.dtype, heads.window) if single else None
        batch.plans[heads] = _Plan(chunks, decode)

    def linear(self, x: Tensor, weight: Packed) -> Tensor:
        return linear.linear(x, weight)

    def logits(self, x: Tensor, weight: Packed) -> Tensor:
        return linear.wide_linear(x, weight)

    def soft_cap(self, logits: Tensor, cap: float) -> Tensor:
        return logits.div_(cap).tanh_().mul_(cap)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt_(root.square_().div_(x.shape[-1]).add_(eps))
        return torch.mul(x * scale, weight, out=torch.empty_like(x))

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
        plan: _Plan = batch.plans[heads]
        if plan.decode is not None and not plan.chunks:
            return page_attention(q, plan.decode, layer, heads).flatten(1)
        out = q.new_empty(q.shape)
        for segment in plan.chunks:
            rows = slice(segment.row, segment.row + segment.count)
            out[rows] = chunk_attention(q[rows], segment, layer, heads)
        if plan.decode is not None:
            out[plan.decode.rows] = page_attention(q, plan.decode, layer, heads)
        return out.flatten(1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)
