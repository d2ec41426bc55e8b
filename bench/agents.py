"""Agents' tasks with what their callers say of them, and without: from a task's first call to its last answer.

The public trace of agents' sessions on simulated H200: each call follows the one before's last token after the tool's
time, which is the recorded gap less `TOKEN_S` for each token of the answer (the recorded model's own time, at the
speed of the fastest tenth of calls). The trace does not name tools: an agent's kind stands for them. The same policy is
compared with sessions and tools looked at and not, and with what others ship. Everybody queues, so that no task fails.

Fixed before anything was tuned: model, device and pools; memory is what fits on the device; the rate of begins is the
one at which the best of those without hints takes `SLOWER` times as long, on average, as each task alone. Tasks count
that begin after the first fifth of begins and before the last. The other rates show where the gain begins.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.report import Row, emit, parser, progress
from core.errors import SetupError
from core.request import Phase
from scheduler.policies import BATON, QUEUE, SHIPPED, UNHINTED, Policy
from sim import traces
from sim.fleet import workers
from sim.goodput import Estimate
from sim.outcome import Outcome
from sim.run import Settings, Simulation, simulate
from sim.workload import Workload, groups, with_arrivals

TRACE = "agent_sessions_chars.csv.gz"
TOKEN_S = 0.008
PAGE_TOKENS = 64
TIMEOUT_S = 3600.0
SLOWER = 2.0
PRECISION = 1.05
HINTED = "baton"
RATES = (0.5, 0.75, 1.25)
"""Parts of the rate of the rule at which ours and the best of the others are looked at as well."""


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of agents and where they run; `start`: tasks a second at which the search for the rate begins."""

    name: str
    agent: str
    workers: str
    cost: str
    tasks: int
    start: float


CASES = (
    Case("coding agents", "miniswe", "1 prefill, 2 decode", "h200-qwen2.5-32b", 300, 0.6),
    Case("all agents", "", "1 prefill, 3 decode", "h200-qwen2.5-32b", 400, 0.9),
)
QUICK = replace(CASES[0], tasks=80)
QUICK_RATE = 0.7


def _queued(policy: Policy) -> Policy:
    return replace(policy, router_config=QUEUE)


POLICIES = {policy.name: _queued(policy) for policy in (BATON, UNHINTED, *SHIPPED)}
WITHOUT = tuple(name for name in POLICIES if name != HINTED)


@dataclass(frozen=True, slots=True)
class Figures:
    """One policy at one rate, of one seed. Seconds a task."""

    mean_s: float
    p90_s: float
    model_s: float
    """From calls to their last tokens: the tools' time is the rest."""
    first_s: float
    """Of these until first tokens: waiting and prefill."""
    computed: float
    """Prompt tokens that were computed, of each that a task could not have had from its own earlier calls."""
    failed: int
    """Tasks with a call that did not end as it should."""


def workload(case: Case, rate: float, seed: int, tasks: int) -> Workload:
    """The tasks; an agent's kind is its tool."""
    read = traces.agents(traces.find(TRACE), case.agent, token_s=TOKEN_S)
    named = tuple(replace(one, tool=one.session.partition("/")[0]) for one in read.arrivals)
    return with_arrivals(replace(read, arrivals=named), rate, seed=seed, count=tasks)


def run(case: Case, name: str, rate: float, seed: int, tasks: int) -> Figures:
    """A policy at a rate."""
    made = workload(case, rate, seed, tasks)
    builds = workers(case.workers, case.cost, page_tokens=PAGE_TOKENS)
    ended: dict[str, list[Outcome]] = defaultdict(list)
    seen: list[Simulation] = []
    simulate(
        made,
        builds,
        POLICIES[name],
        Settings(timeout_s=TIMEOUT_S),
        over=lambda one: ended[one.session].append(one),
        watch=seen.append,
    )
    begins = {turns[0].session: turns[0].at_s for turns in groups(made)}
    order = sorted(begins.values())
    first, last = order[len(order) // 5], order[-1 - len(order) // 5]
    counted = [ended[session] for session, at_s in begins.items() if first <= at_s <= last]
    times = sorted(max(one.at_s + one.e2e_s for one in calls) - min(one.at_s for one in calls) for calls in counted)
    prefills = [worker.prefill for worker in seen[0].workers.values() if worker.prefill is not None]
    new = sum(one.prompt - one.history for one in made.arrivals)
    return Figures(
        mean_s=statistics.fmean(times),
        p90_s=times[math.ceil(0.9 * len(times)) - 1],
        model_s=statistics.fmean(math.fsum(one.e2e_s for one in calls) for calls in counted),
        first_s=statistics.fmean(math.fsum(one.ttft_s or 0.0 for one in calls) for calls in counted),
        computed=sum(each.computed_tokens for each in prefills) / new,
        failed=sum(any(one.phase is not Phase.DONE for one in calls) for calls in ended.values()),
    )


def alone(case: Case) -> Figures:
    """Each of the trace's tasks, with nobody else there."""
    kinds = len(groups(traces.agents(traces.find(TRACE), case.agent)))
    return run(case, HINTED, 1e-4, 1, kinds)


def bearable(case: Case, name: str, unloaded_s: float) -> float:
    """The rate at which a policy takes `SLOWER` times as long as each task alone; of one seed, bisected."""

    def bears(rate: float) -> bool:
        found = run(case, name, rate, 1, case.tasks)
        return not found.failed and found.mean_s <= SLOWER * unloaded_s

    low = high = case.start
    while not bears(low):
        high, low = low, low / 1.3
    while high == low or bears(high):
        low, high = high, high * 1.3
    while high / low > PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if bears(middle) else (low, middle)
    return low


Job = tuple[str, Case, str, float, int]
"""What, of which case, by which policy, at which rate (or with which unloaded time), and of which seed."""


def _job(job: Job) -> tuple[Job, Any]:
    what, case, name, value, seed = job
    if what == "rate":
        return job, bearable(case, name, value)
    return job, run(case, name, value, seed, case.tasks)


def spread(jobs: list[Job]) -> Iterable[tuple[Job, Any]]:
    """All jobs on all cores; what comes of each does not depend on that."""
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        for done, (job, found) in enumerate(pool.imap_unordered(_job, jobs), 1):
            progress(f"  {done}/{len(jobs)}: {job[1].name}, {job[2]}, {job[0]}")
            yield job, found


def study(case: Case, seeds: list[int], rate: float | None) -> dict[str, Any]:
    """Everything of one case; `rate`: instead of the rule's."""
    unloaded = alone(case)
    rates: dict[str, float] = {}
    if rate is None:
        jobs: list[Job] = [("rate", case, name, unloaded.mean_s, 1) for name in WITHOUT]
        rates = {job[2]: found for job, found in spread(jobs)}
        rate = max(rates.values())
    jobs = [("run", case, name, rate, seed) for name in POLICIES for seed in seeds]
    found: dict[str, dict[float, dict[int, Figures]]] = {name: {} for name in POLICIES}
    for job, figures in spread(jobs):
        found[job[2]].setdefault(job[3], {})[job[4]] = figures
    if rates:
        best = min((each.name for each in SHIPPED), key=lambda name: _mean_s(found[name][rate].values()))
        names = (HINTED, UNHINTED.name, best)
        jobs = [("run", case, name, part * rate, seed) for name in names for part in RATES for seed in seeds[:2]]
        for job, figures in spread(jobs):
            found[job[2]].setdefault(job[3], {})[job[4]] = figures
    return {
        "case": asdict(case),
        "rate": rate,
        "rates": rates,
        "unloaded": asdict(unloaded),
        "found": {
            name: {
                f"{at:.3g}": {
                    field: asdict(Estimate.of([getattr(by_seed[seed], field) for seed in sorted(by_seed)]))
                    for field in Figures.__dataclass_fields__
                }
                for at, by_seed in sorted(by_rate.items())
            }
            for name, by_rate in found.items()
        },
    }


def _mean_s(figures: Iterable[Figures]) -> float:
    return statistics.fmean(each.mean_s for each in figures)


def rows(found: dict[str, Any]) -> list[Row]:
    """With hints against without, and against the best of what others ship; by mean, by the slowest tenth, by parts."""
    at = f"{found['rate']:.3g}"

    def figures(name: str, field: str) -> float:
        mean: float = found["found"][name][at][field]["mean"]
        return mean

    best = min((policy.name for policy in SHIPPED), key=lambda name: figures(name, "mean_s"))
    case = f"{found['case']['name']} at {at}/s"
    parts = {
        "mean_s": "time of a task, mean",
        "p90_s": "time of a task, p90",
        "model_s": "the same without tools, mean",
        "first_s": "of this until first tokens",
    }
    made = [
        Row(f"{case}: {about}", figures(HINTED, field), figures(name, field), name, "s", higher_is_better=False)
        for field, about in parts.items()
        for name in (UNHINTED.name, best, *(each.name for each in SHIPPED if each.name != best and field == "mean_s"))
    ]
    made += [
        Row(
            f"{case}: prompt tokens computed, of each that is new",
            figures(HINTED, "computed"),
            figures(name, "computed"),
            name,
            "tokens",
            higher_is_better=False,
        )
        for name in (UNHINTED.name, best)
    ]
    unloaded: float = found["unloaded"]["mean_s"]
    made.append(Row(f"{case}: time of a task, mean", figures(HINTED, "mean_s"), unloaded, "alone", "s", False))
    for other in sorted(found["found"][HINTED], key=float):
        if other != at:
            about = f"{found['case']['name']} at {other}/s: time of a task, mean"
            ours = found["found"][HINTED][other]["mean_s"]["mean"]
            made += [
                Row(about, ours, found["found"][name][other]["mean_s"]["mean"], name, "s", False)
                for name in (UNHINTED.name, best)
            ]
    return made


def main() -> None:
    """Figures as JSON, and with ``--json FILE`` everything behind them beside it."""
    flags = parser("agents", "agents' tasks with their callers' hints and without, in the simulator")
    flags.add_argument("--only", metavar="CASE", help="one of the cases")
    args = flags.parse_args()
    cases, seeds, rate = ((QUICK,), [1], QUICK_RATE) if args.quick else (CASES, [1, 2, 3], None)
    if args.only and args.only not in {case.name for case in cases}:
        sys.exit(f"bench.agents: got {args.only!r}, want one of {', '.join(case.name for case in cases)}")
    found = []
    for case in cases:
        if args.only in (None, case.name):
            progress(case.name)
            try:
                found.append(study(case, seeds, rate))
            except SetupError as error:
                sys.exit(f"bench.agents: {error}")
            if args.json:
                _keep(Path(args.json), found)
    emit("agents", [row for one in found for row in rows(one)], args.json)


def _keep(path: Path, found: list[dict[str, Any]]) -> None:
    """What the report is made of."""
    path.with_suffix(".details.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
