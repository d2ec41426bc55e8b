"""What the router hears beside the messages of workers, and what it commands.

Of the end of a worker it hears twice, in any order: `WorkerDown`, and `ProcessEnded` if somebody knows how it ended.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.messages import ToGateway, ToWorker
from core.quick import quick_init
from core.request import Phase, Request, Stage
from core.sampling import Logprobs
from core.worker import Identity, Member, ProcessEnded


# Events (beside the messages from workers).
@quick_init
@dataclass(frozen=True, slots=True)
class Arrived:
    """A client's request; `counter` is new in this gateway's life."""

    counter: int
    request: Request


@quick_init
@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody wants the rest of it: the client left, aborted or was too slow."""

    counter: int
    reason: str


@quick_init
@dataclass(frozen=True, slots=True)
class Satisfied:
    """A continuation has its stop string: the rest of it is not wanted, the stages of what was done are."""

    counter: int
    branch: int = 0


@quick_init
@dataclass(frozen=True, slots=True)
class WorkerUp:
    """A worker's session stands; new requests go there while the member is `ready`. Comes again when that changes."""

    member: Member


@quick_init
@dataclass(frozen=True, slots=True)
class WorkerDown:
    """This life of a worker cannot be used any more."""

    identity: Identity
    crashed: bool = False
    """Its process may have ended by a fault of its own: nobody said why it is gone."""


@quick_init
@dataclass(frozen=True, slots=True)
class WorkerQuiet:
    """Nothing comes from a worker whose session stands; or, not `quiet`, something does again."""

    identity: Identity
    quiet: bool = True


@quick_init
@dataclass(frozen=True, slots=True)
class Divided:
    """Prefill workers, by name, that compute short prompts, and those that compute long ones; of others nothing is
    said. A placement that knows of no pools does not mind."""

    short: tuple[str, ...]
    long: tuple[str, ...]
    short_tokens: int
    """New tokens up to which a prompt is short."""


# Commands.
@quick_init
@dataclass(frozen=True, slots=True)
class ToOne:
    """Send a message to a worker."""

    worker: Identity
    message: ToWorker


@quick_init
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


@quick_init
@dataclass(frozen=True, slots=True)
class Complete:
    """A continuation is done while others go on; the last one's end is the request's `End`."""

    counter: int
    branch: int
    reason: str
    stop_token_id: int | None = None


@quick_init
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
    poisonous: bool = False
    """Refused because workers crash with it."""


RouterEvent = (
    Arrived | ClientGone | Satisfied | WorkerUp | WorkerDown | WorkerQuiet | ProcessEnded | Divided | ToGateway
)
RouterCommand = ToOne | Deliver | Complete | End
