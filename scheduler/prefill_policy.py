"""What a prefill worker computes next: accept or reject, queue, chunk, hand off. Pure.

The mechanics of a prefill worker; in which order it computes is an `Order`'s business (`scheduler/order.py`): first
come, first served unless another is given. A request is offered before its prompt is sent, so that a worker that cannot
meet its deadline costs no transfer (after P/D-Serve, "on-demand forwarding upon rejections"); who was refused is told
when it would be accepted. So is one whose sinks have let somebody here wait for their promise for longer than it may
wait: were all accepted while decode workers are full, all would be late. A long step can be suspended for an urgent
request and goes on later (after FlowPrefill).

Who is to be alone in its steps (`Request.alone`) is no order's business: once its prompt is here it leaves the order,
and its chunks, a step each, and the order's steps take turns. So neither waits for more than one step of the other's,
but for memory: what such a request lacks of this worker's when its turn comes, nobody else who starts takes before it.

Those of the batch class (`Slo.batch`) are none of its business either. They run when the order has nothing to run, in
steps of their own, which are short because they are not suspended: whoever comes waits for the rest of one at most.
They start when their sink has promised its memory and there is memory here, so that they never hold some while they
wait. Offers of a tenant above its share of this worker (`scheduler/fair.py`) are accepted only while the line is short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from core.errors import LocalError
from core.kv import KvShape
from core.messages import Accept, Cancel, Failed, Finished, First, Handed, Holding, Offer, Prompt, Reject, SlotFree
from core.pages import Owner, Pages
from core.ranked import Ranked
from core.request import Request, Stage, Ticket
from core.standing import Standing
from core.worker import Identity, Lane
from scheduler.cost import Repriced
from scheduler.fair import Shares
from scheduler.fcfs import Fcfs
from scheduler.order import Job, Order, Take
from scheduler.prefill_events import (
    Answer,
    AskForSink,
    Began,
    Begin,
    ChunkDone,
    ChunkFailed,
    EndSequence,
    FetchOver,
    GatewayGone,
    Grant,
    Granted,
    HandOffOver,
    Invite,
    PeerQuiet,
    PrefillCommand,
    PrefillEvent,
    Resume,
    RunChunk,
    SealPages,
    Span,
    State,
    Suspend,
    Suspended,
    WithdrawHandOff,
)
from scheduler.prefill_fetches import Fetches
from scheduler.prefill_keeps import Keeps
from scheduler.prefill_sinks import Sinks
from scheduler.refusals import Refusals

_COMES = Prompt, FetchOver
"""Somebody may be in line after these who was not before."""


@dataclass(slots=True)
class _Held:
    """A request on this worker."""

    key: str
    holder: str
    ticket: Ticket
    prompt_tokens: int
    pages: int
    prefix: tuple[int, ...]
    since: float
    until: float
    """It ends then at the latest."""
    state: State = State.OFFERED
    request: Request | None = None
    second: Identity | None = None
    """Asked once the ticket's sink refuses; the gateway knows both, and not which one it is now."""
    turned: bool = False
    """The ticket's sink was the second one: there is no third."""
    grant: Grant = Grant.NOT_ASKED
    begun: bool = False
    in_step: bool = False
    done: int = 0
    """Tokens of the prompt whose KV is there, found or computed."""
    cached: int = 0
    """Of these, found."""
    firsts: tuple[First, ...] = ()
    """Of the continuations that go on at the sink."""
    cancelled: str | None = None
    accepted_at: float = 0.0
    wanted_by: float = math.inf
    first_at: float = 0.0
    """When it was to have its first token, as predicted when it was accepted."""
    priority: int = 0
    batch: bool = False
    """It runs when nobody else does."""
    lined: int = 0
    """New tokens, until they are computed."""
    session: str = ""
    """Whose KV is kept for the next turn; empty: nobody's."""
    fetched: dict[str, str] | None = None
    """What it took to fetch pages for it, if that was tried."""
    fetched_at: float = 0.0
    started_at: float = 0.0
    computed_at: float = 0.0
    chunks: int = 0


@dataclass(slots=True)
class _Step:
    """A `RunChunk` that is out."""

    run_id: int
    spans: tuple[Span, ...]
    takes: list[Take]
    alone: bool = False
    """It is no step of the order's."""
    batch: bool = False
    """Nor is it, being of the batch class."""
    began_at: float = 0.0
    suspending: bool = False
    """It was asked to stop."""
    immune: bool = False
    """It was suspended once."""


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
    accept_share: float = math.inf
    """Accepted requests, until their KV is handed over, may need this multiple of the arena; 1: only what fits now."""
    preempt: bool = False
    """A running step may be suspended, if the order wants that; the engine must be able to."""
    batch_tokens: int = 512
    """Most tokens in one engine step of the batch class: whoever comes waits for it."""
    batch_queue_tokens: int = 16384
    """New tokens of the batch class that are accepted before they are computed; the first is, however large."""
    batch_ahead: int = 4
    """Of the batch class, requests that have not begun and whose sinks are asked."""
    spare: float = 0.3
    """Share of the wait that an offer allows which the whole line may take for a tenant above its share to be accepted;
    infinite: all tenants are treated alike."""
    weights: tuple[tuple[str, float], ...] = ()
    """Of tenants, by name; those that are not named weigh 1."""


def holder(key: str) -> str:
    """Names a prefill sequence in the ledger and the engine, apart from the same ticket's decode sequence."""
    return f"prefill {key}"


class PrefillPolicy:
    """The queue of one prefill worker; at most one step runs at a time, and one more is suspended."""

    def __init__(
        self,
        me: Identity,
        shape: KvShape,
        ledger: Pages,
        config: PrefillConfig,
        order: Order | None = None,
        fetches: Fetches | None = None,
        keeps: Keeps | None = None,
    ) -> None:
        self._me = me
        self.keeps = keeps
        """None: no session's KV is kept."""
        self.fetches = fetches
        """None: whatever is not here is computed."""
        self._shape = shape
        self._ledger = ledger
        self._config = config
        self._order: Order = order if order is not None else Fcfs(config.chunk_tokens, config.max_rows)
        self._capacity = ledger.available
        self._requests: dict[str, _Held] = {}
        self._counts = dict.fromkeys(State, 0)
        self._until = Ranked()
        self._pages = 0
        """Of all accepted requests, bound or not."""
        self._ungranted = 0
        """Bound pages that no sink has promised to take."""
        self._vast: dict[str, int] = {}
        """Pages of those whose sink was asked, that have not begun, and for which ungranted ones may leave no room."""
        self._sinks = Sinks(dict(config.weights))
        self._own = ""
        """The last that our own sink was asked for."""
        self._running: _Step | None = None
        self._suspended: _Step | None = None
        self._run_id = 0
        self._alone: dict[str, _Held] = {}
        """Those with prompts left to compute that share no step, in order of these."""
        self._after_alone = False
        """The last step was such a one's: it is the order's turn."""
        self._batch: dict[str, _Held] = {}
        """Of the batch class, those that have not begun, in order of their prompts."""
        self._batch_begun: dict[str, _Held] = {}
        """Of the batch class, those with prompts left to compute, in order of beginning: they hold memory."""
        self._batch_new = 0
        """New tokens of the batch class that were accepted and are not computed."""
        self._batch_s = 0.0
        """What its longest of late steps took, less and less."""
        self._shares = Shares(dict(config.weights))
        self._line = 0
        """New tokens of all others that were accepted and are not computed."""
        self._speed = 0.0
        """Tokens a second of full steps; measured."""
        self._planned_at = -math.inf
        self._blocked: list[_Held] = []
        """Those that the order wanted to start when it was last asked, and that could not."""
        self._moved = False
        """Others may be next in line than when their sinks were asked."""
        self._refusals = Refusals()
        self._now = 0.0
        """Of the event."""
        self._eased = False
        """There is less to do, or more memory, than when a request was refused."""
        self.ignored = 0
        """Messages about tickets we do not hold."""
        self.suspensions = 0
        """Steps that were suspended."""

    def queue(self) -> dict[State, int]:
        """Requests in each state."""
        return dict(self._counts)

    def predicted_wait_s(self, now: float, new: int = 0, cached: int = 0, wanted_s: float = math.inf) -> float:
        """Time until the first token of a request that comes now; with the default order 0 before a full step."""
        running = self._running
        suspendable = self._config.preempt and running is not None and self._suspended is None and not running.immune
        wait_s = self._order.wait_s(new, cached, now, wanted_s, suspendable)
        if running is not None and running.batch:
            wait_s += max(0.0, running.began_at + self._batch_s - now)
        return wait_s

    def work_s(self, now: float) -> float:
        """Predicted time for all prompts that were accepted and are not computed. O(prompts)."""
        return self._order.work_s(now)

    def on(self, event: PrefillEvent | None, now: float) -> list[PrefillCommand]:
        commands: list[PrefillCommand] = []
        self._now = now
        match event:
            case Offer():
                commands.append(self._offered(event, now))
            case Prompt():
                held = self._prompted(event, now)
                if held is None:
                    self.ignored += 1
                    return [Answer(Failed(event.ticket, "ABORTED", "the offer has lapsed"))]
                if held.batch or not event.holdings or not self._fetch(held, event.holdings, now, commands):
                    self._line_up(held, now)
            case ChunkDone():
                commands += self._chunk_done(event, now)
            case Granted():
                held = self._known(event.key)
                if held is not None:
                    self._set_grant(held, Grant.GIVEN)
                    if held.state is State.QUEUED and held.key not in self._alone and not held.batch:
                        self._order.granted(held.key)
            case HandOffOver():
                commands += self._hand_off_over(event, now)
            case None:
                commands += self._late(now)
            case Cancel(branch=int()):
                pass  # its prompt is that of the others
            case Cancel(ticket, reason, report):
                held = self._known(ticket.key)
                if held is not None:
                    if report and held.state is State.HANDING_OFF and held.cancelled is None:
                        stages, cached = self._stages(held, now), self._cached(held)
                        commands.append(Answer(Handed(held.ticket, stages, cancelled=True, cached_tokens=cached)))
                    commands += self._cancel(held, reason)
            case GatewayGone(identity):
                self._refusals.drop(identity)
                theirs = [held for held in self._requests.values() if held.ticket.minter == identity]
                self.ignored += not theirs
                for held in theirs:
                    commands += self._cancel(held, "its gateway was lost")
            case PeerQuiet(identity, quiet):
                commands += self._hush(identity, quiet)
            case ChunkFailed(run_id, reason):
                commands += self._chunk_failed(run_id, reason, now)
            case Suspended(run_id):
                self._step_suspended(run_id, now)
            case Repriced(cost):
                self._order.reprice(cost)
                if self.fetches is not None:
                    self.fetches.reprice(cost)
                if self.keeps is not None:
                    self.keeps.reprice(cost)
                self._eased = True
            case FetchOver():
                self._fetched(event, now)
            case Lane():
                if self.fetches is not None:
                    self.fetches.reach(event)
        commands += self._plan(now)
        if isinstance(event, _COMES):
            commands += self._preempt(now)
        if self._eased and self._refusals:
            commands += self._invite(now)
        return commands

    def deadline(self) -> float | None:
        """Already past when one that could not start now may, because somebody else in this arena freed memory."""
        due = self._until.lowest()
        keeps = self.keeps
        if keeps is not None and (keeps.kept or keeps.waiting):
            due = min(due, keeps.deadline())
        if self._running is None:
            for held in self._blocked:
                if self._may_start(held):
                    return min(due, held.since)
            window = self._order.deadline()
            if window is not None and window > self._planned_at:
                due = min(due, window)
        return None if due == math.inf else due

    def standing(self) -> list[Standing]:
        """Of every request here."""
        return [self._stands(held) for held in self._requests.values()]

    def check(self) -> None:
        self._ledger.check()
        self._order.check()
        steps = [step for step in (self._running, self._suspended) if step is not None]
        out = [span.key for step in steps for span in step.spans]
        assert len(out) == len(set(out)), "a sequence is in two steps"
        for key, held in self._requests.items():
            assert key == held.ticket.key == held.key
            assert self._ledger.count(held.holder) == (held.pages if held.begun else 0)
            assert held.begun == (held.state in (State.RUNNING, State.HANDING_OFF))
            assert held.in_step == (key in out)
            assert held.cancelled is None or key in out or held.grant is not Grant.NOT_ASKED, "it stays cancelled"
            assert held.state is State.HANDING_OFF or not held.firsts
            assert (key in self._until) == (held.cancelled is None)
        assert set(out) <= self._requests.keys(), "a computed sequence was freed"
        assert self._pages == sum(held.pages for held in self._requests.values())
        ungranted = [held.pages for held in self._requests.values() if held.begun and held.grant is Grant.ASKED]
        assert self._ungranted == sum(ungranted)
        asked = [held for held in self._requests.values() if held.grant is not Grant.NOT_ASKED and not held.begun]
        lined = [held for held in self._requests.values() if held.request is not None and not held.request.alone]
        self._sinks.check({h.key: h.ticket.sink for h in lined if h.grant is Grant.ASKED and not h.batch})
        assert self._vast.items() <= {held.key: held.pages for held in asked}.items()
        assert max((held.pages for held in asked), default=0) + self._ungranted <= self._capacity, "a ring may come"
        for state in State:
            assert self._counts[state] == sum(held.state is state for held in self._requests.values())
        assert self._suspended is None or self._config.preempt
        fetching = {key for key, held in self._requests.items() if held.state is State.FETCHING}
        if self.fetches is not None:
            self.fetches.check(fetching)
        else:
            assert not fetching
        for key, held in self._alone.items():
            assert held is self._requests[key], "one that was alone is gone"
            assert held.state in (State.QUEUED, State.RUNNING)
            assert held.cancelled is None
        for key, held in (*self._batch.items(), *self._batch_begun.items()):
            assert held is self._requests[key], "one of the batch class is gone"
            assert held.batch
            assert held.state is (State.RUNNING if key in self._batch_begun else State.QUEUED)
            assert held.cancelled is None
        self._shares.check()
        lined = [held for held in self._requests.values() if held.lined]
        assert all(held.cancelled is None and held.state is not State.HANDING_OFF for held in lined)
        assert self._batch_new == sum(held.lined for held in lined if held.batch)
        assert self._line == sum(held.lined for held in lined if not held.batch)
        for step in steps:
            requests = [self._requests[span.key].request for span in step.spans]
            assert step.batch == any(self._requests[span.key].batch for span in step.spans) or step.alone
            assert step.alone == any(each is not None and each.alone for each in requests)
            assert len(step.spans) == 1 or not step.alone, "one that is to be alone is not"

    # Offers, prompts, ends of time.
    def _known(self, key: str) -> _Held | None:
        held = self._requests.get(key)
        self.ignored += held is None
        return held

    def _enter(self, held: _Held, state: State) -> None:
        self._counts[held.state] -= 1
        self._counts[state] += 1
        held.state = state

    def _offered(self, offer: Offer, now: float) -> PrefillCommand:
        ticket, prompt = offer.ticket, offer.prompt_tokens
        key, pages = ticket.key, self._shape.pages_for(prompt)
        if key in self._requests or ticket.source != self._me:
            self.ignored += 1
            return Answer(Reject(ticket, "offered twice or to an earlier life of this worker"))
        if pages > self._capacity:
            room = self._capacity * self._shape.page_tokens
            return Answer(Reject(ticket, f"prompt of {prompt} tokens, room for {room}"))
        prefix = self._shape.names(offer.prefix, offer.prefix_page_tokens)
        known = prefix[: (prompt - 1) // self._shape.page_tokens]
        cached = self._ledger.cached(known) * self._shape.page_tokens if known else 0
        new, name = prompt - cached, ""
        # What its own sink keeps for one that waits for idle time would be missing here: a ring of one.
        batch = offer.batch and ticket.sink != self._me
        if batch:
            wait_s = 0.0
            if self._batch_new and self._batch_new + new > self._config.batch_queue_tokens:
                return Answer(Reject(ticket, f"{self._batch_new} tokens of the batch class wait"))
        else:
            name, above = self._shares.offer(offer.hints.tenant, now)
            wait_s, again_s = self._outlook(now, new, cached, offer.wait_s)
            if (refused := self._in_no_time(offer, new, wait_s, again_s, now, above)) is not None:
                return Answer(refused)
        if self._pages + pages > self._config.accept_share * self._capacity:
            if not batch:
                self._refusals.add(ticket.minter, new, offer.wait_s, now)
            return Answer(Reject(ticket, f"{pages} pages beside {self._pages} of requests before it", wait_s))
        wanted_by, priority = now + offer.wait_s, offer.hints.priority
        prefix = prefix[: prompt // self._shape.page_tokens]
        held = _Held(key, holder(key), ticket, prompt, pages, prefix, now, now + self._config.offer_s)
        held.accepted_at, held.wanted_by, held.first_at, held.priority = now, wanted_by, now + wait_s, priority
        held.batch, held.lined = batch, new
        self._requests[key] = held
        self._counts[State.OFFERED] += 1
        self._pages += pages
        self._until.put(key, held.until)
        if batch:
            self._batch_new += new
            return Answer(Accept(ticket, cached, wait_s))
        self._line += new
        self._shares.add(name, new, now)
        if self.keeps is not None and offer.hints.session:
            held.session = offer.hints.session
            self.keeps.came(held.session, self._shareable(held), now, offer.hints.program_step)
        self._order.expect(Job(key, new, cached, now, wanted_by, 0, priority), now)
        return Answer(Accept(ticket, cached, wait_s))

    def _in_no_time(
        self, offer: Offer, new: int, wait_s: float, again_s: float, now: float, above: bool
    ) -> Reject | None:
        """The refusal of one that would be late here, or make others late, or whose tenant is `above` its share."""
        ticket, wanted_s = offer.ticket, offer.wait_s
        if above and wait_s <= wanted_s and self._line and self._speed:
            line_s, allowed_s = (self._line + new) / self._speed, self._config.spare * wanted_s
            if line_s > allowed_s:
                self._refusals.add(ticket.minter, new, allowed_s, now, wanted_s)
                why = f"a line of {line_s:.2f} s, {allowed_s:.2f} s of it for tenants above their share"
                return Reject(ticket, why, max(0.0, line_s - allowed_s))
        if again_s > 0:
            self._refusals.add(ticket.minter, new, wanted_s, now)
            why = f"first token in {wait_s:.2f} s, wanted in {wanted_s:.2f} s"
            if wait_s <= wanted_s:
                why += f", but there is no time to spare for {again_s:.2f} s"
            return Reject(ticket, why, wait_s, again_s)
        sinks = [sink for sink in (ticket.sink, offer.second) if sink is not None]
        behind_s = self._sinks.quickest_s(sinks, offer.hints.tenant, now)
        if behind_s > wanted_s and offer.max_tokens > 1:
            self._refusals.add(ticket.minter, new, wanted_s, now)
            who = " and ".join([sink.name for sink in sinks])
            why = f"{who} promised nothing for {behind_s:.2f} s, wanted in {wanted_s:.2f} s"
            return Reject(ticket, why, wait_s, behind_s)
        return None

    def _outlook(self, now: float, new: int, cached: int, wanted_s: float) -> tuple[float, float]:
        """Seconds until the first token of a request that comes now, and until it is accepted if no other comes."""
        wait_s = self.predicted_wait_s(now, new, cached, wanted_s)
        if wait_s > wanted_s:
            return wait_s, wait_s - wanted_s
        return wait_s, self._order.lacks_s(new, cached, now, wanted_s)

    def _prompted(self, event: Prompt, now: float) -> _Held | None:
        """The prompt of an accepted offer is here; None: of one that has lapsed, or another prompt."""
        request = event.request
        held = self._requests.get(event.ticket.key)
        if held is None or held.state is not State.OFFERED or len(request.prompt) != held.prompt_tokens:
            return None
        held.request, held.second, held.since = request, event.second, now
        held.until = now + request.timeout_s
        self._until.put(held.key, held.until)
        return held

    def _line_up(self, held: _Held, now: float) -> None:
        """The line is in order of prompts, and so is the line at a sink: one that was offered earlier, but sent later,
        would wait for memory there that is promised to those behind it here."""
        self._enter(held, State.QUEUED)
        assert held.request is not None
        if held.request.alone:
            self._order.drop(held.key)
            self._alone[held.key] = held
            self._moved = True
        elif held.batch:
            self._batch[held.key] = held
            self._moved = True
        elif held.session and self._holds_back(held, now):
            self._order.drop(held.key)
        else:
            self._ready(held, now)

    def _ready(self, held: _Held, now: float) -> None:
        """It is in line from now on."""
        self._order.ready(held.key, now)
        if self._asks_nobody(held):
            self._order.granted(held.key)
        self._moved = True

    def _holds_back(self, held: _Held, now: float) -> bool:
        """Whether it waits outside of the line until the KV of running programs leaves room for its own."""
        assert self.keeps is not None
        until = held.wanted_by - (held.first_at - held.accepted_at)
        return self.keeps.holds(held.key, held.session, self._need(held), held.pages, until, now)

    def _let_in(self, now: float, *, idle: bool = False) -> None:
        """Those for whom there is room now, or who have waited long enough, or one, as there is nothing else to do.

        What is cached of each may be other than when it was offered.
        """
        assert self.keeps is not None
        while (key := self.keeps.first(now)) is not None:
            held = self._requests[key]
            if not self.keeps.lets_in(key, self._need(held), now, idle):
                return
            self._expect(held, now)
            self._ready(held, now)
            idle = False

    def _idle(self) -> bool:
        """No step runs and nobody is in line for one, or lacks anything that it needs to start."""
        return self._suspended is None and not self._alone and not self._blocked

    def _fetch(self, held: _Held, holdings: tuple[Holding, ...], now: float, commands: list[PrefillCommand]) -> bool:
        """Whether it waits for pages of its prompt, because to pull them is quicker than to compute them."""
        if self.fetches is None or not held.prefix:
            return False
        first_s = max(0.0, held.first_at - now)
        asked = self.fetches.ask(held.key, held.prompt_tokens, self._shareable(held), holdings, first_s, now)
        if asked is None:
            return False
        commands += asked
        self._enter(held, State.FETCHING)
        return True

    def _fetched(self, event: FetchOver, now: float) -> None:
        """Who waited for pages has them, or never will; what is left of each prompt is a job like others."""
        if self.fetches is None:
            raise LocalError(f"fetch over: got {event.key}, want none without fetches")
        for key in self.fetches.over(event):
            held = self._requests[key]
            held.fetched, held.fetched_at = event.detail, now
            self._order.drop(key)
            self._expect(held, now)
            self._line_up(held, now)
            self._eased = True

    def _late(self, now: float) -> list[PrefillCommand]:
        commands: list[PrefillCommand] = []
        while (key := self._until.first()) is not None and self._until.lowest() <= now:
            late = self._requests[key]
            if late.state is not State.OFFERED:
                commands.append(Answer(Failed(late.ticket, "DEADLINE_EXCEEDED", f"ended while {late.state}")))
            commands += self._cancel(late, "deadline")
        if self.keeps is not None and self.keeps.over(now):
            self._eased = True
        return commands

    def _expect(self, held: _Held, now: float) -> None:
        """What is left of it to compute by what is cached now."""
        cached = self._ledger.cached(self._shareable(held)) * self._shape.page_tokens
        new = held.prompt_tokens - cached
        self._order.expect(Job(held.key, new, cached, held.accepted_at, held.wanted_by, 0, held.priority), now)

    # Steps.
    def _plan(self, now: float) -> list[PrefillCommand]:
        """If no step runs, the order says which is next; else the sinks of who starts next are asked."""
        commands: list[PrefillCommand] = []
        if self.keeps is not None and self.keeps.waiting:
            self._let_in(now)
        if self._running is None:
            self._planned_at = now
            if self._blocked:
                self._blocked.clear()
            paused = self._suspended
            if paused is not None and self._order.resumes(now):
                return self._resume(paused, now)
            first: _Held | None = None
            if self._alone and paused is None and not self._after_alone:
                if (run := self._run_alone(now, commands)) is not None:
                    return [*commands, run]
                first = next(iter(self._alone.values()))
            self._after_alone = False
            takes = self._order.next(now, lambda key: self._start(key, now, commands, first))
            if not takes and self.keeps is not None and self.keeps.waiting and self._idle():
                self._let_in(now, idle=True)
                takes = self._order.next(now, lambda key: self._start(key, now, commands, first))
            if takes:
                commands.append(self._run(takes, now))
                return commands
            if paused is not None:
                return commands + self._resume(paused, now)
            if self._alone and (run := self._run_alone(now, commands)) is not None:
                return [*commands, run]
            if (self._batch or self._batch_begun) and (run := self._run_batch(now, commands)) is not None:
                commands.append(run)
        if self._batch and (self._running is None or self._running.batch):
            self._ask_ahead(commands)
        if self._moved:
            self._moved = False
            upcoming = self._order.upcoming(now)
            for key in (next(iter(self._alone)), *upcoming) if self._alone else upcoming:
                held = self._requests[key]
                if held.grant is Grant.NOT_ASKED:
                    commands += self._ask(held)
        return commands

    def _start(self, key: str, now: float, commands: list[PrefillCommand], before: _Held | None = None) -> Job | None:
        """Bind a request's memory, unless that is missing here or at its sink, or `before` lacks it."""
        held = self._requests.get(key)
        if held is None or held.begun or held.request is None:
            raise LocalError(f"the order starts {key}, which is {held.state if held else 'unknown'}")
        if before is not None and self._gives_way(held, before):
            return None
        commands += self._ask(held)
        if not self._may_start(held) and not self._has_yielded(held):
            self._blocked.append(held)
            return None
        shared = self._ledger.share(held.holder, self._shareable(held), Owner.PREFILLING) if held.prefix else 0
        self._ledger.bind(held.holder, held.pages - shared, Owner.PREFILLING)
        held.begun, held.started_at = True, now
        if held.session and self.keeps is not None:
            self.keeps.began(key, held.session)
        self._vast.pop(key, None)
        held.done = held.cached = shared * self._shape.page_tokens
        self._enter(held, State.RUNNING)
        if held.grant is Grant.ASKED:
            self._ungranted += held.pages
        commands.append(Begin(held.ticket, held.request, self._ledger.pages(held.holder)))
        new = held.prompt_tokens - held.cached
        return Job(key, new, held.cached, held.accepted_at, held.wanted_by, 0, held.priority)

    def _has_yielded(self, held: _Held) -> bool:
        """Whether it may start since pins have given the memory that it lacked."""
        if self.keeps is None or not self._ledger.pinned:
            return False
        return self.keeps.yields(self._need(held) - self._ledger.available) and self._may_start(held)

    def _need(self, held: _Held) -> int:
        """Pages that it takes of those available."""
        return self._ledger.need(held.pages, self._shareable(held)) if held.prefix else held.pages

    def _run_alone(self, now: float, commands: list[PrefillCommand]) -> RunChunk | None:
        """The next chunk of the first that is to be alone in its steps, if it may start."""
        held = next(iter(self._alone.values()))
        if not held.begun and self._start(held.key, now, commands) is None:
            return None
        self._after_alone = True
        return self._run([(held.key, min(held.prompt_tokens - held.done, self._config.chunk_tokens))], now, alone=True)

    def _run_batch(self, now: float, commands: list[PrefillCommand]) -> RunChunk | None:
        """A step of those of the batch class that have begun, and of those next in line that have all they need."""
        window = self._order.deadline()
        if window is not None and now < window < now + self._batch_s:
            return None
        room, rows, unasked = min(self._config.batch_tokens, self._config.chunk_tokens), self._config.max_rows, 0
        takes: list[Take] = []

        def take(held: _Held) -> int:
            """Tokens that are left of the step's after what it takes of them."""
            takes.append((held.key, min(room, held.prompt_tokens - held.done)))
            return room - takes[-1][1] if len(takes) < rows else 0

        for held in self._batch_begun.values():
            if not room:
                break
            room = take(held)
        for held in list(self._batch.values()) if room else ():
            if held.grant is not Grant.GIVEN and not self._asks_nobody(held):
                unasked += 1
                if unasked >= self._config.batch_ahead:
                    break
                continue
            if self._start(held.key, now, commands) is None:
                break
            del self._batch[held.key]
            self._batch_begun[held.key] = held
            room = take(held)
            if not room:
                break
        if not takes:
            return None
        run = self._run(takes, now)
        assert self._running is not None
        self._running.batch = self._running.immune = True
        return run

    def _ask_ahead(self, commands: list[PrefillCommand]) -> None:
        """Ask the sinks of those of the batch class that begin next, if only such a one runs."""
        waiting = 0
        for held in self._batch.values():
            if held.grant is Grant.NOT_ASKED:
                commands += self._ask(held)
            waiting += held.grant is not Grant.GIVEN
            if waiting >= self._config.batch_ahead:
                break

    def _computed(self, held: _Held) -> None:
        """Nothing is left to compute of its prompt, or it is not wanted."""
        self._alone.pop(held.key, None)
        if held.batch:
            self._batch.pop(held.key, None)
            self._batch_begun.pop(held.key, None)
            self._batch_new -= held.lined
        else:
            self._line -= held.lined
        held.lined = 0

    def _gives_way(self, held: _Held, before: _Held) -> bool:
        """Whether one does not start because another could not and lacks memory of this worker, to start or to ask.

        Who has its sink's promise gives way only to one that waits for nothing there: that may be what was promised.
        """
        if before.grant is Grant.GIVEN or self._asks_nobody(before):
            return True
        return before.grant is Grant.NOT_ASKED and held.grant is not Grant.GIVEN

    def _run(self, takes: Sequence[Take], now: float, *, alone: bool = False) -> RunChunk:
        spans, total = [], 0
        for key, tokens in takes:
            held = self._requests.get(key)
            if held is None or not held.begun or held.in_step or not 0 < tokens <= held.prompt_tokens - held.done:
                raise LocalError(f"the order takes {tokens} tokens of {key}, want some that it may compute now")
            held.in_step = True
            spans.append(Span(key, held.done, held.done + tokens))
            total += tokens
        if total > self._config.chunk_tokens or len(spans) > self._config.max_rows:
            raise LocalError(f"the order takes {total} tokens in {len(spans)} rows, want no more than the step has")
        self._run_id += 1
        self._running = _Step(self._run_id, tuple(spans), list(takes), alone, immune=alone, began_at=now)
        self._moved = True
        return RunChunk(self._run_id, self._running.spans)

    def _ask(self, held: _Held) -> list[PrefillCommand]:
        """Ask the sink before the start, unless the first token is all that is wanted.

        A sink that has promised memory waits for the KV, so the KV's pages here must never wait for memory of a sink:
        one that finds no room beside those ungranted is asked for when they are, and then none starts in its way, and
        none that has begun and loses its sink stays there (`_stands_in_the_way`).
        """
        assert held.request is not None
        if held.grant is not Grant.NOT_ASKED or self._asks_nobody(held):
            return []
        if not held.begun and held.pages + self._ungranted > self._capacity:
            return []
        sink, second, left_s = held.ticket.sink, held.second, held.wanted_by - self._now
        if second is not None and self._sinks.is_better(second, sink, held.request.hints.tenant, left_s, self._now):
            sink = second
        if sink == self._me:
            if self._own_is_asked(held):
                return []
            self._own = held.key
        if sink != held.ticket.sink:
            self._turn(held, sink)
        if not held.begun and held.pages > (1 - self._config.ungranted_share) * self._capacity:
            self._vast[held.key] = held.pages
        self._set_grant(held, Grant.ASKED)
        return [AskForSink(held.ticket, held.request, held.until)]

    def _hush(self, sink: Identity, quiet: bool) -> list[PrefillCommand]:
        """Nobody waits for a sink that may be lost while a second one would take it; its KV is here.

        Nor where this is the second one: the gateway, which may know another, thinks that it is at the first.
        """
        self._sinks.hush(sink, quiet)
        if not quiet:
            return []
        return [
            WithdrawHandOff(held.key, f"{sink.name} is quiet")
            for held in self._requests.values()
            if held.ticket.sink == sink
            and held.grant is not Grant.NOT_ASKED
            and held.cancelled is None
            and (held.turned or self._other(held) is not None)
        ]

    def _other(self, held: _Held) -> Identity | None:
        """The second sink, if it can be asked now."""
        return None if self._sinks.quiet(held.second) or self._stands_in_the_way(held) else held.second

    def _turn(self, held: _Held, sink: Identity) -> None:
        held.ticket, held.second, held.turned = replace(held.ticket, sink=sink), None, True

    def _own_is_asked(self, held: _Held) -> bool:
        """Whether our own sink keeps memory for another one already that has not begun.

        What it keeps is missing here: two of those could each wait for ever for what is kept for the other.
        """
        own = self._requests.get(self._own)
        return own is not None and own is not held and not own.begun and own.grant is not Grant.NOT_ASKED

    def _set_grant(self, held: _Held, grant: Grant) -> None:
        if held.begun:
            self._ungranted += ((grant is Grant.ASKED) - (held.grant is Grant.ASKED)) * held.pages
        held.grant = grant
        if grant is Grant.ASKED and not (held.batch or held.request is None or held.request.alone):
            self._sinks.asked(held.ticket.sink, held.key, held.request.hints.tenant, self._now)
        elif self._sinks.answered(held.ticket.sink, held.key):
            self._eased = True

    def _may_start(self, held: _Held) -> bool:
        pages = held.pages
        if held.prefix:
            pages = self._ledger.need(pages, self._shareable(held))
        if pages > self._ledger.available:
            return False
        if held.grant is not Grant.ASKED:
            return held.grant is Grant.GIVEN or self._asks_nobody(held)
        if held.ticket.sink == self._me:
            return False  # what it holds would be missing where its grant waits for memory
        ungranted = self._ungranted + held.pages
        vast = max((pages for key, pages in self._vast.items() if key != held.key), default=0) if self._vast else 0
        return ungranted <= min(self._config.ungranted_share * self._capacity, self._capacity - vast)

    def _stands_in_the_way(self, held: _Held) -> bool:
        """Whether its pages, ungranted again, leave too little for somebody whose sink holds memory already."""
        if not held.begun:
            return False
        asked = (each for each in self._requests.values() if each.grant is not Grant.NOT_ASKED and not each.begun)
        return max((each.pages for each in asked), default=0) + self._ungranted + held.pages > self._capacity

    def _asks_nobody(self, held: _Held) -> bool:
        """The first token is all that is wanted."""
        return held.request is not None and held.request.sampling.max_tokens == 1

    def _shareable(self, held: _Held) -> tuple[int, ...]:
        """At least one token is computed: it gives the first logits."""
        return held.prefix[: (held.prompt_tokens - 1) // self._shape.page_tokens]

    def _over(self, what: str, run_id: int) -> _Step:
        """The running step, which is no longer running."""
        step = self._running
        if step is None or run_id != step.run_id:
            raise LocalError(f"{what}: got run {run_id}, want {step.run_id if step else 'none'}")
        self._running = None
        return step

    def _chunk_done(self, event: ChunkDone, now: float) -> list[PrefillCommand]:
        step = self._over("chunk done", event.run_id)
        self._eased = True
        if step.batch:
            self._batch_s = max(now - step.began_at, 0.9 * self._batch_s)
        elif not step.alone:
            self._order.ran(step.takes, now)
            count = sum([tokens for _, tokens in step.takes])
            if not step.immune and 2 * count >= self._config.chunk_tokens and now > step.began_at:
                speed = count / (now - step.began_at)
                self._speed = 0.8 * self._speed + 0.2 * speed if self._speed else speed
        begun: dict[str, list[Began]] = {}
        for each in event.begun:
            begun.setdefault(each.key, []).append(each)
        commands: list[PrefillCommand] = []
        for span in step.spans:
            held = self._requests[span.key]
            held.in_step = False
            held.done = span.stop
            held.chunks += 1
            if held.prefix:
                self._ledger.name(held.holder, held.prefix[: span.stop // self._shape.page_tokens])
            if held.cancelled is not None:
                commands += self._end_if_free(held)
            elif span.key in begun:
                commands += self._began(held, begun[span.key], now)
            elif held.grant is not Grant.NOT_ASKED:
                commands.append(self._seal(held))
        return commands

    def _began(self, held: _Held, begun: list[Began], now: float) -> list[PrefillCommand]:
        """The prompt is complete: some continuations may be over with their first token, the others go on."""
        self._enter(held, State.HANDING_OFF)
        self._computed(held)
        held.computed_at = now
        self._ledger.move(held.holder, Owner.HANDING_OFF)
        held.firsts = tuple([each.first for each in begun if each.finish is None])
        commands: list[PrefillCommand] = []
        for each in begun:
            if each.finish is not None:
                token, branch = each.first.token, each.first.branch
                count, stop = (0, token) if each.finish == "stop" else (1, None)
                stages, cached = self._stages(held, now), self._cached(held)
                done = Finished(held.ticket, each.finish, count, stop, stages, branch, cached_tokens=cached)
                commands.append(Answer(done))
        if not held.firsts:
            return commands + self._cancel(held, "finished with its first token")
        return [*commands, self._seal(held)] if held.grant is not Grant.NOT_ASKED else commands

    def _chunk_failed(self, run_id: int, reason: str, now: float) -> list[PrefillCommand]:
        """All of the step are placed again by their gateways, which count how often that happens to each; the worker
        goes on."""
        step = self._over("chunk failed", run_id)
        commands: list[PrefillCommand] = []
        for span in step.spans:
            held = self._requests[span.key]
            held.in_step = False
            if held.cancelled is None:
                commands.append(Answer(Failed(held.ticket, "INTERNAL", f"the engine failed: {reason}")))
                commands += self._cancel(held, reason)
            else:
                commands += self._end_if_free(held)
        if not (step.alone or step.batch):
            self._order.ran(step.takes, now)
        return commands

    # Suspension.
    def _preempt(self, now: float) -> list[PrefillCommand]:
        """Only an arrival makes a running step less urgent than another (FlowPrefill's scheduler is event-driven)."""
        step = self._running
        if not self._config.preempt or step is None or self._suspended is not None or step.immune or step.suspending:
            return []
        key = self._order.overtakes(now)
        if key is None:
            return []
        waiter = self._requests[key]
        commands = self._ask(waiter)
        if not waiter.begun and not self._may_start(waiter):
            return commands
        step.suspending = True
        return [*commands, Suspend(step.run_id)]

    def _step_suspended(self, run_id: int, now: float) -> None:
        step = self._running
        if step is None or step.run_id != run_id or not step.suspending:
            raise LocalError(f"suspended: got run {run_id}, want one that was asked to stop")
        self._running, self._suspended = None, step
        self.suspensions += 1
        self._order.suspended(step.takes, now)

    def _resume(self, step: _Step, now: float) -> list[PrefillCommand]:
        self._running, self._suspended = step, None
        step.suspending, step.immune = False, True
        self._order.resumed(step.takes, now)
        return [Resume(step.run_id)]

    # Ends.
    def _seal(self, held: _Held) -> SealPages:
        return SealPages(held.key, self._ledger.pages(held.holder), held.done, held.firsts)

    def _hand_off_over(self, event: HandOffOver, now: float) -> list[PrefillCommand]:
        held = self._known(event.key)
        if held is None:
            return []
        self._set_grant(held, Grant.NOT_ASKED)
        if held.cancelled is not None:
            return self._end_if_free(held)
        if event.taken:
            stages = self._stages(held, now, event.taken_s)
            handed = Handed(held.ticket, stages, cached_tokens=self._cached(held))
            return [Answer(handed), *self._cancel(held, "taken")]
        if (other := self._other(held)) is not None:
            self._turn(held, other)
            commands = self._ask(held)
            if held.done:
                commands.append(self._seal(held))
            return commands
        why = f"no decode worker took it: {event.reason}"
        stages = self._stages(held, now) if held.state is State.HANDING_OFF else ()
        return [Answer(Failed(held.ticket, "UNAVAILABLE", why, stages)), *self._cancel(held, event.reason)]

    def _cancel(self, held: _Held, reason: str) -> list[PrefillCommand]:
        """Ask everything that works on it to stop; its pages are freed when the last of it has."""
        if held.cancelled is not None:
            return []
        held.cancelled = reason
        self._until.drop(held.key)
        self._order.drop(held.key)
        self._computed(held)
        self._eased = self._moved = True
        if held.state is State.FETCHING:
            assert self.fetches is not None
            dropped = self.fetches.drop(held.key, reason)
            return [*dropped, *self._end_if_free(held)]
        if held.grant is not Grant.NOT_ASKED:
            return [WithdrawHandOff(held.key, reason)]
        return self._end_if_free(held)

    def _end_if_free(self, held: _Held) -> list[PrefillCommand]:
        if held.grant is not Grant.NOT_ASKED or held.in_step:
            return []
        del self._requests[held.key]
        self._vast.pop(held.key, None)
        self._counts[held.state] -= 1
        self._pages -= held.pages
        if held.session:
            self._keep(held)
        self._ledger.release(held.holder)
        self._eased = True
        return [EndSequence(held.key)] if held.begun else []

    def _keep(self, held: _Held) -> None:
        """It goes: its session's next turn may want what it leaves."""
        assert self.keeps is not None
        if not held.begun:
            self.keeps.left(held.key, held.session, self._now)
        elif held.request is not None:
            named = held.prefix[: held.done // self._shape.page_tokens]
            tool = held.request.hints.tool
            self.keeps.paused(held.session, tool, named, self._now)

    def _cached(self, held: _Held) -> int:
        """Tokens that were not computed, if they may be others than were said when it was accepted."""
        return held.cached if held.fetched is not None else 0

    def _stages(self, held: _Held, now: float, taken_s: float | None = None) -> tuple[Stage, ...]:
        me = self._me.name
        detail = {"tokens": str(held.prompt_tokens), "chunks": str(held.chunks)}
        if held.cached:
            detail["cached"] = str(held.cached)
        stages, since = [], held.accepted_at
        if held.fetched is not None:
            stages.append(Stage("fetch", me, held.fetched_at - since, held.fetched))
            since = held.fetched_at
        stages += [
            Stage("batch_wait", me, held.started_at - since),
            Stage("prefill", me, held.computed_at - held.started_at, detail),
        ]
        if taken_s is not None:
            stages.append(Stage("handing_off", me, now - held.computed_at, {"ready_to_taken_s": f"{taken_s:.6f}"}))
        return tuple(stages)

    def _stands(self, held: _Held) -> Standing:
        ticket, request = held.ticket, held.request
        return Standing(
            ticket.key,
            request.id if request is not None else "",
            "cancelled" if held.cancelled is not None else held.state,
            held.accepted_at,
            held.until,
            self._waits_for(held),
            tokens=len(held.firsts),
        )

    def _waits_for(self, held: _Held) -> str:
        sink = held.ticket.sink.name
        if held.cancelled is not None:
            return "the end of its step" if held.in_step else f"the end of its hand-off to {sink}"
        match held.state:
            case State.OFFERED:
                return f"its prompt from {held.ticket.minter.name}"
            case State.FETCHING:
                assert self.fetches is not None
                return f"pages of its prompt from {self.fetches.source(held.key)}"
            case State.QUEUED if held.batch and held not in self._blocked:
                return "time that nobody else wants"
            case State.QUEUED if self.keeps is not None and held.key in self.keeps.waiting:
                return f"room beside what {len(self.keeps.kept)} programs keep: {self._need(held)} pages"
            case State.QUEUED if held in self._blocked and held.pages > self._ledger.available:
                return f"memory: {held.pages} pages, {self._ledger.available} are free"
            case State.QUEUED if held in self._blocked:
                return f"memory at {sink}, which promised none yet"
            case State.QUEUED:
                return (
                    f"its turn: {self._counts[State.QUEUED] - 1} others are queued, {self._counts[State.RUNNING]} run"
                )
            case State.RUNNING:
                return "" if held.in_step else f"its turn: {held.prompt_tokens - held.done} tokens are left to compute"
            case State.HANDING_OFF:
                return f"{sink} to take its KV" if held.grant is Grant.GIVEN else f"memory at {sink}"

    def _invite(self, now: float) -> list[PrefillCommand]:
        """Called when there is less to do, or more memory, than when somebody was refused."""
        self._eased = False

        def welcome(new: int, wait_s: float) -> bool:
            pages = self._pages + self._shape.pages_for(new)
            fits = pages <= self._config.accept_share * self._capacity
            if self._sinks.longest_s(now) > wait_s:
                return False
            if len(self._shares) > 1 and self._line and self._line + new > wait_s * self._speed > 0:
                return False  # who was refused may have been above its share
            return fits and self._outlook(now, new, 0, wait_s)[1] == 0

        told = self._refusals.told(now, welcome)
        return [Invite(gateway, SlotFree(self._me, tokens)) for gateway, tokens in told]
