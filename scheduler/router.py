"""Where a request goes, and what becomes of it: the gateway's one decision maker. Pure.

Offers a request to prefill workers, least loaded first, until one accepts (after P/D-Serve, "on-demand forwarding
upon rejections"); chooses its decode worker; puts tokens in order and drops duplicates; places it again, with the
tokens so far, when a worker that it needs is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from core.errors import LocalError
from core.messages import (
    Accept,
    Cancel,
    Failed,
    Finished,
    Handed,
    Offer,
    Prompt,
    Reject,
    ToGateway,
    Tokens,
    ToWorker,
)
from core.request import PHASE_NEXT, Phase, Request, Stage, Ticket
from core.worker import Identity, Member

REPORT_S = 0.25
"""A request whose tokens are all here waits no longer than this for the stages of its prefill."""


# Events (beside the messages from workers).
@dataclass(frozen=True, slots=True)
class Arrived:
    """A client's request; `counter` is new in this gateway's life."""

    counter: int
    request: Request


@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody wants the rest of it: the client left, aborted or was too slow."""

    counter: int
    reason: str


@dataclass(frozen=True, slots=True)
class Satisfied:
    """The client has its stop string: the rest is not wanted, the stages of what was done are."""

    counter: int


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker's session stands; new requests go there while the member is `ready`. Comes again when that changes."""

    member: Member


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """This life of a worker cannot be used any more."""

    identity: Identity


# Commands.
@dataclass(frozen=True, slots=True)
class ToOne:
    """Send a message to a worker."""

    worker: Identity
    message: ToWorker


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give the client these tokens, which follow those delivered before."""

    counter: int
    tokens: tuple[int, ...]
    logits_hashes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class End:
    """The request is over. `phase` is DONE, REJECTED, CANCELLED or FAILED."""

    counter: int
    phase: Phase
    reason: str
    """Finish reason if DONE, else a sentence."""
    code: str = "OK"
    """Name of a gRPC status."""
    retry_s: float | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    stages: tuple[Stage, ...] = ()
    attempts: int = 1


RouterEvent = Arrived | ClientGone | Satisfied | WorkerUp | WorkerDown | ToGateway
RouterCommand = ToOne | Deliver | End


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Settings of a gateway's policy."""

    max_queue_s: float = 30.0
    """A request without a TTFT goal is accepted while its wait stays under this."""
    offer_s: float = 1.0
    """A worker that does not answer an offer within this time is passed over."""
    max_attempts: int = 4
    """Placements of one request before it fails."""


@dataclass(slots=True)
class _Flight:
    request: Request
    counter: int
    arrived_at: float
    phase: Phase = Phase.QUEUED
    attempt: int = 0
    """Numbers the offers, so that a late answer to an old one is told apart."""
    placements: int = 0
    """Offers that were accepted."""
    ticket: Ticket | None = None
    second: Identity | None = None
    tried: set[Identity] = field(default_factory=set)
    refusals: list[Reject] = field(default_factory=list)
    offered_at: float = 0.0
    tokens: list[int] = field(default_factory=list)
    base: int = 0
    """Tokens delivered before this attempt began; its own count starts there."""
    cached_tokens: int = 0
    stages: list[Stage] = field(default_factory=list)
    broken: set[Identity] = field(default_factory=set)
    """Workers whose stream broke during this attempt: even if they came back, they have dropped it."""
    handed: bool = False
    """The prefill worker has reported its stages for this attempt."""
    finished: Finished | None = None
    """All tokens are here; only reports of stages may still be on their way."""
    owing: dict[type[ToGateway], Identity] = field(default_factory=dict)
    """Reports that are awaited, and from whom."""
    finished_at: float = 0.0

    @property
    def deadline(self) -> float:
        return self.arrived_at + self.request.timeout_s

    @property
    def size(self) -> int:
        """Tokens of KV it may come to."""
        return len(self.request.prompt) + self.request.sampling.max_tokens


class Router:
    """All requests of one gateway. Each `Arrived` ends in exactly one `End`."""

    def __init__(self, me: Identity, config: RouterConfig) -> None:
        self._me = me
        self._config = config
        self._workers: dict[Identity, Member] = {}
        self._flights: dict[int, _Flight] = {}
        self._alarms: list[tuple[float, int]] = []
        """A heap of when each flight may need a look; stale entries are dropped when they come up."""
        self.ignored = 0
        """Messages about old attempts or ended requests."""

    def __len__(self) -> int:
        return len(self._flights)

    def phases(self) -> dict[Phase, int]:
        """Live requests in each phase."""
        counts = {phase: 0 for phase in Phase if not phase.ended}
        for flight in self._flights.values():
            counts[flight.phase] += 1
        return counts

    def missing(self) -> str | None:
        """What the deployment lacks to serve anything, None if nothing."""
        roles = [member.role for member in self._ready()]
        lacking = [
            name
            for name, there in (
                ("prefill", any(role.prefills for role in roles)),
                ("decode", any(role.decodes for role in roles)),
            )
            if not there
        ]
        return f"no {' and no '.join(lacking)} worker is ready" if lacking else None

    def on(self, event: RouterEvent | None, now: float) -> list[RouterCommand]:
        match event:
            case None:
                return self._overdue(now)
            case Arrived(counter, request):
                if counter in self._flights:
                    raise LocalError(f"request {counter} arrived twice")
                return self._arrived(_Flight(request, counter, now), now)
            case ClientGone(counter, reason):
                flight = self._flights.get(counter)
                return self._end(flight, Phase.CANCELLED, reason, "CANCELLED", now) if flight else []
            case Satisfied(counter):
                flight = self._flights.get(counter)
                return self._satisfied(flight, now) if flight and flight.finished is None else []
            case WorkerUp(member):
                self._workers[member.identity] = member
                return []
            case WorkerDown(identity):
                return self._worker_down(identity, now)
            case _:
                return self._heard(event, now)

    def deadline(self) -> float | None:
        while self._alarms:
            when, counter = self._alarms[0]
            flight = self._flights.get(counter)
            if flight is not None and self._until(flight) <= when:
                return when
            heappop(self._alarms)  # ended, or its offer was answered: a later alarm of it is further down
        return None

    def check(self) -> None:
        assert self.deadline() == min((self._until(flight) for flight in self._flights.values()), default=None)
        for counter, flight in self._flights.items():
            assert counter == flight.counter
            assert not flight.phase.ended
            assert (flight.ticket is None) == (flight.phase is Phase.QUEUED)
            assert flight.base <= len(flight.tokens) <= flight.request.sampling.max_tokens

    def _until(self, flight: _Flight) -> float:
        if flight.finished is not None:
            return min(flight.finished_at + REPORT_S, flight.deadline)
        offer = flight.offered_at + self._config.offer_s if flight.phase is Phase.OFFERED else flight.deadline
        return min(offer, flight.deadline)

    def _arrived(self, flight: _Flight, now: float) -> list[RouterCommand]:
        self._flights[flight.counter] = flight
        heappush(self._alarms, (flight.deadline, flight.counter))
        if missing := self.missing():
            return self._end(flight, Phase.REJECTED, missing, "UNAVAILABLE", now)
        prompt = len(flight.request.prompt)
        room = max(member.kv_tokens for member in self._ready() if member.role.prefills)
        if prompt > room:
            why = f"prompt: got {prompt} tokens, no worker holds more than {room}"
            return self._end(flight, Phase.REJECTED, why, "INVALID_ARGUMENT", now)
        pairs = [(source, sink) for source in self._sources(flight) for sink in self._decoders()]
        room = max(self._room(flight, source, sink) for source, sink in pairs)
        if flight.size > room:
            why = f"prompt and max_tokens: got {flight.size} tokens, no decode worker holds more than {room}"
            return self._end(flight, Phase.REJECTED, why, "INVALID_ARGUMENT", now)
        return self._offer(flight, now)

    def _offer(self, flight: _Flight, now: float) -> list[RouterCommand]:
        """Offer to the next best prefill worker; when all refused, say so early and when to come back."""
        for source in self._sources(flight):
            best = self._sinks(flight, source)
            if best:
                break
        else:
            return self._shed(flight, now)
        flight.attempt += 1
        flight.tried.add(source)
        flight.ticket = Ticket(self._me, flight.counter, flight.attempt, source, best[0])
        flight.second = best[1] if len(best) > 1 else None
        flight.phase, flight.offered_at = Phase.OFFERED, now
        heappush(self._alarms, (self._until(flight), flight.counter))
        slo = flight.request.slo.ttft_s
        wait_s = max(0.0, flight.arrived_at + (slo or self._config.max_queue_s) - now)
        request = self._rest(flight, now)
        offer = Offer(flight.ticket, len(request.prompt), request.sampling.max_tokens, wait_s, request.hints)
        return [ToOne(source, offer)]

    def _sources(self, flight: _Flight) -> list[Identity]:
        """Prefill workers that were not tried yet, best first."""
        prefills = (member.identity for member in self._ready() if member.role.prefills)
        untried = [identity for identity in prefills if identity not in flight.tried]
        return sorted(untried, key=lambda identity: (self._load(identity, sink=False), identity))

    def _decoders(self) -> list[Member]:
        return [member for member in self._ready() if member.role.decodes]

    def _ready(self) -> list[Member]:
        """Workers that take new requests; one that is not ready goes on with those it has."""
        return [member for member in self._workers.values() if member.ready]

    def _sinks(self, flight: _Flight, source: Identity) -> list[Identity]:
        """Decode workers with room for it, best first; a mixed worker keeps its own."""
        fitting = [member for member in self._decoders() if self._room(flight, source, member) >= flight.size]
        if any(member.identity == source for member in fitting):
            return [source]
        fitting.sort(key=lambda member: (self._load(member.identity, sink=True) / member.kv_tokens, member.identity))
        return [member.identity for member in fitting]

    def _room(self, flight: _Flight, source: Identity, sink: Member) -> int:
        """Tokens of it that `sink` can hold; while a worker hands over to itself it holds the prompt twice."""
        if sink.identity != source or sink.kv is None:
            return sink.kv_tokens
        prompt = len(flight.request.prompt) + len(flight.tokens)
        return sink.kv_tokens - sink.kv.pages_for(prompt) * sink.kv.page_tokens

    def _shed(self, flight: _Flight, now: float) -> list[RouterCommand]:
        phase = Phase.FAILED if flight.tokens else Phase.REJECTED
        if not flight.refusals:
            why = self.missing() or "no worker with room for it answers"
            return self._end(flight, phase, why, "UNAVAILABLE", now)
        best = min(flight.refusals, key=lambda reject: reject.wait_s)
        why = f"all {len(flight.refusals)} prefill workers refused; {best.ticket.source.name}: {best.reason}"
        return self._end(flight, phase, why, "RESOURCE_EXHAUSTED", now, retry_s=max(best.wait_s, 0.1))

    def _rest(self, flight: _Flight, now: float) -> Request:
        """What is left to do: the tokens so far are forced, because they are part of the prompt."""
        request, done = flight.request, tuple(flight.tokens)
        return replace(
            request,
            prompt=request.prompt + done,
            sampling=replace(request.sampling, max_tokens=request.sampling.max_tokens - len(done)),
            timeout_s=max(0.0, flight.deadline - now),
        )

    def _load(self, identity: Identity, *, sink: bool) -> int:
        """Tokens this gateway has in flight at a worker."""
        total = 0
        for flight in self._flights.values():
            ticket = flight.ticket
            if ticket is None:
                continue
            if sink and ticket.sink == identity:
                total += flight.size
            elif not sink and ticket.source == identity and flight.phase in (Phase.OFFERED, Phase.PREFILLING):
                total += len(flight.request.prompt)
        return total

    def _heard(self, message: ToGateway, now: float) -> list[RouterCommand]:
        flight = self._flights.get(message.ticket.counter)
        if flight is None or flight.ticket is None or message.ticket.key != flight.ticket.key:
            return self._ignore()
        if flight.phase is Phase.DECODING and message.ticket != flight.ticket and not isinstance(message, Handed):
            return self._ignore()  # another sink has the KV as well, because a Taken was lost on its way
        if flight.finished is not None:
            return self._reported(flight, message, now)
        match message:
            case Accept(_, cached_tokens):
                if flight.phase is not Phase.OFFERED:
                    return self._ignore()
                self._enter(flight, Phase.PREFILLING)
                flight.cached_tokens = cached_tokens
                flight.placements += 1
                flight.stages.append(Stage("queued", self._me.name, flight.offered_at - flight.arrived_at))
                flight.stages.append(Stage("offered", self._me.name, now - flight.offered_at))
                flight.base = len(flight.tokens)
                prompt = Prompt(flight.ticket, self._rest(flight, now), flight.second)
                return [ToOne(flight.ticket.source, prompt)]
            case Reject():
                if flight.phase is not Phase.OFFERED:
                    return self._ignore()
                flight.refusals.append(message)
                return self._again(flight, now)
            case Tokens():
                return self._tokens(flight, message, now)
            case Handed(_, stages):
                flight.stages += stages
                flight.handed = True
                return self._moved(flight, message.ticket, now)
            case Finished(_, _, completion, _, stages):
                flight.stages += stages
                if flight.base + completion != len(flight.tokens):
                    why = f"{flight.base + completion} tokens were generated, {len(flight.tokens)} came"
                    return self._lost_attempt(flight, why, now)
                # Two streams: the prefill worker's report may come after the decode worker's last word.
                late = flight.phase is Phase.DECODING and not flight.handed
                return self._wait(flight, message, {Handed: flight.ticket.source} if late else {}, now)
            case Failed(_, code, why, stages):
                flight.stages += stages
                if code in ("UNAVAILABLE", "ABORTED", "DATA_LOSS"):
                    # A prefill worker that cannot hand over, or is about to end, would only fail it again.
                    blamed = None if flight.phase is Phase.DECODING else flight.ticket.source
                    return self._lost_attempt(flight, why, now, blamed)
                return self._end(flight, Phase.FAILED, why, code, now)

    def _tokens(self, flight: _Flight, message: Tokens, now: float) -> list[RouterCommand]:
        """Deliver what is new; a token that was sent is never sent again nor changed."""
        have = len(flight.tokens)
        first = flight.base + message.index
        if first > have:
            return self._lost_attempt(flight, f"token {first} came after {have} tokens", now)
        fresh = message.tokens[have - first :]
        if not fresh:
            return []
        flight.tokens.extend(fresh)
        if flight.phase is Phase.PREFILLING:
            self._enter(flight, Phase.HANDING_OFF)
        deliver = Deliver(flight.counter, fresh, message.logits_hashes[have - first :])
        if len(flight.tokens) > flight.base + 1:
            return [deliver, *self._moved(flight, message.ticket, now)]
        return [deliver]

    def _satisfied(self, flight: _Flight, now: float) -> list[RouterCommand]:
        """Recall what is left of it, and wait a little for the stages of what was done."""
        recall = self._recall(flight, "stop string", report=True)
        if flight.ticket is None or flight.phase not in (Phase.HANDING_OFF, Phase.DECODING):
            return [*recall, *self._end(flight, Phase.DONE, "stop", "OK", now)]
        owing: dict[type[ToGateway], Identity] = {} if flight.handed else {Handed: flight.ticket.source}
        if flight.phase is Phase.DECODING:
            owing[Finished] = flight.ticket.sink
        elif len(flight.tokens) == flight.request.sampling.max_tokens:
            owing = {Finished: flight.ticket.source}  # under way already: nothing is handed over
        finished = Finished(flight.ticket, "stop", len(flight.tokens) - flight.base)
        return [*recall, *self._wait(flight, finished, owing, now)]

    def _wait(
        self, flight: _Flight, finished: Finished, owing: dict[type[ToGateway], Identity], now: float
    ) -> list[RouterCommand]:
        """All tokens are here; end it when the reports that can still come have."""
        gone = flight.broken | {who for who in owing.values() if who not in self._workers}
        flight.finished, flight.finished_at = finished, now
        flight.owing = {kind: who for kind, who in owing.items() if who not in gone}
        if not flight.owing:
            return self._finish(flight, now)
        heappush(self._alarms, (self._until(flight), flight.counter))
        return []

    def _reported(self, flight: _Flight, message: ToGateway, now: float) -> list[RouterCommand]:
        """A worker that failed before it was recalled has nothing to add, either."""
        kind = type(message)
        if isinstance(message, Failed):
            kind = Finished if flight.phase is Phase.DECODING else Handed
        if not isinstance(message, Handed | Finished | Failed) or flight.owing.pop(kind, None) is None:
            return self._ignore()
        flight.stages += message.stages
        return [] if flight.owing else self._finish(flight, now)

    def _finish(self, flight: _Flight, now: float) -> list[RouterCommand]:
        assert flight.finished is not None
        end = flight.finished
        return self._end(flight, Phase.DONE, end.reason, "OK", now, stop_token_id=end.stop_token_id)

    def _moved(self, flight: _Flight, ticket: Ticket, now: float) -> list[RouterCommand]:
        """The sink has the KV; it may be the second choice, and it may have died since."""
        if flight.phase is not Phase.HANDING_OFF:
            return []
        self._enter(flight, Phase.DECODING)
        if flight.ticket is not None and flight.ticket.sink != ticket.sink:
            flight.second = flight.ticket.sink
        flight.ticket = ticket
        if ticket.sink in self._workers and ticket.sink not in flight.broken:
            return []
        return self._lost_attempt(flight, f"{ticket.sink.name} was lost", now)

    def _worker_down(self, identity: Identity, now: float) -> list[RouterCommand]:
        self._workers.pop(identity, None)
        commands: list[RouterCommand] = []
        for flight in list(self._flights.values()):
            ticket = flight.ticket
            if ticket is None:
                continue
            if flight.finished is not None:
                flight.owing = {kind: who for kind, who in flight.owing.items() if who != identity}
                commands += [] if flight.owing else self._finish(flight, now)
                continue
            flight.broken.add(identity)
            needs_source = flight.phase in (Phase.OFFERED, Phase.PREFILLING, Phase.HANDING_OFF)
            at_source = needs_source and ticket.source == identity
            at_sink = flight.phase is Phase.DECODING and ticket.sink == identity
            if at_source or at_sink:
                commands += self._lost_attempt(flight, f"{identity.name} was lost", now)
        return commands

    def _lost_attempt(
        self, flight: _Flight, why: str, now: float, blamed: Identity | None = None
    ) -> list[RouterCommand]:
        """Place it again, elsewhere than at the `blamed` prefill worker if there is another."""
        if len(flight.tokens) == flight.request.sampling.max_tokens:
            return [*self._recall(flight, why), *self._end(flight, Phase.DONE, "length", "OK", now)]
        if flight.placements >= self._config.max_attempts:
            why = f"{flight.placements} attempts, the last: {why}"
            return self._end(flight, Phase.FAILED, why, "UNAVAILABLE", now)
        others = any(member.role.prefills and member.identity != blamed for member in self._ready())
        flight.tried = {blamed} if blamed is not None and others else set()
        flight.refusals.clear()
        return [*self._recall(flight, why), *self._again(flight, now)]

    def _again(self, flight: _Flight, now: float) -> list[RouterCommand]:
        self._enter(flight, Phase.QUEUED)
        flight.ticket, flight.handed = None, False
        flight.broken.clear()
        return self._offer(flight, now)

    def _overdue(self, now: float) -> list[RouterCommand]:
        commands: list[RouterCommand] = []
        for flight in [flight for flight in self._flights.values() if self._until(flight) <= now]:
            if flight.finished is not None:
                commands += self._finish(flight, now)
            elif flight.deadline <= now:
                why = f"not done within {flight.request.timeout_s:g} s, {len(flight.tokens)} tokens were sent"
                commands += self._end(flight, Phase.FAILED, why, "DEADLINE_EXCEEDED", now)
            else:
                commands += [*self._recall(flight, "offer not answered"), *self._again(flight, now)]
        return commands

    def _recall(self, flight: _Flight, reason: str, *, report: bool = False) -> list[RouterCommand]:
        """Cancel at every worker that may hold something for this attempt."""
        ticket = flight.ticket
        if ticket is None:
            return []
        where = [ticket.source]
        if flight.phase is not Phase.OFFERED:
            where += [who for who in (ticket.sink, flight.second) if who is not None and who not in where]
        return [ToOne(who, Cancel(ticket, reason, report)) for who in where if who in self._workers]

    def _end(
        self,
        flight: _Flight,
        phase: Phase,
        reason: str,
        code: str,
        now: float,
        *,
        retry_s: float | None = None,
        stop_token_id: int | None = None,
    ) -> list[RouterCommand]:
        commands = [] if phase is Phase.DONE else self._recall(flight, reason)
        self._enter(flight, phase)
        del self._flights[flight.counter]
        end = End(
            flight.counter,
            phase,
            reason,
            code,
            retry_s,
            stop_token_id,
            flight.cached_tokens,
            tuple(flight.stages),
            max(flight.placements, 1),
        )
        return [*commands, end]

    def _enter(self, flight: _Flight, phase: Phase) -> None:
        if phase not in PHASE_NEXT[flight.phase]:
            raise LocalError(f"request {flight.counter}: got {phase} after {flight.phase}")
        flight.phase = phase

    def _ignore(self) -> list[RouterCommand]:
        self.ignored += 1
        return []
