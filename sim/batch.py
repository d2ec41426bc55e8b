"""A decode engine of the simulator: its rows, when their steps end, and what their clients see of it."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from core.messages import Tokens
from core.request import Request, Ticket
from scheduler.cost import CostModel
from sim.gaps import GapLog
from sim.outcome import Record

if TYPE_CHECKING:
    from sim.worker import Worker


def remaining(record: Record, request: Request) -> int:
    """Tokens that the request will still come to: the model's own end, or `max_tokens`."""
    return min(request.sampling.max_tokens, max(1, record.arrival.output - request.generated))


class Row:
    """A sequence in the batch."""

    __slots__ = ("again", "context", "ends_at", "generated", "mark", "number", "record", "since", "ticket")

    def __init__(
        self, number: int, ticket: Ticket, record: Record, context: int, generated: int, since: int, ends_at: int
    ) -> None:
        self.number = number
        """Of all that ever joined: a sequence that leaves and comes back is another row."""
        self.ticket = ticket
        self.record = record
        self.since = since
        """The engine's steps when it joined, or when its client got tokens last; at that time:"""
        self.context = context
        """tokens that it attends to in its next step,"""
        self.generated = generated
        """tokens of this attempt,"""
        self.mark: tuple[int, ...] | None = None
        """and the log; None before its first step here, whose gap is its own."""
        self.again = 0
        """Of these tokens those that its client gets once more, because it came from another worker."""
        self.ends_at = ends_at
        """The engine's steps when it is finished."""


class Batch:
    """A decode engine's rows, and when their steps end: computed from where the batch last changed, never by adding."""

    def __init__(self, worker: Worker, cost: CostModel) -> None:
        self._worker = worker
        self._cost = cost
        self._log = GapLog(worker.upper)
        self._rows: dict[str, Row] = {}
        self._ends: list[tuple[int, int, str]] = []
        """When rows end, also of those that have left: by step, number and key."""
        self._joins = 0
        self._fresh: list[Row] = []
        """Rows that have not had a step here."""
        self.context = 0
        """Tokens that the rows attend to in the next step."""
        self._base = (0.0, 0, 0, 1.0)
        """When the batch last changed: time, steps, context, slowness."""
        self._changed = True
        self._end = (-1, 0.0)
        """Of the steps that were asked for last: how many, and when they are over; the same is asked twice an order."""
        self.steps = 0
        """Of the engine's life."""
        self._last_s = 0.0
        """When the last of them was over."""

    def __len__(self) -> int:
        return len(self._rows)

    def join(self, key: str, ticket: Ticket, request: Request, generated: int, again: int = 0) -> None:
        """A row that has `generated` tokens of this attempt already, of which `again` go out again."""
        record = self._worker.record(ticket)
        record.sink = self._worker.me.name
        ends_at = self.steps + remaining(record, request) - generated
        self._joins += 1
        context = len(request.prompt) + generated
        row = self._rows[key] = Row(self._joins, ticket, record, context, generated, self.steps, ends_at)
        row.again = again
        heappush(self._ends, (ends_at, row.number, key))
        self._fresh.append(row)
        self.context += row.context
        self._changed = True

    def generated(self, key: str) -> int:
        """Tokens that a row has of this attempt."""
        row = self._rows[key]
        return row.generated + self.steps - row.since

    def leave(self, key: str) -> None:
        """Forget a row; what it has said is said."""
        row = self._rows.pop(key, None)
        if row is None:
            return
        if row.mark is None:
            self._fresh.remove(row)
        else:
            self.say(row)
        self.context -= row.context
        self._changed = True

    def begin(self, now: float) -> None:
        """The engine goes on now with the rows it has."""
        slowness = self._worker.decodes()
        if self._changed or self._last_s != now or self._base[3] != slowness:
            self._base = now, self.steps, self.context, slowness
            self._changed = False
            self._end = self.steps, now

    def time_of(self, steps: int) -> float:
        """When this many of the engine's steps will be over."""
        asked, end_s = self._end
        if steps != asked:
            start, base, context, slowness = self._base
            end_s = start + slowness * self._cost.decode_span_s(len(self._rows), context, steps - base)
            self._end = steps, end_s
        return end_s

    def steps_by(self, when: float, limit: int) -> int:
        """How many of the engine's steps, `limit` at most, are over by then."""
        start, base, context, slowness = self._base
        within = self._cost.decode_steps_within(len(self._rows), context, (when - start) / slowness, limit - base)
        steps = base + within
        # What counts is the time that a step's end is given, to the last bit.
        while steps > base and self.time_of(steps) > when:
            steps -= 1
        while steps < limit and self.time_of(steps + 1) <= when:
            steps += 1
        return steps

    def first_end(self) -> int:
        """At how many steps the first row ends."""
        ends, rows = self._ends, self._rows
        while (row := rows.get(ends[0][2])) is None or row.number != ends[0][1]:
            heappop(ends)
        return ends[0][0]

    def advance(self, steps: int) -> list[tuple[str, Row]]:
        """All rows have done steps up to this count; returns those that are finished."""
        rows, (_, base, context, slowness) = len(self._rows), self._base
        cost, since = self._cost, self.steps
        if steps > since:
            end_s = self.time_of(steps)
            self._first(self.time_of(since + 1))
            self._log.span(lambda at: slowness * cost.decode_s(rows, context + rows * (at - base)), since + 1, steps)
            self._last_s = end_s
        return self._done(steps)

    def advance_once(self, end_s: float) -> list[tuple[str, Row]]:
        """All rows have done one step, beside something else, which was over at `end_s`."""
        self._first(end_s)
        self._last_s = end_s
        self._changed = True
        return self._done(self.steps + 1)

    def _first(self, end_s: float) -> None:
        """The first step of a stretch: a gap begins where the row's token before was made, perhaps elsewhere."""
        self._log.add(end_s - self._last_s)
        if self._fresh:
            mark = self._log.mark()
            for row in self._fresh:
                self._worker.token(row.record, end_s)
                row.mark = mark
            self._fresh.clear()

    def _done(self, steps: int) -> list[tuple[str, Row]]:
        self.context += len(self._rows) * (steps - self.steps)
        self.steps = steps
        finished = []
        while self._ends and self._ends[0][0] <= steps:
            _, number, key = heappop(self._ends)
            row = self._rows.get(key)
            if row is not None and row.number == number:
                finished.append((key, row))
        return finished

    def say(self, row: Row) -> None:
        """The client gets what a row has said since it joined, or since this was called last."""
        said = self.steps - row.since
        if said > 0 and row.mark is not None:
            row.record.stretch(self._log.since(row.mark), self._last_s)
            again, row.again = row.again, 0
            self._worker.send(row.ticket.minter, Tokens(row.ticket, row.generated - again, (0,) * (again + said)))
            row.since, row.mark = self.steps, self._log.mark()
            row.generated += said
            row.context += said

    def die(self, now: float, upto: int | None) -> None:
        """The engine dies now, in steps up to `upto` if it is in any; what was said by then has gone out."""
        if upto is not None:
            self.advance(self.steps_by(now, upto))
        for row in self._rows.values():
            self.say(row)
