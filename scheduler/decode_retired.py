"""Rows of a decode worker whose memory was taken: who comes back first, and whose KV goes to host memory. Pure.

FastSwitch swaps where it is shorter than to compute again, others recompute; here the cost model says which it is.
"""

from __future__ import annotations

from bisect import insort

from core.kv import KvShape
from core.pages import Pages
from scheduler.cost import CostModel
from scheduler.decode_rows import RETIRED, Place, Row


class Retired:
    """Those without memory, or soon, in order of asking; and the host memory of those that have KV there.

    `room`: pages of host memory; 0: all are computed again. Without a cost model whatever fits is swapped. `lane` names
    the cost model's lane to host memory and back.
    """

    def __init__(self, shape: KvShape, ledger: Pages, room: int, lane: str) -> None:
        self._shape, self._ledger, self._room, self._lane = shape, ledger, room, lane
        self._rows: list[Row] = []
        self.returning = 0
        """Rows on their way back from host memory."""
        self.pages = 0
        """Of host memory, in use."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def first(self) -> Row:
        """Of the oldest request; there is one."""
        return self._rows[0]

    def swaps(self, row: Row, cost: CostModel | None) -> bool:
        """Whether a row's KV goes to host memory: if there is room, and it is back sooner than it is computed."""
        if self.pages + row.bound > self._room:
            return False
        if cost is None:
            return True
        nbytes, runs = row.bound * self._shape.page_nbytes, len(self._ledger.runs(row.key))
        there_s = cost.transfer_s(nbytes, runs, self._lane)
        return 2 * there_s < cost.prefill_s([(len(row.request.prompt) + row.generated_then - 1, 0)])

    def put(self, row: Row) -> None:
        """It has lost its memory."""
        insort(self._rows, row, key=_age)

    def take(self, row: Row) -> None:
        """It has memory again, or ends."""
        self._rows.remove(row)

    def leaves(self, row: Row) -> None:
        """All of its pages go to host memory."""
        row.place, row.away = Place.LEAVING, row.bound
        self.pages += row.away

    def returns(self, row: Row) -> None:
        """Its KV comes back."""
        row.place = Place.RETURNING
        self.returning += 1

    def is_back(self, row: Row) -> None:
        """Its KV has come back."""
        self.returning -= 1
        self.forget(row)

    def forget(self, row: Row) -> None:
        """It has nothing in host memory any more."""
        self.pages -= row.away
        row.away = 0

    def check(self, rows: list[Row]) -> None:
        """`rows` are all that there are."""
        assert set(self._rows) == {row for row in rows if row.place in RETIRED}
        assert [_age(row) for row in self._rows] == sorted(_age(row) for row in self._rows)
        assert not any(row.guest.batch for row in self._rows), "idle memory was kept"
        assert self.pages == sum(row.away for row in rows)
        assert self.returning == sum(row.place is Place.RETURNING for row in rows)


def _age(row: Row) -> tuple[int, int]:
    return row.guest.order, row.first.branch
