"""The time line: it sees what happens, changes nothing, keeps every command, and its memory does not grow."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import replace

import pytest

from core.errors import LocalError
from core.request import Slo
from scheduler.policies import policy
from sim.fleet import workers
from sim.generators import LMSYS, generate
from sim.outcome import Outcome
from sim.run import Settings, Simulation, simulate
from sim.scenario import CALM, Lose, Return, Scenario
from sim.timeline import Timeline
from sim.workload import Workload, scale

BUILDS = workers("1 prefill, 2 decode", "h200-llama-3.1-8b", kv=20_000)
SETTINGS = Settings(slo=Slo(0.4, 0.05), load_s=1.0)


@functools.cache
def workload() -> Workload:
    made = generate(LMSYS, 3, 60)
    return scale(Workload("few", tuple(replace(one, output=min(one.output, 40)) for one in made.arrivals)), 10.0)


def outcomes(scenario: Scenario = CALM, watch=None) -> list[Outcome]:
    found: list[Outcome] = []
    simulate(workload(), BUILDS, policy("fcfs"), SETTINGS, scenario=scenario, over=found.append, watch=watch)
    return found


def watched(timeline: Timeline, scenario: Scenario = CALM) -> Timeline:
    outcomes(scenario, timeline)
    timeline.end()
    return timeline


def test_who_is_watched_does_the_same() -> None:
    assert outcomes(watch=Timeline(0.01)) == outcomes()


def test_samples_are_even_and_the_end_is_one() -> None:
    timeline = watched(Timeline(0.5))
    times = [sample.at_s for sample in timeline.samples]
    assert times[:-1] == [index * 0.5 for index in range(len(times) - 1)]
    assert 0 < times[-1] - times[-2] <= 0.5
    last = timeline.samples[-1]
    assert last.under_way == 0
    assert all(count == 0 for count in last.phases.values())
    assert all(gauge is not None and not sum(gauge.queue.values()) for gauge in last.workers.values())
    assert max(sample.under_way for sample in timeline.samples) > 0


def test_every_page_of_a_worker_is_in_some_state() -> None:
    timeline = watched(Timeline(0.1))
    assert timeline.total_pages == {build.name: build.pages for build in BUILDS}
    used = 0
    for sample in timeline.samples:
        for name, gauge in sample.workers.items():
            assert gauge is not None
            assert sum(gauge.pages.values()) == timeline.total_pages[name]
            used += sum(count for owner, count in gauge.pages.items() if owner != "free")
    assert used > 0
    seen = {state for sample in timeline.samples for state, count in sample.workers["decode-0"].queue.items() if count}
    assert "running" in seen


def test_thinning_keeps_evenness_bounds_and_every_command() -> None:
    full, thin = watched(Timeline(0.05, most=10_000)), watched(Timeline(0.05, most=8))
    assert len(full.samples) > 100
    assert len(thin.samples) <= 8
    assert math.log2(thin.interval_s / 0.05).is_integer()
    totals = []
    for timeline in (full, thin):
        total: Counter[str] = Counter()
        for sample in timeline.samples:
            total.update(sample.commands)
        totals.append(total)
    assert totals[0] == totals[1]
    assert totals[0]["Router.End"] == len(workload())
    times = [sample.at_s for sample in thin.samples]
    assert times[:-1] == pytest.approx([index * thin.interval_s for index in range(len(times) - 1)])
    by_time = {sample.at_s: sample for sample in full.samples}
    for sample in thin.samples[:-1]:
        assert sample.workers == by_time[sample.at_s].workers


def test_a_lost_worker_is_none_until_it_is_back() -> None:
    scenario = Scenario("loss", (Lose(2.0, "decode-0"), Return(3.0, "decode-0")))
    timeline = watched(Timeline(0.5), scenario)
    alive = {sample.at_s: sample.workers["decode-0"] is not None for sample in timeline.samples}
    assert [alive[at] for at in (1.5, 2.0, 2.5, 3.5, 4.0, 4.5)] == [True, False, False, False, True, True]
    # Commands of both lives count, and those of a life that ended between two samples.
    total: Counter[str] = Counter()
    for sample in timeline.samples:
        total.update(sample.commands)
    assert total["Router.End"] == len(workload())


def test_samples_alone_do_not_keep_a_run_going() -> None:
    timeline = Timeline(1.0)
    simulation = Simulation(Workload("none", ()), BUILDS, policy("fcfs"), SETTINGS, CALM, None)
    timeline(simulation)
    simulation.loop.run()
    assert len(timeline.samples) < 100


def test_wrong_arguments_are_refused() -> None:
    for wrong in ({"interval_s": 0.0}, {"interval_s": float("inf")}, {"most": 3}, {"most": 0}):
        with pytest.raises(LocalError, match=next(iter(wrong))):
            Timeline(**wrong)
