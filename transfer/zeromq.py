"""The transport over ZeroMQ: TCP between any two processes, where NIXL cannot go.

The reader asks for spans of the owner's arena, the owner's `poll` answers from registered memory without copying it,
and the reader copies what arrives into its pages itself. So a read that was given up can land no more, and nothing is
ever in doubt. One ROUTER socket answers; each peer that is read has its own DEALER.

    ask     magic, version, arena token, ask number, (offset, nbytes) per span
    answer  magic, version, status, ask number  |  one frame per span, or one with the reason if status is not 0

Asks are at most `ASK_NBYTES` large and a reader has at most `CREDIT_NBYTES` of them open at a peer, which bounds what
waits in sockets. A dead peer is seen by its closed connection, a hung one by missing heartbeats.
"""

from __future__ import annotations

import logging
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq
from zmq.utils.monitor import parse_monitor_message

from core.errors import LocalError, RemoteError
from core.kv import PageRun
from transfer.transport import Arena, Card, Completion, ReadDone, ReadFailed, Span, pieces, plan, within

ASK_NBYTES = 2 << 20
ASK_SPANS = 128
CREDIT_NBYTES = 16 << 20
HEARTBEAT_MS = 300
HUNG_MS = 1200
"""A peer whose sockets are silent for so long is lost: it is dead, stopped or cut off."""
SERVED_S = 0.02
"""A peer that asked something will soon ask more."""

_ASK = struct.Struct("<4sHQQ")
_SPAN = struct.Struct("<QI")
_ANSWER = struct.Struct("<4sHHQ")
_MAGIC = b"BTNZ"
_VERSION = 1

log = logging.getLogger(__name__)


def available() -> str | None:
    """None: ZeroMQ is always there, it is a dependency."""
    return None


@dataclass(slots=True, eq=False)
class _Read:
    read_id: int
    nbytes: int
    left: Iterator[list[Span]]
    started: float = field(default_factory=time.perf_counter)
    read: int = 0
    ended: bool = False


@dataclass(frozen=True, slots=True)
class _Ask:
    read: _Read
    spans: list[Span]
    nbytes: int


@dataclass(slots=True, eq=False)
class _Peer:
    card: Card
    address: str
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    reads: dict[int, _Read] = field(default_factory=dict)
    asks: dict[int, _Ask] = field(default_factory=dict)
    credit: int = CREDIT_NBYTES
    asked: int = 0
    held: tuple[_Read, list[Span]] | None = None
    """A piece that is waiting for credit."""
    lost: str = ""


class ZeroMq:
    """`Transport` over ZeroMQ. Listens on a free port of `host`; peers dial `advertise`, by default the same."""

    name = "zeromq"

    def __init__(self, owner: str, host: str = "127.0.0.1", advertise: str | None = None) -> None:
        self._owner = owner
        self._host = advertise or host
        self._token = secrets.randbits(64)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.SNDHWM, 0)
        self._router.setsockopt(zmq.MAXMSGSIZE, _ASK.size + ASK_SPANS * _SPAN.size)
        self._tune(self._router)
        self._port = self._router.bind_to_random_port(f"tcp://{host}")
        self._arena: Arena | None = None
        self._peers: dict[str, _Peer] = {}
        self._served = 0.0
        self._refused = 0
        self._ended: deque[Completion] = deque()
        self._untold: list[_Peer] = []
        """Peers that were lost since `broken` was asked."""

    def register(self, memory: memoryview, unit_nbytes: int) -> None:
        if self._arena is not None:
            raise LocalError("register: got a second arena, want one")
        self._arena = Arena(memory, unit_nbytes)

    def metadata(self) -> bytes:
        arena = self._mine()
        body = f"tcp://{self._host}:{self._port}".encode()
        return Card(self.name, self._owner, 0, arena.unit_nbytes, arena.units, self._token, body).encode()

    def connect(self, peer: str, metadata: bytes) -> None:
        self._mine()
        if peer in self._peers:
            raise LocalError(f"connect: {peer} is connected already")
        card = Card.decode(metadata)
        card.expect(self.name, peer)
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)  # a peer that comes back has a new incarnation and a new card
        socket.setsockopt(zmq.MAXMSGSIZE, max(ASK_NBYTES, 65536))
        self._tune(socket)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED)
        try:
            address = card.body.decode()
            socket.connect(address)
        except (zmq.ZMQError, UnicodeDecodeError) as error:
            _shut(socket, monitor)
            raise RemoteError(f"lane to {peer}: got address {card.body!r} ({error})") from None
        self._peers[peer] = _Peer(card, address, socket, monitor)

    def disconnect(self, peer: str) -> None:
        gone = self._peers.pop(peer, None)
        if gone is None:
            raise LocalError(f"disconnect: {peer} is not connected")
        self._lose(gone, "disconnected")
        _shut(gone.socket, gone.monitor)

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
        if self._arena is not None:
            self._serve()
            for peer in self._peers.values():
                self._hear(peer)
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def broken(self) -> list[tuple[str, str]]:
        untold, self._untold = self._untold, []
        return [(who, peer.lost) for peer in untold for who, known in self._peers.items() if known is peer]

    def abandon(self, read_id: int) -> None:
        for peer in self._peers.values():
            if read_id in peer.reads:
                self._end(peer, peer.reads[read_id], "abandoned")

    def fence(self, read_ids: Sequence[int]) -> None:
        for read_id in read_ids:
            self.abandon(read_id)

    def in_doubt(self) -> frozenset[int]:
        return frozenset()

    def transports(self, peer: str) -> str:
        known = self._peers.get(peer)
        return f"zeromq: {known.address.partition(':')[0]}" if known else "not connected"

    def immediate(self, peer: str) -> bool:
        return False

    @property
    def busy(self) -> bool:
        return (
            bool(self._ended)
            or any(peer.reads for peer in self._peers.values())
            or time.monotonic() - self._served < SERVED_S
        )

    @property
    def more(self) -> bool:
        return False

    def fds(self) -> tuple[int, ...]:
        peers = [socket for peer in self._peers.values() if not peer.lost for socket in (peer.socket, peer.monitor)]
        return tuple(int(socket.get(zmq.FD)) for socket in (self._router, *peers))

    def close(self) -> None:
        for peer in self._peers.values():
            _shut(peer.socket, peer.monitor)
        self._peers.clear()
        self._ended.clear()
        self._router.close(0)
        self._context.destroy(0)
        self._arena = None

    @staticmethod
    def _tune(socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HUNG_MS)

    def _mine(self) -> Arena:
        if self._arena is None:
            raise LocalError("transport: no arena is registered")
        return self._arena

    # ---- the owner's side ----

    def _serve(self) -> None:
        """Answer the asks that have come, a bounded number."""
        for _ in range(64):
            if not _ready(self._router):
                return
            frames = self._router.recv_multipart(zmq.NOBLOCK)
            if len(frames) == 2:
                self._answer(frames[0], frames[1])
            else:
                self._refuse("an ask of the wrong number of frames")

    def _answer(self, reader: bytes, ask: bytes) -> None:
        arena = self._mine()
        count, rest = divmod(len(ask) - _ASK.size, _SPAN.size)
        if count < 1 or rest or ask[:4] != _MAGIC:
            self._refuse("bytes that are no ask")
            return
        _, version, token, number = _ASK.unpack_from(ask)
        reason = ""
        spans = list(_SPAN.iter_unpack(ask[_ASK.size :]))
        if version != _VERSION:
            reason = f"ask: got version {version}, want {_VERSION}"
        elif token != self._token:
            reason = "ask: got the token of another arena"
        elif any(offset + nbytes > arena.bytes.nbytes or nbytes == 0 for offset, nbytes in spans):
            reason = f"ask: got bytes outside the arena of {arena.bytes.nbytes}"
        elif sum(nbytes for _, nbytes in spans) > ASK_NBYTES:
            reason = f"ask: got more than {ASK_NBYTES} bytes"
        head = _ANSWER.pack(_MAGIC, _VERSION, 1 if reason else 0, number)
        payload: list[Any] = [reason.encode()]
        if reason:
            self._refuse(reason)
        else:
            payload = [arena.memory[offset : offset + nbytes] for offset, nbytes in spans]
        try:
            self._router.send_multipart([reader, head, *payload], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            self._refuse(f"an ask that could not be answered ({error})")
        self._served = time.monotonic()

    def _refuse(self, what: str) -> None:
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:  # 1st, 2nd, 4th, 8th ...
            log.warning("zeromq: refused %s (%d so far)", what, self._refused)

    # ---- the reader's side ----

    def _begin(self, read_id: int, peer: str, make: Callable[[Arena, Card], list[Span]]) -> None:
        known = self._peers.get(peer)
        if known is None:
            raise LocalError(f"read: {peer} is not connected")
        if any(read_id in other.reads for other in self._peers.values()):
            raise LocalError(f"read: id {read_id} is in flight already")
        spans = make(self._mine(), known.card)
        whole = sum(span.nbytes for span in spans)
        known.reads[read_id] = _Read(read_id, whole, pieces(spans, ASK_NBYTES, ASK_SPANS))
        if known.lost:
            self._lose(known, known.lost)
        else:
            self._ask(known)

    def _ask(self, peer: _Peer) -> None:
        """Send as many asks as the credit allows, oldest read first."""
        while True:
            if peer.held is None:
                for read in peer.reads.values():
                    piece = next(read.left, None)
                    if piece is not None:
                        peer.held = (read, piece)
                        break
                else:
                    return
            read, piece = peer.held
            if read.ended:
                peer.held = None
                continue
            nbytes = sum(span.nbytes for span in piece)
            if nbytes > peer.credit:
                return
            peer.asked += 1
            ask = _ASK.pack(_MAGIC, _VERSION, peer.card.token, peer.asked)
            ask += b"".join(_SPAN.pack(span.source, span.nbytes) for span in piece)
            try:
                peer.socket.send(ask, zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                self._lose(peer, f"send failed: {error}")
                return
            peer.held = None
            peer.credit -= nbytes
            peer.asks[peer.asked] = _Ask(read, piece, nbytes)

    def _hear(self, peer: _Peer) -> None:
        if peer.lost:
            return
        self._take(peer)
        if _ready(peer.monitor):
            event = parse_monitor_message(peer.monitor.recv_multipart())["event"]
            self._take(peer)
            self._lose(peer, f"the connection ended ({zmq.Event(event)!r})")
        else:
            self._ask(peer)
            self._take(peer)  # a send may swallow the descriptor's sign that something came

    def _take(self, peer: _Peer) -> None:
        """Copy the answers that have come, a bounded number."""
        arena = self._mine()
        for _ in range(64):
            if peer.lost or not _ready(peer.socket):
                return
            frames = peer.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            head = frames[0].buffer
            if len(head) != _ANSWER.size or head[:4] != _MAGIC:
                self._lose(peer, "got bytes that are no answer")
                return
            _, version, status, number = _ANSWER.unpack(head)
            ask = peer.asks.pop(number, None)
            if version != _VERSION or ask is None:
                self._lose(peer, f"got an answer of version {version} to ask {number}")
                return
            peer.credit += ask.nbytes
            if ask.read.ended:
                continue
            if status:
                reason = bytes(frames[1].buffer)[:200].decode(errors="replace") if len(frames) > 1 else "no reason"
                self._end(peer, ask.read, f"refused: {reason}")
                continue
            if [len(frame.buffer) for frame in frames[1:]] != [span.nbytes for span in ask.spans]:
                self._lose(peer, f"got an answer of the wrong length to ask {number}")
                return
            for frame, span in zip(frames[1:], ask.spans, strict=True):
                np.copyto(
                    arena.bytes[span.target : span.target + span.nbytes], np.frombuffer(frame.buffer, dtype=np.uint8)
                )
            ask.read.read += ask.nbytes
            if ask.read.read == ask.read.nbytes:
                self._end(peer, ask.read, "")

    def _end(self, peer: _Peer, read: _Read, failure: str) -> None:
        del peer.reads[read.read_id]
        read.ended = True
        if failure:
            self._ended.append(ReadFailed(read.read_id, failure, in_doubt=False))
        else:
            self._ended.append(ReadDone(read.read_id, read.nbytes, time.perf_counter() - read.started))

    def _lose(self, peer: _Peer, reason: str) -> None:
        if not peer.lost:
            self._untold.append(peer)
        peer.lost = reason
        for read in list(peer.reads.values()):
            self._end(peer, read, reason)
        peer.asks.clear()
        peer.held = None


def _ready(socket: zmq.Socket[bytes]) -> bool:
    """True if a whole message can be received without waiting."""
    return bool(int(socket.get(zmq.EVENTS)) & zmq.POLLIN)


def _shut(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
    socket.disable_monitor()
    monitor.close(0)
    socket.close(0)
