"""The adaptive ratio of prefill to decode workers beside every static one, as traffic drifts and while it is steady.

The scenario was written down before anything was tuned. Eight workers of one H200 each, qwen2.5-32b by its table, the
policy `baton-migrating`; goals 2 s to the first token and 50 ms for gaps. Four segments of 20 minutes: arXiv summaries,
apex creation, ShareGPT, arXiv again; lengths from the public traces, Poisson arrivals. In each the rate is the same
share `s` of the goodput (90 % good) that the best static ratio has on that trace alone (`ALONE`, seed 0, by
`--alone`). The goodput of the drift is the largest `s`, on a grid of 4.4 %, at which 90 % of all its requests are good;
the best static ratio is found by trying all seven. Beside it: good requests a second at `s` = 0.9, for all eight. The
adaptive one begins at 4+4 and has 1 to 7 workers of each phase.

Steady: 20 minutes of one trace at `s` = 0.9, judged from the fifth minute on, since the adaptive one begins at 4+4.
A turn is a flip that takes back the one before; the most in any 10 minutes of one segment is reported. Recovery is
counted in periods of the controller from a step of the drift on, until a period in which 90 % of those who came were
good.

Runs are kept in FILE.details.json as they end: who calls again with the same FILE goes on where it stopped. `--seeds`
and `--only` choose parts. A seed takes about an hour of a core, or half of that compiled (docs/simulator.md).
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

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

FILES = {
    "arxiv": "arxiv_summarization_llama2_lengths.csv.gz",
    "creation": "apex_creation_llama_rate0.5.csv.gz",
    "sharegpt": "sharegpt_8k_llama2_lengths.csv.gz",
}
ALONE = {"arxiv": 21.19, "creation": 38.91, "sharegpt": 20.11}
"""Requests a second: goodput of the best static ratio on that trace alone (5+3, 1+7 and 4+4)."""
DRIFT = ("arxiv", "creation", "sharegpt", "arxiv")
WORKERS = 8
STATIC = tuple(range(1, WORKERS))
"""Prefill workers of each static ratio."""
COST, POLICY = "h200-qwen2.5-32b", "baton-migrating"
SETTINGS = Settings(slo=Slo(2.0, 0.05), max_tokens=4096)
SHARE = 0.9
BEGIN = 0.8
"""Where a search begins."""
PRECISION = 0.045
SEGMENT_S = 1200.0
SETTLED_S = 300.0
TEN_MINUTES_S = 600.0
SEEDS = 20
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

    @property
    def key(self) -> str:
        """Names it in a file."""
        return f"{self.kind}/{self.seed}/{self.share:.4f}/{self.prefill or 'adaptive'}/{self.segment_s:g}"

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
    """What came of one simulation: shares, and by period of the controller; for the adaptive one its flips, too."""
    prefill = job.prefill or WORKERS // 2
    builds = workers(f"{prefill} prefill, {WORKERS - prefill} decode", COST, page_tokens=64)
    since_s = 0.0 if job.kind == "drift" else SETTLED_S * job.segment_s / SEGMENT_S
    periods: dict[int, list[int]] = {}
    good = judged = 0

    def over(one: Outcome) -> None:
        nonlocal good, judged
        judged += one.at_s >= since_s
        good += one.good and one.at_s >= since_s
        count = periods.setdefault(int(one.at_s // PERIOD_S), [0, 0])
        count[0] += one.good
        count[1] += 1

    seen: list[Simulation] = []
    control = None if job.prefill else Control()
    simulate(arrivals(job), builds, policy(POLICY), SETTINGS, over=over, watch=seen.append, control=control)
    coordinator = seen[0].coordinator
    decisions: list[Decision] = [] if coordinator is None else coordinator.decisions  # type: ignore[attr-defined]
    return {
        "requests": judged,
        "good": good,
        "attained": good / judged,
        "good_per_s": good / (len(job.names) * job.segment_s - since_s),
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
    """For each step, periods until one in which 90 % of those who came were good; those of the segment if none was."""
    each = round(job.segment_s / PERIOD_S)
    counts = []
    for step in range(1, len(job.names)):
        shares = [good / max(1, all_) for good, all_ in found["periods"][step * each : (step + 1) * each]]
        counts.append(next((index for index, share in enumerate(shares) if share >= SHARE), len(shares)))
    return counts


class Runs:
    """Simulations by key, kept in a file as they end."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._found = json.loads(path.read_text(encoding="utf-8"))

    def __call__(self, job: Job) -> dict[str, Any]:
        """What came of it, now or before."""
        return self.all([job])[0]

    def all(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """Likewise, on all cores; what comes of each does not depend on that."""
        missing = [job for job in jobs if job.key not in self._found]
        if missing:
            with multiprocessing.get_context("fork").Pool(min(len(missing), len(os.sched_getaffinity(0)))) as pool:
                for job, found in pool.imap_unordered(_run, missing):
                    self._found[job.key] = found
                    progress(f"  {job.key}: {100 * found['attained']:.1f} % good")
                    if self._path is not None:
                        text = ",\n".join(
                            f"{json.dumps(key)}: {json.dumps(self._found[key])}" for key in sorted(self._found)
                        )
                        self._path.write_text(f"{{{text}}}\n", encoding="utf-8")
        return [self._found[job.key] for job in jobs]


def _run(job: Job) -> tuple[Job, dict[str, Any]]:
    return job, run(job)


def sustained(runs: Runs, seed: int) -> dict[str, float]:
    """Goodputs of one seed's drift, as shares: of the adaptive ratio and of the best static one, and which that is."""

    def holds(prefill: int, share: float) -> bool:
        return bool(runs(Job("drift", seed, share, prefill))["attained"] >= SHARE)

    adaptive = edge(partial(holds, 0), BEGIN, PRECISION).rate
    best, which = 0.0, 0
    # A ratio that does not hold one step above the best so far is none that is better.
    step = 2 ** (1 / 16)
    for prefill in (2, 3, 4, 1, 5, 6, 7):
        if best and not holds(prefill, best * step):
            continue
        found = edge(partial(holds, prefill), best * step if best else BEGIN / 2 ** (8 / 16), PRECISION).rate
        if found > best:
            best, which = found, prefill
    return {"adaptive": adaptive, "static": best, "prefill": which}


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


def drift_rows(runs: Runs, seeds: list[int], segment_s: float, share: float, static: tuple[int, ...]) -> list[Row]:
    """At one share: good requests a second, turns and recovery."""
    of = partial(Job, "drift", share=share, segment_s=segment_s)
    found = [runs.all([of(seed=seed, prefill=prefill) for prefill in (0, *static)]) for seed in seeds]
    best = max(range(len(static)), key=lambda index: sum(each[1 + index]["good_per_s"] for each in found))
    ours = Estimate.of([each[0]["good_per_s"] for each in found]).mean
    peer = Estimate.of([each[1 + best]["good_per_s"] for each in found]).mean
    name = f"best static, {static[best]}+{WORKERS - static[best]}"
    late = [
        count
        for seed, each in zip(seeds, found, strict=True)
        for count in recoveries(each[0], of(seed=seed, prefill=0))
    ]
    case = f"drift at {share:g} of each trace's own goodput, {len(seeds)} seeds"
    return [
        Row(f"{case}: good requests", ours, peer, name, "requests/s"),
        Row(
            f"{case}: most turns in 10 minutes",
            max(turns(each[0], segment_s) for each in found),
            None,
            "",
            "flips",
            False,
        ),
        Row(f"{case}: mean recovery after a step", sum(late) / len(late), None, "", "periods", False),
        Row(f"{case}: slowest recovery after a step", max(late), None, "", "periods", False),
    ]


def steady_rows(runs: Runs, seeds: list[int]) -> list[Row]:
    """Each trace alone: attained beside the best static ratio, and turns."""
    made = []
    for name in FILES:
        of = partial(Job, name, share=SHARE)
        found = [runs.all([of(seed=seed, prefill=prefill) for prefill in (0, *STATIC)]) for seed in seeds]
        best = max(range(len(STATIC)), key=lambda index: sum(each[1 + index]["attained"] for each in found))
        ours = Estimate.of([each[0]["attained"] for each in found]).mean
        peer = Estimate.of([each[1 + best]["attained"] for each in found]).mean
        case = f"steady {name} at {SHARE:g}, {len(seeds)} seeds"
        most = max(turns(each[0], SEGMENT_S) for each in found)
        made += [
            Row(f"{case}: attained", ours, peer, f"best static, {STATIC[best]}+{WORKERS - STATIC[best]}", "share"),
            Row(
                f"{case}: most turns in 10 minutes",
                most,
                None,
                "",
                "flips",
                False,
            ),
        ]
    return made


def goodput_rows(runs: Runs, seeds: list[int]) -> list[Row]:
    """The goodput of the drift."""
    found = [sustained(runs, seed) for seed in seeds]
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
    runs = Runs(Path(args.json).with_suffix(".details.json") if args.json else None)
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
