"""Which running row goes on at another decode worker, to which one, and when it stops for that. Pure.

Live migration after Llumnix (OSDI'24): a row's KV is copied while it decodes, in stages, each of what was added during
the stage before; then the row stops, the rest is copied, and it goes on at the other side. So its client waits for the
last few pages only, however long it is. Here the other side pulls: this one announces what is full, and goes on when
the other has it (`CaughtUp`). A worker gives one row at a time, as Llumnix does.

The decode policy owns the rows. It asks here who is to go, at decision points only, and does what is due: it announces
pages, or takes the row out of its batch and hands it over. After that there are three ends. Taken: the row is gone.
Surely not taken: it goes on here. In doubt, because the other side fell silent when it had heard everything: it is
given up, and its gateway places the request again, as for a lost worker; so no token is made twice or by nobody.

A worker wants to give when it drains, or when its freeness falls below a bound; to the peer with the greatest freeness
above another bound (when it drains: above 0). Peers push their freeness when it has doubled or halved.

Llumnix chooses the shortest running request of the lowest priority ("SR", its default), whose copy is the shortest; so
do we, the newest among equals. Requests with several continuations stay: they share pages.

Nothing waits for memory here, so that no cycle of workers can wait for each other: who has no room says so at once.

| parameter | unit | default | meaning |
|---|---|---|---|
| below_steps | steps | 48 | a freeness of its own below which a worker gives rows; 3 blocks of 16 tokens at Llumnix |
| above_steps | steps | 192 | a peer's freeness above which it is asked |
| max_stages | stages | 3 | of copying while the row runs, then it stops |
| last_pages | pages | 16 | it stops earlier if no more than these are left |
| ahead_tokens | tokens | 256 | it may add while it is copied: memory for them is asked for, then it stops |
| deadline_s | seconds | 10 | for all of it |
| retry_s | seconds | 0.5 | before a peer that refused is asked again |
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from core.errors import LocalError
from core.messages import OfferMigration
from core.request import Ticket
from core.worker import Identity
from scheduler.decode_events import MoveEnded, OfferRow, WithdrawRow
from scheduler.decode_rows import Place, Row


@dataclass(frozen=True, slots=True)
class MigrationConfig:
    """See the table above."""

    below_steps: int = 48
    above_steps: int = 192
    max_stages: int = 3
    last_pages: int = 16
    ahead_tokens: int = 256
    deadline_s: float = 10.0
    retry_s: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.below_steps <= self.above_steps:
            raise LocalError(f"migration: got {self}, want 0 <= below_steps <= above_steps")
        if min(self.max_stages, self.ahead_tokens) < 1 or self.last_pages < 0:
            raise LocalError(f"migration: got {self}, want max_stages and ahead_tokens from 1 on, last_pages from 0 on")
        if not (self.deadline_s > 0 and self.retry_s > 0):
            raise LocalError(f"migration: got {self}, want times above 0")


class State(StrEnum):
    """Where the row that is to go is."""

    OFFERED = "offered"
    COPYING = "copying"
    """The other side pulls what was announced; the row runs."""
    STOPPED = "stopped"
    """All was announced; it does not run anywhere."""


class Migration:
    """The row that one decode worker is giving away, if there is one, and what it knows of its peers."""

    def __init__(self, me: Identity, config: MigrationConfig) -> None:
        self._me = me
        self.config = config
        self.peers: dict[Identity, float] = {}
        """Their freeness, as they said last; nothing is known of those at minus infinity."""
        self._refused: dict[Identity, float] = {}
        """Until when they are not asked again."""
        self._count = 0
        self._band: int | None = None
        """What was said last of our own freeness."""
        self.row: Row | None = None
        self.ticket: Ticket | None = None
        self.state = State.OFFERED
        self.due = False
        """The other side waits for the next announcement, which comes at a decision point."""
        self.look = False
        """Something has changed since it was last looked for a row to give."""
        self._stages = 0
        self._sealed = 0
        self._most = 0
        self.given = 0
        """Rows that went."""
        self.stayed = 0
        """Offers that came to nothing."""

    # Peers.
    def came(self, peer: Identity) -> None:
        """A peer is there; it will say how free it is."""
        self.peers.setdefault(peer, -math.inf)

    def heard(self, peer: Identity, steps: float) -> None:
        """A peer says how free it is."""
        self.peers[peer] = steps
        self.look = True

    def gone(self, peer: Identity) -> None:
        """A peer's life is over."""
        self.peers.pop(peer, None)
        self._refused.pop(peer, None)

    def news(self, steps: float) -> bool:
        """Whether peers are to be told of this freeness: it has doubled or halved, or is below the bound, or was."""
        band = math.frexp(max(1.0, steps))[1] if steps >= self.config.below_steps else -1 - (steps == -math.inf)
        if band == self._band:
            return False
        self._band = band
        return True

    def best(self, draining: bool) -> Identity | None:
        """Whom to ask: the freest that is free enough and has not refused just now; of equal ones the first by name."""
        bound = 0.0 if draining else float(self.config.above_steps)
        fit = [(-steps, peer) for peer, steps in self.peers.items() if steps > bound and peer not in self._refused]
        return min(fit)[1] if fit else None

    def takers(self) -> bool:
        """Whether there is a peer that does not drain itself."""
        return any(steps > -math.inf for steps in self.peers.values())

    def deadline(self) -> float | None:
        """When somebody who refused may be asked again."""
        return min(self._refused.values()) if self._refused and self.row is None else None

    def again(self, now: float) -> None:
        """Its time may have come."""
        for peer in [peer for peer, until in self._refused.items() if until <= now]:
            del self._refused[peer]
            self.look = True

    # The row.
    def victim(self, rows: Iterable[Row]) -> Row | None:
        """Of the rows that run the one to go, see above."""
        return min((row for row in rows if not (row.guest.shares or row.guest.cancelled)), key=_rank, default=None)

    def offer(self, row: Row, stored: int, sink: Identity, now: float) -> OfferRow:
        """Offer a row with so many tokens of KV."""
        self._count += 1
        guest, request = row.guest, row.request
        self.row, self.state, self.due, self._stages, self._sealed = row, State.OFFERED, False, 0, 0
        self.ticket = ticket = Ticket(self._me, self._count, 1, self._me, sink)
        prompt = len(request.prompt)
        self._most = min(stored + self.config.ahead_tokens, prompt + request.sampling.max_tokens - 1)
        left = replace(request, timeout_s=guest.deadline - now)
        generated, moves = stored - prompt + 1, guest.moves + 1
        message = OfferMigration(ticket, left, guest.ticket, generated, self._most, moves)
        return OfferRow(message, min(guest.deadline, now + self.config.deadline_s))

    def asked(self, key: str) -> bool:
        """The other side waits for an announcement; False if it is about a row that does not go any more."""
        if self.ticket is None or self.ticket.key != key or self.state is State.STOPPED:
            return False
        self.state, self.due = State.COPYING, True
        return True

    @property
    def copying(self) -> bool:
        """The other side has promised memory, and the row runs."""
        return self.state is State.COPYING

    def nearly_over(self, row: Row, stored: int) -> bool:
        """Whether a row with so many tokens of KV ends with the next one."""
        return stored >= len(row.request.prompt) + row.most - 1

    def left(self, stored: int) -> int:
        """Tokens that the row may still add, as memory was asked for no more."""
        return self._most - stored

    def stops(self, pages: int) -> bool:
        """The next announcement is due, and the row has so many full pages: whether it is to stop for the last one."""
        return self._stages >= self.config.max_stages or pages - self._sealed <= self.config.last_pages

    def sealed(self, pages: int) -> None:
        """So many pages are announced now."""
        self.due, self._sealed = False, pages
        self._stages += 1

    def stopped(self) -> None:
        """The row has stopped, and all of it is announced."""
        self.due, self.state = False, State.STOPPED

    def drop(self, reason: str) -> WithdrawRow:
        """The row ends, or has to leave its memory: it does not go."""
        assert self.ticket is not None
        withdraw = WithdrawRow(self.ticket.key, reason)
        self._over()
        self.stayed += 1
        return withdraw

    def ended(self, event: MoveEnded, now: float) -> Row | None:
        """It is over; returns the row, None if it was given up before."""
        row, ticket = self.row, self.ticket
        if ticket is None or ticket.key != event.key:
            return None
        if event.taken:
            self.given += 1
        else:
            self.stayed += 1
            if ticket.sink in self.peers:
                self._refused[ticket.sink] = now + self.config.retry_s
        self._over()
        return row

    def _over(self) -> None:
        self.row = self.ticket = None
        self.due, self.look = False, True

    def check(self) -> None:
        """Invariants."""
        assert (self.row is None) == (self.ticket is None)
        row = self.row
        if row is not None:
            assert row.place is (Place.MOVING if self.state is State.STOPPED else Place.RUNNING)
            assert not row.guest.shares
        assert not self.due or (row is not None and self.state is State.COPYING)
        assert self._refused.keys() <= self.peers.keys()


def _rank(row: Row) -> tuple[int, int, int]:
    return row.request.hints.priority, row.offset, -row.guest.order
