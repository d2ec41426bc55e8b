"""Where a request goes, and what becomes of it: the gateway's one decision maker. Pure.

Offers a request to prefill workers, least loaded first, until one accepts (after P/D-Serve, "on-demand forwarding
upon rejections"); chooses its decode worker; puts tokens in order and drops duplicates; places it again, with the
tokens so far, when a worker that it needs is lost. Continuations of one prompt travel together as long as they are
alike: when their placement is lost after the first token, each goes on by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from core.sampling import Logprobs
from core.worker import Identity, Member, Role
from scheduler.calls import Branch, Call, Flight
from scheduler.placement import Load, MostTokens, Workers

REPORT_S = 0.25
"""A request whose tokens are all here waits no longer than this for the stages of what was done."""


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
    """A continuation has its stop string: the rest of it is not wanted, the stages of what was done are."""

    counter: int
    branch: int = 0


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
    """Give the client these tokens of a continuation, which follow those delivered before."""

    counter: int
    tokens: tuple[int, ...]
    logits_hashes: tuple[int, ...]
    branch: int = 0
    logprobs: tuple[Logprobs, ...] = ()
    """One for each of `tokens`, if they were asked for."""
    prompt_logprobs: tuple[Logprobs | None, ...] = ()
    """One for each token of the prompt, if they were asked for; once, before any token or with the first."""


@dataclass(frozen=True, slots=True)
class Complete:
    """A continuation is done while others go on; the last one's end is the request's `End`."""

    counter: int
    branch: int
    reason: str
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class End:
    """The request is over. `phase` is DONE, REJECTED, CANCELLED or FAILED."""

    counter: int
    phase: Phase
    reason: str
    """Finish reason of the last continuation if DONE, else a sentence."""
    code: str = "OK"
    """Name of a gRPC status."""
    retry_s: float | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    stages: tuple[Stage, ...] = ()
    attempts: int = 1
    branch: int = 0
    """The last continuation."""


RouterEvent = Arrived | ClientGone | Satisfied | WorkerUp | WorkerDown | ToGateway
RouterCommand = ToOne | Deliver | Complete | End


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Settings of a gateway's policy."""

    max_queue_s: float = 30.0
    """A request without a TTFT goal is accepted while its wait stays under this."""
    offer_s: float = 1.0
    """A worker that does not answer an offer within this time is passed over."""
    max_attempts: int = 4
    """Placements of one request before it fails."""


class Router:
    """All requests of one gateway. Each `Arrived` ends in exactly one `End`."""

    def __init__(self, me: Identity, config: RouterConfig) -> None:
        self._me = me
        self._config = config
        self._workers = Workers()
        self._calls: dict[int, Call] = {}
        self._flights: dict[str, Flight] = {}
        """By the key of their ticket: at rest, everyone has one."""
        self._alarms: list[tuple[float, str]] = []
        """A heap of when each flight may need a look; stale entries are dropped when they come up."""
        self.ignored = 0
        """Messages about old attempts or ended requests."""

    def __len__(self) -> int:
        return len(self._calls)

    def phases(self) -> dict[Phase, int]:
        """Live placements in each phase."""
        counts = {phase: 0 for phase in Phase if not phase.ended}
        for flight in self._flights.values():
            counts[flight.phase] += 1
        return counts

    def missing(self) -> str | None:
        """What the deployment lacks to serve anything, None if nothing."""
        return self._workers.missing()

    def most_tokens(self) -> MostTokens:
        """What workers have room for, as of now."""
        return self._workers.most_tokens()

    def on(self, event: RouterEvent | None, now: float) -> list[RouterCommand]:
        match event:
            case None:
                return self._overdue(now)
            case Arrived(counter, request):
                if counter in self._calls:
                    raise LocalError(f"request {counter} arrived twice")
                return self._arrived(counter, request, now)
            case ClientGone(counter, reason):
                call = self._calls.get(counter)
                return self._end(call, Phase.CANCELLED, reason, "CANCELLED") if call else []
            case Satisfied(counter, branch):
                call = self._calls.get(counter)
                return self._satisfied(call, branch, now) if call else []
            case WorkerUp(member):
                self._workers.up(member)
                return []
            case WorkerDown(identity):
                return self._worker_down(identity, now)
            case _:
                return self._heard(event, now)

    def deadline(self) -> float | None:
        while self._alarms:
            when, key = self._alarms[0]
            flight = self._flights.get(key)
            if flight is not None and self._until(flight) <= when:
                return when
            heappop(self._alarms)  # ended, or its offer was answered: a later alarm of it is further down
        return None

    def check(self) -> None:
        assert self.deadline() == min((self._until(flight) for flight in self._flights.values()), default=None)
        self._workers.check(self._flights)
        for key, flight in self._flights.items():
            assert key == flight.ticket.key
            assert flight in flight.call.flights
            assert not flight.phase.ended
            assert flight.live() or flight.finished is not None
        for counter, call in self._calls.items():
            assert counter == call.counter
            carried = [branch for flight in call.flights for branch in flight.live()]
            living = [index for index, branch in enumerate(call.branches) if not branch.done]
            assert sorted(carried) == living, "a continuation is lost or placed twice"
            assert not call.prompt_due or not any(branch.tokens or branch.done for branch in call.branches)
            for branch in call.branches:
                assert len(branch.tokens) <= call.request.sampling.max_tokens

    # Placing.
    def _arrived(self, counter: int, request: Request, now: float) -> list[RouterCommand]:
        branches = [Branch() for _ in range(request.sampling.n)]
        due = request.sampling.prompt_logprobs is not None
        call = self._calls[counter] = Call(counter, request, now, branches, due)
        if missing := self.missing():
            return self._end(call, Phase.REJECTED, missing, "UNAVAILABLE")
        if why := self._workers.too_large(request):
            return self._end(call, Phase.REJECTED, why, "INVALID_ARGUMENT")
        return self._place(call, tuple(range(len(branches))), 0, set(), now)

    def _place(
        self, call: Call, branches: tuple[int, ...], placements: int, tried: set[Identity], now: float
    ) -> list[RouterCommand]:
        """Put continuations on their way: all of them with the prompt alone, or one with its tokens so far."""
        flight = Flight(call, branches, call.request, placements=placements, tried=tried, queued_at=now)
        call.flights.append(flight)
        return self._offer(flight, now)

    def _offer(self, flight: Flight, now: float) -> list[RouterCommand]:
        """Offer to the next best prefill worker; when all refused, say so early and when to come back."""
        call = flight.call
        flight.request = self._rest(flight, now)
        wait_s = max(0.0, self._patience(flight) - now)
        for source in self._workers.sources(flight.tried):
            sinks = self._workers.sinks(source, flight.request)
            if sinks:
                break
        else:
            if not flight.silent or not wait_s:
                return self._shed(flight)
            flight.tried -= flight.silent  # busy, not lost: they are asked again as long as that is soon enough
            flight.silent.clear()
            return self._offer(flight, now)
        call.offers += 1
        flight.tried.add(source)
        flight.placed = ticket = Ticket(self._me, call.counter, call.offers, source, sinks[0])
        flight.second = sinks[1] if len(sinks) > 1 else None
        flight.offered_at = now
        self._flights[ticket.key] = flight
        self._enter(flight, Phase.OFFERED)
        heappush(self._alarms, (self._until(flight), ticket.key))
        heappush(self._alarms, (call.deadline, ticket.key))
        request = flight.request
        offer = Offer(ticket, len(request.prompt), request.sampling.max_tokens, wait_s, request.hints)
        return [ToOne(source, offer)]

    def _patience(self, flight: Flight) -> float:
        """Until when a place in a queue is worth taking: one that was begun is finished as late as it may be."""
        call = flight.call
        if flight.placements:
            return call.deadline
        return call.arrived_at + (call.request.slo.ttft_s or self._config.max_queue_s)

    def _rest(self, flight: Flight, now: float) -> Request:
        """What is left to do: the tokens so far are forced, because they are part of the prompt."""
        call, request = flight.call, flight.call.request
        request = replace(request, timeout_s=max(0.0, call.deadline - now))
        if request.sampling.prompt_logprobs is not None and not call.prompt_due:
            request = replace(request, sampling=replace(request.sampling, prompt_logprobs=None))
        if len(flight.branches) > 1:
            flight.base = 0
            return request
        (branch,) = flight.branches
        done = tuple(call.branches[branch].tokens)
        flight.base = len(done)
        sampling = request.sampling.branch(branch)
        most, least = sampling.max_tokens - len(done), max(0, sampling.min_tokens - len(done))
        return replace(
            request,
            prompt=request.prompt + done,
            sampling=replace(sampling, max_tokens=most, min_tokens=least),
            generated=request.generated + len(done),
        )

    def _shed(self, flight: Flight) -> list[RouterCommand]:
        call = flight.call
        phase = Phase.FAILED if any(branch.tokens for branch in call.branches) else Phase.REJECTED
        if not flight.refusals:
            why = self.missing() or "no worker with room for it answers"
            return self._end(call, phase, why, "UNAVAILABLE")
        best = min(flight.refusals, key=lambda reject: reject.wait_s)
        why = f"all {len(flight.refusals)} prefill workers refused; {best.ticket.source.name}: {best.reason}"
        return self._end(call, phase, why, "RESOURCE_EXHAUSTED", retry_s=max(best.wait_s, 0.1))

    # Messages of workers.
    def _heard(self, message: ToGateway, now: float) -> list[RouterCommand]:
        flight = self._flights.get(message.ticket.key)
        if flight is None:
            return self._ignore()
        by_source = isinstance(message, Handed) or (isinstance(message, Finished) and not message.decoded)
        if flight.phase is Phase.DECODING and message.ticket != flight.ticket and not by_source:
            return self._ignore()  # another sink has the KV as well, because a Taken was lost on its way
        if flight.finished is not None:
            return self._reported(flight, message)
        early = isinstance(message, Finished) or (isinstance(message, Tokens) and not message.prompt_logprobs)
        if early and flight.call.prompt_due:
            flight.held.append(message)
            return []
        if isinstance(message, Handed | Finished | Failed):
            flight.reports[flight.part(message)] = message.stages
        match message:
            case Accept(_, cached_tokens):
                if flight.phase is not Phase.OFFERED:
                    return self._ignore()
                return self._accepted(flight, cached_tokens, now)
            case Reject():
                if flight.phase is not Phase.OFFERED:
                    return self._ignore()
                flight.refusals.append(message)
                return self._again(flight, now)
            case Tokens():
                commands = self._tokens(flight, message, now)
                held, flight.held = flight.held, []
                for each in held:
                    commands += self._heard(each, now)
                return commands
            case Handed():
                flight.handed = True
                return self._moved(flight, message.ticket, now)
            case Finished():
                return self._finished(flight, message, now)
            case Failed(_, code, why):
                if code in ("UNAVAILABLE", "ABORTED", "DATA_LOSS"):
                    # A prefill worker that cannot hand over, or is about to end, would only fail it again.
                    blamed = None if flight.phase is Phase.DECODING else flight.ticket.source
                    return self._lost_attempt(flight, why, now, blamed)
                return self._end(flight.call, Phase.FAILED, why, code)

    def _accepted(self, flight: Flight, cached_tokens: int, now: float) -> list[RouterCommand]:
        call, ticket = flight.call, flight.ticket
        self._enter(flight, Phase.PREFILLING)
        call.cached_tokens = cached_tokens
        flight.placements += 1
        call.placements = max(call.placements, flight.placements)
        call.stages.append(Stage("queued", self._me.name, flight.offered_at - flight.queued_at))
        call.stages.append(Stage("offered", self._me.name, now - flight.offered_at))
        flight.request = replace(flight.request, timeout_s=max(0.0, call.deadline - now))
        return [ToOne(ticket.source, Prompt(ticket, flight.request, flight.second))]

    def _tokens(self, flight: Flight, message: Tokens, now: float) -> list[RouterCommand]:
        """Deliver what is new; a token that was sent is never sent again nor changed."""
        if message.branch >= len(flight.branches):
            return self._ignore()
        index = flight.branches[message.branch]
        branch = flight.call.branches[index]
        if branch.done:
            return []
        have = len(branch.tokens)
        first = flight.base + message.index
        if first > have:
            return self._lost_attempt(flight, f"token {first} came after {have} tokens", now)
        new = slice(have - first, None)
        fresh = message.tokens[new]
        told = message.prompt_logprobs if flight.call.prompt_due else ()
        if not fresh and not told:
            return []
        branch.tokens.extend(fresh)
        if told:
            flight.call.prompt_due = False
        if fresh and flight.phase is Phase.PREFILLING:
            self._enter(flight, Phase.HANDING_OFF)
        hashes, logprobs = message.logits_hashes[new], message.logprobs[new]
        deliver = Deliver(flight.call.counter, fresh, hashes, index, logprobs, told)
        if len(branch.tokens) > flight.base + 1:
            return [deliver, *self._moved(flight, message.ticket, now)]
        return [deliver]

    def _finished(self, flight: Flight, message: Finished, now: float) -> list[RouterCommand]:
        if message.branch >= len(flight.branches):
            return self._ignore()
        index = flight.branches[message.branch]
        branch = flight.call.branches[index]
        if branch.done:
            return []
        if flight.base + message.completion_tokens != len(branch.tokens):
            why = f"{flight.base + message.completion_tokens} tokens were generated, {len(branch.tokens)} came"
            return self._lost_attempt(flight, why, now)
        commands = self._moved(flight, message.ticket, now) if message.decoded else []
        if message.ticket.key not in self._flights:
            return commands
        if flight.live() != [index]:
            return [*commands, *self._complete(flight.call, index, message.reason, message.stop_token_id)]
        commands += self._recall(flight, "done", report=True) if flight.untold else []
        # Two streams: the prefill worker's report may come after the decode worker's last word.
        late = flight.phase is Phase.DECODING and not flight.handed
        owing = {Role.PREFILL: flight.ticket.source} if late or flight.untold else {}
        return [*commands, *self._wait(flight, replace(message, branch=index), owing, now)]

    def _moved(self, flight: Flight, ticket: Ticket, now: float) -> list[RouterCommand]:
        """The sink has the KV; it may be the second choice, and it may have died since."""
        if flight.phase is not Phase.HANDING_OFF:
            return []
        if flight.ticket.sink != ticket.sink:
            flight.second = flight.ticket.sink
        flight.placed = ticket
        self._enter(flight, Phase.DECODING)
        if ticket.sink not in self._workers or ticket.sink in flight.broken:
            return self._lost_attempt(flight, f"{ticket.sink.name} was lost", now)
        untold, flight.untold = flight.untold, []
        return [ToOne(ticket.sink, Cancel(ticket, "stop string", branch=local)) for local in untold]

    # Ends.
    def _satisfied(self, call: Call, index: int, now: float) -> list[RouterCommand]:
        """Recall what is left of a continuation; after the last, wait a little for the stages of what was done."""
        flight = next((flight for flight in call.flights if index in flight.live()), None)
        if flight is None or flight.finished is not None:
            return []
        if flight.live() != [index]:
            local = flight.branches.index(index)
            if flight.phase is Phase.DECODING:
                return [*self._recall(flight, "stop string", branch=local), *self._complete(call, index, "stop")]
            flight.untold.append(local)
            return self._complete(call, index, "stop")
        recall, tokens = self._recall(flight, "stop string", report=True), len(call.branches[index].tokens)
        owing: dict[Role, Identity] = {}
        if flight.phase in (Phase.HANDING_OFF, Phase.DECODING) and not flight.handed:
            owing[Role.PREFILL] = flight.ticket.source
        if flight.phase is Phase.DECODING:
            owing[Role.DECODE] = flight.ticket.sink
        finished = Finished(flight.ticket, "stop", tokens - flight.base, branch=index)
        return [*recall, *self._wait(flight, finished, owing, now)]

    def _complete(self, call: Call, index: int, reason: str, stop_token_id: int | None = None) -> list[RouterCommand]:
        call.branches[index].done = True
        return [Complete(call.counter, index, reason, stop_token_id)]

    def _wait(self, flight: Flight, finished: Finished, owing: dict[Role, Identity], now: float) -> list[RouterCommand]:
        """All tokens are here; end it when the reports that can still come have."""
        gone = flight.broken | {who for who in owing.values() if who not in self._workers}
        flight.finished, flight.finished_at = finished, now
        flight.owing = {part: who for part, who in owing.items() if who not in gone}
        if not flight.owing or len(flight.call.flights) > 1:
            return self._finish(flight)
        heappush(self._alarms, (self._until(flight), flight.ticket.key))
        return []

    def _reported(self, flight: Flight, message: ToGateway) -> list[RouterCommand]:
        """A worker that failed before it was recalled has nothing to add, either."""
        if not isinstance(message, Handed | Finished | Failed):
            return self._ignore()
        part = flight.part(message)
        if flight.owing.pop(part, None) is None:
            return self._ignore()
        flight.reports[part] = message.stages
        return [] if flight.owing else self._finish(flight)

    def _finish(self, flight: Flight) -> list[RouterCommand]:
        """The last continuation of a flight is done, and with the last flight the request."""
        assert flight.finished is not None
        call, end = flight.call, flight.finished
        if len(call.flights) == 1:
            call.branches[end.branch].done = True
            return self._end(call, Phase.DONE, end.reason, "OK", stop_token_id=end.stop_token_id, branch=end.branch)
        self._drop(flight, Phase.DONE)
        return self._complete(call, end.branch, end.reason, end.stop_token_id)

    def _worker_down(self, identity: Identity, now: float) -> list[RouterCommand]:
        self._workers.down(identity)
        commands: list[RouterCommand] = []
        for key, flight in list(self._flights.items()):
            if self._flights.get(key) is not flight:
                continue  # ended with a sibling
            if flight.finished is not None:
                flight.owing = {part: who for part, who in flight.owing.items() if who != identity}
                commands += [] if flight.owing else self._finish(flight)
                continue
            flight.broken.add(identity)
            needs_source = flight.phase in (Phase.OFFERED, Phase.PREFILLING, Phase.HANDING_OFF)
            at_source = needs_source and flight.ticket.source == identity
            at_sink = flight.phase is Phase.DECODING and flight.ticket.sink == identity
            if at_source or at_sink:
                commands += self._lost_attempt(flight, f"{identity.name} was lost", now)
        return commands

    def _lost_attempt(
        self, flight: Flight, why: str, now: float, blamed: Identity | None = None
    ) -> list[RouterCommand]:
        """Place what is left again, elsewhere than at the `blamed` prefill worker if there is another."""
        call = flight.call
        whole = call.request.sampling.max_tokens
        commands = self._recall(flight, why)
        live = flight.live()
        full = [index for index in live if len(call.branches[index].tokens) == whole]
        if full == live:
            for index in full[:-1]:
                commands += self._complete(call, index, "length")
            flight.finished = Finished(flight.ticket, "length", 0, branch=full[-1])
            return [*commands, *self._finish(flight)]
        if flight.placements >= self._config.max_attempts:
            why = f"{flight.placements} attempts, the last: {why}"
            return [*commands, *self._end(call, Phase.FAILED, why, "UNAVAILABLE", recalled=flight)]
        tried = {blamed} if blamed is not None and self._workers.others(blamed) else set()
        begun = any(call.branches[index].tokens or call.branches[index].done for index in flight.branches)
        self._drop(flight, Phase.QUEUED)
        if not begun:
            return [*commands, *self._place(call, flight.branches, flight.placements, tried, now)]
        for index in full:
            commands += self._complete(call, index, "length")
        for index in live:
            if index not in full and call.counter in self._calls:
                commands += self._place(call, (index,), flight.placements, set(tried), now)
        return commands

    def _again(self, flight: Flight, now: float) -> list[RouterCommand]:
        """Offer the same to the next."""
        self._drop(flight, Phase.QUEUED)
        flight.call.flights.append(flight)
        flight.placed = None
        flight.broken.clear()
        return self._offer(flight, now)

    def _overdue(self, now: float) -> list[RouterCommand]:
        commands: list[RouterCommand] = []
        for key in [key for key, flight in self._flights.items() if self._until(flight) <= now]:
            flight = self._flights.get(key)
            if flight is None:
                continue  # ended with a sibling
            call = flight.call
            if flight.finished is not None:
                commands += self._finish(flight)
            elif call.deadline <= now:
                sent = sum(len(branch.tokens) for branch in call.branches)
                why = f"not done within {call.request.timeout_s:g} s, {sent} tokens were sent"
                commands += self._end(call, Phase.FAILED, why, "DEADLINE_EXCEEDED")
            else:
                flight.silent.add(flight.ticket.source)
                commands += [*self._recall(flight, "offer not answered"), *self._again(flight, now)]
        return commands

    def _until(self, flight: Flight) -> float:
        deadline = flight.call.deadline
        if flight.finished is not None:
            return min(flight.finished_at + REPORT_S, deadline)
        offer = flight.offered_at + self._config.offer_s if flight.phase is Phase.OFFERED else deadline
        return min(offer, deadline)

    def _recall(
        self, flight: Flight, reason: str, *, report: bool = False, branch: int | None = None
    ) -> list[RouterCommand]:
        """Cancel at every worker that may hold something for this attempt."""
        ticket = flight.placed
        if ticket is None:
            return []
        where = [ticket.source]
        if flight.phase is not Phase.OFFERED:
            where += [who for who in (ticket.sink, flight.second) if who is not None and who not in where]
        return [ToOne(who, Cancel(ticket, reason, report, branch)) for who in where if who in self._workers]

    def _end(
        self,
        call: Call,
        phase: Phase,
        reason: str,
        code: str,
        *,
        retry_s: float | None = None,
        stop_token_id: int | None = None,
        branch: int = 0,
        recalled: Flight | None = None,
    ) -> list[RouterCommand]:
        """Over for the client, and for every worker that still has something of it."""
        commands: list[RouterCommand] = []
        for flight in list(call.flights):
            if phase is not Phase.DONE and flight is not recalled:
                commands += self._recall(flight, reason)
            self._drop(flight, phase)
        del self._calls[call.counter]
        end = End(
            call.counter,
            phase,
            reason,
            code,
            retry_s,
            stop_token_id,
            call.cached_tokens,
            tuple(call.stages),
            max(call.placements, 1),
            branch,
        )
        return [*commands, end]

    def _enter(self, flight: Flight, phase: Phase) -> None:
        if phase not in PHASE_NEXT[flight.phase]:
            raise LocalError(f"request {flight.call.counter}: got {phase} after {flight.phase}")
        flight.phase = phase
        if (ticket := flight.placed) is not None:
            waiting = phase in (Phase.OFFERED, Phase.PREFILLING)
            prompt = len(flight.request.prompt) if waiting else 0
            over = phase is Phase.QUEUED or phase.ended
            load = Load(ticket.source, prompt, ticket.sink, self._workers.size(flight.request))
            self._workers.hold(ticket.key, None if over else load)

    def _drop(self, flight: Flight, phase: Phase) -> None:
        """This attempt is over, or all of the flight."""
        self._enter(flight, phase)
        for part in (Role.PREFILL, Role.DECODE):
            flight.call.stages += flight.reports.pop(part, ())
        flight.call.flights.remove(flight)
        if flight.placed is not None:
            del self._flights[flight.placed.key]

    def _ignore(self) -> list[RouterCommand]:
        self.ignored += 1
        return []
