"""Tenants and classes on simulated H200 workers: a tenant that floods, and work that fills what others leave.

Written down before anything was tuned. Four prefill and four decode workers of Llama 3.1 8B, goals of 0.4 s to the
first token and 50 ms for the gaps, answers as long as nobody knows. Two shapes of requests, by the quantiles of public
traces: Azure's conversations and ShareGPT's. Arrivals are Poisson. `capacity` is what the deployment serves when all
comes at once, in prompt tokens a second: prefill is what limits it, and of too many requests the small ones are served
first, so that to count requests would count those.

*Flood*: a tenant sends a quarter of the capacity for three minutes; from a third of it on another one sends twice the
capacity for half of it. What is reported is by how many points the first one's attainment differs from what it is
alone, with the same requests.
*Batch*: a tenant sends half of the capacity for three minutes; all the while there is work of the batch class, whose
prompts begin alike in groups of 8. What is reported is by how many points the attainment of the others differs from
what it is without it, and which share of the idle capacity (the capacity less what the others sent) the batch class
filled until the last of the others came. Of both also what the worst seed had.

At first it was one minute, and requests were counted. A minute is too short for a flood to fill the decode workers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.report import Row, emit, parser, progress
from core.request import Phase, Slo
from scheduler.policies import BATON, Policy
from sim.fleet import workers
from sim.generators import SHAPES, generate
from sim.outcome import Outcome
from sim.run import Settings, simulate
from sim.scenario import Scenario, Tenant, applied
from sim.workload import Arrival, Workload, merge, stamps

WORKERS = "4 prefill, 4 decode"
COST = "h200-llama-3.1-8b"
SLO = Slo(0.4, 0.05)
BATCH = Slo(batch=True)
PAGE_TOKENS = 64
MAX_TOKENS = 4096
SPAN_S = 180.0
SEEDS = 5
FLOOD = (1 / 3, 5 / 6)
"""Of the span, when the flood begins and ends."""
QUICK_S = 20.0
GROUP = 8
"""Requests of the batch class that begin alike,"""
ALIKE = 0.5
"""for this share of the shortest prompt of the group,"""
APART_S = 2e-5
"""and come so long after each other, as fast as a gateway could take them."""


@dataclass(frozen=True, slots=True)
class Found:
    """One shape and seed."""

    shape: str
    seed: int
    capacity: float
    alone: float
    """Attainment of the tenant that does not flood, by itself,"""
    flooded: float
    """and beside the one that does."""
    flooder: float
    """Attainment of that one."""
    calm: float
    """Attainment of the latency class without a batch class,"""
    filled: float
    """and with one."""
    share: float
    """Of the idle capacity that the batch class filled."""


def steady(shape: str, rate: float, seconds: float, seed: int, tenant: str) -> Workload:
    """Poisson arrivals of a shape."""
    rng = random.Random(f"{seed}/{tenant}")
    times = list(itertools.takewhile(lambda at_s: at_s < seconds, stamps(rng, rate)))
    made = generate(SHAPES[shape], rng.getrandbits(32), len(times))
    placed = [replace(one, at_s=at_s, tenant=tenant) for one, at_s in zip(made.arrivals, times, strict=True)]
    return Workload(tenant, tuple(placed), made.source)


def backlog(shape: str, count: int, seed: int, tenant: str = "batch") -> Workload:
    """Work of the batch class that is all there at the begin; prompts begin alike in groups."""
    rng = random.Random(f"{seed}/{tenant}")
    made = generate(SHAPES[shape], rng.getrandbits(32), count).arrivals
    placed: list[Arrival] = []
    for start in range(0, count, GROUP):
        group = made[start : start + GROUP]
        alike = int(ALIKE * min(one.prompt for one in group)) // PAGE_TOKENS
        shared = tuple(rng.getrandbits(63) for _ in range(alike))
        for one in group:
            own = tuple(rng.getrandbits(63) for _ in range(-(-one.prompt // PAGE_TOKENS) - alike))
            placed.append(
                replace(one, at_s=0.0, tenant=tenant, slo=BATCH, blocks=shared + own, block_tokens=PAGE_TOKENS)
            )
    rng.shuffle(placed)
    return Workload(tenant, tuple([replace(one, at_s=index * APART_S) for index, one in enumerate(placed)]))


def run(workload: Workload, policy: Policy, until_s: float) -> dict[str, tuple[float, float]]:
    """By tenant: attainment, and prompt tokens a second of those that ended well by `until_s`."""
    good: dict[str, list[int]] = {}

    def over(one: Outcome) -> None:
        count = good.setdefault(one.tenant, [0, 0, 0])
        count[0] += 1
        count[1] += one.good
        count[2] += one.prompt * (one.phase is Phase.DONE and one.at_s + one.e2e_s <= until_s)

    builds = workers(WORKERS, COST, page_tokens=PAGE_TOKENS)
    simulate(workload, builds, policy, Settings(slo=SLO, max_tokens=MAX_TOKENS, timeout_s=until_s), over=over)
    return {tenant: (count[1] / count[0], count[2] / until_s) for tenant, count in good.items()}


def capacity(shape: str, seed: int, policy: Policy = BATON, span_s: float = SPAN_S) -> float:
    """Prompt tokens a second of the batch class when nobody else is there."""
    return run(backlog(shape, round(span_s * MOST[shape]), seed), policy, span_s)["batch"][1]


MOST = {"azure-conv": 400.0, "sharegpt": 200.0}
"""Requests a second: more than the workers can do."""


def prompt_tokens(shape: str) -> float:
    """Of a request, on average."""
    return statistics.fmean(one.prompt for one in generate(SHAPES[shape], 1, 10_000).arrivals)


def flood(
    shape: str, seed: int, tokens: float, policy: Policy = BATON, span_s: float = SPAN_S
) -> tuple[float, float, float]:
    """Attainment of the one alone, beside the flood, and of the flood; `tokens`: the capacity."""
    rate = tokens / prompt_tokens(shape)
    ours = steady(shape, rate / 4, span_s, seed, "steady")
    burst = Scenario("flood", (Tenant(FLOOD[0] * span_s, FLOOD[1] * span_s, "flood", shape, 2 * rate),))
    alone = run(ours, policy, span_s)
    both = run(applied(burst, ours, seed), policy, span_s)
    return alone["steady"][0], both["steady"][0], both["flood"][0]


def fill(
    shape: str, seed: int, tokens: float, policy: Policy = BATON, span_s: float = SPAN_S
) -> tuple[float, float, float]:
    """Attainment without and with a batch class, and the share of the idle capacity that it fills."""
    rate = tokens / prompt_tokens(shape)
    ours = steady(shape, rate / 2, span_s, seed, "steady")
    without = run(ours, policy, span_s)
    both = run(merge(ours, backlog(shape, round(span_s * rate), seed)), policy, span_s)
    idle = tokens - sum(one.prompt for one in ours.arrivals) / span_s
    return without["steady"][0], both["steady"][0], both["batch"][1] / idle


def measured(job: tuple[str, int, float]) -> Found:
    """Everything about one shape and seed."""
    shape, seed, span_s = job
    tokens = capacity(shape, seed, span_s=span_s)
    floods, fills = flood(shape, seed, tokens, span_s=span_s), fill(shape, seed, tokens, span_s=span_s)
    return Found(shape, seed, tokens, *floods, *fills)


def rows(found: Sequence[Found]) -> list[Row]:
    """Means over seeds, and the worst of them, of each shape."""
    made = []
    for shape in sorted({one.shape for one in found}):
        here = [one for one in found if one.shape == shape]

        def mean(field: str, here: list[Found] = here) -> float:
            return statistics.fmean(getattr(one, field) for one in here)

        flood_took = 100 * max(one.alone - one.flooded for one in here)
        batch_took = 100 * max(one.calm - one.filled for one in here)

        made += [
            Row(f"{shape}: capacity", mean("capacity"), None, "", "prompt tokens/s"),
            Row(f"{shape}: attained beside a flood", mean("flooded"), mean("alone"), "alone", "share"),
            Row(f"{shape}: attained by the flood", mean("flooder"), None, "", "share"),
            Row(f"{shape}: attained beside the batch class", mean("filled"), mean("calm"), "alone", "share"),
            Row(f"{shape}: idle capacity that the batch class filled", mean("share"), 1.0, "all", "share"),
            Row(f"{shape}: most that a flood took in one run", flood_took, None, "", "points", False),
            Row(f"{shape}: most that the batch class took in one run", batch_took, None, "", "points", False),
            Row(f"{shape}: least that it filled in one run", min(one.share for one in here), 1.0, "all", "share"),
        ]
    return made


def main() -> None:
    """Figures as JSON."""
    args = parser("fairness", "tenants and classes beside each other, in the simulator").parse_args()
    span_s = QUICK_S if args.quick else SPAN_S
    jobs = [(shape, seed, span_s) for shape in MOST for seed in range(1, 2 if args.quick else SEEDS + 1)]
    found = []
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        for one in pool.imap_unordered(measured, jobs):
            progress(f"  {one}")
            found.append(one)
    emit("fairness", rows(found), args.json)


if __name__ == "__main__":
    main()
