"""How many rows may share a step, so that its time stays below the smallest gap that one of them was promised. Pure.

A decode step grows with its rows and with what they attend to. FastSwitch and the papers on latency objectives cap the
batch by a fixed number of rows; here the cost model says what a step takes, with its own error as margin, and the
promises are those of the rows that are in it (`Slo.gap_s`, 0 for none).
"""

from __future__ import annotations

import heapq

from scheduler.cost import CostModel


class Pace:
    """Some rows: how many, what they attend to, the smallest of their gaps. Every call costs O(log n).

    `share` of the smallest gap is what a step may take; a step is taken to be longer than the cost model says by what
    its errors were in all but 1 - `quantile` of the cases. Without a cost model everything is allowed.
    """

    def __init__(self, cost: CostModel | None, share: float, quantile: float) -> None:
        self._share, self._quantile = share, quantile
        self.reprice(cost)
        self.rows = 0
        self._context = 0
        """Tokens attended to at step 0 of the worker; rows that grow add one each at every step."""
        self._counts: dict[float, int] = {}
        self._gaps: list[float] = []
        """A heap of the gaps in `_counts`; of those that ended there may be some, too."""

    def reprice(self, cost: CostModel | None) -> None:
        """Go by this model from now on; rows that share steps already go on doing so."""
        self._cost = cost
        self._factor = (1.0 + cost.margin("decode", self._quantile)) / self._share if cost is not None else 0.0

    def add(self, gap_s: float, context: int, rows: int = 1) -> None:
        """Rows of one request join."""
        self.rows += rows
        self._context += context
        if gap_s > 0:
            if gap_s not in self._counts:
                heapq.heappush(self._gaps, gap_s)
            self._counts[gap_s] = self._counts.get(gap_s, 0) + 1

    def remove(self, gap_s: float, context: int, rows: int = 1) -> None:
        """They leave."""
        self.rows -= rows
        self._context -= context
        if gap_s > 0:
            self._counts[gap_s] -= 1
            if not self._counts[gap_s]:
                del self._counts[gap_s]

    def allows(self, gap_s: float, context: int, rows: int = 1, step: int = 0) -> bool:
        """Whether all promises hold with one request more; anything is allowed alone. Rows have grown for `step`."""
        if self._cost is None or not self.rows or not (gap_s > 0 or self._counts):
            return True
        gaps = self._gaps
        while gaps and gaps[0] not in self._counts:
            heapq.heappop(gaps)
        if gaps and (gap_s <= 0 or gaps[0] < gap_s):
            gap_s = gaps[0]
        if gap_s <= 0:
            return True
        count = self.rows + rows
        return self._cost.decode_s(count, self._context + context + step * count) * self._factor <= gap_s
