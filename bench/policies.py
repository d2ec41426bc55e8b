"""Our policies beside what others ship, and without one idea at a time, on the same simulated workers and workloads.

Workloads, goals and workers were written down before anything was tuned; the turns of ShareGPT and the agents moved to
fewer and slower workers when it showed that so few sessions do not fill eight H200. Per workload: goodput of ours and
of what others ship, bisected with every seed; then these, the other baselines, the shipped ones with our refusals, and
ours without each idea, at the rate where the best shipped one (least loaded with four orders of prompts) attains 90 %.
The agents wait for their tools most of the time, so that no rate of begins fills the workers: they are compared at one
rate. A short request has at most 512 tokens that no earlier prompt of the workload had. Whoever is not served has no
time to first token: it counts as infinitely late. Chunks of the colocated workers are cut to the goal for gaps.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.report import Row, emit, parser, progress
from core.errors import SetupError
from core.request import Phase, Slo
from scheduler.policies import ABLATIONS, BASELINES, BATON, REFUSING, SHIPPED, Policy, policy
from sim.fleet import workers
from sim.goodput import Estimate, Goal, edge, trial
from sim.outcome import Outcome
from sim.plot import Axis, Bar, bars
from sim.run import Settings
from sim.source import Source, source
from sim.workload import Workload

PAGE_TOKENS = 64
MAX_TOKENS = 4096
"""What every client allows; how much an answer comes to, no policy knows."""
SHORT_TOKENS = 512
SHARE = 0.9
SEARCHED = (BATON, *SHIPPED, policy("round-robin"), policy("colocated-chunked"))
"""Whose goodput is searched; the others are compared at the rate of the best shipped one."""
ALL = (BATON, *BASELINES, *REFUSING, *ABLATIONS)


@dataclass(frozen=True, slots=True)
class Case:
    """A workload, its goals, and the rate (requests or sessions a second) at which a search starts."""

    name: str
    trace: str
    options: dict[str, Any]
    slo: Slo
    start: float
    workers: str = "4 prefill, 4 decode"
    cost: str = "h200-llama-3.1-8b"
    search: bool = True
    """False: everything is compared at `start`."""

    def source(self, count: int | None) -> Source:
        """The workload at any rate; `count` instead of its own number of requests."""
        return source(self.trace, **{**self.options, **({} if count is None else {"count": count})})


CASES = (
    Case("azure conversation", "azure_llm_2023_conv.csv.gz", {"count": 1500, "cv": 1.09}, Slo(0.4, 0.05), 150.0),
    Case(
        "mooncake conversation", "mooncake_conversation_first30min.jsonl.gz", {"count": 1500, "tick_s": 3.0},
        Slo(2.0, 0.05), 8.0,
    ),
    Case(
        "sharegpt turns", "sharegpt_8k_llama2_lengths.csv.gz", {"count": 2500, "think_s": 5.0}, Slo(1.0, 0.05), 3.0,
        "2 prefill, 2 decode", "a100-llama-3.1-8b",
    ),
    Case(
        "agent sessions", "agent_sessions_chars.csv.gz", {"count": 2000}, Slo(2.0, 0.05), 8.0,
        "2 prefill, 2 decode", "a100-llama-3.1-8b", search=False,
    ),
)  # fmt: skip
QUICK = (Case("azure shape", "azure-conv", {"count": 1000}, Slo(0.4, 0.05), 60.0),)


@dataclass(frozen=True, slots=True)
class Figures:
    """One policy at one rate, over seeds."""

    attained: Estimate
    short_p90_s: Estimate
    served: float
    cached: float
    """Share of prompt tokens."""


def new_tokens(workload: Workload) -> dict[tuple[Any, ...], int]:
    """Of each request: prompt tokens that no earlier prompt had."""
    seen: set[int] = set()
    found: dict[tuple[Any, ...], int] = {}
    for arrival in workload.arrivals:
        known = sum(1 for _ in itertools.takewhile(seen.__contains__, arrival.blocks))
        key = (arrival.session, arrival.turn) if arrival.session else (arrival.at_s,)
        found[key] = arrival.prompt - min(arrival.prompt, known * arrival.block_tokens)
        seen.update(arrival.blocks)
    return found


def at_rate(case: Case, name: str, rate: float, seeds: Iterable[int], count: int | None) -> Figures:
    """A policy at one rate."""
    builds, settings = _deployment(case)
    attained, short, served, cached = [], [], [], []
    for seed in seeds:
        found: list[Outcome] = []
        made = case.source(count).at(rate, seed)
        goal = Goal(share=SHARE, least=1)
        one = trial(_always(made), rate, seed, builds, _set(case, name), settings, goal, over=found.append)
        new = new_tokens(made)
        times = sorted(
            each.ttft_s if each.phase is Phase.DONE and each.ttft_s is not None else math.inf
            for each in found
            if new[(each.session, each.turn) if each.session else (each.at_s,)] <= SHORT_TOKENS
        )
        attained.append(one.attained)
        short.append(times[math.ceil(0.9 * len(times)) - 1] if times else math.nan)
        served.append(sum(each.phase is Phase.DONE for each in found) / len(found))
        cached.append(sum(each.cached for each in found) / sum(each.prompt for each in found))
    finite = [value for value in short if math.isfinite(value)]
    worst = Estimate((math.inf,), math.inf, None)
    spread = Estimate.of(short) if len(finite) == len(short) else worst
    return Figures(Estimate.of(attained), spread, statistics.fmean(served), statistics.fmean(cached))


def _always(made: Workload) -> Callable[[float, int], Workload]:
    return lambda rate, seed: made


def sustained(case: Case, name: str, seed: int, count: int | None) -> float:
    """Goodput of one seed."""
    builds, settings = _deployment(case)
    goal = Goal(share=SHARE, precision=0.022, least=1)
    kept = case.source(count)

    def holds(rate: float) -> bool:
        return trial(kept.at, rate, seed, builds, _set(case, name), settings, goal).attained >= SHARE

    return edge(holds, case.start, goal.precision).rate


def fluid(case: Case, seed: int, count: int | None) -> float:
    """The rate at which the prefill workers of a split deployment would just never be idle if the tenth that is dearest
    to prefill were dropped and no prompt token computed twice anywhere: policies can win prefill time up to there.

    No bound on a window: what is computed after the last arrival counts, too, and steps of several prompts cost less.
    """
    builds, _ = _deployment(case)
    made = case.source(count).at(case.start, seed)
    new = new_tokens(made)
    prefills = [build for build in builds if build.role.prefills]
    cost, seconds = prefills[0].cost, []
    for arrival in made.arrivals:
        fresh = new[(arrival.session, arrival.turn) if arrival.session else (arrival.at_s,)]
        seconds.append(cost.prefill_s([(fresh, arrival.prompt - fresh)]))
    seconds.sort()
    begun = len({arrival.session or arrival.at_s for arrival in made.arrivals})
    kept_s: float = sum(seconds[: math.ceil(SHARE * len(seconds))])
    return begun * len(prefills) / kept_s


def _deployment(case: Case) -> tuple[Any, Settings]:
    builds = workers(case.workers, case.cost, page_tokens=PAGE_TOKENS)
    return builds, Settings(slo=case.slo, max_tokens=MAX_TOKENS)


def _set(case: Case, name: str) -> Policy:
    """The policy, its chunks set to the goal if it has any, as Sarathi-Serve's section 4.3 has it."""
    found = policy(name)
    if found.colocated and found.mixed_config.order == "chunked":
        return replace(found, mixed_config=replace(found.mixed_config, budget_tokens=2048, gap_s=case.slo.gap_s))
    return found


def _job(job: tuple[str, Case, str, Any, int | None]) -> tuple[tuple[str, Case, str, Any, int | None], Any]:
    kind, case, name, what, count = job
    if kind == "goodput":
        return job, sustained(case, name, what, count)
    rate, seeds = what
    return job, at_rate(case, name, rate, seeds, count)


def spread(jobs: list[Any], each: Callable[[Any, Any], None]) -> None:
    """All jobs on all cores; what comes of each does not depend on that."""
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        for done, (job, found) in enumerate(pool.imap_unordered(_job, jobs), 1):
            each(job, found)
            progress(f"  {done}/{len(jobs)}: {job[1].name}, {job[2]}")


def study(case: Case, seeds: list[int], count: int | None) -> dict[str, Any]:
    """Everything about one workload."""
    names = [each.name for each in SEARCHED]
    rates: dict[str, dict[int, float]] = {name: {} for name in names}
    goodputs: dict[str, Estimate] = {}
    rate = case.start
    if case.search:
        jobs: list[Any] = [("goodput", case, name, seed, count) for name in names for seed in seeds]
        spread(jobs, lambda job, found: rates[job[2]].update({job[3]: found}))
        goodputs = {name: Estimate.of([rates[name][seed] for seed in seeds]) for name in names}
        rate = max(goodputs[each.name].mean for each in SHIPPED)
    figures: dict[str, Figures] = {}
    if rate > 0:
        jobs = [("rate", case, each.name, (rate, seeds), count) for each in ALL]
        spread(jobs, lambda job, found: figures.update({job[2]: found}))

    def merit(name: str) -> tuple[float, float]:
        found = figures.get(name)
        return goodputs[name].mean if name in goodputs else 0.0, -found.short_p90_s.mean if found else 0.0

    best = max((each.name for each in SHIPPED), key=merit)
    return {
        "case": case.name,
        "workers": case.workers,
        "cost": case.cost,
        "slo": asdict(case.slo),
        "best": best,
        "rate": rate,
        "fluid": asdict(Estimate.of([fluid(case, seed, count) for seed in seeds])),
        "goodput": {name: asdict(found) for name, found in goodputs.items()},
        "at_rate": {each.name: asdict(figures[each.name]) for each in ALL if figures},
    }


def steady(found: dict[str, Any]) -> bool:
    """Whether a goodput was found for ours: far above what could be prefilled for ever all sessions that there are
    begin at once, and how fast they do says nothing any more."""
    bound = found.get("fluid", {"mean": math.inf})["mean"]
    return bool(found["goodput"]) and found["goodput"]["baton"]["mean"] <= 3 * bound


def rows(found: dict[str, Any]) -> list[Row]:
    """Ours beside the best shipped baseline, beside colocation, and beside ours without each idea."""
    case, best, rate = found["case"], found["best"], found["rate"]
    goodputs, figures = found["goodput"] if steady(found) else {}, found["at_rate"]
    made = [
        Row(f"{case}: goodput", goodputs["baton"]["mean"], goodputs[name]["mean"], name, "requests or sessions/s")
        for name in (best, *(name for name in goodputs if name not in (best, "baton")))
        if goodputs
    ]
    if goodputs and "fluid" in found:
        bound = found["fluid"]["mean"]
        made.append(Row(f"{case}: goodput", goodputs["baton"]["mean"], bound, "fluid bound", "requests or sessions/s"))
    if figures:
        p90 = {name: each["short_p90_s"]["mean"] for name, each in figures.items()}
        names = [best, *(each.name for each in ALL if each.name not in (best, "baton"))]
        made += [
            Row(f"{case} at {rate:.3g}/s: short requests' TTFT p90", p90["baton"], p90[name], name, "s", False)
            for name in names
            if math.isfinite(p90["baton"]) and math.isfinite(p90[name])
        ]
        attained = {name: each["attained"]["mean"] for name, each in figures.items()}
        made += [
            Row(f"{case} at {rate:.3g}/s: attained", attained["baton"], attained[name], name, "share") for name in names
        ]
    return made


def main() -> None:
    """Figures as JSON, and with ``--json FILE`` everything behind them beside it, with a chart."""
    flags = parser("policies", "our policies beside what others ship, in the simulator")
    flags.add_argument("--only", metavar="WORKLOAD", help="one workload; with --json the others' figures stay")
    args = flags.parse_args()
    cases, seeds, count = (QUICK, [1], 300) if args.quick else (CASES, [1, 2, 3, 4, 5], None)
    if args.only and args.only not in {case.name for case in cases}:
        sys.exit(f"bench.policies: got {args.only!r}, want one of {', '.join(case.name for case in cases)}")
    found = _kept(Path(args.json)) if args.only and args.json else {}
    for case in cases:
        if args.only not in (None, case.name):
            continue
        progress(case.name)
        try:
            found[case.name] = study(case, seeds, count)
        except SetupError as error:
            sys.exit(f"bench.policies: {error}")
        if args.json:
            _keep(Path(args.json), [found[case.name] for case in cases if case.name in found])
    emit("policies", [row for case in cases if case.name in found for row in rows(found[case.name])], args.json)


def _kept(path: Path) -> dict[str, dict[str, Any]]:
    """What earlier runs found, by workload."""
    try:
        text = path.with_suffix(".details.json").read_text()
    except FileNotFoundError:
        return {}
    return {one["case"]: one for one in json.loads(text)}


def _keep(path: Path, found: list[dict[str, Any]]) -> None:
    """What the report is made of."""
    path.with_suffix(".details.json").write_text(json.dumps(found, indent=1) + "\n")
    names = [each.name for each in SEARCHED]
    groups = []
    for one in found:
        if not steady(one):
            continue
        best = one["goodput"][one["best"]]["mean"] or 1.0
        groups.append((one["case"], [_bar(name, one["goodput"][name], best) for name in names]))
    chart = bars("Goodput against the best shipped baseline", groups, Axis("goodput, best shipped baseline = 1"))
    path.with_suffix(".svg").write_text(chart + "\n")


def _bar(name: str, value: dict[str, Any], unit: float) -> Bar:
    half = value["half"] or 0.0
    return Bar(name, value["mean"] / unit, (value["mean"] - half) / unit, (value["mean"] + half) / unit)


if __name__ == "__main__":
    main()
