"""What moves bytes: one contract for every lane, and the values that cross it.

A transport registers one arena of equal pages, tells peers how to reach it (`metadata`), and *reads* pages of a peer,
or any bytes, into its own arena. Whoever needs bytes pulls them; nobody writes into another's memory. Everything is
driven by completion: `read` returns at once, `poll` says how each read ended.

The one danger is at the reader: a read that was given up can still land, and then overwrites whoever owns the target
pages by then. Such pages are *in doubt*. Nothing ends the doubt but `ReadFenced`: not time, not a disconnect.

A transport belongs to one thread: creation, every call and `close` are made on it (`transfer/thread.py` is that
thread).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from core.errors import LocalError, RemoteError
from core.kv import PageRun

CARD_VERSION = 1
PIECE_NBYTES = 16 << 20
"""Most bytes of one posted piece: some 3 ms of memory copy, so that the thread looks at its queue in between."""

_CARD = struct.Struct("<4sHHHIQQQQ")
_MAGIC = b"BTNL"


@dataclass(frozen=True, slots=True)
class ReadDone:
    """All bytes of a read are in the target pages."""

    read_id: int
    nbytes: int
    seconds: float
    """From `read` to the poll that saw the end."""


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """A read ended without its bytes; the target pages hold anything."""

    read_id: int
    reason: str
    in_doubt: bool
    """True: bytes may still land in the target pages. A `ReadFenced` of the same id ends that."""


@dataclass(frozen=True, slots=True)
class ReadFenced:
    """A read that had failed in doubt can land no more; its target pages are safe to use."""

    read_id: int


Completion = ReadDone | ReadFailed | ReadFenced


class Transport(Protocol):
    """One-sided reads between registered arenas. Local misuse raises `LocalError` and changes nothing."""

    @property
    def name(self) -> str:
        """One of "nixl", "zeromq" and "inprocess"; both ends must use the same."""
        ...

    def register(self, memory: memoryview, unit_nbytes: int) -> None:
        """Give the transport its arena, once: writable, its address fixed until `close`, pages of `unit_nbytes`."""
        ...

    def metadata(self) -> bytes:
        """What a peer hands to its `connect` to read this arena; opaque, travels over the caller's own channel."""
        ...

    def connect(self, peer: str, metadata: bytes) -> None:
        """Make a peer ("name#incarnation") readable. Does not wait for the lane.

        Raises `RemoteError` if the metadata is damaged, of another transport, version or owner, or if the lane shows at
        once that the peer is gone, and `LocalError` if the peer is connected already. Of a peer whose pages are not as
        large as ours, only spans can be read.
        """
        ...

    def disconnect(self, peer: str) -> None:
        """Forget a peer; its unfinished reads end as `ReadFailed`. Raises `LocalError` if it is not connected."""
        ...

    def read(
        self,
        read_id: int,
        peer: str,
        source: Sequence[PageRun],
        target: Sequence[PageRun],
        nbytes: int | None = None,
    ) -> None:
        """Start to copy the peer's pages into ours, in order; only the first `nbytes` bytes if given.

        Raises `LocalError` for a bad id, peer, target or count, `RemoteError` for pages that the peer does not have,
        and if its pages are not as large as ours.
        Target pages of reads in flight or in doubt must not overlap: the caller's ledger sees to that.
        """
        ...

    def read_spans(self, read_id: int, peer: str, spans: Sequence[Span]) -> None:
        """Start to copy byte ranges, in order: for a peer that cuts its pages in another way (`transfer/plan.py`).

        Ends, and raises, as `read` does: `LocalError` for none, an empty one, or one outside our arena, `RemoteError`
        for one outside the peer's.
        """
        ...

    def poll(self) -> list[Completion]:
        """Make progress, also for peers that read from us, and say what ended since the last call."""
        ...

    def broken(self) -> list[tuple[str, str]]:
        """Peers whose lanes have broken since the last call, and why. Told once for each connection.

        Each read of such a peer fails, also those to come, until it is disconnected and connected anew. A read that
        fails alone, because the peer refused it or it was given up, says nothing of the lane.
        """
        ...

    def abandon(self, read_id: int) -> None:
        """Give a read up: it ends as `ReadFailed`, in doubt unless the lane cannot land it. Ended ids are ignored."""
        ...

    def fence(self, read_ids: Sequence[int]) -> None:
        """Make it impossible for these reads to land, whatever it costs; each ends in `ReadFenced`.

        A read that is still running is abandoned first. Reads of other peers that this disturbs start again by
        themselves. Ids that are not in doubt are ignored.
        """
        ...

    def in_doubt(self) -> frozenset[int]:
        """Reads that failed in doubt and are not fenced yet."""
        ...

    def transports(self, peer: str) -> str:
        """What carries the bytes from `peer`, such as "ucx: cma/memory" or "zeromq: tcp"; for people."""
        ...

    def immediate(self, peer: str) -> bool:
        """True if a small read of `peer` should end in the first poll once the lane is up."""
        ...

    @property
    def busy(self) -> bool:
        """True while polling soon is worth it: reads are in flight, or a peer was served a moment ago."""
        ...

    @property
    def more(self) -> bool:
        """True if the last `poll` stopped early, so that calls need not wait for it: poll again at once."""
        ...

    def fds(self) -> tuple[int, ...]:
        """File descriptors that become readable when `poll` has news; none: only polling tells."""
        ...

    def close(self) -> None:
        """Forget everything. After it no read can land and no peer can read; it may be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring bytes on both sides: offsets into the two arenas, in bytes."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Card:
    """What a peer must know to read an arena: the content of `metadata()`."""

    transport: str
    owner: str
    """The owner's name with its incarnation; metadata of a former life is refused."""
    base: int
    """Address of the arena in its process, 0 where addresses mean nothing."""
    unit_nbytes: int
    units: int
    token: int
    """Random 64-bit number of this arena."""
    body: bytes
    """What the transport itself needs."""

    def encode(self) -> bytes:
        """The card as bytes."""
        transport, owner = self.transport.encode(), self.owner.encode()
        head = _CARD.pack(
            _MAGIC,
            CARD_VERSION,
            len(transport),
            len(owner),
            len(self.body),
            self.base,
            self.unit_nbytes,
            self.units,
            self.token,
        )
        return head + transport + owner + self.body

    @classmethod
    def decode(cls, metadata: bytes) -> Card:
        """The inverse of `encode`; raises `RemoteError` if the bytes are anything else."""
        if len(metadata) < _CARD.size or metadata[:4] != _MAGIC:
            raise RemoteError(f"lane metadata: got {len(metadata)} bytes of something else, want a lane card")
        _, version, n_transport, n_owner, n_body, base, unit, units, token = _CARD.unpack_from(metadata)
        if version != CARD_VERSION:
            raise RemoteError(f"lane metadata: got version {version}, want {CARD_VERSION}")
        want = _CARD.size + n_transport + n_owner + n_body
        if len(metadata) != want:
            raise RemoteError(f"lane metadata: got {len(metadata)} bytes, want {want}")
        at = _CARD.size
        try:
            transport = metadata[at : at + n_transport].decode()
            owner = metadata[at + n_transport : at + n_transport + n_owner].decode()
        except UnicodeDecodeError as error:
            raise RemoteError(f"lane metadata: got a name that is not text ({error})") from None
        return cls(transport, owner, base, unit, units, token, metadata[want - n_body :])

    def expect(self, transport: str, peer: str) -> None:
        """Raise `RemoteError` unless this is `peer`'s card for our transport."""
        if self.transport != transport:
            raise RemoteError(f"lane to {peer}: got transport {self.transport!r}, want {transport!r}")
        if self.owner != peer:
            raise RemoteError(f"lane to {peer}: got metadata of {self.owner}")


class Arena:
    """Registered memory: its bytes, its address, and whether page runs lie inside."""

    def __init__(self, memory: memoryview, unit_nbytes: int) -> None:
        flat = memory.cast("B") if memory.format != "B" or memory.ndim != 1 else memory
        if flat.readonly:
            raise LocalError("arena: got read-only memory, want writable")
        if unit_nbytes < 1 or flat.nbytes == 0 or flat.nbytes % unit_nbytes:
            raise LocalError(f"arena: got {flat.nbytes} bytes in pages of {unit_nbytes}, want whole pages")
        self.memory = flat
        self.bytes = np.frombuffer(flat, dtype=np.uint8)
        self.address = int(self.bytes.ctypes.data)
        self.unit_nbytes = unit_nbytes
        self.units = flat.nbytes // unit_nbytes


def plan(
    arena: Arena, peer: Card, source: Sequence[PageRun], target: Sequence[PageRun], nbytes: int | None = None
) -> list[Span]:
    """The fewest spans that copy `source` pages of `peer` into `target` pages of `arena`, in order.

    Runs are joined and split so that every span is contiguous on both sides. Raises as `Transport.read` does.
    """
    if peer.unit_nbytes != arena.unit_nbytes:
        raise RemoteError(f"lane to {peer.owner}: got pages of {peer.unit_nbytes} bytes, want {arena.unit_nbytes}")
    _inside(source, peer.units, f"source pages at {peer.owner}", RemoteError)
    _inside(target, arena.units, "target pages", LocalError)
    count = sum(run.count for run in target)
    offered = sum(run.count for run in source)
    if offered != count:
        raise LocalError(f"read: got {offered} source pages for {count} target pages, want as many")
    whole = count * arena.unit_nbytes
    left = whole if nbytes is None else nbytes
    if not 1 <= left <= whole:
        raise LocalError(f"read: got {left} bytes, want 1 to {whole}")
    spans: list[Span] = []
    ours = iter(target)
    run, used = next(ours), 0
    for theirs in source:
        taken = 0
        while taken < theirs.count and left:
            if used == run.count:
                run, used = next(ours), 0
                continue
            step = min(theirs.count - taken, run.count - used)
            size = min(step * arena.unit_nbytes, left)
            _append(
                spans, Span((theirs.start + taken) * arena.unit_nbytes, (run.start + used) * arena.unit_nbytes, size)
            )
            taken, used, left = taken + step, used + step, left - size
    return spans


def within(arena: Arena, peer: Card, spans: Sequence[Span]) -> list[Span]:
    """`spans` themselves, if all lie inside `peer`'s arena and ours. Raises as `Transport.read_spans` does."""
    if not spans or min(span.nbytes for span in spans) < 1:
        raise LocalError(f"spans: got {len(spans)}, want at least one, of at least a byte each")
    ours = min(span.target for span in spans), max(span.target + span.nbytes for span in spans)
    theirs = min(span.source for span in spans), max(span.source + span.nbytes for span in spans)
    if ours[0] < 0 or ours[1] > arena.bytes.nbytes:
        raise LocalError(f"target bytes: got [{ours[0]}, {ours[1]}), want some inside [0, {arena.bytes.nbytes})")
    if theirs[0] < 0 or theirs[1] > peer.units * peer.unit_nbytes:
        end = peer.units * peer.unit_nbytes
        raise RemoteError(f"source bytes at {peer.owner}: got [{theirs[0]}, {theirs[1]}), want some inside [0, {end})")
    return list(spans)


def pieces(spans: Sequence[Span], most_nbytes: int = PIECE_NBYTES, most_spans: int = 256) -> Iterator[list[Span]]:
    """`spans` in order, cut and grouped into pieces of at most `most_nbytes` and `most_spans` each."""
    piece: list[Span] = []
    room = most_nbytes
    for span in spans:
        done = 0
        while done < span.nbytes:
            size = min(span.nbytes - done, room)
            piece.append(Span(span.source + done, span.target + done, size))
            done, room = done + size, room - size
            if room == 0 or len(piece) == most_spans:
                yield piece
                piece, room = [], most_nbytes
    if piece:
        yield piece


def _append(spans: list[Span], span: Span) -> None:
    if spans:
        last = spans[-1]
        if last.source + last.nbytes == span.source and last.target + last.nbytes == span.target:
            spans[-1] = Span(last.source, last.target, last.nbytes + span.nbytes)
            return
    spans.append(span)


def _inside(runs: Sequence[PageRun], units: int, what: str, error: type[LocalError] | type[RemoteError]) -> None:
    if not runs:
        raise LocalError(f"{what}: got none, want at least one run")
    for run in runs:
        if run.start < 0 or run.count < 1 or run.stop > units:
            raise error(f"{what}: got [{run.start}, {run.stop}), want a run inside [0, {units})")
