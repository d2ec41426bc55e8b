"""What the transfer thread says: how each call ended, and what became of a lane. Given to its owner's `post`."""

from __future__ import annotations

from dataclasses import dataclass

from core.kv import PageRun
from transfer.transport import Completion


@dataclass(frozen=True, slots=True)
class Opened:
    """The transport exists and the arena is registered: `metadata` is what peers need."""

    transport: str
    metadata: bytes


@dataclass(frozen=True, slots=True)
class OpenFailed:
    """The transport cannot be used; the thread has ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class Connected:
    """`peer` can be read; its lane is built by the first reads (see `LaneProbed`)."""

    peer: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """`peer` cannot be read, and why."""

    peer: str
    reason: str
    attempt: int = 0
    """As it was given to `connect`, here and below."""


@dataclass(frozen=True, slots=True)
class LaneAnswered:
    """The first read of a probe has landed: pages of `peer` can be read, and nobody knows yet how fast."""

    peer: str
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class LaneProbed:
    """The lane from `peer` is up and measured."""

    peer: str
    gbytes_per_s: float
    """1e9 bytes a second, over the scratch pages that were given."""
    latency_us: float
    """Median of reads of 4 KiB, from posting to the poll that saw the end."""
    transports: str
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    """The lane from `peer` could not be measured. `doubtful` are scratch pages that a read may still land in."""

    peer: str
    reason: str
    doubtful: PageRun | None = None
    read_id: int = 0
    """Pass it to `fence` to end the doubt; its `ReadFenced` is posted."""
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class LaneBroke:
    """No page of `peer` can be read any more, and why, until it is disconnected and connected anew."""

    peer: str
    reason: str
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class Pulled:
    """A `pull` brought its pages; `digests` are of what is in them, in their order."""

    read_id: int
    nbytes: int
    seconds: float
    """Of the read, without the digests."""
    digests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Digested:
    """The digests a job asked for, in the order of its pages."""

    job_id: int
    digests: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class DigestFailed:
    """A job asked for something impossible."""

    job_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The thread has ended: nothing can land any more, and what had not ended has no other event than this.

    `error` says why if nobody asked for it.
    """

    error: str = ""


Event = (
    Completion
    | Opened
    | OpenFailed
    | Connected
    | ConnectFailed
    | LaneAnswered
    | LaneProbed
    | ProbeFailed
    | LaneBroke
    | Pulled
    | Digested
    | DigestFailed
    | Closed
)
