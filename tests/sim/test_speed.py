"""What the simulator's speed rests on, without a clock: calls and events a request, and that nothing is kept of them.

`bench/simulator.py` has the seconds.
"""

from __future__ import annotations

import gc
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from core.request import Slo
from scheduler.policies import BATON
from sim.fleet import workers
from sim.outcome import Outcome
from sim.run import Settings, simulate
from sim.workload import Arrival

COST = "h200-llama-3.1-8b"
SETTINGS = Settings(slo=Slo(0.4, 0.05), check_every=10_000)


def stream(count: int, rate: float = 130.0) -> Iterator[Arrival]:
    """Prompts of about the Azure conversations' lengths, and 200 tokens of output each."""
    dice, at_s = random.Random(1), 0.0
    for _ in range(count):
        at_s += dice.expovariate(rate)
        yield Arrival(at_s, min(8000, 1 + int(dice.lognormvariate(6.5, 1.1))), 200)


def test_calls_and_events_a_request():
    """About a tenth above what they were when this was written: more would be noticed by everybody who simulates."""
    count, called = 300, 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal called
        called += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        result = simulate(stream(count), workers("4 prefill, 4 decode", COST), BATON, SETTINGS)
    finally:
        sys.setprofile(before)
    assert result.tally.good == count
    assert result.events / count < 27
    assert result.runs / count < 2, "an order for every join and every end, at most"
    assert called / count < 1600


@pytest.mark.parametrize("pages", [None, 3750])
def test_nothing_is_kept_of_requests_that_are_over(pages):
    """Of no type are there many more objects after four times as many requests: 600 would be one for every third."""
    ended, counts = 0, []

    def over(outcome: Outcome) -> None:
        nonlocal ended
        ended += 1
        if ended in (600, 2400):
            gc.collect()
            counts.append(Counter(type(each).__name__ for each in gc.get_objects()))

    builds = workers("4 prefill, 4 decode", COST)
    if pages is not None:
        builds = tuple([replace(build, pages=pages) if build.role.decodes else build for build in builds])
    result = simulate(stream(2600), builds, BATON, SETTINGS, over=over)
    assert result.tally.arrived == 2600
    early, late = counts
    assert not {name: late[name] - early[name] for name in late if late[name] - early[name] > 600}
