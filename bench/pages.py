"""How fast pages of another size arrive: read whole and laid out here, beside their pieces one by one and alike pages.

    python -m bench.pages [--quick] [--json FILE]

Two processes over NIXL: one owns 1,024 tokens of an 8B model's KV (32 layers, 8 heads of 128, bf16: 128 MiB) in pages
of one size, a transfer thread in this one pulls them into pages of another, digests included, into two arenas in turn:
one thread lays out, one reads each piece. Both sides' pages lie in five runs. Medians over interleaved repeats count;
the first pull of each is not counted, as it brings the arena's memory.
"""

from __future__ import annotations

import queue
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench.report import Row, emit, median, parser, progress
from core.kv import KvShape, PageRun
from kernels import native
from tests.transfer.peer import arena
from transfer import nixl
from transfer.digest import Sums
from transfer.plan import Cost
from transfer.thread import TransferThread
from transfer.thread_events import Connected, Event, LaneAnswered, LaneProbed, Opened, Pulled

KV = KvShape(layers=32, kv_heads=8, head_dim=128, page_tokens=16, dtype="bfloat16")
TOKENS = 1024
RUNS = 5
SIZES = ((16, 16), (16, 32), (32, 16), (16, 64), (64, 128), (128, 256))
"""Tokens a page there and here."""
WAYS = {"laid out": Cost(range_s=1.0), "one by one": Cost(range_s=0.0)}


def pages(size: int, seed: int) -> list[PageRun]:
    """All pages of an arena, in a few runs that are not in their order."""
    count = TOKENS // size
    cuts = sorted(random.Random(seed).sample(range(1, count), min(RUNS, count) - 1))
    runs = [PageRun(a, b - a) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    return runs[::-1]


class Taker:
    """A transfer thread with an arena, connected to the process that owns the pages."""

    def __init__(self, name: str, size: int, theirs: int, cost: Cost, metadata: bytes, sums: Sums | None) -> None:
        self.kv, self.theirs, self.reads = replace(KV, page_tokens=size), theirs, 0
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        memory = arena(TOKENS // size, self.kv.page_nbytes)
        make = nixl.Nixl
        self.thread = TransferThread(
            lambda: make(f"{name}#01"), memory, self.kv.page_nbytes, self.events.put, self.kv, sums, cost
        )
        self.thread.start()
        self.wait(Opened)
        self.thread.connect("source#02", metadata)
        self.wait(Connected)
        self.thread.probe("source#02", PageRun(0, 1), PageRun(0, 1), theirs)
        self.wait(LaneAnswered)
        self.wait(LaneProbed)

    def wait(self, kind: type) -> None:
        """For the next event, which must be of this kind."""
        event = self.events.get(timeout=60.0)
        if not isinstance(event, kind):
            raise SystemExit(f"bench.pages: {event}")

    def pull(self) -> float:
        """Seconds to pull everything."""
        self.reads += 1
        started = time.perf_counter()
        source, target = pages(self.theirs, 1), pages(self.kv.page_tokens, 2)
        self.thread.pull(self.reads, "source#02", source, target, 0, TOKENS, self.theirs)
        self.wait(Pulled)
        return time.perf_counter() - started


def measured(theirs: int, ours: int, repeats: int, sums: Sums | None) -> dict[str, float]:
    """Median seconds of each way."""
    unit = replace(KV, page_tokens=theirs).page_nbytes
    owner = [sys.executable, "-m", "tests.transfer.peer", "nixl", "source#02", str(unit), str(TOKENS // theirs), "3"]
    peer = subprocess.Popen(owner, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    try:
        assert peer.stdout is not None
        metadata = bytes.fromhex(peer.stdout.readline().decode())
        ways = WAYS if theirs != ours else {"alike": Cost()}
        takers = {way: Taker(f"sink{i}", ours, theirs, ways[way], metadata, sums) for i, way in enumerate(ways)}
        for taker in takers.values():
            taker.pull()
        taken = [{way: taker.pull() for way, taker in takers.items()} for _ in range(repeats)]
        for taker in takers.values():
            taker.thread.close()
        return {way: median([each[way] for each in taken]) for way in ways}
    finally:
        peer.kill()
        peer.wait()


def main() -> None:
    """Measure every pair of sizes and report."""
    options = parser("pages", "pages of another size").parse_args()
    if (why := nixl.available()) is not None:
        raise SystemExit(f"bench.pages: {why}")
    sums: Sums | None = None
    try:
        sums = native.page_sums()
    except native.NativeMissing as why_not:
        progress(f"digests by numpy: {why_not}")
    rows, alike_s = [], 0.0
    for theirs, ours in SIZES:
        found = measured(theirs, ours, 3 if options.quick else 11, sums)
        piece = min(theirs, ours) * KV.row_nbytes >> 10
        for way, seconds in found.items():
            progress(f"{theirs} -> {ours}, {way}: {seconds * 1e3:.1f} ms")
        if "alike" in found:
            alike_s = found["alike"]
            rows.append(Row(f"{theirs} -> {ours}, alike", alike_s, None, "", "s", False))
            continue
        case = f"{theirs} -> {ours}, pieces of {piece} KiB: laid out"
        rows.append(Row(case, found["laid out"], found["one by one"], "the pieces read one by one", "s", False))
        rows.append(Row(case, found["laid out"], alike_s, "alike pages of 16 tokens", "s", False))
    emit("pages", rows, options.json)


if __name__ == "__main__":
    main()
