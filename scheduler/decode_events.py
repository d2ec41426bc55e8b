"""What a decode policy hears and says: events in the past tense, commands in the imperative.

Decode is a standing order: `Run` names rows and a number of steps and ends in one `Ran`; `Cut` asks for an earlier
end. Tokens go to the gateway at every step without passing the policy (docs/architecture.md, "Decode").
"""

from __future__ import annotations

from dataclasses import dataclass

from core.messages import Cancel, Carried, Failed, Finished, First, Freeness, Moved, OfferMigration
from core.quick import quick_init
from core.request import Request, Stage, Ticket
from core.worker import Identity
from scheduler.cost import Repriced


# Events.
@quick_init
@dataclass(frozen=True, slots=True)
class Asked:
    """A prefill worker asks for memory for a request, or a decode worker for a row that is to move here."""

    ticket: Ticket
    request: Request
    offer: OfferMigration | None = None


@quick_init
@dataclass(frozen=True, slots=True)
class KvArrived:
    """All of the prompt's KV is in the pages held under the ticket's key."""

    ticket: Ticket
    request: Request
    firsts: tuple[First, ...]
    """Of the continuations that go on here."""
    stages: tuple[Stage, ...] = ()
    carried: Carried | None = None
    """Of a row that has moved here; its KV is that of its tokens but the newest, too."""


@quick_init
@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The hand-off ended without KV; what was promised is free again."""

    ticket: Ticket
    reason: str
    recompute: bool = False


@quick_init
@dataclass(frozen=True, slots=True)
class GatewayGone:
    """A gateway died, and its requests with it: nothing is promised to one of them until it is back."""

    identity: Identity


@quick_init
@dataclass(frozen=True, slots=True)
class GatewayCame:
    """A gateway's stream stands: one that was lost has come back as the same."""

    identity: Identity


@quick_init
@dataclass(frozen=True, slots=True)
class Drain:
    """This worker is to take nothing more: what was promised comes, and what is here ends."""


@quick_init
@dataclass(frozen=True, slots=True)
class Ended:
    """A sequence ended: `generated` tokens in all, the first one included; a stop token is not counted."""

    key: str
    reason: str
    generated: int
    stop_token_id: int | None = None
    prefix: tuple[int, ...] = ()
    """Chained hashes of its full pages, the prompt's and those behind them, where whoever runs the engine knows them:
    the worker keeps them for the next turn."""


@quick_init
@dataclass(frozen=True, slots=True)
class Ran:
    """A `Run` is over after `steps` steps."""

    run_id: int
    steps: int
    ended: tuple[Ended, ...] = ()


@quick_init
@dataclass(frozen=True, slots=True)
class RunFailed:
    """A `Run` ended in an exception of the engine; nothing is known of which row caused it."""

    run_id: int
    reason: str


@quick_init
@dataclass(frozen=True, slots=True)
class SwappedOut:
    """A sequence's KV is in host memory; its pages hold nothing any more."""

    key: str


@quick_init
@dataclass(frozen=True, slots=True)
class SwappedIn:
    """A sequence's KV is back in the pages that `SwapIn` named."""

    key: str


@dataclass(frozen=True, slots=True)
class PeerCame:
    """Another decode worker can be reached: it may take rows of ours, and say so with `Freeness`."""

    worker: Identity


@dataclass(frozen=True, slots=True)
class PeerGone:
    """It cannot be any more."""

    worker: Identity


@dataclass(frozen=True, slots=True)
class MoveAsked:
    """Who takes a row of ours has promised memory, or has all that was announced: what is next?"""

    key: str


@dataclass(frozen=True, slots=True)
class MoveEnded:
    """A row of ours has moved, or has not: then `sure` says that nobody else has it."""

    key: str
    taken: bool
    sure: bool
    reason: str = ""


# Commands.
@quick_init
@dataclass(frozen=True, slots=True)
class Answer:
    """Tell the sink whether memory was promised."""

    key: str
    granted: bool
    reason: str = ""


@quick_init
@dataclass(frozen=True, slots=True)
class Join:
    """A sequence the engine does not have: its prompt, its own sampling, its first token and its pages.

    One that comes back after `Evict` or `SwapOut` goes on where it was: whoever runs the engine kept its tokens.
    """

    key: str
    ticket: Ticket
    request: Request
    first: First
    pages: tuple[int, ...]
    copied: tuple[int, int] | None = None
    """A page to be copied into another before, because it is shared and will be written."""
    generated: int = 1
    """Tokens it has, the first one included."""
    recompute: tuple[int, int] | None = None
    """Positions [start, stop) whose KV is to be computed again before the first step; None: all of it is there."""
    carried: Carried | None = None
    """Of one that has moved here: the gateway gets all of its tokens again with its first step."""


@quick_init
@dataclass(frozen=True, slots=True)
class Grow:
    """More pages for a running sequence."""

    key: str
    pages: tuple[int, ...]
    first: int | None = None
    """Number of the first of them in its page table; what followed there before is void. None: behind all it has."""


@quick_init
@dataclass(frozen=True, slots=True)
class Run:
    """Decode `rows` for at most `steps` steps, ending early when one of them ends or after a `Cut`."""

    run_id: int
    rows: tuple[str, ...]
    joining: tuple[Join, ...]
    growing: tuple[Grow, ...]
    steps: int


@quick_init
@dataclass(frozen=True, slots=True)
class Cut:
    """End the run at the next step end."""

    run_id: int


@quick_init
@dataclass(frozen=True, slots=True)
class Leave:
    """Forget a sequence at the engine, what was kept of it and its copy in host memory included."""

    key: str


@quick_init
@dataclass(frozen=True, slots=True)
class Evict:
    """Take a sequence out of the engine, but keep its tokens: its KV is lost, and it will join again."""

    key: str


@quick_init
@dataclass(frozen=True, slots=True)
class SwapOut:
    """Take a sequence out of the engine and bring its KV from these pages to host memory; ends in `SwappedOut`."""

    key: str
    pages: tuple[int, ...]


@quick_init
@dataclass(frozen=True, slots=True)
class SwapIn:
    """Bring a sequence's KV back from host memory into these pages; ends in `SwappedIn`."""

    key: str
    pages: tuple[int, ...]


@quick_init
@dataclass(frozen=True, slots=True)
class DropHandOff:
    """The sink should end this ticket; ends in `Withdrawn`."""

    key: str
    reason: str


@quick_init
@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to the ticket's gateway."""

    message: Finished | Failed


@dataclass(frozen=True, slots=True)
class OfferRow:
    """Ask a peer to go on with a row; each `MoveAsked` is answered, and it ends in one `MoveEnded`."""

    offer: OfferMigration
    deadline: float


@dataclass(frozen=True, slots=True)
class SealRow:
    """Announce the full pages of a row that is to move: they hold `tokens` tokens."""

    key: str
    """Of the ticket."""
    pages: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class HandOver:
    """Take a sequence out of the engine, but keep its tokens, and announce the last of its pages with them.

    `Leave` follows when it was taken; else it may join again.
    """

    row: str
    key: str
    """Of the ticket."""
    pages: tuple[int, ...]
    tokens: int
    """With KV."""
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class WithdrawRow:
    """Forget the ticket of a row that is not to move any more."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class TellMoved:
    """Send a message to the ticket's gateway, before any token of the row."""

    message: Moved


@dataclass(frozen=True, slots=True)
class TellPeer:
    """Send a message to another decode worker."""

    worker: Identity
    message: Freeness


Moving = OfferRow | SealRow | HandOver | WithdrawRow | TellMoved | TellPeer
"""Commands of a policy that was told to move rows (`DecodeConfig.migration`)."""
DecodeEvent = (
    Asked
    | KvArrived
    | Withdrawn
    | Cancel
    | GatewayGone
    | GatewayCame
    | Drain
    | Ran
    | RunFailed
    | SwappedOut
    | SwappedIn
    | PeerCame
    | PeerGone
    | Freeness
    | MoveAsked
    | MoveEnded
    | Repriced
)
DecodeCommand = Answer | Run | Cut | Leave | Evict | SwapOut | SwapIn | DropHandOff | Tell | Moving
