"""Weights from a Hugging Face checkpoint, streamed: one layer at a time is read, merged, packed and dropped.

q, k and v are stacked into one matrix, gate and up into another: one large product in place of three or two. The
table below names what every part of the decoder is made of; nothing in the checkpoint may be left over.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import ModelError
from engine.arena import TORCH_DTYPES
from engine.checkpoint import TensorSlot, tensor_index
from engine.config import ModelConfig
from kernels.ops import Ops, Packed

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""

STORED: dict[str, tuple[np.dtype[Any], torch.dtype]] = {
    "F32": (np.dtype("<f4"), torch.float32),
    "BF16": (np.dtype("<i2"), torch.bfloat16),
    "F16": (np.dtype("<f2"), torch.float16),
}
"""The stored dtypes that can be read: as numpy maps them (it knows no bf16), and as torch sees them."""
LEFT_OUT = re.compile(r"\.rotary_emb\.inv_freq$")
"""Tensors of old checkpoints that are derived from the config and may be there."""

LAYER = "model.layers.{layer}."
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)
WEIGHT, BIAS = ".weight", ".bias"
QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
INPUT_NORM = "input_layernorm.weight"
NORMS = (INPUT_NORM, "post_attention_layernorm.weight")
"""Before attention and before the MLP."""
FOUR_NORMS = (
    INPUT_NORM,
    "pre_feedforward_layernorm.weight",
    "post_attention_layernorm.weight",
    "post_feedforward_layernorm.weight",
)
"""Likewise, then behind attention and behind the MLP."""
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer: norms as fp32 vectors, matrices in the backend's own form."""

    input_norm: Tensor
    qkv: Packed
    qk_norms: tuple[Tensor, Tensor] | None
    out: Packed
    mlp_norm: Tensor
    gate_up: Packed
    down: Packed
    post_norms: tuple[Tensor, Tensor] | None
    """Of what attention gives, and of what the MLP gives."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model, ready for the table of operations it was packed for."""

    embedding: Tensor
    """``[vocab, hidden]`` in the compute dtype, scaled."""
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    lm_head: Packed


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config must hold, by name."""
    hidden, inner = config.hidden, config.intermediate
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    want: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab, hidden), FINAL_NORM: (hidden,)}
    if not config.tied:
        want[LM_HEAD] = (config.vocab, hidden)
    of_layer: dict[str, tuple[int, ...]] = dict.fromkeys(FOUR_NORMS if config.post_norms else NORMS, (hidden,))
    if config.qk_norm:
        of_layer |= dict.fromkeys(QK_NORMS, (config.head_dim,))
    for name, rows in zip(QKV, (q_rows, kv_rows, kv_rows), strict=True):
        of_layer[name + WEIGHT] = (rows, hidden)
        if config.qkv_bias:
            of_layer[name + BIAS] = (rows,)
    of_layer[OUT[0] + WEIGHT] = (hidden, q_rows)
    if config.out_bias:
        of_layer[OUT[0] + BIAS] = (hidden,)
    of_layer |= dict.fromkeys((name + WEIGHT for name in GATE_UP), (inner, hidden))
    of_layer[DOWN[0] + WEIGHT] = (hidden, inner)
    for layer in range(config.layers):
        prefix = LAYER.format(layer=layer)
        want |= {prefix + name: shape for name, shape in of_layer.items()}
    return want


def load(
    model_dir: str | Path,
    config: ModelConfig,
    ops: Ops,
    dtype: str,
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> Weights:
    """The model's weights in `dtype`, packed by `ops`; `ModelError` names what is missing, left over or misshapen."""
    reader = _Reader(model_dir, config, TORCH_DTYPES[dtype], progress, device)
    embedding = reader.tensor(EMBEDDING)
    norms = FOUR_NORMS if config.post_norms else NORMS
    layers = []
    for layer in range(config.layers):
        prefix = LAYER.format(layer=layer)
        input_norm, mlp_norm = reader.norms(prefix, norms[:2])
        layers.append(
            LayerWeights(
                input_norm=input_norm,
                qkv=ops.pack(*reader.stacked(prefix, QKV, config.qkv_bias)),
                qk_norms=reader.norms(prefix, QK_NORMS) if config.qk_norm else None,
                out=ops.pack(*reader.stacked(prefix, OUT, config.out_bias)),
                mlp_norm=mlp_norm,
                gate_up=ops.pack(*reader.stacked(prefix, GATE_UP)),
                down=ops.pack(*reader.stacked(prefix, DOWN)),
                post_norms=reader.norms(prefix, norms[2:]) if config.post_norms else None,
            )
        )
    final_norm = reader.norm(FINAL_NORM)
    lm_head = ops.pack_head(embedding if config.tied else reader.tensor(LM_HEAD))
    if config.embedding_scale != 1:  # a tied output layer keeps the numbers as they are stored
        embedding = embedding * torch.tensor(config.embedding_scale, dtype=embedding.dtype)
    return Weights(embedding, tuple(layers), final_norm, lm_head)


class _Reader:
    """Reads tensors by name after the whole index has been checked against the config."""

    def __init__(
        self,
        model_dir: str | Path,
        config: ModelConfig,
        dtype: torch.dtype,
        progress: Progress | None,
        device: torch.device | None,
    ) -> None:
        self._device = device
        self._slots = tensor_index(model_dir)
        self._dtype = dtype
        self._norm_offset = config.norm_offset
        self._progress = progress
        want = shapes(config)
        for name, shape in want.items():
            slot = self._slots.get(name)
            if slot is None:
                raise ModelError(f"{model_dir}: tensor {name!r} is missing")
            if slot.shape != shape:
                raise ModelError(
                    f"{slot.path}: tensor {name!r}: got shape {list(slot.shape)}, want {list(shape)} by config.json"
                )
            if slot.dtype not in STORED:
                raise ModelError(f"{slot.path}: tensor {name!r}: got dtype {slot.dtype}, want one of {sorted(STORED)}")
        for name, slot in self._slots.items():
            if name not in want and not LEFT_OUT.search(name) and not (config.tied and name == LM_HEAD):
                raise ModelError(f"{slot.path}: tensor {name!r} is unexpected, this architecture has no such part")
        self._total = sum(self._slots[name].nbytes for name in want)
        self._done = 0

    def tensor(self, name: str) -> Tensor:
        """One tensor in the compute dtype, in memory of its own."""
        slot = self._slots[name]
        mapped = _mapped(slot)
        out = torch.empty(slot.shape, dtype=self._dtype, device=self._device)
        out.copy_(mapped)
        self._done += slot.nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)
        return out

    def norm(self, name: str) -> Tensor:
        """A norm's weights as they multiply, fp32."""
        return self.tensor(name).float() + self._norm_offset

    def norms(self, prefix: str, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Two of them."""
        first, second = (self.norm(prefix + name) for name in names)
        return first, second

    def stacked(self, prefix: str, names: tuple[str, ...], bias: bool = False) -> tuple[Tensor, ...]:
        """The matrices of the products `names` on top of each other, then their biases if they have one."""
        parts = [[self.tensor(prefix + name + part) for name in names] for part in (WEIGHT, BIAS)[: 1 + bias]]
        return tuple(part[0] if len(part) == 1 else torch.cat(part) for part in parts)


def _mapped(slot: TensorSlot) -> Tensor:
    """The tensor as it lies in the file (not copied, not to be written)."""
    stored, dtype = STORED[slot.dtype]
    flat = np.memmap(slot.path, dtype=stored, mode="c", offset=slot.offset, shape=(slot.nbytes // stored.itemsize,))
    return torch.from_numpy(flat).view(dtype).view(slot.shape)
