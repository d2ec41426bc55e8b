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
        byte_tokenizer(folder, vocab)
    return folder


SMALL: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 64,
    "intermediate_size": 112,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "vocab_size": 128,
}
LLAMA = SMALL | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
MISTRAL = SMALL | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"}
QWEN2 = SMALL | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_window_layers": 1,
    "rope_theta": 1000000.0,
    "sliding_window": 24,
    "use_sliding_window": False,
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 32,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": True,
}
GEMMA2 = SMALL | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 3.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 9.0,
    "head_dim": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 20,
    "rope_theta": 10000.0,
    "sliding_window": 24,
    "sliding_window_size": 24,
}
GEMMA3 = SMALL | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 20,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000.0,
    "sliding_window": 24,
    "sliding_window_pattern": 6,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 2": LLAMA | {"num_key_value_heads": 4, "pretraining_tp": 1, "rope_scaling": None},
    "Llama 3": LLAMA
    | {
        "mlp_bias": False,
        "rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 32},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "Llama, attention bias": LLAMA | {"attention_bias": True},
    "Llama, linear rope": LLAMA | {"rope_scaling": {"factor": 3.0, "type": "linear"}},
    "Llama, dynamic rope": LLAMA | {"rope_scaling": {"factor": 3.0, "type": "dynamic"}},
    "Llama, yarn with mscale": LLAMA
    | {
        "rope_parameters": YARN
        | {
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
            "rope_theta": 5000.0,
            "truncate": False,
        }
    },
    "Mistral": MISTRAL | {"head_dim": None, "sliding_window": 24},
    "Qwen2": QWEN2,
    "Qwen2.5, yarn": QWEN2 | {"rope_scaling": YARN},
    "Qwen2, sliding window": QWEN2 | {"use_sliding_window": True},
    "Qwen3": QWEN3,
    "Gemma 2": GEMMA2,
    "Gemma 3": GEMMA3,
}
"""Small models of every architecture, their configs in the spelling of the checkpoints on the hub."""


def make_model(directory: str | Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write a random model of any architecture into `directory` and return it.

    Norms, biases and scales are such that a forgotten one shows. All numbers are bf16 ones, whatever the dtype.
    """
    from engine.config import ModelConfig
    from engine.weights import EMBEDDING, LM_HEAD, shapes

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    source = torch.Generator().manual_seed(seed)
    read = ModelConfig.parse(config)
    gains = {"q_proj": 1.2, "k_proj": 1.2, "o_proj": 1.5, "down_proj": 1.5, LM_HEAD: 3.0}
    gains[EMBEDDING] = 1.0 if read.embedding_scale > 1 else (0.2 if read.tied else 1.0) * read.hidden**0.5
    tensors = {}
    for name, shape in shapes(read).items():
        part = name.split(".")[-2]
        numbers = torch.randn(shape, generator=source)
        if part.endswith("norm"):
            numbers = 1 - read.norm_offset + 0.3 * numbers
        elif name.endswith("bias"):
            numbers *= 0.5
        else:
            numbers *= gains.get(name, gains.get(part, 1.0)) * shape[1] ** -0.5
        tensors[name] = numbers.bfloat16().to(DTYPES[read.dtype])
    _save(folder, tensors, 1)
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


def byte_tokenizer(folder: Path, vocab: int) -> None:
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
