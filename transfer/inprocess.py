"""A transport inside one process: memcpy between registered arenas.

For tests, and for workers that share a process. The copy runs inside `poll`, in bounded pieces, so a read that was
given up can land no more: nothing here is ever in doubt.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from core.errors import LocalError, RemoteError
from core.kv import PageRun
from transfer.transport import PIECE_NBYTES, Arena, Card, Completion, ReadDone, ReadFailed, Span, pieces, plan, within


class Exchange:
    """Where the arenas of one process meet. Shared by all its transports and safe for their threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arenas: dict[int, Arena] = {}

    def offer(self, token: int, arena: Arena) -> None:
        """Let everybody who knows `token` read `arena`."""
        with self._lock:
            self._arenas[token] = arena

    def withdraw(self, token: int) -> None:
        """End that; reads of it fail from now on."""
        with self._lock:
            self._arenas.pop(token, None)

    def arena(self, token: int) -> Arena | None:
        """The arena offered as `token`, None if its owner is gone."""
        with self._lock:
            return self._arenas.get(token)


_EXCHANGE = Exchange()


@dataclass(slots=True)
class _Read:
    peer: str
    nbytes: int
    left: Iterator[list[Span]]
    copied: int = 0
    started: float = field(default_factory=time.perf_counter)


class InProcess:
    """`Transport` by memcpy; `exchange` defaults to the one of this process."""

    name = "inprocess"

    def __init__(self, owner: str, exchange: Exchange | None = None) -> None:
        self._owner = owner
        self._exchange = _EXCHANGE if exchange is None else exchange
        self._token = secrets.randbits(64)
        self._arena: Arena | None = None
        self._peers: dict[str, Card] = {}
        self._reads: dict[int, _Read] = {}
        self._ended: deque[Completion] = deque()
        self._more = False
        self._broken: dict[str, str] = {}
        """Why peers cannot be read any more."""
        self._untold: list[str] = []

    def register(self, memory: memoryview, unit_nbytes: int) -> None:
        if self._arena is not None:
            raise LocalError("register: got a second arena, want one")
        self._arena = Arena(memory, unit_nbytes)
        self._exchange.offer(self._token, self._arena)

    def metadata(self) -> bytes:
        arena = self._mine()
        return Card(self.name, self._owner, 0, arena.unit_nbytes, arena.units, self._token, b"").encode()

    def connect(self, peer: str, metadata: bytes) -> None:
        self._mine()
        if peer in self._peers:
            raise LocalError(f"connect: {peer} is connected already")
        card = Card.decode(metadata)
        card.expect(self.name, peer)
        if self._exchange.arena(card.token) is None:
            raise RemoteError(f"lane to {peer}: its arena is not in this process")
        self._peers[peer] = card

    def disconnect(self, peer: str) -> None:
        if self._peers.pop(peer, None) is None:
            raise LocalError(f"disconnect: {peer} is not connected")
        self._broken.pop(peer, None)
        for read_id in [read_id for read_id, read in self._reads.items() if read.peer == peer]:
            self._fail(read_id, "disconnected")

    def read(
        self,
        read_id: int,
        peer: str,
        source: Sequence[PageRun],
        target: Sequence[PageRun],
        nbytes: int | None = None,
    ) -> None:
        self._begin(read_id, peer, lambda arena, card: plan(arena, card, source, target, nbytes))

    def read_spans(self, read_id: int, peer: str, spans: Sequence[Span]) -> None:
        self._begin(read_id, peer, lambda arena, card: within(arena, card, spans))

    def poll(self) -> list[Completion]:
        budget = PIECE_NBYTES
        for read_id, read in list(self._reads.items()):
            while budget > 0 and read_id in self._reads:
                budget -= self._copy(read_id, read)
        self._more = budget <= 0
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def broken(self) -> list[tuple[str, str]]:
        told = [(peer, self._broken[peer]) for peer in self._untold if peer in self._broken]
        self._untold.clear()
        return told

    def abandon(self, read_id: int) -> None:
        if read_id in self._reads:
            self._fail(read_id, "abandoned")

    def fence(self, read_ids: Sequence[int]) -> None:
        for read_id in read_ids:
            self.abandon(read_id)

    def in_doubt(self) -> frozenset[int]:
        return frozenset()

    def transports(self, peer: str) -> str:
        return "memcpy" if peer in self._peers else "not connected"

    def immediate(self, peer: str) -> bool:
        return True

    @property
    def busy(self) -> bool:
        return bool(self._reads or self._ended)

    @property
    def more(self) -> bool:
        return self._more

    def fds(self) -> tuple[int, ...]:
        return ()

    def close(self) -> None:
        self._exchange.withdraw(self._token)
        self._peers.clear()
        self._reads.clear()
        self._ended.clear()
        self._arena = None

    def _mine(self) -> Arena:
        if self._arena is None:
            raise LocalError("transport: no arena is registered")
        return self._arena

    def _begin(self, read_id: int, peer: str, make: Callable[[Arena, Card], list[Span]]) -> None:
        card = self._peers.get(peer)
        if card is None:
            raise LocalError(f"read: {peer} is not connected")
        if read_id in self._reads:
            raise LocalError(f"read: id {read_id} is in flight already")
        spans = make(self._mine(), card)
        self._reads[read_id] = _Read(peer, sum(span.nbytes for span in spans), pieces(spans))

    def _fail(self, read_id: int, reason: str) -> None:
        del self._reads[read_id]
        self._ended.append(ReadFailed(read_id, reason, in_doubt=False))

    def _copy(self, read_id: int, read: _Read) -> int:
        theirs = self._exchange.arena(self._peers[read.peer].token)
        if theirs is None:
            reason = f"{read.peer} is gone"
            if read.peer not in self._broken:
                self._broken[read.peer] = reason
                self._untold.append(read.peer)
            self._fail(read_id, reason)
            return 0
        mine = self._mine().bytes
        nbytes = 0
        for span in next(read.left):
            np.copyto(
                mine[span.target : span.target + span.nbytes], theirs.bytes[span.source : span.source + span.nbytes]
            )
            nbytes += span.nbytes
        read.copied += nbytes
        if read.copied == read.nbytes:
            del self._reads[read_id]
            self._ended.append(ReadDone(read_id, read.nbytes, time.perf_counter() - read.started))
        return nbytes
