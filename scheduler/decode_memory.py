"""The memory of a decode worker: what its requests hold, what is set aside for them, and what is free. Pure.

Decisions go by what rows *need* at the steps of decision points, which no length of orders changes. What they *have*
may be more: a growing row gets several pages at once, and an order that is cut leaves pages that were bound for its
rest. Only when the ledger is short of pages that are free by what is needed, rows give back what they have too early.
"""

from __future__ import annotations

from collections.abc import Collection

from core.kv import KvShape
from core.pages import Owner, Pages
from scheduler.decode_events import Grow
from scheduler.decode_rows import Batch, Row
from scheduler.past_future import Admission, Claim

GROWTH = "decode/growth"
"""Who the ledger says was promised what rows will grow into."""


class Memory:
    """The ledger as a decode policy sees it, beside others that take from the same arena."""

    def __init__(self, shape: KvShape, ledger: Pages, batch: Batch, admission: Admission, ahead_pages: int) -> None:
        self._shape = shape
        self._ledger = ledger
        self._batch = batch
        self._ahead = ahead_pages
        self.admission = admission
        self.own = 0
        """Pages that our requests hold or were promised, but for those set aside."""
        self.kept = 0
        """Pages set aside for rows to grow into."""
        self.horizon = 0
        """The step that memory was last planned for."""
        self._planned = 0
        """What all rows need there."""

    @property
    def total(self) -> int:
        """Pages that our requests have and may get: what only others in this arena change."""
        return self._ledger.available + self.kept + self.own

    @property
    def room(self) -> int:
        """Pages that running rows have and may get."""
        return self._ledger.available + self.kept + self._batch.bound

    @property
    def target(self) -> int:
        """Of `room` what running rows need until the horizon, and whoever was admitted later on, by the worst case."""
        return max(self._planned, self.admission.promised - (self.own - self._batch.bound))

    @property
    def free(self) -> int:
        """Of `room` what nobody was promised."""
        return (
            self._ledger.available
            + self.kept
            - max(self._planned - self._batch.bound, self.admission.promised - self.own)
        )

    def fits(self, claim: Claim, step: int) -> bool:
        """Whether admission takes one more."""
        return self.admission.fits(claim, self.total, step)

    def plan(self, limit: int) -> None:
        """The rows may run for so many steps, or as memory lasts, before it is planned again."""
        batch = self._batch
        needed = batch.needed(limit) if batch.rows else 0
        room = self.room
        if needed > room:
            limit = max(0, min(limit, batch.steps_within(room)))
            needed = batch.needed(limit)
        self.horizon = batch.step + limit
        # Beside others in this arena there may be too little for the rows as they are: they wait with what there is.
        self._planned = min(needed, room)

    def set_aside(self) -> None:
        """Keep from others in this arena what rows will grow into."""
        bound = self._batch.bound
        kept = max(0, self._planned - bound, self.admission.promised - self.own)
        if kept != self.kept:
            self._ledger.keep(GROWTH, kept, Owner.DECODING)
            self.kept = kept

    def promise(self, key: str, pages: int) -> None:
        """Pages for a prompt that is on its way; `free` has so many."""
        self._have(pages)
        self._ledger.promise(key, pages, Owner.PULLING)
        self.own += pages
        self.set_aside()

    def bind(self, key: str, pages: int) -> tuple[int, ...]:
        """Pages for somebody who does not run; `free` has so many."""
        self.set_aside()  # what was kept for rows that have left since is part of it
        self._have(pages)
        self.own += pages
        return self._ledger.bind(key, pages, Owner.DECODING)

    def release(self, key: str, pages: int) -> None:
        """All that is held under a key, which is so many pages."""
        self._ledger.release(key)
        self.own -= pages

    def trim(self, row: Row, step: int) -> None:
        """Take from a row in the batch what it does not need by that step."""
        surplus = row.bound - self._batch.need(row, step)
        if surplus > 0:
            freed = self._ledger.trim(row.key, surplus)
            self._batch.bind(row, -freed)
            self.own -= freed

    def grow(self, step: int, joining: Collection[str]) -> tuple[Grow, ...]:
        """Bind pages that suffice until `step`, for rows that have too few; for longer, if a page a row is left."""
        batch, ledger = self._batch, self._ledger
        rows = batch.running_out(step)
        if not rows:
            return ()
        ledger.keep(GROWTH, 0, Owner.DECODING)
        self.kept = 0
        counts = [batch.need(row, step) - row.bound for row in rows]
        short = sum(counts)
        self._have(short)
        extra = ledger.available - short - len(batch)
        growing = []
        for row, count in zip(rows, counts, strict=True):
            first = row.bound
            if extra > 0 and count < self._ahead:
                more = min(extra, min(self._ahead, self._shape.pages_for(row.own + row.most) - first) - count)
                if more > 0:
                    count += more
                    extra -= more
            pages = ledger.bind(row.key, count, Owner.DECODING)
            self.own += count
            batch.bind(row, count)
            if row.key not in joining:
                growing.append(Grow(row.key, pages, row.shared + first))
        self.set_aside()
        return tuple(growing)

    def _have(self, pages: int) -> None:
        """Have so many pages available: rows that got theirs early give them back."""
        if self._ledger.available < pages:
            for row in self._batch.rows.values():
                self.trim(row, self.horizon)
                if self._ledger.available >= pages:
                    return

    def check(self) -> None:
        self._batch.check()
        assert self.kept == max(0, self.target - self._batch.bound)
