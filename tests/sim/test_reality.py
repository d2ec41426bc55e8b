"""Beside reality: four measured timelines of vLLM, the cost model fitted to their first halves, checked on the second.

What was fitted is kept in data/vllm_fitted.json (`python -m bench.fidelity --write` makes it, a slow test repeats it).
The bounds are on requests 150 to 299, which no fit has seen; docs/fidelity.md has all errors.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from sim import traces
from tests.sim import reality
from tests.sim.reality import FITTED_ON, SETUPS, STATISTICS, column, mean, quantile
from tests.sim.simplex import least

BY_NAME = {setup.name: setup for setup in SETUPS}


def measured(name: str) -> Path:
    """A timeline; where there is none the test is skipped."""
    path = traces.folder() / BY_NAME[name].file
    if not path.is_file():
        pytest.skip("needs the public traces (BATON_TRACES)")
    return path


@pytest.mark.parametrize("name", BY_NAME)
def test_the_second_half_of_a_timeline(name):
    """Mean time a token within 5 %; median time to the first within 15 % or 50 ms."""
    arrivals, seen = reality.timeline(measured(name))
    ours = reality.replay(BY_NAME[name], reality.kept()[name], arrivals)
    ours, seen = ours[FITTED_ON:], seen[FITTED_ON:]
    assert len(ours) == len(seen) == 150
    assert mean(column(ours, "tpot")) == pytest.approx(mean(column(seen, "tpot")), rel=0.05)
    first, median = quantile(column(ours, "ttft"), 0.5), quantile(column(seen, "ttft"), 0.5)
    assert abs(first - median) <= max(0.15 * median, 0.05)


def test_what_was_measured_is_read_as_its_source_sums_it_up():
    """Its summary counts from when a request entered the engine; we count from its arrival, up to a step before."""
    _, seen = reality.timeline(measured("rtxpro6000_llama31_8b_tp1"))
    assert 1e3 * mean(column(seen, "tpot")) == pytest.approx(32.5, abs=0.05)
    assert 1e3 * mean(column(seen, "ttft")) == pytest.approx(7097.2 + 22.8, abs=1.0)


def test_memory_was_found_by_fitting():
    """Its engine had 41,408 tokens and said so; nobody told the fit. With twice as much there would be no such wait."""
    name = "rtx4090_llama31_8b_tp1"
    setup, fitted = BY_NAME[name], reality.kept()[name]
    assert fitted.kv_tokens == pytest.approx(41_408, rel=0.03)
    arrivals, seen = reality.timeline(measured(name))
    roomy = reality.replay(setup, replace(fitted, kv_tokens=2 * fitted.kv_tokens), arrivals)
    assert mean(column(roomy, "ttft")) < 0.6 * mean(column(seen, "ttft"))


def test_what_is_kept_is_what_is_fitted():
    kept = reality.kept()
    assert set(kept) == set(BY_NAME)
    for name, one in kept.items():
        assert one.names() == BY_NAME[name].start.names()
    assert reality.read(reality.document(kept)) == kept


def test_the_simplex_finds_the_bottom_of_a_bent_valley():
    found, value = least(
        lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2, (-1.2, 1.0), (0.5, 0.5), 300, small=0
    )
    assert found == pytest.approx((1.0, 1.0), abs=1e-3)
    assert value < 1e-6


def test_the_simplex_counts_its_calls_and_stands_infinity():
    calls = []

    def of(point: tuple[float, ...]) -> float:
        calls.append(point)
        return math.inf if point[0] < 0 else (point[0] - 3) ** 2 + abs(point[1])

    found, _ = least(of, (0.5, 1.0), (-1.0, 1.0), 60, small=0)
    assert 60 <= len(calls) <= 63
    assert found == pytest.approx((3.0, 0.0), abs=0.05)


def test_statistics():
    values = [4.0, 1.0, 3.0, 2.0]
    assert {name: of(values) for name, of in STATISTICS.items()} == pytest.approx(
        {"mean": 2.5, "median": 2.5, "p90": 3.7}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_the_fit_again(name):
    """Same numbers from the same guess: a change of the simulator or of a policy that moves them shows here."""
    setup = BY_NAME[name]
    arrivals, seen = reality.timeline(measured(name))
    again = reality.document({name: reality.fit(setup, arrivals, seen)})
    ours = reality.replay(setup, reality.read(again)[name], arrivals)
    kept = reality.replay(setup, reality.kept()[name], arrivals)
    losses = [reality.loss(each[:FITTED_ON], seen[:FITTED_ON]) for each in (ours, kept)]
    assert losses[0] <= 1.05 * losses[1]
