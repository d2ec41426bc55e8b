"""A compiled simulator is the same one, and what is rewritten for the compiler means what it meant."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from deploy import compiled

MODULE = '''
from dataclasses import dataclass, field
from core.quick import quick_init


@quick_init
@dataclass(frozen=True, slots=True)
class Said:
    """A command."""

    key: str
    pages: tuple[int, ...] = ()
    """Of the prompt."""

    @property
    def count(self) -> int:
        return len(self.pages)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    row: int
    column: int = 2


@dataclass(slots=True, eq=False)
class Held:
    key: str
    said: list[Said] = field(default_factory=list)
    many: dict[str, int] = field(default_factory=lambda: {"a": 1})
    place: Place = field(default=Place(1))
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"<{self.key}>"


class Alone:
    key: str = ""
'''


def load(text: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": __name__}
    exec(compile(text, "module", "exec", flags=0, dont_inherit=True), scope)
    return scope


def test_a_rewritten_dataclass_is_the_dataclass_it_was():
    text = compiled.plain(MODULE)
    before, after = load(MODULE), load(text)
    for name in ("Said", "Place", "Held"):
        assert [each.name for each in fields(before[name])] == [each.name for each in fields(after[name])]
        assert before[name].__match_args__ == after[name].__match_args__
        assert f"class {name}:" in text
        assert (before[name].__hash__ is object.__hash__) == (after[name].__hash__ is object.__hash__)
    for scope in (before, after):
        said, place, held = scope["Said"], scope["Place"], scope["Held"]
        assert said("a") == said(key="a", pages=()) != said("a", (1,))
        assert hash(said("a", (1,))) == hash(replace(said("a"), pages=(1,)))
        assert asdict(said("a", (1,))) == {"key": "a", "pages": (1,)}
        assert repr(said("a")) == "Said(key='a', pages=())"
        assert said("a", (1, 2)).count == 2
        assert sorted([place(2, 1), place(1)]) == [place(1, 2), place(2, 1)]
        one, other = held("a"), held("a")
        assert one != other
        assert (one.said, one.many) == ([], {"a": 1})
        assert one.said is not other.said
        assert one.many is not other.many
        assert (one.name, one.place) == ("<a>", place(1))
        with pytest.raises(TypeError, match=r"__init__\(\)"):
            said()
    assert "@quick_init" not in text
    assert "frozen" not in text
    assert text.count("def __init__") == 3
    assert text.endswith('class Alone:\n    key: str = ""\n')


def test_what_is_compiled_is_there():
    names = compiled.files()
    assert {"core/ranked.py", "scheduler/router.py", "sim/loop.py", "transfer/source.py"} <= set(names)
    assert all((compiled.ROOT / name).is_file() for name in compiled.APART)
    for name in names:
        compile(compiled.plain((compiled.ROOT / name).read_text()), name, "exec")


PROGRAM = """
import hashlib, json, random
from dataclasses import replace
from core.request import Slo
from sim import loop
from sim.coordinator import Control
from sim.fleet import workers
from scheduler.policies import POLICIES
from sim.run import Settings, simulate
from sim.scenario import Drain, Lose, Return, Scenario
from sim.workload import Arrival

def stream(count=250, rate=60.0):
    dice, at_s = random.Random(1), 0.0
    for turn in range(count):
        at_s += dice.expovariate(rate)
        yield Arrival(at_s, min(8000, 1 + int(dice.lognormvariate(6.5, 1.1))), 1 + turn % 200)

faults = Scenario("some", (Lose(at_s=1.0, worker="prefill-0"), Return(at_s=1.5, worker="prefill-0")))
found = {"": loop.__file__.rpartition(".")[2]}
for name, policy in POLICIES.items():
    for pages in (None, 700):
        seen = hashlib.sha256()
        builds = workers("2 prefill, 2 decode", "h200-llama-3.1-8b")
        if pages:
            builds = tuple(replace(each, pages=pages) for each in builds)
        result = simulate(stream(), builds, policy, Settings(slo=Slo(0.4, 0.05), check_every=50), scenario=faults,
                          over=lambda outcome: seen.update(repr(outcome).encode()))
        found[f"{name} {pages}"] = [seen.hexdigest(), result.events, result.steps, repr(result.seconds)]
seen, adaptive = hashlib.sha256(), []
simulate(stream(900, 15.0), workers("1 prefill, 3 decode", "h200-llama-3.1-8b"), POLICIES["baton-migrating"],
         Settings(slo=Slo(0.1, 0.05)), over=lambda outcome: seen.update(repr(outcome).encode()),
         watch=adaptive.append, control=Control())
decisions = adaptive[0].coordinator.decisions
assert any(each.scores for each in decisions), "nothing was asked"
found["adaptive"] = [seen.hexdigest(), hashlib.sha256(repr(decisions).encode()).hexdigest()]
print(json.dumps(found))
"""


def outcomes(folder: Path) -> dict[str, Any]:
    """Of every policy, by the code in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, stdout=subprocess.PIPE, check=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(not Path(sysconfig.get_path("include"), "Python.h").is_file(), reason="no headers of Python")
def test_compiled_and_interpreted_have_the_same_outcomes(tmp_path):
    pytest.importorskip("mypyc")
    compiled.build(tmp_path)
    ours, theirs = outcomes(tmp_path), outcomes(compiled.ROOT)
    assert (ours.pop(""), theirs.pop("")) == ("so", "py")
    assert ours == theirs
