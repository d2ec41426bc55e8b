"""The taking side of a hand-off, pure: pulls announced pages, verifies them, says Taken.

The sink binds pages late, out of the memory its decode policy promised. Pages that it fetches for this worker's prefix
cache are named when they were verified and belong to nobody; memory for them is there at once, or nothing is fetched.

The one danger of one-sided reads is here:
an abandoned read can still land. Its target pages are *in doubt* until the read reports its end or the local agent
that posted it was destroyed (`Fence`); time is no fence (docs/architecture.md, "The hand-off").

The source's pages may hold more or fewer tokens than ours. It announces pages of its own, which end where one of ours
does as well, or with the last token; so digests, which add up over tokens, are compared by their sums over the least
that is whole pages on both sides. Of what is here already as many pages are used as are whole pages there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from core.errors import LocalError
from core.kv import KvShape, PageRun, page_runs
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
from core.worker import Identity

DOUBT_SHARE = 0.05
"""Share of the arena that may be in doubt before the agents holding those reads are destroyed."""
DOUBT_S = 0.5
"""A ticket waits this long for memory before the pages in doubt are fenced, however few: whole reads take far less."""


# Events from this worker (the messages Reserve, OfferMigration, Ready, Refuse and Release come from the source).
@quick_init
@dataclass(frozen=True, slots=True)
class AskSource:
    """Fetch the pages of this prefix that the ticket's source has and this worker has not."""

    ticket: Ticket
    prefix: tuple[int, ...]
    """Chained hashes of the pages wanted, from the first page of their prompt on."""
    deadline: float


@quick_init
@dataclass(frozen=True, slots=True)
class Decided:
    """The decode policy's answer to `AskPolicy`: its promise is in the ledger if `granted`."""

    key: str
    granted: bool
    reason: str = ""


@quick_init
@dataclass(frozen=True, slots=True)
class Pulled:
    """A read brought its pages; these are the digests of what is in them now."""

    read_id: int
    seconds: float
    digests: tuple[int, ...]


@quick_init
@dataclass(frozen=True, slots=True)
class PullFailed:
    """A read reported a failure; `in_doubt` if bytes may still land."""

    read_id: int
    reason: str
    in_doubt: bool = False


@quick_init
@dataclass(frozen=True, slots=True)
class Drop:
    """Forget the ticket; the source is told."""

    key: str
    reason: str


@quick_init
@dataclass(frozen=True, slots=True)
class SourceLost:
    """This life of a peer is over."""

    identity: Identity


@quick_init
@dataclass(frozen=True, slots=True)
class Fenced:
    """The agents that posted these reads are gone: they cannot land any more."""

    read_ids: tuple[int, ...]


# Commands.
@quick_init
@dataclass(frozen=True, slots=True)
class SendToSource:
    """Send a message to the ticket's source; if a Fetch cannot reach it, it refuses."""

    message: Grant | Refuse | Taken | Release | Fetch


@quick_init
@dataclass(frozen=True, slots=True)
class AskForMore:
    """Send it to the source of a row that moves."""

    message: CaughtUp


@quick_init
@dataclass(frozen=True, slots=True)
class AskPolicy:
    """May this come here?"""

    ticket: Ticket
    request: Request
    offer: OfferMigration | None = None
    """If it is a row that runs at the source."""


@quick_init
@dataclass(frozen=True, slots=True)
class Read:
    """Pull `runs` of the source's arena into `pages` of ours and compute their digests.

    They are the prompt's pages from `first_page` on and hold `tokens` tokens. Ends in `Pulled` or `PullFailed`.
    """

    read_id: int
    source: Identity
    runs: tuple[PageRun, ...]
    pages: tuple[int, ...]
    first_page: int
    tokens: int
    page_tokens: int = 0
    """Of a page at the source; 0: as many as here."""


@quick_init
@dataclass(frozen=True, slots=True)
class Fence:
    """Destroy the agents that posted these reads; ends in `Fenced`."""

    read_ids: tuple[int, ...]


@quick_init
@dataclass(frozen=True, slots=True)
class Arrived:
    """All of the prompt's KV is here and verified; its pages are the policy's, held under `ticket.key`."""

    ticket: Ticket
    request: Request
    firsts: tuple[First, ...]
    pull: Pull
    carried: Carried | None = None
    """Of a row that has moved."""


@quick_init
@dataclass(frozen=True, slots=True)
class Gone:
    """The ticket is forgotten, its promise and pages are no longer its own."""

    ticket: Ticket
    reason: str
    recompute: bool = False
    """True if the KV was damaged and the request should be computed anew."""


@quick_init
@dataclass(frozen=True, slots=True)
class Fetched:
    """The answer to `AskSource`: of what was wanted so many leading pages are here, kept under their names."""

    ticket: Ticket
    pages: int
    reason: str = ""
    """Why none came, if none did for a reason; a source may have no more than is here."""
    pull: Pull | None = None
    """If they came."""


@quick_init
@dataclass(frozen=True, slots=True)
class Pull:
    """What a hand-off cost."""

    nbytes: int
    cached_tokens: int
    """Of the prompt, whose pages were here already and were not read."""
    runs: int
    read_s: float
    """Time the reads took, added up."""
    total_s: float
    """First announcement to last verification."""
    granted_s: float
    """Reserve to Grant."""
    paused_s: float = 0.0
    """Of a row that moves: how long it ran nowhere, but for the way of its last announcement."""


FromSource = Reserve | OfferMigration | Ready | Refuse | Release
SinkEvent = AskSource | Decided | Pulled | PullFailed | Drop | SourceLost | Fenced | FromSource
SinkCommand = SendToSource | AskForMore | AskPolicy | Read | Fence | Arrived | Gone | Fetched


class State(StrEnum):
    """Where the taking side of a ticket is."""

    ASKED = "asked"
    PULLING = "pulling"


TRANSITIONS: dict[tuple[State | None, type | None], tuple[State | None, ...]] = {
    (None, Reserve): (State.ASKED,),
    (None, OfferMigration): (State.ASKED,),
    (None, AskSource): (State.PULLING, None),
    (State.ASKED, Decided): (State.PULLING, None),
    (State.PULLING, Ready): (State.PULLING, None),
    (State.PULLING, Pulled): (State.PULLING, None),
    (State.PULLING, PullFailed): (None,),
    (State.PULLING, Refuse): (None,),
    **{(state, event): (None,) for state in State for event in (Release, Drop, SourceLost, None)},
}
"""State (None: no ticket) and event (None: the deadline) -> states that may follow, None for the end. A message of the
source that has no entry is ignored and counted."""

WAITS: dict[State, tuple[str, str]] = {
    State.ASKED: ("nothing", "memory at the sink"),
    State.PULLING: ("memory at the sink", "the rest of the source's arena"),
}
"""What a ticket holds here meanwhile, and what it waits for until its KV is announced."""


@dataclass(slots=True)
class _Piece:
    """One announcement on its way; read once more if a digest differs."""

    key: str
    ready: Ready
    pages: tuple[int, ...]
    first_page: int
    """Of ours."""
    tokens: int
    again: bool = False


@dataclass(slots=True)
class _Taking:
    ticket: Ticket
    asked: Reserve | OfferMigration | Fetch
    """Whose KV it is: a prompt's, a running row's, or what this worker wants for its prefix cache."""
    prefix: tuple[int, ...]
    """The names of the full pages at its head, as far as they have names."""
    page_tokens: int
    """At the source."""
    asked_at: float
    deadline: float
    state: State = State.ASKED
    granted_at: float = 0.0
    ready_at: float | None = None
    cached_pages: int = 0
    """Leading pages that were here already."""
    last_ready_at: float = 0.0
    announced_pages: int = 0
    """These and all announced since."""
    verified_pages: int = 0
    complete: bool = False
    """All was announced."""
    firsts: tuple[First, ...] = ()
    carried: Carried | None = None
    reads: set[int] = field(default_factory=set)
    read_s: float = 0.0
    runs: int = 0


class Sink:
    """All hand-offs this worker takes.

    Each Reserve and OfferMigration ends in exactly one Refuse, `Arrived` or `Gone`, each `AskSource` in one `Fetched`.
    """

    def __init__(self, shape: KvShape, ledger: Pages) -> None:
        self._shape = shape
        self._page_tokens = shape.page_tokens
        self._page_nbytes = shape.page_nbytes
        self._ledger = ledger
        self._taking: dict[str, _Taking] = {}
        self._deadlines = Ranked()
        self._pieces: dict[int, _Piece] = {}
        self._doubt: dict[int, str] = {}
        self._doubtful_source: dict[int, Identity] = {}
        self._fencing: set[int] = set()
        self._next_read = 1
        self.ignored = 0
        """Messages about tickets we do not hold."""
        self.mismatches = 0
        """Pages that did not have the announced digest."""

    def __len__(self) -> int:
        return len(self._taking)

    def on(self, event: SinkEvent | None, now: float) -> list[SinkCommand]:
        match event:
            case Ready():
                ticket = event.ticket
                taking = self._taking.get(ticket.key)
                if taking is None or taking.ticket != ticket or (taking.state, Ready) not in TRANSITIONS:
                    return self._ignore()
                return self._ready(taking, event, now)
            case Pulled():
                return self._pulled(event, now)
            case Reserve() | OfferMigration():
                return self._asked(event, now)
            case AskSource():
                return self._fetch(event, now)
            case Decided():
                return self._decided(event, now)
            case None:
                late = [self._taking[key] for key in self._deadlines.until(now)]
                commands = [command for taking in late for command in self._forget(taking, "deadline", tell=True)]
                short = self._short_since()
                return commands + (self._fence(self._doubt) if short is not None and short + DOUBT_S <= now else [])
            case Release(ticket, reason) | Refuse(ticket, reason):
                taking = self._taking.get(ticket.key)
                if taking is None or taking.ticket != ticket or (taking.state, type(event)) not in TRANSITIONS:
                    return self._ignore()
                return self._forget(taking, reason, tell=False)
            case PullFailed():
                return self._pull_failed(event)
            case Drop(key, reason):
                taking = self._taking.get(key)
                return self._forget(taking, reason, tell=True) if taking else self._ignore()
            case SourceLost(identity):
                lost = [taking for taking in self._taking.values() if taking.ticket.source == identity]
                reason = f"{identity.name} was lost"
                commands = [command for taking in lost for command in self._forget(taking, reason, tell=False)]
                return commands + self._fence(who for who in self._doubt if self._doubtful_source[who] == identity)
            case Fenced(read_ids):
                for read_id in read_ids:
                    self._settle(read_id)
                return []

    def pulls(self, source: Identity) -> bool:
        """True while a ticket from `source` runs. Looks at all of them."""
        return any(taking.ticket.source == source for taking in self._taking.values())

    def deadline(self) -> float | None:
        due = self._deadlines.lowest() if self._taking else None
        if self._doubt and (short := self._short_since()) is not None:
            due = short + DOUBT_S if due is None else min(due, short + DOUBT_S)
        return due

    def standing(self) -> list[Standing]:
        """Of every request whose KV comes here; what is fetched is nobody's."""
        standing = []
        for taking in self._taking.values():
            match taking.asked:
                case Reserve(ticket, request):
                    standing.append(self._stands(taking, ticket.key, request))
                case OfferMigration(_, request, placed):
                    standing.append(self._stands(taking, placed.key, request))
                case Fetch():
                    pass
        return standing

    def check(self) -> None:
        assert len(self._deadlines) == len(self._taking)
        for key, taking in self._taking.items():
            assert key == taking.ticket.key
            assert self._deadlines.rank(key) == taking.deadline
            assert taking.cached_pages <= taking.verified_pages <= taking.announced_pages
            assert taking.state is State.PULLING or not taking.announced_pages, "bound pages before the grant"
            assert len(self._ledger.pages(key)) == taking.announced_pages
            assert taking.cached_pages * self._page_tokens % taking.page_tokens == 0
            assert taking.complete or taking.announced_pages * self._page_tokens % taking.page_tokens == 0
            assert taking.reads == {read_id for read_id, piece in self._pieces.items() if piece.key == key}
        assert self._doubt.keys().isdisjoint(self._pieces), "a read is both awaited and abandoned"
        assert self._fencing <= self._doubt.keys() == self._doubtful_source.keys()
        doubtful = sum(self._ledger.own(holder) for holder in set(self._doubt.values()))
        assert doubtful == self._ledger.counts()[Owner.IN_DOUBT]

    def _asked(self, asked: Reserve | OfferMigration, now: float) -> list[SinkCommand]:
        ticket, request = asked.ticket, asked.request
        if ticket.key in self._taking:
            return self._ignore()
        prefix = self._shape.names(request.prefix, request.prefix_page_tokens)
        prefix = prefix[: len(request.prompt) // self._page_tokens]
        deadline = now + request.timeout_s
        theirs = asked.page_tokens or self._page_tokens
        self._taking[ticket.key] = _Taking(ticket, asked, prefix, theirs, now, deadline)
        self._deadlines.put(ticket.key, deadline)
        return [AskPolicy(ticket, request, asked if isinstance(asked, OfferMigration) else None)]

    def _fetch(self, event: AskSource, now: float) -> list[SinkCommand]:
        """Hold what is here, set memory aside for the rest, and ask for it; or leave it, if there is none."""
        ticket, prefix, deadline = event.ticket, event.prefix, event.deadline
        key, ledger = ticket.key, self._ledger
        if key in self._taking:
            raise LocalError(f"{key} is being fetched already")
        cached = ledger.share(key, prefix, Owner.PULLING)
        left = len(prefix) - cached
        if not left or left > ledger.available:
            ledger.release(key)
            return [Fetched(ticket, cached, f"no memory for {left} pages" if left else "")]
        ledger.promise(key, left, Owner.PULLING)
        fetch = Fetch(ticket, prefix, cached, deadline - now, self._page_tokens)
        taking = _Taking(ticket, fetch, prefix, self._page_tokens, now, deadline, State.PULLING, granted_at=now)
        taking.cached_pages = taking.announced_pages = taking.verified_pages = cached
        self._taking[key] = taking
        self._deadlines.put(key, deadline)
        return [SendToSource(fetch)]

    def _decided(self, event: Decided, now: float) -> list[SinkCommand]:
        taking = self._taking.get(event.key)
        if taking is None:
            self._ledger.release(event.key)
            return self._ignore()
        if taking.state is not State.ASKED:
            raise LocalError(f"{event.key} was decided twice")
        if not event.granted:
            self._drop(event.key)
            return [SendToSource(Refuse(taking.ticket, event.reason))]
        taking.state, taking.granted_at = State.PULLING, now
        cached, ours, theirs, prefix = 0, self._page_tokens, taking.page_tokens, taking.prefix
        if prefix and isinstance(taking.asked, Reserve):
            if theirs != ours:
                # What was promised holds all of the prompt, so that all of these are had.
                step = math.lcm(ours, theirs) // ours
                prefix = prefix[: self._ledger.cached(prefix) // step * step]
            cached = self._ledger.share(event.key, prefix, Owner.PULLING, promised=True)
            taking.cached_pages = taking.announced_pages = taking.verified_pages = cached
        return [SendToSource(Grant(taking.ticket, cached * ours, 0 if theirs == ours else ours))]

    def _ready(self, taking: _Taking, ready: Ready, now: float) -> list[SinkCommand]:
        """Bind pages and start one read; an announcement that does not fit the request is the source's fault."""
        ours, theirs = self._page_tokens, taking.page_tokens
        count = sum([run.count for run in ready.runs])
        after = ready.first_page + count
        complete = bool(ready.firsts)
        tokens = self._whole(taking, ready)
        whole = -(-tokens // theirs)
        upto = min(after * theirs, tokens)
        match taking.asked:
            case Reserve(_, request):
                fits = complete == (after == whole) and ready.carried is None and _known(ready.firsts, request)
            case OfferMigration(_, request):
                fits = not complete or (after == whole and _known(ready.firsts, request))
                fits = fits and complete == (ready.carried is not None)
            case Fetch():
                fits, complete = not complete and ready.carried is None, True
        if (
            ready.first_page * theirs != taking.announced_pages * ours
            or len(ready.digests) != count
            or after > whole
            or taking.complete
            or not fits
            or (theirs != ours and not complete and upto % ours)
        ):
            reason = f"announcement of pages {ready.first_page}..{after} of {whole} does not follow"
            return self._forget(taking, reason, tell=True, recompute=True)
        if taking.ready_at is None:
            taking.ready_at = now
        taking.last_ready_at = now
        first, taking.announced_pages, taking.complete = taking.announced_pages, -(-upto // ours), complete
        taking.firsts, taking.carried = ready.firsts, ready.carried
        if not count:
            return self._finish(taking, now)
        pages = self._ledger.bind(ready.ticket.key, taking.announced_pages - first, Owner.PULLING)
        taking.runs += max(len(ready.runs), len(page_runs(pages)))
        return self._read(taking, _Piece(ready.ticket.key, ready, pages, first, upto - first * ours))

    def _whole(self, taking: _Taking, ready: Ready) -> int:
        """Tokens with KV at the end; of a row that moves the most that may come until it says."""
        match taking.asked:
            case Reserve(_, request):
                return len(request.prompt)
            case OfferMigration(_, request, _, _, most):
                carried = ready.carried
                return most if carried is None else min(most, len(request.prompt) + len(carried.tokens) - 1)
            case Fetch():
                return len(taking.prefix) * self._page_tokens

    def _read(self, taking: _Taking, piece: _Piece) -> list[SinkCommand]:
        read_id, self._next_read = self._next_read, self._next_read + 1
        self._pieces[read_id] = piece
        taking.reads.add(read_id)
        source, runs = taking.ticket.source, piece.ready.runs
        theirs = 0 if taking.page_tokens == self._page_tokens else taking.page_tokens
        return [Read(read_id, source, runs, piece.pages, piece.first_page, piece.tokens, theirs)]

    def _pull_failed(self, event: PullFailed) -> list[SinkCommand]:
        piece = self._pieces.get(event.read_id)
        if piece is None:
            if event.in_doubt:
                return self._fence_if_crowded()
            self._settle(event.read_id)
            return []
        taking = self._taking[piece.key]
        if not event.in_doubt:
            del self._pieces[event.read_id]
            taking.reads.discard(event.read_id)
        return self._forget(taking, f"read failed: {event.reason}", tell=True, recompute=True)

    def _pulled(self, event: Pulled, now: float) -> list[SinkCommand]:
        piece = self._pieces.pop(event.read_id, None)
        if piece is None:
            self._settle(event.read_id)
            return []
        taking = self._taking[piece.key]
        taking.reads.discard(event.read_id)
        taking.read_s += event.seconds
        found, told = event.digests, piece.ready.digests
        if (theirs := taking.page_tokens) != (ours := self._page_tokens):
            both = math.lcm(ours, theirs)
            found, told = _sums(found, both // ours), _sums(told, both // theirs)
        if found == told:
            taking.verified_pages += len(piece.pages)
            return self._finish(taking, now)
        wrong = sum(a != b for a, b in zip(found, told, strict=True))
        self.mismatches += wrong
        if piece.again:
            return self._forget(taking, f"{wrong} pages differ from their digests", tell=True, recompute=True)
        piece.again = True
        return self._read(taking, piece)

    def _finish(self, taking: _Taking, now: float) -> list[SinkCommand]:
        if taking.verified_pages < taking.announced_pages:
            return []
        ticket, asked = taking.ticket, taking.asked
        if not taking.complete:
            return [AskForMore(CaughtUp(ticket))] if isinstance(asked, OfferMigration) else []
        key = ticket.key
        self._drop(key)
        assert taking.ready_at is not None
        carried = taking.carried
        pull = Pull(
            (taking.verified_pages - taking.cached_pages) * self._page_nbytes,
            taking.cached_pages * self._page_tokens,
            taking.runs,
            taking.read_s,
            now - taking.ready_at,
            taking.granted_at - taking.asked_at,
            0.0 if carried is None else carried.stopped_s + now - taking.last_ready_at,
        )
        if isinstance(asked, Fetch):
            self._ledger.name(key, taking.prefix[: taking.verified_pages])
            self._ledger.release(key)
            return [SendToSource(Taken(ticket)), Fetched(ticket, taking.verified_pages, "", pull)]
        self._ledger.move(key, Owner.DECODING)
        if taking.prefix:
            self._ledger.name(key, taking.prefix)
        return [SendToSource(Taken(ticket)), Arrived(ticket, asked.request, taking.firsts, pull, carried)]

    def _forget(self, taking: _Taking, reason: str, *, tell: bool, recompute: bool = False) -> list[SinkCommand]:
        """End a ticket. Pages of unfinished reads stay in doubt under a name of their own, the rest are freed.

        Pages of one ticket are freed or kept in doubt together: a read names only some of them, but the ledger moves
        a holder's pages in one call, and a ticket with a read in flight is rarely large when it is abandoned.
        """
        key = taking.ticket.key
        self._drop(key)
        commands: list[SinkCommand] = [SendToSource(Release(taking.ticket, reason))] if tell else []
        fetched = isinstance(taking.asked, Fetch)
        gone = (
            Fetched(taking.ticket, taking.cached_pages, reason) if fetched else Gone(taking.ticket, reason, recompute)
        )
        commands.append(gone)
        self._ledger.unpromise(key)
        if not taking.reads:
            self._ledger.release(key)
            return commands
        holder = f"doubt/{min(taking.reads)}"
        self._ledger.move(key, Owner.IN_DOUBT, to=holder)
        for read_id in taking.reads:
            del self._pieces[read_id]
            self._doubt[read_id] = holder
            self._doubtful_source[read_id] = taking.ticket.source
        return commands + self._fence_if_crowded()

    def _drop(self, key: str) -> None:
        del self._taking[key]
        self._deadlines.drop(key)

    def _settle(self, read_id: int) -> None:
        """A read of a forgotten ticket is over; the last one of a holder frees its pages."""
        holder = self._doubt.pop(read_id, None)
        self._doubtful_source.pop(read_id, None)
        self._fencing.discard(read_id)
        if holder is not None and holder not in self._doubt.values():
            self._ledger.release(holder)

    def _short_since(self) -> float | None:
        """When the first that still waits for memory asked for it, if pages are in doubt that nobody fences yet."""
        if not self._doubt or self._doubt.keys() == self._fencing:
            return None
        return min((taking.asked_at for taking in self._taking.values() if taking.state is State.ASKED), default=None)

    def _fence_if_crowded(self) -> list[SinkCommand]:
        if self._ledger.counts()[Owner.IN_DOUBT] <= DOUBT_SHARE * self._ledger.total:
            return []
        return self._fence(self._doubt)

    def _fence(self, read_ids: Iterable[int]) -> list[SinkCommand]:
        """Destroying the agent of a lost peer disturbs nobody else, so it is done at once."""
        fresh = tuple(sorted(set(read_ids) - self._fencing))
        self._fencing.update(fresh)
        return [Fence(fresh)] if fresh else []

    def _stands(self, taking: _Taking, key: str, request: Request) -> Standing:
        source = taking.ticket.source.name
        if taking.state is State.ASKED:
            waits_for = "memory here"
        elif taking.reads:
            pages = taking.announced_pages - taking.verified_pages
            waits_for = f"{len(taking.reads)} reads of {pages} pages from {source}"
        else:
            waits_for = f"{source} to announce more than {taking.announced_pages} pages"
        return Standing(key, request.id, taking.state, taking.asked_at, taking.deadline, waits_for)

    def _ignore(self) -> list[SinkCommand]:
        self.ignored += 1
        return []


def _known(firsts: tuple[First, ...], request: Request) -> bool:
    """Whether a request has these continuations."""
    return {first.branch for first in firsts} <= set(range(request.sampling.n))


def _sums(digests: Sequence[int], count: int) -> tuple[int, ...]:
    """Of each `count` digests in a row that of their tokens together."""
    return tuple([sum(digests[at : at + count]) % 2**64 for at in range(0, len(digests), count)])
