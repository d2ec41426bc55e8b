"""The Llama network in plain torch, as the trainer and its measurements use it.

Parameter names are those of the Hugging Face checkpoint, so the state dict is the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """The sizes of the network, under the names config.json gives them."""

    vocab_size: int
    hidden_size: int = 192
    intermediate_size: int = 448
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048


@dataclass
class Past:
    """The keys and values one layer has seen so far."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes up the new positions and returns all of them."""
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), dim=2)
        self.values = values if self.values is None else torch.cat((self.values, values), dim=2)
        return self.keys, self.values


class Norm(nn.Module):
    """RMS norm, computed in fp32 whatever the weights are in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, pairs = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, pairs, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, pairs, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past | None) -> Tensor:
        rows, length, _ = x.shape
        split = (rows, length, -1, self.shape.head_dim)
        q = _turn(self.q_proj(x).view(split).transpose(1, 2), cos, sin)
        k = _turn(self.k_proj(x).view(split).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(split).transpose(1, 2)
        if past is not None:
            k, v = past.extend(k, v)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        return torch.Tensor(self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1)))


class Gated(nn.Module):
    """The SwiGLU feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.Tensor(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape)
        self.mlp = Gated(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past)
        return torch.Tensor(x + self.mlp(self.post_attention_layernorm(x)))


class Stack(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape)


class Llama(nn.Module):
    """A causal language model with tied embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Stack(shape)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * shape.num_hidden_layers) ** 0.5 if deep else 0.02)

    def hidden(self, tokens: Tensor, pasts: list[Past] | None = None, start: int = 0) -> Tensor:
        """The states of a batch of rows that begin at position ``start``."""
        x: Tensor = self.model.embed_tokens(tokens)
        half = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32) / self.shape.head_dim
        angle = torch.outer(torch.arange(start, start + tokens.shape[1]).float(), self.shape.rope_theta**-half)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, pasts[index] if pasts else None)
        return torch.Tensor(self.model.norm(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """The scores over the vocabulary for given states."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    @torch.no_grad()
    def greedy(self, rows: list[list[int]], end: int, limit: int) -> list[tuple[list[int], float]]:
        """Greedy continuations of rows of one length, ``end`` included where it came, each with its least margin.

        The margin is how far the chosen token's logit led the next best, at the step where that was least.
        """
        pasts = [Past() for _ in self.model.layers]
        feed, start = torch.tensor(rows), 0
        found: list[list[int]] = [[] for _ in rows]
        margins = [float("inf")] * len(rows)
        for _ in range(limit):
            scores = self.logits(self.hidden(feed, pasts, start)[:, -1]).float()
            start += feed.shape[1]
            best = scores.topk(2, dim=-1)
            feed = best.indices[:, :1]
            lead = (best.values[:, 0] - best.values[:, 1]).tolist()
            for row, token in enumerate(feed[:, 0].tolist()):
                if end not in found[row][-1:]:
                    found[row].append(token)
                    margins[row] = min(margins[row], lead[row])
            if all(row[-1] == end for row in found):
                break
        return list(zip(found, margins, strict=True))
