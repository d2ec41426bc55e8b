"""A dataclass that is built through its slots is the dataclass it was."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest

from core.quick import quick_init

ROOT = Path(__file__).parents[2]


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


@quick_init
@dataclass(frozen=True, slots=True)
class Shown:
    a: int


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


def test_every_one_has_its_own_list_and_no_dictionary():
    one, other = Quick(1), Quick(1)
    assert one.d is not other.d
    assert not hasattr(one, "__dict__")


ASSIGN = """
from dataclasses import FrozenInstanceError, dataclass
from core.quick import quick_init

@quick_init
@dataclass(frozen=True, slots=True)
class Quick:
    a: int
    b: int = 2

one = Quick(1)
assert (one.a, one.b) == (1, 2)
for change in (lambda: setattr(one, "a", 2), lambda: delattr(one, "a")):
    try:
        change()
    except FrozenInstanceError:
        continue
    raise SystemExit("assigned")
"""


def test_in_development_mode_it_is_frozen_when_it_runs():
    done = subprocess.run([sys.executable, "-X", "dev", "-c", ASSIGN], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_it_is_frozen_to_the_type_checker():
    assert Quick.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert hash(Shown(1)) == hash(Shown(1)) != hash(Shown(2))


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
