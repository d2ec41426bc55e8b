"""A decode policy whose running rows may move to other decode workers, and theirs to it. Pure.

`DecodePolicy`, and what scheduler/migration.py decides: at a decision point a row is offered to a peer, its full pages
are announced, and at the end it is taken out of the batch and handed over. While it is copied it is a row like any
other: it may end, be cancelled, or lose its memory, and then it does not move. Admission by future memory comes first
(Past-Future), migration second (Llumnix), swapping or computing again last: so there is a decision point when freeness
falls below the bound, and not only when memory is used up.

A row that comes is admitted by the same rule as any request, but it does not wait: it has a place to be.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

from core.errors import LocalError
from core.kv import KvShape
from core.messages import Cancel, Failed, Freeness, Moved, OfferMigration
from core.pages import Pages
from core.worker import Identity
from scheduler.cost import CostModel
from scheduler.decode_events import (
    Answer,
    Asked,
    DecodeCommand,
    DecodeEvent,
    Drain,
    HandOver,
    KvArrived,
    MoveAsked,
    MoveEnded,
    PeerCame,
    PeerGone,
    SealRow,
    Tell,
    TellMoved,
    TellPeer,
)
from scheduler.decode_policy import DecodeConfig, DecodePolicy
from scheduler.decode_rows import Guest, Place, Row, State
from scheduler.forecast import Forecast
from scheduler.migration import Migration, MigrationConfig
from scheduler.past_future import Claim


class MigratingPolicy(DecodePolicy):
    """The running batch of a decode worker that gives one row at a time to a freer one, and takes rows of others."""

    def __init__(
        self,
        me: Identity,
        shape: KvShape,
        ledger: Pages,
        config: DecodeConfig,
        migration: MigrationConfig,
        cost: CostModel | None = None,
        forecast: Forecast | None = None,
    ) -> None:
        super().__init__(me, shape, ledger, config, cost, forecast)
        self.moves = Migration(me, migration)
        self._aliases: dict[str, str] = {}
        """Keys of guests that move or moved here, by those of their gateways' tickets."""

    def on(self, event: DecodeEvent | None, now: float) -> list[DecodeCommand]:
        moves = self.moves
        commands: list[DecodeCommand] = []
        match event:
            case None:
                moves.again(now)
            case Drain():
                moves.look = True
            case Cancel(ticket) if ticket.key not in self._guests:
                guest = self._guests.get(self._aliases.get(ticket.key, ""))
                if guest is not None and guest.moving is not None:
                    event = replace(event, ticket=guest.moving.ticket)
            case PeerCame(worker):
                moves.came(worker)
                commands.append(TellPeer(worker, Freeness(self._me, self.freeness())))
            case PeerGone(worker):
                moves.gone(worker)
            case Freeness(worker, steps):
                moves.heard(worker, steps)
            case MoveAsked(key):
                self.ignored += not moves.asked(key)
            case MoveEnded():
                commands += self._move_ended(event, now)
            case _:
                pass
        return commands + super().on(event, now)

    def deadline(self) -> float | None:
        due, again = super().deadline(), self.moves.deadline()
        if due is None or again is None:
            return again if due is None else due
        return min(due, again)

    def check(self) -> None:
        super().check()
        self.moves.check()
        rows = [row for guest in self._guests.values() for row in guest.rows.values()]
        assert all(row is self.moves.row for row in rows if row.place is Place.MOVING), "a row stands still for ever"
        assert self.moves.row is None or self.moves.row in rows
        moved = {guest.ticket.key: key for key, guest in self._guests.items() if guest.moving is not None}
        assert self._aliases == moved

    def giving(self) -> bool:
        """Whether a worker that drains still has something, and somebody who might take it."""
        return bool(self._guests) and (self.moves.row is not None or self.moves.takers())

    # Rows of ours that go.
    def _would_gain(self) -> bool:
        return super()._would_gain() or self._may_move()

    def _may_move(self) -> bool:
        """Whether a row that moves, or is to, would be the better for the end of the order now."""
        moves = self.moves
        if moves.row is not None or not moves.look:
            return moves.due
        moves.look = False
        return bool(self._batch.rows) and self._gives_to() is not None

    def _gives_to(self) -> Identity | None:
        """Whom a row should be offered to, if one should go."""
        scarce = self.draining or self.freeness() < self.moves.config.below_steps
        return self.moves.best(self.draining) if scarce else None

    def _decide(self, now: float) -> list[DecodeCommand]:
        self._decided = self._batch.step
        commands = self._give(now) + super()._decide(now)
        free = self.freeness()
        if self.moves.news(free):
            commands += [TellPeer(peer, Freeness(self._me, free)) for peer in self.moves.peers]
        return commands

    def _offers(self, now: float) -> list[DecodeCommand]:
        """Ask somebody to go on with a row, if one is to go."""
        moves = self.moves
        sink = self._gives_to() if moves.row is None else None
        row = moves.victim(self._batch.rows.values()) if sink is not None else None
        if row is None or sink is None or moves.nearly_over(row, self._stored(row)):
            return []
        offer = moves.offer(row, self._stored(row), sink, now)
        self._foresee()
        return [offer]

    def _until(self, limit: int) -> int:
        """Decide again when the row that moves has all that memory was asked for, or when freeness gets low."""
        row, below = self.moves.row, self.moves.config.below_steps
        if row is None:
            within = self._batch.steps_within(self._memory.room)
            return min(limit, within - below) if within > below else limit
        return min(limit, max(1, self.moves.left(self._stored(row)))) if row.place is Place.RUNNING else limit

    def _give(self, now: float) -> list[DecodeCommand]:
        """The next announcement of the row that moves, if it is due; the last one as it stops."""
        moves = self.moves
        row, ticket = moves.row, moves.ticket
        if row is None or ticket is None or row.place is not Place.RUNNING:
            return []
        stored, page_tokens = self._stored(row), self._shape.page_tokens
        if moves.left(stored) <= 0 and not moves.copying:
            return [moves.drop("nobody answered in time")]
        if moves.left(stored) > 0:
            if not moves.due:
                return []
            pages = stored // page_tokens
            if not moves.stops(pages):
                moves.sealed(pages)
                return [SealRow(ticket.key, self._ledger.pages(row.key)[:pages], pages * page_tokens)]
        if not row.known:
            return []  # no order has named it yet: whoever runs the engine has nothing of it to give
        self._memory.trim(row, self._batch.step)
        stages = self._stages(row, now)
        row.generated_then = row.generated(self._batch.step)
        self._leave_batch(row)
        row.place = Place.MOVING
        self._admission.remove(row.key)
        self._admission.add(self._claim(row))
        moves.stopped()
        return [HandOver(row.key, ticket.key, self._ledger.pages(row.key), stored, stages)]

    def _stored(self, row: Row) -> int:
        """Tokens of a running row that have KV."""
        return row.own + row.generated(self._batch.step) - 1

    def _stays(self, row: Row, why: str) -> list[DecodeCommand]:
        return [self.moves.drop(why)] if row is self.moves.row else []

    def _move_ended(self, event: MoveEnded, now: float) -> list[DecodeCommand]:
        """The row is gone, goes on here, or is given up."""
        ticket, row = self.moves.ticket, self.moves.ended(event, now)
        if row is None or ticket is None or row.place is not Place.MOVING:
            return []
        guest = row.guest
        if event.taken:
            # Its new worker says so, too; but should that be lost now, nobody else would know where it was.
            moved = Moved(replace(guest.ticket, sink=ticket.sink), guest.moves + 1)
            return [TellMoved(moved), *self._end(row, now)]
        if event.sure:
            row.place = Place.JOINING
            self._joiners.appendleft(row)
            return []
        why = f"lost on its way to {ticket.sink.name}: {event.reason}"
        failed = Tell(Failed(guest.ticket, "ABORTED", why, self._stages(row, now)))
        guest.cancelled = True
        return [failed, *self._end(row, now)]

    # Rows of others that come.
    def _ask(self, event: Asked, now: float) -> list[DecodeCommand]:
        offer = event.offer
        return super()._ask(event, now) if offer is None else self._ask_to_move(event, offer, now)

    def _ask_to_move(self, event: Asked, offer: OfferMigration, now: float) -> list[DecodeCommand]:
        """Promise memory for a row of another worker, or refuse."""
        ticket, request = event.ticket, event.request
        key = ticket.key
        if key in self._guests:
            raise LocalError(f"{key} was asked for twice")
        need = self._shape.pages_for(len(request.prompt) + request.sampling.max_tokens)
        if (why := self._unwilling(offer.placed, need)) is not None:
            return [Answer(key, False, why)]
        if self._retired or self._stalled() or any(map(self._waits, self._waiting)):
            return [Answer(key, False, "others wait for memory")]
        self._asked += 1
        pages = self._shape.pages_for(offer.most)
        placed = replace(offer.placed, sink=self._me)
        guest = Guest(placed, request, key, self._asked, now + request.timeout_s, now, pages)
        guest.moving, guest.moves = offer, offer.moves
        self._guests[key] = guest
        self._aliases[placed.key] = key
        self._waiting.append(guest, request.hints.tenant)
        heapq.heappush(self._deadlines, (guest.deadline, guest.order, guest))
        self._retest = True
        commands = self._admit(now)
        if guest.state is State.WAITING:
            self._short = None
            self._forget(guest)
            commands.append(Answer(key, False, "no memory for it"))
        return commands

    def _claim_of(self, guest: Guest) -> Claim:
        if guest.moving is None:
            return super()._claim_of(guest)
        generated = guest.moving.generated
        left = self._left(guest.request, generated)
        return Claim(guest.key, len(guest.request.prompt) + generated, self._decided, left)

    def _arrived(self, event: KvArrived, now: float) -> list[DecodeCommand]:
        guest, carried = self._guests.get(event.ticket.key), event.carried
        if guest is None or guest.moving is None:
            return super()._arrived(event, now)
        if carried is None or guest.state is not State.PROMISED:
            raise LocalError(f"{guest.key}: a row arrived while {self._where(guest)}, with {carried}")
        if guest.revoked:
            guest.revoked = False
            self._coming -= guest.pages
        (first,) = event.firsts
        row = guest.rows[first.branch] = Row(guest.key, guest, guest.request, first, len(guest.request.prompt), 0)
        row.generated_then, row.carried = len(carried.tokens), carried
        row.bound = self._ledger.count(guest.key)
        self._ledger.unpromise(guest.key)
        self._memory.own -= guest.pages - row.bound
        guest.pages, guest.state, guest.arrived_at = row.bound, State.JOINING, now
        guest.stages = (*carried.stages, *event.stages)
        self._admission.remove(row.key)
        self._admission.add(self._claim(row))
        if guest.cancelled:
            return self._end_all(guest, now)
        self._joiners.appendleft(row)
        return [TellMoved(Moved(guest.ticket, guest.moves))]

    def _forget(self, guest: Guest) -> None:
        super()._forget(guest)
        if guest.moving is not None:
            del self._aliases[guest.ticket.key]
