"""Sequences of a colocated worker, and its decode rows, counted in absolute steps: any number of them costs the same.

A row that joined at the engine's step j with `goal` tokens of KV has `goal + s - j` of them at step s. What all rows
together need is kept as sums: of contexts, of pages, and of the rows that cross into a new page at each step modulo
the page size. Two queues say which row ends first, and whose pages are full first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from core.messages import First
from core.ranked import Ranked
from core.request import Request, Ticket


class State(StrEnum):
    """Where a sequence is on a colocated worker."""

    OFFERED = "offered"
    WAITING = "waiting"
    """Also one that has run and whose memory was taken."""
    PREFILLING = "prefilling"
    DECODING = "decoding"


@dataclass(slots=True, eq=False)
class Job:
    """A request."""

    ticket: Ticket
    prefix: tuple[int, ...]
    accepted_at: float
    request: Request | None = None
    rows: dict[int, Row] = field(default_factory=dict)
    """Its sequences, by branch."""
    started_at: float | None = None
    computed_at: float = 0.0
    handed: bool = False
    """Its prompt is complete, and its gateway knows."""
    sharers: int = 0
    """Rows that use the prompt's pages, which the ticket's key holds."""
    report: bool = False
    """Its gateway waits for the stages."""
    cancelled: bool = False
    chunks: int = 0
    cached_tokens: int = 0
    suspended: int = 0


@dataclass(slots=True, eq=False)
class Row:
    """A sequence; its key names it at the engine and in the ledger."""

    key: str
    job: Job
    prompt: int
    most: int
    """Tokens that it may generate."""
    goal: int
    """Tokens to prefill: the prompt, and what was generated before its memory was taken."""
    rank: int = 0
    """First come, first served."""
    branch: int = 0
    request: Request | None = None
    state: State = State.OFFERED
    begun: bool = False
    """The engine, or its shell, knows it."""
    cancelled: bool = False
    done: int = 0
    """Of `goal`."""
    left: int = 0
    """Tokens that it counts for in the line."""
    lost: int = 0
    """Tokens whose KV was there before its memory was taken."""
    held: int = 0
    """Pages of its table."""
    trimmed: bool = False
    """The engine believes that it has more."""
    joined: int = 0
    """At which of the engine's steps it became a decode row."""
    shares: bool = False
    """The head of its table is the prompt's pages."""
    first: First | None = None
    """Of a continuation that has yet to join."""


class Batch:
    """The decode rows: which, how far, and what they need next."""

    __slots__ = ("_ends", "_fills", "_page_tokens", "_phase", "ahead", "context", "rows", "spare", "steps")

    def __init__(self, page_tokens: int) -> None:
        self.rows: dict[str, Row] = {}
        self.steps = 0
        """Steps that decode rows took part in so far."""
        self.context = 0
        """Tokens that all rows together attend to in their next step."""
        self.spare = 0
        """Pages that rows hold beyond what their KV takes now."""
        self.ahead: dict[int, Row] = {}
        """Rows that may hold spare pages, by rank."""
        self._page_tokens = page_tokens
        self._phase = [0] * page_tokens
        """Rows that need a page for the step after `steps`, by `steps` modulo the page size."""
        self._ends = Ranked()
        self._fills = Ranked()

    def __len__(self) -> int:
        return len(self.rows)

    def stored(self, row: Row) -> int:
        """Tokens of the row that have KV."""
        return row.goal + self.steps - row.joined

    def generated(self, row: Row) -> int:
        """Tokens of the row behind its prompt; the last of them has no KV yet."""
        return row.goal + self.steps - row.joined - row.prompt + 1

    def join(self, row: Row) -> None:
        """A row whose `goal` tokens have KV, in `held` pages, and whose next token is known."""
        row.joined = self.steps
        self.rows[row.key] = row
        self.context += row.goal + 1
        self._phase[(self.steps - row.goal) % self._page_tokens] += 1
        self._ends.put(row.key, self.steps + row.prompt + row.most - row.goal - 1)
        self._hold(row)

    def leave(self, row: Row) -> None:
        """Forget a row."""
        del self.rows[row.key]
        stored = self.stored(row)
        self.context -= stored + 1
        self.spare -= row.held + stored // -self._page_tokens
        self._phase[(row.joined - row.goal) % self._page_tokens] -= 1
        self._ends.drop(row.key)
        self._fills.drop(row.key)
        self.ahead.pop(row.rank, None)

    def advance(self, steps: int) -> None:
        """All rows have one more token for each of these steps."""
        self.spare -= self.growth(steps)
        self.context += steps * len(self.rows)
        self.steps += steps

    def growth(self, steps: int) -> int:
        """Pages that the KV of so many more steps takes in all, beyond what it takes now."""
        size, phase = self._page_tokens, self._phase
        if steps == 1:
            return phase[self.steps % size]
        whole, rest = divmod(steps, size)
        count = whole * len(self.rows)
        for step in range(self.steps, self.steps + rest):
            count += phase[step % size]
        return count

    def lasts(self, pages: int, limit: int) -> int:
        """The most steps, `limit` at most, whose `growth` is no more than `pages`."""
        if self.growth(limit) <= pages:
            return limit
        size, phase = self._page_tokens, self._phase
        whole, pages = divmod(pages, len(self.rows))
        steps = whole * size
        while (crossing := phase[(self.steps + steps) % size]) <= pages:
            pages -= crossing
            steps += 1
        return steps

    def first_end(self) -> int:
        """At how many steps the first row has all tokens that it may come to; there must be rows."""
        return int(self._ends.lowest())

    def full_before(self, steps: int) -> Row | None:
        """The row whose pages are full first, if they are before the engine has done this many steps."""
        key = self._fills.first()
        return self.rows[key] if key is not None and self._fills.lowest() < steps else None

    def grown(self, row: Row, pages: int) -> None:
        """The row holds so many pages more."""
        row.held += pages
        self.spare += pages
        self.ahead[row.rank] = row
        self._fills.put(row.key, row.joined + row.held * self._page_tokens - row.goal)

    def shrunk(self, row: Row, pages: int) -> None:
        """The row holds so many pages less."""
        row.held -= pages
        self.spare -= pages
        self._fills.put(row.key, row.joined + row.held * self._page_tokens - row.goal)

    def _hold(self, row: Row) -> None:
        self._fills.put(row.key, row.joined + row.held * self._page_tokens - row.goal)
        extra = row.held + row.goal // -self._page_tokens
        if extra:
            self.spare += extra
            self.ahead[row.rank] = row

    def check(self) -> None:
        """Invariants: the sums are what the rows add up to."""
        size = self._page_tokens
        assert self.context == sum(self.stored(row) + 1 for row in self.rows.values())
        spare = {row.rank: row.held - -(-self.stored(row) // size) for row in self.rows.values()}
        assert all(count >= 0 for count in spare.values()), "KV outgrew its pages"
        assert self.spare == sum(spare.values())
        assert {rank for rank, count in spare.items() if count} <= self.ahead.keys()
        assert sum(self._phase) == len(self.rows)
        for steps in range(size + 1):
            more = sum(-(-(self.stored(row) + steps) // size) + -self.stored(row) // size for row in self.rows.values())
            assert self.growth(steps) == more
        assert len(self._ends) == len(self._fills) == len(self.rows)
        if self.rows:
            left = min(row.most - self.generated(row) for row in self.rows.values())
            assert self.first_end() == self.steps + left
            room = min(row.held * size - self.stored(row) for row in self.rows.values())
            assert self.full_before(self.steps + room) is None
            assert self.full_before(self.steps + room + 1) is not None
