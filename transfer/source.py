"""The giving side of a hand-off, pure: announces sealed pages with their digests until the sink says Taken.

A source needs no fence: it may free pages at Taken, release, cancel, lost peer or deadline, because it first forgets
the ticket, and a sink accepts bytes only if every page's digest equals the one announced (docs/architecture.md,
"The hand-off").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from core.errors import LocalError
from core.kv import KvShape, page_runs
from core.messages import Carried, CaughtUp, First, Grant, OfferMigration, Ready, Refuse, Release, Reserve, Taken
from core.quick import quick_init
from core.ranked import Ranked
from core.request import Request, Ticket
from core.worker import Identity


# Events from this worker (the messages Grant, Refuse, Taken and Release come from the sink).
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

    message: Reserve | Ready | Release


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


FromSink = Grant | Refuse | CaughtUp | Taken | Release
SourceEvent = AskSink | AskToMove | Sealed | Digested | Withdraw | SinkLost | FromSink
SourceCommand = SendToSink | SendOffer | Digest | GrantCame | MoveAsked | HandOffEnded | MoveEnded


class State(StrEnum):
    """Where the giving side of a ticket is."""

    ASKED = "asked"
    GRANTED = "granted"
    ANNOUNCED = "announced"
    """Everything was announced; only Taken is missing."""


TRANSITIONS: dict[tuple[State, type | None], tuple[State | None, ...]] = {
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
"""State and event (None: the deadline) -> states that may follow, None for the end. A message of the sink that has no
entry is ignored and counted."""

WAITS: dict[State, tuple[str, str]] = {
    State.ASKED: ("the share of the source's arena for what has no grant", "memory at the sink"),
    State.GRANTED: ("the rest of the source's arena", "the source's engine"),
    State.ANNOUNCED: ("the rest of the source's arena", "reads"),
}
"""What a ticket holds here meanwhile, and what it waits for: with the sink's no ring may come of it."""


@dataclass(slots=True)
class _Giving:
    ticket: Ticket
    request: Request
    deadline: float
    state: State = State.ASKED
    pages: tuple[int, ...] = ()
    sealed_tokens: int = 0
    firsts: tuple[First, ...] = ()
    moves: bool = False
    carried: Carried | None = None
    digests: list[int] = field(default_factory=list)
    asked_pages: int = 0
    cached_pages: int = 0
    """The sink has them."""
    announced_pages: int = 0
    announced_at: float = 0.0
    sealed_at: float = 0.0

    @property
    def complete(self) -> bool:
        return bool(self.firsts)


class Source:
    """All hand-offs this worker gives. Ends each ticket in exactly one `HandOffEnded`."""

    def __init__(self, shape: KvShape) -> None:
        self._shape = shape
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
                ticket = event.ticket
                if ticket.key in self._giving:
                    raise LocalError(f"{ticket.key} is being handed off already")
                self._giving[ticket.key] = _Giving(ticket, event.request, event.deadline)
                self._deadlines.put(ticket.key, event.deadline)
                return [SendToSink(Reserve(ticket, event.request))]
            case AskToMove(offer, deadline):
                ticket = offer.ticket
                if ticket.key in self._giving:
                    raise LocalError(f"{ticket.key} is being handed off already")
                self._giving[ticket.key] = _Giving(ticket, offer.request, deadline, moves=True)
                self._deadlines.put(ticket.key, deadline)
                return [SendOffer(offer)]
            case None:
                return self._end(self._deadlines.until(now), "deadline", tell=True)
            case Withdraw(key, reason):
                return self._end([key] if key in self._giving else [], reason, tell=True)
            case SinkLost(identity):
                lost = [key for key, giving in self._giving.items() if giving.ticket.sink == identity]
                return self._end(lost, f"{identity.name} was lost", tell=False)

    def deadline(self) -> float | None:
        return self._deadlines.lowest() if self._giving else None

    def check(self) -> None:
        assert len(self._deadlines) == len(self._giving)
        for key, giving in self._giving.items():
            assert key == giving.ticket.key
            assert self._deadlines.rank(key) == giving.deadline
            assert giving.announced_pages <= len(giving.digests) <= giving.asked_pages
            assert giving.asked_pages <= max(len(giving.pages), giving.cached_pages)
            assert giving.state is not State.ASKED or giving.announced_pages == 0, "announced without a grant"
            if giving.state is State.ANNOUNCED:
                assert giving.complete
                assert giving.announced_pages == self._shape.pages_for(giving.sealed_tokens)

    def _heard(self, ticket: Ticket, message: FromSink, now: float) -> list[SourceCommand]:
        giving = self._giving.get(ticket.key)
        if giving is None or giving.ticket != ticket or (giving.state, type(message)) not in TRANSITIONS:
            return self._ignore()
        if isinstance(message, Grant):
            giving.state = State.GRANTED
            self._granted(giving, message.cached_pages)
            if not giving.moves:
                return [GrantCame(ticket.key), *self._announce(giving, now)]
        if isinstance(message, Grant | CaughtUp):
            return [MoveAsked(ticket.key)]
        del self._giving[ticket.key]
        self._deadlines.drop(ticket.key)
        if giving.moves:
            reason = message.reason if isinstance(message, Refuse | Release) else ""
            return [MoveEnded(ticket.key, isinstance(message, Taken), True, reason)]
        if isinstance(message, Refuse | Release):
            return [HandOffEnded(ticket.key, taken=False, reason=message.reason)]
        return [HandOffEnded(ticket.key, taken=True, taken_s=now - giving.announced_at)]

    def _granted(self, giving: _Giving, cached_pages: int) -> None:
        """Pages that the sink has need no digest, unless some are being computed."""
        giving.cached_pages = min(max(0, cached_pages), len(giving.request.prompt) // self._shape.page_tokens)
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
        whole = event.tokens // self._shape.page_tokens
        upto = self._shape.pages_for(event.tokens) if giving.complete else whole
        if upto <= giving.asked_pages:
            # Nothing is left to read of a row that stopped where a page ends, or if the sink has all of it.
            return self._announce(giving, now) if giving.complete else []
        first, giving.asked_pages = giving.asked_pages, upto
        tokens = min(event.tokens, upto * self._shape.page_tokens) - first * self._shape.page_tokens
        return [Digest(event.key, first, event.pages[first:upto], tokens)]

    def _announce(self, giving: _Giving, now: float) -> list[SourceCommand]:
        if giving.state is not State.GRANTED:
            return []
        first, upto = max(giving.announced_pages, giving.cached_pages), len(giving.digests)
        last = bool(giving.firsts) and upto == self._shape.pages_for(giving.sealed_tokens)
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

    def _end(self, keys: Iterable[str], reason: str, *, tell: bool) -> list[SourceCommand]:
        commands: list[SourceCommand] = []
        for key in keys:
            giving = self._giving.pop(key)
            self._deadlines.drop(key)
            if tell:
                commands.append(SendToSink(Release(giving.ticket, reason)))
            if giving.moves:
                # Who has heard all of it may have taken it, and its word may be lost.
                commands.append(MoveEnded(key, False, giving.state is not State.ANNOUNCED, reason))
            else:
                commands.append(HandOffEnded(key, taken=False, reason=reason))
        return commands

    def _ignore(self) -> list[SourceCommand]:
        self.ignored += 1
        return []
