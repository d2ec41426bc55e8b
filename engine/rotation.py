"""How positions become rotations, as a ``config.json`` says it in any of its spellings.

New ones say all in `rope_parameters` (for Gemma 3 one table a kind of layer); old ones say `rope_theta`,
`rope_scaling` and, for Gemma 3, `rope_local_base_freq`. Dynamic scaling starts behind `max_position_embeddings`, which
is where the context ends here: within it there is nothing to scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ModelError
from engine import fields

KEYS = frozenset({"rope_parameters", "rope_scaling", "rope_theta"})
"""The keys of a config that are read here, beside `LOCAL_THETA`."""
LOCAL_THETA = "rope_local_base_freq"
FULL, SLIDING = "full_attention", "sliding_attention"
"""The kinds of layers, as configs name them."""
SCALINGS = {
    "default": frozenset[str](),
    "dynamic": frozenset({"factor"}),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "factor",
            "mscale",
            "mscale_all_dim",
            "original_max_position_embeddings",
            "truncate",
        }
    ),
}
"""The ways of scaling, each with the keys that belong to it."""


@dataclass(frozen=True, slots=True)
class Linear:
    """Every frequency divided by a factor."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3:
    """Slow frequencies divided by a factor, fast ones kept; see `kernels.rope.llama3_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class Yarn:
    """Likewise by the turns in the original context, and rotated numbers larger by `gain`; see `yarn_frequencies`."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int
    truncate: bool
    gain: float


@dataclass(frozen=True, slots=True)
class Rotation:
    """Base and scaling of the rotary frequencies."""

    theta: float
    scaling: Linear | Llama3 | Yarn | None = None


def rotations(raw: Mapping[str, Any], context: int, where: str) -> dict[str, Rotation]:
    """The rotation of each kind of layer; `raw` has `LOCAL_THETA` if they may differ."""
    new, old = fields.table(raw, "rope_parameters", where), fields.table(raw, "rope_scaling", where)
    if new and old and new != old:
        raise ModelError(f"{where}: rope_scaling: got {old!r} beside rope_parameters, want one of the two")
    key, given = ("rope_parameters", new) if new else ("rope_scaling", old)
    theta = fields.positive(raw, "rope_theta", where, default=10000.0)
    if LOCAL_THETA not in raw:
        both = _rotation(given, theta, context, f"{where}: {key}")
        return {FULL: both, SLIDING: both}
    tables: Mapping[str, Any] = new or {FULL: old}
    for kind, value in tables.items():
        if kind not in (FULL, SLIDING):
            raise ModelError(f"{where}: {key}.{kind}: got {value!r}, want {FULL!r} or {SLIDING!r}")
    local = fields.positive(raw, LOCAL_THETA, where)
    return {
        kind: _rotation(fields.table(tables, kind, where), base, context, f"{where}: {key}.{kind}" if new else where)
        for kind, base in ((FULL, theta), (SLIDING, local))
    }


def _rotation(given: Mapping[str, Any], theta: float, context: int, where: str) -> Rotation:
    name = given.get("rope_type", given.get("type", "default"))
    if name not in SCALINGS:
        raise ModelError(f"{where}.rope_type: got {name!r}, want one of {sorted(SCALINGS)}")
    for key, value in given.items():
        if key == "partial_rotary_factor" and value in (1, None):
            continue
        if key not in SCALINGS[name] | {"rope_type", "type", "rope_theta"}:
            raise ModelError(f"{where}.{key}: got {value!r}, a key unknown for rope type {name!r}")
    return Rotation(fields.positive(given, "rope_theta", where, default=theta), _scaling(name, given, context, where))


def _scaling(name: str, given: Mapping[str, Any], context: int, where: str) -> Linear | Llama3 | Yarn | None:
    if name == "default":
        return None
    original = fields.count(given, "original_max_position_embeddings", where, default=context)
    if name == "yarn":
        factor = fields.positive(given, "factor", where, default=context / original)
        return Yarn(
            factor,
            fields.positive(given, "beta_fast", where, default=32.0),
            fields.positive(given, "beta_slow", where, default=1.0),
            original,
            fields.flag(given, "truncate", where, default=True),
            _gain(given, factor, where),
        )
    factor = fields.positive(given, "factor", where)
    if name == "dynamic":
        return None
    if name == "linear":
        return Linear(factor)
    low, high = (fields.positive(given, f"{end}_freq_factor", where) for end in ("low", "high"))
    if high <= low:
        raise ModelError(f"{where}: high_freq_factor: got {high}, want above low_freq_factor {low}")
    return Llama3(factor, low, high, original)


def _gain(given: Mapping[str, Any], factor: float, where: str) -> float:
    """What yarn multiplies cosine and sine by."""

    def growth(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    said = fields.positive_or_none(given, "attention_factor", where)
    if said is not None:
        return said
    scale, scale_all = (fields.positive_or_none(given, key, where) for key in ("mscale", "mscale_all_dim"))
    return growth(1.0) if scale is None or scale_all is None else growth(scale) / growth(scale_all)
