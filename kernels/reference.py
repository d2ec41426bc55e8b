"""Plain torch: every operation as its formula, in fp32 inside. Slow; what the other backends are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.batch import Batch
from kernels.ops import Heads, Packed
from kernels.rope import Rope
from kernels.rotate import norm_heads, rotate_and_store


class ReferenceOps:
    """See `kernels.ops`. Keeps weights as they come."""

    row_tile = 1

    def pack(self, weight: Tensor, bias: Tensor | None = None) -> Packed:
        rows, cols = weight.shape
        return Packed(rows, cols, weight, bias)

    def pack_head(self, weight: Tensor) -> Packed:
        return self.pack(weight)

    def plan(self, batch: Batch, pages: Tensor, heads: Heads) -> None:
        return None

    def linear(self, x: Tensor, weight: Packed) -> Tensor:
        return self.logits(x, weight).to(x.dtype)

    def logits(self, x: Tensor, weight: Packed) -> Tensor:
        return F.linear(x.float(), weight.data.float(), None if weight.bias is None else weight.bias.float())

    def soft_cap(self, logits: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(logits / cap)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual = residual + x
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
        out = q.new_zeros(q.shape[0], heads.heads * heads.dim)
        page_tokens = layer.shape[3]
        for segment in batch.segments:
            first, used = heads.first(segment.start), -(-segment.stop // page_tokens)
            held = layer[torch.from_numpy(segment.pages[:used])].permute(1, 2, 0, 3, 4).float()
            keys, values = held.reshape(2, heads.kv_heads, used * page_tokens, heads.dim)[:, :, first : segment.stop]
            rows = slice(segment.row, segment.row + segment.count)
            queries = q[rows].float().view(-1, heads.kv_heads, heads.group, heads.dim).permute(1, 2, 0, 3)
            scores = queries @ keys[:, None].transpose(-1, -2) * heads.scale
            if heads.cap is not None:
                scores = self.soft_cap(scores, heads.cap)
            own, there = torch.arange(segment.start, segment.stop)[:, None], torch.arange(first, segment.stop)
            scores.masked_fill_(own < there, -torch.inf)
            if heads.window is not None:
                scores.masked_fill_(there <= own - heads.window, -torch.inf)
            mixed = scores.softmax(-1) @ values[:, None]
            out[rows] = mixed.permute(2, 0, 1, 3).flatten(1).to(q.dtype)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
