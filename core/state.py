"""The whole state of a policy as plain JSON and back: what was decided wrongly can be looked at and stepped through.

A restored machine gives the same commands for the same events as the one that was written. So the graph of its objects
is written as it is: every container and every object once, by number, and whoever has it refers to the number. What
two of them share they share again (a ledger, a row that stands in a table and in a heap), and cycles need no care.

    {"format": "baton.state", "version": 1, "root": VALUE, "objects": [OBJECT, ...]}

| VALUE | |
|---|---|
| null, true, 1, 0.5, "a" | itself |
| {"#": 7} | object number 7 |
| {"int": "..."} | a whole number that readers with 64-bit floats would round |
| {"float": "inf"} | a number that JSON has not got |

| OBJECT | |
|---|---|
| ["list", [VALUE, ...]] | also "tuple" and "set" |
| ["named", "module:Class", [VALUE, ...]] | a named tuple |
| ["deque", [VALUE, ...], VALUE] | the last is its most entries, or null |
| ["dict", [[VALUE, VALUE], ...]] | also "OrderedDict"; in its order |
| ["enum", "module:Class", VALUE] | a member, by its value |
| ["method", VALUE, "name"] | a method of an object, bound to it |
| ["function", "module:name"] | a function of a module |
| ["module:Class", {name: VALUE, ...}] | an object, by its attributes |

Classes are those of the pure rooms (`ROOMS`), which hold nothing that runs when an object is made this way: a document
is data, whoever wrote it. It is bound to the version of the code that wrote it: attributes that a class with slots does
not have, or lacks, are an error, and so is a machine whose own `check` is not content.

Other functions, files, iterators and whatever else has no place in a policy cannot be written: LocalError.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from types import FunctionType, MethodType
from typing import Any, TypeVar

from core.errors import LocalError, StateError

FORMAT = "baton.state"
BRIEF = "baton.state.brief"
VERSION = 1
"""Raised when a document means something else than before."""
ROOMS = re.compile(r"core\.\w+|scheduler\.\w+|transfer\.(source|sink)")
"""Modules whose classes may be in a document."""
EXACT = 2**53
"""Whole numbers from here on are written as text."""

T = TypeVar("T")

_PLAIN = (type(None), bool, str)
_INTS = frozenset((int,))
_ROWS: dict[str, type] = {"list": list, "tuple": tuple, "set": set}
_TABLES: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict}
_NAMES = {kind: name for name, kind in (*_ROWS.items(), *_TABLES.items())}


def dump(root: object, *, brief: bool = False) -> dict[str, Any]:
    """All that `root` refers to, as JSON; the same state gives the same document, but for the order of sets.

    `brief` is for people, who may not see what clients wrote: of a row of whole numbers (a prompt, an answer, a table
    of pages) only the length is written, as ["numbers", LENGTH]. Such a document cannot be loaded.
    """
    return _Writer(brief).document(root)


def load(document: object, wanted: type[T]) -> T:
    """The `wanted` that a document holds; StateError where it is none that this code has written."""
    root = _Reader(document).root()
    if not isinstance(root, wanted):
        raise StateError(f"state: root: got {type(root).__name__}, want {wanted.__name__}")
    check = getattr(root, "check", None)
    if check is not None:
        try:
            check()
        except Exception as error:
            raise StateError(f"state: {wanted.__name__} is not sound: {type(error).__name__} {error}") from error
    return root


def slots_of(kind: type) -> tuple[str, ...] | None:
    """Attributes that objects of a class can have, in order; None if they can have any."""
    names: list[str] = []
    for each in reversed(kind.__mro__[:-1]):
        own = each.__dict__.get("__slots__")
        if own is None:
            return None
        names += [own] if isinstance(own, str) else own
    return tuple(names)


class _Writer:
    def __init__(self, brief: bool) -> None:
        self._brief = brief
        self._numbers: dict[int, int] = {}
        """Of objects, by their address."""
        self._found: list[object] = []
        """By number, which also keeps them, and so their addresses."""

    def document(self, root: object) -> dict[str, Any]:
        """Breadth first, without recursion: chains of any length may be in it."""
        written: list[Any] = []
        first = self._value(root)
        while len(written) < len(self._found):
            written.append(self._object(self._found[len(written)]))
        return {"format": BRIEF if self._brief else FORMAT, "version": VERSION, "root": first, "objects": written}

    def _value(self, value: object) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is int:
            assert isinstance(value, int)
            return value if -EXACT < value < EXACT else {"int": str(value)}
        if kind is float:
            assert isinstance(value, float)
            return value if math.isfinite(value) else {"float": repr(value)}
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._found)
            self._found.append(value)
        return {"#": number}

    def _values(self, values: Iterable[object]) -> list[Any]:
        return [self._value(each) for each in values]

    def _object(self, found: Any) -> list[Any]:
        kind = type(found)
        name = _NAMES.get(kind)
        if self._brief and (name in _ROWS or kind is deque) and found and _INTS.issuperset(map(type, found)):
            return ["numbers", len(found)]
        if name in _ROWS:
            return [name, self._values(found)]
        if name is not None:
            return [name, [self._values(pair) for pair in found.items()]]
        if isinstance(found, tuple) and hasattr(kind, "_fields") and ROOMS.fullmatch(kind.__module__):
            return ["named", _named(kind), self._values(found)]
        if kind is deque:
            return ["deque", self._values(found), self._value(found.maxlen)]
        if isinstance(found, Enum):
            return ["enum", _named(kind), self._value(found.value)]
        if kind is MethodType and getattr(type(found.__self__), found.__name__, None) is found.__func__:
            return ["method", self._value(found.__self__), found.__name__]
        if kind is FunctionType and getattr(sys.modules[found.__module__], found.__name__, None) is found:
            return ["function", _named(found)]
        if isinstance(found, type) or not ROOMS.fullmatch(kind.__module__):
            raise LocalError(f"state: got {found!r}, want objects of the pure rooms")
        return [_named(kind), {name: self._value(value) for name, value in _attributes(found)}]


class _Reader:
    """Objects are made empty, then filled in an order in which whatever is hashed is complete."""

    def __init__(self, document: object) -> None:
        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            raise StateError(f"state: format: got {_short(document)}, want {FORMAT}")
        if document.get("version") != VERSION:
            raise StateError(f"state: version: got {_short(document.get('version'))}, want {VERSION}")
        entries = document.get("objects")
        if not isinstance(entries, list):
            raise StateError(f"state: objects: got {_short(entries)}, want a list")
        self._entries: list[Any] = entries
        self._root = document.get("root")
        self._made: list[Any] = [None] * len(entries)
        self._known: list[bool] = [False] * len(entries)
        self._kinds: dict[str, type] = {}

    def root(self) -> object:
        tables: list[int] = []
        fixed: list[int] = []
        methods: list[int] = []
        for number, entry in enumerate(self._entries):
            kind = self._kind(number, entry)
            if kind in ("tuple", "named"):
                fixed.append(number)
                continue
            self._known[number] = True
            if kind == "method":
                methods.append(number)
                continue
            self._made[number] = self._empty(number, kind, entry)
            if kind in ("set", "dict", "OrderedDict"):
                tables.append(number)
        for number in methods:
            self._bind(number)
        for number in fixed:
            self._fix(number)
        for number, entry in enumerate(self._entries):
            self._fill(number, entry)
        for number in tables:
            self._enter(number)
        return self._value(self._root, "root")

    def _kind(self, number: int, entry: object) -> str:
        if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
            raise _wrong(number, entry, "a list that begins with a kind")
        kind: str = entry[0]
        size = 3 if kind in ("named", "deque", "enum", "method") else 2
        if len(entry) != size:
            raise _wrong(number, entry, f"{size} parts")
        if kind in ("enum", "function", "named"):
            if not isinstance(entry[1], str):
                raise _wrong(number, entry[1], "module:name")
            if kind == "named" and not isinstance(entry[2], list):
                raise _wrong(number, entry[2], "a list")
        elif kind == "method":
            if not isinstance(entry[2], str):
                raise _wrong(number, entry[2], "the name of a method")
        elif not isinstance(entry[1], dict if ":" in kind else list):
            raise _wrong(number, entry[1], "an object" if ":" in kind else "a list")
        return kind

    def _empty(self, number: int, kind: str, entry: list[Any]) -> object:
        if kind == "enum":
            of = self._class(number, entry[1])
            try:
                return of(self._value(entry[2], f"object {number}"))
            except (ValueError, TypeError):
                raise _wrong(number, entry[2], f"a value of {entry[1]}") from None
        if kind == "function":
            function = self._found(entry[1])
            if not isinstance(function, FunctionType):
                raise _wrong(number, entry[1], "a function of the pure rooms")
            return function
        if kind == "deque":
            most = entry[2]
            if most is not None and (type(most) is not int or most < 0):
                raise _wrong(number, most, "the most entries of a deque")
            return deque(maxlen=most)
        if kind in _ROWS or kind in _TABLES:
            return (_ROWS.get(kind) or _TABLES[kind])()
        of = self._class(number, kind)
        if issubclass(of, Enum | tuple):
            raise _wrong(number, kind, "an enum by its value, a named tuple by its values")
        return of.__new__(of)

    def _class(self, number: int, name: str) -> type:
        """The class of that name, if a document may have it."""
        found = self._kinds.get(name)
        if found is None:
            of = self._found(name)
            if not isinstance(of, type) or issubclass(of, BaseException):
                raise _wrong(number, name, "a class of the pure rooms")
            found = self._kinds[name] = of
        return found

    def _found(self, name: str) -> object:
        """What a module of the pure rooms defines under that name; None if there is no such thing."""
        module, _, inside = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), inside, None) if ROOMS.fullmatch(module) else None
        except ImportError:
            return None
        return found if getattr(found, "__module__", None) == module else None

    def _bind(self, number: int) -> None:
        _, of, name = self._entries[number]
        found = self._value(of, f"object {number}")
        function = getattr(type(found), name, None)
        if not ROOMS.fullmatch(type(found).__module__) or not isinstance(function, FunctionType):
            raise _wrong(number, name, f"a method of {type(found).__name__}")
        self._made[number] = MethodType(function, found)

    def _fix(self, number: int) -> None:
        """A tuple, after those in it; what else is in it may be empty yet."""
        under_way = [number]
        open_: set[int] = set()
        while under_way:
            number = under_way[-1]
            if self._known[number]:
                under_way.pop()
                continue
            values = self._entries[number][-1]
            missing = [to for each in values if (to := self._to(each)) is not None and not self._known[to]]
            if not missing:
                made = tuple([self._value(each, f"object {number}") for each in values])
                self._made[number] = made if self._entries[number][0] == "tuple" else self._name(number, made)
                self._known[number] = True
                open_.discard(number)
                under_way.pop()
            elif number in open_:
                raise _wrong(number, values, "a tuple that is not in itself")
            else:
                open_.add(number)
                under_way += missing

    def _name(self, number: int, values: tuple[Any, ...]) -> tuple[Any, ...]:
        name = self._entries[number][1]
        of = self._class(number, name)
        if not issubclass(of, tuple) or len(getattr(of, "_fields", ())) != len(values):
            raise _wrong(number, name, f"a named tuple of {len(values)}")
        return of(*values)

    def _to(self, value: object) -> int | None:
        """The number that a value refers to, if it is one of ours."""
        number = value.get("#") if isinstance(value, dict) else None
        return number if type(number) is int and 0 <= number < len(self._entries) else None

    def _value(self, value: object, where: str) -> Any:
        if isinstance(value, dict):
            number = self._to(value)
            if number is not None and len(value) == 1:
                return self._made[number]
            try:
                ((name, text),) = value.items()
                if name == "int":
                    return int(text)
                if name == "float" and text in ("inf", "-inf", "nan"):
                    return float(text)
            except (ValueError, TypeError):
                pass
        elif isinstance(value, (*_PLAIN, int, float)):
            return value
        raise StateError(f"state: {where}: got {_short(value)}, want a value")

    def _fill(self, number: int, entry: list[Any]) -> None:
        """Lists and objects; tables and sets come last, because they look at the hashes of what they hold."""
        kind, values, made = entry[0], entry[1], self._made[number]
        where = f"object {number}"
        if kind in ("list", "deque"):
            made.extend(self._value(each, where) for each in values)
        elif ":" in kind:
            of = type(made)
            known = slots_of(of)
            wanted = {each.name for each in dataclasses.fields(of)} if dataclasses.is_dataclass(of) else set()
            if not wanted <= values.keys() or (known is not None and values.keys() != set(known)):
                raise _wrong(number, sorted(values), f"attributes of {kind}: {', '.join(known or sorted(wanted))}")
            for name, value in values.items():
                object.__setattr__(made, name, self._value(value, f"{where}: {kind}.{name}"))

    def _enter(self, number: int) -> None:
        kind, values = self._entries[number]
        made, where = self._made[number], f"object {number}"
        try:
            if kind == "set":
                made.update([self._value(each, where) for each in values])
            else:
                made.update([(self._value(key, where), self._value(value, where)) for key, value in values])
        except (TypeError, ValueError, AttributeError):
            raise _wrong(number, values, "keys and values" if kind != "set" else "values that have a hash") from None


def _attributes(found: object) -> Iterator[tuple[str, object]]:
    for each in reversed(type(found).__mro__[:-1]):
        own = each.__dict__.get("__slots__", ())
        for name in (own,) if isinstance(own, str) else own:
            if hasattr(found, name):
                yield name, getattr(found, name)
    yield from getattr(found, "__dict__", {}).items()


def _named(kind: Any) -> str:
    name = f"{kind.__module__}:{kind.__qualname__}"
    if not ROOMS.fullmatch(kind.__module__) or "." in kind.__qualname__:
        raise LocalError(f"state: got {name}, want what a module of the pure rooms defines")
    return name


def _wrong(number: int, got: object, want: str) -> StateError:
    return StateError(f"state: object {number}: got {_short(got)}, want {want}")


def _short(got: object) -> str:
    text = repr(got)
    return text if len(text) <= 60 else f"{text[:57]}..."
