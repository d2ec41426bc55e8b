"""Waiting times of one worker with one line: each the recursion's, and their mean what queueing theory says.

A request of one token, one to a step, in a chunk longer than any prompt, is a customer of a queue with one server. If
every wait is what Lindley's recursion gives on the same arrivals, whatever is true of the recursion is true of the
simulator; so the long sums that a mean within 3 % takes are left to the recursion, and, in a slow test, to both.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from core.kv import KvShape
from core.request import Phase
from core.worker import Role
from scheduler.cost import CostModel, Lane
from scheduler.mixed_events import MixedConfig
from scheduler.policies import Policy
from scheduler.prefill_policy import PrefillConfig
from scheduler.router import RouterConfig
from sim.fleet import Build
from sim.outcome import Outcome
from sim.run import Settings, simulate
from sim.workload import Arrival

TOKEN_S = 1e-4
LOADS = (0.3, 0.6, 0.8)
LONGEST = 8000


def constant(share: float) -> int:
    """Of M/D/1: 0.1 s."""
    return 1000


def two_sizes(share: float) -> int:
    """Of M/G/1: many short ones, some twenty times as long. The squared coefficient of variation is 2.8."""
    return 200 if share < 0.85 else 4000


def spread(share: float) -> int:
    """Of M/G/1: anything up to the longest, as likely as any other."""
    return 1 + int(share * LONGEST)


SIZES: dict[str, Callable[[float], int]] = {"M/D/1": constant, "M/G/1 two": two_sizes, "M/G/1 any": spread}
MOMENTS = {
    "M/D/1": (1000.0, 1000.0**2),
    "M/G/1 two": (0.85 * 200 + 0.15 * 4000, 0.85 * 200.0**2 + 0.15 * 4000.0**2),
    "M/G/1 any": ((LONGEST + 1) / 2, (LONGEST + 1) * (2 * LONGEST + 1) / 6),
}
"""First and second, in tokens."""


def customers(kind: str, load: float, seed: int, count: int, *, mirrored: bool = False) -> Iterator[tuple[float, int]]:
    """Poisson arrivals: when, and how large. Mirrored: long where the others are short, and the other way round."""
    rng = random.Random(seed)
    size, gap_s = SIZES[kind], MOMENTS[kind][0] * TOKEN_S / load
    draw, log = rng.random, math.log
    at_s = 0.0
    for _ in range(count):
        gap, share = draw(), draw()
        if mirrored:
            gap, share = 1 - gap, 1 - share
        at_s -= gap_s * log(max(gap, 1e-300))
        yield at_s, size(min(share, 1 - 1e-12))


def expected_s(kind: str, load: float) -> float:
    """Pollaczek and Khinchine's mean wait; with all sizes equal it is in DistServe's first equation (section 3.1)."""
    first, second = MOMENTS[kind]
    rate = load / (first * TOKEN_S)
    return rate * second * TOKEN_S**2 / (2 * (1 - load))


def recursion(arriving: Iterator[tuple[float, int]]) -> Iterator[float]:
    """Lindley's: each starts when it is there and the one before has ended."""
    free = 0.0
    for at_s, tokens in arriving:
        start = max(at_s, free)
        free = start + tokens * TOKEN_S
        yield start - at_s


WORKERS = ("prefill", "mixed")


def waits(arriving: Iterator[tuple[float, int]], worker: str) -> list[float]:
    """The simulator's, in order of arrival: until the first token, less the time to compute it."""
    cost = CostModel("linear", ((0.0, TOKEN_S, 0.0, 0.0),), ((0.0, 0.0, 0.0),), (Lane("none", 0.0, 0.0, 0.0),))
    policy = Policy(
        "one by one",
        "a queue with one server",
        router_config=RouterConfig(max_queue_s=math.inf),
        prefill_config=PrefillConfig(chunk_tokens=LONGEST + 1, max_rows=1),
        mixed_config=MixedConfig("prefill_first", 1, admission="prompt"),
        colocated=worker == "mixed",
    )
    shape = KvShape(1, 1, 2, 16, "bfloat16")
    builds = [Build("a", Role.PREFILL, cost, shape, 10**6)]
    if worker == "prefill":
        builds.append(Build("b", Role.DECODE, cost, shape, 10**6))
    found: list[Outcome] = []
    settings = Settings(hop_s=0.0, lane="none", timeout_s=1e6, check_every=10_000)
    arrivals = (Arrival(at_s, tokens, 1) for at_s, tokens in arriving)
    simulate(arrivals, builds, policy, settings, over=found.append)
    assert all(each.phase is Phase.DONE for each in found)
    assert all(before.at_s < after.at_s for before, after in pairwise(found)), "somebody was overtaken"
    return [(each.ttft_s or 0.0) - each.prompt * TOKEN_S for each in found]


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", SIZES)
def test_every_wait_is_that_of_the_recursion(kind, load, worker):
    count = 300
    ours = waits(customers(kind, load, 7, count), worker)
    theirs = list(recursion(customers(kind, load, 7, count)))
    assert ours == pytest.approx(theirs, rel=0, abs=1e-9)
    assert max(theirs) > 2 * max(MOMENTS[kind][0], 1000) * TOKEN_S * load, "hardly anybody waited"


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", SIZES)
def test_the_recursion_s_mean_is_the_formula_s(kind, load):
    count = 60_000 if load < 0.7 else 150_000
    assert mean_s(kind, load, 11, count) == pytest.approx(expected_s(kind, load), rel=0.03)


def mean_s(kind: str, load: float, seed: int, count: int) -> float:
    """Of the recursion, over as many mirrored ones too: what chance adds to these it mostly takes from those."""
    both = [recursion(customers(kind, load, seed, count, mirrored=mirrored)) for mirrored in (False, True)]
    return sum([math.fsum(each) for each in both]) / (2 * count)


@pytest.mark.slow
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", ["M/D/1", "M/G/1 two"])
def test_the_simulator_s_mean_is_the_formula_s(kind, load):
    count = 15_000 if load < 0.7 else 60_000
    runs = [
        waits(customers(kind, load, seed, count, mirrored=mirrored), "prefill")
        for seed in (1, 2)
        for mirrored in (False, True)
    ]
    mean = sum([math.fsum(each) for each in runs]) / (len(runs) * count)
    assert mean == pytest.approx(expected_s(kind, load), rel=0.03)
