"""What came of simulations, as files: requests.csv, timeline.csv, summary.json and one report.html.

The page needs no network and no script. Nothing in a file depends on when or how fast it was made, so the same command
gives the same bytes. docs/simulator.md says what every figure means.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import TracebackType

from sim.outcome import Outcome
from sim.page import page
from sim.study import Study, document
from sim.timeline import Timeline

OUTCOME = tuple(each.name for each in fields(Outcome))


class Requests:
    """requests.csv, a line an outcome, written as they come."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "requests.csv").open("w", encoding="utf-8", newline="")
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerow(("policy", "seed", *OUTCOME))

    def add(self, policy: str, seed: int, one: Outcome) -> None:
        """One more."""
        self._rows.writerow((policy, seed, *(getattr(one, name) for name in OUTCOME)))

    def __enter__(self) -> Requests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def write(folder: Path, study: Study) -> None:
    """timeline.csv, summary.json and report.html, over what is there."""
    with (folder / "timeline.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("policy", "at_s", "who", "what", "value"))
        for run in study.runs:
            if run.timeline is not None:
                rows.writerows((run.policy, *row) for row in flat(run.timeline))
    text = json.dumps(document(study), indent=1, allow_nan=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(study), encoding="utf-8")


def flat(timeline: Timeline) -> Iterator[tuple[float, str, str, float]]:
    """(time, who, what, value) of everything sampled; pages and commands only where there are any."""
    for sample in timeline.samples:
        at_s = sample.at_s
        yield at_s, "all", "under_way", sample.under_way
        for phase, count in sample.phases.items():
            yield at_s, "all", f"phase.{phase}", count
        for command, count in sample.commands.items():
            yield at_s, "all", f"command.{command}", count
        for name, gauge in sample.workers.items():
            yield at_s, name, "alive", int(gauge is not None)
            if gauge is not None:
                for state, count in gauge.queue.items():
                    yield at_s, name, f"queue.{state}", count
                for owner, count in gauge.pages.items():
                    yield at_s, name, f"pages.{owner}", count
