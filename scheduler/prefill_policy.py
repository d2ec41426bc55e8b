"""What a prefill worker computes next: accept or reject, queue, chunk, hand off. Pure.

First come, first served, in chunks of a fixed token budget (after Sarathi-Serve, section 4.2: a bounded step keeps
the wait for a cancellation or a new batch bounded). A request is offered before its prompt is sent, so that a worker
that cannot meet its deadline costs no transfer (after P/D-Serve, "on-demand forwarding upon rejections").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from core.errors import LocalError
from core.kv import KvShape
from core.messages import Accept, Cancel, Failed, Finished, First, Handed, Offer, Prompt, Reject
from core.pages import Owner, Pages
from core.request import Request, Stage, Ticket
from core.worker import Identity


# Events (beside the messages Offer, Prompt and Cancel).
@dataclass(frozen=True, slots=True)
class ChunkDone:
    """A `RunChunk` is over; `begun` are all continuations of the sequences whose prompt is complete."""

    run_id: int
    begun: tuple[Began, ...]


@dataclass(frozen=True, slots=True)
class ChunkFailed:
    """A `RunChunk` ended in an exception of the engine; nothing is known of which sequence caused it."""

    run_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Began:
    """A continuation of a sequence has its first token; `finish` if it is also its last."""

    key: str
    first: First
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Granted:
    """The sink promised memory."""

    key: str


@dataclass(frozen=True, slots=True)
class HandOffOver:
    """The source forgot the ticket: the sink has the KV (`taken`), or will not have it."""

    key: str
    taken: bool
    reason: str = ""
    taken_s: float = 0.0
    """From the last announcement to the sink's word that it has everything."""


@dataclass(frozen=True, slots=True)
class GatewayGone:
    """A gateway died, and its requests with it."""

    identity: Identity


# Commands.
@dataclass(frozen=True, slots=True)
class Answer:
    """Send a message to the ticket's gateway."""

    message: Accept | Reject | Failed | Finished | Handed


@dataclass(frozen=True, slots=True)
class Begin:
    """Make a sequence known to the engine."""

    ticket: Ticket
    request: Request
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Compute prompt positions [start, stop) of a sequence."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class RunChunk:
    """One engine step; ends in one `ChunkDone`."""

    run_id: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class AskForSink:
    """Ask the ticket's sink for memory; ends in `HandOffOver`, perhaps after `Granted`."""

    ticket: Ticket
    request: Request
    deadline: float


@dataclass(frozen=True, slots=True)
class SealPages:
    """The first `tokens` of the prompt are in `pages`: let the sink pull what is whole."""

    key: str
    pages: tuple[int, ...]
    tokens: int
    firsts: tuple[First, ...] = ()


@dataclass(frozen=True, slots=True)
class WithdrawHandOff:
    """End the hand-off from this side; ends in `HandOffOver`."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class EndSequence:
    """Forget a sequence at the engine."""

    key: str


PrefillEvent = Offer | Prompt | Cancel | ChunkDone | ChunkFailed | Granted | HandOffOver | GatewayGone
PrefillCommand = Answer | Begin | RunChunk | AskForSink | SealPages | WithdrawHandOff | EndSequence


class State(StrEnum):
    """Where a request is on a prefill worker."""

    OFFERED = "offered"
    QUEUED = "queued"
    RUNNING = "running"
    HANDING_OFF = "handing_off"


class Grant(StrEnum):
    """How far the sink is."""

    NOT_ASKED = "not_asked"
    ASKED = "asked"
    GIVEN = "given"


@dataclass(slots=True)
class _Job:
    ticket: Ticket
    prompt_tokens: int
    deadline: float
    since: float
    state: State = State.OFFERED
    request: Request | None = None
    second: Identity | None = None
    grant: Grant = Grant.NOT_ASKED
    begun: bool = False
    done: int = 0
    firsts: tuple[First, ...] = ()
    """Of the continuations that go on at the sink."""
    cancelled: str | None = None
    accepted_at: float = 0.0
    started_at: float = 0.0
    computed_at: float = 0.0
    chunks: int = 0


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Settings of a prefill worker's policy."""

    chunk_tokens: int = 512
    """Most tokens in one engine step."""
    max_rows: int = 32
    """Most sequences in one engine step."""
    offer_s: float = 1.0
    """An accepted offer lapses after this time without its prompt."""
    ungranted_share: float = 0.1
    """Share of the arena that may hold KV no sink has promised to take."""


def holder(key: str) -> str:
    """Names a prefill sequence in the ledger and the engine, apart from the same ticket's decode sequence."""
    return f"prefill {key}"


class PrefillPolicy:
    """The queue of one prefill worker; at most one `RunChunk` is out at a time."""

    def __init__(self, me: Identity, shape: KvShape, ledger: Pages, config: PrefillConfig) -> None:
        self._me = me
        self._shape = shape
        self._ledger = ledger
        self._config = config
        self._capacity = ledger.available
        self._jobs: dict[str, _Job] = {}
        self._running: tuple[Span, ...] = ()
        self._run_id = 0
        self._run_started = 0.0
        self._tokens_per_s = 0.0
        self.ignored = 0
        """Messages about tickets we do not hold."""

    def queue(self) -> dict[State, int]:
        """Requests in each state."""
        counts = dict.fromkeys(State, 0)
        for job in self._jobs.values():
            counts[job.state] += 1
        return counts

    def predicted_wait_s(self, tokens: int = 0) -> float:
        """Time until the queue and `tokens` more are computed, at the speed of full steps; 0 before there was one."""
        left = sum(job.prompt_tokens - job.done for job in self._jobs.values() if job.state is not State.HANDING_OFF)
        return (left + tokens) / self._tokens_per_s if self._tokens_per_s else 0.0

    def on(self, event: PrefillEvent | None, now: float) -> list[PrefillCommand]:
        commands: list[PrefillCommand] = []
        match event:
            case None:
                for late in [job for job in self._jobs.values() if self._until(job) <= now]:
                    if late.state is not State.OFFERED:
                        commands.append(Answer(Failed(late.ticket, "DEADLINE_EXCEEDED", f"ended while {late.state}")))
                    commands += self._cancel(late, "deadline")
            case Offer():
                commands.append(self._offered(event, now))
            case Prompt(ticket, request, second):
                job = self._jobs.get(ticket.key)
                if job is None or job.state is not State.OFFERED or len(request.prompt) != job.prompt_tokens:
                    self.ignored += 1
                    return [Answer(Failed(ticket, "ABORTED", "the offer has lapsed"))]
                job.state, job.request, job.second, job.since = State.QUEUED, request, second, now
                job.deadline = now + request.timeout_s
                # The line is in order of prompts, and so is the line at a sink: one that was offered earlier, but sent
                # later, would wait for memory there that is promised to those behind it here.
                self._jobs[ticket.key] = self._jobs.pop(ticket.key)
            case Cancel(branch=int()):
                pass  # its prompt is that of the others
            case Cancel(ticket, reason, report):
                job = self._jobs.get(ticket.key)
                if report and job is not None and job.state is State.HANDING_OFF and job.cancelled is None:
                    commands.append(Answer(Handed(job.ticket, self._stages(job, now), cancelled=True)))
                commands += self._cancel_where(lambda job: job.ticket.key == ticket.key, reason)
            case GatewayGone(identity):
                commands += self._cancel_where(lambda job: job.ticket.minter == identity, "its gateway was lost")
            case Granted(key):
                job = self._jobs.get(key)
                if job is None:
                    self.ignored += 1
                else:
                    job.grant = Grant.GIVEN
            case HandOffOver():
                commands += self._hand_off_over(event, now)
            case ChunkDone():
                commands += self._chunk_done(event, now)
            case ChunkFailed(run_id, reason):
                commands += self._chunk_failed(run_id, reason)
        return commands + self._plan(now)

    def deadline(self) -> float | None:
        """Already past when the first in line may start, because somebody else in this arena freed memory."""
        head = None if self._running else self._head()
        if head is not None and self._may_start(head):
            return head.since
        return min((self._until(job) for job in self._jobs.values() if job.cancelled is None), default=None)

    def check(self) -> None:
        self._ledger.check()
        running = {span.key for span in self._running}
        for key, job in self._jobs.items():
            assert key == job.ticket.key
            held = len(self._ledger.pages(holder(key)))
            assert held == (self._shape.pages_for(job.prompt_tokens) if job.begun else 0)
            assert job.begun == (job.state in (State.RUNNING, State.HANDING_OFF))
            assert job.cancelled is None or key in running or job.grant is not Grant.NOT_ASKED, "a cancelled job stays"
            assert job.state is State.HANDING_OFF or not job.firsts
        assert running <= self._jobs.keys(), "a computed sequence was freed"

    def _until(self, job: _Job) -> float:
        if job.cancelled is not None:
            return float("inf")
        return job.since + self._config.offer_s if job.state is State.OFFERED else job.deadline

    def _offered(self, offer: Offer, now: float) -> PrefillCommand:
        ticket = offer.ticket
        if ticket.key in self._jobs or ticket.source != self._me:
            self.ignored += 1
            return Answer(Reject(ticket, "offered twice or to an earlier life of this worker"))
        if self._shape.pages_for(offer.prompt_tokens) > self._capacity:
            room = self._capacity * self._shape.page_tokens
            return Answer(Reject(ticket, f"prompt of {offer.prompt_tokens} tokens, room for {room}"))
        wait_s = self.predicted_wait_s(offer.prompt_tokens)
        if wait_s > offer.wait_s:
            return Answer(Reject(ticket, f"first token in {wait_s:.2f} s, wanted in {offer.wait_s:.2f} s", wait_s))
        self._jobs[ticket.key] = _Job(ticket, offer.prompt_tokens, 0.0, now, accepted_at=now)
        return Answer(Accept(ticket, wait_s=wait_s))

    def _head(self) -> _Job | None:
        """The first in line."""
        waiting = (job for job in self._jobs.values() if job.state is State.QUEUED and job.cancelled is None)
        return next(waiting, None)

    def _plan(self, now: float) -> list[PrefillCommand]:
        """Fill one step in order of arrival; the first request that cannot start yet ends it, so none is overtaken."""
        commands: list[PrefillCommand] = []
        if self._running:
            head = self._head()
            return self._ask(head) if head else []
        spans: list[Span] = []
        budget = self._config.chunk_tokens
        for key, job in self._jobs.items():
            if job.state not in (State.QUEUED, State.RUNNING) or job.cancelled is not None:
                continue
            if budget == 0 or len(spans) == self._config.max_rows:
                break
            if not job.begun:
                commands += self._ask(job)
                if not self._may_start(job):
                    break
                pages = self._ledger.bind(holder(key), self._shape.pages_for(job.prompt_tokens), Owner.PREFILLING)
                job.begun, job.state, job.started_at = True, State.RUNNING, now
                assert job.request is not None
                commands.append(Begin(job.ticket, job.request, pages))
            stop = min(job.prompt_tokens, job.done + budget)
            spans.append(Span(key, job.done, stop))
            budget -= stop - job.done
        if spans:
            self._run_id += 1
            self._running, self._run_started = tuple(spans), now
            commands.append(RunChunk(self._run_id, self._running))
        return commands

    def _ask(self, job: _Job) -> list[PrefillCommand]:
        """Ask the sink before the start, unless the first token is all that is wanted."""
        assert job.request is not None
        if job.grant is not Grant.NOT_ASKED or job.request.sampling.max_tokens == 1:
            return []
        job.grant = Grant.ASKED
        return [AskForSink(job.ticket, job.request, job.deadline)]

    def _may_start(self, job: _Job) -> bool:
        pages = self._shape.pages_for(job.prompt_tokens)
        if pages > self._ledger.available:
            return False
        if job.grant is not Grant.ASKED:
            return True
        if job.ticket.sink == self._me:
            return False  # what it holds would be missing where its grant waits for memory
        ungranted = sum(
            self._shape.pages_for(other.prompt_tokens)
            for other in self._jobs.values()
            if other.begun and other.grant is Grant.ASKED
        )
        return ungranted + pages <= self._config.ungranted_share * self._capacity

    def _chunk_done(self, event: ChunkDone, now: float) -> list[PrefillCommand]:
        if not self._running or event.run_id != self._run_id:
            raise LocalError(f"chunk done: got run {event.run_id}, want {self._run_id}")
        spans, self._running = self._running, ()
        tokens = sum(span.stop - span.start for span in spans)
        # A small step is mostly fixed cost: its speed says nothing about a queue, whose steps are full.
        if now > self._run_started and 2 * tokens >= self._config.chunk_tokens:
            speed = tokens / (now - self._run_started)
            self._tokens_per_s = 0.8 * self._tokens_per_s + 0.2 * speed if self._tokens_per_s else speed
        begun: dict[str, list[Began]] = {}
        for each in event.begun:
            begun.setdefault(each.key, []).append(each)
        commands: list[PrefillCommand] = []
        for span in spans:
            job = self._jobs[span.key]
            job.done = span.stop
            job.chunks += 1
            if job.cancelled is not None:
                commands += self._end_if_free(job)
                continue
            if span.key in begun:
                commands += self._began(job, begun[span.key], now)
            elif job.grant is not Grant.NOT_ASKED:
                commands.append(self._seal(job))
        return commands

    def _began(self, job: _Job, begun: list[Began], now: float) -> list[PrefillCommand]:
        """The prompt is complete: some continuations may be over with their first token, the others go on."""
        job.state, job.computed_at = State.HANDING_OFF, now
        self._ledger.move(holder(job.ticket.key), Owner.HANDING_OFF)
        job.firsts = tuple(each.first for each in begun if each.finish is None)
        commands: list[PrefillCommand] = []
        ended = [each for each in begun if each.finish is not None]
        for each in ended:
            token, branch = each.first.token, each.first.branch
            count, stop = (0, token) if each.finish == "stop" else (1, None)
            stages = self._stages(job, now)
            commands.append(Answer(Finished(job.ticket, each.finish or "", count, stop, stages, branch)))
        if not job.firsts:
            return commands + self._cancel(job, "finished with its first token")
        return [*commands, self._seal(job)] if job.grant is not Grant.NOT_ASKED else commands

    def _chunk_failed(self, run_id: int, reason: str) -> list[PrefillCommand]:
        """All of the step are placed again by their gateways, which bound how often; the worker goes on."""
        if not self._running or run_id != self._run_id:
            raise LocalError(f"chunk failed: got run {run_id}, want {self._run_id if self._running else 'none'}")
        spans, self._running = self._running, ()
        commands: list[PrefillCommand] = []
        for span in spans:
            job = self._jobs[span.key]
            if job.cancelled is None:
                commands.append(Answer(Failed(job.ticket, "ABORTED", f"the engine failed: {reason}")))
                commands += self._cancel(job, reason)
            else:
                commands += self._end_if_free(job)
        return commands

    def _seal(self, job: _Job) -> SealPages:
        key = job.ticket.key
        return SealPages(key, self._ledger.pages(holder(key)), job.done, job.firsts)

    def _hand_off_over(self, event: HandOffOver, now: float) -> list[PrefillCommand]:
        job = self._jobs.get(event.key)
        if job is None:
            self.ignored += 1
            return []
        job.grant = Grant.NOT_ASKED
        if job.cancelled is not None:
            return self._end_if_free(job)
        if event.taken:
            commands: list[PrefillCommand] = [Answer(Handed(job.ticket, self._stages(job, now, event.taken_s)))]
            job.cancelled = "taken"
            return commands + self._end_if_free(job)
        if job.second is not None:
            job.ticket, job.second = replace(job.ticket, sink=job.second), None
            commands = self._ask(job)
            if job.done:
                commands.append(self._seal(job))
            return commands
        why = f"no decode worker took it: {event.reason}"
        stages = self._stages(job, now) if job.state is State.HANDING_OFF else ()
        return [Answer(Failed(job.ticket, "UNAVAILABLE", why, stages)), *self._cancel(job, event.reason)]

    def _cancel_where(self, which: Callable[[_Job], bool], reason: str) -> list[PrefillCommand]:
        jobs = [job for job in self._jobs.values() if which(job)]
        if not jobs:
            self.ignored += 1
        return [command for job in jobs for command in self._cancel(job, reason)]

    def _cancel(self, job: _Job, reason: str) -> list[PrefillCommand]:
        """Ask everything that works on the job to stop; its pages are freed when the last of it has."""
        if job.cancelled is not None:
            return []
        job.cancelled = reason
        if job.grant is not Grant.NOT_ASKED:
            return [WithdrawHandOff(job.ticket.key, reason)]
        return self._end_if_free(job)

    def _end_if_free(self, job: _Job) -> list[PrefillCommand]:
        key = job.ticket.key
        if job.grant is not Grant.NOT_ASKED or any(span.key == key for span in self._running):
            return []
        del self._jobs[key]
        self._ledger.release(holder(key))
        return [EndSequence(key)] if job.begun else []

    def _stages(self, job: _Job, now: float, taken_s: float | None = None) -> tuple[Stage, ...]:
        me = self._me.name
        detail = {"tokens": str(job.prompt_tokens), "chunks": str(job.chunks)}
        stages = [
            Stage("batch_wait", me, job.started_at - job.accepted_at),
            Stage("prefill", me, job.computed_at - job.started_at, detail),
        ]
        if taken_s is not None:
            stages.append(Stage("handing_off", me, now - job.computed_at, {"ready_to_taken_s": f"{taken_s:.6f}"}))
        return tuple(stages)
