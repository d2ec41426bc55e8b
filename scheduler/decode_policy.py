"""What a decode worker does next: admit by memory, join, run, cut. Pure.

Decode is a standing order: `Run` names rows and a number of steps and ends in one `Ran`; `Cut` asks for an earlier
end. Tokens go to the gateway at every step without passing here (docs/architecture.md, "Decode").
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from core.errors import LocalError
from core.kv import KvShape
from core.messages import Cancel, Failed, Finished, First
from core.pages import Owner, Pages
from core.request import Request, Stage, Ticket
from core.worker import Identity


# Events.
@dataclass(frozen=True, slots=True)
class Asked:
    """A prefill worker asks for memory for a request."""

    ticket: Ticket
    request: Request


@dataclass(frozen=True, slots=True)
class KvArrived:
    """All of the prompt's KV is in the pages held under the ticket's key."""

    ticket: Ticket
    request: Request
    firsts: tuple[First, ...]
    """Of the continuations that go on here."""
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The hand-off ended without KV; what was promised is free again."""

    ticket: Ticket
    reason: str
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class GatewayGone:
    """A gateway died, and its requests with it."""

    identity: Identity


@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence ended: `generated` tokens in all, the first one included; a stop token is not counted."""

    key: str
    reason: str
    generated: int
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Ran:
    """A `Run` is over after `steps` steps."""

    run_id: int
    steps: int
    ended: tuple[Ended, ...] = ()


@dataclass(frozen=True, slots=True)
class RunFailed:
    """A `Run` ended in an exception of the engine; nothing is known of which row caused it."""

    run_id: int
    reason: str


# Commands.
@dataclass(frozen=True, slots=True)
class Answer:
    """Tell the sink whether memory was promised."""

    key: str
    granted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Join:
    """A sequence new to the engine: its prompt, its own sampling, its first token and its pages."""

    key: str
    ticket: Ticket
    request: Request
    first: First
    pages: tuple[int, ...]
    copied: tuple[int, int] | None = None
    """A page to be copied into another before, because it is shared and will be written."""


@dataclass(frozen=True, slots=True)
class Grow:
    """More pages for a running sequence."""

    key: str
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Decode `rows` for at most `steps` steps, ending early when one of them ends or after a `Cut`."""

    run_id: int
    rows: tuple[str, ...]
    joining: tuple[Join, ...]
    growing: tuple[Grow, ...]
    steps: int


@dataclass(frozen=True, slots=True)
class Cut:
    """End the run at the next step end."""

    run_id: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Forget a sequence at the engine."""

    key: str


@dataclass(frozen=True, slots=True)
class DropHandOff:
    """The sink should end this ticket; ends in `Withdrawn`."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to the ticket's gateway."""

    message: Finished | Failed


DecodeEvent = Asked | KvArrived | Withdrawn | Cancel | GatewayGone | Ran | RunFailed
DecodeCommand = Answer | Run | Cut | Leave | DropHandOff | Tell


class State(StrEnum):
    """Where a request is on a decode worker; those that run are counted by sequence."""

    WAITING = "waiting"
    """Asked; no memory yet."""
    PROMISED = "promised"
    JOINING = "joining"
    RUNNING = "running"


@dataclass(slots=True)
class _Row:
    """One continuation; its key names it at the engine and in the ledger."""

    key: str
    first: First
    request: Request
    shared: tuple[int, ...] = ()
    """Pages at the head of its table that it shares with its siblings."""
    running: bool = False
    cancelled: bool = False
    generated: int = 1
    joined_at: float = 0.0
    steps: int = 0

    @property
    def remaining(self) -> int:
        return self.request.sampling.max_tokens - self.generated


@dataclass(slots=True)
class _Guest:
    """One request: first a claim to memory, then its rows."""

    ticket: Ticket
    request: Request
    deadline: float
    asked_at: float
    state: State = State.WAITING
    """JOINING stands for all of its rows' states."""
    cancelled: bool = False
    report: bool = False
    """Its gateway waits for the stages."""
    arrived_at: float = 0.0
    stages: tuple[Stage, ...] = ()
    rows: dict[int, _Row] = field(default_factory=dict)
    """By branch."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Settings of a decode worker's policy."""

    max_rows: int = 64
    """Most sequences in one step."""
    max_steps: int = 16
    """Most steps in one Run."""


class DecodePolicy:
    """The running batch of one decode worker; at most one `Run` is out at a time.

    Admission promises room for the whole prompt and `max_tokens` of every continuation, in order of asking, so that a
    row that was admitted always finishes. Continuations of one prompt share its full pages.
    """

    def __init__(self, me: Identity, shape: KvShape, ledger: Pages, config: DecodeConfig) -> None:
        self._me = me
        self._shape = shape
        self._ledger = ledger
        self._config = config
        self._capacity = ledger.available
        self._guests: dict[str, _Guest] = {}
        self._batch: dict[str, tuple[_Guest, _Row]] = {}
        self._run_id = 0
        self._running = False
        self._cut = False
        self.ignored = 0
        """Messages about tickets we do not hold."""

    def queue(self) -> dict[State, int]:
        """Requests that wait, and sequences that join and run."""
        counts = dict.fromkeys(State, 0)
        counts[State.RUNNING] = len(self._batch)
        for guest in self._guests.values():
            counts[guest.state] += 1 if not guest.rows else sum(not row.running for row in guest.rows.values())
        return counts

    def on(self, event: DecodeEvent | None, now: float) -> list[DecodeCommand]:
        commands: list[DecodeCommand] = []
        match event:
            case None:
                for late in [guest for guest in self._guests.values() if guest.deadline <= now and not guest.cancelled]:
                    commands.append(Tell(Failed(late.ticket, "DEADLINE_EXCEEDED", f"ended while {self._where(late)}")))
                    commands += self._cancel(late, "deadline", now)
            case Asked(ticket, request):
                if ticket.key in self._guests:
                    raise LocalError(f"{ticket.key} was asked for twice")
                need = self._need(request)
                if ticket.source == self._me:  # its prompt is in this arena twice until it is handed over
                    need += self._shape.pages_for(len(request.prompt))
                if need > self._capacity:
                    return [Answer(ticket.key, False, f"needs {need} pages, the worker has {self._capacity}")]
                self._guests[ticket.key] = _Guest(ticket, request, now + request.timeout_s, now)
            case KvArrived():
                guest = self._guests.get(event.ticket.key)
                if guest is None:
                    self.ignored += 1
                    self._ledger.release(event.ticket.key)
                elif guest.state is not State.PROMISED:
                    raise LocalError(f"{event.ticket.key}: KV arrived while {self._where(guest)}")
                else:
                    self._arrived(guest, event, now)
                    if guest.cancelled:
                        commands += self._end_all(guest, now)
            case Withdrawn(ticket, reason, recompute):
                guest = self._guests.get(ticket.key)
                if guest is None:
                    self.ignored += 1
                elif guest.state is State.JOINING:
                    raise LocalError(f"{ticket.key}: withdrawn while {self._where(guest)}")
                else:
                    if recompute and not guest.cancelled:
                        commands.append(Tell(Failed(ticket, "DATA_LOSS", reason)))
                    self._forget(guest)
            case Cancel(ticket, reason, report, branch):
                guest = self._guests.get(ticket.key)
                if guest is None:
                    self.ignored += 1
                elif branch is None:
                    guest.report = report and not guest.cancelled and guest.state is State.JOINING
                    commands += self._cancel(guest, reason, now)
                elif branch in guest.rows:
                    guest.rows[branch].cancelled = True
                    commands += self._stop(guest, now)
            case GatewayGone(identity):
                mine = [guest for guest in self._guests.values() if guest.ticket.minter == identity]
                self.ignored += not mine
                for guest in mine:
                    commands += self._cancel(guest, "its gateway was lost", now)
            case Ran():
                commands += self._ran(event, now)
            case RunFailed(run_id, reason):
                commands += self._run_failed(run_id, reason, now)
        return commands + self._admit() + self._plan(now)

    def deadline(self) -> float | None:
        """Already past when the first in line has room, because somebody else in this arena freed memory."""
        head = self._head()
        if head is not None and self._need(head.request) <= self._ledger.available:
            return head.asked_at
        return min((guest.deadline for guest in self._guests.values() if not guest.cancelled), default=None)

    def check(self) -> None:
        self._ledger.check()
        assert self._running or not self._cut
        for key, (guest, row) in self._batch.items():
            assert key == row.key
            assert row.running
            assert guest.rows[row.first.branch] is row, "a running row was freed"
            assert self._guests[guest.ticket.key] is guest
        for key, guest in self._guests.items():
            assert key == guest.ticket.key
            assert (guest.state is State.JOINING) == bool(guest.rows)
            for row in guest.rows.values():
                assert row.running == (row.key in self._batch)
                tokens = len(row.request.prompt) + row.generated
                held = len(row.shared) + len(self._ledger.pages(row.key))
                assert held >= self._shape.pages_for(tokens - 1), "KV outgrew its pages"

    def _where(self, guest: _Guest) -> State:
        running = any(row.running for row in guest.rows.values())
        return State.RUNNING if running else guest.state

    def _need(self, request: Request) -> int:
        return self._shape.pages_for_branches(len(request.prompt), request.sampling.max_tokens, request.sampling.n)

    def _head(self) -> _Guest | None:
        """The first in line for memory."""
        waiting = (g for g in self._guests.values() if g.state is State.WAITING and not g.cancelled)
        return next(waiting, None)

    def _admit(self) -> list[DecodeCommand]:
        """Promise memory in order of asking; nobody is overtaken, so nobody starves."""
        commands: list[DecodeCommand] = []
        while (guest := self._head()) is not None:
            key, need = guest.ticket.key, self._need(guest.request)
            if need > self._ledger.available:
                break
            self._ledger.promise(key, need, Owner.PULLING)
            guest.state = State.PROMISED
            commands.append(Answer(key, True))
        return commands

    def _arrived(self, guest: _Guest, event: KvArrived, now: float) -> None:
        """Rows for what goes on: alone on the prompt's pages, or each with a share of them and a promise of its own."""
        key, request = guest.ticket.key, guest.request
        guest.state, guest.arrived_at, guest.stages = State.JOINING, now, event.stages
        if request.sampling.n == 1:
            (first,) = event.firsts
            guest.rows[first.branch] = _Row(key, first, request)
            return
        self._ledger.unpromise(key)
        full = len(request.prompt) // self._shape.page_tokens
        own = self._shape.pages_for(len(request.prompt) + request.sampling.max_tokens) - full
        for first in event.firsts:
            alone = replace(request, sampling=request.sampling.branch(first.branch))
            row = _Row(f"{key}/{first.branch}", first, alone, self._ledger.pages(key)[:full])
            guest.rows[first.branch] = row
            self._ledger.promise(row.key, own, Owner.DECODING)
            self._ledger.bind(row.key, self._shape.pages_for(len(request.prompt)) - full, Owner.DECODING)

    def _plan(self, now: float) -> list[DecodeCommand]:
        joiners = [
            (guest, row)
            for guest in self._guests.values()
            for row in guest.rows.values()
            if not (row.running or row.cancelled or guest.cancelled)
        ]
        room = self._config.max_rows - len(self._batch)
        if self._running:
            if joiners and room and not self._cut:
                self._cut = True
                return [Cut(self._run_id)]
            return []
        for guest, row in joiners[:room]:
            row.running, row.joined_at = True, now
            self._batch[row.key] = guest, row
        if not self._batch:
            return []
        steps = min(self._config.max_steps, *(row.remaining for _, row in self._batch.values()))
        fresh = {key: self._bind(row, steps) for key, (_, row) in self._batch.items()}
        joining = tuple(self._join(guest, row) for guest, row in joiners[:room])
        new = {join.key for join in joining}
        growing = tuple(Grow(key, pages) for key, pages in fresh.items() if pages and key not in new)
        self._run_id += 1
        self._running = True
        return [Run(self._run_id, tuple(self._batch), joining, growing, steps)]

    def _join(self, guest: _Guest, row: _Row) -> Join:
        """A row with siblings writes behind the prompt into a copy of the page that the prompt does not fill."""
        copied = None
        if row.key != guest.ticket.key and len(row.request.prompt) % self._shape.page_tokens:
            copied = self._ledger.pages(guest.ticket.key)[-1], self._ledger.pages(row.key)[0]
        return Join(row.key, guest.ticket, row.request, row.first, self._table(row), copied)

    def _table(self, row: _Row) -> tuple[int, ...]:
        return (*row.shared, *self._ledger.pages(row.key))

    def _bind(self, row: _Row, steps: int) -> tuple[int, ...]:
        """Pages for `steps` more tokens, out of the row's own promise."""
        tokens = len(row.request.prompt) + row.generated + steps - 1
        missing = self._shape.pages_for(tokens) - len(self._table(row))
        return self._ledger.bind(row.key, missing, Owner.DECODING) if missing > 0 else ()

    def _ran(self, event: Ran, now: float) -> list[DecodeCommand]:
        if not self._running or event.run_id != self._run_id:
            raise LocalError(f"ran: got run {event.run_id}, want {self._run_id}")
        self._running = self._cut = False
        commands: list[DecodeCommand] = []
        ended = {each.key: each for each in event.ended}
        for key, (guest, row) in list(self._batch.items()):
            row.generated += event.steps
            row.steps += event.steps
            wanted = not (guest.cancelled or row.cancelled)
            if key in ended and wanted:
                end = ended[key]
                stages, branch = self._stages(guest, row, now), row.first.branch
                finished = Finished(guest.ticket, end.reason, end.generated, end.stop_token_id, stages, branch, True)
                commands.append(Tell(finished))
            if key in ended or not wanted:
                commands += self._end(guest, row, now)
        return commands

    def _run_failed(self, run_id: int, reason: str, now: float) -> list[DecodeCommand]:
        """All rows are placed again by their gateways, which bound how often; the worker goes on."""
        if not self._running or run_id != self._run_id:
            raise LocalError(f"run failed: got run {run_id}, want {self._run_id}")
        self._running = self._cut = False
        commands: list[DecodeCommand] = []
        for guest in {guest.ticket.key: guest for guest, _ in self._batch.values()}.values():
            if not guest.cancelled:
                row = max(guest.rows.values(), key=lambda row: row.steps)
                why = f"the engine failed: {reason}"
                commands.append(Tell(Failed(guest.ticket, "ABORTED", why, self._stages(guest, row, now))))
                guest.cancelled = True
            commands += self._end_all(guest, now)
        return commands

    def _cancel(self, guest: _Guest, reason: str, now: float) -> list[DecodeCommand]:
        """Ask whatever works on the request to stop; it is freed when that has."""
        if guest.cancelled:
            return []
        guest.cancelled = True
        if guest.state is not State.JOINING:
            return [DropHandOff(guest.ticket.key, reason)]
        return self._stop(guest, now)

    def _stop(self, guest: _Guest, now: float) -> list[DecodeCommand]:
        """End the rows of a guest that are not wanted any more: those that run when their step is over."""
        commands: list[DecodeCommand] = []
        for row in list(guest.rows.values()):
            if not (row.cancelled or guest.cancelled):
                continue
            if not row.running:
                commands += self._end(guest, row, now)
            elif not self._cut:
                self._cut = True
                commands.append(Cut(self._run_id))
        return commands

    def _end_all(self, guest: _Guest, now: float) -> list[DecodeCommand]:
        return [command for row in list(guest.rows.values()) for command in self._end(guest, row, now)]

    def _end(self, guest: _Guest, row: _Row, now: float) -> list[DecodeCommand]:
        """Free a row, and with the last one all that is left of its request."""
        commands: list[DecodeCommand] = []
        if len(guest.rows) == 1 and guest.report:
            stages = self._stages(guest, row, now)
            report = Finished(guest.ticket, "cancelled", row.generated, None, stages, row.first.branch, True)
            commands.append(Tell(report))
        del guest.rows[row.first.branch]
        self._ledger.release(row.key)
        if self._batch.pop(row.key, None) is not None:
            commands.append(Leave(row.key))
        if not guest.rows:
            self._forget(guest)
        return commands

    def _forget(self, guest: _Guest) -> None:
        del self._guests[guest.ticket.key]
        self._ledger.release(guest.ticket.key)

    def _stages(self, guest: _Guest, row: _Row, now: float) -> tuple[Stage, ...]:
        if not row.running:
            return guest.stages
        return (
            *guest.stages,
            Stage("join_wait", self._me.name, row.joined_at - guest.arrived_at),
            Stage("decode", self._me.name, now - row.joined_at, {"steps": str(row.steps)}),
        )
