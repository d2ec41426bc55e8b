"""Fields of a parsed ``config.json``, each read strictly: a wrong value is a `ModelError` that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.errors import ModelError


def count(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A whole number of at least 1; `default` if there is none or null."""
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{where}: {key}: got {value!r}, want a whole number of at least 1")
    return value


def positive(raw: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A number above 0; `default` if there is none or null."""
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelError(f"{where}: {key}: got {value!r}, want a number above 0")
    return float(value)


def positive_or_none(raw: Mapping[str, Any], key: str, where: str) -> float | None:
    """A number above 0, or None if there is none or null."""
    return None if raw.get(key) is None else positive(raw, key, where)


def flag(raw: Mapping[str, Any], key: str, where: str, default: bool = False) -> bool:
    """True or false; `default` if it is not there."""
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise ModelError(f"{where}: {key}: got {value!r}, want true or false")
    return value


def table(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """A JSON object; an empty one if there is none or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise ModelError(f"{where}: {key}: got {value!r}, want a JSON object")
    return value or {}


def ids(raw: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """Token ids: a list of them, one alone, or none."""
    value = raw.get(key)
    found = [] if value is None else value if isinstance(value, list) else [value]
    for one in found:
        if isinstance(one, bool) or not isinstance(one, int) or one < 0:
            raise ModelError(f"{where}: {key}: got {value!r}, want a token id or a list of them")
    return tuple(found)
