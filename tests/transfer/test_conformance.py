"""The conformance suite over every transport, and what only NIXL has: agents that are shared and replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from core.errors import LocalError
from core.kv import PageRun
from tests.transfer.conformance import UNIT, Child, Conformance, Deaths, Worker, drive, failed, quiet
from tests.transfer.peer import pattern
from tests.transfer.sever import connections, sever
from transfer import nixl
from transfer.inprocess import Exchange, InProcess
from transfer.transport import Completion, ReadDone, ReadFailed, ReadFenced

needs_nixl = pytest.mark.skipif(nixl.available() is not None, reason=f"needs NIXL: {nixl.available()}")


class TestInProcess(Conformance):
    kind = "inprocess"

    def test_an_owner_that_is_gone_fails_the_read(self, workers):
        sink, source = Worker(self.kind, "sink#01"), Worker(self.kind, "source#02", seed=5)
        workers.append(sink)
        sink.transport.connect(source.owner, source.transport.metadata())
        source.transport.close()
        sink.read(source.owner, [PageRun(0, 1)], [PageRun(0, 1)])
        assert failed(drive(sink)[0]).reason == "source#02 is gone"
        assert sink.transport.broken() == [("source#02", "source#02 is gone")]
        sink.read(source.owner, [PageRun(0, 1)], [PageRun(0, 1)])
        failed(drive(sink)[0])
        assert sink.transport.broken() == [], "told once"

    def test_exchanges_are_apart(self):
        one = InProcess("one#01", Exchange())
        assert one.name == "inprocess"


class TestZeroMq(Deaths):
    kind = "zeromq"

    def test_a_hung_peer_is_lost_by_its_missing_heartbeats(self, workers, children):
        children.append(Child(self.kind, "child#01", 3, UNIT, 8))
        sink = Worker(self.kind, "sink#02")
        workers.append(sink)
        metadata = children[0].metadata()
        sink.transport.connect("child#01", metadata)
        sink.read("child#01", [PageRun(0, 1)], [PageRun(0, 1)])
        assert isinstance(drive(sink)[0], ReadDone)
        children[0].send(signal.SIGSTOP)
        sink.read("child#01", [PageRun(0, 8)], [PageRun(0, 8)])
        end = failed(drive(sink, timeout_s=3)[0])
        assert not end.in_doubt
        assert "connection ended" in end.reason
        assert sink.transport.broken() == [("child#01", end.reason)]
        assert sink.transport.broken() == [], "told once"
        sink.read("child#01", [PageRun(0, 1)], [PageRun(0, 1)])
        assert failed(drive(sink)[0]).reason == end.reason, "it stays broken"
        children[0].send(signal.SIGCONT)
        sink.transport.disconnect("child#01")
        sink.transport.connect("child#01", metadata)
        sink.read("child#01", [PageRun(3, 4)], [PageRun(4, 4)])
        (done,) = drive(sink)
        assert isinstance(done, ReadDone), done
        assert np.array_equal(sink.bytes[4], pattern(3, 3, UNIT))
        assert sink.transport.broken() == []


@needs_nixl
class TestNixl(Deaths):
    kind = "nixl"
    doubts = True

    def test_a_peer_killed_in_the_middle_of_a_read_over_tcp(self, workers, children):
        self.child_env = {"UCX_TLS": "tcp"}
        self.test_a_killed_peer_fails_reads_in_time_and_disturbs_nobody(workers, children)

    @pytest.mark.parametrize("agents", [1, 16])
    def test_a_lane_whose_connections_break_is_made_anew(self, workers, children, agents):
        """Both sides live on. With one agent for all, the other peer's lane is in it, too."""
        unit, units = 1 << 20, 16
        tcp = {"UCX_TLS": "tcp"}
        children += [Child(self.kind, f"child{i}#0{i}", i, unit, units, tcp) for i in range(2)]
        sink = Worker(self.kind, "sink#0f", unit=unit, units=units, agents=agents)
        workers.append(sink)
        metadata = {child.owner: child.metadata() for child in children}
        first, other = children
        sink.transport.connect(other.owner, metadata[other.owner])
        sink.read(other.owner, [PageRun(0, 1)], [PageRun(0, 1)])
        assert isinstance(drive(sink)[0], ReadDone)
        before = {*connections(os.getpid())}
        sink.transport.connect(first.owner, metadata[first.owner])
        for _ in range(2):
            sink.read(first.owner, [PageRun(1, 1)], [PageRun(1, 1)])
            assert isinstance(drive(sink)[0], ReadDone)
            assert sink.transport.broken() == []
            assert sever(os.getpid(), lambda fd, ends: fd not in before)
            end = failed(self.fails(sink, first.owner))
            assert not end.in_doubt
            ((peer, reason),) = sink.transport.broken()
            assert (peer, reason) == (first.owner, end.reason)
            for page in (2, 3):
                sink.read(first.owner, [PageRun(page, 1)], [PageRun(page, 1)])
                assert failed(drive(sink)[0]).reason == reason, "it stays broken"
            assert sink.transport.broken() == [], "told once"
            sink.read(other.owner, [PageRun(4, 1)], [PageRun(4, 1)])
            assert isinstance(drive(sink)[0], ReadDone), "another peer's lane does not care"
            sink.transport.disconnect(first.owner)
            sink.transport.connect(first.owner, metadata[first.owner])
        sink.read(first.owner, [PageRun(5, 8)], [PageRun(5, 8)])
        assert isinstance(drive(sink)[0], ReadDone)
        assert np.array_equal(sink.bytes[12], pattern(0, 12, unit))
        assert sink.transport.broken() == []

    @staticmethod
    def fails(sink: Worker, peer: str) -> Completion:
        """The first read that fails; one may have been over before the end of its connection was seen."""
        for _ in range(20):
            sink.read(peer, [PageRun(0, 8)], [PageRun(8, 8)])
            (end,) = drive(sink)
            if isinstance(end, ReadFailed):
                break
        return end

    def test_calls_of_another_thread_are_refused(self, pair):
        errors: list[Exception] = []

        def call() -> None:
            try:
                pair[0].transport.poll()
            except LocalError as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        assert "another thread" in str(errors)

    def test_more_peers_than_agents(self, workers):
        sink = Worker(self.kind, "sink#01", agents=2)
        peers = [Worker(self.kind, f"peer{i}#0{i}", seed=40 + i) for i in range(5)]
        workers += [sink, *peers]
        for peer in peers:
            sink.transport.connect(peer.owner, peer.transport.metadata())
        for i, peer in enumerate(peers):
            sink.read(peer.owner, [PageRun(i, 1)], [PageRun(i, 1)])
        assert all(isinstance(done, ReadDone) for done in drive(sink, *peers, want=5))
        for i in range(5):
            assert np.array_equal(sink.bytes[i], pattern(40 + i, i, UNIT))
        sink.transport.disconnect(peers[0].owner)
        sink.read(peers[2].owner, [PageRun(9, 1)], [PageRun(9, 1)])
        assert isinstance(drive(sink, *peers)[0], ReadDone)

    @pytest.mark.slow
    def test_a_read_of_a_gibibyte(self, workers, children):
        unit, units = 16 << 20, 64
        children.append(Child(self.kind, "child#01", 3, unit, units))
        sink = Worker(self.kind, "sink#02", unit=unit, units=units)
        workers.append(sink)
        sink.transport.connect("child#01", children[0].metadata())
        sink.read("child#01", [PageRun(0, units)], [PageRun(0, units)])
        (done,) = drive(sink, timeout_s=60)
        assert isinstance(done, ReadDone), done
        assert done.nbytes == 1 << 30
        for page in range(units):
            assert np.array_equal(sink.bytes[page], pattern(3, page, unit))

    def test_a_fence_restarts_the_reads_of_other_peers(self, workers, children):
        unit, units = 1 << 20, 48
        tcp = {"UCX_TLS": "tcp"}
        children += [Child(self.kind, f"child{i}#0{i}", i, unit, units, tcp) for i in range(2)]
        sink = Worker(self.kind, "sink#0f", unit=unit, units=units, agents=1)
        workers.append(sink)
        for child in children:
            sink.transport.connect(child.owner, child.metadata())
            sink.read(child.owner, [PageRun(0, 1)], [PageRun(0, 1)])
            assert isinstance(drive(sink)[0], ReadDone)
        hung, slow = children
        for child in children:
            child.send(signal.SIGSTOP)
        lost = sink.read(hung.owner, [PageRun(0, 8)], [PageRun(0, 8)])
        kept = sink.read(slow.owner, [PageRun(0, 32)], [PageRun(8, 32)])
        assert quiet(sink, 0.05) == []
        sink.transport.fence([lost])
        ends = drive(sink, want=2, timeout_s=0.1)
        assert failed(ends[0]).read_id == lost
        assert ends[1] == ReadFenced(lost)
        sink.bytes[:8] = 0x66
        children.append(Child(self.kind, "child1#02", 1, unit, units, tcp))
        slow.send(signal.SIGCONT)
        (end,) = drive(sink, timeout_s=5)
        assert end.read_id == kept
        # UCX may abort a peer whose reader went away while it was stopped; then the read fails, typed, and no worse.
        if isinstance(end, ReadDone):
            assert np.array_equal(sink.bytes[8], pattern(1, 0, unit))
            assert np.array_equal(sink.bytes[39], pattern(1, 31, unit))
        else:
            assert not failed(end).in_doubt
        assert (sink.bytes[:8] == 0x66).all()
        sink.transport.connect("child1#02", children[2].metadata())
        sink.read("child1#02", [PageRun(3, 1)], [PageRun(47, 1)])
        assert isinstance(drive(sink)[0], ReadDone)
        assert np.array_equal(sink.bytes[47], pattern(1, 3, unit))

    def test_the_lane_is_named(self, workers, children):
        children.append(Child(self.kind, "child#01", 3, UNIT, 8, {"UCX_TLS": "tcp"}))
        sink = Worker(self.kind, "sink#02")
        workers.append(sink)
        sink.transport.connect("child#01", children[0].metadata())
        sink.read("child#01", [PageRun(0, 1)], [PageRun(0, 1)])
        assert isinstance(drive(sink)[0], ReadDone)
        assert sink.transport.transports("child#01").startswith("ucx: tcp/")
        assert sink.transport.transports("child#01").endswith(" emulated")
        assert not sink.transport.immediate("child#01")

    def test_a_process_that_used_it_ends_with_its_own_exit_code(self):
        """Its libraries' destructors do not run: some crash (LD_DEBUG says which do); what C printed is not lost."""
        script = (
            "import ctypes, sys; from transfer import nixl; nixl.Nixl('a#01').close();"
            "ctypes.CDLL(None).printf(b'printed\\n'); sys.exit(3)"
        )
        environment = {**os.environ, "LD_DEBUG": "files"}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
        assert done.returncode == 3
        assert done.stdout.endswith(b"printed\n")
        assert b"calling init: " in done.stderr
        assert b"calling fini: " not in done.stderr
