"""A request: what was asked, by when, and the phases of its life."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from core.quick import quick_init
from core.sampling import Sampling
from core.worker import Identity


class Kind(StrEnum):
    """Classes of requests, by what was promised."""

    LATENCY = "latency"
    """Something about the first token and the gaps, or nothing; it never waits for those of the batch class."""
    DEADLINE = "deadline"
    """The whole answer by a time; the first token and the gaps follow from it (`scheduler/budgets.py`)."""
    BATCH = "batch"
    """Nothing: it is computed in the time and the memory that all others leave."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request's client was promised; 0 means no promise."""

    ttft_s: float = 0.0
    """Time to first token."""
    gap_s: float = 0.0
    """Tail of the gaps between tokens; a decode policy that is given a cost model keeps its batches below it."""
    deadline_s: float = 0.0
    """The whole answer, from the request's arrival; on its way through workers, from when it was placed there."""
    batch: bool = False
    """It fills what others leave; whoever says so is promised nothing else."""

    @property
    def kind(self) -> Kind:
        """Its class."""
        if self.batch:
            return Kind.BATCH
        return Kind.DEADLINE if self.deadline_s else Kind.LATENCY


@quick_init
@dataclass(frozen=True, slots=True)
class Hints:
    """What a caller knows about its request; carried everywhere, used by policies as they learn to."""

    priority: int = 0
    session: str = ""
    tenant: str = ""
    group: str = ""
    program_step: int = 0
    tool: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """The right to one placement of one request: who minted it, which attempt, and the two workers' lives.

    Minted by whoever decides the move (the gateway for prefill to decode). Valid by incarnation only. Nothing is
    matched by request-id strings.
    """

    minter: Identity
    counter: int
    attempt: int
    source: Identity
    """The worker that holds the KV first."""
    sink: Identity
    """The worker that pulls it; equal to `source` where nothing has to move."""
    key: str = field(init=False, repr=False, compare=False)
    """Names the request and attempt inside a worker: the same for either choice of sink."""

    def __post_init__(self) -> None:
        # Asked for at every event of a request: made once.
        object.__setattr__(self, "key", f"{self.minter}/{self.counter}.{self.attempt}")

    def __eq__(self, other: object) -> bool:
        # Within one process it is mostly the very same.
        if self is other:
            return True
        return isinstance(other, Ticket) and self._all() == other._all()

    def __hash__(self) -> int:
        return hash(self._all())

    def _all(self) -> tuple[Identity, int, int, Identity, Identity]:
        return self.minter, self.counter, self.attempt, self.source, self.sink


@quick_init
@dataclass(frozen=True, slots=True)
class Request:
    """One request as the gateway admitted it."""

    id: str
    """The client's name for it, or one made up; for logs and Abort only."""
    prompt: tuple[int, ...]
    sampling: Sampling
    timeout_s: float
    """The whole request must end within this time of its arrival."""
    slo: Slo = field(default=Slo())
    hints: Hints = field(default=Hints())
    generated: int = 0
    """The last this many tokens of `prompt` are output of earlier attempts; penalties count them as such."""
    prefix: tuple[int, ...] = ()
    """Chained 64-bit hashes of the prompt's full pages, first page first; empty where nobody has computed them."""
    prefix_page_tokens: int = 0
    """Tokens of each of these pages; 0: as many as the reader's pages have (`KvShape.names`)."""
    alone: bool = False
    """No step of an engine may have it and another request: it is suspected to crash them (`scheduler/poison.py`)."""


class Phase(StrEnum):
    """Where a request is; one owner each (gateway, P, P until Taken, D)."""

    QUEUED = "queued"
    OFFERED = "offered"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    DECODING = "decoding"
    DONE = "done"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """True if nothing more will happen."""
        return not PHASE_NEXT[self]


_ENDS = (Phase.CANCELLED, Phase.FAILED)
PHASE_NEXT: dict[Phase, tuple[Phase, ...]] = {
    Phase.QUEUED: (Phase.OFFERED, Phase.DONE, Phase.REJECTED, *_ENDS),
    Phase.OFFERED: (Phase.PREFILLING, Phase.QUEUED, Phase.DONE, *_ENDS),
    Phase.PREFILLING: (Phase.HANDING_OFF, Phase.DONE, Phase.QUEUED, *_ENDS),
    Phase.HANDING_OFF: (Phase.DECODING, Phase.DONE, Phase.QUEUED, *_ENDS),
    Phase.DECODING: (Phase.DONE, Phase.QUEUED, *_ENDS),
    Phase.DONE: (),
    Phase.REJECTED: (),
    Phase.CANCELLED: (),
    Phase.FAILED: (),
}
"""The life of a request, as the gateway sees it: state -> states that may follow."""


@quick_init
@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a request's waterfall: seconds measured on one process's clock."""

    name: str
    """queued, offered, fetch, batch_wait, prefill, reserve_wait, pull, join_wait, decode, move."""
    worker: str
    seconds: float
    detail: dict[str, str] = field(default_factory=dict)
