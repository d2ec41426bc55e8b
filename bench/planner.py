"""The planner: its choice beside an exhaustive search, placements beside DistServe's search, and what a search costs.

Times are CPU seconds of one process, bounds and simulations included. DistServe's table (OPT-13B on four A100) is of
its own simulator; ours is set up like it (tests/sim/peer.py), and both search by the same rules. Its table of KV
capacities is compared with what our memory model leaves room for on the same devices.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.report import Row, emit, parser, progress
from core.errors import SetupError
from core.request import Slo
from scheduler.layout import Cell, Cluster, Layout, Pool, memory
from scheduler.plan import Ask, Evaluate, Plan
from scheduler.planner import Planner, plan
from scheduler.roofline import A100, H200, OPT_13B, OPT_66B
from sim import traces
from sim.fleet import MODELS
from sim.planning import Costs, Site, Trials, load
from sim.source import Source, source
from sim.workload import Workload
from tests.sim import peer

LIMIT_S = 120.0
TRACE = "azure-conv"


@dataclass(frozen=True, slots=True)
class Case:
    """A search on H200."""

    model: str
    devices: int
    rate: float
    slo: Slo

    @property
    def name(self) -> str:
        """For the report."""
        return f"{self.devices} H200, {self.model}, {self.rate:g} requests/s"


CHAT, LARGE = Slo(0.4, 0.05), Slo(1.0, 0.05)
SEARCHES = (
    Case("llama-3.1-70b", 32, 30.0, LARGE),
    Case("llama-3.1-70b", 32, 100.0, LARGE),
    Case("llama-3.1-70b", 32, 300.0, LARGE),  # more than they sustain
    Case("llama-3.1-8b", 32, 900.0, CHAT),
)
QUICK = (Case("llama-3.1-8b", 8, 60.0, CHAT),)
SMALL = Case("llama-3.1-8b", 4, 120.0, CHAT)
CAPACITIES = ((OPT_13B, "13b", (Cell(1, 1), Cell(1, 2), Cell(1, 4))), (OPT_66B, "66b", (Cell(1, 4), Cell(2, 2))))


class Searches:
    """Plans and single evaluations of one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._kept: dict[int, Source] = {}
        sample = load(self._make(case.rate, 1000))
        self._ask = Ask(case.rate, case.slo)
        self._cluster = Cluster(case.devices)
        site = Site(self._cluster, Costs(f"h200-{case.model}", MODELS[case.model], H200))
        self.trials = Trials(site, self._ask, self._make, sample)
        self._sample = sample

    def _make(self, rate: float, count: int) -> Workload:
        rounded = -(-count // 100) * 100
        if rounded not in self._kept:
            self._kept[rounded] = source(TRACE, count=rounded)
        return self._kept[rounded].at(rate, 1)

    def plan(self) -> Plan:
        """The planner's."""

        def evaluate(command: Evaluate) -> float:
            attained = self.trials.attained(command)
            progress(f"  {planner.progress}: {command.layout.name} at {command.rate:.4g}/s: {100 * attained:.1f} %")
            return attained

        planner = Planner(self._ask, self._cluster, self._sample, self.trials.fits())
        return plan(planner, evaluate)

    def exhaustive(self) -> tuple[int, int]:
        """The fewest devices that any layout needs, all of them simulated; and how many were. Without segments."""
        usable = {use: [fit.cell for fit in fits if fit.bound] for use, fits in self.trials.fits().items()}
        limit, count, fewest = self.case.devices, 0, 0
        for layout in _all(usable, limit):
            attained = self.trials.attained(Evaluate(0, layout, self.case.rate))
            count += 1
            if attained >= self._ask.share and (not fewest or layout.devices < fewest):
                fewest = layout.devices
            if not count % 10:
                progress(f"  {count} layouts simulated")
        return fewest, count


def _all(usable: dict[str, list[Cell]], limit: int) -> Iterator[Layout]:
    for cell in usable["mixed"]:
        for count in range(1, limit // cell.devices + 1):
            yield Layout(mixed=Pool(cell, count))
    for one in usable["prefill"]:
        for other in usable["decode"]:
            for count in range(1, limit // one.devices + 1):
                for beside in range(1, (limit - count * one.devices) // other.devices + 1):
                    yield Layout(Pool(one, count), Pool(other, beside))


def searches(cases: tuple[Case, ...]) -> Iterator[Row]:
    """CPU time of whole searches."""
    for case in cases:
        began = time.process_time()
        found = Searches(case).plan()
        spent_s = time.process_time() - began
        progress(f"{case.name}: {found.verdict}; {spent_s:.1f} CPU s")
        yield Row(f"{case.name}: search", spent_s, LIMIT_S, "limit", "CPU s", False)
        yield Row(f"{case.name}: evaluations", found.evaluations, None, "", "", False)
        devices = 0 if found.layout is None else found.layout.devices
        yield Row(f"{case.name}: {found.verdict}", devices, None, "", "GPUs", False)


def beside_exhaustive() -> Iterator[Row]:
    """A cluster on which everything can be simulated."""
    both = Searches(SMALL)
    found = both.plan()
    fewest, count = both.exhaustive()
    devices = 0 if found.layout is None else found.layout.devices
    yield Row(f"{SMALL.name}: fewest devices", devices, fewest, "exhaustive", "GPUs", False)
    yield Row(f"{SMALL.name}: simulations", found.evaluations, count, "exhaustive", "", False)


def beside_distserve(folder: Path, quick: bool) -> Iterator[Row]:
    """Placements, and memory."""
    table = peer.planned(folder)
    for number, (placement, theirs) in enumerate(table.items()):
        if not quick or number % 5 == 2:
            ours = peer.sustained(folder, placement)
            progress(f"OPT-13B on A100, {placement.name}: {ours:.4f}, theirs {theirs:.4f}")
            yield Row(f"OPT-13B on A100, {placement.name}", ours, theirs, "simdistserve", "requests/s/GPU")
    with (folder / peer.CAPACITY).open(encoding="utf-8", newline="") as text:
        known = {
            (row["model"].rpartition("-")[2], int(row["tp"]), int(row["pp"])): int(row["max_num_tokens"])
            for row in csv.DictReader(text)
        }
    for sizes, model, cells in CAPACITIES:
        for cell in cells:
            ours = memory(sizes, A100, cell, 2048).tokens
            theirs = known[model, cell.ranks, cell.stages]
            yield Row(f"OPT-{model.upper()} on A100, {cell.name}: room for KV", ours, theirs, "DistServe", "tokens")


def main() -> None:
    """Run it."""
    options = parser("planner", "The planner beside an exhaustive search and beside DistServe's.").parse_args()
    rows = list(searches(QUICK if options.quick else SEARCHES))
    if not options.quick:
        rows += beside_exhaustive()
    folder = traces.folder()
    if (folder / peer.PLAN).is_file():
        try:
            rows += beside_distserve(folder, options.quick)
        except SetupError as error:
            progress(str(error))
    else:
        progress("no public traces (BATON_TRACES): nothing of DistServe's to compare with")
    emit("planner", rows, options.json)


if __name__ == "__main__":
    main()
