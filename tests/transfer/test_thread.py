"""The transfer thread: every call ends in one event, reads are not starved, and idling costs next to nothing."""

from __future__ import annotations

import queue
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from core.errors import RemoteError
from core.kv import KvShape, PageRun
from tests.transfer.conformance import Child
from tests.transfer.faults import Faulty, Rule, Rules
from tests.transfer.peer import arena, make
from transfer import nixl
from transfer.digest import digests
from transfer.inprocess import InProcess
from transfer.thread import TransferThread
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
from transfer.transport import ReadDone, ReadFailed, ReadFenced, Transport

KV = KvShape(layers=4, kv_heads=2, head_dim=64, page_tokens=16, dtype="bfloat16")
UNITS = 64
KINDS = [
    "inprocess",
    "zeromq",
    pytest.param(
        "nixl", marks=pytest.mark.skipif(nixl.available() is not None, reason=f"needs NIXL: {nixl.available()}")
    ),
]


class Owner:
    """What a worker does with a transfer thread, without a loop."""

    def __init__(self, owner: str, make_one: Callable[[], Transport], seed: int | None = None, kv: KvShape | None = KV):
        self.owner = owner
        page_nbytes = (kv or KV).page_nbytes
        units = UNITS * KV.page_nbytes // page_nbytes
        self.memory = arena(units, page_nbytes, seed)
        self.bytes = np.frombuffer(self.memory, dtype=np.uint8).reshape(units, -1)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.thread = TransferThread(make_one, self.memory, page_nbytes, self.events.put, kv)
        self.thread.start()

    def event(self, timeout_s: float = 5.0) -> Event:
        return self.events.get(timeout=timeout_s)

    def opened(self) -> bytes:
        event = self.event()
        assert isinstance(event, Opened), event
        return event.metadata

    def measured(self) -> LaneProbed:
        event = self.event()
        assert isinstance(event, LaneAnswered), event
        lane = self.event()
        assert isinstance(lane, LaneProbed), lane
        assert (lane.peer, lane.attempt) == (event.peer, event.attempt)
        return lane


@pytest.fixture(params=KINDS)
def owners(request):
    yield from connected(request.param, KV, KV)


@pytest.fixture(params=KINDS)
def unequal(request):
    """The sink's pages are four times as large."""
    yield from connected(request.param, replace(KV, page_tokens=64), KV)


def connected(kind: str, ours: KvShape, theirs: KvShape) -> Iterator[list[Owner]]:
    made = [
        Owner("sink#01", lambda: make(kind, "sink#01"), kv=ours),
        Owner("source#02", lambda: make(kind, "source#02"), seed=3, kv=theirs),
    ]
    sink, source = made
    sink.opened()
    sink.thread.connect("source#02", source.opened())
    source.thread.boost(1.0)
    event = sink.event()
    assert isinstance(event, Connected), event
    yield made
    for owner in made:
        assert owner.thread.close()


def test_reads_probe_and_digests(owners):
    sink, source = owners
    sink.thread.probe("source#02", PageRun(56, 8), PageRun(0, 8))
    lane = sink.measured()
    assert lane.peer == "source#02"
    assert lane.gbytes_per_s > 0.05
    assert 0 < lane.latency_us < 50_000
    assert lane.transports not in ("", "not connected")
    for read_id in range(1, 21):
        sink.thread.read(read_id, "source#02", [PageRun(read_id, 2)], [PageRun(2 * read_id, 2)])
    ends = [sink.event() for _ in range(20)]
    assert [end.read_id for end in ends if isinstance(end, ReadDone)] == list(range(1, 21))
    assert np.array_equal(sink.bytes[40:42], source.bytes[20:22])
    sink.thread.digest(7, range(2, 42), 100, 40 * 16 - 3)
    done = sink.event()
    assert isinstance(done, Digested), done
    assert (done.job_id, list(done.digests)) == (7, digests(sink.memory, range(2, 42), KV, 100, 40 * 16 - 3))


def test_a_peer_with_pages_of_another_size_is_probed_and_pulled_from(unequal):
    sink, source = unequal
    sink.thread.probe("source#02", PageRun(14, 2), PageRun(0, 6), 16)
    lane = sink.measured()
    assert lane.gbytes_per_s > 0.05
    probed = sink.bytes[14:].reshape(8, KV.page_nbytes)
    assert np.array_equal(probed[:6], source.bytes[:6]), "as many bytes as the smaller of the two has"
    assert not probed[6:].any()
    kv = replace(KV, page_tokens=64)
    pages = [10, 11, 12, 13, 30, 31, 20]
    sink.thread.pull(5, "source#02", [PageRun(10, 4), PageRun(30, 2), PageRun(20, 1)], [PageRun(6, 2)], 4, 100, 16)
    end = sink.event()
    assert isinstance(end, Pulled), end
    assert (end.read_id, end.nbytes) == (5, 7 * KV.page_nbytes)
    assert list(end.digests) == digests(sink.memory, [6, 7], kv, 4, 100)
    told = digests(source.memory, pages, KV, 16, 100)
    assert list(end.digests) == [sum(told[:4]) % 2**64, sum(told[4:]) % 2**64]
    sink.thread.pull(6, "source#02", [PageRun(10, 4)], [PageRun(6, 2)], 4, 100, 16)
    refused = sink.event()
    assert isinstance(refused, ReadFailed), refused
    assert (refused.in_doubt, "pull: got (4, 2) pages" in refused.reason) == (False, True)
    sink.thread.pull(7, "source#02", [PageRun(60, 7)], [PageRun(6, 2)], 4, 100, 16)
    outside = sink.event()
    assert isinstance(outside, ReadFailed), outside
    assert "source bytes at source#02" in outside.reason


def test_a_pull_ends_with_the_digests_of_what_came(owners):
    sink, source = owners
    sink.thread.pull(5, "source#02", [PageRun(10, 3), PageRun(20, 1)], [PageRun(30, 4)], 7, 3 * 16 + 5)
    end = sink.event()
    assert isinstance(end, Pulled), end
    assert (end.read_id, end.nbytes) == (5, 4 * KV.page_nbytes)
    assert np.array_equal(sink.bytes[30:34], source.bytes[[10, 11, 12, 20]])
    assert list(end.digests) == digests(source.memory, [10, 11, 12, 20], KV, 7, 3 * 16 + 5)
    sink.thread.pull(6, "source#02", [PageRun(10, 1)], [PageRun(30, 1)], 0, 17)
    refused = sink.event()
    assert isinstance(refused, ReadFailed), refused
    assert "digest tokens: got 17" in refused.reason
    sink.thread.pull(7, "nobody#00", [PageRun(10, 1)], [PageRun(30, 1)], 0, 16)
    refused = sink.event()
    assert isinstance(refused, ReadFailed), refused
    assert not refused.in_doubt


def test_refusals_are_events(owners):
    sink, _ = owners
    one = [PageRun(0, 1)]
    sink.thread.read(1, "nobody#00", one, one)
    sink.thread.read(0, "source#02", one, one)
    sink.thread.read(2, "source#02", one, [PageRun(UNITS, 1)])
    sink.thread.read(3, "source#02", [PageRun(UNITS, 1)], one)
    ends = [sink.event() for _ in range(4)]
    assert all(isinstance(end, ReadFailed) and not end.in_doubt for end in ends)
    sink.thread.connect("source#02", b"")
    sink.thread.connect("other#03", b"noise")
    assert [sink.event(), sink.event()] == [
        ConnectFailed("source#02", "connect: source#02 is connected already"),
        ConnectFailed("other#03", "lane metadata: got 5 bytes of something else, want a lane card"),
    ]
    sink.thread.digest(1, [UNITS], 0, 1)
    sink.thread.digest(2, [0], 0, 17)
    assert isinstance(sink.event(), DigestFailed)
    assert isinstance(sink.event(), DigestFailed)
    sink.thread.probe("nobody#00", PageRun(0, 1), PageRun(0, 1))
    sink.thread.probe("source#02", PageRun(0, 2), PageRun(0, 1))
    assert isinstance(sink.event(), ProbeFailed)
    assert isinstance(sink.event(), ProbeFailed)
    sink.thread.abandon(99)
    sink.thread.fence([99])
    sink.thread.disconnect("nobody#00")
    sink.thread.disconnect("source#02")
    sink.thread.read(4, "source#02", one, one)
    assert isinstance(sink.event(), ReadFailed)
    assert sink.thread.close()
    assert sink.event() == Closed()


def test_idling_costs_under_two_percent_of_a_core(owners):
    time.sleep(1.1)  # until the boost of connecting is over
    before = [owner.thread.cpu_s for owner in owners]
    started = time.monotonic()
    time.sleep(0.8)
    seconds = time.monotonic() - started
    for owner, cpu_s in zip(owners, before, strict=True):
        assert 0 < owner.thread.cpu_s - cpu_s < 0.02 * seconds


@pytest.mark.parametrize("kind", ["inprocess", "zeromq"])
@pytest.mark.parametrize(
    "call",
    [
        lambda thread, job: thread.digest(job, [0], 0, 16),
        lambda thread, job: thread.pull(job, "nobody#00", [PageRun(0, 1)], [PageRun(0, 1)], 0, 16),
        lambda thread, job: thread.read(job, "nobody#00", [PageRun(0, 1)], [PageRun(0, 1)]),
    ],
    ids=["digest", "pull", "read"],
)
def test_a_call_wakes_the_idle_thread_at_once(monkeypatch, kind, call):
    """With an idle rhythm of minutes, an answer can only come from being woken."""
    monkeypatch.setattr("transfer.thread.IDLE_S", 300.0)
    owner = Owner("one#01", lambda: make(kind, "one#01"))
    owner.opened()
    for job in range(1, 4):
        time.sleep(0.03)
        call(owner.thread, job)
        assert isinstance(owner.event(), Digested | ReadFailed)
    assert owner.thread.close()


def test_reads_pass_long_digests():
    """A digest over the whole arena many times does not hold a small read up."""
    source = Owner("source#02", lambda: InProcess("source#02"), seed=3)
    sink = Owner("sink#01", lambda: InProcess("sink#01"))
    sink.opened()
    sink.thread.connect("source#02", source.opened())
    assert isinstance(sink.event(), Connected)
    sink.thread.digest(1, list(range(UNITS)) * 50, 0, UNITS * 50 * 16)
    sink.thread.read(1, "source#02", [PageRun(0, 1)], [PageRun(1, 1)])
    assert isinstance(sink.event(), ReadDone)
    assert isinstance(sink.event(), Digested)
    for owner in (sink, source):
        assert owner.thread.close()


def test_a_transport_that_cannot_be_made():
    def broken() -> Transport:
        raise RemoteError("no lane today")

    owner = Owner("one#01", broken)
    assert owner.event() == OpenFailed("no lane today")
    assert owner.thread.close()


def test_a_broken_lane_is_told_with_its_attempt_and_one_that_is_made_anew_has_its_own():
    rules = Rules([Rule("read", "break")])
    sink = Owner("sink#01", lambda: Faulty(InProcess("sink#01"), rules))
    source = Owner("source#02", lambda: InProcess("source#02"), seed=3)
    sink.opened()
    metadata = source.opened()
    for attempt in (7, 9):
        sink.thread.disconnect("source#02")
        sink.thread.connect("source#02", metadata, attempt)
        sink.thread.probe("source#02", PageRun(0, 1), PageRun(0, 1))
        assert isinstance(sink.event(), Connected)
        lane = sink.measured()
        assert lane.attempt == attempt
        sink.thread.pull(attempt, "source#02", [PageRun(0, 1)], [PageRun(1, 1)], 0, 16)
        end = sink.event()
        if attempt == 9:
            assert isinstance(end, Pulled)
            break
        assert isinstance(end, ReadFailed)
        assert sink.event() == LaneBroke("source#02", "the lane was broken", attempt)
    for owner in (sink, source):
        assert owner.thread.close()


def test_a_disconnect_ends_a_probe_at_once_and_the_next_one_is_another():
    """Without that, a lane that is dropped and made anew in one breath would share the old probe."""

    class Silent(InProcess):
        def poll(self):
            if "source#02" in self._peers and self._peers["source#02"] is self.first:
                ended, self._ended = list(self._ended), deque()
                return ended
            return super().poll()

        first = None

        def connect(self, peer, metadata):
            super().connect(peer, metadata)
            self.first = self.first or self._peers[peer]

    sink = Owner("sink#01", lambda: Silent("sink#01"))
    source = Owner("source#02", lambda: InProcess("source#02"), seed=3)
    sink.opened()
    metadata = source.opened()
    for attempt in (1, 2):
        sink.thread.disconnect("source#02")
        sink.thread.connect("source#02", metadata, attempt)
        sink.thread.probe("source#02", PageRun(0, 1), PageRun(0, 1))
    events = [sink.event() for _ in range(3)]
    assert [type(event) for event in events] == [Connected, ProbeFailed, Connected]
    assert events[1] == ProbeFailed("source#02", "disconnected", attempt=1)
    assert sink.measured().attempt == 2
    for owner in (sink, source):
        assert owner.thread.close()


def test_digests_without_a_shape_are_refused():
    owner = Owner("one#01", lambda: InProcess("one#01"), kv=None)
    owner.opened()
    owner.thread.digest(1, [0], 0, 1)
    assert isinstance(owner.event(), DigestFailed)
    assert owner.thread.close()


def test_a_broken_thread_is_heard_of():
    class Broken(InProcess):
        def poll(self):
            raise ValueError("broken")

    owner = Owner("one#01", lambda: Broken("one#01"))
    owner.opened()
    assert owner.event() == Closed("ValueError: broken")
    assert owner.thread.close()


@pytest.mark.skipif(nixl.available() is not None, reason=f"needs NIXL: {nixl.available()}")
def test_a_probe_of_a_hung_peer_leaves_its_scratch_pages_in_doubt_until_fenced(monkeypatch):
    monkeypatch.setattr("transfer.thread.PROBE_ANSWER_S", 0.2)
    child = Child("nixl", "child#01", 3, KV.page_nbytes, UNITS, {"UCX_TLS": "tcp"})
    sink = Owner("sink#02", lambda: make("nixl", "sink#02"))
    try:
        sink.opened()
        sink.thread.connect("child#01", child.metadata())
        assert isinstance(sink.event(), Connected)
        sink.thread.probe("child#01", PageRun(0, 2), PageRun(0, 2))
        lane = sink.measured()
        assert lane.transports.endswith("emulated")
        child.send(signal.SIGSTOP)
        sink.thread.probe("child#01", PageRun(4, 2), PageRun(0, 2))
        end = sink.event()
        assert isinstance(end, ProbeFailed), end
        assert (end.reason, end.doubtful) == ("no answer", PageRun(4, 2))
        sink.thread.fence([end.read_id])
        assert sink.event() == ReadFenced(end.read_id)
    finally:
        child.end()
        assert sink.thread.close()
