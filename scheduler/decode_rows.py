"""What a decode policy knows of its requests, and the arithmetic of the rows that run, in absolute steps. Pure.

A worker counts its decode steps; a row knows at which step it joined. So nothing is touched as steps go by: how many
tokens a row has, when its pages are full and how many pages all rows need at a later step follow from the count.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from enum import StrEnum

from core.messages import Carried, First, OfferMigration
from core.request import Request, Stage, Ticket


class State(StrEnum):
    """Where a request is on a decode worker; those that run are counted by sequence."""

    WAITING = "waiting"
    """Asked; no memory yet."""
    PROMISED = "promised"
    JOINING = "joining"
    RUNNING = "running"
    EVICTED = "evicted"
    """Memory ran out: it will join again."""


class Place(StrEnum):
    """Where a row's KV is, and what becomes of it."""

    JOINING = "joining"
    """In its pages: it joins as soon as there is room in the batch."""
    RUNNING = "running"
    EVICTED = "evicted"
    """Nowhere: it is computed again when it joins again."""
    LEAVING = "leaving"
    """On its way to host memory, and in its pages until it is there."""
    AWAY = "away"
    """In host memory."""
    RETURNING = "returning"
    """On its way back into its pages."""
    MOVING = "moving"
    """In its pages, and stopped: another worker is to go on with it."""
    ALONE = "alone"
    """In pages for all that it may come to: it has orders of its own."""
    ENDED = "ended"

    @property
    def state(self) -> State:
        """As people count it."""
        return _STATES[self]

    @property
    def waits_for(self) -> str:
        """In words; empty for one that runs."""
        return _WAITS[self]


_STATES = {
    Place.JOINING: State.JOINING,
    Place.RUNNING: State.RUNNING,
    Place.EVICTED: State.EVICTED,
    Place.LEAVING: State.EVICTED,
    Place.AWAY: State.EVICTED,
    Place.RETURNING: State.EVICTED,
    Place.MOVING: State.RUNNING,
    Place.ALONE: State.RUNNING,
}
_WAITS = {
    Place.JOINING: "room in the batch",
    Place.RUNNING: "",
    Place.EVICTED: "memory: it ran out, and its KV is to be computed again",
    Place.LEAVING: "its KV to reach host memory, and memory then",
    Place.AWAY: "memory: its KV is in host memory",
    Place.RETURNING: "its KV to come back from host memory",
    Place.MOVING: "another worker to take it",
    Place.ALONE: "",
    Place.ENDED: "",
}
RETIRED = frozenset({Place.EVICTED, Place.LEAVING, Place.AWAY})
"""Without memory, or soon: a row that ran waits for room before any request that did not begin."""


class Row:
    """One continuation; its key names it at the engine and in the ledger."""

    __slots__ = (
        "away",
        "bound",
        "cancelled",
        "carried",
        "end",
        "first",
        "gap_s",
        "generated_then",
        "guest",
        "joined_at",
        "joined_step",
        "key",
        "known",
        "lost",
        "most",
        "offset",
        "own",
        "place",
        "request",
        "shared",
        "tie",
    )

    def __init__(self, key: str, guest: Guest, request: Request, first: First, own: int, shared: int) -> None:
        self.key = key
        self.guest = guest
        self.request = request
        self.first = first
        self.shared = shared
        """Pages at the head of its table that it shares with its siblings."""
        self.bound = 0
        """Pages of its own."""
        self.own = own
        """Tokens of the prompt that are not in shared pages."""
        self.most = request.sampling.max_tokens
        """Tokens it may have."""
        self.place = Place.JOINING
        self.gap_s = request.slo.gap_s
        """Promised, or what a deadline leaves for each of the tokens to come, as of its last forecast."""
        self.cancelled = False
        self.known = False
        """Who runs the engine has heard of it."""
        self.away = 0
        """Pages it has or will have in host memory."""
        self.lost = False
        """Its KV is to be computed again when it joins."""
        self.carried: Carried | None = None
        """What it brought from the worker that it came from."""
        self.joined_at = 0.0
        """The first time."""
        self.joined_step = 0
        self.generated_then = 1
        """Tokens when it joined last."""
        self.offset = own
        """Of its own tokens with KV: so many and the worker's step."""
        self.end = 0
        """The step at which it will probably end."""
        self.tie = 0
        """Of the entry that says when its pages are full."""

    def generated(self, step: int) -> int:
        """Tokens it has after that step of the worker, the first one included."""
        if self.place is not Place.RUNNING:
            return self.generated_then
        return self.generated_then + step - self.joined_step

    def steps(self, step: int) -> int:
        """Steps it took part in."""
        return self.generated(step) - 1

    @property
    def frees(self) -> bool:
        """Whether there is memory to be had from its request: one that waits to join may hold shared pages alone."""
        held = self.bound or (self.guest.shares and self.guest.pages)
        return held > 0 and self.place in (Place.RUNNING, Place.JOINING)


@dataclass(slots=True, eq=False)
class Guest:
    """One request: first a claim to memory, then its rows."""

    ticket: Ticket
    request: Request
    key: str
    order: int
    """Of asking."""
    deadline: float
    asked_at: float
    pages: int
    """Of its prompt."""
    state: State = State.WAITING
    """JOINING stands for all of its rows' states."""
    cancelled: bool = False
    report: bool = False
    """Its gateway waits for the stages."""
    ended: tuple[int, ...] = ()
    """It is cancelled because its gateway saw an end: names of the pages of prompt and answer."""
    arrived_at: float = 0.0
    stages: tuple[Stage, ...] = ()
    shares: bool = False
    """Its rows share pages, which are held under its own key."""
    lost: bool = False
    """What they share is to be computed again."""
    revoked: bool = False
    """Its memory was wanted before its KV came."""
    tokens: int = 0
    """That its rows will attend to on average."""
    moving: OfferMigration | None = None
    """It comes, or came, from another decode worker: its key is that offer's, its ticket the gateway's."""
    moves: int = 0
    """Of this attempt so far."""
    batch: bool = False
    """Of the batch class: it has what others leave, and gives it back."""
    payer: str = ""
    """The name under which its tenant's share is counted."""
    ends_by: float = 0.0
    """When its last token is wanted, if it has a deadline; from the arrival of its KV on."""
    alone: bool = False
    """No order has its row and another: its pages, promised at once, are those of its longest text."""
    rows: dict[int, Row] = field(default_factory=dict)
    """By branch."""

    @property
    def retired(self) -> bool:
        """None of its rows has memory, or will have it for long."""
        return all(row.place in RETIRED for row in self.rows.values())


class Batch:
    """The rows that run, the step they are at, and the pages they need at that and at later steps.

    Joining and leaving, and the pages of all rows at a later step, cost O(page_tokens); finding the rows whose pages
    are full costs O(log n) a row.
    """

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.rows: dict[str, Row] = {}
        self.step = 0
        self.bound = 0
        """Pages of their own that all rows together have."""
        self._needed = 0
        """Pages that all rows need at `step`."""
        self._turns = [0] * page_tokens
        """Rows that need one page more at the steps that leave this remainder."""
        self._full: list[tuple[int, int, Row]] = []
        """(last step that a row's pages suffice for, tie, row); stale if the row has others by now."""
        self._ties = 0
        self._keys: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def keys(self) -> tuple[str, ...]:
        """Of all rows, in order of joining."""
        if self._keys is None:
            self._keys = tuple(self.rows)
        return self._keys

    def advance(self, steps: int) -> None:
        """So many steps were taken."""
        self._needed += self.growth(steps)
        self.step += steps

    def add(self, row: Row) -> None:
        """A row joins at this step."""
        page_tokens = self.page_tokens
        row.joined_step = self.step
        row.offset = row.own + row.generated_then - 1 - self.step
        self.rows[row.key] = row
        self._keys = None
        self.bound += row.bound
        self._needed -= -(row.offset + self.step) // page_tokens
        self._turns[(1 - row.offset) % page_tokens] += 1
        self.bind(row, 0)

    def remove(self, row: Row) -> None:
        """A row leaves at this step; its pages go with it."""
        del self.rows[row.key]
        self._keys = None
        self.bound -= row.bound
        self._needed += -(row.offset + self.step) // self.page_tokens
        self._turns[(1 - row.offset) % self.page_tokens] -= 1
        row.tie = 0

    def bind(self, row: Row, pages: int) -> None:
        """A row got so many pages more, or fewer than 0."""
        row.bound += pages
        self.bound += pages
        self._ties = row.tie = self._ties + 1
        heapq.heappush(self._full, (row.bound * self.page_tokens - row.offset, self._ties, row))

    def need(self, row: Row, step: int) -> int:
        """Pages of its own that a row needs at that step."""
        return -(-(row.offset + step) // self.page_tokens)

    def needed(self, steps: int) -> int:
        """Pages that all rows need after so many more steps."""
        return self._needed + self.growth(steps)

    def growth(self, steps: int) -> int:
        """Pages that all rows need more after so many more steps."""
        if steps == 1:
            return self._turns[(self.step + 1) % self.page_tokens]
        rounds, rest = divmod(steps, self.page_tokens)
        grown = rounds * len(self.rows)
        if rest:
            first = (self.step + 1) % self.page_tokens
            turns, after = self._turns, first + rest
            grown += sum(turns[first:after])
            if after > self.page_tokens:
                grown += sum(turns[: after - self.page_tokens])
        return grown

    def steps_within(self, pages: int) -> int:
        """The most steps after which all rows need at most so many pages; below 0 if they need more now."""
        if pages < self._needed:
            return -1
        rounds, left = divmod(pages - self._needed, len(self.rows))
        steps = rounds * self.page_tokens
        while True:
            left -= self._turns[(self.step + steps + 1) % self.page_tokens]
            if left < 0:
                return steps
            steps += 1

    def running_out(self, step: int) -> list[Row]:
        """Rows whose pages do not suffice for that step, taken off: give them more with `bind`."""
        rows = []
        full = self._full
        while full and full[0][0] < step:
            _, tie, row = heapq.heappop(full)
            if row.tie == tie:
                rows.append(row)
        return rows

    def check(self) -> None:
        assert self.bound == sum(row.bound for row in self.rows.values())
        assert self._needed == sum(self.need(row, self.step) for row in self.rows.values())
        assert self.keys == tuple(self.rows)
        assert sum(self._turns) == len(self.rows)
        last = {row.key: step for step, tie, row in self._full if row.tie == tie}
        for key, row in self.rows.items():
            assert key == row.key
            assert row.place is Place.RUNNING
            waits = row.joined_step == self.step  # alone, for memory that others in its arena have
            assert row.bound >= self.need(row, self.step) or waits, "KV outgrew its pages"
            assert last[key] == row.bound * self.page_tokens - row.offset, "nobody knows when its pages are full"
