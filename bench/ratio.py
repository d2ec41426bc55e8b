"""The adaptive ratio of prefill to decode workers beside every static one, as traffic drifts and while it is steady.

The scenario was written down before anything was tuned. Eight workers of one H200 each, qwen2.5-32b by its table, the
policy `baton-migrating`; goals 2 s to the first token and 50 ms for gaps. Four segments of 20 minutes: arXiv summaries,
apex creation, ShareGPT, arXiv again; lengths from the public traces, Poisson arrivals. In each the rate is the same
share `s` of the goodput (90 % good) that the best static ratio has on that trace alone (`ALONE`, seed 0, by
`--alone`). The goodput of the drift is the largest `s`, on a grid of 2.2 %, at which 90 % of all its requests are good;
the best static ratio is found by trying all seven. Beside it: the share of good ones at `s` = 0.9. The adaptive one
begins at 4+4 and has 1 to 7 workers of each phase.

Steady: 20 minutes of one trace at `s` = 0.9, judged from the fifth minute on, since the adaptive one begins at 4+4.
A turn is a flip that takes back the one before; the most in any 10 minutes of one segment is reported. Recovery is
counted in periods of the controller from a step of the drift on, until the first of two in a row in each of which 90 %
of those who came were good. In both, at `s` = 0.9, a static ratio that attains `BEHIND` less than the best one over the
first `TRIED` seeds is not run with the other seeds.

Runs are kept in FILE.runs.json as they end: who calls again with the same FILE goes on where it stopped, and must not
have changed anything meanwhile that decides. `--seeds` and `--only` choose parts. A seed takes 20 minutes of a core,
compiled (docs/simulator.md).
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

from bench.report import Row, emit, parser, progress
from core.errors import SetupError
from core.request import Slo
from scheduler.policies import policy
from scheduler.ratio import RatioConfig
from scheduler.ratio_events import BACK, Act, Decision
from sim.coordinator import Control
from sim.fleet import workers
from sim.goodput import Estimate, Goal, edge, trial
from sim.outcome import Outcome
from sim.run import Settings, Simulation, simulate
from sim.source import source
from sim.workload import Arrival, Workload

T = TypeVar("T")
U = TypeVar("U")

FILES = {
    "arxiv": "arxiv_summarization_llama2_lengths.csv.gz",
    "creation": "apex_creation_llama_rate0.5.csv.gz",
    "sharegpt": "sharegpt_8k_llama2_lengths.csv.gz",
}
ALONE = {"arxiv": 21.20, "creation": 40.66, "sharegpt": 21.00}
"""Requests a second: goodput of the best static ratio on that trace alone (5+3, 1+7 and 4+4)."""
DRIFT = ("arxiv", "creation", "sharegpt", "arxiv")
WORKERS = 8
STATIC = tuple(range(1, WORKERS))
"""Prefill workers of each static ratio."""
COST, POLICY = "h200-qwen2.5-32b", "baton-migrating"
SETTINGS = Settings(slo=Slo(2.0, 0.05), max_tokens=4096)
SHARE = 0.9
GRID = 2 ** (1 / 32)
"""From one share that is tried to the next."""
OURS_LIKELY, LIKELY = 2, -12
"""Steps of the grid from `SHARE` to where the searches begin: for the adaptive ratio, for the best static one."""
PRECISION = 0.045
"""Of `ALONE`."""
SEGMENT_S = 1200.0
SETTLED_S = 300.0
TEN_MINUTES_S = 600.0
SOON = 3
"""Periods within which attainment is to be back."""
SEEDS = 20
TRIED = 3
BEHIND = 0.1
PERIOD_S = RatioConfig().period_s


@dataclass(frozen=True, slots=True)
class Job:
    """One simulation."""

    kind: str
    """drift, or the trace of a steady run."""
    seed: int
    share: float
    prefill: int
    """Prefill workers; 0: adaptive."""
    segment_s: float = SEGMENT_S
    search: bool = False
    """It ends as soon as too many are bad for the share that is searched for."""

    @property
    def key(self) -> str:
        """Names it in a file."""
        parts = (self.kind, self.seed, f"{self.share:.4f}", self.prefill or "adaptive", f"{self.segment_s:g}")
        return "/".join(map(str, (*parts, "search") if self.search else parts))

    @property
    def names(self) -> tuple[str, ...]:
        """Traces of its segments."""
        return DRIFT if self.kind == "drift" else (self.kind,)


def arrivals(job: Job) -> list[Arrival]:
    """The requests of a job, the same for all ratios."""
    found: list[Arrival] = []
    for index, name in enumerate(job.names):
        rate = job.share * ALONE[name]
        count = math.ceil(rate * job.segment_s * 1.2) + 50
        made = source(FILES[name], count=count, cv=1.0).at(rate, 100 * job.seed + index)
        found += [
            replace(each, at_s=each.at_s + index * job.segment_s) for each in made.arrivals if each.at_s < job.segment_s
        ]
    return found


def run(job: Job) -> dict[str, Any]:
    """What came of one simulation; of the adaptive ratio by period of its controller, too, unless a rate is searched.

    Of a search that ended early the share that would be good if all others were.
    """
    prefill = job.prefill or WORKERS // 2
    builds = workers(f"{prefill} prefill, {WORKERS - prefill} decode", COST, page_tokens=64)
    since_s = 0.0 if job.kind == "drift" else SETTLED_S * job.segment_s / SEGMENT_S
    periods: dict[int, list[int]] = {}
    coming = arrivals(job)
    total = sum(each.at_s >= since_s for each in coming)
    good = judged = 0

    def over(one: Outcome) -> None:
        nonlocal good, judged
        judged += one.at_s >= since_s
        good += one.good and one.at_s >= since_s
        if job.search and 1 - (judged - good) / total < SHARE:
            seen[0].loop.stopped = True
        count = periods.setdefault(int(one.at_s // PERIOD_S), [0, 0])
        count[0] += one.good
        count[1] += 1

    seen: list[Simulation] = []
    control = None if job.prefill else Control()
    simulate(coming, builds, policy(POLICY), SETTINGS, over=over, watch=seen.append, control=control)
    coordinator = seen[0].coordinator
    decisions: list[Decision] = [] if coordinator is None else coordinator.decisions  # type: ignore[attr-defined]
    found: dict[str, Any] = {"requests": judged, "good": good, "attained": 1 - (judged - good) / total}
    if job.prefill or job.search:
        return found
    return found | {
        "periods": [periods.get(index, [0, 0]) for index in range(max(periods) + 1)],
        "flips": [[each.at_s, str(each.chosen.act)] for each in decisions if each.chosen.act is not Act.KEEP],
        "asked": sum(bool(each.scores) for each in decisions),
    }


def turns(found: dict[str, Any], segment_s: float) -> int:
    """The most flips in 10 minutes of one segment that took back the one before them, in that segment."""
    most = 0
    for segment, flips in itertools.groupby(found["flips"], key=lambda flip: int(flip[0] // segment_s)):
        del segment
        times = [two[0] for one, two in itertools.pairwise(flips) if BACK.get(Act(one[1])) == two[1]]
        most = max([most, *(sum(at <= each < at + TEN_MINUTES_S for each in times) for at in times)])
    return most


def recoveries(found: dict[str, Any], job: Job) -> list[int]:
    """For each step, periods until the first two in which 90 % of those who came were good, or all of the segment."""
    each = round(job.segment_s / PERIOD_S)
    counts = []
    for step in range(1, len(job.names)):
        shares = [good / max(1, all_) for good, all_ in found["periods"][step * each : (step + 1) * each]]
        both = (min(two) >= SHARE for two in itertools.pairwise(shares))
        counts.append(next((index for index, good in enumerate(both) if good), len(shares)))
    return counts


class Runs:
    """Simulations by key, kept in a file as they end; one at a time on each core, whoever asks."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._found = json.loads(path.read_text(encoding="utf-8"))
        self._lock = threading.Lock()
        self.cores = len(os.sched_getaffinity(0))
        self._pool = multiprocessing.get_context("fork").Pool(self.cores)

    def __call__(self, job: Job) -> dict[str, Any]:
        """What came of it, now or before; what comes of one does not depend on the others."""
        if job.key not in self._found:
            found = self._pool.apply(run, (job,))
            with self._lock:
                self._found[job.key] = found
                progress(f"  {job.key}: {100 * found['attained']:.1f} % good")
                self._keep()
        return self._found[job.key]

    def each(self, of: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """What a function that asks for simulations says of each, as many at a time as there are cores."""
        with ThreadPool(self.cores) as threads:
            return threads.map(of, items, chunksize=1)

    def all(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """What came of each."""
        return self.each(self, jobs)

    def _keep(self) -> None:
        if self._path is not None:
            text = ",\n".join(f"{json.dumps(key)}: {json.dumps(self._found[key])}" for key in sorted(self._found))
            self._path.write_text(f"{{{text}}}\n", encoding="utf-8")


def walk(holds: Callable[[int], bool], start: int) -> int:
    """The step of a grid that holds where the next one does not, walked to from `start`."""
    step = start
    if not holds(step):
        while not holds(step):
            step -= 1
        return step
    while holds(step + 1):
        step += 1
    return step


def sustained(runs: Runs, seed: int) -> dict[str, float]:
    """Goodputs of one seed's drift, as shares: of the adaptive ratio and of the best static one, and which that is."""

    def holds(prefill: int, step: int) -> bool:
        # At the share of the other rows the whole run is needed anyway.
        job = Job("drift", seed, SHARE * GRID**step, prefill, search=bool(step or prefill))
        return bool(runs(job)["attained"] >= SHARE)

    adaptive = walk(partial(holds, 0), OURS_LIKELY)
    best, which = walk(partial(holds, 3), LIKELY), 3
    for prefill in (2, 4, 5, 1, 6, 7):
        if holds(prefill, best + 1):  # else it is none that is better
            best, which = walk(partial(holds, prefill), best + 1), prefill
    return {"adaptive": SHARE * GRID**adaptive, "static": SHARE * GRID**best, "prefill": which}


def alone(name: str, report: Callable[[str], None]) -> tuple[float, int]:
    """Goodput of the best static ratio on one trace: requests a second, and its prefill workers."""

    def make(rate: float, seed: int) -> Workload:
        return source(FILES[name], count=max(200, int(rate * 360)), cv=1.0).at(rate, seed)

    best, which = 0.0, 0
    for prefill in (4, 5, 1, 3, 2, 6, 7):
        builds = workers(f"{prefill} prefill, {WORKERS - prefill} decode", COST, page_tokens=64)

        def holds(rate: float, builds: Any = builds) -> bool:
            goal = Goal(warm_s=60.0, least=1)
            return trial(make, rate, 0, builds, policy(POLICY), SETTINGS, goal).attained >= SHARE

        if best and not holds(best * (1 + PRECISION)):
            continue
        found = edge(holds, best * (1 + PRECISION) if best else ALONE[name], PRECISION).rate
        report(f"  {name}, {prefill}+{WORKERS - prefill}: {found:.2f}/s")
        if found > best:
            best, which = found, prefill
    return best, which


@dataclass(frozen=True, slots=True)
class Beside:
    """The adaptive ratio and the best static one, on the same traffic."""

    prefill: int
    """Of the best static one."""
    ours: float
    theirs: float
    """Shares of good requests, over all seeds."""
    runs: list[tuple[Job, dict[str, Any]]]
    """Of ours, by seed."""

    @property
    def peer(self) -> str:
        """The best static one's name."""
        return f"best static, {self.prefill}+{WORKERS - self.prefill}"

    def turns(self, case: str) -> Row:
        """The most of any seed."""
        most = max(turns(found, job.segment_s) for job, found in self.runs)
        return Row(f"{case}: most turns in 10 minutes", most, None, "", "flips", False)


def beside(runs: Runs, of: Callable[[int, int], Job], seeds: Sequence[int], static: Sequence[int]) -> Beside:
    """Both, `of` being the job of a seed and a number of prefill workers."""

    def attained(prefill: int, some: Sequence[int]) -> float:
        return Estimate.of([runs(of(seed, prefill))["attained"] for seed in some]).mean

    tried = seeds[:TRIED]
    runs.all([of(seed, prefill) for seed in tried for prefill in (0, *static)])
    first = {prefill: attained(prefill, tried) for prefill in static}
    left = [prefill for prefill in static if first[prefill] >= max(first.values()) - BEHIND]
    runs.all([of(seed, prefill) for seed in seeds for prefill in (0, *left)])
    best = max(left, key=lambda prefill: attained(prefill, seeds))
    jobs = [of(seed, 0) for seed in seeds]
    return Beside(best, attained(0, seeds), attained(best, seeds), [(job, runs(job)) for job in jobs])


def drift_rows(runs: Runs, seeds: list[int], segment_s: float, share: float, static: tuple[int, ...]) -> list[Row]:
    """At one share: good requests, turns and recovery."""
    found = beside(runs, lambda seed, prefill: Job("drift", seed, share, prefill, segment_s), seeds, static)
    late = [count for job, each in found.runs for count in recoveries(each, job)]
    case = f"drift at {share:g} of each trace's own goodput, {len(seeds)} seeds"
    soon = sum(each <= SOON for each in late)
    return [
        Row(f"{case}: attained", found.ours, found.theirs, found.peer, "share"),
        found.turns(case),
        Row(f"{case}: mean recovery after a step", sum(late) / len(late), None, "", "periods", False),
        Row(f"{case}: slowest recovery after a step", max(late), None, "", "periods", False),
        Row(f"{case}: recovered within {SOON} periods", soon, len(late), "steps", "steps"),
    ]


def steady_rows(runs: Runs, seeds: list[int]) -> list[Row]:
    """Each trace alone: attained beside the best static ratio, and turns."""
    made = []
    for name in FILES:

        def of(seed: int, prefill: int, name: str = name) -> Job:
            return Job(name, seed, SHARE, prefill)

        found = beside(runs, of, seeds, STATIC)
        case = f"steady {name} at {SHARE:g}, {len(seeds)} seeds"
        made += [Row(f"{case}: attained", found.ours, found.theirs, found.peer, "share"), found.turns(case)]
    return made


def goodput_rows(runs: Runs, seeds: list[int]) -> list[Row]:
    """The goodput of the drift."""
    found = runs.each(partial(sustained, runs), seeds)
    ours, peer = (Estimate.of([each[who] for each in found]).mean for who in ("adaptive", "static"))
    which = sorted({int(each["prefill"]) for each in found})
    name = "best static, " + " or ".join(f"{prefill}+{WORKERS - prefill}" for prefill in which)
    return [Row(f"drift, {len(seeds)} seeds: goodput", ours, peer, name, "of each trace's own goodput")]


def main() -> None:
    """Figures as JSON; with ``--json FILE`` every run is kept beside it."""
    flags = parser("ratio", "the adaptive ratio beside every static one, in the simulator")
    flags.add_argument("--seeds", metavar="N,...", help=f"default: 1 to {SEEDS}")
    flags.add_argument("--only", choices=("drift", "goodput", "steady"), help="one part")
    flags.add_argument("--alone", action="store_true", help="measure what rates are shares of, and end")
    args = flags.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else list(range(1, SEEDS + 1))
    runs = Runs(Path(args.json).with_suffix(".runs.json") if args.json else None)
    rows: list[Row] = []
    try:
        if args.alone:
            for name in FILES:
                rate, prefill = alone(name, progress)
                rows.append(
                    Row(f"{name} alone, {prefill}+{WORKERS - prefill}", rate, ALONE[name], "as used", "requests/s")
                )
        elif args.quick:
            rows = drift_rows(runs, [1], 100.0, 0.5, (1, 4))
        else:
            if args.only in (None, "drift"):
                rows += drift_rows(runs, seeds, SEGMENT_S, SHARE, STATIC)
            if args.only in (None, "goodput"):
                rows += goodput_rows(runs, seeds)
            if args.only in (None, "steady"):
                rows += steady_rows(runs, seeds)
    except SetupError as error:
        sys.exit(f"bench.ratio: {error}")
    emit("ratio", rows, args.json)


if __name__ == "__main__":
    main()
