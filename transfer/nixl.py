"""The transport over NIXL, and so over UCX: RDMA where there is a NIC, CMA and shared memory on one host, else TCP.

Habits of NIXL 1.5.1 that shaped this file, all measured:

- its progress thread spins, so it stays off and `poll` makes the progress, for our reads and for peers' reads of us;
- a read over CMA runs inside the posting call, hence bounded pieces and a budget a poll;
- releasing a pending read, removing the peer or deregistering memory does not stop it; only destroying the agent
  that posted it does. So the arena is served by one *home* agent that lives as long as the transport, and reads are
  posted by *reader* agents, one a peer up to a limit, which `fence` may destroy and replace;
- two threads on one agent crash the process: a call from another thread than the first one's raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import LocalError, RemoteError, SetupError
from core.kv import PageRun
from transfer.transport import (
    PIECE_NBYTES,
    Arena,
    Card,
    Completion,
    ReadDone,
    ReadFailed,
    ReadFenced,
    Span,
    pieces,
    plan,
    within,
)

AGENTS = 16
"""Most reader agents: one costs 5 MB, 10 file descriptors and 15 to 25 ms."""
WINDOW = 4
"""Pieces in flight of one read, so that an emulated lane is not idle between two polls."""

log = logging.getLogger(__name__)


def available() -> str | None:
    """None if NIXL can be used here, else the reason why not."""
    try:
        load()
    except SetupError as error:
        return str(error)
    return None


class _Ucx:
    """What UCX says while it runs: its log goes to a file in memory, where the chosen protocols are read from.

    UCX names its choice for reads only in its log (`UCX_PROTO_INFO`); this is the documented way to learn it. The
    variables are set only while UCX reads them, so that child processes do not inherit our file.
    """

    def __init__(self) -> None:
        self._fd = -1
        self._seen = 0
        self._agent = ""
        self._table = False
        self.lanes: dict[str, list[str]] = {}
        """Agent -> what its reads go over, such as "cma/memory"."""
        if hasattr(os, "memfd_create") and "UCX_LOG_FILE" not in os.environ:
            self._fd = os.memfd_create("ucx-log")

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """Set what UCX must find in the environment while it loads or an agent is created."""
        # By default a connect blocks this thread, and with it all lanes, until the kernel gives up: for two minutes if
        # the way to a peer is cut.
        wanted = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "error", "UCX_TCP_CONN_NB": "y"}
        if self._fd >= 0:
            wanted["UCX_LOG_FILE"] = f"/proc/{os.getpid()}/fd/{self._fd}"
            wanted["UCX_PROTO_INFO"] = "*read*"
        added = {key: value for key, value in wanted.items() if key not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for key in added:
                os.environ.pop(key, None)

    def look(self) -> None:
        """Take in what UCX logged since the last look."""
        if self._fd < 0:
            return
        ctypes.CDLL(None).fflush(None)  # UCX writes through a buffered C stream
        size = os.fstat(self._fd).st_size
        text = os.pread(self._fd, size - self._seen, self._seen).decode(errors="replace")
        whole = text.rfind("\n") + 1
        self._seen += len(text[:whole].encode())
        for line in text[:whole].splitlines():
            self._line(line)

    def _line(self, line: str) -> None:
        _, bar, rest = line.partition(" | ")
        if not bar:
            if "+---" not in line:
                log.warning("ucx: %s", line)
            return
        cells = [cell.strip() for cell in rest.rstrip(" |").split("|")]
        if " cfg#" in cells[0]:
            self._agent, self._table = cells[0].split(" ")[0], False
        elif cells[0].startswith("remote memory read"):
            self._table = True
        elif self._table and len(cells) == 3 and ".." in cells[0]:
            how = cells[2] if "emulation" not in cells[1] else f"{cells[2]} emulated"
            lanes = self.lanes.setdefault(self._agent, [])
            if how not in lanes:
                lanes.append(how)


_ucx: _Ucx | None = None
_module: Any = None
_load_lock = threading.Lock()


def load() -> Any:
    """The NIXL module, imported once; raises `SetupError` with the reason if there is none."""
    global _module, _ucx
    with _load_lock:
        if _module is not None:
            return _module
        ucx = _Ucx()
        reason = "no wheel is installed (nixl, nixl-cu13 or nixl-cu12; Linux only)"
        raise_exceptions = logging.raiseExceptions
        with ucx.environment():
            for name in ("nixl._api", "nixl_cu13._api", "nixl_cu12._api"):
                try:
                    module = importlib.import_module(name)
                except ImportError as error:
                    if not isinstance(error, ModuleNotFoundError):
                        reason = f"{name} does not load: {error}"
                    continue
                break
            else:
                raise SetupError(f"transport nixl: {reason}")
        # Importing it points a logger at stdout, which is ours, and silences errors of everybody's logging.
        logging.raiseExceptions = raise_exceptions
        logger = logging.getLogger("nixl")
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
        _module, _ucx = module, ucx
        _end_without_destructors()
        return module


def _end_without_destructors() -> None:
    """When this process exits, its libraries do not take themselves apart.

    The wheel brings a libnl of its own. Beside the system's, which comes with libibverbs, its destructor is a
    segmentation fault, and the exit code is lost. What is registered here runs before destructors do, last to first:
    C's streams are written out, then the process ends with its code.
    """
    with contextlib.suppress(AttributeError):  # glibc has it
        libc = ctypes.CDLL(None)
        libc.on_exit(libc._exit, None)
        libc.on_exit(libc.fcloseall, None)


@dataclass(slots=True, eq=False)
class _Agent:
    name: str
    nixl: Any
    registered: Any
    peers: set[str] = field(default_factory=set)
    complained: bool = False


@dataclass(slots=True, eq=False)
class _Peer:
    card: Card
    reader: _Agent
    remote: str
    """The name of its home agent."""
    immediate: bool = False
    """A read ended in its posting call."""
    lost: str = ""
    """Why no agent of ours knows it any more; empty while one does."""
    broken: str = ""
    """Why it cannot be read any more, though it is known; empty while it can."""


@dataclass(slots=True, eq=False)
class _Read:
    read_id: int
    peer: str
    lane: _Peer
    """The connection that it began on: what it meets says nothing of a later one."""
    reader: _Agent
    spans: list[Span]
    nbytes: int
    left: Iterator[list[Span]]
    started: float
    posted: list[tuple[Any, int]] = field(default_factory=list)
    """Handles in flight with their bytes."""
    read: int = 0
    failure: str = ""


class Nixl:
    """`Transport` over NIXL agents. `owner` is "name#incarnation"; `agents` the most reader agents."""

    name = "nixl"

    def __init__(self, owner: str, agents: int = AGENTS) -> None:
        if agents < 1:
            raise LocalError(f"agents: got {agents}, want at least 1")
        self._api = load()
        assert _ucx is not None
        self._ucx = _ucx
        self._owner = owner
        self._most = agents
        self._thread = threading.get_ident()
        self._token = secrets.randbits(64)
        self._arena: Arena | None = None
        self._home: _Agent | None = None
        self._readers: list[_Agent] = []
        self._born = 0
        self._peers: dict[str, _Peer] = {}
        self._reads: dict[int, _Read] = {}
        self._doubtful: dict[int, _Read] = {}
        self._ended: deque[Completion] = deque()
        self._more = False
        self._untold: list[tuple[str, _Peer]] = []
        """Lanes that broke since `broken` was asked."""

    def register(self, memory: memoryview, unit_nbytes: int) -> None:
        self._here()
        if self._arena is not None:
            raise LocalError("register: got a second arena, want one")
        self._arena = Arena(memory, unit_nbytes)
        self._home = self._create()

    def metadata(self) -> bytes:
        arena, home = self._mine()
        body = bytes(home.nixl.get_agent_metadata())
        return Card(self.name, self._owner, arena.address, arena.unit_nbytes, arena.units, self._token, body).encode()

    def connect(self, peer: str, metadata: bytes) -> None:
        self._mine()
        if peer in self._peers:
            raise LocalError(f"connect: {peer} is connected already")
        card = Card.decode(metadata)
        card.expect(self.name, peer)
        if len(self._readers) < self._most:
            reader = self._create()
            self._readers.append(reader)
        else:
            reader = min(self._readers, key=lambda reader: len(reader.peers))
        try:
            self._peers[peer] = _Peer(card, reader, self._introduce(reader, peer, card))
        except RemoteError:
            if not reader.peers:
                self._readers.remove(reader)
                self._destroy(reader)
            raise

    def disconnect(self, peer: str) -> None:
        self._here()
        gone = self._peers.pop(peer, None)
        if gone is None:
            raise LocalError(f"disconnect: {peer} is not connected")
        reader = gone.reader
        reader.peers.discard(peer)
        mine = [read for read in self._reads.values() if read.peer == peer]
        for read in mine:
            self._give_up(read, "disconnected")
        if reader.peers:
            if not gone.lost:
                with contextlib.suppress(Exception):  # of a dead peer nothing is left to remove
                    reader.nixl.remove_remote_agent(gone.remote)
        elif reader in self._readers:
            self._readers.remove(reader)
            self._destroy(reader)

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
        if self._home is not None:
            self._here()
            for agent in (self._home, *self._readers):
                try:
                    agent.nixl.agent.getNotifs({}, [])  # nobody sends any: this is NIXL's call that makes progress
                except Exception as error:
                    if not agent.complained:
                        log.warning("agent %s: %s", agent.name, _why(error))
                    agent.complained = True
        for read in [*self._doubtful.values()]:
            self._check(read)
            if not read.posted:
                self._fenced(read)
        budget = PIECE_NBYTES
        for read in [*self._reads.values()]:
            self._check(read)
            while budget > 0 and not read.failure and len(read.posted) < WINDOW:
                nbytes = self._post(read)
                if nbytes == 0:
                    break
                budget -= nbytes
            self._finish(read)
        self._more = budget <= 0
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def broken(self) -> list[tuple[str, str]]:
        untold, self._untold = self._untold, []
        return [(name, peer.lost or peer.broken) for name, peer in untold if self._peers.get(name) is peer]

    def abandon(self, read_id: int) -> None:
        self._here()
        read = self._reads.get(read_id)
        if read is not None:
            self._give_up(read, "abandoned")

    def fence(self, read_ids: Sequence[int]) -> None:
        self._here()
        for read_id in read_ids:
            self.abandon(read_id)
        readers = {read.reader.name: read.reader for i in read_ids if (read := self._doubtful.get(i)) is not None}
        for reader in readers.values():
            self._replace(reader)

    def in_doubt(self) -> frozenset[int]:
        return frozenset(self._doubtful)

    def transports(self, peer: str) -> str:
        known = self._peers.get(peer)
        if known is None:
            return "not connected"
        self._ucx.look()
        lanes = self._ucx.lanes.get(known.reader.name)
        if lanes:
            return "ucx: " + " or ".join(lanes)
        # UCX's log went elsewhere: a read that ended in the posting call was no emulated one.
        return "ucx: one-sided (inferred)" if known.immediate else "ucx: unknown"

    def immediate(self, peer: str) -> bool:
        known = self._peers.get(peer)
        if known is None:
            return True
        self._ucx.look()
        return not any(lane.endswith("emulated") for lane in self._ucx.lanes.get(known.reader.name, ()))

    @property
    def busy(self) -> bool:
        return bool(self._reads or self._ended)

    @property
    def more(self) -> bool:
        return self._more

    def fds(self) -> tuple[int, ...]:
        return ()

    def close(self) -> None:
        self._here()
        self._peers.clear()
        self._reads.clear()
        self._ended.clear()
        self._doubtful.clear()
        for agent in self._readers:
            self._destroy(agent)
        self._readers.clear()
        if self._home is not None:
            self._destroy(self._home)
        self._home = None
        self._arena = None

    def _here(self) -> None:
        if threading.get_ident() != self._thread:
            raise LocalError("nixl transport: called from another thread than the one that made it")

    def _mine(self) -> tuple[Arena, _Agent]:
        self._here()
        if self._arena is None or self._home is None:
            raise LocalError("transport: no arena is registered")
        return self._arena, self._home

    def _begin(self, read_id: int, peer: str, make: Callable[[Arena, Card], list[Span]]) -> None:
        arena, _ = self._mine()
        known = self._peers.get(peer)
        if known is None:
            raise LocalError(f"read: {peer} is not connected")
        if read_id in self._reads or read_id in self._doubtful:
            raise LocalError(f"read: id {read_id} is in flight or in doubt")
        spans = make(arena, known.card)
        whole = sum(span.nbytes for span in spans)
        self._reads[read_id] = _Read(
            read_id, peer, known, known.reader, spans, whole, pieces(spans), time.perf_counter()
        )

    def _create(self) -> _Agent:
        arena = self._arena
        assert arena is not None
        name = f"{self._owner.replace('#', '/')}/{self._born}"
        self._born += 1
        config = self._api.nixl_agent_config(
            enable_prog_thread=False,
            backends=["UCX"],
            sync_mode=self._api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        with self._ucx.environment():
            nixl = self._api.nixl_agent(name, config)
        registered = nixl.register_memory([(arena.address, arena.bytes.nbytes, 0, "")], "DRAM")
        return _Agent(name, nixl, registered)

    def _destroy(self, agent: _Agent) -> None:
        """Destroy an agent, which fences every read it posted; those in doubt end here."""
        for read in [*self._reads.values(), *self._doubtful.values()]:
            if read.reader is agent:
                for handle, _ in read.posted:
                    # The handles go with the agent; left to themselves each would keep it alive.
                    with contextlib.suppress(Exception):
                        handle.release()
                    handle._released = True
                    handle._agent = None
                read.posted.clear()
        with contextlib.suppress(Exception):
            agent.nixl.deregister_memory(agent.registered)
        agent.registered = None
        agent.nixl.agent = None
        agent.nixl = None
        for read in [*self._doubtful.values()]:
            if read.reader is agent:
                self._fenced(read)
        self._ucx.lanes.pop(agent.name, None)

    def _replace(self, reader: _Agent) -> None:
        """Put a fresh agent in the place of `reader`: its peers reconnected, their unfinished reads from the start."""
        names = sorted(reader.peers)
        self._readers.remove(reader)
        self._destroy(reader)
        if not names:
            return
        fresh = self._create()
        self._readers.append(fresh)
        for name in names:
            peer = self._peers[name]
            peer.reader = fresh
            try:
                peer.remote = self._introduce(fresh, name, peer.card)
            except RemoteError as error:
                peer.lost = str(error)
                self._breaks(name, peer, peer.lost)
        for read in self._reads.values():
            if read.reader is reader:
                read.reader = fresh
                read.left = pieces(read.spans)
                read.read = 0

    def _introduce(self, reader: _Agent, peer: str, card: Card) -> str:
        try:
            remote = reader.nixl.add_remote_agent(card.body)
        except Exception as error:
            raise RemoteError(f"lane to {peer}: {_why(error)}") from None
        reader.peers.add(peer)
        return remote.decode() if isinstance(remote, bytes) else str(remote)

    def _post(self, read: _Read) -> int:
        """Post the read's next piece; returns its bytes, 0 if there was nothing to post."""
        peer = self._peers[read.peer]
        if peer.lost or peer.broken:
            read.failure = peer.lost or peer.broken
            return 0
        piece = next(read.left, None)
        if piece is None:
            return 0
        arena = self._arena
        assert arena is not None
        nixl = read.reader.nixl
        nbytes = sum(span.nbytes for span in piece)
        try:
            ours = nixl.get_xfer_descs([(arena.address + span.target, span.nbytes, 0) for span in piece], "DRAM")
            theirs = nixl.get_xfer_descs([(peer.card.base + span.source, span.nbytes, 0) for span in piece], "DRAM")
            handle = nixl.initialize_xfer("READ", ours, theirs, peer.remote)
            state = nixl.transfer(handle)
        except Exception as error:
            read.failure = _why(error)
            self._breaks(read.peer, read.lane, read.failure)
            return 0
        if state == "DONE":
            peer.immediate = True
        self._took(read, handle, nbytes, state)
        if state == "PROC":
            read.posted.append((handle, nbytes))
        return nbytes

    def _check(self, read: _Read) -> None:
        """Ask after the read's pieces in flight."""
        waiting: list[tuple[Any, int]] = []
        for handle, nbytes in read.posted:
            try:
                state = read.reader.nixl.check_xfer_state(handle)
            except Exception as error:
                read.failure = read.failure or _why(error)
                state = "ERR"
            self._took(read, handle, nbytes, state)
            if state == "PROC":
                waiting.append((handle, nbytes))
        read.posted = waiting

    def _took(self, read: _Read, handle: Any, nbytes: int, state: str) -> None:
        if state == "PROC":
            return
        if state == "DONE":
            read.read += nbytes
        else:
            read.failure = read.failure or "the lane reported an error"
            self._breaks(read.peer, read.lane, read.failure)
        with contextlib.suppress(Exception):
            handle.release()

    def _breaks(self, name: str, peer: _Peer, reason: str) -> None:
        """Nothing is wrong with what was asked for, that was looked at before: UCX has given up its way to the peer,
        and goes back to none that it gave up."""
        if not peer.broken:
            peer.broken = reason
            self._untold.append((name, peer))

    def _finish(self, read: _Read) -> None:
        """End the read if no piece is in flight any more and none is to come."""
        if read.posted or not (read.failure or read.read == read.nbytes):
            return
        del self._reads[read.read_id]
        if read.failure:
            self._ended.append(ReadFailed(read.read_id, read.failure, in_doubt=False))
        else:
            self._ended.append(ReadDone(read.read_id, read.nbytes, time.perf_counter() - read.started))

    def _give_up(self, read: _Read, reason: str) -> None:
        del self._reads[read.read_id]
        if read.posted:
            self._doubtful[read.read_id] = read
        self._ended.append(ReadFailed(read.read_id, reason, in_doubt=bool(read.posted)))

    def _fenced(self, read: _Read) -> None:
        del self._doubtful[read.read_id]
        self._ended.append(ReadFenced(read.read_id))


def _why(error: Exception) -> str:
    """NIXL's exception as one phrase, such as "nixlRemoteDisconnectError: NIXL_ERR_REMOTE_DISCONNECT"."""
    return f"{type(error).__name__}: {error}"
