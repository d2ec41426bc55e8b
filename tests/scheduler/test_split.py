"""Prefill workers for short prompts and for long ones: who moves, who is asked, and that sessions stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core.errors import LocalError
from core.messages import Offer, Reject
from core.request import Request
from core.sampling import Sampling
from core.state import dump, load
from core.worker import Identity, Role
from scheduler.placement import Need
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, Divided, ToOne, WorkerUp
from scheduler.split import Because, Came, Divide, Queued, SplitConfig, SplitController, SplitEvent, Went
from scheduler.split_map import SplitMap
from tests.cast import GATEWAY, efforts, worker
from tests.scheduler.test_placement import fleet, order, sinks

ROOT = Path(__file__).resolve().parents[2]


def who(number: int) -> Identity:
    return Identity(f"p{number}", number)


def machine(count: int, config: SplitConfig | None = None) -> SplitController:
    made = SplitController(config or SplitConfig())
    for number in range(1, count + 1):
        made.on(Came(who(number)), 0.0)
        made.check()
    return made


def press(split: SplitController, **backlogs: float) -> None:
    for name, backlog_s in backlogs.items():
        split.on(Queued(Identity(name, int(name[1:])), backlog_s, 0.0, 0.0), 0.0)


def test_fewer_than_four_are_not_split():
    split = machine(3)
    assert split.pools() == ((), ())
    assert split.deadline() is None
    (begun,) = split.on(Came(who(4)), 1.0)
    assert begun.divided == Divided(("p1", "p2"), ("p3", "p4"), 512)
    assert begun.division.because is Because.BEGUN
    assert split.deadline() == 6.0
    (ended,) = split.on(Went(who(2)), 2.0)
    assert ended.divided == Divided((), (), 512)
    assert ended.division.because is Because.FEW
    assert split.deadline() is None


# Backlogs of p1 and p2, which are short ones, and of p3 and p4 -> who moves, and where to.
@pytest.mark.parametrize(
    ("backlogs", "moved", "because"),
    [
        ((1.0, 1.0, 0.4, 0.3), "p4", Because.SHORT),
        ((1.0, 1.0, 0.5, 0.3), None, None),  # not more than twice as much
        ((1.0, 0.0, 0.4, 0.3), "p4", Because.SHORT),  # the 90th percentile of two is the larger
        ((0.1, 0.2, 0.9, 0.1), "p1", Because.LONG),
        ((0.09, 0.0, 0.0, 0.0), None, None),  # too little to help anybody
        ((0.11, 0.0, 0.0, 0.0), "p3", Because.SHORT),  # of equals the first
    ],
)
def test_who_moves(backlogs, moved, because):
    split = machine(4)
    press(split, **{f"p{number}": each for number, each in enumerate(backlogs, 1)})
    found = split.on(None, 5.0)
    assert [(each.division.moved, each.division.because) for each in found] == ([(moved, because)] if moved else [])


def test_a_pool_keeps_its_last_and_moves_are_apart():
    split = machine(4)
    press(split, p1=9.0, p2=9.0)
    assert len(split.on(None, 5.0)) == 1
    assert split.on(None, 10.0) == []
    assert split.on(None, 15.0) == []
    assert split.on(None, 20.0) == [], "the long pool has one left"
    press(split, p1=0.0, p2=0.0, p3=0.0, p4=9.0)
    assert split.pools() == (("p1", "p2", "p3"), ("p4",))
    (back,) = split.on(None, 25.0)
    assert back.division.because is Because.LONG


def test_lateness_presses_and_spare_time_relieves():
    split = machine(4, SplitConfig(gamma=1.0))
    split.on(Queued(who(1), 0.3, 0.0, 0.5), 0.0)
    assert split.on(None, 5.0) == [], "0.3 - 0.5 is no pressure"
    split.on(Queued(who(1), 0.3, 0.5, 0.5), 5.0)
    assert len(split.on(None, 10.0)) == 1


def test_who_comes_helps_the_pool_under_more_pressure_and_who_leaves_is_replaced():
    split = machine(5)
    assert split.pools() == (("p1", "p2", "p5"), ("p3", "p4")) or split.pools() == (("p1", "p2"), ("p3", "p4", "p5"))
    press(split, p3=5.0)
    split.on(Came(who(6)), 1.0)
    assert "p6" in split.pools()[1]
    split = machine(6, SplitConfig(least=2))
    for number in (1, 2):
        split.on(Went(who(number)), 1.0)
        split.check()
    assert [len(pool) for pool in split.pools()] == [2, 2]


def test_what_makes_no_sense_is_refused_and_changes_nothing():
    split = machine(4)
    before = dump(split)
    for event in (Queued(who(1), -1.0, 0.0, 0.0), Queued(who(1), 0.0, 0.0, 1.5)):
        with pytest.raises(LocalError):
            split.on(event, 1.0)
    assert dump(split) == before
    for wrong in ({"period_s": 0.0}, {"least": 3}, {"tau": -1.0}):
        with pytest.raises(LocalError, match="split"):
            SplitConfig(**wrong)
    split.on(Queued(who(9), 1.0, 0.0, 0.0), 1.0)
    split.on(Came(who(1)), 1.0)
    split.on(Went(who(9)), 1.0)
    assert split.ignored == 3


STORIES = {
    "the pool with more to do is helped, once in 15 s, and helps back": (
        """
        0 p1 p2 p3 p4 come
        3 p1 has 4 s to do
        22 p1 has 0 s to do
        22 p4 has 3 s to do
        23 p3 has 1 s to do
        30 p4 has 0 s to do
        """,
        """
        0 there are enough prefill workers to split: p1 p2 short, p3 p4 long
        5 short prompts wait longer: p3 moves: p1 p2 p3 short, p4 long
        25 long prompts wait longer: p1 moves: p2 p3 short, p1 p4 long
        """,
    ),
    "a pool keeps its last worker, and one that dies there is replaced at once": (
        """
        0 p1 p2 p3 p4 p5 come
        1 p1 has 9 s to do
        1 p2 has 9 s to do
        40 p5 go
        """,
        """
        0 there are enough prefill workers to split: p1 p2 short, p3 p4 long
        0 a worker came or went: p1 p2 short, p3 p4 p5 long
        5 short prompts wait longer: p3 moves: p1 p2 p3 short, p4 p5 long
        20 short prompts wait longer: p4 moves: p1 p2 p3 p4 short, p5 long
        40 a worker came or went: p3 moves: p1 p2 p4 short, p3 long
        """,
    ),
    "too few are not split, and are again when one is back": (
        """
        0 p1 p2 p3 come
        2 p4 come
        4 p2 go
        6 p2 come
        """,
        """
        2 there are enough prefill workers to split: p1 p2 short, p3 p4 long
        4 too few prefill workers to split
        6 there are enough prefill workers to split: p1 p2 short, p3 p4 long
        """,
    ),
}
"""Time, workers and what they say; then each decision, with who moves and who is in which pool."""


def decided(script: str) -> list[str]:
    split, log = SplitController(), list[str]()

    def do(event: SplitEvent | None, now: float) -> None:
        for command in split.on(event, now):
            division = command.division
            moves = f": {division.moved} moves" if division.moved else ""
            pools = f": {' '.join(division.short)} short, {' '.join(division.long)} long" if division.short else ""
            log.append(f"{now:g} {division.because}{moves}{pools}")
        split.check()

    for line in filter(None, map(str.strip, script.split("\n"))):
        when, *said = line.split()
        now = float(when)
        while (due := split.deadline()) is not None and due <= now:
            do(None, due)
        match said:
            case [*names, "come"]:
                for name in names:
                    do(Came(Identity(name, int(name[1:]))), now)
            case [*names, "go"]:
                for name in names:
                    do(Went(Identity(name, int(name[1:]))), now)
            case [name, "has", seconds, "s", "to", "do"]:
                do(Queued(Identity(name, int(name[1:])), float(seconds), 0.0, 0.0), now)
    return log


@pytest.mark.parametrize("title", STORIES)
def test_story(title):
    script, want = STORIES[title]
    assert decided(script) == [line.strip() for line in want.split("\n") if line.strip()]


# Placement.
def divided(*names: str) -> tuple[SplitMap, Any, dict]:
    placement = SplitMap()
    workers, posts = fleet(placement, *names)
    workers.divide(("p1", "p2"), ("p3", "p4"), 100)
    return placement, workers, posts


def test_short_prompts_go_to_short_workers_and_long_ones_to_long_ones():
    placement, workers, posts = divided("p1", "p2", "p3", "p4", "p5", "d1")
    assert sorted(order(placement, workers, Need(100, 200, wait_s=1.0))) == ["p1", "p2", "p5"]
    assert sorted(order(placement, workers, Need(101, 200, wait_s=1.0))) == ["p3", "p4", "p5"]
    long = Need(101, 200, wait_s=1.0)
    assert sinks(placement, workers, posts["p1"], long) == []
    assert sinks(placement, workers, posts["p3"], long) == ["d1"]
    assert sinks(placement, workers, posts["p5"], long) == ["d1"], "one in no pool computes both"


def test_a_pool_without_workers_is_none():
    placement, workers, _ = divided("p1", "p2", "d1")
    assert sorted(order(placement, workers, Need(101, 200, wait_s=1.0))) == ["p1", "p2"]
    workers.divide((), (), 100)
    assert sorted(order(placement, workers, Need(5, 9, wait_s=1.0))) == ["p1", "p2"]


def test_a_session_goes_on_where_its_prefix_is():
    placement, workers, posts = divided("p1", "p2", "p3", "p4", "d1")
    prefix = tuple(range(500, 550))  # of 4 tokens each: 200
    first = Need(200, 300, prefix, wait_s=10.0)
    source = next(iter(placement.sources(first, workers)))
    assert source.identity.name in ("p3", "p4")
    placement.accepted(source, first)
    again = Need(220, 300, (*prefix, 1, 2, 3, 4, 5), wait_s=10.0)
    assert placement.fewest(again, workers) == 20
    assert source.identity.name in order(placement, workers, again), "it has nearly all of it, though it is a long one"
    others = {"p3", "p4"} - {source.identity.name}
    assert not others & set(order(placement, workers, again))
    assert sinks(placement, workers, source, again) == ["d1"]
    assert posts["p1"].identity.name in order(placement, workers, again)


def test_a_worker_that_comes_back_is_in_its_pool():
    placement, workers, _ = divided("p1", "p2", "p3", "p4", "d1")
    workers.down(Identity("p3", 3))
    workers.up(worker(Identity("p3", 33), Role.PREFILL))
    assert sorted(order(placement, workers, Need(101, 200, wait_s=1.0))) == ["p3", "p4"]


def test_a_router_obeys_from_the_next_offer_on_also_for_those_who_wait():
    router = Router(GATEWAY, RouterConfig(), SplitMap())
    for number in range(1, 5):
        router.on(WorkerUp(worker(who(number), Role.PREFILL)), 0.0)
    router.on(WorkerUp(worker(Identity("d1", 1), Role.DECODE)), 0.0)
    assert router.on(Divided(("p1", "p2"), ("p3", "p4"), 4), 0.0) == []
    asked = []
    (offer,) = router.on(Arrived(1, Request("r", (1,) * 8, Sampling(4), 100.0)), 0.0)
    while isinstance(offer, ToOne) and isinstance(offer.message, Offer):
        asked.append(offer.worker.name)
        commands = router.on(Reject(offer.message.ticket, "busy", 0.5), 0.1)
        router.check()
        if not commands:
            break
        (offer,) = commands
    assert sorted(asked) == ["p3", "p4"], "and then it waits for one of these"
    assert len(router) == 1


def told(seed: int) -> str:
    import random

    dice, split, said = random.Random(seed), machine(6), []
    for step in range(1, 200):
        for number in range(1, 7):
            said += split.on(Queued(who(number), dice.expovariate(1.0), 0.0, dice.random()), 5.0 * step)
        if dice.random() < 0.1:
            said += split.on(Went(who(dice.randrange(1, 7))), 5.0 * step)
            said += split.on(Came(who(dice.randrange(1, 7))), 5.0 * step)
        said += split.on(None, 5.0 * step)
    return repr(said)


def test_another_process_with_another_hash_seed_decides_the_same():
    script = "from tests.scheduler.test_split import told; print(told(3))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "4711"}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == told(3)


class Machine(RuleBasedStateMachine):
    """Workers come, go and are pressed at any time; a copy from its document does the same."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        config = SplitConfig(least=2)
        self.split, self.twin = SplitController(config), SplitController(config)
        self.there: set[Identity] = set()
        self.lives = 0
        self.moves: list[float] = []

    def tell(self, event: SplitEvent | None) -> None:
        commands = self.split.on(event, self.now)
        assert commands == self.twin.on(event, self.now)
        for command in commands:
            assert isinstance(command, Divide)
            pools = command.divided.short, command.divided.long
            assert pools == self.split.pools()
            names = sorted(each.name for each in self.there)
            assert sorted(pools[0] + pools[1]) in ([], names)
            if command.division.because in (Because.SHORT, Because.LONG):
                assert not self.moves or self.now >= self.moves[-1] + 15.0
                self.moves.append(self.now)

    @precondition(lambda self: len(self.there) < 9)
    @rule()
    def comes(self) -> None:
        self.lives += 1
        self.there.add(Identity(f"p{self.lives}", self.lives))
        self.tell(Came(Identity(f"p{self.lives}", self.lives)))

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def goes(self, data: st.DataObject) -> None:
        found = data.draw(st.sampled_from(sorted(self.there)))
        self.there.remove(found)
        self.tell(Went(found))

    @precondition(lambda self: self.there)
    @rule(data=st.data(), backlog=st.floats(0, 5), late=st.floats(0, 2), spare=st.floats(0, 1))
    def presses(self, data: st.DataObject, backlog: float, late: float, spare: float) -> None:
        self.tell(Queued(data.draw(st.sampled_from(sorted(self.there))), backlog, late, spare))

    @rule(seconds=st.floats(0, 12))
    def passes(self, seconds: float) -> None:
        self.now += seconds
        due = self.split.deadline()
        if due is not None and due <= self.now:
            self.tell(None)

    @rule()
    def starts_again(self) -> None:
        self.twin = load(json.loads(json.dumps(dump(self.split))), SplitController)

    @invariant()
    def holds(self) -> None:
        self.split.check()
        due = self.split.deadline()
        assert due is None or due > self.now


@efforts
def test_whatever_happens(effort):
    run_state_machine_as_test(Machine, settings=settings(effort, max_examples=max(20, effort.max_examples // 4)))
