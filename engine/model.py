"""One decoder definition: embeddings, layers of attention and MLP, logits; written against the table of operations.

What architectures differ in are the parameters of `ModelConfig`; no code here knows an architecture by name.
"""

from __future__ import annotations

from torch import Tensor

from engine.arena import Arena
from engine.config import ModelConfig
from engine.rotation import Linear, Llama3, Rotation, Yarn
from engine.steps import Parts, whole
from engine.weights import LayerWeights, Weights
from kernels.batch import Batch
from kernels.ops import Heads, Ops
from kernels.rope import Rope, frequencies, llama3_frequencies, rope_table, yarn_frequencies


class Decoder:
    """A model's forward pass over paged KV. Knows no sequence: a `Batch` says all."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, arena: Arena) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.arena = arena
        self.heads = [
            Heads(config.heads, config.kv_heads, config.head_dim, config.score_scale, window, config.score_cap)
            for window in config.windows
        ]
        """How each layer attends."""
        self.distinct = list(dict.fromkeys(self.heads))
        rotations = [config.window_rotation if window else config.rotation for window in config.windows]
        distinct = list(dict.fromkeys(rotations))
        self.turned_by = [distinct.index(rotation) for rotation in rotations]
        """Which of `tables` rotates each layer's q and k."""
        positions = min(config.context, arena.count * arena.kv.page_tokens)
        where = arena.pages.device
        tables = [table(rotation, config.head_dim, positions) for rotation in distinct]
        self.tables = [(cos.to(where), sin.to(where)) for cos, sin in tables]

    def forward(self, batch: Batch) -> Tensor | None:
        """fp32 logits ``[samples, vocab]``; None if no row is sampled. Writes all rows' K and V into their pages."""
        return whole(self.parts(batch))

    def parts(self, batch: Batch) -> Parts[Tensor | None]:
        """`forward`, which can be stopped between two operators of any layer but the last; `batch` must stay as it is.

        What it keeps while it is stopped are the rows' hidden states and one more tensor of a few times their size.
        """
        ops, eps, weights = self.ops, self.config.norm_eps, self.weights
        ropes = [Rope(cos[batch.positions], sin[batch.positions]) for cos, sin in self.tables]
        for heads in self.distinct:
            ops.plan(batch, self.arena.pages, heads)
        residual = weights.embedding[batch.tokens]
        x = ops.rms_norm(residual, weights.layers[0].input_norm, eps)
        for index, layer in enumerate(weights.layers):
            held, heads, rope = self.arena.layer(index), self.heads[index], ropes[self.turned_by[index]]
            last = index + 1 == len(weights.layers)
            q = ops.rope_store(ops.linear(x, layer.qkv), batch, held, heads, rope, layer.qk_norms, eps)
            if last and batch.samples == 0:
                return None
            if not last:
                yield
            x = ops.attend(q, batch, held, heads)
            if not last:
                yield
            if last:  # from here on only the sampled rows matter
                x, residual = x[batch.sample], residual[batch.sample]
            x = ops.linear(x, layer.out)
            if layer.post_norms is not None:
                x = ops.rms_norm(x, layer.post_norms[0], eps)
            x, residual = ops.add_rms_norm(x, residual, layer.mlp_norm, eps)
            if not last:
                yield
            x = self.mlp(x, layer)
            if layer.post_norms is not None:
                x = ops.rms_norm(x, layer.post_norms[1], eps)
            following = weights.final_norm if last else weights.layers[index + 1].input_norm
            x, residual = ops.add_rms_norm(x, residual, following, eps)
            if not last:
                yield
        logits = ops.logits(x, weights.lm_head)
        if self.config.logit_cap is not None:
            logits = ops.soft_cap(logits, self.config.logit_cap)
        return logits[: batch.samples]

    def mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        """What a layer makes of normed rows; a mixture of experts would be another form of this, and no more."""
        gate_up = self.ops.linear(x, layer.gate_up)
        gated = self.ops.gelu_mul(gate_up) if self.config.activation == "gelu" else self.ops.silu_mul(gate_up)
        return self.ops.linear(gated, layer.down)


def table(rotation: Rotation, dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of all positions below `positions`; see `kernels.rope.rope_table`."""
    base = frequencies(dim, rotation.theta)
    match rotation.scaling:
        case None:
            return rope_table(base, positions)
        case Linear(factor):
            return rope_table(base / factor, positions)
        case Llama3(factor, low, high, original):
            return rope_table(llama3_frequencies(base, factor, low, high, original), positions)
        case Yarn(factor, fast, slow, original, truncate, gain):
            scaled = yarn_frequencies(base, rotation.theta, factor, fast, slow, original, truncate)
            return rope_table(scaled, positions, gain)
