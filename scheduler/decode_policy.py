"""What a decode worker does next: admit by memory, join, run, cut. Pure.

Decode is a standing order: `Run` names rows and a number of steps and ends in one `Ran`; `Cut` asks for an earlier
end. Tokens go to the gateway at every step without passing here (docs/architecture.md, "Decode").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from core.errors import LocalError
from core.kv import KvShape
from core.messages import Cancel, Failed, Finished
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
    first_token: int
    stages: tuple[Stage, ...] = ()
    first_hash: int = 0


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
    """A sequence new to the engine: its prompt, the first token and its pages."""

    ticket: Ticket
    request: Request
    first_token: int
    pages: tuple[int, ...]
    first_hash: int = 0


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
    """Where a request is on a decode worker."""

    WAITING = "waiting"
    """Asked; no memory yet."""
    PROMISED = "promised"
    JOINING = "joining"
    RUNNING = "running"


@dataclass(slots=True)
class _Row:
    ticket: Ticket
    request: Request
    deadline: float
    asked_at: float
    state: State = State.WAITING
    first_token: int = 0
    first_hash: int = 0
    generated: int = 1
    cancelled: bool = False
    report: bool = False
    """Its gateway waits for the stages."""
    arrived_at: float = 0.0
    joined_at: float = 0.0
    steps: int = 0
    stages: list[Stage] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        return self.request.sampling.max_tokens - self.generated


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Settings of a decode worker's policy."""

    max_rows: int = 64
    """Most sequences in one step."""
    max_steps: int = 16
    """Most steps in one Run."""


class DecodePolicy:
    """The running batch of one decode worker; at most one `Run` is out at a time.

    Admission promises room for the whole prompt and `max_tokens`, in order of asking, so that a row that was
    admitted always finishes.
    """

    def __init__(self, me: Identity, shape: KvShape, ledger: Pages, config: DecodeConfig) -> None:
        self._me = me
        self._shape = shape
        self._ledger = ledger
        self._config = config
        self._capacity = ledger.available
        self._rows: dict[str, _Row] = {}
        self._batch: tuple[str, ...] = ()
        self._run_id = 0
        self._running = False
        self._cut = False
        self.ignored = 0
        """Messages about tickets we do not hold."""

    def queue(self) -> dict[State, int]:
        """Requests in each state."""
        counts = dict.fromkeys(State, 0)
        for row in self._rows.values():
            counts[row.state] += 1
        return counts

    def on(self, event: DecodeEvent | None, now: float) -> list[DecodeCommand]:
        commands: list[DecodeCommand] = []
        match event:
            case None:
                for late in [row for row in self._rows.values() if row.deadline <= now and not row.cancelled]:
                    commands.append(Tell(Failed(late.ticket, "DEADLINE_EXCEEDED", f"ended while {late.state}")))
                    commands += self._cancel(late, "deadline")
            case Asked(ticket, request):
                if ticket.key in self._rows:
                    raise LocalError(f"{ticket.key} was asked for twice")
                need = self._need(request)
                if ticket.source == self._me:  # its prompt is in this arena twice until it is handed over
                    need += self._shape.pages_for(len(request.prompt))
                if need > self._capacity:
                    return [Answer(ticket.key, False, f"needs {need} pages, the worker has {self._capacity}")]
                self._rows[ticket.key] = _Row(ticket, request, now + request.timeout_s, now)
            case KvArrived():
                row = self._rows.get(event.ticket.key)
                if row is None:
                    self.ignored += 1
                    self._ledger.release(event.ticket.key)
                elif row.state is not State.PROMISED:
                    raise LocalError(f"{event.ticket.key}: KV arrived while {row.state}")
                else:
                    row.state, row.arrived_at = State.JOINING, now
                    row.first_token, row.first_hash = event.first_token, event.first_hash
                    row.stages += event.stages
                    if row.cancelled:
                        commands += self._end(row)
            case Withdrawn(ticket, reason, recompute):
                row = self._rows.get(ticket.key)
                if row is None:
                    self.ignored += 1
                elif row.state in (State.JOINING, State.RUNNING):
                    raise LocalError(f"{ticket.key}: withdrawn while {row.state}")
                else:
                    if recompute and not row.cancelled:
                        commands.append(Tell(Failed(ticket, "DATA_LOSS", reason)))
                    commands += self._end(row)
            case Cancel(ticket, reason, report):
                commands += self._cancelled(ticket.key, reason, report, now)
            case GatewayGone(identity):
                commands += self._cancel_where(lambda row: row.ticket.minter == identity, "its gateway was lost")
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
        return min((row.deadline for row in self._rows.values() if not row.cancelled), default=None)

    def check(self) -> None:
        self._ledger.check()
        assert self._running or not self._cut
        assert set(self._batch) <= self._rows.keys(), "a running row was freed"
        for key, row in self._rows.items():
            assert key == row.ticket.key
            assert (row.state is State.RUNNING) == (key in self._batch)
            if row.state in (State.JOINING, State.RUNNING):
                tokens = len(row.request.prompt) + row.generated
                assert len(self._ledger.pages(key)) >= self._shape.pages_for(tokens - 1), "KV outgrew its pages"

    def _need(self, request: Request) -> int:
        return self._shape.pages_for(len(request.prompt) + request.sampling.max_tokens)

    def _head(self) -> _Row | None:
        """The first in line for memory."""
        waiting = (row for row in self._rows.values() if row.state is State.WAITING and not row.cancelled)
        return next(waiting, None)

    def _admit(self) -> list[DecodeCommand]:
        """Promise memory in order of asking; nobody is overtaken, so nobody starves."""
        commands: list[DecodeCommand] = []
        while (row := self._head()) is not None:
            key, need = row.ticket.key, self._need(row.request)
            if need > self._ledger.available:
                break
            self._ledger.promise(key, need, Owner.PULLING)
            row.state = State.PROMISED
            commands.append(Answer(key, True))
        return commands

    def _plan(self, now: float) -> list[DecodeCommand]:
        joiners = [row for row in self._rows.values() if row.state is State.JOINING and not row.cancelled]
        room = self._config.max_rows - len(self._batch)
        if self._running:
            if joiners and room and not self._cut:
                self._cut = True
                return [Cut(self._run_id)]
            return []
        joining: list[Join] = []
        for row in joiners[:room]:
            row.state, row.joined_at = State.RUNNING, now
            self._batch += (row.ticket.key,)
        if not self._batch:
            return []
        steps = min(self._config.max_steps, *(self._rows[key].remaining for key in self._batch))
        growing: list[Grow] = []
        for key in self._batch:
            row = self._rows[key]
            fresh = self._bind(key, row, steps)
            if row in joiners:
                pages = self._ledger.pages(key)
                joining.append(Join(row.ticket, row.request, row.first_token, pages, row.first_hash))
            elif fresh:
                growing.append(Grow(key, fresh))
        self._run_id += 1
        self._running = True
        return [Run(self._run_id, self._batch, tuple(joining), tuple(growing), steps)]

    def _bind(self, key: str, row: _Row, steps: int) -> tuple[int, ...]:
        """Pages for `steps` more tokens, out of the row's own promise."""
        tokens = len(row.request.prompt) + row.generated + steps - 1
        missing = self._shape.pages_for(tokens) - len(self._ledger.pages(key))
        return self._ledger.bind(key, missing, Owner.DECODING) if missing > 0 else ()

    def _ran(self, event: Ran, now: float) -> list[DecodeCommand]:
        if not self._running or event.run_id != self._run_id:
            raise LocalError(f"ran: got run {event.run_id}, want {self._run_id}")
        self._running = self._cut = False
        commands: list[DecodeCommand] = []
        ended = {each.key: each for each in event.ended}
        for key in self._batch:
            row = self._rows[key]
            row.generated += event.steps
            row.steps += event.steps
            if key in ended and not row.cancelled:
                end = ended[key]
                stages = self._stages(row, now)
                commands.append(Tell(Finished(row.ticket, end.reason, end.generated, end.stop_token_id, stages)))
            elif row.report:
                commands.append(self._report(row, now))
            if key in ended or row.cancelled:
                commands += self._end(row)
        return commands

    def _run_failed(self, run_id: int, reason: str, now: float) -> list[DecodeCommand]:
        """All rows are placed again by their gateways, which bound how often; the worker goes on."""
        if not self._running or run_id != self._run_id:
            raise LocalError(f"run failed: got run {run_id}, want {self._run_id}")
        self._running = self._cut = False
        commands: list[DecodeCommand] = []
        for key in self._batch:
            row = self._rows[key]
            if not row.cancelled:
                why = f"the engine failed: {reason}"
                commands.append(Tell(Failed(row.ticket, "ABORTED", why, self._stages(row, now))))
            commands += self._end(row)
        return commands

    def _cancelled(self, key: str, reason: str, report: bool, now: float) -> list[DecodeCommand]:
        """A running row reports when its step is over, one that waits to join at once."""
        commands: list[DecodeCommand] = []
        row = self._rows.get(key)
        if row is not None and report and not row.cancelled:
            row.report = row.state is State.RUNNING
            if row.state is State.JOINING:
                commands.append(Tell(Finished(row.ticket, "cancelled", row.generated, None, tuple(row.stages))))
        return commands + self._cancel_where(lambda row: row.ticket.key == key, reason)

    def _cancel_where(self, which: Callable[[_Row], bool], reason: str) -> list[DecodeCommand]:
        rows = [row for row in self._rows.values() if which(row)]
        if not rows:
            self.ignored += 1
        return [command for row in rows for command in self._cancel(row, reason)]

    def _cancel(self, row: _Row, reason: str) -> list[DecodeCommand]:
        """Ask whatever works on the row to stop; it is freed when that has."""
        if row.cancelled:
            return []
        row.cancelled = True
        key = row.ticket.key
        match row.state:
            case State.WAITING | State.PROMISED:
                return [DropHandOff(key, reason)]
            case State.JOINING:
                return self._end(row)
            case State.RUNNING:
                if self._running and not self._cut:
                    self._cut = True
                    return [Cut(self._run_id)]
                return []

    def _end(self, row: _Row) -> list[DecodeCommand]:
        key = row.ticket.key
        del self._rows[key]
        running = key in self._batch
        self._batch = tuple(other for other in self._batch if other != key)
        self._ledger.release(key)
        return [Leave(key)] if running else []

    def _report(self, row: _Row, now: float) -> DecodeCommand:
        return Tell(Finished(row.ticket, "cancelled", row.generated, None, self._stages(row, now)))

    def _stages(self, row: _Row, now: float) -> tuple[Stage, ...]:
        return (
            *row.stages,
            Stage("join_wait", self._me.name, row.joined_at - row.arrived_at),
            Stage("decode", self._me.name, now - row.joined_at, {"steps": str(row.steps)}),
        )
