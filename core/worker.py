"""Who is who: roles, identities with incarnations, and what a member of the deployment says about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from core.errors import LocalError
from core.kv import KvShape

PROTOCOL_VERSION = 9
"""Raised when a message between our own processes changes its meaning; unequal versions are refused at join."""


class Role(StrEnum):
    """What a process does."""

    GATEWAY = "gateway"
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def prefills(self) -> bool:
        """True if it takes prompts."""
        return self in (Role.PREFILL, Role.MIXED)

    @property
    def decodes(self) -> bool:
        """True if it generates beyond the first token."""
        return self in (Role.DECODE, Role.MIXED)


class Identity(NamedTuple):
    """One life of one process: a restart under the same name is somebody else.

    A tuple, because it is what most tables of a process are looked up by.
    """

    name: str
    incarnation: int
    """Random 48-bit number drawn at start."""

    def __str__(self) -> str:
        return f"{self.name}#{self.incarnation:012x}"

    @classmethod
    def parse(cls, text: str) -> Identity:
        """The inverse of `str`; raises LocalError on anything else."""
        name, mark, number = text.rpartition("#")
        try:
            if not (name and mark):
                raise ValueError
            return cls(name, int(number, 16))
        except ValueError:
            raise LocalError(f"identity: got {text!r}, want NAME#HEX") from None


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """Who started a process says how it ended: `crashed` if by a fault of its own, and nobody stopped it."""

    identity: Identity
    crashed: bool


@dataclass(frozen=True, slots=True)
class Numerics:
    """What must be equal for two workers to compute the same bits; compared at join when `exact` is on."""

    exact: bool
    dtype: str
    threads: int
    cpu: str
    """Instruction set and the engine's operations, such as "AVX512_BF16 AMX, native"; or another engine's name."""


class Use(StrEnum):
    """What one worker reads another's pages for."""

    HAND_OFF = "hand_off"
    """Of a prompt, by who decodes it."""
    MOVE = "move"
    """Of a row that runs."""
    FETCH = "fetch"
    """A prefix that the reader will use, or an answer that the session's next turn goes on from."""


@dataclass(frozen=True, slots=True)
class Way:
    """What two workers may do with each other's KV, as one of them sees it."""

    peer: Identity
    pulls: tuple[Use, ...] = ()
    """What we may read of the peer."""
    serves: tuple[Use, ...] = ()
    """What the peer may read of us."""


@dataclass(frozen=True, slots=True)
class Part:
    """One worker's part of the transfer map: everyone that it may exchange KV with."""

    version: int
    ways: tuple[Way, ...]
    """By peer, in order."""


@dataclass(frozen=True, slots=True)
class Lane:
    """The measured way from one worker's memory into another's."""

    source: Identity
    """The worker whose pages are read."""
    transport: str
    """What carries the bytes, such as "ucx: cma" or "zeromq: tcp"; empty: nothing does, the lane is away."""
    gbytes_per_s: float = 0.0
    latency_us: float = 0.0


def fell_back(transport: str, reader: str, source: str) -> bool:
    """True if UCX took TCP between two workers that listen on one address, and so are on one host.

    It could have read memory there (CMA, shared memory), and does not say why not: no ptrace, IPC namespaces of their
    own, or a UCX_TLS that somebody forgot. `reader` and `source` are the workers' host:port. A transport that was
    chosen, such as ZeroMQ, is none that UCX fell back to.
    """
    one, other = reader.rpartition(":")[0], source.rpartition(":")[0]
    return transport.startswith("ucx") and "tcp" in transport and bool(one) and one == other


@dataclass(frozen=True, slots=True)
class Costs:
    """What a worker's steps take, as far as others care: the lines of `scheduler.cost`, in seconds a unit."""

    prefill: tuple[tuple[float, float, float, float], ...]
    decode: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Member:
    """What a process registers with the coordinator."""

    identity: Identity
    role: Role
    address: str
    """host:port of its gRPC service."""
    metrics_address: str
    """host:port of its /metrics."""
    build: str
    protocol: int = PROTOCOL_VERSION
    model: str = ""
    """Served model name."""
    fingerprint: str = ""
    """Hash of the model's config and tensor index; workers of one deployment must agree."""
    kv: KvShape | None = None
    pages: int = 0
    context: int = 0
    """Longest prompt + output in tokens."""
    numerics: Numerics | None = None
    transport: str = ""
    ready: bool = False
    migrates: bool = False
    """Rows that run here may move to others that do so too, and theirs to it."""
    fetches: bool = False
    """It takes prompts, and pulls pages of them from workers that have them."""
    lanes: tuple[Lane, ...] = field(default=())
    costs: Costs | None = None
    """As it said last, which it does seldom; None if it did not."""
    grammar: str = ""
    """What a worker compiles constraints with, and its version, such as "llguidance 1.9.1"; empty if it cannot."""
    group: str = ""
    """Of a worker: whose requests it serves, and with whom alone it exchanges KV."""

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit into its arena."""
        return self.pages * self.kv.page_tokens if self.kv else 0


@dataclass(frozen=True, slots=True)
class Greeting:
    """First word on every stream between our processes."""

    member: Member
    transport_metadata: bytes = b""
    """What the other side's transport needs to read our pages."""
    scratch_pages: int = 0
    """Pages 0..n-1 of our arena hold nothing and may be read as a probe."""
