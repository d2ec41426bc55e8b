"""What a decode worker does next: admit by memory, join, run, cut, evict. Pure.

Decode is a standing order: `Run` names rows and a number of steps and ends in one `Ran`; `Cut` asks for an earlier
end. Tokens go to the gateway at every step without passing here (docs/architecture.md, "Decode").

Decisions fall at *decision points*: whenever no order is out, and when an order ends because a sequence did, because it
was cut, or because the horizon is used up. The horizon is the step at which a decision may change by itself: the
earliest predicted end, or the end of the memory that is set aside. An order that ends before is continued, and nothing
else happens; what is answered while an order is out goes by the state of the last decision point. So the length of
orders, `max_steps`, changes no decision.

Memory is promised in order of asking, between tenants in turn (`scheduler/fair.py`), by one of the two rules of
`scheduler/past_future.py`, and to no more rows than a step may have: who has a promise has a place in a step, too.
Where lengths are forecast, memory runs out in ordinary life. Then, in this order: pins of sessions end (for a new
promise, too); requests whose KV is not on its way yet lose their promise, newest first; requests that run or wait to
join are *retired*, newest first, into host memory or to be computed again, whichever the cost model says is shorter
(FastSwitch swaps, others recompute). Nothing is promised to anybody while a retired row waits. The oldest request that
has memory is never retired, and the oldest that runs only for an older one that is to join: so there always is one that
takes part in every order until its end, and no livelock.

While several tenants come, one that had more than its share lately is promised nothing of the last `spare` of rows and
memory, so that others, who come seldom, find some at once: any wait for a row to end is longer than a gap.

Those of the batch class (`Slo.batch`) have what others leave. They are promised memory when nobody else waits for any,
while all claims stay below `batch_share` of it and all rows within the most that a step may have and the gaps that were
promised. Their rows join when nobody else waits to, and a row that is to join has the newest of them stop, which keeps
its pages and goes on later. If memory is short they are the first to give it back, newest first: their gateways place
them again, with the tokens so far.

Who is to be alone in its steps (`Request.alone`) is in no batch. It is promised all the memory that it may need, so
that nothing is ever taken from it, and its orders and the batch's take turns of `TURN_STEPS` steps, the oldest such
request first: neither waits longer for the other.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from core.errors import LocalError
from core.kv import KvShape
from core.messages import Cancel, Failed, Finished, Freeness
from core.pages import Owner, Pages
from core.request import Request, Stage, Ticket
from core.standing import Standing
from core.worker import Identity
from scheduler.budgets import gap_left
from scheduler.cost import CostModel, Repriced
from scheduler.decode_events import (
    Answer,
    Asked,
    Cut,
    DecodeCommand,
    DecodeEvent,
    Drain,
    DropHandOff,
    Ended,
    Evict,
    GatewayCame,
    GatewayGone,
    Join,
    KvArrived,
    Leave,
    MoveAsked,
    MoveEnded,
    PeerCame,
    PeerGone,
    Ran,
    Run,
    RunFailed,
    SwapIn,
    SwapOut,
    SwappedIn,
    SwappedOut,
    Tell,
    Withdrawn,
)
from scheduler.decode_memory import Memory
from scheduler.decode_retired import Retired
from scheduler.decode_rows import RETIRED, Batch, Guest, Place, Row, State
from scheduler.fair import OUTPUT, Queue, Shares
from scheduler.forecast import Forecast
from scheduler.pace import Pace
from scheduler.past_future import Admission, Claim, PastFuture, WorstCase
from scheduler.pins import PinConfig, Pins

TURN_STEPS = 4
"""In one order, as long as somebody is to be alone in its steps and others run."""
PIN = "decode/"
"""Before a session in the names of our pins: others in this arena may pin it, too."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Settings of a decode worker's policy."""

    max_rows: int = 64
    """Most sequences in one step."""
    max_steps: int = 16
    """Most steps in one Run."""
    ahead_pages: int = 16
    """Pages that a growing row gets at once, as long as there is one available for every row."""
    admission: Literal["worst_case", "past_future"] = "worst_case"
    """Which rule of `scheduler/past_future.py`."""
    forecast_by: Literal["", "group", "tenant"] = ""
    """Which of a request's hints names the history that its length is forecast from; empty: one history for all."""
    gap_share: float = 1.0
    """Share of the smallest promised gap that a step may take, as the cost model predicts it; without one no cap."""
    weights: tuple[tuple[str, float], ...] = ()
    """Of tenants, by name, in turns for memory; 1 for each other."""
    spare: float = 0.03
    """Share of rows and memory that a tenant above its share leaves to others."""
    gap_quantile: float = 0.5
    """The step's time is taken to be as long as this share of the cost model's own errors allow."""
    host_pages: int = 0
    """Pages of host memory to swap to; 0: rows are always computed again."""
    batch_share: float = 0.8
    """Share of the memory up to which requests of the batch class are promised some."""
    host_lane: str = "host"
    """Name of the cost model's lane to host memory and back."""
    pins: PinConfig = field(default=PinConfig())
    """How long a session's KV is kept for its next turn, where the prompt's pages have names (`Request.prefix`); what
    is not pinned is kept until its memory is wanted."""


class DecodePolicy:
    """The running batch of one decode worker; at most one `Run` is out at a time.

    Continuations of one prompt share its full pages. Without a `forecast` of lengths past_future starts with an empty
    one; without `cost` no promise of gaps is kept, and whatever fits into host memory is swapped.
    """

    def __init__(
        self,
        me: Identity,
        shape: KvShape,
        ledger: Pages,
        config: DecodeConfig,
        cost: CostModel | None = None,
        forecast: Forecast | None = None,
    ) -> None:
        self._me = me
        self._shape = shape
        self._ledger = ledger
        self._config = config
        self._cost = cost
        self._capacity = ledger.total
        self._forecasts = config.admission == "past_future"
        self.forecast = forecast or Forecast()
        self._batch = Batch(shape.page_tokens)
        admission: Admission = PastFuture(shape.page_tokens) if self._forecasts else WorstCase(shape.page_tokens)
        self._admission = admission
        self._memory = Memory(shape, ledger, self._batch, admission, config.ahead_pages)
        self._pace = Pace(cost, config.gap_share, config.gap_quantile)
        """Of the batch."""
        self._crowd = Pace(cost, config.gap_share, config.gap_quantile)
        """Of all who were promised memory."""
        self._pins = Pins(config.pins)
        self._guests: dict[str, Guest] = {}
        self._lost_gateways: dict[str, Identity] = {}
        """The last life of each gateway that was lost: who still asks for its requests has not heard of it yet."""
        self._asked = 0
        self._waiting: Queue[Guest] = Queue(dict(config.weights))
        """Those that do not wait any more are dropped when they come first."""
        self._joiners: deque[Row] = deque()
        """In order of arrival, those that were retired before all others; likewise."""
        self._shares = Shares(dict(config.weights))
        """Of what was promised."""
        self._lane: deque[Guest] = deque()
        """Of the batch class, in order of asking; likewise."""
        self._idlers: deque[Row] = deque()
        """Of the batch class, as `_joiners`; first those that stopped last."""
        self._lent: dict[str, Row] = {}
        """Running rows of the batch class, in order of joining."""
        self._lent_rows = 0
        """Of all of the batch class that were promised memory,"""
        self._lent_tokens = 0
        """and what they will attend to on average."""
        self._wanted = False
        """Somebody waits for memory that those of the batch class have."""
        self._now = 0.0
        """Of the last decision point."""
        self._fresh: list[Row] = []
        """Of the batch, those that no order has named yet."""
        self._retired = Retired(shape, ledger, config.host_pages, config.host_lane)
        self._deadlines: list[tuple[float, int, Guest]] = []
        """A heap; guests that are cancelled or gone are dropped when they come first."""
        self._ends: list[tuple[int, int, Row]] = []
        """A heap of the steps at which rows will probably end; stale if the row has another by now."""
        self._ties = 0
        self._unwanted: list[Row] = []
        """Running rows that leave at the end of the order."""
        self._alone: deque[Row] = deque()
        """Those that share no order, in order of arrival."""
        self._solo: Row | None = None
        """Of these, the one whose order is out."""
        self._after_alone = False
        """The last order was such a one's: it is the batch's turn."""
        self._decided = 0
        """The step of the last decision point."""
        self._next_pages = 0
        """What all rows needed after one step from there."""
        self._coming = 0
        """Pages that will be free soon, because they are swapped out or their promise was revoked."""
        self._retest = False
        """Something changed since the first in line was refused."""
        self._short: tuple[int, float] | None = None
        """How many pages there were, ours and free ones, when somebody found them too few, and the time."""
        self._run_id = 0
        self._running = False
        self._cut = False
        self.draining = False
        """Takes nothing more."""
        self.ignored = 0
        """Messages about tickets we do not hold."""
        self.revoked = 0
        """Promises taken back because memory ran out."""
        self.evicted = 0
        """Rows whose KV was dropped because memory ran out."""
        self.swapped = 0
        """Rows that went to host memory."""
        self.recomputed_tokens = 0
        """Positions computed again."""
        self.stopped = 0
        """Times that a row of the batch class stopped for others."""
        self.yielded = 0
        """Requests of the batch class that gave their memory to others."""

    @property
    def admission(self) -> Admission:
        """The rule by which memory is promised, for whoever counts what it did."""
        return self._admission

    @property
    def host_pages(self) -> int:
        """In use in host memory."""
        return self._retired.pages

    def freeness(self) -> float:
        """Steps that the rows can take after the next before memory is used up, the first in line's prompt included.

        Llumnix (OSDI'24): free memory less what the head of the queue demands, by the rows that share it; below 0 where
        the first in line does not fit, and infinitely so for a worker that drains.
        """
        if self.draining:
            return -math.inf
        head = next((guest.pages for guest in self._waiting if self._waits(guest)), 0)
        pages = self._memory.room - self._next_pages - head
        return pages * self._shape.page_tokens / max(1, len(self._batch))

    def queue(self) -> dict[State, int]:
        """Requests that wait, and sequences that join, run and are retired."""
        counts = dict.fromkeys(State, 0)
        for guest in self._guests.values():
            if not guest.rows:
                counts[guest.state] += 1
            for row in guest.rows.values():
                counts[row.place.state] += 1
        return counts

    def standing(self) -> list[Standing]:
        """Of every request that waits for memory or KV, and every row."""
        both = (*self._waiting, *self._lane)
        line = {guest.key: place for place, guest in enumerate(g for g in both if self._waits(g))}
        standing = []
        for guest in self._guests.values():
            key, request = guest.ticket.key, guest.request
            for row in guest.rows.values():
                left, tokens = row.place.waits_for, row.generated(self._batch.step)
                where = "cancelled" if row.cancelled else row.place.state
                standing.append(Standing(key, request.id, where, guest.asked_at, guest.deadline, left, tokens=tokens))
            if not guest.rows:
                where = "cancelled" if guest.cancelled else guest.state
                left = self._waits_for(guest, line.get(guest.key))
                standing.append(Standing(key, request.id, where, guest.asked_at, guest.deadline, left))
        return standing

    def on(self, event: DecodeEvent | None, now: float) -> list[DecodeCommand]:
        commands: list[DecodeCommand] = []
        match event:
            case Ran():
                self._check_run(event.run_id)
                if self._solo is not None:
                    self._solo.generated_then += event.steps
                else:
                    self._batch.advance(event.steps)
                    if not (event.ended or self._cut or self._alone) and self._batch.step < self._memory.horizon:
                        return [self._order()]
                commands += self._ran(event.ended, now)
            case Asked():
                commands += self._ask(event, now)
            case KvArrived():
                commands += self._arrived(event, now)
            case None:
                self._retest = True
                while self._deadlines and self._deadlines[0][0] <= now:
                    late = heapq.heappop(self._deadlines)[2]
                    if not late.cancelled:
                        why = f"ended while {self._where(late)}"
                        if late.moving is None or late.rows:  # else who has the row says so
                            commands.append(Tell(Failed(late.ticket, "DEADLINE_EXCEEDED", why)))
                        commands += self._cancel(late, "deadline", now)
                for session in self._pins.over(now):
                    self._ledger.unpin(PIN + session)
            case Withdrawn():
                commands += self._withdrawn(event)
            case Cancel(ticket, reason, report, branch, prefix):
                guest = self._guests.get(ticket.key)
                if guest is None:
                    self.ignored += 1
                elif branch is None:
                    guest.report = report and not guest.cancelled and guest.state is State.JOINING
                    if prefix and not guest.cancelled:
                        guest.ended = self._shape.names(prefix, guest.request.prefix_page_tokens)
                    commands += self._cancel(guest, reason, now)
                elif branch in guest.rows:
                    guest.rows[branch].cancelled = True
                    commands += self._stop(guest, now)
            case GatewayCame(identity):
                self._lost_gateways.pop(identity.name, None)
            case GatewayGone(identity):
                self._lost_gateways[identity.name] = identity
                mine = [guest for guest in self._guests.values() if guest.ticket.minter == identity]
                self.ignored += not mine
                for guest in mine:
                    commands += self._cancel(guest, "its gateway was lost", now)
            case Drain():
                self.draining = True
                for guest in [guest for guest in (*self._waiting, *self._lane) if self._waits(guest)]:
                    commands.append(Answer(guest.key, False, "draining"))
                    self._forget(guest)
            case PeerCame() | PeerGone() | Freeness() | MoveAsked() | MoveEnded():
                pass  # scheduler/decode_migrating.py
            case RunFailed(run_id, reason):
                self._check_run(run_id)
                commands += self._run_failed(reason, now)
            case SwappedOut(key):
                commands += self._swapped_out(self._swapping(key, Place.LEAVING), now)
            case SwappedIn(key):
                commands += self._swapped_in(self._swapping(key, Place.RETURNING), now)
            case Repriced(cost):
                self._reprice(cost)
        if not self._running:
            return commands + self._decide(now)
        commands += self._admit(now)
        if not self._cut and self._would_gain():
            commands.append(self._cut_now())
        return commands

    def deadline(self) -> float | None:
        """Already past when memory may suffice that did not, because somebody else in this arena freed some."""
        if self._short is not None and self._memory.total > self._short[0]:
            return self._short[1]
        due = self._deadlines
        while due and due[0][2].cancelled:
            heapq.heappop(due)
        end = self._pins.deadline()
        if due and (end is None or due[0][0] < end):
            return due[0][0]
        return end

    def _reprice(self, cost: CostModel) -> None:
        """Who was refused or waits because of a gap may have what it asked for; a policy without a model keeps none."""
        if self._cost is not None:
            self._cost = cost
            self._pace.reprice(cost)
            self._crowd.reprice(cost)
            self._retest = True

    # Memory and who may have it.
    def _ask(self, event: Asked, now: float) -> list[DecodeCommand]:
        ticket, request = event.ticket, event.request
        key = ticket.key
        if key in self._guests:
            raise LocalError(f"{key} was asked for twice")
        prompt = len(request.prompt)
        pages = self._shape.pages_for(prompt)
        need = self._shape.pages_for_branches(prompt, request.sampling.max_tokens, request.sampling.n)
        if ticket.source == self._me:  # its prompt is in this arena twice until it is handed over
            need += pages
        if request.hints.session:
            self._pins.resume(request.hints.session, now)
        if (why := self._unwilling(ticket, need)) is not None:
            return [Answer(key, False, why)]
        self._asked += 1
        guest = Guest(ticket, request, key, self._asked, now + request.timeout_s, now, pages)
        guest.shares = request.sampling.n > 1
        if request.alone and not guest.shares:
            guest.alone = True
            guest.pages = self._shape.pages_for(prompt + request.sampling.max_tokens)
        self._guests[key] = guest
        guest.batch = request.slo.batch and ticket.source != self._me
        if guest.batch:
            self._lane.append(guest)
            is_next = len(self._lane) == 1
        else:
            guest.payer, _ = self._shares.offer(request.hints.tenant, now)
            is_next = self._waiting.append(guest, request.hints.tenant)
        heapq.heappush(self._deadlines, (guest.deadline, guest.order, guest))
        self._retest = self._retest or is_next
        return []

    def _unwilling(self, placed: Ticket, need: int) -> str | None:
        """Why nothing is promised now or later to a request of that gateway's ticket that needs so many pages."""
        if self.draining:
            return "draining"
        if need > self._capacity:
            return f"needs {need} pages, the worker has {self._capacity}"
        if self._lost_gateways and self._lost_gateways.get(placed.minter.name) == placed.minter:
            return "its gateway was lost"
        return None

    def _admit(self, now: float) -> list[DecodeCommand]:
        """Promise memory in order of asking within each tenant, in turn between them: nobody starves."""
        memory, waiting = self._memory, self._waiting
        memory.set_aside()
        if not self._retest:
            return []
        self._retest = False
        self._short = (memory.total, now) if self._retired or self._stalled() else None
        commands: list[DecodeCommand] = []
        while waiting and self._short is None:
            tenant, guest = self._turn()
            cost = 0
            if guest is None:
                self._short = memory.total, now
                break
            if not guest.cancelled:
                claim = self._claim_of(guest)
                gap_s, rows = guest.request.slo.gap_s, guest.request.sampling.n
                tokens = rows * (len(guest.request.prompt) + claim.left // 2)
                fits = guest.pages <= memory.free and memory.fits(claim, self._decided)
                if not fits and self._yield_pins(1):
                    continue
                if not fits and self._lent_rows and not self._wanted:
                    if (gone := self._give_way(now)) is not None:
                        commands += gone
                        self._foresee()
                        memory.set_aside()
                        continue
                    self._wanted = self._running
                    if not (self._wanted or self._coming):
                        commands += self._revoke(max(1, guest.pages - memory.free), lent=True)
                crowded = self._crowd.rows and self._crowd.rows + rows > self._config.max_rows
                if not fits or crowded or not self._crowd.allows(gap_s, tokens, rows):
                    self._short = memory.total, now
                    break
                self._admission.add(claim)
                memory.promise(guest.key, guest.pages)
                guest.state, guest.tokens = State.PROMISED, tokens
                self._crowd.add(gap_s, tokens, rows)
                commands.append(Answer(guest.key, True))
                cost = len(guest.request.prompt) + OUTPUT * rows * claim.left
                self._shares.add(guest.payer, cost, now)
            waiting.pop(tenant, cost)
        if self._lane and self._short is None:
            commands += self._lend(now)
        return commands

    def _turn(self) -> tuple[str, Guest | None]:
        """Who is promised memory next, of which tenant; none if all that wait are to leave what is spare to others."""
        for tenant, guest in self._waiting.firsts():
            if guest.cancelled or not self._shares.above(guest.payer) or self._leaves_spare(guest):
                return tenant, guest
        return "", None

    def _leaves_spare(self, guest: Guest) -> bool:
        """Whether there is room for it and still some for others; or it would be alone."""
        memory, crowd, config = self._memory, self._crowd, self._config
        if not crowd.rows:
            return True
        rows, spare = math.ceil(config.spare * config.max_rows), math.ceil(config.spare * memory.total)
        if crowd.rows + guest.request.sampling.n + rows > config.max_rows or guest.pages + spare > memory.free:
            return False
        return self._admission.fits(self._claim_of(guest), memory.total - spare, self._decided)

    # The batch class.
    def _lend(self, now: float) -> list[DecodeCommand]:
        """Promise memory that nobody else waits for, in order of asking."""
        commands: list[DecodeCommand] = []
        memory, lane = self._memory, self._lane
        while lane:
            guest = lane[0]
            if not guest.cancelled:
                claim, rows = self._claim_of(guest), guest.request.sampling.n
                tokens = rows * (len(guest.request.prompt) + claim.left // 2)
                room = int(self._config.batch_share * memory.total)
                taken = memory.total - memory.free  # not what is bound: rows may have pages early
                alone = not (self._crowd.rows or self._lent_rows)  # what is too large for its share has it all
                fits = guest.pages <= memory.free and (
                    memory.fits(claim, self._decided)
                    if alone
                    else taken + guest.pages <= room and self._admission.fits(claim, room, self._decided)
                )
                if not fits and alone and self._yield_pins(1):
                    continue
                lent_rows, lent_tokens = self._lent_rows + rows, self._lent_tokens + tokens
                crowded = self._crowd.rows + lent_rows > self._config.max_rows and not alone
                if not fits or crowded or not self._crowd.allows(0.0, lent_tokens, lent_rows):
                    self._short = memory.total, now
                    break
                self._admission.add(claim)
                memory.promise(guest.key, guest.pages)
                guest.state, guest.tokens = State.PROMISED, tokens
                self._lent_rows, self._lent_tokens = lent_rows, lent_tokens
                commands.append(Answer(guest.key, True))
            lane.popleft()
        return commands

    def _give_way(self, now: float) -> list[DecodeCommand] | None:
        """Take the memory of the newest of the batch class whose KV is here; None if nobody's can be had now."""
        if self._running or not self._lent_rows:
            return None
        for guest in reversed(self._guests.values()):
            if guest.batch and guest.rows and not guest.cancelled and not guest.alone:
                row = max(guest.rows.values(), key=lambda row: row.generated(self._batch.step))
                failed = Failed(guest.ticket, "ABORTED", "it gave its memory to others", self._stages(row, now))
                guest.cancelled = True
                self.yielded += 1
                commands: list[DecodeCommand] = [Tell(failed)]
                return commands + self._end_all(guest, now)
        return None

    def _stop_idler(self) -> list[DecodeCommand] | None:
        """The newest running row of the batch class stops, and keeps its pages; None if there is none."""
        if not self._lent:
            return None
        row = self._lent[next(reversed(self._lent))]
        commands = self._stays(row, "others are to join")
        self._memory.trim(row, self._batch.step)
        row.generated_then = row.generated(self._batch.step)
        self._leave_batch(row)
        self._admission.remove(row.key)
        self._admission.add(self._claim(row))
        row.place = Place.JOINING
        self._idlers.appendleft(row)
        self.stopped += 1
        if row.known:
            commands.append(Evict(row.key))
        return commands

    def _waits_for(self, guest: Guest, place: int | None) -> str:
        """Of one that has no rows; `place` in the line of those without memory."""
        if place is None:
            source = (guest.moving or guest).ticket.source.name
            return f"the end of its hand-off from {source}" if guest.cancelled else f"its KV from {source}"
        if place:
            return f"memory: {place} wait before it"
        free = self._memory.free
        if guest.pages > free:
            return f"memory: {guest.pages} pages, {max(free, 0)} are free"
        left = guest.request.sampling.n * self._left(guest.request, 1)
        gaps = ", or the gaps that were promised" if self._cost is not None else ""
        return f"memory: {guest.pages} pages now and for {left} tokens to come, beside all that was promised{gaps}"

    def _yield_pins(self, pages: int) -> bool:
        """Have so many pages more, as far as pins have them, least recent first; whether there was a pin."""
        yielded = self._ledger.yield_pins(pages) if self._ledger.pinned else ()
        for name in yielded:
            self._pins.forget(name.removeprefix(PIN))
        return bool(yielded)

    def _keep(self, row: Row, prefix: tuple[int, ...], now: float) -> None:
        """A turn is over: give the full pages of prompt and answer their names, and keep them for its session.

        The newest token has no KV yet. Continuations share the head of their tables and are not named. Hashes that do
        not go on from the prompt's are of no use: nobody who asks for them would come by here.
        """
        request, hints = row.request, row.request.hints
        known = self._shape.names(request.prefix, request.prefix_page_tokens)
        session = hints.session if self._config.pins.most_s > 0 else ""
        if not (prefix or session) or not known or row.key != row.guest.key:
            return
        named = row.own // self._shape.page_tokens
        if prefix[:named] != known[:named]:
            prefix = known[:named]
        prefix = prefix[: (row.own + row.steps(self._batch.step)) // self._shape.page_tokens]
        self._ledger.name(row.key, prefix)
        if session:
            self._ledger.pin(PIN + session, prefix)
            self._pins.pause(session, hints.tool, now)

    def _waits(self, guest: Guest) -> bool:
        return guest.state is State.WAITING and not guest.cancelled

    def _stalled(self) -> bool:
        """Rows that have no page for the next step, and nobody whose memory may be taken at once."""
        return not self._running and bool(self._batch.rows) and self._memory.horizon == self._batch.step

    def _claim_of(self, guest: Guest) -> Claim:
        """All of a request, as if it joined now."""
        request = guest.request
        if guest.alone:
            return Claim(guest.key, 0, self._decided, 1, 0, guest.pages)
        own, fixed = len(request.prompt), 0
        if guest.shares:
            own, fixed = own % self._shape.page_tokens, guest.pages
        left = self._left(request, 1)
        return Claim(guest.key, own + 1, self._decided, left, request.sampling.n, fixed)

    def _claim(self, row: Row, fixed: int = 0) -> Claim:
        """A row, at the last decision point."""
        generated = row.generated(self._decided)
        return Claim(row.key, row.own + generated, self._decided, self._left(row.request, generated), 1, fixed)

    def _left(self, request: Request, generated: int) -> int:
        """How many tokens a row will probably add, at least 1; earlier attempts count as part of its text."""
        most = request.sampling.max_tokens
        if self._forecasts:
            before = request.generated
            most = self.forecast.length(before + generated, before + most, self._history(request)) - before
        return max(1, most - generated)

    def _history(self, request: Request) -> str:
        match self._config.forecast_by:
            case "group":
                return request.hints.group
            case "tenant":
                return request.hints.tenant
            case "":
                return ""

    # The batch.
    def _decide(self, now: float) -> list[DecodeCommand]:
        """This is a decision point: forecast, make room, let rows join, find the horizon, promise, run."""
        batch, memory = self._batch, self._memory
        self._decided = batch.step
        self._retest, self._wanted, self._now = True, False, now
        commands = self._make_room()
        self._next_pages = batch.needed(1)
        if self._retired:
            self._foresee()
            commands += self._bring_back(now)
        if self._join_all(now, commands):
            commands += self._make_room()
        self._foresee()
        commands += self._offers(now)
        commands += self._admit(now)
        if self._alone and not (self._after_alone and batch.step < memory.horizon):
            commands.append(self._order_alone(now))
        elif batch.step < memory.horizon:
            commands.append(self._order())
        return commands

    def _foresee(self) -> None:
        """Find the horizon, and who outlived what was predicted."""
        batch, ends = self._batch, self._ends
        self._next_pages = batch.needed(1)
        if not batch.rows:
            ends.clear()
            self._memory.plan(0)
            return
        while ends[0][2].place is not Place.RUNNING or ends[0][2].end != ends[0][0] or ends[0][0] <= batch.step:
            end, _, row = heapq.heappop(ends)
            if row.place is Place.RUNNING and row.end == end:
                self._expect(row)
        self._memory.plan(self._until(ends[0][0] - batch.step))

    def _expect(self, row: Row) -> None:
        """Say anew how long a running row will be."""
        claim = self._claim(row)
        self._admission.remove(row.key)
        self._admission.add(claim)
        row.end = claim.step + claim.left
        if row.guest.ends_by:
            context = self._context(row)
            self._pace.remove(row.gap_s, context)
            row.gap_s = gap_left(row.guest.ends_by - self._now, claim.left)
            self._pace.add(row.gap_s, context)
        self._ties += 1
        heapq.heappush(self._ends, (row.end, self._ties, row))

    # What a policy that moves rows adds (scheduler/decode_migrating.py).
    def _would_gain(self) -> bool:
        """Whether something would be decided if the order ended now."""
        if not self._lent:
            return self._may_join()
        return self._wanted or self._may_join() or (bool(self._joiners) and self._first_joiner() is not None)

    def _offers(self, now: float) -> list[DecodeCommand]:
        """At a decision point, when the batch is known."""
        return []

    def _until(self, limit: int) -> int:
        """Steps until the next decision is due, `limit` at most; memory may bring it earlier."""
        return limit

    def _stays(self, row: Row, why: str) -> list[DecodeCommand]:
        """A row ends or loses its memory."""
        return []

    def _first_joiner(self) -> Row | None:
        joiners = self._joiners
        if not joiners:
            return None
        while joiners and joiners[0].place is not Place.JOINING:
            joiners.popleft()
        return joiners[0] if joiners else None

    def _may_join(self) -> bool:
        """Whether the first joiner would join if the order ended now; without one, the first of the batch class."""
        rows = self._batch.rows
        if not (self._joiners or self._idlers) or len(rows) >= self._config.max_rows:
            return False
        row = self._first_joiner() or self._first_idler()
        if row is None:
            return False
        if not rows:
            return True
        pages = self._shape.pages_for(row.own + row.generated_then)
        if self._next_pages + pages > self._memory.room + row.bound:
            return False
        return self._paced(row)

    def _paced(self, row: Row) -> bool:
        """Whether all gaps stay as promised with a row more in the batch."""
        context = len(row.request.prompt) + row.generated_then - self._decided
        return self._pace.allows(row.gap_s, context, 1, self._decided)

    def _first_idler(self) -> Row | None:
        idlers = self._idlers
        while idlers and idlers[0].place is not Place.JOINING:
            idlers.popleft()
        return idlers[0] if idlers else None

    def _join_all(self, now: float, commands: list[DecodeCommand]) -> bool:
        """Who can, joins; whether anybody did. Rows of the batch class stop for others."""
        joined = False
        while True:
            if self._may_join():
                self._enter(self._joiners.popleft() if self._joiners else self._idlers.popleft(), now)
                joined = True
                continue
            stopped = self._stop_idler() if self._lent and self._first_joiner() is not None else None
            if stopped is None:
                return joined
            commands += stopped

    def _enter(self, row: Row, now: float) -> None:
        """A row joins the batch; the next order names it."""
        batch = self._batch
        row.place = Place.RUNNING
        if not row.known:
            row.joined_at = now
        batch.add(row)
        if row.guest.batch:
            self._lent[row.key] = row
        self._pace.add(row.gap_s, self._context(row))
        self._next_pages += batch.need(row, batch.step + 1)
        self._expect(row)
        self._fresh.append(row)

    def _order(self) -> Run:
        """The next order: for `max_steps`, or until the horizon."""
        batch = self._batch
        steps = min(self._config.max_steps, self._memory.horizon - batch.step)
        self._after_alone = False
        if self._alone:
            steps = min(steps, TURN_STEPS)
        growing = self._memory.grow(batch.step + steps, {row.key for row in self._fresh} if self._fresh else ())
        joining = tuple([self._join(row) for row in self._fresh])
        self._fresh.clear()
        self._run_id += 1
        self._running = True
        return Run(self._run_id, batch.keys, joining, growing, steps)

    def _order_alone(self, now: float) -> Run:
        """The next order of the first that shares none."""
        row = self._alone[0]
        steps = min(self._config.max_steps, row.most - row.generated_then)
        if self._batch.rows:
            steps = min(steps, TURN_STEPS)
        joining: tuple[Join, ...] = ()
        if not row.known:
            row.joined_at, joining = now, (self._join(row),)
        self._run_id += 1
        self._running, self._solo, self._after_alone = True, row, True
        return Run(self._run_id, (row.key,), joining, (), steps)

    def _join(self, row: Row) -> Join:
        """A row with siblings writes behind the prompt into a copy of the page that the prompt does not fill."""
        guest, table = row.guest, self._ledger.pages(row.key)
        copied = again = None
        if guest.shares:
            prompt = self._ledger.pages(guest.key)
            if len(prompt) > row.shared and not (row.known or row.lost):
                copied = prompt[-1], table[0]
            table = prompt[: row.shared] + table
        if row.lost:
            start = 0 if guest.lost else row.shared * self._shape.page_tokens
            again = start, len(row.request.prompt) + row.generated_then - 1
            row.lost = guest.lost = False
            self.recomputed_tokens += again[1] - again[0]
        carried = None if row.known else row.carried
        row.known = True
        return Join(row.key, guest.ticket, row.request, row.first, table, copied, row.generated_then, again, carried)

    # When memory runs out.
    def _make_room(self) -> list[DecodeCommand]:
        """Have a page for every row that needs one for the next step, or wait for what will be free soon."""
        commands: list[DecodeCommand] = []
        batch = self._batch
        while batch.rows and (short := batch.needed(1) - self._memory.room - self._coming) > 0:
            if self._yield_pins(short):
                continue
            if (gone := self._give_way(self._now)) is not None:
                commands += gone
                continue
            revoked = self._revoke(short, lent=True) or self._revoke(short)
            victim = None if revoked else self._victim()
            if not revoked and victim is None:
                break
            commands += self._retire(victim) if victim else revoked
        return commands

    def _revoke(self, short: int, *, lent: bool = False) -> list[DecodeCommand]:
        """Take promises back of which nothing was used yet, newest first, until `short` pages are to come; `lent`: of
        the batch class only."""
        commands: list[DecodeCommand] = []
        for guest in reversed(self._guests.values()):
            if short <= 0:
                break
            unused = guest.state is State.PROMISED and not self._ledger.count(guest.key)
            if unused and not (guest.cancelled or guest.revoked) and (guest.batch or not lent):
                guest.revoked = True
                self.revoked += 1
                self._coming += guest.pages
                short -= guest.pages
                commands.append(DropHandOff(guest.key, "memory ran out"))
        return commands

    def _victim(self) -> Guest | None:
        """The newest request with pages to free that is newer than all that run; else than all that have memory."""
        running = [row.guest for row in self._batch.rows.values()]
        guests = [row.guest for row in (*self._batch.rows.values(), *self._joiners) if row.frees]
        newest = max(guests, key=lambda guest: guest.order, default=None)
        if newest is None:
            return None
        if newest.order > min(guest.order for guest in running):
            return newest
        oldest = min([guest.order for guest in self._guests.values() if guest.rows and not guest.retired])
        return newest if newest.order > oldest else None

    def _retire(self, guest: Guest) -> list[DecodeCommand]:
        """Take a request's rows out of memory; they wait for room in order of asking."""
        commands: list[DecodeCommand] = []
        for row in guest.rows.values():
            if row.place not in (Place.RUNNING, Place.JOINING):
                continue
            running = row.place is Place.RUNNING
            commands += self._stays(row, "memory ran out")
            if running:
                self._memory.trim(row, self._batch.step)
                row.generated_then = row.generated(self._batch.step)
                self._leave_batch(row)
            self._admission.remove(row.key)
            if row.lost or guest.shares or not self._retired.swaps(row, self._cost):
                row.place, row.lost = Place.EVICTED, True
                self.evicted += 1
                if running and row.known:
                    commands.append(Evict(row.key))
                self._memory.release(row.key, row.bound)
                row.bound = 0
            else:
                self.swapped += 1
                self._retired.leaves(row)
                self._coming += row.bound
                commands.append(SwapOut(row.key, self._ledger.pages(row.key)))
            self._retired.put(row)
        if guest.shares and all(row.place is Place.EVICTED for row in guest.rows.values()):
            self._release_shared(guest)
        return commands

    def _bring_back(self, now: float) -> list[DecodeCommand]:
        """Let retired rows have memory again, oldest first; alone on the worker one need not fit for long."""
        commands: list[DecodeCommand] = []
        batch, memory = self._batch, self._memory
        while self._retired and (row := self._retired.first).place is not Place.LEAVING:
            guest = row.guest
            shared = row.shared if guest.shares and not guest.pages else 0
            pages = shared + self._shape.pages_for(row.own + row.generated_then)
            alone = not (batch.rows or self._retired.returning or self._first_joiner())
            if not (alone or (len(batch) < self._config.max_rows and self._paced(row))):
                if (stopped := self._stop_idler()) is None:
                    break
                commands += stopped
                self._foresee()
                continue
            fits = alone or memory.fits(self._claim(row, shared), self._decided)
            if not fits or pages > memory.free:
                if fits and self._yield_pins(pages - memory.free):
                    continue
                if (gone := self._give_way(now)) is not None:
                    commands += gone
                    self._foresee()
                    continue
                if alone:
                    commands += self._revoke(pages - memory.free - self._coming)
                break
            self._retired.take(row)
            if shared:
                memory.bind(guest.key, shared)
                guest.pages = shared
                self._admission.add(Claim(guest.key, 0, self._decided, 1, 0, shared))
            self._admission.add(self._claim(row))
            if row.place is Place.AWAY:
                self._retired.returns(row)
                row.bound = self._shape.pages_for(row.own + row.generated_then - 1)
                commands.append(SwapIn(row.key, memory.bind(row.key, row.bound)))
            else:
                self._enter(row, now)
            self._foresee()
        return commands

    def _release_shared(self, guest: Guest) -> None:
        """None of its rows is left in memory."""
        if guest.pages:
            self._memory.release(guest.key, guest.pages)
            self._admission.remove(guest.key)
            guest.pages = 0
        guest.lost = True

    def _swapping(self, key: str, place: Place) -> Row:
        guest = self._guests.get(key)
        for row in guest.rows.values() if guest else ():
            if row.place is place:
                return row
        raise LocalError(f"{key}: swapped, but it is not {place}")

    def _swapped_out(self, row: Row, now: float) -> list[DecodeCommand]:
        self._coming -= row.bound
        row.place = Place.AWAY
        self._memory.release(row.key, row.bound)
        row.bound = 0
        return self._stop(row.guest, now)

    def _swapped_in(self, row: Row, now: float) -> list[DecodeCommand]:
        self._retired.is_back(row)
        row.place = Place.JOINING
        self._joiners.appendleft(row)
        return self._stop(row.guest, now)

    # From the arrival of KV to the end.
    def _arrived(self, event: KvArrived, now: float) -> list[DecodeCommand]:
        """Rows for what goes on: alone on the prompt's pages, or each with a share of them."""
        key = event.ticket.key
        guest = self._guests.get(key)
        if guest is None:
            self.ignored += 1
            self._ledger.release(key)
            return []
        if guest.state is not State.PROMISED:
            raise LocalError(f"{key}: KV arrived while {self._where(guest)}")
        if guest.revoked:
            guest.revoked = False
            self._coming -= guest.pages
        request = guest.request
        guest.state, guest.arrived_at, guest.stages = State.JOINING, now, event.stages
        if request.slo.deadline_s:
            guest.ends_by = now + max(0.0, request.slo.deadline_s - request.slo.ttft_s)
        if guest.shares:
            self._admission.remove(key)
            self._admission.add(Claim(key, 0, self._decided, 1, 0, guest.pages))
            shared, own = divmod(len(request.prompt), self._shape.page_tokens)
            for first in event.firsts:
                alone = replace(request, sampling=request.sampling.branch(first.branch))
                row = Row(f"{key}/{first.branch}", guest, alone, first, own, shared)
                guest.rows[first.branch] = row
                self._admission.add(self._claim(row))
        else:
            (first,) = event.firsts
            row = Row(key, guest, request, first, len(request.prompt), 0)
            row.bound = guest.pages
            guest.rows[first.branch] = row
            if guest.alone:
                self._ledger.bind(key, guest.pages - self._ledger.count(key), Owner.DECODING)
                row.place = Place.ALONE
                self._alone.append(row)
                return self._end_all(guest, now) if guest.cancelled else []
        (self._idlers if guest.batch else self._joiners).extend(guest.rows.values())
        return self._end_all(guest, now) if guest.cancelled else []

    def _withdrawn(self, event: Withdrawn) -> list[DecodeCommand]:
        guest = self._guests.get(event.ticket.key)
        if guest is None:
            self.ignored += 1
            return []
        if guest.state is State.JOINING:
            raise LocalError(f"{guest.key}: withdrawn while {self._where(guest)}")
        damaged = event.recompute and not guest.cancelled and guest.moving is None
        self._forget(guest)
        return [Tell(Failed(guest.ticket, "DATA_LOSS", event.reason))] if damaged else []

    def _ran(self, ended: Sequence[Ended], now: float) -> list[DecodeCommand]:
        """An order is over, and with it some rows."""
        solo = self._over()
        commands: list[DecodeCommand] = []
        for end in ended:
            row = self._batch.rows.get(end.key) if solo is None else solo
            if row is None or row.key != end.key:
                continue
            guest, request = row.guest, row.request
            self.forecast.learn(request.generated + end.generated, self._history(request))
            if not (guest.cancelled or row.cancelled):
                stages, branch = self._stages(row, now), row.first.branch
                finished = Finished(guest.ticket, end.reason, end.generated, end.stop_token_id, stages, branch, True)
                commands.append(Tell(finished))
                self._keep(row, end.prefix, now)
            commands += self._end(row, now, end.generated)
        return commands + self._end_unwanted(now)

    def _over(self) -> Row | None:
        """No order is out any more; whose alone it was."""
        solo, self._solo = self._solo, None
        self._running = self._cut = False
        return solo

    def _end_unwanted(self, now: float) -> list[DecodeCommand]:
        commands: list[DecodeCommand] = []
        for row in self._unwanted:
            if row.place in _ORDERED:
                commands += self._end(row, now)
        self._unwanted.clear()
        return commands

    def _run_failed(self, reason: str, now: float) -> list[DecodeCommand]:
        """All rows are placed again by their gateways, which count how often that happens to each; the worker goes
        on."""
        solo = self._over()
        rows = self._batch.rows.values() if solo is None else (solo,)
        commands: list[DecodeCommand] = []
        for guest in {row.guest.key: row.guest for row in rows}.values():
            if not guest.cancelled:
                row = max(guest.rows.values(), key=lambda row: row.generated(self._batch.step))
                why = f"the engine failed: {reason}"
                commands.append(Tell(Failed(guest.ticket, "INTERNAL", why, self._stages(row, now))))
                guest.cancelled = True
            commands += self._end_all(guest, now)
        return commands + self._end_unwanted(now)

    def _cut_now(self) -> Cut:
        self._cut = True
        return Cut(self._run_id)

    def _cancel(self, guest: Guest, reason: str, now: float) -> list[DecodeCommand]:
        """Ask whatever works on the request to stop; it is freed when that has."""
        if guest.cancelled:
            return []
        guest.cancelled = self._retest = True
        if guest.state is State.JOINING:
            return self._stop(guest, now)
        return [] if guest.revoked else [DropHandOff(guest.key, reason)]

    def _stop(self, guest: Guest, now: float) -> list[DecodeCommand]:
        """End the rows of a guest that are not wanted any more: those that run or are swapped when that is over."""
        commands: list[DecodeCommand] = []
        for row in list(guest.rows.values()):
            if not (row.cancelled or guest.cancelled) or row.place in (Place.LEAVING, Place.RETURNING):
                continue
            runs = row is self._solo or row.place is Place.RUNNING
            if not runs or not self._running:
                commands += self._end(row, now)
                continue
            self._unwanted.append(row)
            if not self._cut:
                commands.append(self._cut_now())
        return commands

    def _end_all(self, guest: Guest, now: float) -> list[DecodeCommand]:
        return [command for row in list(guest.rows.values()) for command in self._end(row, now)]

    def _end(self, row: Row, now: float, generated: int | None = None) -> list[DecodeCommand]:
        """Free a row, and with the last one all that is left of its request."""
        commands: list[DecodeCommand] = []
        guest = row.guest
        if guest.report and len(guest.rows) == 1:
            if generated is None:
                generated = row.generated(self._batch.step)
            stages, branch = self._stages(row, now), row.first.branch
            commands.append(Tell(Finished(guest.ticket, "cancelled", generated, None, stages, branch, True)))
        commands += self._stays(row, "ended")
        if guest.ended and row.place is Place.RUNNING:
            self._keep(row, guest.ended, now)
        del guest.rows[row.first.branch]
        if row.known or row.place is Place.AWAY:
            commands.append(Leave(row.key))
        if row.place is Place.RUNNING:
            self._leave_batch(row)
        elif row.place is Place.ALONE:
            self._alone.remove(row)
        if row.place in RETIRED:
            self._retired.take(row)
            self._retired.forget(row)
        else:
            self._admission.remove(row.key)
            self._memory.release(row.key, row.bound)
        row.place = Place.ENDED
        self._retest = True
        if not guest.rows:
            self._forget(guest)
        elif guest.shares and all(other.place is Place.EVICTED for other in guest.rows.values()):
            self._release_shared(guest)
        return commands

    def _forget(self, guest: Guest) -> None:
        """Also frees what was promised, or what its rows shared."""
        del self._guests[guest.key]
        if guest.state is not State.WAITING:
            if guest.batch:
                self._lent_rows -= guest.request.sampling.n
                self._lent_tokens -= guest.tokens
            else:
                self._crowd.remove(guest.request.slo.gap_s, guest.tokens, guest.request.sampling.n)
        if guest.state is State.PROMISED or (guest.state is State.JOINING and guest.shares and guest.pages):
            self._memory.release(guest.key, guest.pages)
            self._admission.remove(guest.key)
        if guest.revoked:
            self._coming -= guest.pages
        guest.cancelled = self._retest = True

    def _leave_batch(self, row: Row) -> None:
        self._batch.remove(row)
        self._pace.remove(row.gap_s, self._context(row))
        if row.guest.batch:
            del self._lent[row.key]
        if row in self._fresh:
            self._fresh.remove(row)

    def _context(self, row: Row) -> int:
        """Tokens that a running row attends to, less the worker's step."""
        return row.offset + 1 + row.shared * self._shape.page_tokens

    def _check_run(self, run_id: int) -> None:
        if not self._running or run_id != self._run_id:
            raise LocalError(f"order ended: got run {run_id}, want {self._run_id if self._running else 'none'}")

    def _where(self, guest: Guest) -> State:
        states = {row.place.state for row in guest.rows.values()}
        for state in (State.RUNNING, State.EVICTED):
            if state in states:
                return state
        return guest.state

    def _stages(self, row: Row, now: float) -> tuple[Stage, ...]:
        guest = row.guest
        if not row.known:
            return guest.stages
        steps = row.generated(self._batch.step) - (1 if row.carried is None else len(row.carried.tokens))
        return (
            *guest.stages,
            Stage("join_wait", self._me.name, row.joined_at - guest.arrived_at),
            Stage("decode", self._me.name, now - row.joined_at, {"steps": str(steps)}),
        )

    def check(self) -> None:
        """Slow."""
        batch = self._batch
        self._ledger.check()
        self._memory.check()
        assert self._running or not self._cut
        assert not self._running or batch.rows or self._solo is not None
        assert self._solo is None or (self._running and self._solo in self._alone)
        assert self._decided <= batch.step <= self._memory.horizon
        joiners = [row for row in (*self._joiners, *self._idlers) if row.place is Place.JOINING]
        assert len(joiners) == len(set(joiners))
        rows = [row for guest in self._guests.values() for row in guest.rows.values()]
        at = {place: [row for row in rows if row.place is place] for place in Place}
        assert set(at[Place.RUNNING]) == set(batch.rows.values()), "a running row was freed"
        assert set(at[Place.JOINING]) == set(joiners)
        assert set(at[Place.ALONE]) == set(self._alone)
        assert all(row.guest.alone == (row.place is Place.ALONE) for row in rows), "one that is to be alone is not"
        self._retired.check(rows)
        own, coming, crowd = 0, sum(row.bound for row in at[Place.LEAVING]), 0
        due, waiting = {entry[2] for entry in self._deadlines}, {*self._waiting, *self._lane}
        assert set(self._lent.values()) == {row for row in at[Place.RUNNING] if row.guest.batch}
        assert not any(guest.batch for guest in self._waiting)
        assert all(guest.batch for guest in self._lane)
        lent = 0
        for key, guest in self._guests.items():
            assert key == guest.key == (guest.ticket if guest.moving is None else guest.moving.ticket).key
            assert (guest.state is State.JOINING) == bool(guest.rows)
            assert guest.cancelled or guest in due
            assert not guest.revoked or guest.state is State.PROMISED
            if guest.state is State.WAITING:
                assert guest.cancelled or guest in waiting
            else:
                crowd += guest.request.sampling.n * (not guest.batch)
                lent += guest.request.sampling.n * guest.batch
                if guest.state is State.PROMISED or guest.shares:
                    own += guest.pages
                coming += guest.pages * guest.revoked
        for row in rows:
            assert row.guest.rows[row.first.branch] is row
            assert row.bound == (0 if row.place is Place.EVICTED else self._ledger.count(row.key))
            assert row.place is not Place.EVICTED or row.guest.shares or not self._ledger.count(row.key)
            own += row.bound
        assert lent == self._lent_rows
        assert (own, coming, crowd) == (self._memory.own, self._coming, self._crowd.rows)
        assert self._pace.rows == len(batch)


_ORDERED = (Place.RUNNING, Place.ALONE)
