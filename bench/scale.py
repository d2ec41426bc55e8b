"""What a decision costs as a deployment grows: 10, 100 and 1,000 simulated workers, and requests in proportion.

    python -m bench.scale [--quick] [--json FILE]

Two prefill workers to three decode workers, H200 with Llama 3.1 8B, under "baton". Prompts of the Azure conversation
trace's shape (the trace itself where BATON_TRACES has it), 200 tokens of output each, Poisson arrivals at 70 % of what
the prefill workers sustain. Each prompt begins with one of five system prompts a prefill worker, of 2 to 16 pages, so
that placement has prefixes to look for; 100 requests a worker come, which for 1,000 workers are 100,000. One gateway
has them all: what it decides is the only thing that depends on how many workers there are.

CPU seconds, never the wall's, of one process. `a placement`: the router takes an arrival and names its workers.
`a request at the router`: all events of one request there. Beside seconds, which depend on caches as well (the data of
1,000 workers fit into none), calls: of Python and of built-in functions, the same on every machine. `ours` is the
figure at so many workers, `peer` that of 10 workers times log(workers) / log(10): a ratio above 1 says that it grew
more slowly than the logarithm. `--quick` has a tenth of the requests at 1,000 workers.

Invariants are looked at every 100,000 events of a process: a look is at all requests under way, and no decision.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from bench.report import Row, emit, median, parser, progress
from bench.simulator import prompts
from core.request import Slo
from scheduler.policies import BATON
from scheduler.router_events import Arrived
from sim.fleet import workers
from sim.run import CALM, Settings, Simulation
from sim.workload import Arrival

COST = "h200-llama-3.1-8b"
SIZES = (10, 100, 1000)
A_WORKER = 100
"""Requests."""
RATE = 0.7 * 195.0 / 4
"""Requests a second of a prefill worker: 70 % of what four of them sustain together, by `bench.simulator --search`."""
OUTPUT = 200
PAGE_TOKENS = 64
SHARED_PAGES = (2, 4, 8, 16)
SETTINGS = Settings(slo=Slo(0.4, 0.05), check_every=100_000)
BUDGET_S = 600.0
"""CPU seconds that 1,000 workers and 100,000 requests may take."""


@dataclass(slots=True)
class Found:
    """One run. Seconds are CPU seconds."""

    requests: int
    start_s: float
    """All workers made and known to the gateway."""
    run_s: float
    placing_s: float
    routing_s: float
    good: float
    placing_calls: float = 0.0
    routing_calls: float = 0.0
    """A request."""


def stream(lengths: Sequence[int], prefills: int, seed: int, count: int) -> Iterator[Arrival]:
    """Prompts that begin with one of a few system prompts, and are their own from there on."""
    dice, at_s, fresh = random.Random(seed), 0.0, 2**32
    for _ in range(count):
        at_s += dice.expovariate(RATE * prefills)
        system = dice.randrange(5 * prefills)
        prompt = dice.choice(lengths)
        blocks = -(-prompt // PAGE_TOKENS)
        shared = min(SHARED_PAGES[system % len(SHARED_PAGES)], blocks)
        begin = tuple(range(system * 64, system * 64 + shared))
        yield Arrival(at_s, prompt, OUTPUT, (*begin, *range(fresh, fresh + blocks - shared)), PAGE_TOKENS)
        fresh += blocks


def run(lengths: Sequence[int], size: int, count: int, seed: int, *, count_calls: bool = False) -> Found:
    """One simulation, with the time, or the calls, of its router apart."""
    prefills = size * 2 // 5
    builds = workers(f"{prefills} prefill, {size - prefills} decode", COST, page_tokens=PAGE_TOKENS)
    began = time.process_time()
    simulation = Simulation(stream(lengths, prefills, seed, count), builds, BATON, SETTINGS, CALM, None)
    found = Found(count, time.process_time() - began, 0.0, 0.0, 0.0, 0.0)
    (gateway,) = simulation.gateways
    (seat,) = gateway.seats
    plain = seat.on
    calls = 0

    def counting(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def counted(event: Any, now: float) -> Any:
        nonlocal calls
        calls = 0
        sys.setprofile(counting)
        try:
            return plain(event, now)
        finally:
            sys.setprofile(None)
            found.routing_calls += calls / count
            found.placing_calls += calls / count if type(event) is Arrived else 0

    def timed(event: Any, now: float) -> Any:
        start = time.process_time()
        try:
            return plain(event, now)
        finally:
            took_s = time.process_time() - start
            found.routing_s += took_s
            if type(event) is Arrived:
                found.placing_s += took_s

    seat.on = counted if count_calls else timed
    began = time.process_time()
    result = simulation.run()
    found.run_s = time.process_time() - began
    found.good = result.tally.attainment
    if result.tally.arrived != count:
        raise SystemExit(f"bench.scale: {size} workers: {result.tally.arrived} of {count} requests ended")
    return found


def rows(lengths: Sequence[int], repeats: int, largest: int) -> Iterator[Row]:
    """Every size, and how the costs of a decision grow."""
    base: dict[str, float] = {}
    for size in SIZES:
        count = min(size * A_WORKER, largest)
        times = 1 if count > 10_000 else repeats
        runs = [run(lengths, size, count, 1 + seed) for seed in range(times)]
        called = run(lengths, size, min(count, 4000), 1, count_calls=True)
        total_s = median([each.start_s + each.run_s for each in runs])
        figures = {
            "a placement": (median([each.placing_s for each in runs]) / count * 1e6, "us of CPU"),
            "a request at the router": (median([each.routing_s for each in runs]) / count * 1e6, "us of CPU"),
            "a request, workers and all": (median([each.run_s for each in runs]) / count * 1e6, "us of CPU"),
            "a placement: calls": (called.placing_calls, "calls"),
            "a request at the router: calls": (called.routing_calls, "calls"),
        }
        progress(
            f"{size} workers, {count} requests: {total_s:.1f} CPU s; "
            + "; ".join(f"{name} {value:.1f}" for name, (value, _) in figures.items())
        )
        for name, (value, unit) in figures.items():
            before = base.setdefault(name, value)
            grown = before * math.log(size) / math.log(SIZES[0]) if size != SIZES[0] else None
            yield Row(f"{size} workers: {name}", value, grown, "10 workers, times the logarithms' ratio", unit, False)
        good = median([each.good for each in runs])
        yield Row(f"{size} workers: good", good, None, "", "share")
        start_s = median([each.start_s for each in runs])
        yield Row(f"{size} workers: all started", start_s, None, "", "CPU s", False)
        if count == 100_000:
            yield Row(f"{size} workers, {count} requests", total_s, BUDGET_S, "the budget", "CPU s", False)
        else:
            yield Row(f"{size} workers, {count} requests", total_s, None, "", "CPU s", False)


def main() -> None:
    options = parser("scale", "What a decision costs at 10, 100 and 1,000 workers.").parse_args()
    repeats, largest = (1, 10_000) if options.quick else (3, 100_000)
    emit("scale", list(rows(prompts(), repeats, largest)), options.json)


if __name__ == "__main__":
    main()
