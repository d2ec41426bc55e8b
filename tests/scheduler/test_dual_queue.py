"""The dual queue: scripts of short and long prompts, its batches and windows, suspension, and its bound on waiting."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

from scheduler.cost import CostModel
from scheduler.dual_queue import DualQueue, DualQueueSettings, knee
from scheduler.gather import DEPTHS, Gather, GatherSettings, Grouping, bucket
from scheduler.order import Job, Pace
from tests.scheduler.orders import COST, Arrival, Play

PLAIN = DualQueueSettings(fill=False)


def short(count: int, every: float, new: int = 20, wanted_s: float = 0.4, start: float = 0.0) -> list[Arrival]:
    return [Arrival(start + every * i, f"s{i}", new, wanted_s) for i in range(1, count + 1)]


def played(order: DualQueue, arrivals: list[Arrival], **how) -> Play:
    return Play(order, arrivals, **how).run()


# The boundary.
@pytest.mark.parametrize(
    ("lines", "cached", "want"),
    [
        (COST.prefill, 0, 101),
        (((0.010, 0.0, 0.0, 0.0), (0.0, 0.0001, 1e-6, 0.0)), 1000, 10),
        (((0.020, 0.0001, 0.0, 0.0),), 0, 200),
        (((0.004, 0.00001, 0.0, 0.0), (0.0, 0.00002, 0.0, 0.001)), 0, 301),
        (((0.012, 0.00004, 5e-8, 0.0), (0.003, 0.000045, 9e-8, 0.0)), 0, 259),
    ],
)
def test_the_boundary_is_where_a_step_begins_to_grow(lines, cached, want):
    assert knee(replace(COST, prefill=lines), cached) == want


@pytest.mark.parametrize(("new", "is_short"), [(101, True), (102, False)])
def test_classes_are_by_new_tokens(new, is_short):
    order = DualQueue(256, 8, COST)
    assert order.short_tokens == 101
    order.expect(Job("a", new, cached=10_000), 0.0)
    order.ready("a", 0.0)
    assert (len(order._gather) == 1) == is_short
    assert DualQueue(256, 8, COST, DualQueueSettings(short_tokens=12)).short_tokens == 12
    assert DualQueue(64, 8, COST).short_tokens == 64, "a short job fits in a step"


# Scripts.
STORIES = {
    "a long prompt chunks while four short ones gather; the window fills; the long one goes on": (
        DualQueue(256, 4, COST, PLAIN),
        [Arrival(0.0, "long", 1000, 5.0), *short(4, 0.005)],
        """
        0 run long:256
        25.6 run s1:20 s2:20 s3:20 s4:20
        35.6 run long:256
        61.2 run long:256
        86.8 run long:232
        """,
    ),
    "the same, and the short step takes along what costs nothing": (
        DualQueue(256, 4, COST, DualQueueSettings()),
        [Arrival(0.0, "long", 1000, 5.0), *short(3, 0.005)],
        """
        0 run long:256
        25.6 run s1:20 s2:20 s3:20 long:41
        35.7 run long:256
        61.3 run long:256
        86.9 run long:191
        """,
    ),
    "long prompts whose steps would take as long alone do not wait for each other": (
        DualQueue(1000, 4, COST, PLAIN),
        [Arrival(0.0, "a", 150, 4.0), Arrival(0.0, "b", 200, 5.0)],
        """
        0 run a:150
        15 run b:200
        """,
    ),
    "the last tokens of one wait for another one's if that saves all behind them more": (
        DualQueue(256, 4, COST, PLAIN),
        [Arrival(0.0, "a", 286, 4.0), Arrival(0.0, "b", 150, 5.0), Arrival(0.0, "c", 150, 6.0)],
        """
        0 run a:256
        25.6 run a:30 b:150
        43.6 run c:150
        """,
    ),
    "a chunk ends with the window of those who gather": (
        DualQueue(1024, 4, COST, DualQueueSettings(fill=False, gather=GatherSettings(0.01555, 0.01555))),
        [Arrival(0.0, "s0", 20, 0.4), Arrival(0.0, "long", 2000, 5.0)],
        """
        0 run long:155
        15.5 run s0:20
        25.5 run long:1024
        127.9 run long:821
        """,
    ),
    "a short one alone waits for its window, then for nobody, as none came": (
        DualQueue(256, 4, COST, PLAIN),
        [Arrival(0.0, "a", 20, 0.4), Arrival(0.1, "b", 20, 0.4)],
        """
        10 run a:20
        100 run b:20
        """,
    ),
    "no time to wait for company": (
        DualQueue(256, 4, COST, PLAIN),
        [Arrival(0.0, "a", 20, 0.018)],
        """
        3 run a:20
        """,
    ),
    "a long one without time to spare goes first, the short ones have some": (
        DualQueue(256, 4, COST, PLAIN),
        [Arrival(0.0, "long", 512, 0.055), *short(4, 0.001)],
        """
        0 run long:256
        25.6 run long:256
        51.2 run s1:20 s2:20 s3:20 s4:20
        """,
    ),
    "it goes first although its deadline is later, until the short one has no time either": (
        DualQueue(256, 4, COST, PLAIN),
        [Arrival(0.0, "long", 950, 0.1), Arrival(0.001, "s", 20, 0.089)],
        """
        0 run long:256
        25.6 run long:256
        51.2 run long:256
        76.8 run s:20
        86.8 run long:182
        """,
    ),
    "neither has time: the earlier deadline": (
        DualQueue(256, 1, COST, PLAIN),
        [Arrival(0.0, "long", 512, 0.0525), Arrival(0.001, "s", 20, 0.045)],
        """
        0 run long:256
        25.6 run s:20
        35.6 run long:256
        """,
    ),
    "who is late anyway lets those pass who are not": (
        DualQueue(100, 1, COST, PLAIN),
        [Arrival(0.0, "a", 200, 0.05), Arrival(0.0, "late", 300, 0.02), Arrival(0.001, "b", 200, 0.06)],
        """
        0 run a:100
        10 run a:100
        20 run b:100
        30 run b:100
        40 run late:100
        50 run late:100
        60 run late:100
        """,
    ),
    "no deadline: behind those who have one": (
        DualQueue(100, 1, COST, PLAIN),
        [Arrival(0.0, "easy", 200), Arrival(0.001, "a", 200, 0.05)],
        """
        0 run easy:100
        10 run a:100
        20 run a:100
        30 run easy:100
        """,
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_story(name):
    order, arrivals, want = STORIES[name]
    assert played(order, arrivals).log == [line.strip() for line in want.strip().splitlines()]


# Batches.
@pytest.mark.parametrize(
    ("tokens", "want"), [(1, 0), (8, 0), (9, 1), (13, 1), (29, 2), (47, 3), (64, 3), (129, 5), (9999, 5)]
)
def test_buckets(tokens, want):
    assert bucket(tokens) == want


@pytest.mark.parametrize(
    ("grouping", "tokens", "want"),
    [
        (Grouping.MEMORY_FIRST, 256, ["a:64 b:60", "c:30", "d:16"]),
        (Grouping.LATENCY_FIRST, 256, ["a:64 b:60 c:30 d:16"]),
        (Grouping.LATENCY_FIRST, 200, ["a:64 b:60 c:30", "d:16"]),
        (Grouping.RAGGED, 200, ["a:64 b:60 c:30 d:16"]),
        (Grouping.RAGGED, 160, ["a:64 b:60 c:30", "d:16"]),
    ],
)
def test_who_goes_together(grouping, tokens, want):
    """LAPS's example of a batch of {64, 64, 32, 16}, padded and not."""
    gather = Gather(GatherSettings(grouping=grouping), Pace(tokens, COST), tokens, 8)
    for key, new in (("d", 16), ("c", 30), ("a", 64), ("b", 60)):
        gather.add(Job(key, new, wanted_by={"a": 1.0}.get(key, 2.0)), 0.0)
    begun: set[str] = set()
    batches = []
    while (anchor := gather.first()) is not None:
        if batches and grouping is Grouping.MEMORY_FIRST:
            anchor = max((job for job in gather._jobs.values()), key=lambda job: job.left)
        jobs, held = gather.batch(anchor, 0.0, lambda key: gather._jobs[key], begun, tokens, 8)
        assert not held
        gather.check()
        batches.append(" ".join(f"{job.key}:{count}" for job, count in jobs))
    assert batches == want
    assert begun == {"a", "b", "c", "d"}


def test_nobody_comes_along_who_would_make_the_most_urgent_late():
    order = DualQueue(256, 8, COST, PLAIN)
    arrivals = [Arrival(0.0, "b", 60, 0.1), Arrival(0.0, "c", 30, 0.1), Arrival(0.0, "a", 90, 0.0142)]
    log = played(order, arrivals).log
    assert log[0] == "0 run a:90 c:30"


def test_more_to_compute_than_was_offered_is_cut_to_the_step():
    order = DualQueue(64, 8, COST, PLAIN)
    order.expect(Job("a", 20, cached=400, wanted_by=9.0), 0.0)
    order.ready("a", 0.0)
    assert order.next(1.0, lambda key: Job(key, 420, wanted_by=9.0)) == [("a", 64)]
    order.ran([("a", 64)], 1.1)
    order.check()
    assert order.next(1.1, lambda key: pytest.fail("started twice")) == [("a", 64)]


# Window and depth.
def filled(gather: Gather, count: int, every: float, now: float) -> float:
    for number in range(count):
        now += every
        gather.add(Job(f"{now:.6f} {number}", 8), now)
    return now


def emptied(gather: Gather, now: float) -> None:
    count = len(gather)
    while (first := gather.first()) is not None:
        gather.drop(first.key)
    gather.dispatched(count, now)


def test_depth_falls_to_what_comes_and_grows_back_with_the_rate():
    gather = Gather(GatherSettings(), Pace(4096, COST), 4096, 64)
    assert gather.depth == DEPTHS[-1]
    now = filled(gather, 3, 0.002, 0.0)
    assert gather.closes_at == pytest.approx(0.012)
    emptied(gather, 0.012)
    assert gather.depth == 2
    for every, depth in ((0.002, 4), (0.0002, 32)):
        until = now + 1.0
        while now < until:
            now = filled(gather, gather.depth, every, now)
            assert gather.closed(now)
            emptied(gather, now)
        assert gather.depth == depth
    for _ in range(4):
        now = filled(gather, 1, 1.0, now)
        emptied(gather, now + 0.01)
    assert gather.depth == 1, "nobody waits for company at a low rate"


def test_the_window_follows_the_time_that_a_round_takes_to_fill():
    gather = Gather(GatherSettings(), Pace(4096, COST), 4096, 4)
    now = filled(gather, 4, 0.002, 0.0)
    emptied(gather, now)
    assert gather.window_s == pytest.approx(0.006)
    now = filled(gather, 4, 0.0, 1.0)
    emptied(gather, now)
    assert gather.window_s == 0.001


@pytest.mark.parametrize(("wanted_by", "closes_at"), [(9.0, 0.01), (0.022, 0.007), (0.0155, 0.0005), (0.001, -0.014)])
def test_a_deadline_closes_the_window_early(wanted_by, closes_at):
    gather = Gather(GatherSettings(), Pace(4096, COST), 4096, 4)
    gather.add(Job("a", 8, wanted_by=wanted_by), 0.0)
    assert gather.closes_at == pytest.approx(closes_at)


def test_the_longest_wait_closes_the_window():
    gather = Gather(GatherSettings(1.0, 2.0, wait_most_s=0.3), Pace(4096, COST), 4096, 4)
    gather.add(Job("a", 8), 5.0)
    assert gather.closes_at == 5.3


def test_a_step_full_of_tokens_waits_for_nobody():
    gather = Gather(GatherSettings(), Pace(100, COST), 100, 4)
    gather.add(Job("a", 60), 0.0)
    assert not gather.closed(0.0)
    gather.add(Job("b", 60), 0.0)
    assert gather.closed(0.0)


# What is accepted.
def test_a_short_request_waits_for_short_ones_and_a_long_one_for_all():
    order = DualQueue(1000, 8, COST, PLAIN)
    for key, new, wanted_by in (("a", 5000, 10.0), ("b", 80, 1.0), ("c", 3000, 1.0)):
        order.expect(Job(key, new, 0, 0.0, wanted_by), 0.0)
    assert order.wait_s(80, 0, 0.0) == pytest.approx(0.016 + 0.010), "and the window"
    assert order.wait_s(1000, 0, 0.0, wanted_s=1.0) == pytest.approx(0.0001 * (80 + 3000 + 1000))
    assert order.wait_s(1000, 0, 0.0, wanted_s=20.0) == pytest.approx(0.0001 * (80 + 3000 + 5000 + 1000))


def test_nobody_is_let_in_who_makes_a_long_job_late():
    """10,000 tokens/s. Behind 4,000 tokens wanted in 1 s, 5,000 that are wanted sooner can be in time, 7,000 cannot."""
    order = DualQueue(1000, 8, COST, replace(PLAIN, headroom=0.0))
    order.expect(Job("a", 4000, 0, 0.0, 1.0), 0.0)
    for new, wanted_s, first_s, lacks_s in (
        (5000, 0.8, 0.5, 0.0),
        (7000, 0.8, 0.7, 0.1),  # too long for the one before
        (7000, 2.0, 1.1, 0.0),  # behind it there is room
    ):
        assert order.wait_s(new, 0, 0.0, wanted_s) == pytest.approx(first_s)
        assert order.lacks_s(new, 0, 0.0, wanted_s) == pytest.approx(lacks_s)


@pytest.mark.parametrize(
    ("before", "new", "accepted"),
    [(0, 9000, True), (4000, 500, True), (4000, 3000, False), (7000, 600, False), (7000, 300, True)],
)
def test_who_needs_much_of_a_full_line_is_refused(before, new, accepted):
    """Of 1 s: 8 times what it takes alone stays free, times the square of how full the line is before it."""
    order = DualQueue(1000, 8, COST, PLAIN)
    if before:
        order.expect(Job("a", before, 0, 0.0, 0.9), 0.0)
    assert order.wait_s(new, 0, 0.0, wanted_s=1.0) == pytest.approx((before + new) / 10_000)
    lacks_s = order.lacks_s(new, 0, 0.0, wanted_s=1.0)
    assert (lacks_s == 0) == accepted
    if before:
        spare_s = min(0.9 - before / 10_000, 1.0 - (before + new) / 10_000)
        assert lacks_s == pytest.approx(max(0.0, 8 * new / 10_000 * (before / 10_000) ** 2 - spare_s))


@pytest.mark.parametrize(("wanted_s", "accepted"), [(60.0, True), (20.5, True), (19.0, False), (math.inf, True)])
def test_an_idle_worker_takes_whatever_can_be_done_in_time(wanted_s, accepted):
    """20 s of work, which is more than a job without a deadline is thought to have."""
    order = DualQueue(1000, 8, COST, PLAIN)
    assert (order.wait_s(200_000, 0, 0.0, wanted_s) <= wanted_s) == accepted
    assert (order.lacks_s(200_000, 0, 0.0, wanted_s) == 0) == accepted


def test_what_short_ones_take_of_the_time_is_not_there_for_long_ones():
    order = DualQueue(1000, 8, COST, PLAIN)
    alone = order.wait_s(1000, 0, 0.0, 9.0)
    Play(order, short(100, 0.020)).run(until=2.5)
    assert order.wait_s(1000, 0, 2.5, 9.0) > 1.05 * alone
    assert order.wait_s(1000, 0, 99.0, 9.0) == pytest.approx(alone, rel=1e-3)


# Suspension.
BIG = 10_000
"""Tokens of a step that takes a second."""


@pytest.mark.parametrize(
    ("what", "long_s", "short_s", "log"),
    [
        ("both can be in time", 5.0, 0.1, ["100 long:8000 suspended for s", "100 run s:20", "110 long:8000 resumed"]),
        ("the waiter is in time behind the step", 5.0, 0.9, ["800 run s:20"]),
        ("the waiter is late in any case", 5.0, 0.012, ["800 run s:20"]),
        ("the running step would be late", 0.81, 0.1, ["800 run s:20"]),
        (
            "the running step is late",
            0.5,
            0.1,
            ["100 long:8000 suspended for s", "100 run s:20", "110 long:8000 resumed"],
        ),
    ],
)
def test_who_may_suspend_whom(what, long_s, short_s, log):
    arrivals = [Arrival(0.0, "long", 8000, long_s), Arrival(0.1, "s", 20, short_s)]
    play = played(DualQueue(BIG, 8, COST), arrivals, preempt=True)
    assert play.log == ["0 run long:8000", *log]
    assert play.done["long"] == pytest.approx(0.81 if "resumed" in log[-1] else 0.8)


def test_a_step_is_suspended_once_and_goes_on_when_nobody_is_pressed():
    arrivals = [Arrival(0.0, "long", 8000, 5.0), Arrival(0.1, "s", 20, 0.1), Arrival(0.105, "t", 20, 0.1)]
    arrivals += [Arrival(0.108, "u", 20, 3.0), Arrival(0.3, "v", 20, 0.1)]
    play = played(DualQueue(BIG, 8, COST), arrivals, preempt=True)
    assert play.log[1:5] == [
        "100 long:8000 suspended for s",
        "100 run s:20",
        "110 run t:20 u:20",
        "120 long:8000 resumed",
    ]
    assert not any("suspended" in line for line in play.log[5:])
    assert play.done["long"] == pytest.approx(0.82)


def test_a_request_is_accepted_for_whom_a_step_can_be_suspended():
    play = Play(DualQueue(BIG, 8, COST), [Arrival(0.0, "long", 8000, 5.0)]).run(until=0.0)
    assert play.order.wait_s(20, 0, 0.0) == pytest.approx(0.81)
    assert play.order.wait_s(20, 0, 0.0, suspendable=True) == pytest.approx(0.02)
    tight = Play(DualQueue(BIG, 8, COST), [Arrival(0.0, "long", 8000, 0.81)]).run(until=0.0)
    assert tight.order.wait_s(20, 0, 0.0, suspendable=True) == pytest.approx(0.81)


def test_a_suspended_step_of_which_nobody_is_left_ends_first():
    play = Play(DualQueue(BIG, 8, COST), [Arrival(0.0, "long", 8000, 5.0), Arrival(0.1, "s", 20, 0.1)], preempt=True)
    play.run(until=0.1)
    assert play.suspended is not None
    play.order.expect(Job("t", 20, wanted_by=0.25), 0.1)
    play.order.ready("t", 0.1)
    assert not play.order.resumes(0.1)
    play.order.drop("long")
    assert play.order.resumes(0.1)


# Nobody starves.
class Watched(DualQueue):
    """Looks at every step: is the job that has aged first in it, if it can start?"""

    steps_of_age = 0

    def next(self, now, start):
        refused: list[str] = []
        started: list[str] = []

        def watched(key):
            job = start(key)
            (started if job is not None else refused).append(key)
            return job

        self._settle(now)
        ages = {key: age for key, age in self._ages.items() if age <= now}
        step = super().next(now, watched)
        if ages and self._suspended is None:
            Watched.steps_of_age += 1
            oldest = min(ages.values())
            first = [key for key, age in ages.items() if age == oldest]
            if refused:
                assert refused[0] in first or step[0][0] in first
                assert refused[0] not in first or not started, "somebody started past one that has aged"
            else:
                assert step[0][0] in first, "somebody went before one that has aged"
        return step


@pytest.mark.parametrize("seed", range(3))
def test_whoever_has_aged_is_first_in_each_step(seed):
    dice = random.Random(seed)
    Watched.steps_of_age = 0
    settings = DualQueueSettings(easy_s=0.3, stretch=2.0, grace_s=0.05)
    arrivals = [
        Arrival(
            0.008 * number, f"j{number}", dice.choice((10, 30, 90, 200, 900)), dice.choice((0.05, 0.3, float("inf")))
        )
        for number in range(150)
    ]
    play = Play(Watched(256, 8, COST, settings), arrivals, preempt=True)
    while play.step(1e9):
        play.order.check()
        play.barred = {key for key in play.jobs if dice.random() < 0.05}
    play.barred = set()
    play.plan()
    play.run()
    assert len(play.done) == 150
    assert Watched.steps_of_age > 50


@pytest.mark.parametrize("grace_s", [0.1, 1e9])
def test_an_overload_of_short_prompts_does_not_starve_a_long_one(grace_s):
    """Short prompts for more than all of the time, each in time when its turn comes, and a long one that cannot be."""
    settings = DualQueueSettings(fill=False, grace_s=grace_s)
    arrivals = [Arrival(0.0, "long", 1000, 0.05), *short(500, 0.008, new=100, wanted_s=9.0)]
    play = Play(DualQueue(100, 8, COST, settings), arrivals).run(until=3.0)
    # It ages 4 times its own 0.1 s and 0.1 s after its arrival, and needs its own time, and a step, from then on.
    assert ("long" in play.done) == (grace_s == 0.1)
    if "long" in play.done:
        assert play.done["long"] <= 0.5 + 0.1 + 0.1 + 0.01 + 1e-9


def test_a_long_prompt_that_cannot_start_is_overtaken_until_it_has_aged():
    settings = DualQueueSettings(fill=False, easy_s=0.1, stretch=0.0, grace_s=0.1)
    play = Play(DualQueue(100, 8, COST, settings), [Arrival(0.0, "long", 1000), *short(60, 0.01, wanted_s=5.0)])
    play.barred = {"long"}
    play.run(until=0.5)
    started = [line for line in play.log if " run s" in line]
    assert started
    assert all(float(line.split()[0]) < 200 for line in started)
    play.barred = set()
    play.plan()
    assert play.run().done["long"] == pytest.approx(play.now - 0.0, abs=0.7)
    assert len(play.done) == 61


def test_who_has_begun_goes_on_while_one_that_has_aged_cannot_start():
    """What they hold may be the memory that it waits for."""
    settings = DualQueueSettings(fill=False, easy_s=0.02, stretch=0.0, grace_s=0.0)
    arrivals = [Arrival(0.0, "begun", 500, 5.0), Arrival(0.001, "aged", 300), Arrival(0.03, "other", 300, 0.5)]
    play = Play(DualQueue(100, 8, COST, settings), arrivals)
    play.barred = {"aged"}
    play.run()
    assert play.log == [f"{at} run begun:100" for at in (0, 10, 20, 30, 40)]


@pytest.mark.parametrize(("promised", "started"), [((), []), (("other",), ["other"]), (("other", "aged"), [])])
def test_who_has_its_sinks_promise_starts_past_one_that_may_lack_it(promised, started):
    """And past nobody who lacks only memory here."""
    settings = DualQueueSettings(fill=False, easy_s=0.02, stretch=0.0, grace_s=0.0)
    arrivals = [Arrival(0.0, "aged", 300), Arrival(0.01, "more", 300, 0.5), Arrival(0.02, "other", 300, 0.5)]
    play = Play(DualQueue(100, 8, COST, settings), arrivals)
    play.barred = {"aged", "more", "other"}
    play.run(until=0.1)
    for key in promised:
        play.order.granted(key)
    play.barred = {"aged", "more"}
    play.now = 0.1
    play.plan()
    play.order.check()
    assert [key for key, _ in play.running[0]] == started if play.running else not started


def test_another_model_while_it_runs_is_another_boundary_for_those_who_come():
    """Who was short, or has an age, stays so; a state that is read goes on by the model that it was written with."""
    order = DualQueue(256, 8, COST)
    order.expect(Job("a", 60, accepted_at=0.0), 0.0)
    order.ready("a", 0.0)
    assert order.short_tokens > 60
    before_s = order.wait_s(200, 0, 0.0)
    order.reprice(replace(COST, prefill=((0.001, 0.0, 0.0, 0.0), (0.0, 0.0001, 0.0, 0.0))))
    order.check()
    assert order.short_tokens == 11
    order.expect(Job("b", 60, accepted_at=0.0), 0.0)
    order.ready("b", 0.0)
    assert [job.key for job in (order._gather.first(),)] == ["a"]
    assert order.upcoming(0.0) == ["a", "b"]
    order.reprice(COST.at(3.0, 3.0))
    assert order.wait_s(200, 0, 0.0) > 2 * before_s
    again = DualQueue(256, 8, COST)
    again.restore(json.loads(json.dumps(order.document())))
    assert again.wait_s(200, 0, 0.0) == order.wait_s(200, 0, 0.0)
    assert again.document() == order.document()


def test_another_model_is_another_boundary():
    fast = CostModel("fast", prefill=((0.001, 0.0, 0.0, 0.0), (0.0, 0.0001, 0.0, 0.0)), decode=((0.01, 0.0, 0.0),))
    assert DualQueue(256, 8, fast).short_tokens == 11


def test_what_is_suspended_is_still_to_do():
    order = DualQueue(256, 8, COST)
    job = Job("long", 1000)
    order.expect(job, 0.0)
    order.ready("long", 0.0)
    step = order.next(0.0, lambda key: job)
    before_s = order.work_s(0.005)
    assert before_s == pytest.approx(0.1 - 0.005, rel=0.02)
    order.suspended(step, 0.005)
    assert order.work_s(0.005) == pytest.approx(before_s)
    assert order.work_s(5.0) == pytest.approx(before_s), "it does not run meanwhile"
