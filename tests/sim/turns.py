"""Workers of DistServe's simulator, as machines and engines of ours: taking turns at a decode step, and pipelines.

Test equipment: no engine should do what is here. See tests/sim/peer.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.kv import KvShape
from core.messages import Accept, Cancel, Finished, First, Handed, Offer, Prompt, Tokens
from core.pages import Owner, Pages
from core.request import Request, Ticket
from scheduler import decode_events as decoding
from scheduler import mixed_events
from scheduler.cost import CostModel
from scheduler.prefill_events import Began, ChunkDone, PrefillCommand, PrefillEvent, RunChunk
from scheduler.prefill_policy import PrefillPolicy
from sim.loop import Kind
from sim.outcome import Record
from sim.shells import PrefillShell
from sim.worker import Worker
from transfer import sink as taking

CAP_TOKENS = 50_000
"""A decode step attends to no more."""


@dataclass(slots=True, eq=False)
class Job:
    """A request on a worker that takes turns."""

    ticket: Ticket
    prompt: int
    most: int
    context: int = 0
    """Tokens that it attends to in its next step."""
    generated: int = 0
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """A stage begins: prompts or rows, never both."""

    stage: int
    prompts: tuple[Job, ...] = ()
    rows: tuple[Job, ...] = ()


@dataclass(frozen=True, slots=True)
class StageDone:
    """A stage has ended."""

    work: Work


@dataclass(frozen=True, slots=True)
class Say:
    """Tokens of a row, or that it is over."""

    job: Job
    over: bool = False


class Turns:
    """A worker of one or more stages in a ring, each with a line of prompts and one of rows. Prompts go first.

    A stage that is free takes all prompts that wait, else rows in line up to `CAP_TOKENS`; what it has done goes to the
    end of the next stage's line. Rows that did not fit are ahead of those that did. Grants all memory it is asked for.
    """

    def __init__(self, stages: int, prompt_tokens: int, shape: KvShape, ledger: Pages) -> None:
        self._tokens = prompt_tokens
        self._shape = shape
        self._ledger = ledger
        self._jobs: dict[str, Job] = {}
        self._begun: deque[Job] = deque()
        """Prompts before the first stage."""
        self._prompts: list[deque[tuple[Job, ...]]] = [deque() for _ in range(stages)]
        self._rows: list[deque[Job]] = [deque() for _ in range(stages)]
        self._busy = [False] * stages
        self.left_out = 0
        """Steps that somebody had to wait for, who was in line when they began."""

    def on(self, event: Any, now: float) -> list[Any]:
        commands: list[Any] = []
        match event:
            case Offer(ticket, prompt_tokens, max_tokens):
                self._jobs[ticket.key] = Job(ticket, prompt_tokens, max_tokens)
                commands.append(mixed_events.Answer(Accept(ticket)))
            case Prompt(ticket):
                self._begun.append(self._jobs[ticket.key])
            case decoding.Asked(ticket, request):
                self._ledger.promise(ticket.key, self._shape.pages_for(len(request.prompt)), Owner.PULLING)
                commands.append(decoding.Answer(ticket.key, True))
            case decoding.KvArrived(ticket, request):
                self._rows[0].append(self._arrived(ticket, request))
            case StageDone(work):
                self._done(work, commands)
            case Cancel() | None:
                pass
            case _:
                raise AssertionError(f"unexpected: {event}")
        for stage, busy in enumerate(self._busy):
            if not busy:
                self._start(stage, commands)
        return commands

    def deadline(self) -> float | None:
        return None

    def check(self) -> None:
        pass

    def _arrived(self, ticket: Ticket, request: Request) -> Job:
        job = self._jobs[ticket.key] = Job(ticket, len(request.prompt), request.sampling.max_tokens)
        job.generated, job.context = 1, job.prompt + 1
        return job

    def _done(self, work: Work, commands: list[Any]) -> None:
        stages = len(self._busy)
        self._busy[work.stage] = False
        following = (work.stage + 1) % stages
        if following:
            if work.prompts:
                self._prompts[following].append(work.prompts)
            self._rows[following].extend(work.rows)
            return
        for job in work.prompts:
            job.context = job.prompt
        for job in (*work.prompts, *work.rows):
            job.generated += 1
            job.context += 1
            over = job.generated >= job.most
            commands.append(Say(job, over))
            if over:
                del self._jobs[job.ticket.key]
                self._ledger.release(job.ticket.key)
            else:
                self._rows[0].append(job)

    def _start(self, stage: int, commands: list[Any]) -> None:
        prompts: tuple[Job, ...] = ()
        if stage == 0 and self._begun:
            taken, left = [], self._tokens
            while self._begun and self._begun[0].prompt <= left:
                taken.append(self._begun.popleft())
                left -= taken[-1].prompt
            prompts = tuple(taken)
        elif self._prompts[stage]:
            prompts = self._prompts[stage].popleft()
        rows: list[Job] = []
        if not prompts:
            line, left = self._rows[stage], CAP_TOKENS
            while line and line[0].context <= left:
                rows.append(line.popleft())
                left -= rows[-1].context
            self.left_out += bool(line)
        if prompts or rows:
            self._busy[stage] = True
            commands.append(Work(stage, prompts, tuple(rows)))


class TurnsEngine:
    """Performs the commands of `Turns`: a stage is a wait."""

    def __init__(self, worker: Worker, costs: Sequence[CostModel]) -> None:
        self._worker = worker
        self._costs = costs
        shell = worker.mixed or worker.decode
        assert shell is not None
        self._seat = shell.seat
        self._seat.perform = self._perform

    def _perform(self, command: Any) -> None:
        worker = self._worker
        match command:
            case mixed_events.Answer(message):
                worker.send(message.ticket.minter, message)
            case decoding.Answer(key, granted, reason):
                worker.post(worker.sink_seat, taking.Decided(key, granted, reason))
            case Work(stage, prompts, rows):
                cost = self._costs[stage]
                if prompts:
                    seconds = cost.prefill_s([(job.prompt, 0) for job in prompts])
                else:
                    seconds = cost.decode_s(len(rows), sum([job.context for job in rows]))
                worker.loop.at(worker.loop.now + seconds, Kind.STEP, worker.order, self._end, command)
            case Say(job, over):
                self._say(job, over)
            case _:
                raise AssertionError(f"unexpected: {command}")

    def _end(self, work: Work) -> None:
        self._worker.post(self._seat, StageDone(work))

    def _say(self, job: Job, over: bool) -> None:
        """The first token at once, all others with the last: nobody looks at them before."""
        worker = self._worker
        record = job.record
        if record is None:
            record = job.record = worker.record(job.ticket)
        worker.token(record)
        minter = job.ticket.minter
        if job.generated == 1:
            worker.send(minter, Tokens(job.ticket, 0, (0,)))
            worker.send(minter, Handed(job.ticket, ()))
        if over:
            if job.generated > 1:
                worker.send(minter, Tokens(job.ticket, 1, (0,) * (job.generated - 1)))
            worker.send(minter, Finished(job.ticket, "length", job.generated, decoded=True))


@dataclass(frozen=True, slots=True)
class StageFree:
    """The first stage is done with a step, which goes on in the next ones."""

    run_id: int


class Ahead(PrefillPolicy):
    """Our prefill policy, with a step out for each stage: the next one begins when the first stage is free."""

    def on(self, event: PrefillEvent | StageFree | None, now: float) -> list[PrefillCommand]:
        if not isinstance(event, StageFree):
            return super().on(event, now)
        assert self._running is not None
        self._later[event.run_id], self._running = self._running, None
        return self._plan(now)

    def _chunk_done(self, event: ChunkDone, now: float) -> list[PrefillCommand]:
        first, self._running = self._running, self._later.pop(event.run_id)
        commands = super()._chunk_done(event, now)
        self._running = first
        return commands

    def check(self) -> None:
        pass

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._later: dict[int, Any] = {}
        """Steps that are in later stages."""


class AheadEngine:
    """Two or more stages: a step's end is that of its last one, and no stage works on two at a time."""

    def __init__(self, worker: Worker, costs: Sequence[CostModel]) -> None:
        assert worker.prefill is not None
        self._worker = worker
        self._shell: PrefillShell = worker.prefill
        self._costs = costs
        self._free = [0.0] * len(costs)
        self._shell.seat.perform = self._perform

    def _perform(self, command: PrefillCommand) -> None:
        if not isinstance(command, RunChunk):
            self._shell._perform(command)
            return
        worker = self._worker
        rows = [(span.stop - span.start, span.start) for span in command.spans]
        at_s = worker.loop.now
        for stage, cost in enumerate(self._costs):
            at_s = self._free[stage] = max(at_s, self._free[stage]) + cost.prefill_s(rows)
        worker.loop.at(self._free[0], Kind.STEP, worker.order, self._first, command.run_id)
        worker.loop.at(at_s, Kind.STEP, worker.order, self._last, command)

    def _first(self, run_id: int) -> None:
        self._worker.post(self._shell.seat, StageFree(run_id))

    def _last(self, command: RunChunk) -> None:
        worker, begun = self._worker, []
        for span in command.spans:
            ticket, _ = self._shell._open[span.key]
            worker.token(worker.record(ticket))
            begun.append(Began(span.key, First(0)))
            worker.send(ticket.minter, Tokens(ticket, 0, (0,)))
        worker.post(self._shell.seat, ChunkDone(command.run_id, tuple(begun)))
