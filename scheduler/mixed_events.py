"""What a colocated worker's policy hears and orders, and its settings.

One engine order, `Step`, carries prompt chunks and decode rows together. What is the same thing on a prefill or a
decode worker is imported from there. A shell owes this:

| command | |
|---|---|
| `Answer`, `Invite` | send the message to its ticket's minter, or to the gateway that is named |
| `Begin` | open `key`: the prompt, then the `made` tokens kept for it; before its first span the KV is in the pages |
| `Step` | first `growing`, then `joining`; then the spans and, unless `rows` is 0, a token of every decode row |
| `Cut` | end a `Step` without spans at its first step end later than now; for an ended one: nothing |
| `Suspend` | close `key` and keep its tokens: a `Begin` with `made` follows, or `EndSequence` |
| `EndSequence` | close `key` if it is open, and forget its tokens |

A sequence is a decode row from the `Step` after its `Began` without a finish (or from the one that it joins in) until
its `Suspend`, its `EndSequence` or its `Ended`. With `n` > 1 the prompt's own sequence ends with its `Began`s: the
shell keeps each unfinished continuation's first token under `continuation(key, branch)`, and the policy either lets it
join or begins it anew. Tokens go to the gateway before `Stepped` is posted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.messages import Cancel, Offer, Prompt
from core.quick import quick_init
from core.request import Request, Ticket
from scheduler.cost import Repriced
from scheduler.decode_events import Ended, Grow, Join
from scheduler.prefill_events import Answer, Began, EndSequence, GatewayGone, Invite, Span

__all__ = [
    "Answer",
    "Began",
    "Begin",
    "Cancel",
    "Cut",
    "EndSequence",
    "Ended",
    "GatewayGone",
    "Grow",
    "Invite",
    "Join",
    "MixedCommand",
    "MixedConfig",
    "MixedEvent",
    "Offer",
    "Prompt",
    "Span",
    "Step",
    "StepFailed",
    "Stepped",
    "Suspend",
    "continuation",
]


def continuation(key: str, branch: int) -> str:
    """Names one of several continuations of the sequence `key`, at the engine and in the ledger."""
    return f"{key}/{branch}"


# Events (beside the messages Offer, Prompt and Cancel, and GatewayGone).
@quick_init
@dataclass(frozen=True, slots=True)
class Stepped:
    """A `Step` is over after `steps` steps."""

    step_id: int
    steps: int = 1
    begun: tuple[Began, ...] = ()
    """All continuations of the sequences whose span reached their last known token."""
    ended: tuple[Ended, ...] = ()
    """Decode rows that ended in the last step."""


@quick_init
@dataclass(frozen=True, slots=True)
class StepFailed:
    """A `Step` ended in an exception of the engine; nothing is known of which sequence caused it."""

    step_id: int
    reason: str


# Commands (beside Answer and EndSequence).
@quick_init
@dataclass(frozen=True, slots=True)
class Begin:
    """Make a sequence known to the engine, whose first `made` tokens behind the prompt were made here before."""

    key: str
    ticket: Ticket
    request: Request
    pages: tuple[int, ...]
    made: int = 0
    branch: int = 0


@quick_init
@dataclass(frozen=True, slots=True)
class Step:
    """Compute `spans` beside `rows` decode rows; with spans once, else `steps` times unless a row ends or a cut comes.

    `rows` says how many decode rows take part: all there are, or none while prompts go first.
    """

    step_id: int
    spans: tuple[Span, ...]
    joining: tuple[Join, ...]
    """Continuations that are new to the engine; sequences whose prompt was computed here go on by themselves."""
    growing: tuple[Grow, ...]
    rows: int
    steps: int


@quick_init
@dataclass(frozen=True, slots=True)
class Cut:
    """End a step of decode rows at the next step end."""

    step_id: int


@quick_init
@dataclass(frozen=True, slots=True)
class Suspend:
    """Forget a sequence at the engine, but not its tokens: its KV will be computed again."""

    key: str


MixedEvent = Offer | Prompt | Cancel | GatewayGone | Stepped | StepFailed | Repriced
MixedCommand = Answer | Invite | Begin | Step | Cut | Suspend | EndSequence


@dataclass(frozen=True, slots=True)
class MixedConfig:
    """Settings of a colocated worker's policy.

    | setting | unit | default | |
    |---|---|---|---|
    | order | | chunked | which phase goes first, see below |
    | budget_tokens | tokens | 2048 | most in a step with a prompt, decode rows included |
    | max_rows | sequences | 256 | most that are computed or decoded at a time |
    | admission | | optimistic | the memory that a sequence must find to start, see below |
    | watermark_share | of the arena | 0 | what a start leaves free for those that run |
    | max_steps | steps | 64 | most in one order without spans |
    | ahead_pages | pages | 4 | what a growing row gets at once, while there is plenty for all rows |
    | gap_s | s | 0 | chunks are cut so that the predicted step stays below; 0: they are not. Takes a cost model |
    | least_tokens | tokens | 32 | but not below this, so that prompts go on |
    | offer_s | s | 1 | an accepted offer lapses after this time without its prompt |
    | memory_s | s | 10 | over how long the rate of ends is averaged, which predicts waits for memory and rows |

    `chunked`: every step carries all decode rows, and prompt chunks fill it up. `prefill_first`: whole prompts run
    before decode rows, which stall meanwhile; a prompt above the budget runs alone. `optimistic`: pages of the first
    chunk. `prompt`: of the whole prompt, which it gets at once. `worst_case`: of all that it may come to, promised.
    """

    order: Literal["chunked", "prefill_first"] = "chunked"
    budget_tokens: int = 2048
    max_rows: int = 256
    admission: Literal["optimistic", "prompt", "worst_case"] = "optimistic"
    watermark_share: float = 0.0
    max_steps: int = 64
    ahead_pages: int = 4
    gap_s: float = 0.0
    least_tokens: int = 32
    offer_s: float = 1.0
    memory_s: float = 10.0

    def __post_init__(self) -> None:
        if self.order not in ("chunked", "prefill_first"):
            raise ValueError(f"order: got {self.order!r}, want chunked or prefill_first")
        if self.admission not in ("optimistic", "prompt", "worst_case"):
            raise ValueError(f"admission: got {self.admission!r}, want optimistic, prompt or worst_case")
        for name in ("max_rows", "max_steps", "ahead_pages", "least_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want at least 1")
        least = self.max_rows if self.order == "chunked" else 1
        if self.budget_tokens < least:
            raise ValueError(f"budget_tokens: got {self.budget_tokens}, want {least}, a token for each row, or more")
        if self.gap_s and self.order != "chunked":
            raise ValueError("gap_s: only chunks can be cut for it, want order chunked")
        if not 0 <= self.watermark_share < 1:
            raise ValueError(f"watermark_share: got {self.watermark_share}, want in [0, 1)")
        if not (self.gap_s >= 0 and self.offer_s > 0 and self.memory_s > 0):
            raise ValueError("gap_s, offer_s and memory_s: want positive numbers, or 0 for no gap_s")


PREFILL_FIRST = MixedConfig("prefill_first", 8192, admission="prompt", watermark_share=0.01)
"""vLLM before version 1, and what DistServe was compared with."""
SARATHI = MixedConfig("chunked", 512, 128, admission="prompt", watermark_share=0.01)
"""Sarathi-Serve with the chunk size of its strict setting."""
VLLM = MixedConfig("chunked", 2048, 256)
"""vLLM's version 1: first come, first served, chunked, memory by the chunk, recompute when it runs out."""
