"""Highest response ratio next: short ones first, but everybody ages. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.ranked import Ranked
from scheduler.cost import CostModel
from scheduler.order import Job, Line
from scheduler.shortest import length_class


class Hrrn(Line):
    """Whoever has the highest (time since accepted + service time) / service time starts first.

    SGLang's `hrrn`; Dynamo's `wspt` weighs alike, without ageing. A short prompt gains on a long one quickly, and a
    long one still gains for as long as it waits. While the load is below 1 everybody is served; under a lasting
    overload rho by prompts of less than (1 - 1 / rho) of its service time, a long one is not. Within a length class
    (lengths that differ by less than a quarter) it is first come, first served, so that only the heads of classes are
    compared. The first in line that cannot start ends the step; who has started goes on first. A new request has the
    lowest ratio there is: it is predicted to wait for all of the line.

    Parameters: those of `Line`. Without a cost model, the service time is the number of new tokens.
    """

    def __init__(
        self, chunk_tokens: int = 512, max_rows: int = 32, cost: CostModel | None = None, quantile: float = 0.9
    ) -> None:
        super().__init__(chunk_tokens, max_rows, cost, quantile)
        self._classes: dict[int, Ranked] = {}
        self._service: dict[str, float] = {}

    def rank(self, job: Job) -> float:
        return job.accepted_at

    def ready(self, key: str, now: float) -> None:
        super().ready(key, now)
        self._line_up(self._jobs[key])

    def head(self, now: float) -> str | None:
        best, highest = None, (0.0, 0.0, 0.0)
        for line in self._classes.values():
            key = line.first()
            assert key is not None, "an empty class stays"
            since = line.rank(key)
            # The ratio less 1; of equal ones the earlier, then the shorter.
            service_s = self._service[key]
            ratio = (now - since) / service_s, -since, -service_s
            if best is None or ratio > highest:
                best, highest = key, ratio
        return best

    def leave(self, key: str) -> None:
        super().leave(key)
        if self._service.pop(key, None) is not None:
            which = length_class(self._jobs[key].left)
            line = self._classes[which]
            line.drop(key)
            if not len(line):
                del self._classes[which]

    def check(self) -> None:
        super().check()
        lines = {key: since for line in self._classes.values() for key, since in line.items()}
        assert lines == dict(self._waiting.items())
        assert lines.keys() == self._service.keys()
        assert all(self._classes.values()), "an empty class stays"

    def reprice(self, cost: CostModel) -> None:
        super().reprice(cost)
        self._service = {key: self._service_of(self._jobs[key]) for key in self._service}

    def restore(self, document: Mapping[str, Any]) -> None:
        super().restore(document)
        self._classes, self._service = {}, {}
        for key, _ in self._waiting.items():
            self._line_up(self._jobs[key])

    def _line_up(self, job: Job) -> None:
        self._classes.setdefault(length_class(job.left), Ranked()).put(job.key, job.accepted_at)
        self._service[job.key] = self._service_of(job)

    def _service_of(self, job: Job) -> float:
        cost = self._pace.cost
        return cost.prefill_s([(job.left, job.context)]) if cost else float(job.left)
