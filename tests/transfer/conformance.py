"""What every transport must do: one suite, run over each of them by test_conformance.py.

A test class names its `kind`; `in_doubt` says whether a read that was given up can land later. Peers of the same
process are polled by the test; peers that must die or hang are real child processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import LocalError, RemoteError
from core.kv import KvShape, PageRun, page_runs
from tests.transfer.peer import arena, make, pattern
from transfer.plan import Layout, copy, reshard, spans
from transfer.transport import Card, Completion, ReadDone, ReadFailed, ReadFenced, Span, Transport

UNIT = 12_288
UNITS = 64
ROOT = Path(__file__).parents[2]


class Worker:
    """A transport with its arena, in this process."""

    def __init__(self, kind: str, owner: str, seed: int | None = None, unit: int = UNIT, units: int = UNITS, **options):
        self.owner = owner
        self.unit, self.units = unit, units
        self.memory = arena(units, unit, seed)
        self.bytes = np.frombuffer(self.memory, dtype=np.uint8).reshape(units, unit)
        self.transport: Transport = make(kind, owner, **options)
        self.transport.register(self.memory, unit)
        self.next_id = 1

    def read(self, peer: str, source: Sequence[PageRun], target: Sequence[PageRun], nbytes: int | None = None) -> int:
        read_id, self.next_id = self.next_id, self.next_id + 1
        self.transport.read(read_id, peer, source, target, nbytes)
        return read_id


class Child:
    """A peer process; killed at the end of the test whatever happens."""

    def __init__(self, kind: str, owner: str, seed: int, unit: int, units: int, env: dict[str, str] | None = None):
        command = [sys.executable, "-m", "tests.transfer.peer", kind, owner, str(unit), str(units), str(seed)]
        self.owner = owner
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, **(env or {})}
        )

    def metadata(self) -> bytes:
        assert self.process.stdout is not None
        return bytes.fromhex(self.process.stdout.readline().decode())

    def send(self, sign: signal.Signals) -> None:
        self.process.send_signal(sign)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def drive(*workers: Worker, want: int = 1, timeout_s: float = 5.0) -> list[Completion]:
    """Poll all workers until the first one has reported `want` completions."""
    found: list[Completion] = []
    end = time.monotonic() + timeout_s
    while len(found) < want and time.monotonic() < end:
        found += workers[0].transport.poll()
        for other in workers[1:]:
            other.transport.poll()
        time.sleep(0.0002)
    return found


def quiet(worker: Worker, seconds: float) -> list[Completion]:
    """What a worker reports within so long; hopefully nothing."""
    return drive(worker, want=10**9, timeout_s=seconds)


def failed(completion: Completion) -> ReadFailed:
    assert isinstance(completion, ReadFailed), completion
    return completion


@st.composite
def reads(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Source pages (repeats allowed) and as many different target pages, both with neighbours."""

    def pages(unique: bool) -> list[int]:
        found: list[int] = []
        for start, count in draw(st.lists(st.tuples(st.integers(0, UNITS - 1), st.integers(1, 12)), min_size=1)):
            found += [p for p in range(start, min(start + count, UNITS)) if not (unique and p in found)]
        return found

    source, target = pages(False), pages(True)
    count = min(len(source), len(target))
    return source[:count], target[:count]


class Conformance:
    """What holds within one process; subclasses set `kind`."""

    kind = ""

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls) -> Iterator[tuple[Worker, Worker]]:
        sink, source = Worker(cls.kind, "sink#0a"), Worker(cls.kind, "source#0b", seed=1)
        sink.transport.connect("source#0b", source.transport.metadata())
        yield sink, source
        sink.transport.close()
        source.transport.close()

    @pytest.fixture
    def workers(self) -> Iterator[list[Worker]]:
        """Append what you make; it is closed."""
        made: list[Worker] = []
        yield made
        for worker in made:
            worker.transport.close()

    @given(reads())
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def test_any_pages_arrive_and_nothing_else_changes(self, pair, pages):
        sink, source = pair
        theirs, ours = pages
        sink.bytes[:] = 0xEE
        read_id = sink.read(source.owner, page_runs(theirs), page_runs(ours))
        (done,) = drive(sink, source)
        assert isinstance(done, ReadDone), done
        assert (done.read_id, done.nbytes) == (read_id, len(ours) * UNIT)
        assert done.seconds > 0
        want = np.full_like(sink.bytes, 0xEE)
        want[ours] = source.bytes[theirs]
        assert np.array_equal(sink.bytes, want)

    @given(st.integers(1, 8 * UNIT))
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    def test_only_the_first_bytes_of_the_run(self, pair, nbytes):
        sink, source = pair
        sink.bytes[:] = 0xEE
        sink.read(source.owner, [PageRun(3, 8)], [PageRun(40, 5), PageRun(20, 3)], nbytes)
        (done,) = drive(sink, source)
        assert isinstance(done, ReadDone), done
        assert done.nbytes == nbytes
        ours = np.concatenate([sink.bytes[40:45].ravel(), sink.bytes[20:23].ravel()])
        assert np.array_equal(ours[:nbytes], source.bytes[3:11].ravel()[:nbytes])
        assert (ours[nbytes:] == 0xEE).all()

    def test_many_reads_at_once_all_end_once(self, pair):
        sink, source = pair
        ids = [sink.read(source.owner, [PageRun(63 - i, 1)], [PageRun(i, 1)]) for i in range(UNITS)]
        assert sink.transport.busy
        found = drive(sink, source, want=UNITS)
        assert sorted(done.read_id for done in found) == ids
        assert all(isinstance(done, ReadDone) for done in found)
        assert np.array_equal(sink.bytes, source.bytes[::-1])
        assert sink.transport.in_doubt() == frozenset()

    def test_ten_thousand_small_reads(self, workers):
        """Each ends once, and the memory of one read is not that of another."""
        unit, units = 512, 2048
        sink, source = (Worker(self.kind, name, seed=9, unit=unit, units=units) for name in ("sink#01", "source#02"))
        workers += [sink, source]
        sink.transport.connect(source.owner, source.transport.metadata())
        sink.bytes[:] = 0
        ends: list[Completion] = []
        ids = []
        for number in range(10_000):
            page = number % units
            ids.append(sink.read(source.owner, [PageRun(units - 1 - page, 1)], [PageRun(page, 1)]))
            if number % 500 == 499:
                ends += drive(sink, source, want=number + 1 - len(ends))
        assert sorted(end.read_id for end in ends) == ids
        assert all(isinstance(end, ReadDone) for end in ends)
        assert np.array_equal(sink.bytes, source.bytes[::-1])
        assert not sink.transport.busy

    def test_reads_of_one_peer_end_in_order(self, pair):
        sink, source = pair
        ids = [sink.read(source.owner, [PageRun(0, 4)], [PageRun(4 * i, 4)]) for i in range(8)]
        assert [done.read_id for done in drive(sink, source, want=8)] == ids

    def test_a_read_larger_than_a_piece(self, workers):
        sink = Worker(self.kind, "sink#01", unit=5 << 20, units=9)
        source = Worker(self.kind, "source#02", seed=4, unit=5 << 20, units=9)
        workers += [sink, source]
        sink.transport.connect(source.owner, source.transport.metadata())
        sink.read(source.owner, [PageRun(1, 8)], [PageRun(4, 5), PageRun(0, 3)])
        (done,) = drive(sink, source)
        assert isinstance(done, ReadDone), done
        assert done.nbytes == 40 << 20
        assert np.array_equal(sink.bytes[4:9], source.bytes[1:6])
        assert np.array_equal(sink.bytes[0:3], source.bytes[6:9])

    def test_several_peers_and_both_directions(self, workers):
        sink = Worker(self.kind, "sink#01", seed=9)
        peers = [Worker(self.kind, f"peer{i}#0{i}", seed=20 + i) for i in range(4)]
        workers += [sink, *peers]
        for peer in peers:
            sink.transport.connect(peer.owner, peer.transport.metadata())
        for i, peer in enumerate(peers):
            sink.read(peer.owner, [PageRun(0, 8)], [PageRun(8 * i, 8)])
        assert all(isinstance(done, ReadDone) for done in drive(sink, *peers, want=4))
        for i in range(4):
            for page in range(8):
                assert np.array_equal(sink.bytes[8 * i + page], pattern(20 + i, page, UNIT))
        peers[2].transport.connect(sink.owner, sink.transport.metadata())
        peers[2].read(sink.owner, [PageRun(60, 4)], [PageRun(0, 4)])
        (done,) = drive(peers[2], sink)
        assert isinstance(done, ReadDone), done
        assert np.array_equal(peers[2].bytes[:4], sink.bytes[60:])

    def test_local_misuse_raises_and_changes_nothing(self, pair):
        sink, source = pair
        transport = sink.transport
        sink.bytes[:] = 0xEE
        one = [PageRun(0, 1)]
        with pytest.raises(LocalError, match="not connected"):
            transport.read(900, "nobody#00", one, one)
        with pytest.raises(LocalError, match="connected already"):
            transport.connect(source.owner, source.transport.metadata())
        with pytest.raises(LocalError, match="not connected"):
            transport.disconnect("nobody#00")
        with pytest.raises(LocalError, match="one"):
            transport.register(arena(1, UNIT), UNIT)
        for source_runs, target_runs, nbytes in (
            ([PageRun(0, 2)], one, None),
            (one, [PageRun(0, 2)], None),
            ([], [], None),
            (one, [PageRun(UNITS, 1)], None),
            (one, [PageRun(-1, 1)], None),
            (one, [PageRun(0, 0)], None),
            (one, one, 0),
            (one, one, UNIT + 1),
        ):
            with pytest.raises(LocalError):
                transport.read(901, source.owner, source_runs, target_runs, nbytes)
        transport.read(902, source.owner, one, one)
        with pytest.raises(LocalError, match="902"):
            transport.read(902, source.owner, one, one)
        assert [done.read_id for done in drive(sink, source)] == [902]
        assert (sink.bytes[1:] == 0xEE).all()
        transport.abandon(902)
        transport.fence([902, 77])
        assert transport.poll() == []

    def test_pages_the_peer_does_not_have_are_refused(self, pair):
        sink, source = pair
        for run in (PageRun(UNITS, 1), PageRun(UNITS - 1, 2), PageRun(-1, 1)):
            with pytest.raises(RemoteError, match=f"at {source.owner}"):
                sink.transport.read(910, source.owner, [run], [PageRun(0, run.count)])

    @pytest.mark.parametrize(("source_tp", "sink_tp"), [(2, 4), (4, 2), (1, 1)])
    def test_the_ranges_of_a_peer_that_is_cut_in_another_way(self, workers, source_tp, sink_tp):
        """Each rank of a sink reads its share of pages of 16 tokens into pages of 64."""
        shape = KvShape(layers=3, kv_heads=4, head_dim=24, page_tokens=16, dtype="bfloat16")
        layouts = Layout(shape, source_tp), Layout(replace(shape, page_tokens=64), sink_tp)
        givers, takers = (
            [
                Worker(self.kind, f"{side}{shard.rank}#01", seed, shard.shape.page_nbytes, 24)
                for shard in layout.shards()
            ]
            for side, layout, seed in zip(("giver", "taker"), layouts, (7, None), strict=True)
        )
        workers += givers + takers
        tables = [9, 10, 11, 4, 20, 21, 2, 3, 0], [5, 17, 1]
        for shard, giver in zip(layouts[0].shards(), givers, strict=True):
            giver.bytes[:] = np.roll(giver.bytes, shard.rank)
        for taker, ranges in zip(takers, reshard(*layouts, *tables, 0, 141), strict=True):
            want = taker.bytes.copy()
            for giver_rank, giver in enumerate(givers):
                mine = [each for each in ranges if each.rank == giver_rank]
                if mine:
                    taker.transport.connect(giver.owner, giver.transport.metadata())
                    taker.transport.read_spans(giver_rank + 1, giver.owner, spans(mine))
                    copy(mine, giver.bytes, want)
            count = len({each.rank for each in ranges})
            found = drive(taker, *givers, want=count)
            assert sum(done.nbytes for done in found if isinstance(done, ReadDone)) == sum(
                each.total_nbytes for each in ranges
            )
            assert len(found) == count
            assert np.array_equal(taker.bytes, want)
            assert taker.bytes.any()

    def test_bytes_that_nobody_has_are_refused(self, pair):
        sink, source = pair
        end = UNIT * UNITS
        for bad, error, match in (
            ([], LocalError, "spans"),
            ([Span(0, 0, 0)], LocalError, "spans"),
            ([Span(0, 8, 8), Span(0, end - 7, 8)], LocalError, "target bytes"),
            ([Span(0, -1, 8)], LocalError, "target bytes"),
            ([Span(0, 8, 8), Span(end - 7, 0, 8)], RemoteError, f"source bytes at {source.owner}"),
            ([Span(-1, 0, 8)], RemoteError, f"source bytes at {source.owner}"),
        ):
            with pytest.raises(error, match=match):
                sink.transport.read_spans(920, source.owner, bad)
        sink.bytes[:] = 0xEE
        sink.transport.read_spans(921, source.owner, [Span(end - 5, 3, 5), Span(1, 0, 2)])
        with pytest.raises(LocalError, match="921"):
            sink.transport.read_spans(921, source.owner, [Span(0, 0, 8)])
        (done,) = drive(sink, source)
        assert isinstance(done, ReadDone), done
        ours, theirs = sink.bytes.ravel(), source.bytes.ravel()
        assert ours[:9].tolist() == [*theirs[1:3], 0xEE, *theirs[-5:], 0xEE]

    def test_whole_pages_are_read_of_equal_pages_only(self, pair, workers):
        sink, _ = pair
        other = Worker(self.kind, "other#07", 1, unit=UNIT * 2, units=2)
        workers.append(other)
        sink.transport.connect(other.owner, other.transport.metadata())
        with pytest.raises(RemoteError, match=f"lane to other#07: got pages of {UNIT * 2} bytes, want {UNIT}"):
            sink.transport.read(930, other.owner, [PageRun(0, 1)], [PageRun(0, 1)])
        sink.transport.disconnect(other.owner)

    def test_foreign_metadata_is_refused_with_the_reason(self, pair, workers):
        sink, _ = pair
        other = Worker(self.kind, "other#01", unit=UNIT * 2, units=2)
        workers.append(other)
        metadata = other.transport.metadata()
        card = Card.decode(metadata)
        unlike = Card("pigeon", card.owner, card.base, card.unit_nbytes, card.units, card.token, card.body)
        for name, bad, reason in (
            ("other#02", metadata, "metadata of other#01"),
            ("other#01", unlike.encode(), "pigeon"),
            ("other#01", metadata[:-1], "bytes"),
            ("other#01", metadata + b"x", "bytes"),
            ("other#01", b"", "bytes"),
            ("other#01", b"BTNL" + bytes(60), "version 0"),
        ):
            with pytest.raises(RemoteError, match=reason):
                sink.transport.connect(name, bad)
        assert sink.transport.transports("other#01") == "not connected"

    def test_a_new_incarnation_replaces_the_old(self, workers):
        sink = Worker(self.kind, "sink#01")
        old = Worker(self.kind, "source#02", seed=5)
        workers.append(sink)
        sink.transport.connect(old.owner, old.transport.metadata())
        sink.read(old.owner, [PageRun(0, 1)], [PageRun(0, 1)])
        assert len(drive(sink, old)) == 1
        stale = old.transport.metadata()
        old.transport.close()
        new = Worker(self.kind, "source#03", seed=6)
        workers.append(new)
        with pytest.raises(RemoteError, match="metadata of source#02"):
            sink.transport.connect("source#03", stale)
        sink.transport.disconnect("source#02")
        sink.transport.connect("source#03", new.transport.metadata())
        sink.read("source#03", [PageRun(7, 1)], [PageRun(1, 1)])
        (done,) = drive(sink, new)
        assert isinstance(done, ReadDone), done
        assert np.array_equal(sink.bytes[1], pattern(6, 7, UNIT))
        with pytest.raises(LocalError):
            sink.read("source#02", [PageRun(0, 1)], [PageRun(0, 1)])

    def test_the_same_peer_can_come_back(self, pair):
        sink, source = pair
        sink.transport.disconnect(source.owner)
        sink.transport.connect(source.owner, source.transport.metadata())
        sink.read(source.owner, [PageRun(5, 2)], [PageRun(0, 2)])
        (done,) = drive(sink, source)
        assert isinstance(done, ReadDone), done
        assert np.array_equal(sink.bytes[:2], source.bytes[5:7])
        assert sink.transport.transports(source.owner) not in ("", "not connected")

    def test_disconnecting_ends_unfinished_reads(self, workers):
        sink, source = Worker(self.kind, "sink#01"), Worker(self.kind, "source#02", seed=5)
        workers += [sink, source]
        sink.transport.connect(source.owner, source.transport.metadata())
        ids = [sink.read(source.owner, [PageRun(0, 4)], [PageRun(4 * i, 4)]) for i in range(3)]
        sink.transport.disconnect(source.owner)
        found = drive(sink, want=3)
        assert [failed(end).read_id for end in found if not isinstance(end, ReadFenced)] == ids
        assert sink.transport.in_doubt() == frozenset()

    def test_nothing_of_a_dropped_lane_is_believed_of_the_one_that_is_made_anew(self, workers):
        """Its reads end as failures, land nowhere once they are fenced, and none of it says that the new one broke."""
        sink, source = Worker(self.kind, "sink#01"), Worker(self.kind, "source#02", seed=5)
        workers += [sink, source]
        sink.bytes[:] = 0x55
        for _ in range(3):
            sink.transport.connect(source.owner, source.transport.metadata())
            old = [sink.read(source.owner, [PageRun(0, 8)], [PageRun(8 * i, 8)]) for i in range(4)]
            sink.transport.disconnect(source.owner)
            sink.transport.connect(source.owner, source.transport.metadata())
            sink.transport.fence(old)
            ends = drive(sink, source, want=4)
            ends += quiet(sink, 0.05)
            assert sorted(end.read_id for end in ends if isinstance(end, ReadFailed)) == old
            assert {end.read_id for end in ends} == {*old}
            assert not [end for end in ends if isinstance(end, ReadDone)]
            assert sink.transport.in_doubt() == frozenset()
            sink.bytes[:] = 0x66
            new = sink.read(source.owner, [PageRun(5, 2)], [PageRun(40, 2)])
            (done,) = drive(sink, source)
            assert isinstance(done, ReadDone), done
            assert done.read_id == new
            assert np.array_equal(sink.bytes[40:42], source.bytes[5:7])
            assert (sink.bytes[:40] == 0x66).all()
            assert (sink.bytes[42:] == 0x66).all()
            assert sink.transport.broken() == []
            sink.transport.disconnect(source.owner)

    def test_a_read_that_is_given_up_or_refused_breaks_no_lane(self, pair):
        sink, source = pair
        given_up = sink.read(source.owner, [PageRun(0, 8)], [PageRun(0, 8)])
        sink.transport.abandon(given_up)
        sink.transport.fence([given_up])
        failed(drive(sink, source)[0])
        with pytest.raises(RemoteError):
            sink.transport.read(990, source.owner, [PageRun(UNITS, 1)], [PageRun(0, 1)])
        quiet(sink, 0.05)
        sink.read(source.owner, [PageRun(3, 1)], [PageRun(9, 1)])
        assert isinstance(drive(sink, source)[0], ReadDone)
        assert sink.transport.broken() == []

    def test_closing_is_final_and_can_be_repeated(self):
        sink, source = Worker(self.kind, "sink#01"), Worker(self.kind, "source#02", seed=5)
        sink.transport.connect(source.owner, source.transport.metadata())
        sink.read(source.owner, [PageRun(0, 4)], [PageRun(0, 4)])
        for worker in (sink, source):
            worker.transport.close()
            worker.transport.close()
            assert worker.transport.poll() == []
        with pytest.raises(LocalError):
            sink.transport.metadata()


class Deaths(Conformance):
    """The suite with peers that are processes of their own; `doubts`: an abandoned read can land."""

    doubts = False
    child_env: dict[str, str] | None = None

    @pytest.fixture
    def children(self) -> Iterator[list[Child]]:
        """Append what you start; it is killed."""
        started: list[Child] = []
        yield started
        for child in started:
            child.end()

    def test_a_killed_peer_fails_reads_in_time_and_disturbs_nobody(self, workers, children):
        """Killed between reads and in the middle of one; the other peer goes on."""
        unit, units = 1 << 20, 48
        children += [Child(self.kind, f"child{i}#0{i}", i, unit, units, self.child_env) for i in range(3)]
        sink = Worker(self.kind, "sink#0f", unit=unit, units=units)
        workers.append(sink)
        for child in children:
            sink.transport.connect(child.owner, child.metadata())
            sink.read(child.owner, [PageRun(0, 1)], [PageRun(0, 1)])
            assert isinstance(drive(sink)[0], ReadDone)
        idle, busy, alive = children
        idle.send(signal.SIGKILL)
        idle.process.wait()
        busy.send(signal.SIGSTOP)
        started = time.monotonic()
        before = sink.read(idle.owner, [PageRun(0, 4)], [PageRun(0, 4)])
        during = sink.read(busy.owner, [PageRun(0, 16)], [PageRun(4, 16)])
        ends = {end.read_id: end for end in quiet(sink, 0.1)}
        busy.send(signal.SIGKILL)
        while len(ends) < 2 and time.monotonic() - started < 20:
            ends.update({end.read_id: end for end in sink.transport.poll()})
            time.sleep(0.0005)
        assert time.monotonic() - started < 15, "a death is noticed long before any deadline"
        assert failed(ends[before]).in_doubt is False
        if self.kind == "zeromq" or self.child_env:  # over CMA all was read while the peer was stopped
            assert failed(ends[during]).in_doubt is False
            assert failed(ends[during]).reason
        sink.read(alive.owner, [PageRun(0, 16)], [PageRun(20, 16)])
        (done,) = drive(sink)
        assert isinstance(done, ReadDone), done
        assert np.array_equal(sink.bytes[20], pattern(2, 0, unit))
        again = sink.read(idle.owner, [PageRun(0, 1)], [PageRun(0, 1)])
        assert failed(drive(sink)[0]).read_id == again
        broken = dict(sink.transport.broken())
        assert idle.owner in broken
        assert alive.owner not in broken
        assert all(broken.values()), "each with a reason"
        assert sink.transport.broken() == [], "told once"
        for child in (idle, busy):
            sink.transport.disconnect(child.owner)
        assert sink.transport.in_doubt() == frozenset()

    def test_a_stopped_peer_delays_no_other(self, workers, children):
        """Reads of seven peers end while those of an eighth, posted before them, hang."""
        unit, units = 1 << 16, 32
        tcp = {"UCX_TLS": "tcp"}
        children += [Child(self.kind, f"child{i}#0{i}", i, unit, units, tcp) for i in range(8)]
        sink = Worker(self.kind, "sink#0f", unit=unit, units=8 * units)
        workers.append(sink)
        for child in children:
            sink.transport.connect(child.owner, child.metadata())
            sink.read(child.owner, [PageRun(0, 1)], [PageRun(0, 1)])
            assert isinstance(drive(sink)[0], ReadDone)
        stopped = children[3]
        stopped.send(signal.SIGSTOP)
        hung = sink.read(stopped.owner, [PageRun(0, units)], [PageRun(3 * units, units)])
        others = [i for i in range(8) if i != 3]
        ids = [sink.read(children[i].owner, [PageRun(0, units)], [PageRun(i * units, units)]) for i in others]
        ends = drive(sink, want=7)
        assert sorted(end.read_id for end in ends) == ids
        assert all(isinstance(end, ReadDone) for end in ends)
        for i in others:
            assert np.array_equal(sink.bytes[(i + 1) * units - 1], pattern(i, units - 1, unit))
        stopped.send(signal.SIGCONT)
        (end,) = drive(sink)
        assert end.read_id == hung

    def test_a_peer_that_died_before_the_first_read(self, workers, children):
        children.append(Child(self.kind, "child#01", 3, UNIT, 8))
        metadata = children[0].metadata()
        children[0].send(signal.SIGKILL)
        children[0].process.wait()
        sink = Worker(self.kind, "sink#02")
        workers.append(sink)
        started = time.monotonic()
        try:
            sink.transport.connect("child#01", metadata)
        except RemoteError:  # lanes over shared memory see it here already
            assert sink.transport.transports("child#01") == "not connected"
        else:
            sink.read("child#01", [PageRun(0, 1)], [PageRun(0, 1)])
            assert failed(drive(sink)[0]).in_doubt is False
        assert time.monotonic() - started < 15, "a death is noticed long before any deadline"

    @pytest.mark.parametrize("fenced", [True, False])
    def test_an_abandoned_read_never_lands_behind_a_fence(self, workers, children, fenced):
        """The peer hangs, the read is given up, its pages get another owner, the peer comes back."""
        unit, units = 1 << 20, 64
        children.append(Child(self.kind, "child#01", 3, unit, units, {"UCX_TLS": "tcp"}))
        (child,) = children
        sink = Worker(self.kind, "sink#0f", unit=unit, units=units)
        workers.append(sink)
        sink.transport.connect(child.owner, child.metadata())
        sink.read(child.owner, [PageRun(0, 1)], [PageRun(0, 1)])
        assert isinstance(drive(sink)[0], ReadDone)
        child.send(signal.SIGSTOP)
        sink.bytes[:] = 0x55
        read_id = sink.read(child.owner, [PageRun(0, 32)], [PageRun(0, 32)])
        assert quiet(sink, 0.1) == []
        sink.transport.abandon(read_id)
        end = failed(drive(sink)[0])
        assert (end.read_id, end.in_doubt) == (read_id, self.doubts)
        assert sink.transport.in_doubt() == ({read_id} if self.doubts else set())
        assert quiet(sink, 0.2) == [], "time is no fence"
        if fenced:
            sink.transport.fence([read_id])
            assert drive(sink, timeout_s=0.1) == ([ReadFenced(read_id)] if self.doubts else [])
            assert sink.transport.in_doubt() == frozenset()
        sink.bytes[:] = 0x66  # the new owner's bytes
        child.send(signal.SIGCONT)
        later = quiet(sink, 0.5)
        overwritten = int((sink.bytes != 0x66).any(axis=1).sum())
        if fenced or not self.doubts:
            assert overwritten == 0
            assert later == []
        else:
            assert overwritten == 32, "the danger that the fence exists for; if this fails, it has gone"
            assert later == [ReadFenced(read_id)], "a late end ends the doubt"
