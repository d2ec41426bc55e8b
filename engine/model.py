"""One decoder definition: embeddings, layers of attention and MLP, logits; written against the table of operations."""

from __future__ import annotations

from torch import Tensor

from engine.arena import Arena
from engine.config import ModelConfig
from engine.weights import Weights
from kernels.batch import Batch
from kernels.ops import Heads, Ops
from kernels.rope import frequencies, llama3_frequencies, rope_table


class Decoder:
    """A model's forward pass over paged KV. Knows no sequence: a `Batch` says all."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, arena: Arena) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.arena = arena
        self.heads = Heads(config.heads, config.kv_heads, config.head_dim)
        frequency = frequencies(config.head_dim, config.rope_theta)
        if (scaling := config.rope_scaling) is not None:
            frequency = llama3_frequencies(
                frequency,
                scaling.factor,
                scaling.low_freq_factor,
                scaling.high_freq_factor,
                scaling.original_context,
            )
        positions = min(config.context, arena.count * arena.kv.page_tokens)
        self.cos, self.sin = rope_table(frequency, positions)

    def forward(self, batch: Batch) -> Tensor | None:
        """fp32 logits ``[samples, vocab]``; None if no row is sampled. Writes all rows' K and V into their pages."""
        ops, eps, heads, weights = self.ops, self.config.norm_eps, self.heads, self.weights
        batch.cos, batch.sin = self.cos[batch.positions], self.sin[batch.positions]
        ops.plan(batch, self.arena.pages, heads)
        residual = weights.embedding[batch.tokens]
        x = ops.rms_norm(residual, weights.layers[0].input_norm, eps)
        for index, layer in enumerate(weights.layers):
            held = self.arena.layer(index)
            last = index + 1 == len(weights.layers)
            q = ops.rope_store(ops.linear(x, layer.qkv), batch, held, heads)
            if last and batch.samples == 0:
                return None
            x = ops.attend(q, batch, held, heads)
            if last:  # from here on only the sampled rows matter
                x, residual = x[batch.sample], residual[batch.sample]
            x, residual = ops.add_rms_norm(ops.linear(x, layer.out), residual, layer.post_norm, eps)
            x = ops.linear(ops.silu_mul(ops.linear(x, layer.gate_up)), layer.down)
            following = weights.final_norm if last else weights.layers[index + 1].input_norm
            x, residual = ops.add_rms_norm(x, residual, following, eps)
        return ops.logits(x, weights.lm_head)[: batch.samples]
