"""Goodput: the search on predicates that fall, wobble, always or never hold; intervals; and one small real search."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LocalError, SetupError
from core.request import Slo
from scheduler.policies import policy
from sim.fleet import workers
from sim.generators import ARXIV, generate
from sim.goodput import LEAST, OCTAVES, Edge, Estimate, Goal, Trial, curve, edge, goodput, search, student, trial
from sim.run import Settings
from sim.workload import Arrival, Workload, scale

STEPS = 6
"""By halving, in an octave at 2 %."""


def asked(holds, start: float, precision: float = 0.02) -> tuple[Edge, list[float]]:
    """The edge, and every rate that was asked for."""
    rates: list[float] = []

    def look(rate: float) -> bool:
        rates.append(rate)
        return holds(rate)

    return edge(look, start, precision), rates


@given(st.floats(0.1, 40.0), st.floats(0.1, 40.0), st.sampled_from([0.2, 0.05, 0.02, 0.005]))
def test_a_falling_predicate_is_found_to_the_precision(capacity: float, start: float, precision: float) -> None:
    found, rates = asked(lambda rate: rate <= capacity, start, precision)
    assert found.above is not None
    assert found.rate <= capacity < found.above
    assert 1 < found.above / found.rate <= 1 + precision + 1e-12
    assert len(rates) == len(set(rates))


@given(st.integers(0, 2**32), st.floats(0.1, 10.0))
def test_a_noisy_predicate_ends_at_an_edge_in_a_bounded_number_of_runs(seed: int, start: float) -> None:
    known: dict[float, bool] = {}
    rng = random.Random(seed)

    def holds(rate: float) -> bool:
        return known.setdefault(rate, rng.random() < 1 / (1 + rate))

    found, rates = asked(holds, start)
    assert len(rates) == len(set(rates)) <= 1 + OCTAVES + STEPS
    if found.rate:
        assert known[found.rate]
    if found.above is not None:
        assert not known[found.above]


def test_what_always_or_never_holds_ends_too() -> None:
    found, rates = asked(lambda rate: True, 3.0)
    assert found == Edge(3.0 * 2**OCTAVES, None)
    assert len(rates) == 1 + OCTAVES
    found, rates = asked(lambda rate: False, 3.0)
    assert found == Edge(0.0, 3.0 / 2**OCTAVES)
    assert len(rates) == 1 + OCTAVES


def test_both_ways_of_counting_share_runs() -> None:
    ran: list[float] = []

    def run(rate: float) -> Trial:
        ran.append(rate)
        return Trial(rate, 1, 1000, 1.0 if rate <= 5 else 0.5, 1.0 if rate <= 7 else 0.5)

    ours, by_mean, trials = search(run, 4.0)
    assert ours.rate <= 5 < (ours.above or 0)
    assert by_mean.rate <= 7 < (by_mean.above or 0)
    assert len(ran) == len(set(ran)) < 2 * (2 + STEPS)
    assert [one.rate for one in trials] == sorted(ran)


def test_the_interval_is_students() -> None:
    # scipy.stats.t.ppf(0.975, freedom)
    for freedom, want in ((1, 12.7062), (4, 2.7764), (30, 2.0423), (31, 2.0395), (40, 2.0211), (200, 1.9719)):
        assert student(freedom) == pytest.approx(want, abs=6e-4)
    found = Estimate.of([2.0, 4.0, 6.0])
    assert found.mean == 4.0
    assert found.half == pytest.approx(4.303 * 2 / math.sqrt(3))
    assert Estimate.of([5.0]) == Estimate((5.0,), 5.0, None)
    for wrong in (lambda: Estimate.of([]), lambda: student(0)):
        with pytest.raises(LocalError):
            wrong()


@pytest.mark.parametrize(
    "wrong",
    [{"share": 0.0}, {"share": 1.1}, {"precision": 0.0}, {"precision": 1.0}, {"warm_s": -1.0}, {"cool_s": math.inf}],
)
def test_a_wrong_goal_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LocalError, match=next(iter(wrong))):
        Goal(**wrong)


BUILDS = workers("1 prefill, 1 decode", "h200-llama-3.1-8b")
SETTINGS = Settings(slo=Slo(0.1, 0.05))


def at(rate: float, seed: int) -> Workload:
    made = generate(ARXIV, seed, 80)
    return scale(Workload("short", tuple(replace(one, output=5) for one in made.arrivals)), rate)


def test_a_trial_judges_who_arrives_inside_its_window() -> None:
    # Eleven requests, ten seconds; the first and the last three alone want more than a goal allows.
    long, short = (100_000, 3), (10, 3)
    lengths = [long, *[short] * 7, *[long] * 3]
    workload = Workload("w", tuple(Arrival(float(second), *each) for second, each in enumerate(lengths)))
    goal = Goal(warm_s=1.0, cool_s=3.0)
    builds = workers("2 prefill, 1 decode", "h200-llama-3.1-8b")
    seen = []
    slow = Settings(slo=Slo(0.4, 0.0))
    found = trial(lambda rate, seed: workload, 1.0, 1, builds, policy("fcfs"), slow, goal, over=seen.append)
    assert found.judged == 7
    assert len(seen) == 11
    assert (
        found.attained
        > trial(lambda rate, seed: workload, 1.0, 1, builds, policy("fcfs"), slow, Goal(least=1)).attained
    )


def test_too_few_requests_to_judge_are_refused() -> None:
    with pytest.raises(SetupError, match=f"got 80 to judge at 4/s, want at least {LEAST}"):
        trial(at, 4.0, 1, BUILDS, policy("fcfs"), SETTINGS)
    with pytest.raises(SetupError, match="got 0 to judge"):
        trial(at, 4.0, 1, BUILDS, policy("fcfs"), SETTINGS, Goal(warm_s=1e6))
    with pytest.raises(SetupError, match="got none"):
        trial(lambda rate, seed: Workload("none", ()), 4.0, 1, BUILDS, policy("fcfs"), SETTINGS)
    with pytest.raises(LocalError, match="seeds"):
        goodput(at, 1.0, (), BUILDS, policy("fcfs"), SETTINGS)


def test_a_small_search_finds_an_edge_and_finds_it_again() -> None:
    goal = Goal(least=80, precision=0.5)
    said: list[Trial] = []
    found = goodput(at, 80.0, (1, 2), BUILDS, policy("fcfs"), SETTINGS, goal, each=said.append)
    assert sorted(said, key=lambda one: (one.seed, one.rate)) == list(found.trials)
    assert found.devices == 2
    assert found.rate.half is not None
    again = goodput(at, 80.0, (1,), BUILDS, policy("fcfs"), SETTINGS, goal)
    assert again.edges == found.edges[:1]
    assert again.trials == tuple(one for one in found.trials if one.seed == 1)
    [one] = again.edges
    assert one.above is not None
    here, above = curve(at, [one.rate, one.above], [1], BUILDS, policy("fcfs"), SETTINGS, goal)
    assert here.attained >= 0.9 > above.attained
