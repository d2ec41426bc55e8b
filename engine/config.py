"""What a model directory says about its model, read strictly and without torch.

An unknown key in ``config.json`` is an error by name, never ignored: a flag that we do not know may change every
token. The gateway reads the same facts (context length, end tokens, vocabulary, fingerprint), so nothing here
imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from core.errors import ModelError
from core.kv import KvShape
from engine import fields, rotation
from engine.checkpoint import tensor_index
from engine.rotation import FULL, SLIDING, Rotation, rotations

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}
"""The activations of the MLP as configs name them, and the operation that each means."""

IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "max_length",
        "model_type",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "tokenizer_class",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
    }
)
"""Keys that say nothing about the arithmetic of a forward pass, or that are read beside the table."""

ONLY: dict[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "attn_logit_softcapping": (None,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "torchscript": (False,),
    "use_bfloat16": (False,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
}
"""Keys that may be there as long as they hold one of the values that the decoder implements."""

READ = rotation.KEYS | {
    "dtype",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "torch_dtype",
    "vocab_size",
}
"""Keys that `ModelConfig` is made of, whatever the architecture."""


@dataclass(frozen=True, slots=True)
class Family:
    """What the name of an architecture says of its decoder; the rest is said by the keys of a config."""

    model_type: str
    keys: frozenset[str] = frozenset()
    """Keys that are read, beside `READ`."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """What keys stand for where they are not in a config."""
    qkv_bias: bool = False
    """q, k and v have a bias, whatever `attention_bias` says."""
    qk_norm: bool = False
    scaled_embedding: bool = False
    """Embeddings are multiplied by the root of the hidden size."""
    norm_offset: float = 0.0
    post_norms: bool = False


WINDOWED = frozenset({"layer_types", "sliding_window"})
QWEN = WINDOWED | {"max_window_layers", "use_sliding_window"}
QWEN_ABSENT = {"max_window_layers": 28, "num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False}
GEMMA = WINDOWED | {"attention_bias", "final_logit_softcapping", "hidden_activation", "query_pre_attn_scalar"}
GEMMA_ABSENT = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
# An architecture with experts would differ in its MLP alone: see `engine.model.Decoder.mlp`.
ARCHITECTURES = {
    "LlamaForCausalLM": Family("llama", frozenset({"attention_bias"})),
    "MistralForCausalLM": Family(
        "mistral", frozenset({"sliding_window"}), {"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "Qwen2ForCausalLM": Family("qwen2", QWEN, QWEN_ABSENT, qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", QWEN | {"attention_bias"}, QWEN_ABSENT | {"head_dim": 128}, qk_norm=True),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        GEMMA | {"attn_logit_softcapping", "sliding_window_size"},
        GEMMA_ABSENT | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2},
        scaled_embedding=True,
        norm_offset=1.0,
        post_norms=True,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        GEMMA | {"_sliding_window_pattern", "sliding_window_pattern", rotation.LOCAL_THETA},
        GEMMA_ABSENT | {"rope_theta": 1e6, rotation.LOCAL_THETA: 1e4, "sliding_window_pattern": 6},
        qk_norm=True,
        scaled_embedding=True,
        norm_offset=1.0,
        post_norms=True,
    ),
}
"""Architectures that the decoder can run."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The decoder's parameters; sizes are counts, ids are token ids."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    """Most tokens of a sequence, prompt and output together."""
    norm_eps: float
    norm_offset: float
    """What a norm's stored weights are smaller by than those it multiplies with."""
    post_norms: bool
    """What attention and the MLP give is normed before it is added, too."""
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    """Every head of q and k is normed before it is rotated."""
    activation: str
    """"silu" or "gelu" (its tanh form)."""
    embedding_scale: float
    score_scale: float
    score_cap: float | None
    logit_cap: float | None
    windows: tuple[int | None, ...]
    """For each layer how many keys a row sees, its own included; None: all before it."""
    rotation: Rotation
    window_rotation: Rotation
    """Of the layers with a window."""
    tied: bool
    """The output layer is the embedding table."""
    dtype: str
    """The checkpoint's dtype, one of `DTYPES`."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def kv(self, page_tokens: int, dtype: str | None = None) -> KvShape:
        """The shape of this model's KV pages, in its own dtype unless another is named."""
        return KvShape(self.layers, self.kv_heads, self.head_dim, page_tokens, dtype or self.dtype)

    @classmethod
    def read(cls, model_dir: str | Path) -> ModelConfig:
        """The config of a Hugging Face model directory; `ModelError` on anything missing, unknown or unsupported."""
        path = Path(model_dir) / "config.json"
        config = cls.parse(_json_object(path), str(path))
        generation = path.with_name("generation_config.json")
        if not generation.exists():
            return config
        eos = fields.ids(_json_object(generation), "eos_token_id", str(generation))
        return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *eos))))

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """The config in a parsed ``config.json``; `where` names it in errors."""
        name = _architecture(raw, where)
        family = ARCHITECTURES[name]
        _refuse_unsupported(raw, family, where)
        raw = {**family.absent, **raw}
        heads = fields.count(raw, "num_attention_heads", where)
        hidden = fields.count(raw, "hidden_size", where)
        kv_heads = fields.count(raw, "num_key_value_heads", where, default=heads)
        if heads % kv_heads:
            raise ModelError(f"{where}: num_key_value_heads: got {kv_heads}, want a divisor of {heads} heads")
        if raw.get("head_dim") is None and hidden % heads:
            raise ModelError(f"{where}: hidden_size: got {hidden}, want a multiple of {heads} heads")
        head_dim = fields.count(raw, "head_dim", where, default=hidden // heads)
        if head_dim % 2:
            raise ModelError(f"{where}: head_dim: got {head_dim}, want an even number")
        layers = fields.count(raw, "num_hidden_layers", where)
        context = fields.count(raw, "max_position_embeddings", where)
        turned = rotations(raw, context, where)
        attention_bias = fields.flag(raw, "attention_bias", where)
        bos = fields.ids(raw, "bos_token_id", where)
        return cls(
            architecture=name,
            layers=layers,
            hidden=hidden,
            intermediate=fields.count(raw, "intermediate_size", where),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=fields.count(raw, "vocab_size", where),
            context=context,
            norm_eps=fields.positive(raw, "rms_norm_eps", where, default=1e-6),
            norm_offset=family.norm_offset,
            post_norms=family.post_norms,
            qkv_bias=family.qkv_bias or attention_bias,
            out_bias=attention_bias,
            qk_norm=family.qk_norm,
            activation=_activation(raw, where),
            embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
            score_scale=fields.positive(raw, "query_pre_attn_scalar", where, default=float(head_dim)) ** -0.5,
            score_cap=fields.positive_or_none(raw, "attn_logit_softcapping", where),
            logit_cap=fields.positive_or_none(raw, "final_logit_softcapping", where),
            windows=_windows(raw, layers, where),
            rotation=turned[FULL],
            window_rotation=turned[SLIDING],
            tied=fields.flag(raw, "tie_word_embeddings", where),
            dtype=_dtype(raw, where),
            eos_token_ids=fields.ids(raw, "eos_token_id", where),
            bos_token_id=bos[0] if bos else None,
        )


def fingerprint(model_dir: str | Path) -> str:
    """Hex sha256 over the parsed config and the names, shapes and dtypes of all tensors.

    Workers whose fingerprints differ must not exchange KV. Headers are read, the payload is not: two checkpoints of
    one shape with different values have one fingerprint.
    """
    config = asdict(ModelConfig.read(model_dir))
    tensors = sorted((name, list(slot.shape), slot.dtype) for name, slot in tensor_index(model_dir).items())
    canonical = json.dumps({"config": config, "tensors": tensors}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _json_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file, want a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path}: got a {type(document).__name__}, want a JSON object")
    return document


def _refuse_unsupported(raw: Mapping[str, Any], family: Family, where: str) -> None:
    for key, value in raw.items():
        if key in family.keys:
            continue
        if key in ONLY:
            if value not in ONLY[key]:
                want = " or ".join(repr(allowed) for allowed in ONLY[key])
                raise ModelError(f"{where}: {key}: got {value!r}, want {want}")
        elif key not in READ and key not in IGNORED:
            raise ModelError(f"{where}: {key}: got {value!r}, a key this engine does not know and will not ignore")


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ModelError(f"{where}: architectures: got {names!r}, want one of {sorted(ARCHITECTURES)}")
    name = str(names[0])
    want = ARCHITECTURES[name].model_type
    model_type = raw.get("model_type", want)
    if model_type != want:
        raise ModelError(f"{where}: model_type: got {model_type!r}, want {want!r} for {name}")
    return name


def _dtype(raw: Mapping[str, Any], where: str) -> str:
    key = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    value = raw.get(key) or "float32"
    if value not in DTYPES:
        raise ModelError(f"{where}: {key}: got {value!r}, want one of {list(DTYPES)}")
    return str(value)


def _activation(raw: Mapping[str, Any], where: str) -> str:
    """Configs with `hidden_activation` go by it; some name the same activation in `hidden_act` again."""
    key = "hidden_activation" if raw.get("hidden_activation") is not None else "hidden_act"
    name = raw.get(key, "silu")
    if name not in ACTIVATIONS:
        raise ModelError(f"{where}: {key}: got {name!r}, want one of {sorted(ACTIVATIONS)}")
    _agree(raw, "hidden_act", name, where)
    return ACTIVATIONS[name]


def _windows(raw: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    """For each layer its window: by `layer_types`, or by the rule of the architecture."""
    window = None
    if raw.get("sliding_window") is not None and fields.flag(raw, "use_sliding_window", where, default=True):
        window = fields.count(raw, "sliding_window", where)
    _agree(raw, "sliding_window_size", window, where)
    kinds = raw.get("layer_types")
    if kinds is None:
        _agree(raw, "_sliding_window_pattern", raw.get("sliding_window_pattern"), where)
        kinds = _layer_types(raw, layers, window, where)
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        raise ModelError(f"{where}: layer_types: got {kinds!r}, want {FULL!r} or {SLIDING!r} for each layer")
    if window is None and SLIDING in kinds:
        raise ModelError(f"{where}: sliding_window: got None, want the window of the layers with {SLIDING}")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _agree(raw: Mapping[str, Any], key: str, want: object, where: str) -> None:
    """Refuse a key that says again, and differently, what another one says."""
    if raw.get(key, want) != want:
        raise ModelError(f"{where}: {key}: got {raw[key]!r}, want {want!r}")


def _layer_types(raw: Mapping[str, Any], layers: int, window: int | None, where: str) -> list[str]:
    if "sliding_window_pattern" in raw:  # Gemma: each layer of this number is a full one
        period = fields.count(raw, "sliding_window_pattern", where)
        return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]
    first = raw.get("max_window_layers", 0)  # Qwen: the layers from this one on
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ModelError(f"{where}: max_window_layers: got {first!r}, want a whole number")
    return [SLIDING if window is not None and layer >= first else FULL for layer in range(layers)]
