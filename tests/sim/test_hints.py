"""Where nobody says what a request belongs to, hints decide nothing."""

from __future__ import annotations

from core.request import Slo
from scheduler.policies import BATON, UNHINTED
from sim.fleet import workers
from sim.outcome import Outcome
from sim.run import Settings, simulate
from sim.source import source


def outcomes(policy, trace: str, rate: float) -> list[Outcome]:
    found: list[Outcome] = []
    made = source(trace, count=150).at(rate, 1)
    builds = workers("1 prefill, 1 decode", "h200-llama-3.1-8b", page_tokens=64, kv=40_000)
    simulate(made, builds, policy, Settings(slo=Slo(0.4, 0.05), max_tokens=4096), over=found.append)
    return found


def test_requests_without_sessions_are_served_to_the_last_digit_as_without_hints():
    assert outcomes(BATON, "azure-conv", 30.0) == outcomes(UNHINTED, "azure-conv", 30.0)
