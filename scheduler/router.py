"""Where a request goes, and what becomes of it: the gateway's one decision maker. Pure.

Offers a request to prefill workers, in the order of a `Placement`, until one accepts (after P/D-Serve, "on-demand
forwarding upon rejections"); with the offer goes the choice of its decode worker. When all that were asked have refused
it waits for a worker that says it has room, as long as that can help, and is shed early where it cannot. Puts tokens in
order and drops duplicates; places a request again, with the tokens so far, when a worker that it needs is lost. If that
finds nobody who could take it, it is *stranded*: it waits for a worker to come, until its deadline. So does for a
moment who comes while there is no pair of workers, if there was one lately: most often one is being started again. Who
was present at crashes of workers is placed alone and in the end refused (`scheduler/suspects.py`).
Continuations of one prompt travel together as long as they are alike: when their placement is lost after the first
token, each goes on by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from core.errors import LocalError
from core.messages import (
    Accept,
    Answer,
    Cancel,
    Failed,
    Finished,
    Handed,
    Holding,
    Moved,
    Offer,
    Prompt,
    Reject,
    SlotFree,
    Tokens,
)
from core.request import PHASE_NEXT, Phase, Request, Stage, Ticket
from core.standing import Standing
from core.worker import Identity, Member, ProcessEnded, Role
from scheduler.budgets import Budgets
from scheduler.calls import Branch, Call, Flight
from scheduler.fair import OUTPUT, Parked
from scheduler.flights import Flights
from scheduler.lane import Lane
from scheduler.least_loaded import LeastLoaded
from scheduler.placement import Load, MostTokens, Need, Placement, Post, Workers
from scheduler.poison import Loss, Suspicion, crashes, suspicion
from scheduler.router_events import (
    Arrived,
    ClientGone,
    Complete,
    Deliver,
    Divided,
    End,
    RouterCommand,
    RouterEvent,
    Satisfied,
    ToOne,
    WorkerDown,
    WorkerQuiet,
    WorkerUp,
)
from scheduler.suspects import Suspects

MOST_DOUBLINGS = 30
"""Of the wait after an attempt that failed; it ends long before."""
LATER_S = 60.0
"""A request of the batch class that found no idle worker within its time may come again after this."""
REPORT_S = 0.25
"""A request whose tokens are all here waits no longer than this for the stages of what was done."""


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Settings of a gateway's policy."""

    max_queue_s: float = 30.0
    """A request without a TTFT goal is accepted while its wait stays under this."""
    offer_s: float = 1.0
    """A worker that does not answer an offer within this time is passed over."""
    max_attempts: int = 8
    """Placements of one request before it fails."""
    again_s: float = 0.1
    """After a prefill worker failed it, a request is placed again at once if there is another; where there is none, and
    after later failures, it waits so long, and twice as long after each. News of why must be faster than attempts."""
    again_most_s: float = 1.0
    """It never waits longer than this."""
    max_tries: int = 4
    """Refusals after which a request that is being placed waits for a worker to say that it has room."""
    offer_pages: int = 1024
    """Most hashes of a prompt's pages that go with an offer, 8 bytes each."""
    by_goal: bool = True
    """Who cannot have the first token in time is refused; False: everybody queues for as long as the client waits."""
    pair_s: float = 3.0
    """Requests that come while no pair of workers is ready, or lose the last before one accepts them, wait so long for
    one; 0: they are refused at once."""
    lately_s: float = 30.0
    """But only if there was a pair so lately, else nobody knows of any that may come."""
    word_s: float = 0.5
    """Where it matters whether a worker crashed or was stopped, a request waits so long at most for that to be said."""
    verdict_s: float = 2.7
    """A worker that nothing comes from is given up so long after that was noticed. Who would have lost half of the time
    that is left by then is placed again at once, if others can take it; so is whose prompt has been at a prefill worker
    for less than that, as it loses less by going than it may by staying."""
    mixed_alone: bool = False
    """A mixed worker keeps what it prefills and is handed nothing: it computes both phases in one step."""
    weights: tuple[tuple[str, float], ...] = ()
    """Of tenants, by name; those that are not named weigh 1. Who waits for room is served by them."""
    ahead_tokens: int = 8192
    """Prompt tokens of the batch class that a prefill worker is sent before it has computed them: enough not to be idle
    for want of a message, and little to lose with it. One request is always sent, however large."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A live request as far as its gateway has heard."""

    phase: Phase
    stages: tuple[Stage, ...]
    tokens: int
    """Delivered, of all continuations."""
    cached_tokens: int
    attempts: int


class Router:
    """All requests of one gateway. Each `Arrived` ends in exactly one `End`."""

    def __init__(self, me: Identity, config: RouterConfig, placement: Placement | None = None) -> None:
        self._me = me
        self._config = config
        self._placement = placement if placement is not None else LeastLoaded()
        loads = self._placement.queue_load, self._placement.decode_load
        self._workers = Workers(*loads, mixed_alone=config.mixed_alone)
        self._calls: dict[int, Call] = {}
        self._flights = Flights()
        self._parked = Parked(dict(config.weights))
        self._lane = Lane(dict(config.weights))
        """Of the batch class, those that wait for idle workers; they are among the stranded ones as well."""
        self._idle = False
        """There may be an idle worker for one of these."""
        self._budgets: Budgets | None = None
        """None as long as no request with a deadline has come."""
        self._stranded: dict[str, Flight] = {}
        """Begun flights that no pair of workers can take, or is to take yet, by the same key, in order of stranding."""
        self._suspects = Suspects(config.word_s)
        self._paired_at = -math.inf
        """When a pair of workers was ready last, as of the last change."""
        self._called: dict[Identity, Flight] = {}
        """Workers that said they have room, and the parked request that each was offered and has not answered."""
        self._roomy: list[Identity | int] = []
        """Workers that may have room for someone who waits, or the tokens that whoever is meant said to have room for;
        looked at when an event has been dealt with."""
        self.ignored = 0
        """Messages about old attempts or ended requests."""

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def name(self) -> str:
        """Of the gateway, as it stands in stages."""
        return self._me.name

    def knows(self, identity: Identity) -> bool:
        """True of a worker whose session stands."""
        return identity in self._workers

    def phases(self) -> dict[Phase, int]:
        """Live placements in each phase."""
        counts = {phase: 0 for phase in Phase if not phase.ended}
        for flight in self._flights:
            counts[flight.phase] += 1
        return counts

    def missing(self) -> str | None:
        """What the deployment lacks to serve anything, None if nothing."""
        return self._workers.missing()

    @property
    def page_tokens(self) -> int:
        """Tokens of a page whose hash workers know it by; 0 while nobody is there."""
        return self._workers.page_tokens if len(self._workers.prefills) else 0

    def most_tokens(self) -> MostTokens:
        """What workers have room for, or had as long as they were there."""
        return self._workers.most_tokens()

    def on(self, event: RouterEvent | None, now: float) -> list[RouterCommand]:
        match event:
            case Tokens() | Accept() | Handed() | Finished() | Reject() | Failed():
                commands = self._heard(event, now)
            case None:
                commands = self._overdue(now)
            case Arrived(counter, request):
                if counter in self._calls:
                    raise LocalError(f"request {counter} arrived twice")
                commands = self._arrived(counter, request, now)
            case ClientGone(counter, reason):
                call = self._calls.get(counter)
                commands = self._end(call, Phase.CANCELLED, reason, "CANCELLED") if call else []
            case Satisfied(counter, branch):
                call = self._calls.get(counter)
                commands = self._satisfied(call, branch, now) if call else []
            case WorkerUp(member):
                self._note_pair(now)
                commands = self._worker_up(member, now)
            case WorkerDown():
                self._note_pair(now)
                commands = self._worker_down(event, now)
            case WorkerQuiet(identity, quiet):
                commands = self._worker_quiet(identity, quiet, now)
            case ProcessEnded(identity, crashed):
                commands = self._settled(self._suspects.told(identity, crashed), now)
            case SlotFree(identity, tokens):
                post = self._workers.get(identity)
                commands = self._has_room(post, tokens) if post is not None and post.prefills else self._ignore()
            case Moved():
                commands = self._row_moved(event, now)
            case Divided(short, long, short_tokens):
                self._workers.divide(short, long, short_tokens)
                self._roomy += [post.identity for post in self._workers.free(1)]
                commands = []
        while self._suspects.freed:
            commands += self._next_suspects(now)
        if self._idle:
            commands += self._lend(now)
        if self._roomy:
            roomy, self._roomy = self._roomy, []
            for each in roomy:
                commands += self._call(each, now) if isinstance(each, Identity) else self._call_any(each, now)
        return commands

    def deadline(self) -> float | None:
        due = self._flights.next_look()
        return None if due == math.inf else due

    def standing(self) -> list[Standing]:
        """Of every flight, with who has it now."""
        return [self._stands(flight) for flight in self._flights]

    def trace(self, counter: int) -> Trace | None:
        """A live request so far; None if it is not."""
        call = self._calls.get(counter)
        if call is None:
            return None
        stages = list(call.stages)
        for flight in call.flights:
            for part in (Role.PREFILL, Role.DECODE):
                stages += _of_attempt(flight.reports.get(part, ()), flight.placements)
        sent = sum(len(branch.tokens) for branch in call.branches)
        phase = call.flights[0].phase if call.flights else Phase.QUEUED
        return Trace(phase, tuple(stages), sent, call.cached_tokens, max(call.placements, 1))

    def check(self) -> None:
        self._flights.check(self._until(flight) for flight in self._flights)
        self._suspects.check()
        self._workers.check(flight.load for flight in self._flights if flight.load is not None)
        for flight in self._flights:
            key = flight.key
            assert flight in flight.call.flights
            assert not flight.phase.ended
            assert flight.live() or flight.finished is not None
            waits = (key in self._parked) + (key in self._stranded)
            assert flight.parked == (flight.phase is Phase.QUEUED) == (flight.load is None) == waits
            assert not flight.called or self._called.get(flight.ticket.source) is flight
        self._parked.check()
        self._lane.check()
        lent: dict[Identity, int] = {}
        for flight in self._flights:
            if flight.lent is not None:
                assert flight.phase in (Phase.OFFERED, Phase.PREFILLING)
                assert flight.call.request.slo.batch
                lent[flight.lent.identity] = lent.get(flight.lent.identity, 0) + flight.need.tokens
            assert not flight.charged or flight.phase is Phase.OFFERED
            if flight.key in self._lane:
                assert flight.key in self._stranded
                assert flight.resumes == math.inf
        for post in self._workers.prefills:
            assert post.lent == lent.get(post.identity, 0), "idle time is lent for ever, or twice"
        parked = [flight for flight in self._flights if flight.parked]
        assert len(parked) == len(self._parked) + len(self._stranded)
        for key, flight in self._stranded.items():
            assert flight is self._flights[key]
            assert flight.placements or flight.gives_up < math.inf or flight.call.request.slo.batch
            assert not flight.refusals
        assert not self._roomy
        for identity, flight in self._called.items():
            assert flight.called
            assert flight.phase is Phase.OFFERED
            assert flight.ticket.source == identity
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
        if request.slo.deadline_s:
            self._budgets = self._budgets or Budgets()
            request = replace(request, slo=self._budgets.slo(request))
        branches = [Branch() for _ in range(request.sampling.n)]
        due = request.sampling.prompt_logprobs is not None
        call = self._calls[counter] = Call(counter, request, now, now + request.timeout_s, branches, due)
        if missing := self._workers.missing():
            if not self._lately(now):
                return self._end(call, Phase.REJECTED, missing, "UNAVAILABLE")
            need = Need(len(request.prompt), 0)  # what it may come to depends on the workers
            flight = Flight(call, tuple(range(len(branches))), need, queued_at=now)
            call.flights.append(flight)
            return self._hope(flight, now)
        return self._enters(call, now)

    def _enters(self, call: Call, now: float) -> list[RouterCommand]:
        """There are workers: place it, unless none of them could ever hold it."""
        if why := self._workers.too_large(call.request):
            return self._end(call, Phase.REJECTED, why, "INVALID_ARGUMENT")
        return self._place(call, tuple(range(len(call.branches))), 0, set(), now)

    def _note_pair(self, now: float) -> None:
        if self._workers.missing() is None:
            self._paired_at = now

    def _lately(self, now: float) -> bool:
        """Whether no pair of workers is ready, but one was a while ago."""
        return self._config.pair_s > 0 and now - self._paired_at <= self._config.lately_s

    def _hope(self, flight: Flight, now: float) -> list[RouterCommand]:
        """Wait a moment for workers."""
        flight.gives_up = min(flight.gives_up, now + self._config.pair_s)
        return self._strand(flight)

    def _place(
        self,
        call: Call,
        branches: tuple[int, ...],
        placements: int,
        tried: set[Identity],
        now: float,
        resumes: float = 0.0,
    ) -> list[RouterCommand]:
        """Put continuations on their way, not before `resumes`: all of them with the prompt alone, or one with its
        tokens so far."""
        request = call.request
        done = len(call.branches[branches[0]].tokens) if len(branches) == 1 else 0
        # A rest is never more than the whole, and all continuations together are placed without tokens only.
        size, sizes = len(request.prompt) + request.sampling.max_tokens, None
        if len(branches) > 1:
            size, sizes = self._workers.size(request), self._workers.sizes(request)
        prefix = request.prefix
        if done and self._workers.fetches:
            prefix = call.names(branches[0], len(request.prompt) + done, self._link(call))
        need = Need(len(request.prompt) + done, size, prefix, gap_s=request.slo.gap_s, sizes=sizes)
        since = now if placements else call.arrived_at
        flight = Flight(call, branches, need, placements=placements, tried=tried, queued_at=since, base=done)
        call.flights.append(flight)
        return self._strand(flight, resumes) if now < resumes < call.deadline else self._offer(flight, now)

    def _offer(self, flight: Flight, now: float) -> list[RouterCommand]:
        """Offer to the next best prefill worker; when enough of them refused, wait for room or say early that it is
        no use."""
        need = flight.need
        need.wait_s = max(0.0, self._patience(flight) - now)
        self._suspects.judge(flight, now)
        if flight.call.request.slo.batch and self._workers.missing() is None and need.wait_s:
            return self._hold(flight, now)
        if flight.tries < self._config.max_tries:
            for source in self._placement.sources(need, self._workers):
                if source.identity in flight.tried or source.room < need.tokens:
                    continue
                if sinks := self._sinks(flight, source):
                    return [self._offer_to(flight, source, sinks, now)]
        return self._unplaced(flight, now)

    def _unplaced(self, flight: Flight, now: float) -> list[RouterCommand]:
        """Wait for what may change, or say that nothing will."""
        need = flight.need
        if flight.alone and self._suspects and not flight.refusals and need.wait_s:
            return self._strand(flight)
        # Busy, not lost: they are asked again as long as that is soon enough; so is one to blame if no other will do.
        spared = flight.silent if flight.refusals else flight.tried
        if spared and need.wait_s:
            flight.tried -= spared
            flight.silent.clear()
            return self._offer(flight, now)
        if not flight.refusals and need.wait_s:
            if flight.placements and (self._awaits(flight.call) or self._workers.quiet):
                return self._strand(flight)
            if not flight.placements and (self._workers.quiet or (self.missing() and self._lately(now))):
                return self._hope(flight, now)
        final = all(no.again_s or no.wait_s > need.wait_s for no in flight.refusals.values())
        again = flight.placements and need.wait_s and any(no.again_s for no in flight.refusals.values())
        if final and again:  # to be told early is for those who come: it has come, and asks as long as there is time
            flight.refusals.clear()
            flight.tried.clear()
            flight.tries = 0
            return self._strand(flight, now + self._config.again_s)
        return self._shed(flight) if final or not need.wait_s else self._park(flight)

    def _sinks(self, flight: Flight, source: Post) -> Sequence[Post]:
        """Whom `source` may hand it over to, the best first; nobody if `source` itself cannot have it."""
        sinks = self._placement.sinks(source, flight.need, self._workers)
        if not flight.alone:
            return sinks
        if self._suspects.bars(source.identity):
            return ()
        return [sink for sink in sinks if not self._suspects.bars(sink.identity)][:1]  # no second to crash after it

    def _offer_to(self, flight: Flight, source: Post, sinks: Sequence[Post], now: float) -> ToOne:
        call, need = flight.call, flight.need
        call.offers += 1
        flight.tried.add(source.identity)
        flight.placed = ticket = Ticket(self._me, call.counter, call.offers, source.identity, sinks[0].identity)
        flight.second = sinks[1].identity if len(sinks) > 1 else None
        flight.key, flight.offered_at, flight.ahead_tokens = ticket.key, now, source.queue_tokens
        batch = call.request.slo.batch
        if batch:
            flight.lent = source
            source.lent += need.tokens
        # Who computes in idle time is in nobody's way.
        flight.load = load = Load(source, sinks[0], 0 if batch else need.tokens, need.size)
        self._workers.put(load)
        due = min(now + self._config.offer_s, call.deadline)
        self._flights.put(flight, due, *[who.identity for who in (source, *sinks[:2])])
        self._suspects.begin(flight)
        self._enter(flight, Phase.OFFERED)
        request, prefix = call.request, need.prefix[: self._config.offer_pages]
        left = request.sampling.max_tokens - flight.base
        named = request.prefix_page_tokens
        offer = Offer(ticket, need.tokens, left, need.wait_s, request.hints, prefix, named, batch, flight.second)
        return ToOne(source.identity, offer)

    def _patience(self, flight: Flight) -> float:
        """Until when a place in a queue is worth taking: one that was begun is finished as late as it may be."""
        call, slo = flight.call, flight.call.request.slo
        if flight.placements or not self._config.by_goal or slo.batch:
            return call.deadline
        return min(call.deadline, call.arrived_at + (slo.ttft_s or self._config.max_queue_s))

    def _shed(self, flight: Flight) -> list[RouterCommand]:
        call = flight.call
        phase = Phase.FAILED if any(branch.tokens for branch in call.branches) else Phase.REJECTED
        if call.request.slo.batch and not self.missing():
            why = f"no worker had time that nobody else wanted within {call.request.timeout_s:g} s"
            return self._end(call, phase, why, "RESOURCE_EXHAUSTED", retry_s=LATER_S)
        if not flight.refusals:
            why = self.missing() or "no worker with room for it answers"
            return self._end(call, phase, why, "UNAVAILABLE")
        best = min(flight.refusals.values(), key=lambda no: no.again_s or no.wait_s)
        asked, there = len(flight.refusals), len(self._workers.prefills)
        who = f"all {asked}" if asked >= there else f"{asked} of {there}"
        why = f"{who} prefill workers refused; {best.ticket.source.name}: {best.reason}"
        return self._end(call, phase, why, "RESOURCE_EXHAUSTED", retry_s=max(best.again_s or best.wait_s, 0.1))

    # Waiting for a worker.
    def _strand(self, flight: Flight, resumes: float = math.inf) -> list[RouterCommand]:
        """Wait for workers, or for a while: what was begun is finished as late as it may be. All flights at rest have
        a ticket, so it has one that nobody was told of."""
        call = flight.call
        call.offers += 1
        flight.placed, flight.second = Ticket(self._me, call.counter, call.offers, self._me, self._me), None
        flight.key, flight.parked, flight.resumes = flight.placed.key, True, resumes
        self._stranded[flight.key] = flight
        self._flights.put(flight, self._until(flight))
        return []

    def _hold(self, flight: Flight, now: float) -> list[RouterCommand]:
        """One of the batch class waits for a worker that is idle; after a refusal, or silence, for a while as well."""
        refused = bool(flight.refusals or flight.silent)
        flight.refusals.clear()
        flight.silent.clear()
        flight.tried.clear()
        if refused:
            return self._strand(flight, now + self._config.again_s)
        commands = self._strand(flight)
        hints = flight.call.request.hints
        self._lane.add(flight.key, flight.need.prefix, hints.tenant)
        self._idle = True
        return commands

    def _lend(self, now: float) -> list[RouterCommand]:
        """Offer those of the batch class to workers that have computed what they were sent of it.

        Who fits nowhere any more, because a lost attempt has made its prompt longer, does not keep others waiting.
        """
        self._idle = False
        commands: list[RouterCommand] = []
        while (key := self._lane.first()) is not None:
            flight = self._flights[key]
            need = flight.need
            need.wait_s = max(0.0, self._patience(flight) - now)
            fits = self._workers.missing() is not None or (flight.alone and bool(self._suspects))
            for source in self._placement.sources(need, self._workers):
                if source.room < need.tokens or not (sinks := self._sinks(flight, source)):
                    continue
                fits = True
                if source.lent and source.lent + need.tokens > self._config.ahead_tokens:
                    continue
                self._leave(flight)
                self._lane.fair.charge(flight.call.request.hints.tenant, need.tokens)
                commands.append(self._offer_to(flight, source, sinks, now))
                break
            else:
                if fits:
                    break
                self._leave(flight)
                commands += self._unplaced(flight, now)
        return commands

    def _returned(self, flight: Flight) -> None:
        """Its prefill worker has computed its prompt, or does not have it any more."""
        assert flight.lent is not None
        flight.lent.lent -= flight.need.tokens
        flight.lent = None
        self._idle = bool(self._lane)

    def _awaits(self, call: Call) -> bool:
        """Whether workers that could take it are away; if those that are there could, its rest has grown too large."""
        return self._workers.missing() is not None or self._workers.too_large(call.request) is not None

    def _worker_up(self, member: Member, now: float) -> list[RouterCommand]:
        """Those who waited for a worker are placed; those who wait for room may find some that nobody could use."""
        post = self._workers.up(member)
        commands = self._settled(self._suspects.back(member.identity), now)
        if member.ready and self._workers.missing() is None:
            commands += self._next_stranded(now)
            if self._workers.quiet:
                commands += self._leave_quiet(now)
        if member.ready:
            self._idle = bool(self._lane)
        if len(self._parked) and member.ready:
            if post is not None:
                # Whoever waits was refused by others: a worker that has just come may take all that it holds.
                self._has_room(post, post.room)
            if member.role.decodes:
                self._roomy.append(1)
        return commands

    def _next_stranded(self, now: float) -> list[RouterCommand]:
        """There is a worker that those who wait for one may have."""
        commands: list[RouterCommand] = []
        for key, flight in list(self._stranded.items()):
            if self._stranded.get(key) is flight and flight.resumes == math.inf and key not in self._lane:
                commands += self._resume(flight, now)
        return commands

    def _resume(self, flight: Flight, now: float) -> list[RouterCommand]:
        """It has waited long enough, or what it waited for has come."""
        self._leave(flight)
        if not flight.placements:
            flight.call.flights.remove(flight)
            return self._enters(flight.call, now)
        fate, certain = suspicion(flight.call.presences, now)
        if now < certain < flight.call.deadline:
            return self._strand(flight, certain)
        if fate is Suspicion.POISONOUS:
            return self._poisonous(flight.call)
        return self._offer(flight, now)

    def _next_suspects(self, now: float) -> list[RouterCommand]:
        """Workers had one that is alone in its steps, and may have another now."""
        self._suspects.freed = False
        commands: list[RouterCommand] = []
        for key, flight in list(self._stranded.items()):
            if flight.alone and flight.resumes == math.inf and self._stranded.get(key) is flight:
                commands += self._resume(flight, now)
        self._roomy.append(1)
        return commands

    # Waiting for room.
    def _park(self, flight: Flight) -> list[RouterCommand]:
        """Wait; there may be workers that said they have room and have refused nobody since."""
        flight.parked = True
        self._flights.put(flight, self._until(flight))
        tokens = self._placement.fewest(flight.need, self._workers)
        tenant = flight.call.request.hints.tenant
        self._parked.add(flight.key, tokens, self._patience(flight), flight.call.counter, tenant)
        self._roomy.append(max(tokens, 1))
        return []

    def _has_room(self, post: Post, tokens: int) -> list[RouterCommand]:
        """`post` may accept offers of up to so many new tokens, until it refuses one."""
        self._workers.said(post, max(0, tokens))
        self._roomy.append(post.identity)
        return []

    def _call(self, identity: Identity, now: float) -> list[RouterCommand]:
        """Offer a worker with room the most urgent of those that may fit, and the next when that is accepted: in the
        end it refuses one, and will say when it has room again, or nobody waits."""
        post = self._workers.get(identity)
        if post is None or not post.free or not post.member.ready or identity in self._called:
            return []
        commands: list[RouterCommand] = []
        aside: list[tuple[Flight, int]] = []
        while (key := self._parked.first(post.free)) is not None:
            flight = self._flights[key]
            need, tokens = flight.need, self._parked.remove(key)
            self._suspects.judge(flight, now)
            sinks = self._sinks(flight, post) if post.room >= need.tokens else ()
            if sinks:
                self._leave(flight)
                need.wait_s = max(0.0, self._patience(flight) - now)
                flight.called, self._called[identity] = True, flight
                flight.charged = need.tokens
                self._parked.fair.charge(flight.call.request.hints.tenant, need.tokens)
                commands = [self._offer_to(flight, post, sinks, now)]
                break
            aside.append((flight, tokens))
        for flight, tokens in aside:
            tenant = flight.call.request.hints.tenant
            self._parked.add(flight.key, tokens, self._patience(flight), flight.call.counter, tenant)
        return commands

    def _call_any(self, tokens: int, now: float) -> list[RouterCommand]:
        """Call all that said they have room for so many new tokens, the largest first, until nobody who waits fits:
        whoever has less room would not help, either."""
        commands: list[RouterCommand] = []
        for post in self._workers.free(tokens):
            if self._parked.first(post.free) is None:
                break
            commands += self._call(post.identity, now)
        return commands

    def _leave(self, flight: Flight) -> None:
        """This flight has no ticket any more, and does not wait."""
        self._flights.leave(flight)
        if flight.parked:
            flight.parked = False
            if flight.key in self._parked:
                self._parked.remove(flight.key)
            else:
                self._stranded.pop(flight.key, None)
                self._lane.drop(flight.key)

    # Messages of workers.
    def _heard(self, message: Answer, now: float) -> list[RouterCommand]:
        flight = self._flights.get(message.ticket.key)
        if flight is None or flight.parked:
            return self._ignore()
        if flight.phase is Phase.DECODING and message.ticket != flight.placed:
            by_source = isinstance(message, Handed) or (isinstance(message, Finished) and not message.decoded)
            if not by_source:
                return self._ignore()  # another sink has the KV as well, because a Taken was lost on its way
        if flight.finished is not None:
            return self._reported(flight, message)
        if flight.call.prompt_due:
            early = isinstance(message, Finished) or (isinstance(message, Tokens) and not message.prompt_logprobs)
            if early:
                flight.held.append(message)
                return []
        match message:
            case Accept():
                if flight.phase is not Phase.OFFERED:
                    return self._ignore()
                return self._accepted(flight, message.cached_tokens, now)
            case Reject():
                if flight.phase is not Phase.OFFERED:
                    return self._ignore()
                source = self._load(flight).source
                flight.refusals[source.identity] = message
                flight.tries += 1
                self._workers.said(source, 0)
                return self._again(flight, now)
            case Tokens():
                commands = self._tokens(flight, message, now)
                if flight.held:
                    held, flight.held = flight.held, []
                    for each in held:
                        commands += self._heard(each, now)
                return commands
            case Handed():
                flight.reports[Role.PREFILL] = message.stages
                flight.handed = True
                if message.cached_tokens:
                    flight.call.cached_tokens = message.cached_tokens
                return self._moved(flight, message.ticket, now)
            case Finished():
                flight.reports[Role.DECODE if message.decoded else Role.PREFILL] = message.stages
                return self._finished(flight, message, now)
            case Failed(_, code, why, stages):
                flight.reports[Role.DECODE if flight.phase is Phase.DECODING else Role.PREFILL] = stages
                if code == "INTERNAL":
                    ticket = message.ticket
                    where = ticket.source if flight.phase is Phase.PREFILLING else ticket.sink
                    self._suspects.raised(flight, where)
                if code in ("UNAVAILABLE", "ABORTED", "DATA_LOSS", "INTERNAL"):
                    # A prefill worker that cannot hand over, or is about to end, would only fail it again.
                    blamed = None if flight.phase is Phase.DECODING else flight.ticket.source
                    return self._lost_attempt(flight, why, now, blamed)
                return self._end(flight.call, Phase.FAILED, why, code)

    def _accepted(self, flight: Flight, cached_tokens: int, now: float) -> list[RouterCommand]:
        call, ticket = flight.call, flight.ticket
        if call.presences:
            fate, _ = suspicion(call.presences, now)
            if fate is Suspicion.POISONOUS:
                return self._poisonous(call)
        self._enter(flight, Phase.PREFILLING)
        self._flights.look(flight, call.deadline)
        load = self._load(flight)
        if self._parked:
            due = max(0, flight.need.tokens - cached_tokens) - flight.charged
            if not call.request.slo.batch:
                self._parked.fair.charge(call.request.hints.tenant, due)
        flight.charged = 0
        self._workers.cached(load, cached_tokens)
        self._placement.accepted(load.source, flight.need)
        call.cached_tokens = cached_tokens
        flight.placements += 1
        call.placements = max(call.placements, flight.placements)
        queued = Stage("queued", self._me.name, flight.offered_at - flight.queued_at)
        offered = Stage("offered", self._me.name, now - flight.offered_at)
        call.stages += _of_attempt((queued, offered), flight.placements)
        fetches = load.source.member.fetches and flight.need.prefix
        holdings = self._holdings(flight, load.source, cached_tokens) if fetches else ()
        return [ToOne(ticket.source, Prompt(ticket, flight.rest(now), flight.second, holdings))]

    # Who has which pages, where prefill workers fetch.
    def _link(self, call: Call) -> int:
        """Tokens that one name of the call's prefix stands for."""
        return call.request.prefix_page_tokens or self._workers.page_tokens

    def _holdings(self, flight: Flight, source: Post, cached_tokens: int) -> tuple[Holding, ...]:
        """Who may have more of the prompt than its prefill worker has."""
        link = self._link(flight.call)
        found = self._placement.holders(source, flight.need, cached_tokens // link, self._workers)
        return tuple([Holding(who, pages * link) for who, pages in found])

    def _answered(self, flight: Flight, index: int, newest: int) -> tuple[int, ...]:
        """Names of the pages of an answer that has ended, which its decode worker keeps beside those of the prompt; of
        several continuations of one prompt it does not. The `newest` tokens, 1 or 0, have no KV."""
        call, load, names = flight.call, self._load(flight), flight.need.prefix
        if not names or len(flight.branches) > 1:
            return ()
        upto = len(call.request.prompt) + len(call.branches[index].tokens)
        names = call.names(index, upto, self._link(call))
        if load.source.member.fetches:
            self._placement.kept(load.sink, names if not newest else names[: (upto - newest) // self._link(call)])
        return names

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
        new = have - first
        fresh = message.tokens[new:]
        told = message.prompt_logprobs if flight.call.prompt_due else ()
        if not fresh and not told:
            return []
        branch.tokens.extend(fresh)
        if told:
            flight.call.prompt_due = False
        if fresh and flight.phase is Phase.PREFILLING:
            load = self._load(flight)
            seconds = now - flight.offered_at
            self._enter(flight, Phase.HANDING_OFF)
            self._workers.computed(load)
            if not flight.call.request.slo.batch:
                self._placement.prefilled(load.source, flight.ahead_tokens + load.tokens, seconds)
        hashes, logprobs = message.logits_hashes[new:], message.logprobs[new:]
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
        if message.cached_tokens:
            flight.call.cached_tokens = message.cached_tokens
        if message.decoded and self._load(flight).source.member.fetches:
            self._answered(flight, index, newest=0 if message.reason == "stop" else 1)
        if flight.live() != [index]:
            return [*commands, *self._complete(flight.call, index, message.reason, message.stop_token_id)]
        commands += self._recall(flight, "done", report=True) if flight.untold else []
        # Two streams: the prefill worker's report may come after the decode worker's last word.
        late = flight.phase is Phase.DECODING and not flight.handed
        owing = {Role.PREFILL: flight.ticket.source} if late or flight.untold else {}
        last = message if message.branch == index else replace(message, branch=index)
        return [*commands, *self._wait(flight, last, owing, now)]

    def _moved(self, flight: Flight, ticket: Ticket, now: float) -> list[RouterCommand]:
        """The sink has the KV; it may be the second choice, and it may have died since."""
        if flight.phase is not Phase.HANDING_OFF:
            return []
        ticket = flight.moved or ticket
        if flight.ticket.sink != ticket.sink:
            flight.second = flight.ticket.sink
        self._suspects.release(flight, *({flight.ticket.source, flight.ticket.sink} - {ticket.sink}))
        flight.placed = ticket
        self._flights.reach(flight, ticket.sink)
        self._enter(flight, Phase.DECODING)
        sink, load = self._workers.get(ticket.sink), self._load(flight)
        if sink is None or self._flights.broken(flight, ticket.sink):
            return self._lost_attempt(flight, f"{ticket.sink.name} was lost", now)
        if sink is not load.sink:
            self._workers.moved(load, sink)
        if load.source.member.fetches and flight.need.prefix:
            self._placement.kept(sink, flight.need.prefix)
        untold, flight.untold = flight.untold, []
        return [ToOne(ticket.sink, Cancel(ticket, "stop string", branch=local)) for local in untold]

    def _row_moved(self, message: Moved, now: float) -> list[RouterCommand]:
        """It goes on at another decode worker; one that nobody wants any more is recalled there."""
        ticket, flight = message.ticket, self._flights.get(message.ticket.key)
        there = ticket.sink in self._workers
        if flight is None or flight.parked:
            self.ignored += 1
            return [ToOne(ticket.sink, Cancel(ticket, "nobody wants the rest"))] if there else []
        if message.moves <= flight.moves:
            return self._ignore()
        flight.moves, flight.moved = message.moves, ticket
        if flight.finished is not None:
            report = Role.DECODE in flight.owing and there
            if report:
                flight.placed, flight.owing[Role.DECODE] = ticket, ticket.sink
                self._flights.reach(flight, ticket.sink)
            return [ToOne(ticket.sink, Cancel(ticket, "stop string", report))] if there else []
        if flight.phase is not Phase.DECODING:
            return self._moved(flight, ticket, now)  # it was faster than the tokens of the worker before
        sink, load = self._workers.get(ticket.sink), self._load(flight)
        self._suspects.release(flight, flight.ticket.sink)
        flight.placed, flight.second = ticket, None
        self._flights.reach(flight, ticket.sink)
        if sink is None or self._flights.broken(flight, ticket.sink):
            return self._lost_attempt(flight, f"{ticket.sink.name} was lost", now)
        if sink is not load.sink:
            self._workers.moved(load, sink)
        return []

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
        ended = self._answered(flight, index, newest=1) if flight.phase is Phase.DECODING else ()
        recall = self._recall(flight, "stop string", report=True, ended=ended)
        tokens = len(call.branches[index].tokens)
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
        flight.finished, flight.finished_at = finished, now
        if owing:
            there = [(part, who) for part, who in owing.items() if who in self._workers]
            flight.owing = {part: who for part, who in there if not self._flights.broken(flight, who)}
        if not flight.owing or len(flight.call.flights) > 1:
            return self._finish(flight)
        self._flights.look(flight, self._until(flight))
        return []

    def _reported(self, flight: Flight, message: Answer) -> list[RouterCommand]:
        """A worker that failed before it was recalled has nothing to add, either."""
        match message:
            case Handed():
                part = Role.PREFILL
            case Finished():
                part = Role.DECODE if message.decoded else Role.PREFILL
            case Failed():
                part = Role.DECODE if flight.phase is Phase.DECODING else Role.PREFILL
            case _:
                return self._ignore()
        if flight.owing.pop(part, None) is None:
            return self._ignore()
        flight.reports[part] = message.stages
        if isinstance(message, Handed | Finished) and message.cached_tokens:
            flight.call.cached_tokens = message.cached_tokens
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

    # Losses.
    def _worker_down(self, event: WorkerDown, now: float) -> list[RouterCommand]:
        identity = event.identity
        self._workers.down(identity)
        there = self._flights.lose(identity)
        self._suspects.lost(identity, event.crashed, now, there)
        commands: list[RouterCommand] = []
        for flight in there:
            if not self._flights.stands(flight):
                continue  # ended with a sibling
            if flight.finished is not None:
                flight.owing = {part: who for part, who in flight.owing.items() if who != identity}
                commands += [] if flight.owing else self._finish(flight)
                continue
            needs_source = flight.phase in (Phase.OFFERED, Phase.PREFILLING, Phase.HANDING_OFF)
            at_source = needs_source and flight.ticket.source == identity
            at_sink = flight.phase is Phase.DECODING and flight.ticket.sink == identity
            if at_source or at_sink:
                commands += self._lost_attempt(flight, f"{identity.name} was lost", now)
        return commands

    def _worker_quiet(self, identity: Identity, quiet: bool, now: float) -> list[RouterCommand]:
        """It gets nothing new if others can, and those there who cannot wait for what it comes to leave it."""
        self._workers.hush(identity, quiet)
        if not quiet:
            self._roomy += [identity, 1]
            self._idle = bool(self._lane)
            return self._next_stranded(now) if self._workers.missing() is None else []
        return self._leave_quiet(now)

    def _leave_quiet(self, now: float) -> list[RouterCommand]:
        """Those who cannot wait, or lose little by it, leave workers that are quiet, where others can take them."""
        commands: list[RouterCommand] = []
        spares, verdict_s = self._workers.spares, self._config.verdict_s
        for worker in self._workers.hushed():
            source, sink = spares(worker, decodes=False), spares(worker, decodes=True)
            for flight in self._flights.at(worker):
                if not self._flights.stands(flight) or flight.finished is not None:
                    continue
                phase, ticket = flight.phase, flight.ticket
                # Of a second choice its prefill worker knows: it turns there itself.
                needs_sink = phase is Phase.DECODING or (phase is not Phase.OFFERED and flight.second is None)
                at_source = source and ticket.source == worker and phase is not Phase.DECODING
                if not at_source and not (sink and ticket.sink == worker and needs_sink):
                    continue
                if phase is Phase.OFFERED:
                    commands += self._unanswered(flight, now)
                elif flight.call.deadline - now < 2 * verdict_s or (at_source and now - flight.offered_at < verdict_s):
                    commands += self._lost_attempt(flight, f"{worker.name} is quiet", now)
        return commands

    def _settled(self, loss: Loss | None, now: float) -> list[RouterCommand]:
        """How a life ended is certain: whoever waited for that to be known is placed, or refused."""
        commands: list[RouterCommand] = []
        for key, flight in list(self._stranded.items()) if loss is not None else ():
            known = any(each.loss is loss for each in flight.call.presences)
            if known and flight.resumes < math.inf and self._stranded.get(key) is flight:
                commands += self._resume(flight, now)
        return commands

    def _poisonous(self, call: Call, recalled: Flight | None = None) -> list[RouterCommand]:
        """Refuse what workers crash with."""
        where = crashes(call.presences)
        names = ", ".join([worker.name for worker in where])
        why = f"poisonous: present at {len(where)} crashes, the last alone ({names})"
        *commands, end = self._end(call, Phase.FAILED, why, "INTERNAL", recalled=recalled)
        assert isinstance(end, End)
        return [*commands, replace(end, poisonous=True)]

    def _lost_attempt(
        self, flight: Flight, why: str, now: float, blamed: Identity | None = None
    ) -> list[RouterCommand]:
        """Place what is left again, elsewhere than at the `blamed` prefill worker if there is another."""
        call = flight.call
        whole = call.request.sampling.max_tokens
        if flight.phase is Phase.HANDING_OFF:
            sinks = [who for who in (flight.ticket.sink, flight.second) if who is not None]
            self._suspects.left(flight, [who for who in sinks if not self._flights.broken(flight, who)], now)
        commands = self._recall(flight, why)
        live = flight.live()
        full = [index for index in live if len(call.branches[index].tokens) == whole]
        if full == live:
            for index in full[:-1]:
                commands += self._complete(call, index, "length")
            flight.finished = Finished(flight.ticket, "length", 0, branch=full[-1])
            return [*commands, *self._finish(flight)]
        fate, certain = suspicion(call.presences, now)
        if fate is Suspicion.POISONOUS and certain <= now:
            return [*commands, *self._poisonous(call, recalled=flight)]
        # What the batch class lost it may have given back to others, which is no failure however often.
        if flight.placements >= self._config.max_attempts and not call.request.slo.batch:
            why = f"{flight.placements} attempts, the last: {why}"
            return [*commands, *self._end(call, Phase.FAILED, why, "UNAVAILABLE", recalled=flight)]
        others = blamed is not None and self._workers.others(blamed)
        tried = {blamed} if blamed is not None and others else set()
        resumes = 0.0
        if blamed is not None and (flight.placements > 1 or not others):
            wait_s = self._config.again_s * 2 ** min(MOST_DOUBLINGS, max(0, flight.placements - 1))
            # Not longer than there is time for it and another: what is wrong may be over sooner.
            resumes = now + min(wait_s, self._config.again_most_s, (call.deadline - now) / 2)
        resumes = max(resumes, certain)
        begun = any(call.branches[index].tokens or call.branches[index].done for index in flight.branches)
        self._drop(flight, Phase.QUEUED)
        if not begun and (fate is Suspicion.NONE or len(flight.branches) == 1):
            return [*commands, *self._place(call, flight.branches, flight.placements, tried, now, resumes)]
        for index in full:
            commands += self._complete(call, index, "length")
        for index in live:
            if index not in full and call.counter in self._calls:
                commands += self._place(call, (index,), flight.placements, set(tried), now, resumes)
        return commands

    def _again(self, flight: Flight, now: float) -> list[RouterCommand]:
        """Offer the same to the next."""
        self._drop(flight, Phase.QUEUED)
        flight.call.flights.append(flight)
        return self._offer(flight, now)

    def _overdue(self, now: float) -> list[RouterCommand]:
        commands: list[RouterCommand] = []
        while (flight := self._flights.due(now)) is not None:
            call = flight.call
            if flight.finished is not None:
                commands += self._finish(flight)
            elif flight.parked and flight.resumes <= now < call.deadline:
                commands += self._resume(flight, now)
            elif flight.parked and not flight.placements:
                commands += self._shed(flight)
            elif call.deadline <= now:
                sent = sum(len(branch.tokens) for branch in call.branches)
                why = f"not done within {call.request.timeout_s:g} s, {sent} tokens were sent"
                lacking = self._lacking(flight)
                code = "UNAVAILABLE" if lacking else "DEADLINE_EXCEEDED"
                commands += self._end(call, Phase.FAILED, f"{lacking}: {why}" if lacking else why, code)
            else:
                commands += self._unanswered(flight, now)
        return commands

    def _unanswered(self, flight: Flight, now: float) -> list[RouterCommand]:
        """Its prefill worker has not said whether it takes it: another is asked."""
        flight.silent.add(flight.ticket.source)
        return [*self._recall(flight, "offer not answered"), *self._again(flight, now)]

    def _lacking(self, flight: Flight) -> str | None:
        """What kind of worker a flight still waits for, None if it is at one or waits for room."""
        if not flight.parked:
            return None
        stranded = flight.key in self._stranded and flight.resumes == math.inf and flight.key not in self._lane
        return self.missing() or ("no worker with room for it is ready" if stranded else None)

    def _until(self, flight: Flight) -> float:
        deadline = flight.call.deadline
        if flight.finished is not None:
            return min(flight.finished_at + REPORT_S, deadline)
        if flight.parked:
            return min(self._patience(flight), deadline, flight.resumes, flight.gives_up)
        return min(flight.offered_at + self._config.offer_s, deadline) if flight.phase is Phase.OFFERED else deadline

    def _recall(
        self,
        flight: Flight,
        reason: str,
        *,
        report: bool = False,
        branch: int | None = None,
        ended: tuple[int, ...] = (),
    ) -> list[RouterCommand]:
        """Cancel at every worker that may hold something for this attempt; its decode worker may keep pages of what
        has `ended`."""
        ticket = flight.placed
        if ticket is None or flight.phase is Phase.QUEUED:
            return []
        where = [ticket.source]
        if flight.phase is not Phase.OFFERED:
            where += [who for who in (ticket.sink, flight.second) if who is not None and who not in where]
        kept = {ticket.sink: ended}
        return [
            ToOne(who, Cancel(ticket, reason, report, branch, kept.get(who, ())))
            for who in where
            if who in self._workers
        ]

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
        if self._parked or self._lane or self._budgets is not None:
            self._account(call, phase)
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

    def _account(self, call: Call, phase: Phase) -> None:
        """What its answer came to is its tenant's, where others wait, and says how long others may become."""
        tokens, tenant = sum([len(branch.tokens) for branch in call.branches]), call.request.hints.tenant
        line = self._lane.fair if call.request.slo.batch else self._parked.fair
        line.charge(tenant, OUTPUT * tokens)
        if self._budgets is not None and phase is Phase.DONE and call.request.sampling.n == 1:
            self._budgets.learn(tokens)

    def _enter(self, flight: Flight, phase: Phase) -> None:
        if phase not in PHASE_NEXT[flight.phase]:
            raise LocalError(f"request {flight.call.counter}: got {phase} after {flight.phase}")
        flight.phase = phase
        if flight.lent is not None and phase is not Phase.OFFERED and phase is not Phase.PREFILLING:
            self._returned(flight)
        if flight.called and phase is not Phase.OFFERED:
            flight.called = False
            source = flight.ticket.source
            del self._called[source]
            self._roomy.append(source)

    def _drop(self, flight: Flight, phase: Phase) -> None:
        """This attempt is over, or all of the flight."""
        self._enter(flight, phase)
        if flight.charged:
            self._parked.fair.charge(flight.call.request.hints.tenant, -flight.charged)
            flight.charged = 0
        if flight.placed is not None:
            self._suspects.release(flight, flight.placed.source, flight.placed.sink)
        for part in (Role.PREFILL, Role.DECODE) if flight.reports else ():
            flight.call.stages += _of_attempt(flight.reports.pop(part, ()), flight.placements)
        flight.call.flights.remove(flight)
        if flight.load is not None:
            self._workers.over(flight.load)
            flight.load = None
        if flight.key in self._flights:
            self._leave(flight)

    def _stands(self, flight: Flight) -> Standing:
        call, waits_for, owner = flight.call, "", self._me.name
        if flight.finished is not None:
            waits_for = f"stages from {', '.join(who.name for who in flight.owing.values())}"
        elif flight.key in self._stranded:
            after = "to be placed again: its last attempt failed" if flight.resumes < math.inf else None
            turn = "a worker that is not trying another one alone" if flight.alone and self._suspects else None
            if flight.key in self._lane:
                turn = f"an idle worker: {len(self._lane) - 1} others of the batch class wait"
            waits_for = after or self.missing() or turn or "a worker with room for it"
        elif flight.parked:
            best = min(flight.refusals.values(), key=lambda reject: reject.wait_s)
            waits_for = f"room: {len(flight.refusals)} refused, {best.ticket.source.name}: {best.reason}"
        elif flight.placed is not None:
            owner, waits_for = flight.owner()
        tokens = sum(len(call.branches[branch].tokens) for branch in flight.branches)
        key, request = flight.key, call.request.id
        return Standing(key, request, flight.phase, call.arrived_at, call.deadline, waits_for, owner, tokens)

    def _load(self, flight: Flight) -> Load:
        assert flight.load is not None
        return flight.load

    def _ignore(self) -> list[RouterCommand]:
        self.ignored += 1
        return []


def _of_attempt(stages: tuple[Stage, ...], placements: int) -> tuple[Stage, ...]:
    """The same, and of which attempt they are, if it was not the first."""
    if placements < 2 or not stages:
        return stages
    return tuple([replace(stage, detail={**stage.detail, "attempt": str(placements)}) for stage in stages])
