"""The giving side of a hand-off, pure: announces sealed pages with their digests until the sink says Taken.

A prompt's KV is handed over, a running row moves, or a peer fetches pages that are kept here under their names: a
prefix, or what a decode worker has generated. What is fetched is complete when it is asked for; until the ticket ends
the source holds it beside whoever else does, so that its digests are those of what its names say.

A source needs no fence: it may free pages at Taken, release, cancel, lost peer or deadline, because it first forgets
the ticket, and a sink accepts bytes only if every page's digest equals the one announced (docs/architecture.md,
"The hand-off").

The sink's pages may be larger than these: then it announces as many at once as fill pages there, so that nobody reads
into a page of which another part is still to come. What a sink with smaller pages does is its own affair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from core.errors import LocalError
from core.kv import KvShape, page_runs
from core.messages import (
    Carried,
    CaughtUp,
    Fetch,
    First,
    Grant,
    OfferMigration,
    Ready,
    Refuse,
    Release,
    Reserve,
    Taken,
)
from core.pages import Owner, Pages
from core.quick import quick_init
from core.ranked import Ranked
from core.request import Request, Ticket
from core.standing import Standing
from core.worker import Identity, Use

LENT = "lent/"
"""Before a ticket's key: who holds, in the ledger, what its sink fetches."""


# Events from this worker (the messages Grant, Refuse, Taken, Release and Fetch come from the sink).
@quick_init
@dataclass(frozen=True, slots=True)
class AskSink:
    """Ask the ticket's sink for memory."""

    ticket: Ticket
    request: Request
    deadline: float


@quick_init
@dataclass(frozen=True, slots=True)
class AskToMove:
    """Ask the ticket's sink to go on with a row that runs here."""

    offer: OfferMigration
    deadline: float


@quick_init
@dataclass(frozen=True, slots=True)
class Sealed:
    """The KV of the first `tokens` tokens is written; `firsts` once the prompt is complete, or the row has stopped."""

    key: str
    pages: tuple[int, ...]
    tokens: int
    firsts: tuple[First, ...] = ()
    carried: Carried | None = None
    """What a row takes along that has stopped to move."""


@quick_init
@dataclass(frozen=True, slots=True)
class Digested:
    """Digests of the pages asked for by `Digest` with this key."""

    key: str
    first_page: int
    digests: tuple[int, ...]


@quick_init
@dataclass(frozen=True, slots=True)
class Withdraw:
    """Forget the ticket; the sink is told."""

    key: str
    reason: str


@quick_init
@dataclass(frozen=True, slots=True)
class SinkLost:
    """This life of a peer is over."""

    identity: Identity


# Commands.
@quick_init
@dataclass(frozen=True, slots=True)
class SendToSink:
    """Send a message to the ticket's sink."""

    message: Reserve | Ready | Release | Refuse


@quick_init
@dataclass(frozen=True, slots=True)
class SendOffer:
    """Send it to the ticket's sink; if that cannot be reached, it refuses."""

    message: OfferMigration


@quick_init
@dataclass(frozen=True, slots=True)
class Digest:
    """Compute digests of `pages`, the prompt's pages from `first_page` on, which hold `tokens` tokens."""

    key: str
    first_page: int
    pages: tuple[int, ...]
    tokens: int


@quick_init
@dataclass(frozen=True, slots=True)
class GrantCame:
    """The sink promised memory."""

    key: str


@quick_init
@dataclass(frozen=True, slots=True)
class MoveAsked:
    """The sink of a row that moves has promised memory, or has all pages announced so far: what is next?"""

    key: str


@quick_init
@dataclass(frozen=True, slots=True)
class HandOffEnded:
    """The ticket is forgotten and its pages are the policy's again."""

    key: str
    taken: bool
    reason: str = ""
    taken_s: float = 0.0
    """From the last announcement to Taken."""


@quick_init
@dataclass(frozen=True, slots=True)
class MoveEnded:
    """The ticket of a row that moves is forgotten. Not taken and `sure`: the sink has not got it and never will."""

    key: str
    taken: bool
    sure: bool
    reason: str = ""


@quick_init
@dataclass(frozen=True, slots=True)
class FetchEnded:
    """The ticket of a peer that fetched is forgotten, and nothing is kept for it any more."""

    key: str
    taken: bool
    reason: str = ""


FromSink = Grant | Refuse | CaughtUp | Taken | Release
SourceEvent = AskSink | AskToMove | Sealed | Digested | Withdraw | SinkLost | FromSink | Fetch
SourceEnd = HandOffEnded | MoveEnded | FetchEnded
SourceCommand = SendToSink | SendOffer | Digest | GrantCame | MoveAsked | SourceEnd


class State(StrEnum):
    """Where the giving side of a ticket is."""

    ASKED = "asked"
    GRANTED = "granted"
    ANNOUNCED = "announced"
    """Everything was announced; only Taken is missing."""


TRANSITIONS: dict[tuple[State | None, type | None], tuple[State | None, ...]] = {
    (None, AskSink): (State.ASKED,),
    (None, AskToMove): (State.ASKED,),
    (None, Fetch): (State.GRANTED, State.ANNOUNCED, None),
    (State.ASKED, Sealed): (State.ASKED,),
    (State.ASKED, Digested): (State.ASKED,),
    (State.ASKED, Grant): (State.GRANTED, State.ANNOUNCED),
    (State.ASKED, Refuse): (None,),
    (State.GRANTED, Sealed): (State.GRANTED, State.ANNOUNCED),
    (State.GRANTED, Digested): (State.GRANTED, State.ANNOUNCED),
    (State.GRANTED, CaughtUp): (State.GRANTED,),
    (State.ANNOUNCED, Taken): (None,),
    **{(state, event): (None,) for state in State for event in (Release, Withdraw, SinkLost, None)},
}
"""State (None: no ticket) and event (None: the deadline) -> states that may follow, None for the end. A message of the
sink that has no entry is ignored and counted."""

WAITS: dict[State, tuple[str, str]] = {
    State.ASKED: ("the share of the source's arena for what has no grant", "memory at the sink"),
    State.GRANTED: ("the rest of the source's arena", "the source's engine"),
    State.ANNOUNCED: ("the rest of the source's arena", "reads"),
}
"""What a ticket holds here meanwhile, and what it waits for: with the sink's no ring may come of it. What is fetched
waits for digests and reads alone."""


@dataclass(slots=True)
class _Giving:
    ticket: Ticket
    use: Use
    named_pages: int
    """So many leading pages may be at the sink already."""
    deadline: float
    begun_at: float
    state: State = State.ASKED
    pages: tuple[int, ...] = ()
    sealed_tokens: int = 0
    complete: bool = False
    """No page will follow."""
    firsts: tuple[First, ...] = ()
    carried: Carried | None = None
    digests: list[int] = field(default_factory=list)
    asked_pages: int = 0
    step: int = 1
    """So many pages fill the sink's: only multiples of it are announced, but for the end."""
    cached_pages: int = 0
    """The sink has them."""
    announced_pages: int = 0
    announced_at: float = 0.0
    sealed_at: float = 0.0


class Source:
    """All hand-offs this worker gives. Ends each ticket in exactly one `HandOffEnded`, `MoveEnded` or `FetchEnded`."""

    def __init__(self, shape: KvShape, ledger: Pages) -> None:
        self._shape = shape
        self._page_tokens = shape.page_tokens
        self._ledger = ledger
        self._giving: dict[str, _Giving] = {}
        self._deadlines = Ranked()
        self.ignored = 0
        """Messages about tickets we do not hold."""

    def __len__(self) -> int:
        return len(self._giving)

    def on(self, event: SourceEvent | None, now: float) -> list[SourceCommand]:
        match event:
            case Grant() | Refuse() | CaughtUp() | Taken() | Release():
                return self._heard(event.ticket, event, now)
            case Sealed():
                return self._sealed(event, now)
            case Digested():
                first_page, digests = event.first_page, event.digests
                giving = self._giving.get(event.key)
                have, upto = len(giving.digests) if giving else 0, first_page + len(digests)
                if giving is None or not first_page <= have < upto <= giving.asked_pages:
                    return self._ignore()
                # They may overlap: a hand-off to the first choice of sink asked for the same pages before.
                giving.digests.extend(digests[have - first_page :])
                return self._announce(giving, now)
            case AskSink():
                self._begin(event.ticket, Use.HAND_OFF, event.request, event.deadline, now)
                return [SendToSink(Reserve(event.ticket, event.request, self._page_tokens))]
            case AskToMove(offer, deadline):
                self._begin(offer.ticket, Use.MOVE, offer.request, deadline, now)
                return [SendOffer(replace(offer, page_tokens=self._page_tokens))]
            case Fetch():
                return self._fetch(event, now)
            case None:
                late = [self._giving[key] for key in self._deadlines.until(now)]
                return self._end(late, "deadline", tell=True)
            case Withdraw(key, reason):
                return self._end([self._giving[key]] if key in self._giving else [], reason, tell=True)
            case SinkLost(identity):
                lost = [giving for giving in self._giving.values() if giving.ticket.sink == identity]
                return self._end(lost, f"{identity.name} was lost", tell=False)

    def serves(self, sink: Identity) -> bool:
        """True while a ticket to `sink` runs. Looks at all of them."""
        return any(giving.ticket.sink == sink for giving in self._giving.values())

    def deadline(self) -> float | None:
        return self._deadlines.lowest() if self._giving else None

    def standing(self) -> list[Standing]:
        """Of every prompt that is handed over; a row that moves is its policy's, and what is fetched is nobody's."""
        prompts = [giving for giving in self._giving.values() if giving.use is Use.HAND_OFF]
        return [self._stands(giving) for giving in prompts]

    def check(self) -> None:
        assert len(self._deadlines) == len(self._giving)
        for key, giving in self._giving.items():
            assert key == giving.ticket.key
            assert self._deadlines.rank(key) == giving.deadline
            assert giving.complete == (bool(giving.firsts) or giving.use is Use.FETCH)
            assert giving.use is not Use.FETCH or self._ledger.pages(LENT + key) == giving.pages
            assert giving.announced_pages <= len(giving.digests) <= giving.asked_pages
            assert giving.asked_pages <= max(len(giving.pages), giving.cached_pages)
            assert giving.state is not State.ASKED or giving.announced_pages == 0, "announced without a grant"
            assert giving.cached_pages % giving.step == 0
            assert giving.state is State.ANNOUNCED or giving.announced_pages % giving.step == 0
            if giving.state is State.ANNOUNCED:
                assert giving.complete
                assert giving.announced_pages == self._shape.pages_for(giving.sealed_tokens)

    def _heard(self, ticket: Ticket, message: FromSink, now: float) -> list[SourceCommand]:
        giving = self._giving.get(ticket.key)
        if giving is None or giving.ticket != ticket or (giving.state, type(message)) not in TRANSITIONS:
            return self._ignore()
        if isinstance(message, Grant):
            giving.state = State.GRANTED
            if (theirs := message.page_tokens) not in (0, self._page_tokens):
                giving.step = math.lcm(self._page_tokens, theirs) // self._page_tokens
            self._granted(giving, message.cached_tokens // self._page_tokens)
            if giving.use is Use.HAND_OFF:
                return [GrantCame(ticket.key), *self._announce(giving, now)]
        if isinstance(message, Grant | CaughtUp):
            return [MoveAsked(ticket.key)]
        if isinstance(message, Refuse | Release):
            return [self._over(giving, message.reason)]
        return [self._over(giving, taken_s=now - giving.announced_at)]

    def _begin(self, ticket: Ticket, use: Use, request: Request, deadline: float, now: float) -> None:
        if ticket.key in self._giving:
            raise LocalError(f"{ticket.key} is being handed off already")
        named_pages = len(request.prompt) // self._page_tokens
        self._giving[ticket.key] = _Giving(ticket, use, named_pages, deadline, now)
        self._deadlines.put(ticket.key, deadline)

    def _fetch(self, fetch: Fetch, now: float) -> list[SourceCommand]:
        """Announce what is here of what a sink wants: a hand-off that is granted, and whose pages are all sealed."""
        ticket, wanted, theirs = fetch.ticket, len(fetch.prefix), fetch.page_tokens
        if ticket.key in self._giving:
            return self._ignore()
        if theirs not in (0, self._page_tokens):
            why = f"page_tokens: got {theirs} in names of pages, want {self._page_tokens} as here"
            return [SendToSink(Refuse(ticket, why))]
        deadline = now + fetch.timeout_s
        giving = _Giving(ticket, Use.FETCH, wanted, deadline, now, State.GRANTED, complete=True)
        self._giving[ticket.key] = giving
        self._deadlines.put(ticket.key, deadline)
        self._ledger.share(LENT + ticket.key, fetch.prefix, Owner.HANDING_OFF)
        giving.pages = self._ledger.pages(LENT + ticket.key)
        self._granted(giving, fetch.cached_pages)
        found = max(len(giving.pages), giving.cached_pages)
        giving.sealed_tokens, giving.sealed_at = found * self._page_tokens, now
        return self._digest(giving, found, now)

    def _granted(self, giving: _Giving, cached_pages: int) -> None:
        """Pages that the sink has need no digest, unless some are being computed."""
        cached_pages = min(max(0, cached_pages), giving.named_pages)
        giving.cached_pages = cached_pages - cached_pages % giving.step
        if len(giving.digests) == giving.asked_pages < giving.cached_pages:
            giving.digests += [0] * (giving.cached_pages - giving.asked_pages)
            giving.asked_pages = giving.cached_pages

    def _sealed(self, event: Sealed, now: float) -> list[SourceCommand]:
        """Ask for digests of what became whole: full pages, and the open last page only when the prompt is complete."""
        giving = self._giving.get(event.key)
        if giving is None:
            return self._ignore()
        if event.tokens < giving.sealed_tokens or giving.complete:
            raise LocalError(f"{event.key} sealed: got {event.tokens} tokens after {giving.sealed_tokens}")
        giving.pages, giving.sealed_tokens = event.pages, event.tokens
        giving.firsts, giving.carried, giving.sealed_at = event.firsts, event.carried, now
        giving.complete = bool(event.firsts)
        whole = event.tokens // self._page_tokens
        return self._digest(giving, self._shape.pages_for(event.tokens) if giving.complete else whole, now)

    def _digest(self, giving: _Giving, upto: int, now: float) -> list[SourceCommand]:
        if upto <= giving.asked_pages:
            # Nothing is left to read of a row that stopped where a page ends, or if the sink has all of it.
            return self._announce(giving, now) if giving.complete else []
        first, giving.asked_pages = giving.asked_pages, upto
        tokens = min(giving.sealed_tokens, upto * self._page_tokens) - first * self._page_tokens
        return [Digest(giving.ticket.key, first, giving.pages[first:upto], tokens)]

    def _announce(self, giving: _Giving, now: float) -> list[SourceCommand]:
        if giving.state is not State.GRANTED:
            return []
        first, upto = max(giving.announced_pages, giving.cached_pages), len(giving.digests)
        last = giving.complete and upto == self._shape.pages_for(giving.sealed_tokens)
        if giving.step > 1 and not last:
            upto -= upto % giving.step
            if first >= upto and giving.use is Use.MOVE and not giving.complete:
                # Nothing goes out that the sink could catch up with.
                return [MoveAsked(giving.ticket.key)]
        if first >= upto and not last:
            return []
        giving.announced_pages, giving.announced_at = upto, now
        if last:
            giving.state = State.ANNOUNCED
        carried = giving.carried if last else None
        if carried is not None:
            carried = replace(carried, stopped_s=carried.stopped_s + now - giving.sealed_at)
        ready = Ready(
            giving.ticket,
            first,
            page_runs(giving.pages[first:upto]),
            tuple(giving.digests[first:upto]),
            giving.firsts if last else (),
            carried,
        )
        return [SendToSink(ready)]

    def _end(self, ended: Iterable[_Giving], reason: str, *, tell: bool) -> list[SourceCommand]:
        commands: list[SourceCommand] = []
        for giving in ended:
            if tell:
                commands.append(SendToSink(Release(giving.ticket, reason)))
            # Who has heard all of a row may have taken it, and its word may be lost.
            commands.append(self._over(giving, reason, sure=giving.state is not State.ANNOUNCED))
        return commands

    def _over(self, giving: _Giving, reason: str = "", *, sure: bool = True, taken_s: float | None = None) -> SourceEnd:
        key, taken = giving.ticket.key, taken_s is not None
        del self._giving[key]
        self._deadlines.drop(key)
        match giving.use:
            case Use.HAND_OFF:
                return HandOffEnded(key, taken, reason, taken_s or 0.0)
            case Use.MOVE:
                return MoveEnded(key, taken, sure, reason)
            case Use.FETCH:
                self._ledger.release(LENT + key)
                return FetchEnded(key, taken, reason)

    def _stands(self, giving: _Giving) -> Standing:
        sink = giving.ticket.sink.name
        match giving.state:
            case State.ASKED:
                waits_for = f"memory at {sink}"
            case State.GRANTED if giving.asked_pages > len(giving.digests):
                waits_for = f"digests of {giving.asked_pages - len(giving.digests)} pages"
            case State.GRANTED:
                waits_for = f"the rest of the prompt: {giving.announced_pages} pages are announced"
            case State.ANNOUNCED:
                waits_for = f"{sink} to read {giving.announced_pages - giving.cached_pages} pages"
        return Standing(giving.ticket.key, "", giving.state, giving.begun_at, giving.deadline, waits_for)

    def _ignore(self) -> list[SourceCommand]:
        self.ignored += 1
        return []
