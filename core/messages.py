"""What our processes say to each other about a request. One frozen dataclass a message; the wire form is in protos/.

Gateway to worker: Offer, Prompt, Cancel. Worker to gateway: Accept, Reject, Tokens, Handed, Finished, Failed, and
SlotFree, which alone is about no request.
Prefill to decode worker: Reserve, Ready. Decode to prefill worker: Grant, Refuse, Taken. Either way: Release.
Between decode workers, when a running row moves: OfferMigration and CaughtUp beside these; then Moved to the gateway;
Freeness to all.
From whoever wants pages to whoever has them: Fetch, answered by Ready or Refuse.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.kv import PageRun
from core.quick import quick_init
from core.request import Hints, Request, Stage, Ticket
from core.sampling import Logprobs
from core.worker import Identity


@quick_init
@dataclass(frozen=True, slots=True)
class Offer:
    """Would you prefill this? No prompt yet."""

    ticket: Ticket
    prompt_tokens: int
    max_tokens: int
    wait_s: float
    """The first token is wanted within this time; the worker refuses what it cannot start soon enough."""
    hints: Hints = field(default=Hints())
    prefix: tuple[int, ...] = ()
    """Chained 64-bit hashes of the prompt's full pages, first page first; empty if the gateway has none."""
    prefix_page_tokens: int = 0
    """As in `Request`."""
    batch: bool = False
    """Only if there is time that nobody else wants."""
    second: Identity | None = None
    """A decode worker that would take it as well as the ticket's sink."""


@quick_init
@dataclass(frozen=True, slots=True)
class Accept:
    """Yes; lapses after a second without the prompt."""

    ticket: Ticket
    cached_tokens: int = 0
    wait_s: float = 0.0


@quick_init
@dataclass(frozen=True, slots=True)
class Reject:
    """No: ask another worker."""

    ticket: Ticket
    reason: str
    wait_s: float = 0.0
    """Until it would have its first token here."""
    again_s: float = 0.0
    """Until it might be yes, if nobody else came; 0: who can tell, it lacks something else than time."""


@quick_init
@dataclass(frozen=True, slots=True)
class SlotFree:
    """After a refusal: an offer of up to this many new tokens may be accepted now."""

    worker: Identity
    tokens: int


@quick_init
@dataclass(frozen=True, slots=True)
class Holding:
    """A worker that may have the first pages of a prompt, as far as its gateway knows."""

    worker: Identity
    tokens: int
    """Of the prompt, at most."""


@quick_init
@dataclass(frozen=True, slots=True)
class Prompt:
    """The accepted request itself."""

    ticket: Ticket
    request: Request
    second: Identity | None = None
    """Another sink, should the ticket's refuse or be lost."""
    holdings: tuple[Holding, ...] = ()
    """Who may have more of it than the worker said it has, the most first."""


@quick_init
@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop working on it and free what it holds."""

    ticket: Ticket
    reason: str
    report: bool = False
    """Answer with the stages so far: `Handed` from a prefill worker, `Finished` from a decode worker."""
    branch: int | None = None
    """Only this continuation, at a decode worker; the others go on."""
    prefix: tuple[int, ...] = ()
    """It is no cancel but an end, which only the gateway could see: names of the full pages of prompt and answer, as in
    `Request`, to keep as a decode worker keeps those of an end of its own."""


@quick_init
@dataclass(frozen=True, slots=True)
class Tokens:
    """Generated tokens; `index` counts from the continuation's first generated token."""

    ticket: Ticket
    index: int
    tokens: tuple[int, ...]
    logits_hashes: tuple[int, ...] = ()
    branch: int = 0
    logprobs: tuple[Logprobs, ...] = ()
    """One for each of `tokens`, if they were asked for."""
    prompt_logprobs: tuple[Logprobs | None, ...] = ()
    """One for each token of the prompt, the first None, if they were asked for: with the prefill worker's token."""


@quick_init
@dataclass(frozen=True, slots=True)
class Handed:
    """The prefill worker's part is over: the sink has the KV. Carries the waterfall of this part."""

    ticket: Ticket
    stages: tuple[Stage, ...]
    cancelled: bool = False
    """The sink need not have the KV: the gateway wanted no more, and the stages."""
    cached_tokens: int = 0
    """Of the prompt, that were not computed, if pages were fetched for it; 0: as `Accept` said."""


@quick_init
@dataclass(frozen=True, slots=True)
class Finished:
    """All tokens of a continuation were sent."""

    ticket: Ticket
    reason: str
    """"stop" or "length"; "cancelled" if the gateway wanted no more, and the stages."""
    completion_tokens: int
    stop_token_id: int | None = None
    stages: tuple[Stage, ...] = ()
    branch: int = 0
    decoded: bool = False
    """By the decode worker; else the prefill worker found that the first token is the last."""
    cached_tokens: int = 0
    """As in `Handed`, by the prefill worker."""


@quick_init
@dataclass(frozen=True, slots=True)
class Failed:
    """This attempt is over without a result."""

    ticket: Ticket
    code: str
    """Name of a gRPC status."""
    message: str
    stages: tuple[Stage, ...] = ()


@quick_init
@dataclass(frozen=True, slots=True)
class Reserve:
    """Will you decode this? Asks for memory, not for pages."""

    ticket: Ticket
    request: Request
    page_tokens: int = 0
    """Of a page at the source; 0: as many as at the sink."""


@quick_init
@dataclass(frozen=True, slots=True)
class Grant:
    """Memory is promised: announce pages as they are sealed, always so many that they make whole pages here, too."""

    ticket: Ticket
    cached_tokens: int = 0
    """Leading tokens of the prompt whose pages are here already, whole ones on both sides: announce those behind."""
    page_tokens: int = 0
    """Of a page at the sink; 0: as many as at the source."""


@quick_init
@dataclass(frozen=True, slots=True)
class Refuse:
    """Not here."""

    ticket: Ticket
    reason: str


@quick_init
@dataclass(frozen=True, slots=True)
class First:
    """A continuation's first token, as the prefill worker chose it."""

    token: int
    logits_hash: int = 0
    """Of the logits that gave it, if the engine hashes them."""
    branch: int = 0
    """Which of the request's `n` continuations."""
    logprobs: Logprobs | None = None
    """If they were asked for."""


@quick_init
@dataclass(frozen=True, slots=True)
class Carried:
    """What a row that moves takes along beside its KV."""

    tokens: tuple[int, ...]
    """All that it generated in this attempt; the newest has no KV yet."""
    stages: tuple[Stage, ...] = ()
    logits_hashes: tuple[int, ...] = ()
    """One for each of `tokens`, if the engine hashes them."""
    logprobs: tuple[Logprobs, ...] = ()
    """One for each of `tokens`, if they were asked for."""
    stopped_s: float = 0.0
    """How long ago it stopped when this was said."""


@quick_init
@dataclass(frozen=True, slots=True)
class Ready:
    """Pages `first_page`... of the prompt are sealed and may be read from `runs` of the source's arena.

    Pages are the source's own. All announcements but the last end where a page does on both sides.
    """

    ticket: Ticket
    first_page: int
    runs: tuple[PageRun, ...]
    digests: tuple[int, ...]
    """One 64-bit digest a page."""
    firsts: tuple[First, ...] = ()
    """Set in the last announcement: the prompt is complete, and these continuations of it go on."""
    carried: Carried | None = None
    """Set in the last announcement of a row that moves: its pages hold the prompt and these tokens but the newest."""


@quick_init
@dataclass(frozen=True, slots=True)
class Taken:
    """Every page arrived and was verified: the source may free them."""

    ticket: Ticket


@quick_init
@dataclass(frozen=True, slots=True)
class Release:
    """I am no longer interested in this ticket: the other side frees what it holds for it."""

    ticket: Ticket
    reason: str


@quick_init
@dataclass(frozen=True, slots=True)
class Fetch:
    """Which of these pages have you got? Announce them now, in one Ready, or refuse. The ticket is the sink's.

    It grants itself: the sink has memory for all of them.
    """

    ticket: Ticket
    prefix: tuple[int, ...]
    """Chained hashes of the pages wanted, from the first page of their prompt on."""
    cached_pages: int
    """So many leading ones are at the sink already: announce those behind them."""
    timeout_s: float
    """What is left of the time in which they are of use."""
    page_tokens: int = 0
    """Of each of these pages; 0: as many as at the source, which has no others."""


@dataclass(frozen=True, slots=True)
class OfferMigration:
    """Will you go on with this row? Asks for memory, like Reserve, but now or not at all. The ticket is the source's.

    `request.timeout_s` is what is left of it. Pages are announced by Ready while the row decodes; after CaughtUp come
    more, or, when the row has stopped, the last ones.
    """

    ticket: Ticket
    request: Request
    placed: Ticket
    """The gateway's, of the attempt that the row belongs to."""
    generated: int
    """Tokens of this attempt, as of now."""
    most: int
    """Tokens whose KV its pages will hold at most when it is handed over, the prompt's included."""
    moves: int = 1
    """How often the row has moved in this attempt when it has moved."""
    page_tokens: int = 0
    """As in `Reserve`."""


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """All pages announced so far are here and verified: what is next?"""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Moved:
    """A continuation of yours goes on elsewhere; the ticket names that worker as its sink from now on.

    The new worker says it before any token, the one before when it knows. The first tokens that follow repeat those
    that its worker before may not have brought yet, because the streams of two workers keep no order.
    """

    ticket: Ticket
    moves: int
    """Of this attempt so far; an older word than one heard before says nothing."""


@dataclass(frozen=True, slots=True)
class Freeness:
    """How many steps a decode worker can take before its memory is used up; see `DecodePolicy.freeness`."""

    worker: Identity
    steps: float


@quick_init
@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a worker takes new requests from now on. The coordinator hears of it, too, and may be away just then."""

    worker: Identity
    ready: bool


ToWorker = Offer | Prompt | Cancel
Answer = Accept | Reject | Tokens | Handed | Finished | Failed
ToGateway = Answer | SlotFree | Moved
HandOff = Reserve | Grant | Refuse | Ready | Taken | Release | OfferMigration | CaughtUp | Fetch
"""Of one ticket, between its source and its sink."""
ToPeer = HandOff | Freeness
Message = ToWorker | ToGateway | ToPeer | Readiness
