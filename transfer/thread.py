"""The transfer thread: owns one transport, does what the event loop asks, posts how it ended.

Every call on a transport is made here, its creation and end included, because NIXL agents belong to one thread. The
owner's methods only put a call on a queue and return; each call that takes time ends in exactly one event, given to
`post`, which runs on this thread (an asyncio owner passes a function that does `loop.call_soon_threadsafe`).

Rhythm: a call wakes the thread at once, and so does news on a transport that has file descriptors (ZeroMQ). One that
can only be polled (NIXL) is polled after 50 us while reads are in flight, then less and less often, to 1 ms; while
peers connect or read from us over an emulated lane every 1 ms (1 % of a core); else every 20 ms (0.2 %).
"""

from __future__ import annotations

import logging
import math
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from core.errors import BatonError, LocalError
from core.kv import KvShape, PageRun, pages_of
from transfer.digest import Sums, digests
from transfer.memory import settle
from transfer.plan import Cost
from transfer.probe import Probe
from transfer.repage import block_pages, lay_out, reading
from transfer.thread_events import (
    Closed,
    Connected,
    ConnectFailed,
    Digested,
    DigestFailed,
    Event,
    LaneAnswered,
    LaneBroke,
    LaneProbed,
    Opened,
    OpenFailed,
    ProbeFailed,
    Pulled,
)
from transfer.transport import Completion, ReadDone, ReadFailed, ReadFenced, Span, Transport

IDLE_S = 0.02
LIVELY_S = 0.001
EAGER_S = 0.00005
BOOST_S = 1.0
"""Poll every 1 ms for so long after a connect and after a probe's begin."""
PROBE_ANSWER_S = 2.0
"""A lane that answers no read within this is not up."""
SETTLE_S = 10.0
"""Most time spent at the start on memory for the arena's pages; the ledger gives the first pages out first."""
DIGEST_NBYTES = 8 << 20
"""Bytes digested between two looks at the queue and the transport: under a millisecond."""

COST = Cost()

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Digest:
    job_id: int
    pages: tuple[int, ...]
    first_page_index: int
    tokens: int
    found: list[int] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    read: ReadDone | None = None
    """The read that brought the pages, of a `pull`."""
    page_tokens: int = 0
    """Of a page at the peer, if its pages are not as large as ours."""
    raw_pages: int = 0
    """So many, from the first on, hold the bytes of its pages as they are, until they are laid out."""


class _Bell:
    """Wakes a thread that waits for file descriptors."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)
        self._watched: tuple[int, ...] = ()
        self._rung = False

    def ring(self) -> None:
        """End the wait, or the next one; from any thread."""
        if not self._rung:
            self._rung = True
            os.write(self._writer, b"!")

    def wait(self, fds: tuple[int, ...], seconds: float) -> None:
        """Wait until it rings, one of `fds` is readable, or the time is over (whole milliseconds, rounded up)."""
        if fds != self._watched:
            for fd in set(self._watched) - set(fds):
                self._poll.unregister(fd)
            for fd in set(fds) - set(self._watched):
                self._poll.register(fd, select.POLLIN)
            self._watched = fds
        if any(fd == self._reader for fd, _ in self._poll.poll(math.ceil(seconds * 1e3))):
            os.read(self._reader, 64)
            self._rung = False  # before the queue is looked at: what was put there earlier is seen

    def close(self) -> None:
        """Give the pipe back; nobody may ring any more."""
        os.close(self._reader)
        os.close(self._writer)


class TransferThread:
    """A transport on its own thread. Methods may be called from any thread and return at once.

    `make` creates the transport and runs on the transfer thread; `memory` is the arena in pages of `unit_nbytes`;
    `post` takes every event, on the transfer thread, and must not block. `kv` is needed for digests, and for peers with
    pages of another size, whose way here `cost` decides; `sums` is a quicker way to digests (`transfer/digest.py`).
    Read ids are the caller's, from 1 on; negative ones are our own.
    """

    def __init__(
        self,
        make: Callable[[], Transport],
        memory: memoryview,
        unit_nbytes: int,
        post: Callable[[Event], None],
        kv: KvShape | None = None,
        sums: Sums | None = None,
        cost: Cost = COST,
    ) -> None:
        self._make = make
        self._memory = memory
        self._unit_nbytes = unit_nbytes
        self._post = post
        self._kv = kv
        self._sums = sums
        self._cost = cost
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._bell: _Bell | None = None
        self._bell_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="transfer", daemon=True)
        self._transport: Transport | None = None
        self._jobs: deque[_Digest] = deque()
        self._checks: dict[int, _Digest] = {}
        """Digests to compute when a read is done."""
        self._probes: dict[str, Probe] = {}
        self._attempts: dict[str, int] = {}
        """At each peer, the last one."""
        self._own_reads = 0
        self._lively = False
        self._boosted_until = 0.0
        self._pause_s = EAGER_S
        self._closing = False
        self.cpu_s = 0.0
        """CPU time this thread has used."""

    def start(self) -> None:
        """Start the thread; it ends in `OpenFailed`, or goes on with `Opened` until `Closed`."""
        self._thread.start()

    def connect(self, peer: str, metadata: bytes, attempt: int = 0) -> None:
        """Make `peer` readable: ends in `Connected` or `ConnectFailed`. Polls at 1 ms for the next second.

        What is told of this connection later, by a probe or in a `LaneBroke`, bears the number of the `attempt`.
        """
        self._call(lambda: self._connect(peer, metadata, attempt))

    def disconnect(self, peer: str) -> None:
        """Forget `peer` if it is connected; its unfinished reads end as `ReadFailed`, its probe as `ProbeFailed`."""
        self._call(lambda: self._disconnect(peer))

    def read(
        self,
        read_id: int,
        peer: str,
        source: Sequence[PageRun],
        target: Sequence[PageRun],
        nbytes: int | None = None,
    ) -> None:
        """`Transport.read`: ends in `ReadDone` or `ReadFailed`, also if the read is refused (then not in doubt)."""
        source, target = tuple(source), tuple(target)
        self._call(lambda: self._read(read_id, peer, source, target, nbytes))

    def pull(
        self,
        read_id: int,
        peer: str,
        source: Sequence[PageRun],
        target: Sequence[PageRun],
        first_page: int,
        tokens: int,
        page_tokens: int = 0,
    ) -> None:
        """A `read` followed by the digests of its target pages, which hold `tokens` tokens from page `first_page` on.

        The source's pages hold `page_tokens` tokens, 0: as many as ours (else see `transfer/repage.py`). Ends in
        `Pulled` or `ReadFailed`. One call, so that the loop is not asked between the two.
        """
        check = _Digest(read_id, pages_of(target), first_page, tokens)
        source, target = tuple(source), tuple(target)

        def turn() -> None:
            self._checks[read_id] = check
            if self._alike(page_tokens):
                self._read(read_id, peer, source, target, None)
            else:
                self._read_cut(check, peer, source, page_tokens)

        self._call(turn)

    def abandon(self, read_id: int) -> None:
        """`Transport.abandon`."""
        self._call(lambda: self._open().abandon(read_id))

    def fence(self, read_ids: Sequence[int]) -> None:
        """`Transport.fence`: each id in doubt ends in `ReadFenced`."""
        ids = tuple(read_ids)
        self._call(lambda: self._fence(ids))

    def digest(self, job_id: int, pages: Sequence[int], first_page_index: int, tokens: int) -> None:
        """Digests of arena pages, as `transfer.digest.digests`: ends in `Digested` or `DigestFailed`."""
        job = _Digest(job_id, tuple(pages), first_page_index, tokens)
        self._call(lambda: self._jobs.append(job))

    def probe(self, peer: str, scratch: PageRun, remote: PageRun, page_tokens: int = 0) -> None:
        """Bring up and measure the lane from `peer`: `LaneAnswered`, then `LaneProbed`; or, at any time, `ProbeFailed`.

        Reads `remote` pages over and over into the `scratch` pages, which must be nobody's and as many, or of as many
        bytes as there are where the peer's pages hold `page_tokens` tokens and not as many as ours. Small reads
        repeat until 3 in a row end in their first poll, where the lane can do that at all, or until 1 s has passed.
        """
        self._call(lambda: self._begin_probe(peer, scratch, remote, page_tokens))

    def boost(self, seconds: float) -> None:
        """Poll every 1 ms for so long: a peer is connecting to us."""
        self._call(lambda: self._boost(seconds))

    def lively(self, on: bool) -> None:
        """Poll every 1 ms while on: peers have live tickets here, and their lanes need us to make progress."""

        def turn() -> None:
            self._lively = on

        self._call(turn)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Close the transport and end the thread; True if it ended in time. Safe to call twice, not from `post`."""

        def turn() -> None:
            self._closing = True

        self._call(turn)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _call(self, call: Callable[[], None]) -> None:
        self._calls.put(call)
        with self._bell_lock:
            if self._bell is not None:
                self._bell.ring()

    # ---- from here on: on the transfer thread ----

    def _run(self) -> None:
        try:
            transport = self._transport = self._make()
            settled = settle(self._memory, SETTLE_S)
            if settled < self._memory.nbytes:
                log.info("transfer: the arena's memory is there up to byte %d, the rest comes at first use", settled)
            transport.register(self._memory, self._unit_nbytes)
            opened = Opened(transport.name, transport.metadata())
            if transport.fds():
                with self._bell_lock:
                    self._bell = _Bell()
                    self._bell.ring()  # for calls that were made before it hung there
        except Exception as error:
            log.exception("transfer: the transport cannot be used")
            if self._transport is not None:
                self._shut(self._transport)
            self._post(OpenFailed(_sentence(error)))
            return
        self._post(opened)
        reason = ""
        try:
            while not self._closing:
                self._take_calls()
                self._step(transport)
                self.cpu_s = time.thread_time()
        except Exception as error:  # a broken thread must be heard of: nothing would ever end
            log.exception("transfer: the thread broke")
            reason = _sentence(error)
        self._shut(transport)
        self._post(Closed(reason))

    def _shut(self, transport: Transport) -> None:
        try:
            transport.close()
        except Exception:
            log.exception("transfer: the transport did not close")
        self._transport = None
        self._memory = memoryview(b"")
        with self._bell_lock:
            if self._bell is not None:
                self._bell.close()
            self._bell = None

    def _take_calls(self) -> None:
        """Wait as long as the rhythm allows for a call; make it and those behind it."""
        wait_s = self._wait_s()
        try:
            if self._bell is not None:
                self._bell.wait(self._open().fds(), wait_s)
                wait_s = 0.0
            call = self._calls.get(timeout=wait_s) if wait_s > 0 else self._calls.get_nowait()
            for _ in range(64):
                call()
                self._pause_s = EAGER_S
                call = self._calls.get_nowait()
            call()
        except queue.Empty:
            return
        if self._bell is not None:
            self._bell.ring()  # there may be more

    def _wait_s(self) -> float:
        if self._jobs or self._open().more:
            return 0.0
        if self._open().busy or self._probes:
            self._pause_s = min(self._pause_s * 1.5, LIVELY_S)
            return self._pause_s
        self._pause_s = EAGER_S
        if self._lively or time.monotonic() < self._boosted_until:
            return LIVELY_S
        return IDLE_S

    def _step(self, transport: Transport) -> None:
        self._hear(transport)
        for probe in list(self._probes.values()):
            self._go_on(probe, transport)
        if self._jobs:
            self._dig(self._jobs[0])

    def _hear(self, transport: Transport) -> None:
        for completion in transport.poll():
            self._pause_s = EAGER_S
            if completion.read_id < 0:
                self._probe_ended(completion)
            else:
                self._ended(completion)
        for peer, reason in transport.broken():
            self._post(LaneBroke(peer, reason, self._attempts.get(peer, 0)))

    def _ended(self, completion: Completion) -> None:
        check = self._checks.pop(completion.read_id, None)
        if check is not None and isinstance(completion, ReadDone):
            check.read = completion
            self._jobs.append(check)
        else:
            self._post(completion)

    def _open(self) -> Transport:
        assert self._transport is not None
        return self._transport

    def _connect(self, peer: str, metadata: bytes, attempt: int) -> None:
        started = time.perf_counter()
        self._attempts[peer] = attempt
        try:
            self._open().connect(peer, metadata)
        except Exception as error:
            self._post(ConnectFailed(peer, _sentence(error), attempt))
            return
        self._boost(BOOST_S)
        self._post(Connected(peer, time.perf_counter() - started))

    def _disconnect(self, peer: str) -> None:
        try:
            self._open().disconnect(peer)
        except BatonError as error:
            log.debug("transfer: %s", error)
        if peer in self._probes:
            self._hear(self._open())  # the end of its read says whether that may still land
        if peer in self._probes:
            self._no_probe(peer, "disconnected")
        self._attempts.pop(peer, None)

    def _read(
        self, read_id: int, peer: str, source: tuple[PageRun, ...], target: tuple[PageRun, ...], nbytes: int | None
    ) -> None:
        try:
            if read_id < 1:
                raise LocalError(f"read id: got {read_id}, want at least 1")
            self._open().read(read_id, peer, source, target, nbytes)
        except Exception as error:
            self._ended(ReadFailed(read_id, _sentence(error), in_doubt=False))

    def _alike(self, page_tokens: int) -> bool:
        """Whether pages of a peer are as large as ours."""
        return self._kv is None or page_tokens in (0, self._kv.page_tokens)

    def _read_cut(self, check: _Digest, peer: str, source: tuple[PageRun, ...], page_tokens: int) -> None:
        """Read the tokens that `check` is about out of pages that are not as large as ours."""
        try:
            if (kv := self._kv) is None:
                raise LocalError("pull: this thread was made without a KV shape")
            read = reading(kv, page_tokens, source, check.pages, check.first_page_index, check.tokens, self._cost)
            check.page_tokens, check.raw_pages = page_tokens, read.raw_pages
            self._open().read_spans(check.job_id, peer, read.spans)
        except Exception as error:
            self._ended(ReadFailed(check.job_id, _sentence(error), in_doubt=False))

    def _fence(self, read_ids: tuple[int, ...]) -> None:
        self._open().fence(read_ids)

    def _boost(self, seconds: float) -> None:
        self._boosted_until = max(self._boosted_until, time.monotonic() + seconds)

    def _dig(self, job: _Digest) -> None:
        kv = self._kv
        try:
            if kv is None:
                raise LocalError("digest: this thread was made without a KV shape")
            done, count = len(job.found), max(1, DIGEST_NBYTES // kv.page_nbytes)
            if job.raw_pages > done:
                count = min(block_pages(kv.page_tokens, job.page_tokens, count), job.raw_pages - done)
            pages = job.pages[done : done + count]
            if job.tokens > len(job.pages) * kv.page_tokens or job.tokens < 0:
                raise LocalError(f"digest tokens: got {job.tokens}, want 0 to {len(job.pages) * kv.page_tokens}")
            tokens = min(max(job.tokens - done * kv.page_tokens, 0), len(pages) * kv.page_tokens)
            if job.raw_pages > done:
                lay_out(self._memory, kv, job.page_tokens, pages, tokens)
            job.found += digests(self._memory, pages, kv, job.first_page_index + done, tokens, sums=self._sums)
        except Exception as error:
            self._jobs.popleft()
            if job.read is None:
                self._post(DigestFailed(job.job_id, _sentence(error)))
            else:
                self._post(ReadFailed(job.read.read_id, _sentence(error), in_doubt=False))
            return
        if len(job.found) == len(job.pages):
            self._jobs.popleft()
            if job.read is not None:
                read = job.read
                self._post(Pulled(read.read_id, read.nbytes, read.seconds, tuple(job.found)))
                return
            self._post(Digested(job.job_id, tuple(job.found), time.perf_counter() - job.started))

    def _begin_probe(self, peer: str, scratch: PageRun, remote: PageRun, page_tokens: int) -> None:
        if peer in self._probes:
            self._post(ProbeFailed(peer, "a probe of it is running", attempt=self._attempts.get(peer, 0)))
            return
        self._boost(BOOST_S)
        page_nbytes, nbytes = self._unit_nbytes, scratch.count * self._unit_nbytes
        if self._kv is not None and not self._alike(page_tokens):
            page_nbytes = page_tokens * self._kv.token_nbytes
            nbytes = min(nbytes, remote.count * page_nbytes)
        self._probes[peer] = Probe(peer, scratch, remote, page_nbytes, nbytes, time.monotonic())

    def _go_on(self, probe: Probe, transport: Transport) -> None:
        """Post a probe's next read, and look at its outcome once in the same breath."""
        now = time.monotonic()
        if probe.read_id:
            if now - probe.posted > PROBE_ANSWER_S:
                transport.abandon(probe.read_id)
            return
        nbytes = probe.next_nbytes(now)
        if nbytes is None:
            del self._probes[probe.peer]
            lane = transport.transports(probe.peer)
            self._post(LaneProbed(probe.peer, *probe.measured(), lane, self._attempts.get(probe.peer, 0)))
            return
        self._own_reads -= 1
        try:
            if probe.page_nbytes == self._unit_nbytes:
                transport.read(self._own_reads, probe.peer, (probe.remote,), (probe.scratch,), nbytes)
            else:
                starts = probe.remote.start * probe.page_nbytes, probe.scratch.start * self._unit_nbytes
                transport.read_spans(self._own_reads, probe.peer, (Span(*starts, nbytes),))
        except Exception as error:
            self._no_probe(probe.peer, _sentence(error))
            return
        probe.posts(self._own_reads, now)
        self._hear(transport)
        probe.first_poll = False

    def _probe_ended(self, completion: Completion) -> None:
        probe = next((probe for probe in self._probes.values() if probe.read_id == completion.read_id), None)
        match completion:
            case ReadFenced():
                self._post(completion)
            case ReadFailed() if probe is not None:
                reason = "no answer" if completion.reason == "abandoned" else completion.reason
                doubtful = probe.scratch if completion.in_doubt else None
                self._no_probe(probe.peer, reason, doubtful, completion.read_id if doubtful else 0)
            case ReadDone() if probe is not None:
                if not probe.answered:
                    self._post(LaneAnswered(probe.peer, self._attempts.get(probe.peer, 0)))
                probe.took(completion, self._open().immediate(probe.peer))

    def _no_probe(self, peer: str, reason: str, doubtful: PageRun | None = None, read_id: int = 0) -> None:
        del self._probes[peer]
        self._post(ProbeFailed(peer, reason, doubtful, read_id, self._attempts.get(peer, 0)))


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, BatonError) else f"{type(error).__name__}: {error}"
