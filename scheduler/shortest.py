"""The shortest prefill first. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scheduler.cost import CostModel
from scheduler.order import Backlog, Job, Line

_FINE = 2
"""Bits of a length behind the first that tell classes apart: four classes an octave."""
_STARTED = -1


def length_class(tokens: int) -> int:
    """Lengths that share it differ by less than a quarter; a longer one has the same or a higher."""
    bits = max(0, tokens.bit_length() - 1 - _FINE)
    return (bits << _FINE) + (tokens >> bits)


class Shortest(Line):
    """Whoever has the fewest new tokens starts first; who has started is not overtaken.

    SGLang's `shortest-prefill-first`. Good for the mean, and without any bound for a long prompt: it waits for as long
    as shorter ones keep coming. The first in line that cannot start ends the step. A new request is predicted to wait
    for who has started and for all that are no longer than it, by length classes. Parameters: those of `Line`.
    """

    def __init__(
        self, chunk_tokens: int = 512, max_rows: int = 32, cost: CostModel | None = None, quantile: float = 0.9
    ) -> None:
        super().__init__(chunk_tokens, max_rows, cost, quantile)
        self._under_way: set[str] = set()
        self._classes: dict[int, Backlog] = {}

    def rank(self, job: Job) -> float:
        return job.left

    def before(self, new: int) -> Backlog:
        highest, total = length_class(new), Backlog()
        for each, backlog in self._classes.items():
            if each <= highest:
                total += backlog
        return total

    def expect(self, job: Job, now: float) -> None:
        super().expect(job, now)
        self._count(job)

    def put(self, job: Job) -> None:
        self._forget(self._jobs[job.key])
        super().put(job)
        self._under_way.add(job.key)
        self._count(job)

    def drop(self, key: str) -> None:
        if key in self._jobs:
            self._forget(self._jobs[key])
            self._under_way.discard(key)
        super().drop(key)

    def check(self) -> None:
        super().check()
        assert self._under_way <= self._jobs.keys()
        classes: dict[int, Backlog] = {}
        for job in self._jobs.values():
            classes.setdefault(self._class(job), Backlog()).add(job)
        assert self._classes == classes

    def document(self) -> dict[str, Any]:
        return {**super().document(), "under_way": sorted(self._under_way)}

    def restore(self, document: Mapping[str, Any]) -> None:
        super().restore(document)
        self._under_way, self._classes = set(document["under_way"]), {}
        for job in self._jobs.values():
            self._count(job)

    def _class(self, job: Job) -> int:
        return _STARTED if job.key in self._under_way else length_class(job.left)

    def _count(self, job: Job) -> None:
        self._classes.setdefault(self._class(job), Backlog()).add(job)

    def _forget(self, job: Job) -> None:
        which = self._class(job)
        self._classes[which].take(job)
        if not self._classes[which].rows:
            del self._classes[which]
