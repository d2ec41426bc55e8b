"""How fast pages move: every transport by size and number of runs, beside memcpy and a raw loopback socket.

    python -m bench.transfer [--quick] [--json FILE]

Two processes, pinned to different cores: this one reads, the other one owns the pages. All figures of a repeat are
taken in turn (interleaved), medians over the repeats are reported. Digests are excluded. The arena is read at moving
offsets, so that the largest sizes come from memory and not from a cache.

Blocks are what engines with one block a layer read: the same bytes in pieces of 16 or 4 KiB, scattered on both sides.
"same transport": through our own `read`, planning included, as our page runs are timed. "NIXL itself": by its own API
in the same process, a descriptor a block or one for all of it. "prepared lists": all in one request whose descriptor
lists over the whole arena were made before the clock started, NIXL's fastest way for blocks. Mooncake's transfer engine
is a peer where `mooncake-transfer-engine-non-cuda` is installed (it needs Debian's `libibverbs1`), over its TCP.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import Row, emit, median, parser, progress
from core.kv import PageRun
from transfer import nixl
from transfer.inprocess import InProcess
from transfer.thread import TransferThread
from transfer.thread_events import Event
from transfer.transport import Card, Transport
from transfer.zeromq import ZeroMq

KIB, MIB = 1 << 10, 1 << 20
UNIT_NBYTES = 4 * KIB
"""Unit of the arena here, so that the smallest blocks can be expressed; a page is `PAGE_UNITS` of them."""
PAGE_UNITS = 64
"""256 KiB: 16 tokens of 16 layers with 4 KV heads of 64 in bf16."""
REQUESTS = {"3 MiB": 12, "24 MiB": 96}
"""Pages of a request: 192 and 1,536 tokens."""
RUNS = 5
"""A request is a handful of runs."""
SPLITS = (2, RUNS, 12)
"""12: of the small request every page lies by itself."""
ARENA_NBYTES = 768 * MIB
LANES = ("nixl", "nixl tcp", "zeromq", "inprocess")
MOONCAKE = "mooncake"
BLOCKS = (16 * KIB, 4 * KIB)

Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]


def make(lane: str, owner: str) -> Transport:
    """The transport of a lane."""
    if lane.startswith("nixl"):
        return nixl.Nixl(owner)
    return ZeroMq(owner) if lane == "zeromq" else InProcess(owner)


def mapped(nbytes: int, seed: int) -> memoryview:
    """An arena whose pages all exist."""
    memory = memoryview(mmap.mmap(-1, nbytes))
    view = np.frombuffer(memory, dtype=np.uint64)
    view[:] = np.arange(seed, seed + len(view), dtype=np.uint64)
    return memory


def pin(core: int) -> None:
    """Stay on one core where the machine has two."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[core % len(cores)]})


def serve(lane: str) -> None:
    """Own an arena, on a transfer thread as a worker has it and behind a raw socket, until stdin closes."""
    pin(1)
    memory = mapped(ARENA_NBYTES, 1)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while ask := connection.recv(16, socket.MSG_WAITALL):
            start, nbytes = int.from_bytes(ask[:8], "little"), int.from_bytes(ask[8:], "little")
            connection.sendall(memory[start : start + nbytes])

    def post(event: Event) -> None:
        metadata = getattr(event, "metadata", b"")
        print(metadata.hex(), listener.getsockname()[1], flush=True)

    threading.Thread(target=answer, daemon=True).start()
    thread = TransferThread(lambda: make(lane, "source#02"), memory, UNIT_NBYTES, post)
    thread.start()
    thread.lively(True)
    sys.stdin.read()
    thread.close()


def serve_mooncake() -> None:
    """Own an arena behind Mooncake's engine until stdin closes."""
    pin(1)
    memory = np.frombuffer(mapped(ARENA_NBYTES, 1), dtype=np.uint8)
    engine = mooncake(memory)
    print("port", engine.get_rpc_port(), memory.ctypes.data, flush=True)
    sys.stdin.read()


def mooncake(memory: Bytes) -> Any:
    """Mooncake's engine over TCP, with this memory."""
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") or engine.register_memory(
        memory.ctypes.data, memory.nbytes
    ):
        raise SystemExit("mooncake: the engine did not start")
    return engine


def child(lane: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The process that owns the pages."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench.transfer", "--serve", lane],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        cwd=Path(__file__).parents[1],
    )


class Lane:
    """A reading transport beside its peer process."""

    def __init__(self, name: str, memory: memoryview) -> None:
        self.name = name
        self.ids = 0
        self.peer = None
        environment = {**os.environ, "UCX_TLS": "tcp"} if name == "nixl tcp" else dict(os.environ)
        self.transport = make(name, "sink#01")
        self.transport.register(memory, UNIT_NBYTES)
        self.owner = None
        if name == "inprocess":
            self.owner = make(name, "source#02")
            self.owner.register(mapped(ARENA_NBYTES, 1), UNIT_NBYTES)
            self.metadata = self.owner.metadata()
        else:
            self.peer = child(name, environment)
            assert self.peer.stdout is not None
            card, port = self.peer.stdout.readline().split()
            self.metadata = bytes.fromhex(card.decode())
            self.raw = socket.create_connection(("127.0.0.1", int(port)))
            self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.transport.connect("source#02", self.metadata)
        for _ in range(20):
            self.read([PageRun(0, 1)], [PageRun(0, 1)])
            time.sleep(0.002)

    def read(self, source: list[PageRun], target: list[PageRun]) -> None:
        """One read, to its end, looked after in the transfer thread's rhythm."""
        self.ids += 1
        self.transport.read(self.ids, "source#02", source, target)
        pause_s = 0.00005
        while not (ended := self.transport.poll()):
            if self.transport.more:
                continue
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.001)
        if getattr(ended[0], "reason", ""):
            raise SystemExit(f"{self.name}: {ended[0]}")

    def raw_read(self, start: int, into: memoryview) -> None:
        """The same bytes over a plain socket."""
        self.raw.sendall(start.to_bytes(8, "little") + len(into).to_bytes(8, "little"))
        while len(into):
            into = into[self.raw.recv_into(into) :]

    def close(self) -> None:
        """End both sides."""
        lanes = self.transport.transports("source#02")
        progress(f"{self.name}: {lanes}")
        self.transport.close()
        if self.owner is not None:
            self.owner.close()
        if self.peer is not None:
            self.raw.close()
            self.peer.kill()
            self.peer.wait()


class Mooncake:
    """Mooncake's engine beside its peer process."""

    def __init__(self, memory: memoryview) -> None:
        ours = np.frombuffer(memory, dtype=np.uint8)
        self.base = ours.ctypes.data
        self.engine = mooncake(ours)
        self.peer = child(MOONCAKE, dict(os.environ))
        assert self.peer.stdout is not None
        words: list[bytes] = []
        while words[:1] != [b"port"]:  # it prints of its own, too
            line = self.peer.stdout.readline()
            if not line:
                raise SystemExit("mooncake: the peer did not start")
            words = line.split()
        self.host, self.remote_base = f"127.0.0.1:{int(words[1])}", int(words[2])

    def read(self, theirs: list[int], ours: list[int], nbytes: list[int]) -> None:
        """Read ranges by their first byte."""
        here, there = [self.base + each for each in ours], [self.remote_base + each for each in theirs]
        if self.engine.batch_transfer_sync_read(self.host, here, there, nbytes):
            raise SystemExit("mooncake: a read failed")

    def close(self) -> None:
        """End the other side."""
        self.peer.kill()
        self.peer.wait()


class Itself:
    """NIXL's own API on an agent of its own, read as engines with small blocks do."""

    def __init__(self, memory: Bytes, peer: Card) -> None:
        api = nixl.load()
        self.agent = api.nixl_agent("blocks", api.nixl_agent_config(enable_prog_thread=False))
        self.agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
        self.remote = self.agent.add_remote_agent(peer.body).decode()
        self.base, self.remote_base = memory.ctypes.data, peer.base
        self.lists: dict[int, tuple[Any, Any]] = {}

    def prepare(self, nbytes: int) -> None:
        """Descriptor lists over both arenas in blocks of `nbytes`."""
        count = ARENA_NBYTES // nbytes

        def rows(base: int) -> NDArray[np.uint64]:
            starts = np.arange(count, dtype=np.uint64) * np.uint64(nbytes) + np.uint64(base)
            return np.stack([starts, np.full_like(starts, nbytes), np.zeros_like(starts)], axis=1)

        self.lists[nbytes] = (
            self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", rows(self.base), "DRAM"),
            self.agent.prep_xfer_dlist(self.remote, rows(self.remote_base), "DRAM"),
        )

    def read(self, nbytes: int, theirs: Places, ours: Places) -> None:
        """Read blocks by number, to the end."""
        mine, remote = self.lists[nbytes]
        self._run(self.agent.make_prepped_xfer("READ", mine, ours.astype(np.int32), remote, theirs.astype(np.int32)))

    def plain(self, nbytes: int | Places, theirs: Places, ours: Places) -> None:
        """Read pieces of `nbytes`, or of so many each, by their first bytes, a descriptor each, to the end."""

        def rows(starts: Places, base: int) -> Any:
            table = np.stack([starts + base, np.zeros_like(starts) + nbytes, np.zeros_like(starts)], axis=1)
            return self.agent.get_xfer_descs(table.astype(np.uint64), "DRAM")

        there, here = rows(theirs, self.remote_base), rows(ours, self.base)
        self._run(self.agent.initialize_xfer("READ", here, there, self.remote))

    def _run(self, handle: Any) -> None:
        state = self.agent.transfer(handle)
        pause_s = 0.00005
        while state == "PROC" and (state := self.agent.check_xfer_state(handle)) == "PROC":
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.001)
        if state != "DONE":
            raise SystemExit(f"nixl: a read ended as {state}")
        self.agent.release_xfer_handle(handle)


def timed(work: Callable[[int], None], rounds: int, offset: int) -> float:
    """Seconds of one round of `work`, over `rounds`."""
    started = time.perf_counter()
    for i in range(rounds):
        work(offset + i)
    return (time.perf_counter() - started) / rounds


class Scatter:
    """Where a request of `pages` pages lies: in runs of pages, or in scattered blocks."""

    def __init__(self, pages: int, rng: random.Random) -> None:
        self.pages = pages
        self.nbytes = pages * PAGE_UNITS * UNIT_NBYTES
        self.rng = rng
        self.whole = [(self.runs(1), self.runs(1)) for _ in range(8)]
        """Places for one contiguous read, whoever does it: where it lies decides what is in a cache."""
        self.split = {count: [(self.runs(count), self.runs(count)) for _ in range(8)] for count in SPLITS}
        """The same for reads in several runs."""

    def runs(self, count: int) -> list[PageRun]:
        """`count` separate runs of whole pages, equal in size but for one page."""
        total = ARENA_NBYTES // (PAGE_UNITS * UNIT_NBYTES)
        base, more = divmod(self.pages, count)
        sizes = [base + (i < more) for i in range(count)]
        gaps = sorted(self.rng.sample(range(1, total - self.pages), count))
        starts = [gap + sum(sizes[:i]) for i, gap in enumerate(gaps)]
        return [PageRun(start * PAGE_UNITS, size * PAGE_UNITS) for start, size in zip(starts, sizes, strict=True)]

    def starts(self, runs: list[PageRun]) -> Places:
        """The first byte of each run."""
        return np.array([run.start * UNIT_NBYTES for run in runs], dtype=np.int64)

    def blocks(self, nbytes: int) -> Places:
        """Numbers of scattered blocks of `nbytes`."""
        return np.array(self.rng.sample(range(ARENA_NBYTES // nbytes), self.nbytes // nbytes), dtype=np.int64)

    def block_runs(self, nbytes: int) -> list[PageRun]:
        """The same as runs of units."""
        size = nbytes // UNIT_NBYTES
        return [PageRun(int(block) * size, size) for block in self.blocks(nbytes)]


CLOSE = 8
"""Times as many repeats of page runs and of one contiguous read: they differ by less than one repeat's luck."""
Works = dict[str, tuple[int, Callable[[int], None]]]
"""Name -> rounds a sample, and what one round does."""


def add_size(works: Works, lane: Lane, memory: memoryview, spare: Bytes, size: int) -> None:
    """One contiguous read of `size` bytes, the same by memcpy and over the raw socket."""
    target = np.frombuffer(memory, dtype=np.uint8)
    slots, units = ARENA_NBYTES // size, size // UNIT_NBYTES

    def at(i: int) -> int:
        return (i * 7919) % slots  # a moving place

    def ours(i: int) -> None:
        lane.read([PageRun(at(i) * units, units)], [PageRun(at(i + 1) * units, units)])

    def copied(i: int) -> None:
        np.copyto(target[at(i) * size :][:size], spare[at(i + 1) * size :][:size])

    def raw(i: int) -> None:
        lane.raw_read(at(i) * size, memory[at(i + 1) * size :][:size])

    rounds = max(1, min(200, 8 * MIB // size))
    works[f"ours {size}"] = (rounds, ours)
    works[f"memcpy {size}"] = (rounds, copied)
    if lane.peer is not None:
        works[f"socket {size}"] = (rounds, raw)


def add_request(works: Works, lane: Lane, name: str, scatter: Scatter) -> None:
    """A request in one run, in several runs, in blocks."""
    rounds = max(2, 24 * MIB // scatter.nbytes)

    def reads(key: str, plans: list[tuple[list[PageRun], list[PageRun]]]) -> None:
        def ours(i: int) -> None:
            lane.read(*plans[i % len(plans)])

        works[key] = (rounds, ours)

    reads(f"{name} runs 1", scatter.whole)
    for count, plans in scatter.split.items():
        reads(f"{name} runs {count}", plans)
    for nbytes in BLOCKS:
        reads(f"{name} blocks {nbytes}", [(scatter.block_runs(nbytes), scatter.block_runs(nbytes)) for _ in range(4)])


def add_itself(works: Works, itself: Itself, name: str, scatter: Scatter) -> None:
    """The same by NIXL's own API: all in one descriptor, a block in each, and blocks by prepared lists."""
    rounds = max(2, 24 * MIB // scatter.nbytes)

    def turns(key: str, read: Callable[[int, Any, Any], None], nbytes: int, unit: int) -> None:
        chosen = [(scatter.blocks(nbytes) * unit, scatter.blocks(nbytes) * unit) for _ in range(4)]

        def work(i: int) -> None:
            read(nbytes, *chosen[i % len(chosen)])

        works[key] = (rounds, work)

    whole = [(scatter.starts(theirs), scatter.starts(ours)) for theirs, ours in scatter.whole]

    def contiguous(i: int) -> None:
        itself.plain(scatter.nbytes, *whole[i % len(whole)])

    works[f"{name} itself"] = (rounds, contiguous)

    def split(count: int) -> None:
        sizes = np.array([run.count * UNIT_NBYTES for run in scatter.split[count][0][0]], dtype=np.int64)
        places = [(scatter.starts(theirs), scatter.starts(ours)) for theirs, ours in scatter.split[count]]

        def several(i: int) -> None:
            itself.plain(sizes, *places[i % len(places)])

        works[f"{name} itself in {count}"] = (rounds, several)

    for count in SPLITS:
        split(count)
    for nbytes in BLOCKS:
        turns(f"{name} itself {nbytes}", itself.plain, nbytes, nbytes)
        turns(f"{name} prepared {nbytes}", itself.read, nbytes, 1)


def add_mooncake(works: Works, peer: Mooncake, name: str, scatter: Scatter) -> None:
    """The same by Mooncake's engine: the runs, and blocks of 16 KiB."""
    rounds = max(2, 24 * MIB // scatter.nbytes)

    def turns(key: str, ranges: Callable[[], tuple[list[int], list[int]]]) -> None:
        chosen = [(ranges(), ranges()) for _ in range(4)]

        def work(i: int) -> None:
            (theirs, nbytes), (ours, _) = chosen[i % len(chosen)]
            peer.read(theirs, ours, nbytes)

        works[key] = (rounds, work)

    def runs(count: int) -> tuple[list[int], list[int]]:
        found = scatter.runs(count)
        return scatter.starts(found).tolist(), [run.count * UNIT_NBYTES for run in found]

    def blocks() -> tuple[list[int], list[int]]:
        found = scatter.blocks(BLOCKS[0]) * BLOCKS[0]
        return found.tolist(), [BLOCKS[0]] * len(found)

    turns(f"{name} {MOONCAKE} runs", lambda: runs(RUNS))
    turns(f"{name} {MOONCAKE} blocks", blocks)


def measure(
    lane_name: str, memory: memoryview, sizes: list[int], repeats: int, rng: random.Random, peer: Mooncake | None
) -> list[Row]:
    """All rows of one lane."""
    lane = Lane(lane_name, memory)
    spare = np.frombuffer(mapped(ARENA_NBYTES, 3), dtype=np.uint8)
    works: Works = {}
    for size in sizes:
        add_size(works, lane, memory, spare, size)
    itself: Itself | None = None
    if lane_name.startswith("nixl"):
        itself = Itself(np.frombuffer(memory, dtype=np.uint8), Card.decode(lane.metadata))
        for nbytes in BLOCKS:
            itself.prepare(nbytes)
    for name, pages in REQUESTS.items():
        scatter = Scatter(pages, rng)
        add_request(works, lane, name, scatter)
        if itself is not None:
            add_itself(works, itself, name, scatter)
        if peer is not None and lane.peer is not None:
            add_mooncake(works, peer, name, scatter)
    for _, work in works.values():
        timed(work, 1, 0)
    samples: dict[str, list[float]] = {name: [] for name in works}
    close = [name for name in works if " runs " in name or name.endswith(" itself") or " itself in " in name]
    for repeat in range(CLOSE * repeats):
        # In another order each time: what a work leaves in the caches is the next one's luck.
        names = list(works) if repeat < repeats else close
        for name in rng.sample(names, len(names)):
            rounds, call = works[name]
            samples[name].append(timed(call, rounds, 1 + repeat * rounds))
    lane.close()
    return rows_of(lane_name, sizes, {name: median(values) for name, values in samples.items()})


def rows_of(lane: str, sizes: list[int], seconds: dict[str, float]) -> list[Row]:
    """Medians as rows."""
    rows: list[Row] = []
    for size in sizes:
        case = f"{lane}: read {size // MIB} MiB" if size >= MIB else f"{lane}: read {size // KIB} KiB"
        ours = seconds[f"ours {size}"]
        for peer in ("memcpy", "socket"):
            other = seconds.get(f"{peer} {size}")
            if other is not None:
                label = "memcpy" if peer == "memcpy" else "loopback socket"
                rows.append(Row(case, size / ours / 1e9, size / other / 1e9, label, "GB/s"))
                rows.append(Row(case, ours * 1e6, other * 1e6, label, "us", higher_is_better=False))
    for name, pages in REQUESTS.items():
        total = pages * PAGE_UNITS * UNIT_NBYTES

        def against(count: int, key: str, label: str, name: str = name, total: int = total) -> None:
            ours, other = seconds[f"{name} runs {count}"], seconds.get(f"{name} {key}")
            if other is not None:
                case = f"{lane}: {name} request in {count} page runs"
                rows.append(Row(case, total / ours / 1e9, total / other / 1e9, label, "GB/s"))

        for count in SPLITS:
            against(count, "runs 1", "one contiguous read")
            against(count, "itself", "one contiguous read, NIXL itself")
            against(count, f"itself in {count}", "the same runs, NIXL itself")
        for nbytes in BLOCKS:
            against(RUNS, f"blocks {nbytes}", f"blocks of {nbytes // KIB} KiB, same transport")
            against(RUNS, f"itself {nbytes}", f"blocks of {nbytes // KIB} KiB, NIXL itself")
            against(RUNS, f"prepared {nbytes}", f"blocks of {nbytes // KIB} KiB, prepared lists")
        against(RUNS, f"{MOONCAKE} runs", "the same runs, Mooncake's engine over TCP")
        against(RUNS, f"{MOONCAKE} blocks", "blocks of 16 KiB, Mooncake's engine over TCP")
    return rows


def main() -> None:
    """Run and report."""
    flags = parser("transfer", __doc__ or "")
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--serve", metavar="LANE", help=argparse.SUPPRESS)
    options = flags.parse_args()
    if options.serve:
        serve_mooncake() if options.serve == MOONCAKE else serve(options.serve)
        return
    cores = os.sched_getaffinity(0)
    pin(0)
    sizes = [4 * KIB, 64 * KIB, MIB, 16 * MIB] if options.quick else [4 * KIB << (2 * i) for i in range(9)]
    reason = nixl.available()
    lanes = [lane for lane in LANES if not (reason and lane.startswith("nixl"))]
    if reason:
        progress(f"without nixl: {reason}")
    memory = mapped(ARENA_NBYTES, 2)
    peer = Mooncake(memory) if importlib.util.find_spec(MOONCAKE) else None
    rows: list[Row] = []
    for lane in lanes:
        progress(f"{lane} ...")
        rows += measure(lane, memory, sizes, 5 if options.quick else 15, random.Random(7), peer)
    if peer is not None:
        peer.close()
    os.sched_setaffinity(0, cores)  # the report counts them
    for row in rows:
        ratio = "" if row.ratio is None else f"({row.ratio:.2f})"
        progress(f"{row.case:45} {row.ours:10.4g} {row.unit:5} {row.peer_name} {row.peer or 0:.4g} {ratio}")
    emit("transfer", rows, options.json)


if __name__ == "__main__":
    main()
