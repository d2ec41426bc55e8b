"""Orders of prefill work: tables, scripts of short and long prompts, and laws that all of them keep."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from core.errors import LocalError
from core.ranked import Ranked
from core.worker import Identity
from scheduler.fcfs import Fcfs
from scheduler.hrrn import Hrrn
from scheduler.long_share import LongShare
from scheduler.order import Backlog, Job, Pace
from scheduler.refusals import Refusals
from scheduler.shortest import Shortest, length_class
from tests.scheduler.orders import COST, ORDERS, Arrival, Play

LONG_AND_FOUR_SHORT = [Arrival(0.0, "long", 1000, 5.0)] + [Arrival(0.005 * i, f"s{i}", 20, 0.4) for i in range(1, 5)]
FOUR_LENGTHS = [Arrival(0.0, "a", 2000), Arrival(0.001, "b", 900), Arrival(0.002, "c", 300), Arrival(0.003, "d", 600)]


def expecting(order, *jobs: Job, ready: bool = True):
    for job in jobs:
        order.expect(job, 0.0)
        if ready:
            order.ready(job.key, 0.0)
    return order


# The parts.
def test_ranks_come_in_order_and_equal_ones_in_order_of_arrival():
    line = Ranked([("a", 2.0), ("b", 1.0), ("c", 1.0)])
    line.put("a", 0.5)
    line.put("b", 3.0)
    assert not line.drop("nobody")
    assert [line.pop() for _ in range(4)] == ["a", "c", "b", None]
    assert line.lowest() == float("inf")


def test_entries_that_left_do_not_pile_up():
    line = Ranked([("a", 0.0)])
    for number in range(10_000):
        line.put(f"{number}", number)
        line.drop(f"{number}")
    assert len(line._heap) < 200
    assert line.items() == [("a", 0.0)]


def test_a_backlog_is_the_same_however_it_came_about():
    job = Job("a", 100, cached=50)
    backlog = Backlog([job, Job("b", 10)])
    assert (backlog.tokens, backlog.twice, backlog.rows) == (110, 100 * 200 + 10 * 10, 2)
    backlog.take(job)
    backlog.add(job.after(30))
    backlog.take(Job("b", 10))
    assert (backlog.tokens, backlog.twice, backlog.rows) == (70, 70 * (2 * 80 + 70), 1)
    assert backlog.share(1000) is backlog
    assert (backlog.share(7).tokens, backlog.share(7).twice) == (7, 70 * (2 * 80 + 70) // 10)


def test_pace_is_the_cost_model_with_its_margin_or_the_speed_of_full_steps():
    wary = replace(COST, margins=(("prefill", (0.0, 0.1, 0.5, 0.5, 0.5)),))
    backlog = Backlog([Job("a", 300)])
    assert Pace(200, COST).seconds(backlog) == pytest.approx(0.03)
    assert Pace(200, COST).seconds(backlog, 0) == Pace(200, COST).seconds(Backlog(), 300)
    assert Pace(25, COST).seconds(backlog) == pytest.approx(0.12), "twelve steps of 10 ms at least"
    assert Pace(200, wary, 0.8).seconds(backlog) == pytest.approx(0.033)
    assert Pace(200, wary, 0.9).seconds(backlog) == pytest.approx(0.045)
    pace = Pace(200)
    assert pace.seconds(backlog) == 0.0
    pace.measured(99, 1.0)
    assert pace.seconds(backlog) == 0.0, "half a step is no measure"
    pace.measured(200, 1.0)
    assert pace.seconds(backlog, 100) == 2.0


@pytest.mark.parametrize(
    ("tokens", "same"), [(5, 5), (7, 7), (8, 9), (10, 11), (12, 13), (16, 19), (20, 23), (1024, 1279), (7168, 8191)]
)
def test_a_length_class_spans_less_than_a_quarter(tokens, same):
    assert length_class(tokens) == length_class(same)
    assert length_class(tokens - 1) < length_class(tokens)
    assert length_class(same) < length_class(same + 1)


def test_a_gateway_is_told_once_what_fits_and_not_when_nobody_wants_it_any_more():
    g1, g2 = Identity("g1", 1), Identity("g2", 1)
    refusals = Refusals()
    refusals.add(g1, 100, 1.0, now=0.0)
    refusals.add(g1, 1000, 2.0, now=0.5)
    refusals.add(g2, 10, 0.5, now=0.0)
    assert refusals.told(1.0, lambda tokens, wait_s: False) == []
    assert len(refusals) == 1, "the second's time is up"
    asked: list[tuple[int, float]] = []

    def welcome(tokens: int, wait_s: float) -> bool:
        asked.append((tokens, wait_s))
        return tokens <= 450

    assert refusals.told(1.0, welcome) == [(g1, 400)]
    assert asked == [(100, 1.5), (200, 1.5), (400, 1.5), (800, 1.5)]
    assert refusals.told(1.0, lambda tokens, wait_s: tokens < 800) == []
    assert refusals.told(1.0, lambda tokens, wait_s: True) == [(g1, 1000)]
    assert refusals.told(1.0, lambda tokens, wait_s: True) == []


# Scripts.
SCRIPTS = {
    "first come first served": (
        lambda: Fcfs(256, 32, COST),
        """
        0 run long:256
        25.6 run long:256
        51.2 run long:256
        76.8 run long:232 s1:20 s2:4
        102.4 run s2:16 s3:20 s4:20
        """,
    ),
    "a long prompt that has started holds the shortest up": (
        lambda: Shortest(256, 32, COST),
        """
        0 run long:256
        25.6 run long:256
        51.2 run long:256
        76.8 run long:232 s1:20 s2:4
        102.4 run s2:16 s3:20 s4:20
        """,
    ),
    "short ones take what a long one's share leaves": (
        lambda: LongShare(256, 32, COST),
        """
        0 run long:256
        25.6 run long:176 s1:20 s2:20 s3:20 s4:20
        51.2 run long:256
        76.8 run long:256
        102.4 run long:56
        """,
    ),
    "a long one's share, not adaptive": (
        lambda: LongShare(256, 32, COST, long_tokens=128, adaptive=False),
        """
        0 run long:128
        12.8 run long:128 s1:20 s2:20
        29.6 run long:128 s3:20 s4:20
        46.4 run long:128
        59.2 run long:128
        72 run long:128
        84.8 run long:128
        97.6 run long:104
        """,
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name):
    make, want = SCRIPTS[name]
    assert Play(make(), LONG_AND_FOUR_SHORT).run().log == [line.strip() for line in want.strip().splitlines()]


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda: Fcfs(1000, 1, COST), "a a b c d"),
        (lambda: Shortest(1000, 1, COST), "a a c d b"),
        (lambda: Hrrn(1000, 1, COST), "a a c d b"),
    ],
)
def test_who_starts_next(make, order):
    log = Play(make(), FOUR_LENGTHS).run().log
    assert " ".join(line.split()[2][0] for line in log) == order


def test_a_long_prompt_ages_under_hrrn_and_not_under_shortest():
    arrivals = [Arrival(0.0, "first", 100), Arrival(0.001, "long", 400)]
    arrivals += [Arrival(0.0091 * i, f"s{i}", 95) for i in range(1, 60)]
    ends = {type(order): Play(order, arrivals).run().done for order in (Hrrn(100, 1, COST), Shortest(100, 1, COST))}
    last = max(ends[Shortest].values())
    assert ends[Shortest]["long"] == last
    assert ends[Hrrn]["long"] < last / 2


def test_the_share_of_steps_bounds_how_long_a_short_prompt_waits():
    jobs = Job("long", 10_000), Job("short", 100), Job("shorter", 50)
    order = expecting(LongShare(200, 32, COST, long_tokens=100), *jobs)
    # 150 + 50 of the short ones, and as many of the long one.
    assert order.wait_s(50, 0, 0.0) == pytest.approx(0.04)
    assert order.wait_s(101, 0, 0.0) == pytest.approx(0.0001 * (10_000 + 150 + 101))


def test_a_new_request_waits_for_those_before_it():
    jobs = Job("a", 1000), Job("b", 100), Job("c", 10)
    assert expecting(Fcfs(200, 32, COST), *jobs).wait_s(100, 0, 0.0) == pytest.approx(0.121)
    assert expecting(Shortest(200, 32, COST), *jobs).wait_s(100, 0, 0.0) == pytest.approx(0.021)
    assert expecting(Hrrn(200, 32, COST), *jobs).wait_s(100, 0, 0.0) == pytest.approx(0.121)


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "measured"])
def test_work_is_all_that_is_here_whoever_would_pass_it(name):
    order = expecting(ORDERS[name](200, 32, COST), Job("a", 1000), Job("b", 100), Job("c", 10))
    assert order.work_s(0.0) == pytest.approx(0.111, rel=0.02)
    play = Play(ORDERS[name](200, 32, COST), [Arrival(0.0, "a", 400)]).run(until=0.0)
    assert [play.order.work_s(at) for at in (0.0, 0.005)] == pytest.approx([0.04, 0.035], rel=0.02)


def test_what_the_running_step_has_behind_it_is_not_waited_for():
    play = Play(Fcfs(200, 32, COST), [Arrival(0.0, "a", 400)]).run(until=0.0)
    assert [play.order.wait_s(100, 0, at) for at in (0.0, 0.005, 9.0)] == pytest.approx([0.05, 0.045, 0.03])


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "dual queue"])
def test_nobody_starts_past_the_first_that_cannot(name):
    """The first in line that cannot start ends the step: memory is not taken away from who waits for it."""
    first = {"shortest": 5, "long share": 60}.get(name, 10)
    order = expecting(ORDERS[name](100, 8, COST), Job("first", first), Job("second", 20))
    asked: list[str] = []
    assert list(order.next(0.0, lambda key: asked.append(key))) == []
    assert asked == ["first"]
    assert list(order.upcoming(0.0))[:1] == ["first"]
    assert order.deadline() is None


def test_nothing_is_suspended_by_an_order_that_does_not_want_it():
    order = expecting(Fcfs(10, 1, COST), Job("a", 100))
    step = order.next(0.0, lambda key: Job(key, 100))
    assert order.overtakes(0.0) is None
    with pytest.raises(LocalError, match="Fcfs suspends no step"):
        order.suspended(step, 0.0)


# Laws.
def storm(seed: int, count: int = 120) -> list[Arrival]:
    dice = random.Random(seed)
    arrivals, now = [], 0.0
    for number in range(count):
        now += dice.expovariate(60.0)
        new = dice.choice((5, 8, 20, 40, 90, 150, 700))
        wanted_s = dice.choice((0.05, 0.3, 3.0, float("inf")))
        arrivals.append(Arrival(now, f"j{number}", new, wanted_s, dice.choice((0, 0, 500))))
    return arrivals


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("seed", range(2))
def test_everybody_is_computed_and_the_state_survives_as_json(name, seed):
    def make():
        return ORDERS[name](256, 8, COST)

    once = Play(make(), storm(seed), preempt=True).run()
    assert once.done.keys() == {each.key for each in storm(seed)}
    assert not any(once.order.document()[part] for part in ("jobs",))
    again = Play(make(), storm(seed), preempt=True).run(again=make)
    assert again.log == once.log


@pytest.mark.parametrize("name", ORDERS)
def test_dropped_jobs_leave_nothing_behind(name):
    dice = random.Random(5)
    play = Play(ORDERS[name](256, 8, COST), storm(3), preempt=True)
    while play.step(1e9):
        if play.jobs and dice.random() < 0.3:
            key = dice.choice(sorted(play.jobs))
            play.order.drop(key)
            play.arrivals = [each for each in play.arrivals if each.key != key]
        play.order.check()
    document = play.order.document()
    assert not any(document[part] for part in ("jobs", "waiting", "started", "ages", "begun") if part in document)


def story() -> str:
    logs = [Play(ORDERS[name](256, 8, COST), storm(7), preempt=True).run().log for name in ORDERS]
    return hashlib.sha256(repr(logs).encode()).hexdigest()


def test_another_hash_seed_changes_nothing():
    code = "from tests.scheduler.test_order import story; print(story())"
    for seed in ("1",):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.strip() == story()
