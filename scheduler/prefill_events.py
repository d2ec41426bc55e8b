"""What a prefill worker's policy hears, and what it asks for (`scheduler/prefill_policy.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from core.messages import Accept, Cancel, Failed, Finished, First, Handed, Offer, Prompt, Reject, SlotFree
from core.quick import quick_init
from core.request import Request, Ticket
from core.worker import Identity, Lane
from scheduler.cost import Repriced


# Events, beside the messages Offer, Prompt and Cancel, and Lane: of a worker whose pages can be read, or not any more.
@quick_init
@dataclass(frozen=True, slots=True)
class ChunkDone:
    """A `RunChunk` is over; `begun` are all continuations of the sequences whose prompt is complete."""

    run_id: int
    begun: tuple[Began, ...]


@quick_init
@dataclass(frozen=True, slots=True)
class ChunkFailed:
    """A `RunChunk` ended in an exception of the engine; nothing is known of which sequence caused it."""

    run_id: int
    reason: str


@quick_init
@dataclass(frozen=True, slots=True)
class Suspended:
    """A step stopped between two operators, as a `Suspend` asked: it keeps what it has, and `Resume` lets it go on."""

    run_id: int


@quick_init
@dataclass(frozen=True, slots=True)
class Began:
    """A continuation of a sequence has its first token; `finish` if it is also its last."""

    key: str
    first: First
    finish: str | None = None


@quick_init
@dataclass(frozen=True, slots=True)
class Granted:
    """The sink promised memory."""

    key: str


@quick_init
@dataclass(frozen=True, slots=True)
class HandOffOver:
    """The source forgot the ticket: the sink has the KV (`taken`), or will not have it."""

    key: str
    taken: bool
    reason: str = ""
    taken_s: float = 0.0
    """From the last announcement to the sink's word that it has everything."""


@quick_init
@dataclass(frozen=True, slots=True)
class FetchOver:
    """A `FetchPages` has ended; what came is kept under its names, what did not is computed."""

    key: str
    """Of its ticket."""
    nbytes: int
    """So many came, of the pages that were not here."""
    detail: dict[str, str] = field(default_factory=dict)
    """What it took, or why nothing came, for the waterfall."""


@quick_init
@dataclass(frozen=True, slots=True)
class GatewayGone:
    """A gateway died, and its requests with it."""

    identity: Identity


@quick_init
@dataclass(frozen=True, slots=True)
class PeerQuiet:
    """Nothing comes from a decode worker whose stream stands; or, not `quiet`, something does again, or it is lost."""

    identity: Identity
    quiet: bool = True


# Commands.
@quick_init
@dataclass(frozen=True, slots=True)
class Answer:
    """Send a message to the ticket's gateway."""

    message: Accept | Reject | Failed | Finished | Handed


@quick_init
@dataclass(frozen=True, slots=True)
class Invite:
    """Tell a gateway whose offers were refused that one may be accepted now."""

    gateway: Identity
    message: SlotFree


@quick_init
@dataclass(frozen=True, slots=True)
class Begin:
    """Make a sequence known to the engine. Pages before its first span hold its prefix already."""

    ticket: Ticket
    request: Request
    pages: tuple[int, ...]


@quick_init
@dataclass(frozen=True, slots=True)
class Span:
    """Compute prompt positions [start, stop) of a sequence."""

    key: str
    start: int
    stop: int


@quick_init
@dataclass(frozen=True, slots=True)
class RunChunk:
    """One engine step; ends in one `ChunkDone` or `ChunkFailed`."""

    run_id: int
    spans: tuple[Span, ...]


@quick_init
@dataclass(frozen=True, slots=True)
class Suspend:
    """Stop a step between two operators; ends in `Suspended`, or in the step's own end if that came first."""

    run_id: int


@quick_init
@dataclass(frozen=True, slots=True)
class Resume:
    """Let a suspended step go on; ends in that step's `ChunkDone` or `ChunkFailed`."""

    run_id: int


@quick_init
@dataclass(frozen=True, slots=True)
class AskForSink:
    """Ask the ticket's sink for memory; ends in `HandOffOver`, perhaps after `Granted`."""

    ticket: Ticket
    request: Request
    deadline: float


@quick_init
@dataclass(frozen=True, slots=True)
class SealPages:
    """The first `tokens` of the prompt are in `pages`: let the sink pull what is whole."""

    key: str
    pages: tuple[int, ...]
    tokens: int
    firsts: tuple[First, ...] = ()


@quick_init
@dataclass(frozen=True, slots=True)
class WithdrawHandOff:
    """End the hand-off from this side; ends in `HandOffOver`."""

    key: str
    reason: str


@quick_init
@dataclass(frozen=True, slots=True)
class EndSequence:
    """Forget a sequence at the engine."""

    key: str


@quick_init
@dataclass(frozen=True, slots=True)
class FetchPages:
    """Pull what is not here of these pages from the ticket's source, by the deadline; ends in `FetchOver`."""

    ticket: Ticket
    prefix: tuple[int, ...]
    """Names of a prompt's first pages."""
    deadline: float


@quick_init
@dataclass(frozen=True, slots=True)
class DropFetch:
    """Nobody wants these pages any more; `FetchOver` comes all the same."""

    key: str
    """Of its ticket."""
    reason: str


PrefillEvent = (
    Offer
    | Prompt
    | Cancel
    | ChunkDone
    | ChunkFailed
    | Suspended
    | Granted
    | HandOffOver
    | FetchOver
    | Lane
    | GatewayGone
    | PeerQuiet
    | Repriced
)
PrefillCommand = (
    Answer
    | Invite
    | Begin
    | RunChunk
    | Suspend
    | Resume
    | AskForSink
    | SealPages
    | WithdrawHandOff
    | EndSequence
    | FetchPages
    | DropFetch
)


class State(StrEnum):
    """Where a request is on a prefill worker."""

    OFFERED = "offered"
    FETCHING = "fetching"
    """Pages of its prompt come from another worker; then it is queued."""
    QUEUED = "queued"
    RUNNING = "running"
    HANDING_OFF = "handing_off"


class Grant(StrEnum):
    """How far the sink is."""

    NOT_ASKED = "not_asked"
    ASKED = "asked"
    GIVEN = "given"
