"""What a model directory says about its model, read strictly and without torch.

An unknown key in ``config.json`` is an error by name, never ignored: a flag that we do not know may change every
token. The gateway reads the same facts (context length, end tokens, vocabulary, fingerprint), so nothing here
imports torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import ModelError
from core.kv import KvShape
from engine.checkpoint import tensor_index

DTYPES = ("float32", "bfloat16", "float16")
ARCHITECTURES = {"LlamaForCausalLM": "llama"}
"""Architectures that the decoder can run, and the `model_type` each goes with."""

IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "label2id",
        "max_length",
        "model_type",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "tokenizer_class",
        "transformers_version",
        "use_cache",
    }
)
"""Keys that say nothing about the arithmetic of a forward pass, or that are read beside the table."""

ONLY: dict[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "cross_attention_hidden_size": (None,),
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "pretraining_tp": (1,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "torchscript": (False,),
    "use_bfloat16": (False,),
}
"""Keys that may be there as long as they hold one of the values that the decoder implements."""

READ = frozenset(
    {
        "dtype",
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "torch_dtype",
        "vocab_size",
    }
)
"""Keys that `ModelConfig` is made of."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The llama3 way of stretching rotary frequencies over a longer context."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


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
    rope_theta: float
    rope_scaling: RopeScaling | None
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
        eos = _ids(_json_object(generation).get("eos_token_id"), "eos_token_id", str(generation))
        values = {name: getattr(config, name) for name in cls.__dataclass_fields__}
        values["eos_token_ids"] = tuple(dict.fromkeys((*config.eos_token_ids, *eos)))
        return cls(**values)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """The config in a parsed ``config.json``; `where` names it in errors."""
        _refuse_unsupported(raw, where)
        heads = _count(raw, "num_attention_heads", where)
        hidden = _count(raw, "hidden_size", where)
        kv_heads = _count(raw, "num_key_value_heads", where, default=heads)
        if heads % kv_heads:
            raise ModelError(f"{where}: num_key_value_heads: got {kv_heads}, want a divisor of {heads} heads")
        if raw.get("head_dim") is None and hidden % heads:
            raise ModelError(f"{where}: hidden_size: got {hidden}, want a multiple of {heads} heads")
        head_dim = _count(raw, "head_dim", where, default=hidden // heads)
        if head_dim % 2:
            raise ModelError(f"{where}: head_dim: got {head_dim}, want an even number")
        theta, scaling = _rope(raw, where)
        bos = _ids(raw.get("bos_token_id"), "bos_token_id", where)
        return cls(
            architecture=_architecture(raw, where),
            layers=_count(raw, "num_hidden_layers", where),
            hidden=hidden,
            intermediate=_count(raw, "intermediate_size", where),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=_count(raw, "vocab_size", where),
            context=_count(raw, "max_position_embeddings", where),
            norm_eps=_positive(raw, "rms_norm_eps", where, default=1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=_flag(raw, "tie_word_embeddings", where),
            dtype=_dtype(raw, where),
            eos_token_ids=_ids(raw.get("eos_token_id"), "eos_token_id", where),
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


def _refuse_unsupported(raw: Mapping[str, Any], where: str) -> None:
    for key, value in raw.items():
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
    model_type = raw.get("model_type", ARCHITECTURES[name])
    if model_type != ARCHITECTURES[name]:
        raise ModelError(f"{where}: model_type: got {model_type!r}, want {ARCHITECTURES[name]!r} for {name}")
    return name


def _count(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{where}: {key}: got {value!r}, want a whole number of at least 1")
    return value


def _positive(raw: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelError(f"{where}: {key}: got {value!r}, want a number above 0")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise ModelError(f"{where}: {key}: got {value!r}, want true or false")
    return value


def _dtype(raw: Mapping[str, Any], where: str) -> str:
    key = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    value = raw.get(key) or "float32"
    if value not in DTYPES:
        raise ModelError(f"{where}: {key}: got {value!r}, want one of {list(DTYPES)}")
    return str(value)


def _ids(value: object, key: str, where: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int) or one < 0:
            raise ModelError(f"{where}: {key}: got {value!r}, want a token id or a list of them")
    return tuple(ids)


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    modern = raw.get("rope_parameters") is not None
    key = "rope_parameters" if modern else "rope_scaling"
    table = raw.get(key) or {}
    if not isinstance(table, dict):
        raise ModelError(f"{where}: {key}: got {table!r}, want a JSON object")
    theta_from = table if "rope_theta" in table else raw
    theta = _positive(theta_from, "rope_theta", where, default=10000.0)
    kind = table.get("rope_type", table.get("type", "default"))
    known = {"rope_type", "type", "rope_theta"}
    if kind == "llama3":
        known |= {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    elif kind != "default":
        raise ModelError(f"{where}: {key}.rope_type: got {kind!r}, want 'default' or 'llama3'")
    for name, value in table.items():
        if name == "partial_rotary_factor" and value in (1, None):
            continue
        if name not in known:
            raise ModelError(f"{where}: {key}.{name}: got {value!r}, a key unknown for rope type {kind!r}")
    if kind == "default":
        return theta, None
    inside = f"{where}: {key}"
    scaling = RopeScaling(
        factor=_positive(table, "factor", inside),
        low_freq_factor=_positive(table, "low_freq_factor", inside),
        high_freq_factor=_positive(table, "high_freq_factor", inside),
        original_context=_count(table, "original_max_position_embeddings", inside),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelError(
            f"{inside}: high_freq_factor: got {scaling.high_freq_factor}, want above "
            f"low_freq_factor {scaling.low_freq_factor}"
        )
    return theta, scaling
