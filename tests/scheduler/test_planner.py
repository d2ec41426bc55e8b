"""The planner finds what an exhaustive search finds, asks nothing twice, and says why not the others."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import LocalError
from core.request import Slo
from scheduler.fluid import Load
from scheduler.layout import Cell, Cluster, Layout, Pool
from scheduler.plan import Ask, Evaluate, Evaluated, Fit, Plan, Planned
from scheduler.planner import Planner, plan
from scheduler.ratio_events import Bounds
from tests.cast import QUICK

ROOT = Path(__file__).resolve().parents[2]
LOAD = Load(((900, 100, 250),), 1)
SLO = Slo(0.4, 0.05)
USES = ("prefill", "decode", "mixed")
FAMILIES = ("mixed", "apart", "segments")


class World:
    """What a made-up cluster attains: each phase by how much room it has, pooled; farther lanes cost a little."""

    def __init__(self, caps: Mapping[str, Mapping[Cell, float]], *, far: float = 1.0, alone: float = 0.7) -> None:
        self.caps, self.far, self.alone = caps, far, alone
        self.asked: list[Evaluate] = []

    def fits(self) -> dict[str, list[Fit]]:
        """Bounds are a little above what is ever sustained."""
        found: dict[str, list[Fit]] = {}
        for use, caps in self.caps.items():
            found[use] = [
                Fit(cell, 1.2 * cap, "none" if cap else "slo", "" if cap else "too slow") for cell, cap in caps.items()
            ]
        return found

    def room(self, use: str, pool: Pool, rate: float) -> float:
        """How much of a phase's work is in time: more workers share it better than fewer."""
        pooled = 1 - (1 - self.alone) / math.sqrt(pool.count)
        x = pool.count * self.caps[use][pool.cell] * pooled / rate
        return min(1.0, 0.97 * x**0.5)

    def attained(self, layout: Layout, rate: float) -> float:
        """The phases do not know of each other."""
        rate /= layout.times
        parts = [("prefill", layout.prefill), ("decode", layout.decode), ("mixed", layout.mixed)]
        found = math.prod(self.room(use, pool, rate) for use, pool in parts if pool is not None)
        return found * self.far if layout.family == "apart" else found

    def evaluate(self, command: Evaluate) -> float:
        self.asked.append(command)
        assert command.layout.devices < 10**4
        change = command.change
        return self.attained(command.layout, command.rate * change.prompt / change.ttft)


def exhaustive(world: World, cluster: Cluster, rate: float, share: float) -> Layout | None:
    """The fewest devices; then the family, then the simplest."""
    best: tuple[tuple[object, ...], Layout] | None = None
    for order, layout in layouts(world, cluster):
        if layout.devices <= cluster.devices and world.attained(layout, rate) >= share:
            key = (layout.devices, FAMILIES.index(layout.family), order)
            if best is None or key < best[0]:
                best = key, layout
    return None if best is None else best[1]


def layouts(world: World, cluster: Cluster) -> Iterator[tuple[tuple[object, ...], Layout]]:
    """Every single one, in the order of what is simple within its family."""
    usable = {use: [cell for cell, cap in caps.items() if cap] for use, caps in world.caps.items()}
    limit = cluster.devices
    for cell in usable["mixed"]:
        for count in range(1, limit // cell.devices + 1):
            yield (cell,), Layout(mixed=Pool(cell, count))
    for one, other in itertools.product(usable["prefill"], usable["decode"]):
        for count in range(1, limit // one.devices + 1):
            for beside in range(1, (limit - count * one.devices) // other.devices + 1):
                yield (one, other, count, beside), Layout(Pool(one, count), Pool(other, beside))
                small = count * one.ranks + beside * other.ranks <= min(cluster.per_node, limit)
                if cluster.nodes > 1 and small and one.stages == other.stages <= cluster.nodes:
                    devices = count * one.devices + beside * other.devices
                    for times in range(1, limit // devices + 1):
                        order = (one.stages, one.ranks, other.ranks, count, beside)
                        yield order, Layout(Pool(one, count), Pool(other, beside), near=True, times=times)


def cells(limit: int, stages: Sequence[int] = (1, 2), ranks: Sequence[int] = (1, 2, 4)) -> list[Cell]:
    return [Cell(each, other) for each in stages for other in ranks if each * other <= limit]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, Cluster, float]:
    """Cells of all kinds, some useless, some better the larger they are."""
    cluster = Cluster(draw(st.integers(1, 10)), draw(st.sampled_from((2, 4))))
    seed = draw(st.integers(0, 10**6))
    rng = random.Random(seed)
    caps: dict[str, dict[Cell, float]] = {}
    scale = {"prefill": 4.0, "decode": 5.0, "mixed": draw(st.sampled_from((1.0, 2.0, 3.0)))}
    for use in USES:
        caps[use] = {}
        for cell in cells(cluster.devices):
            gain = cell.devices ** rng.uniform(0.6, 1.3)
            caps[use][cell] = 0.0 if rng.random() < 0.15 else scale[use] * gain * rng.uniform(0.7, 1.3)
    world = World(caps, far=draw(st.sampled_from((1.0, 0.98, 0.93))), alone=draw(st.sampled_from((0.6, 1.0))))
    return world, cluster, draw(st.floats(0.3, 25.0))


@settings(QUICK, max_examples=100)
@given(worlds())
def test_it_finds_what_an_exhaustive_search_finds(made: tuple[World, Cluster, float]) -> None:
    world, cluster, rate = made
    ask = Ask(rate, SLO)
    found = plan(Planner(ask, cluster, LOAD, world.fits()), world.evaluate)
    best = exhaustive(world, cluster, rate, ask.share)
    asked = [(each.layout, each.rate, each.change, each.exact) for each in world.asked]
    assert len(asked) == len(set(asked)), "something was asked twice"
    if best is not None:
        assert found.rate == rate
        assert found.layout == best
        return
    assert found.rate < rate
    if found.layout is None:
        assert exhaustive(world, cluster, rate / 900, ask.share) is None
    else:
        assert found.layout == exhaustive(world, cluster, found.rate, ask.share)
        assert "do not sustain" in found.verdict


@settings(QUICK, max_examples=40)
@given(worlds(), st.integers(0, 1000))
def test_neither_the_order_of_answers_nor_the_way_of_driving_changes_anything(
    made: tuple[World, Cluster, float], seed: int
) -> None:
    world, cluster, rate = made
    ask = Ask(rate, SLO, gpu_hour=2.0)
    one = plan(Planner(ask, cluster, LOAD, world.fits()), world.evaluate)
    planner, rng = Planner(ask, cluster, LOAD, world.fits()), random.Random(seed)
    waiting = planner.on(None, 0.0)
    while not isinstance(waiting[0], Planned):
        assert planner.deadline() is None
        planner.check()
        command = waiting.pop(rng.randrange(len(waiting)))
        assert isinstance(command, Evaluate)
        more = planner.on(Evaluated(command.number, world.evaluate(command)), 0.0)
        assert not (more and waiting), "the next questions come when all are answered"
        waiting += more
    assert waiting[0].plan == one
    planner.check()


def test_those_first_in_line_are_asked_about_together() -> None:
    """Who answers may have several cores: that nothing mixed is enough takes a round for three cells."""
    world = uniform(10.0, 10.0, 1.5)
    planner = Planner(Ask(8.0, SLO), Cluster(6), LOAD, world.fits())
    asked = [command for command in planner.on(None, 0.0) if isinstance(command, Evaluate)]
    assert sum(command.layout.mixed is not None for command in asked) == 3
    assert sum(command.layout.prefill is not None for command in asked) == 1
    assert sum(command.layout.decode is not None for command in asked) == 1


def uniform(prefill: float, decode: float, mixed: float, limit: int = 8, gain: float = 1.0) -> World:
    """Every cell as good as its devices."""
    of = dict(zip(USES, (prefill, decode, mixed), strict=True))
    return World({use: {cell: cap * cell.devices**gain for cell in cells(limit)} for use, cap in of.items()}, alone=1.0)


def planned(world: World, rate: float, cluster: Cluster, **more: object) -> Plan:
    return plan(Planner(replace(Ask(rate, SLO), **more), cluster, LOAD, world.fits()), world.evaluate)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prefill", "decode", "mixed", "disaggregate", "name"),
    [
        (10.0, 10.0, 6.0, False, "2 mixed tp1"),
        (10.0, 10.0, 4.9, False, "2 mixed tp1"),  # as many: the simpler
        (10.0, 10.0, 3.0, True, "1 prefill tp1, 1 decode tp1"),
        (4.0, 10.0, 2.0, True, "2 prefill tp1, 1 decode tp1"),
        (10.0, 4.0, 2.0, True, "1 prefill tp1, 2 decode tp1"),
    ],
)
def test_it_can_answer_not_to_disaggregate(prefill, decode, mixed, disaggregate, name) -> None:
    found = planned(uniform(prefill, decode, mixed), 8.0, Cluster(8))
    assert found.disaggregate is disaggregate
    assert found.layout is not None
    assert found.layout.name == name
    assert found.verdict.startswith("disaggregate" if disaggregate else "do not disaggregate")


@pytest.mark.parametrize(
    ("prefill", "decode", "name"),
    [(100.0, 7.2, "1 prefill tp1, 2 decode tp1"), (7.2, 100.0, "2 prefill tp1, 1 decode tp1")],
)
def test_what_is_enough_for_each_phase_alone_may_not_be_for_both(prefill, decode, name) -> None:
    one = Cell(1, 1)
    world = World({"mixed": {}, "prefill": {one: prefill}, "decode": {one: decode}}, far=0.93, alone=1.0)
    few = Layout(Pool(one, 1), Pool(one, 1))
    assert (
        world.attained(few, 8.0)
        < 0.9
        <= min(world.room("prefill", Pool(one, 1), 8), world.room("decode", Pool(one, 1), 8))
    )
    found = planned(world, 8.0, Cluster(8))
    assert found.layout is not None
    assert found.layout.name == name


def test_segments_win_where_the_way_between_nodes_is_too_long() -> None:
    world = uniform(10.0, 10.0, 1.0)
    world.far = 0.5
    found = planned(world, 16.0, Cluster(8, 2))
    assert found.layout is not None
    assert found.layout.name == "2 x (1 prefill tp1, 1 decode tp1)"
    assert found.layout.near
    assert found.layout.devices == 4
    without = planned(world, 16.0, Cluster(8, 2), segments=False)
    assert without.layout is None or without.layout.family != "segments"


def test_every_choice_says_why_not_the_others() -> None:
    world = uniform(10.0, 10.0, 3.0, gain=0.8)
    fits = world.fits()
    fits["prefill"].append(Fit(Cell(1, 8), 0.0, "memory", "weights of 9 GB do not fit into 8 GB"))
    found = plan(Planner(Ask(8.0, SLO), Cluster(8), LOAD, fits), world.evaluate)
    families, mixed, prefill, decode = found.choices
    assert [each.why for each in families.options] == ["dominated", "chosen", "cluster"]
    assert families.answer == "disaggregate: 1 prefill tp1, 1 decode tp1"
    assert families.reason == "2 devices against 3 of 3 mixed tp1"
    assert {each.why for each in mixed.options} == {"dominated"}
    by_name = {each.name: each for each in prefill.options}
    assert by_name["tp8"].why == "memory"
    assert by_name["tp8"].reason == "weights of 9 GB do not fit into 8 GB"
    assert by_name["tp1"].why == "chosen"
    assert by_name["tp2"].why == "dominated"
    assert by_name["tp2"].reason == "needs at least 1 of them, 2 devices, for this phase alone"
    assert len(decode.options) == len(cells(8))
    assert json.loads(json.dumps(found.document()))["layout"]["prefill"] == {"workers": 1, "tp": 1, "pp": 1}


def test_what_is_too_much_for_all_devices_is_said_and_the_most_is_planned() -> None:
    world = uniform(10.0, 10.0, 3.0)
    found = planned(world, 1000.0, Cluster(8))
    assert found.layout is not None
    assert found.layout == exhaustive(world, Cluster(8), found.rate, 0.9)
    assert exhaustive(world, Cluster(8), found.rate * 1.03, 0.9) is None
    assert found.verdict.startswith("8 devices do not sustain 1000/s; the most that was found is")
    assert found.next_rate is not None
    assert found.next_rate > found.rate


def test_where_nothing_is_possible_the_reasons_are_given() -> None:
    fits = {use: [Fit(Cell(1, 1), 0.0, "slo", "90 % of prompts take longer than 0.4 s even alone")] for use in USES}
    planner = Planner(Ask(1.0, SLO), Cluster(4), LOAD, fits)
    (last,) = planner.on(None, 0.0)
    assert isinstance(last, Planned)
    assert last.plan.layout is None
    assert last.plan.disaggregate is None
    assert "90 % of prompts take longer" in last.plan.verdict
    json.dumps(last.plan.document())


def test_one_device_can_only_be_mixed() -> None:
    found = planned(uniform(10.0, 10.0, 3.0), 2.0, Cluster(1))
    assert found.layout == Layout(mixed=Pool(Cell(1, 1), 1))
    assert found.choices[0].options[1].why == "cluster"
    only = World({"mixed": {}, "prefill": {Cell(1, 1): 5.0}, "decode": {Cell(1, 1): 5.0}})
    assert planned(only, 2.0, Cluster(1)).layout is None


def test_equal_cells_stand_beside_the_free_optimum() -> None:
    """Prefill is quick on one device only, decode on two only."""
    caps = {
        "prefill": {Cell(1, 1): 10.0, Cell(1, 2): 10.0},
        "decode": {Cell(1, 1): 2.0, Cell(1, 2): 10.0},
        "mixed": {Cell(1, 1): 0.1, Cell(1, 2): 0.2},
    }
    found = planned(World(caps, alone=1.0), 8.0, Cluster(16))
    assert found.layout == Layout(Pool(Cell(1, 1), 1), Pool(Cell(1, 2), 1))
    assert found.equal_layout == Layout(Pool(Cell(1, 2), 1), Pool(Cell(1, 2), 1))
    assert (found.equal.why, found.equal.devices, found.equal.reason) == ("dominated", 4, "needs 1 more")
    assert found.bounds == Bounds(least_workers=2, most_workers=8), "two devices each"
    assert found.document()["bounds"]["most_workers"] == 8


def test_money_is_devices_times_hours_over_tokens() -> None:
    found = planned(uniform(10.0, 10.0, 6.0), 8.0, Cluster(8), gpu_hour=3.6)
    at, top = found.costs
    assert found.layout is not None
    assert at.rate == 8.0
    assert at.output == pytest.approx(1e6 * found.layout.devices * 3.6 / 3600 / (8.0 * 250))
    assert at.all == pytest.approx(1e6 * found.layout.devices * 3.6 / 3600 / (8.0 * 1250))
    assert top.output == pytest.approx(at.output * 8.0 / top.rate)
    assert planned(uniform(10.0, 10.0, 6.0), 8.0, Cluster(8)).costs == ()


@pytest.mark.parametrize("precision", [0.01, 0.03, 0.2])
def test_the_next_device_is_needed_where_the_layout_gives_out(precision) -> None:
    world = uniform(10.0, 10.0, 6.0)
    found = planned(world, 8.0, Cluster(8), precision=precision)
    assert found.layout is not None
    assert found.next_rate is not None
    assert (
        world.attained(found.layout, found.next_rate)
        < 0.9
        <= world.attained(found.layout, found.next_rate / (1 + precision))
    )
    assert found.next_device == "another mixed worker, tp1"


def test_what_if_asks_for_exact_shares_of_the_plan() -> None:
    world = uniform(10.0, 10.0, 6.0)
    found = planned(world, 8.0, Cluster(8), off=0.25)
    assert found.layout is not None
    assert [case.name for case in found.cases] == [
        "rate +25 %", "prompts +25 %", "outputs +25 %", "TTFT goal -25 %", "gap goal -25 %",
    ]  # fmt: skip
    by_name = {case.name: case for case in found.cases}
    assert by_name["rate +25 %"].attained == world.attained(found.layout, 10.0)
    assert by_name["outputs +25 %"].holds
    cases = [each for each in world.asked if each.exact]
    assert len(cases) == 5
    none = planned(uniform(10.0, 10.0, 6.0), 8.0, Cluster(8), slo=Slo())
    assert [case.name for case in none.cases] == ["rate +20 %", "prompts +20 %", "outputs +20 %"]


def test_questions_grow_slower_than_what_there_is_to_search() -> None:
    """A search of 64 devices asks a small part of what an exhaustive one would have to."""
    rng = random.Random(5)
    there = cells(64, (1, 2, 4, 8), (1, 2, 4, 8))
    caps = {
        use: {cell: scale * cell.devices ** rng.uniform(0.75, 1.02) for cell in there}
        for use, scale in (("prefill", 4.0), ("decode", 5.0), ("mixed", 2.0))
    }
    world = World(caps)
    found = planned(world, 60.0, Cluster(64))
    assert found.layout is not None
    assert len(world.asked) < 150
    assert sum(1 for _ in layouts(world, Cluster(64))) > 20_000
    too_much = World(caps)
    assert planned(too_much, 1000.0, Cluster(64)).rate == pytest.approx(141.9, rel=0.03)
    assert len(too_much.asked) < 220, "269 by bisection of the rate"


def test_wrong_answers_and_settings_raise_and_change_nothing() -> None:
    world = uniform(10.0, 10.0, 6.0)
    planner = Planner(Ask(8.0, SLO), Cluster(8), LOAD, world.fits())
    first = planner.on(None, 0.0)
    assert planner.on(None, 1.0) == []
    with pytest.raises(LocalError, match="number 77"):
        planner.on(Evaluated(77, 0.5), 0.0)
    command = first[0]
    assert isinstance(command, Evaluate)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(LocalError, match="attained"):
            planner.on(Evaluated(command.number, wrong), 0.0)
    planner.on(Evaluated(command.number, 1.0), 0.0)
    with pytest.raises(LocalError, match="number"):
        planner.on(Evaluated(command.number, 1.0), 0.0)
    planner.check()
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(LocalError, match="rate"):
            Planner(Ask(rate, SLO), Cluster(8), LOAD, world.fits())
    with pytest.raises(LocalError, match="devices"):
        Planner(Ask(1.0, SLO), Cluster(0), LOAD, world.fits())


SCRIPT = """
import json
from tests.scheduler.test_planner import SLO, Cluster, planned, uniform
print(json.dumps(planned(uniform(7.0, 9.0, 2.5, gain=0.9), 31.0, Cluster(16, 4), gpu_hour=2.0).document()))
"""


def test_another_process_with_another_hash_seed_plans_the_same() -> None:
    environ = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=True)
    here = planned(uniform(7.0, 9.0, 2.5, gain=0.9), 31.0, Cluster(16, 4), gpu_hour=2.0)
    assert json.loads(done.stdout) == json.loads(json.dumps(here.document()))
