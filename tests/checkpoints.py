"""Small random checkpoints in the Hugging Face layout, written by our own code; for tests, demos and benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_llama(
    directory: str | Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate: int | None = None,
    vocab: int = 128,
    context: int = 4096,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    dtype: str = "float32",
    tied: bool = False,
    seed: int = 0,
    shards: int = 1,
    tokenizer: bool = False,
    eos: int | list[int] | None = 1,
    overrides: dict[str, Any] | None = None,
) -> Path:
    """Write a random Llama into `directory` and return it; `overrides` replaces keys of its config.json last.

    Scales are such that greedy text wanders: every layer adds about as much as the token itself, and the logits'
    spread is a few units. `tokenizer` adds a byte-level ``tokenizer.json`` (needs vocab >= 259).
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    dim = head_dim or hidden // heads
    inner = intermediate or hidden * 8 // 3 // 16 * 16
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": eos,
        "head_dim": dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": rope_scaling,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": vocab,
    }
    config.update(overrides or {})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    source = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, cols, generator=source) * gain * cols**-0.5).to(DTYPES[dtype])

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(hidden, generator=source)).to(DTYPES[dtype])

    # unit-variance embeddings: a tied output layer then sees its own input token, hence the smaller scale
    embedding_gain = hidden**0.5 * (0.2 if tied else 1.0)
    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden, embedding_gain)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = norm()
        tensors[prefix + "self_attn.q_proj.weight"] = matrix(heads * dim, hidden, 1.5)
        tensors[prefix + "self_attn.k_proj.weight"] = matrix(kv_heads * dim, hidden, 1.5)
        tensors[prefix + "self_attn.v_proj.weight"] = matrix(kv_heads * dim, hidden)
        tensors[prefix + "self_attn.o_proj.weight"] = matrix(hidden, heads * dim, 2.0)
        tensors[prefix + "post_attention_layernorm.weight"] = norm()
        tensors[prefix + "mlp.gate_proj.weight"] = matrix(inner, hidden)
        tensors[prefix + "mlp.up_proj.weight"] = matrix(inner, hidden)
        tensors[prefix + "mlp.down_proj.weight"] = matrix(hidden, inner, 2.0)
    tensors["model.norm.weight"] = norm()
    if not tied:
        tensors["lm_head.weight"] = matrix(vocab, hidden, 3.0)
    _save(folder, tensors, shards)
    if tokenizer:
        _byte_tokenizer(folder, vocab)
    return folder


def _save(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _byte_tokenizer(folder: Path, vocab: int) -> None:
    """A ``tokenizer.json`` of 256 byte tokens after <bos>, <eos> and <pad>; ids above stay without text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if vocab < 259:
        raise ValueError(f"vocab: got {vocab}, want at least 259 for a byte tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {token: place for place, token in enumerate(("<bos>", "<eos>", "<pad>", *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
