"""Events and commands as plain JSON and back: what was said to a machine, and what it said, as a recording keeps it.

They are values, so they are written as trees, not as the graph that `core.state` makes of a machine:

| JSON | |
|---|---|
| null, true, 1, 0.5, "a" | itself; whole numbers of any size |
| [VALUE, ...] | a tuple |
| {"@": "module:Class", name: VALUE, ...} | a frozen dataclass or a named tuple, by the fields that make it |
| {"enum": ["module:Class", VALUE]} | a member, by its value |
| {"float": "inf"} | a number that JSON has not got |
| {"dict": [[VALUE, VALUE], ...]} | in its order |
| {"list": [VALUE, ...]}, {"set": [VALUE, ...]} | a set in the order of its members' JSON |

Classes are those of the pure rooms (`core.state.ROOMS`). Others cannot be written (LocalError), nor read (StateError).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable
from enum import Enum
from typing import Any

from core.errors import LocalError, StateError
from core.state import ROOMS

_PLAIN = frozenset((type(None), bool, int, str))

_fields: dict[type, tuple[str, tuple[str, ...]]] = {}
"""Of classes that were written: the name, and the fields that make an object."""
_classes: dict[str, type] = {}
"""Those that were read, by name."""


def written(value: Any) -> Any:
    """JSON of a value; LocalError where it is none that `read` could make again."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is tuple:
        # Prompts, pages, hashes: most of a long event is one row of whole numbers.
        return list(value) if _PLAIN.issuperset(map(type, value)) else [written(each) for each in value]
    known = _fields.get(kind)
    if known is not None:
        name, names = known
        said: dict[str, Any] = {"@": name}
        for each in names:
            said[each] = written(getattr(value, each))
        return said
    if isinstance(value, Enum):
        return {"enum": [_name(kind), written(value.value)]}
    if kind is dict:
        return {"dict": [[written(key), written(each)] for key, each in value.items()]}
    if kind is list:
        return {"list": [written(each) for each in value]}
    if kind is set or kind is frozenset:
        return {"set": sorted((written(each) for each in value), key=json.dumps)}
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        _fields[kind] = _name(kind), tuple(kind._fields)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _fields[kind] = _name(kind), tuple(field.name for field in dataclasses.fields(value) if field.init)
    else:
        raise LocalError(f"words: got {value!r:.200}, want a value of the pure rooms")
    return written(value)


def read(document: Any) -> Any:
    """The value that was written; StateError where it is none that this code has written."""
    kind = type(document)
    if kind in _PLAIN or kind is float:
        return document
    if kind is list:
        return tuple([read(each) for each in document])
    if kind is not dict:
        raise StateError(f"words: got {kind.__name__}, want JSON")
    if "@" in document:
        of = _class(document["@"])
        try:
            return of(**{name: read(each) for name, each in document.items() if name != "@"})
        except TypeError as error:
            raise StateError(f"words: {document['@']}: got {sorted(document)}: {error}") from None
    try:
        ((name, inside),) = document.items()
        return _CONTAINERS[name](inside)
    except (ValueError, TypeError, KeyError):
        raise StateError(f"words: got {str(document)[:80]}, want a value") from None


def _enum(inside: list[Any]) -> Enum:
    name, value = inside
    of = _class(name)
    if not issubclass(of, Enum):
        raise StateError(f"words: got {name}, want an enum")
    return of(read(value))


_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "enum": _enum,
    "float": float,
    "dict": lambda inside: {read(key): read(each) for key, each in inside},
    "list": lambda inside: [read(each) for each in inside],
    "set": lambda inside: frozenset(read(each) for each in inside),
}


def _name(kind: type) -> str:
    if not ROOMS.fullmatch(kind.__module__) or "." in kind.__qualname__:
        raise LocalError(f"words: got a {kind.__module__}.{kind.__qualname__}, want a class of the pure rooms")
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: Any) -> type:
    """The dataclass or enum of that name, if a recording may have it."""
    found = _classes.get(name) if isinstance(name, str) else None
    if found is None:
        module, _, inside = str(name).partition(":")
        try:
            of = getattr(importlib.import_module(module), inside, None) if ROOMS.fullmatch(module) else None
        except ImportError:
            of = None
        data = isinstance(of, type) and (dataclasses.is_dataclass(of) or issubclass(of, Enum) or hasattr(of, "_fields"))
        if not isinstance(of, type) or not data or of.__module__ != module:
            raise StateError(f"words: got {str(name)[:80]!r}, want a value's class of the pure rooms")
        found = _classes[name] = of
    return found
