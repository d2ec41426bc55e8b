"""What a decode policy hears and says: events in the past tense, commands in the imperative.

Decode is a standing order: `Run` names rows and a number of steps and ends in one `Ran`; `Cut` asks for an earlier
end. Tokens go to the gateway at every step without passing the policy (docs/architecture.md, "Decode").
"""

from __future__ import annotations

from dataclasses import dataclass

from core.messages import Cancel, Failed, Finished, First
from core.quick import quick_init
from core.request import Request, Stage, Ticket
from core.worker import Identity


# Events.
@quick_init
@dataclass(frozen=True, slots=True)
class Asked:
    """A prefill worker asks for memory for a request."""

    ticket: Ticket
    request: Request


@quick_init
@dataclass(frozen=True, slots=True)
class KvArrived:
    """All of the prompt's KV is in the pages held under the ticket's key."""

    ticket: Ticket
    request: Request
    firsts: tuple[First, ...]
    """Of the continuations that go on here."""
    stages: tuple[Stage, ...] = ()


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
    """A gateway died, and its requests with it."""

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


DecodeEvent = Asked | KvArrived | Withdrawn | Cancel | GatewayGone | Drain | Ran | RunFailed | SwappedOut | SwappedIn
DecodeCommand = Answer | Run | Cut | Leave | Evict | SwapOut | SwapIn | DropHandOff | Tell
