"""A dataclass that is built through its slots is the dataclass it was."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace

import pytest

from core.quick import quick_init


@dataclass(frozen=True, slots=True)
class Plain:
    a: int
    b: tuple[int, ...] = ()
    c: str = "c"
    d: list[int] = field(default_factory=list)


@quick_init
@dataclass(frozen=True, slots=True)
class Quick:
    a: int
    b: tuple[int, ...] = ()
    c: str = "c"
    d: list[int] = field(default_factory=list)


@pytest.mark.parametrize(
    ("positional", "named"),
    [((1,), {}), ((1, (2,)), {}), ((1, (2,), "x", [3]), {}), ((), {"a": 1, "c": "y"}), ((1,), {"d": [4]})],
)
def test_it_has_the_same_values(positional, named):
    plain, quick = Plain(*positional, **named), Quick(*positional, **named)
    for each in fields(Plain):
        assert getattr(quick, each.name) == getattr(plain, each.name)
    assert repr(quick) == repr(plain).replace("Plain", "Quick")
    assert quick == Quick(*positional, **named)
    assert copy.copy(quick) == pickle.loads(pickle.dumps(quick)) == quick
    assert replace(quick, a=7) == Quick(7, *positional[1:], **{name: named[name] for name in named if name != "a"})


@pytest.mark.parametrize(("positional", "named"), [((), {}), ((1,), {"a": 1}), ((1,), {"e": 1}), ((1, 2, 3, 4, 5), {})])
def test_it_refuses_the_same_arguments(positional, named):
    for cls in (Plain, Quick):
        with pytest.raises(TypeError, match=r"__init__\(\)"):
            cls(*positional, **named)


def test_it_is_frozen_and_every_one_has_its_own_list():
    one, other = Quick(1), Quick(1)
    with pytest.raises(FrozenInstanceError):
        one.a = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        del one.a
    assert one.d is not other.d
    assert not hasattr(one, "__dict__")


def test_it_says_what_it_takes():
    quick, plain = inspect.signature(Quick), inspect.signature(Plain)
    assert list(quick.parameters) == list(plain.parameters)
    assert [each.annotation for each in quick.parameters.values()] == [
        each.annotation for each in plain.parameters.values()
    ]
    match Quick(1, (2,)):
        case Quick(a, b):
            assert (a, b) == (1, (2,))


def test_what_checks_itself_cannot_be_built_quickly():
    with pytest.raises(TypeError, match="Checked: got a __post_init__, want none"):

        @quick_init
        @dataclass(frozen=True, slots=True)
        class Checked:
            a: int

            def __post_init__(self) -> None: ...
