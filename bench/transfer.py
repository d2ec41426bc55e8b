"""How fast pages move: every transport by size and number of runs, beside memcpy and a raw loopback socket.

    python -m bench.transfer [--quick] [--json FILE]

Two processes, pinned to different cores: this one reads, the other one owns the pages. All figures of a repeat are
taken in turn (interleaved), medians over the repeats are reported. Digests are excluded. The arena is read at moving
offsets, so that the largest sizes come from memory and not from a cache.

Blocks are what engines with one block a layer read: the same bytes in pieces of 16 or 4 KiB, scattered on both sides.
"same transport": through our own `read`, planning included, as our page runs are timed. "prepared lists" (NIXL only):
all in one request whose descriptor lists over the whole arena were made before the clock started, NIXL's fastest way.
"""

from __future__ import annotations

import argparse
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
from transfer.thread import Event, TransferThread
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
ARENA_NBYTES = 768 * MIB
LANES = ("nixl", "nixl tcp", "zeromq", "inprocess")

Bytes = NDArray[np.uint8]


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
            self.peer = subprocess.Popen(
                [sys.executable, "-m", "bench.transfer", "--serve", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                cwd=Path(__file__).parents[1],
            )
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


class Blocks:
    """Prepared block lists on an agent of their own, read as engines with small blocks do."""

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

    def read(self, nbytes: int, theirs: NDArray[np.int32], ours: NDArray[np.int32]) -> None:
        """Read blocks by number, to the end."""
        mine, remote = self.lists[nbytes]
        handle = self.agent.make_prepped_xfer("READ", mine, ours, remote, theirs)
        state = self.agent.transfer(handle)
        while state == "PROC":
            time.sleep(0.00005)
            state = self.agent.check_xfer_state(handle)
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

    def runs(self, count: int) -> list[PageRun]:
        """`count` separate runs of whole pages, equal in size but for one page."""
        total = ARENA_NBYTES // (PAGE_UNITS * UNIT_NBYTES)
        base, more = divmod(self.pages, count)
        sizes = [base + (i < more) for i in range(count)]
        gaps = sorted(self.rng.sample(range(1, total - self.pages), count))
        starts = [gap + sum(sizes[:i]) for i, gap in enumerate(gaps)]
        return [PageRun(start * PAGE_UNITS, size * PAGE_UNITS) for start, size in zip(starts, sizes, strict=True)]

    def blocks(self, nbytes: int) -> NDArray[np.int32]:
        """Numbers of scattered blocks of `nbytes`."""
        return np.array(self.rng.sample(range(ARENA_NBYTES // nbytes), self.nbytes // nbytes), dtype=np.int32)

    def block_runs(self, nbytes: int) -> list[PageRun]:
        """The same as runs of units."""
        size = nbytes // UNIT_NBYTES
        return [PageRun(int(block) * size, size) for block in self.blocks(nbytes)]


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


def add_request(works: Works, lane: Lane, name: str, scatter: Scatter, blocks: Blocks | None) -> None:
    """A request in one run, in several runs, in blocks."""
    rounds = max(2, 24 * MIB // scatter.nbytes)

    def reads(key: str, plans: list[tuple[list[PageRun], list[PageRun]]]) -> None:
        def ours(i: int) -> None:
            lane.read(*plans[i % len(plans)])

        works[key] = (rounds, ours)

    for count in (1, 2, RUNS, 12):
        reads(f"{name} runs {count}", [(scatter.runs(count), scatter.runs(count)) for _ in range(8)])
    for nbytes in (16 * KIB, 4 * KIB):
        reads(f"{name} blocks {nbytes}", [(scatter.block_runs(nbytes), scatter.block_runs(nbytes)) for _ in range(4)])
        if blocks is not None:
            add_prepared(works, f"{name} prepared {nbytes}", rounds, blocks, nbytes, scatter)


def add_prepared(works: Works, key: str, rounds: int, blocks: Blocks, nbytes: int, scatter: Scatter) -> None:
    """The blocks by prepared lists."""
    chosen = [(scatter.blocks(nbytes), scatter.blocks(nbytes)) for _ in range(4)]

    def prepared(i: int) -> None:
        blocks.read(nbytes, *chosen[i % len(chosen)])

    works[key] = (rounds, prepared)


def measure(lane_name: str, memory: memoryview, sizes: list[int], repeats: int, rng: random.Random) -> list[Row]:
    """All rows of one lane."""
    lane = Lane(lane_name, memory)
    spare = np.frombuffer(mapped(ARENA_NBYTES, 3), dtype=np.uint8)
    works: Works = {}
    for size in sizes:
        add_size(works, lane, memory, spare, size)
    blocks: Blocks | None = None
    if lane_name.startswith("nixl"):
        blocks = Blocks(np.frombuffer(memory, dtype=np.uint8), Card.decode(lane.metadata))
        for nbytes in (16 * KIB, 4 * KIB):
            blocks.prepare(nbytes)
    for name, pages in REQUESTS.items():
        add_request(works, lane, name, Scatter(pages, rng), blocks)
    for _, work in works.values():
        timed(work, 1, 0)
    samples: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats):
        for name, (rounds, call) in works.items():
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

        for count in (2, RUNS, 12):
            against(count, "runs 1", "one contiguous read")
        for nbytes in (16 * KIB, 4 * KIB):
            against(RUNS, f"blocks {nbytes}", f"blocks of {nbytes // KIB} KiB, same transport")
            against(RUNS, f"prepared {nbytes}", f"blocks of {nbytes // KIB} KiB, prepared lists")
    return rows


def main() -> None:
    """Run and report."""
    flags = parser("transfer", __doc__ or "")
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--serve", metavar="LANE", help=argparse.SUPPRESS)
    options = flags.parse_args()
    if options.serve:
        serve(options.serve)
        return
    cores = os.sched_getaffinity(0)
    pin(0)
    sizes = [4 * KIB, 64 * KIB, MIB, 16 * MIB] if options.quick else [4 * KIB << (2 * i) for i in range(9)]
    reason = nixl.available()
    lanes = [lane for lane in LANES if not (reason and lane.startswith("nixl"))]
    if reason:
        progress(f"without nixl: {reason}")
    memory = mapped(ARENA_NBYTES, 2)
    rows: list[Row] = []
    for lane in lanes:
        progress(f"{lane} ...")
        rows += measure(lane, memory, sizes, 5 if options.quick else 15, random.Random(7))
    os.sched_setaffinity(0, cores)  # the report counts them
    for row in rows:
        ratio = "" if row.ratio is None else f"({row.ratio:.2f})"
        progress(f"{row.case:45} {row.ours:10.4g} {row.unit:5} {row.peer_name} {row.peer or 0:.4g} {ratio}")
    emit("transfer", rows, options.json)


if __name__ == "__main__":
    main()
