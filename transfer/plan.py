"""Which bytes of which source ranks make up the KV of some tokens at a sink that is cut in another way.

Two workers of one model may differ in tensor parallelism, in pipeline stages and in tokens a page. Each rank's arena is
page-major, ``[layer, K|V, kv_head, token, dim]`` of its own layers and heads (`core/kv.py`), so what one sink rank
needs lies in the arenas of a few source ranks as many small pieces at regular distances. They are never listed while
planning: a `Ranges` is a nest of strides, one or a few of them a run of pages, and sizes and counts follow from it by
multiplication. Neighbours on both sides are one range: alike cuts come out as whole runs of pages. (Only where a page
ends that is not taken as a whole is its last piece left apart from the next page's first: one of hundreds.)

How a model is cut. Pipeline stage s holds the layers that `Layout.stages` gives it. With as many KV heads as ranks, or
more, a rank holds its share of neighbouring heads; with fewer, each head lies on tp / kv_heads neighbouring ranks, its
*replicas*. A sink's replicas of a head read from different replicas at the source; where the source has more of them,
each gives an equal share of the tokens. One page table holds for all ranks of a worker, as one ledger gives it out.

Small pieces cost more than their bytes: the alternative is to *stage* them. The source gathers its pieces into a
buffer, the sink reads that at once and scatters it; gathering and scattering are `Ranges` between arena and buffer.
P/D-Serve (arXiv 2408.08147, block-free transfer between devices) sends one contiguous buffer for that reason. `Cost`
decides.

| parameter of `Cost` | unit | default | measured as (bench/results/transfer.json, if not said otherwise) |
|---|---|---|---|
| lane_bytes_per_s | B/s | 5.2e9 | nixl, 24 MiB in one contiguous read: 5.24 GB/s |
| range_s | s | 4e-6 | the same in blocks of 16 KiB (2.19 GB/s) and 4 KiB (0.90 GB/s): 4.4 and 3.8 us a block above it |
| copy_bytes_per_s | B/s | 5e9 | `copy` with one side gathered or scattered, pieces of 4 KiB to 16 MiB: 4 to 9 GB/s |
| copy_range_s | s | 1.5e-7 | the same, pieces of 256 bytes and 1 KiB: 50 to 300 ns above their bytes |
| ask_s | s | 1e-3 | a message to the source, its transfer thread's next turn (up to 1 ms), and the answer |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.errors import LocalError
from core.kv import KvShape
from core.quick import quick_init
from transfer.transport import Span

Offsets = NDArray[np.int64]
Bytes = memoryview | NDArray[Any]


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model's KV that one rank holds: `shape` is that of its own pages."""

    rank: int
    shape: KvShape
    first_layer: int
    first_head: int
    replica: int
    """Which of the ranks of its stage that hold the same head; 0 if there is no other."""
    replicas: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a worker's ranks share the KV of a model; `kv` is the shape that a page of one single rank would have."""

    kv: KvShape
    tp: int = 1
    stages: tuple[int, ...] = ()
    """Layers of each pipeline stage; none: one stage of all."""

    def __post_init__(self) -> None:
        heads = self.kv.kv_heads
        if self.tp < 1 or (heads % self.tp and self.tp % heads):
            raise LocalError(f"tp: got {self.tp} for {heads} kv heads, want one to divide the other")
        if self.stages and (min(self.stages) < 1 or sum(self.stages) != self.kv.layers):
            raise LocalError(f"stages: got {self.stages}, want layers of each that add up to {self.kv.layers}")

    def shards(self) -> tuple[Shard, ...]:
        """What each rank holds; rank = stage * tp + its place in the stage."""
        heads = max(1, self.kv.kv_heads // self.tp)
        replicas = max(1, self.tp // self.kv.kv_heads)
        shards: list[Shard] = []
        first_layer = 0
        for layers in self.stages or (self.kv.layers,):
            shape = replace(self.kv, layers=layers, kv_heads=heads)
            for place in range(self.tp):
                first_head = place * self.kv.kv_heads // self.tp
                shards.append(Shard(len(shards), shape, first_layer, first_head, place % replicas, replicas))
            first_layer += layers
        return tuple(shards)


class Axis(NamedTuple):
    """As many times a step of so many bytes on each side."""

    times: int
    source: int
    sink: int


@quick_init
@dataclass(frozen=True, slots=True)
class Ranges:
    """Byte ranges of equal length at regular distances, from one memory into another.

    There is one of `nbytes` for each combination of steps along `axes` (outermost first), from offsets `source` and
    `sink` on. `rank` is the source's.
    """

    rank: int
    source: int
    sink: int
    nbytes: int
    axes: tuple[Axis, ...] = ()

    @property
    def count(self) -> int:
        """How many ranges these are."""
        return math.prod([axis.times for axis in self.axes])

    @property
    def total_nbytes(self) -> int:
        """Bytes of all of them."""
        return self.nbytes * self.count

    def offsets(self) -> tuple[Offsets, Offsets]:
        """Where each range begins on either side, in order."""
        source, sink = np.array([self.source]), np.array([self.sink])
        for axis in self.axes:
            steps = np.arange(axis.times)
            source = (source[:, None] + steps * axis.source).reshape(-1)
            sink = (sink[:, None] + steps * axis.sink).reshape(-1)
        return source, sink

    def joined(self) -> Ranges:
        """The same bytes, neighbours on both sides joined, in as few axes as these steps allow."""
        nbytes = self.nbytes
        axes: list[Axis] = []  # innermost first
        for axis in reversed(self.axes):
            count, source, sink = axis
            if count == 1:
                continue
            if not axes and source == sink == nbytes:
                nbytes *= count
            elif axes and (source, sink) == (axes[-1].times * axes[-1].source, axes[-1].times * axes[-1].sink):
                axes[-1] = axes[-1]._replace(times=count * axes[-1].times)
            else:
                axes.append(axis)
        return Ranges(self.rank, self.source, self.sink, nbytes, tuple(reversed(axes)))

    def cut(self, nbytes: int) -> tuple[list[Ranges], list[Ranges]]:
        """The first `nbytes` bytes in order, and the rest."""
        if nbytes >= self.total_nbytes:
            return [self], []
        if not self.axes:
            first = replace(self, nbytes=nbytes)
            return [first], [Ranges(self.rank, self.source + nbytes, self.sink + nbytes, self.nbytes - nbytes)]
        axis, inner = self.axes[0], self.axes[1:]
        whole, part = divmod(nbytes, self.total_nbytes // axis.times)
        ours = self._along(axis, 0, whole)
        rest = self._along(axis, whole + (part > 0), axis.times)
        if part:
            split = replace(
                self, source=self.source + whole * axis.source, sink=self.sink + whole * axis.sink, axes=inner
            )
            more, left = split.cut(part)
            ours, rest = ours + more, left + rest
        return ours, rest

    def _along(self, axis: Axis, first: int, stop: int) -> list[Ranges]:
        """Steps [first, stop) of the outermost axis."""
        if first == stop:
            return []
        axes = (axis._replace(times=stop - first), *self.axes[1:])
        return [Ranges(self.rank, self.source + first * axis.source, self.sink + first * axis.sink, self.nbytes, axes)]


def reshard(
    source: Layout, sink: Layout, source_pages: Sequence[int], sink_pages: Sequence[int], start: int, stop: int
) -> tuple[tuple[Ranges, ...], ...]:
    """For each rank of the sink the ranges that bring the KV of tokens [start, stop) into its pages.

    `source_pages` and `sink_pages` are the numbers of the pages that hold these tokens, from the one with token
    `start` on. Every byte of them is written exactly once, and each rank reads no byte twice. What lies behind `stop`
    up to the first page end of either side comes along: nobody's bytes yet, and a page that ends early would cost a
    range for each of its layers and heads. Raises LocalError if the two do not hold the same model's KV.
    """
    if (why := misfit(source, sink)) is not None:
        raise LocalError(why)
    if not 0 <= start < stop:
        raise LocalError(f"tokens: got [{start}, {stop}), want some from 0 on")
    sides = (source.kv.page_tokens, sink.kv.page_tokens)
    for side, pages, size in zip(("source", "sink"), (source_pages, sink_pages), sides, strict=True):
        want = -(-stop // size) - start // size
        if len(pages) != want:
            raise LocalError(f"{side} pages: got {len(pages)} for tokens [{start}, {stop}), want {want}")
    stop = min(-(-stop // size) * size for size in sides)
    tables = np.asarray(source_pages, dtype=np.int64), np.asarray(sink_pages, dtype=np.int64)
    strips: dict[tuple[int, int], list[_Strip]] = {}
    known: dict[_Pattern, list[Ranges]] = {}
    plans: list[tuple[Ranges, ...]] = []
    givers = source.shards()
    for taker in sink.shards():
        found: list[Ranges] = []
        for giver in givers:
            part = _part(giver, taker, start, stop, math.lcm(*sides))
            if part is not None:
                if part not in strips:
                    strips[part] = _strips(sides, tables, start, part)
                found += _between(giver, taker, part, strips[part], known)
        plans.append(tuple(found))
    return tuple(plans)


def misfit(source: Layout, sink: Layout) -> str | None:
    """Why one cannot take the other's KV however it is cut, naming the field, got and wanted; None if it can."""
    for field in ("layers", "kv_heads", "head_dim", "dtype"):
        got, want = getattr(source.kv, field), getattr(sink.kv, field)
        if got != want:
            return f"{field}: got {got} at the source, want {want} as the sink has"
    return None


def spans(ranges: Iterable[Ranges]) -> list[Span]:
    """All ranges one by one, as `Transport.read_spans` takes them; those of one source rank, that is."""
    found: list[Span] = []
    for each in ranges:
        nbytes = each.nbytes
        source, sink = (side.tolist() for side in each.offsets())
        found += [Span(a, b, nbytes) for a, b in zip(source, sink, strict=True)]
    return found


def copy(ranges: Iterable[Ranges], source: Bytes, sink: Bytes) -> None:
    """Copy all ranges within this process; raises LocalError, with some copied, if one leaves its memory."""
    ours, theirs = _flat(source), _flat(sink)
    for each in ranges:
        shape = (*(axis.times for axis in each.axes), each.nbytes)
        try:
            old = np.ndarray(shape, np.uint8, ours, each.source, (*(axis.source for axis in each.axes), 1))
            new = np.ndarray(shape, np.uint8, theirs, each.sink, (*(axis.sink for axis in each.axes), 1))
        except (TypeError, ValueError) as error:
            raise LocalError(f"copy: {each} is not within {ours.nbytes} and {theirs.nbytes} bytes ({error})") from None
        np.copyto(new, old)


@dataclass(frozen=True, slots=True)
class Staged:
    """One read of a sink rank through a buffer: `rank` packs, `nbytes` are read at once, the sink unpacks.

    In the source's buffer they begin at 0, in the sink's at `at`, behind what it reads from other ranks.
    """

    rank: int
    at: int
    nbytes: int
    pack: tuple[Ranges, ...]
    """From the source's arena into its buffer."""
    unpack: tuple[Ranges, ...]
    """From the sink's buffer into its arena."""


def stage(ranges: Sequence[Ranges], room_nbytes: int) -> list[list[Staged]]:
    """The reads of one sink rank through a buffer of `room_nbytes` at each end, in rounds that fit it.

    Each round's reads are of different ranks, at most one of each.
    """
    if room_nbytes < 1:
        raise LocalError(f"staging room: got {room_nbytes} bytes, want at least 1")
    rounds: list[list[Ranges]] = [[]]
    left = room_nbytes
    todo = sorted(ranges, key=lambda each: each.rank)[::-1]
    while todo:
        ours, rest = todo.pop().cut(left)
        rounds[-1] += ours
        left -= sum(each.total_nbytes for each in ours)
        todo += rest[::-1]
        if todo and not left:
            rounds.append([])
            left = room_nbytes
    return [_staged(each) for each in rounds if each]


@dataclass(frozen=True, slots=True)
class Cost:
    """What ranges and copies take; the defaults are of one machine, see the module's table."""

    lane_bytes_per_s: float = 5.2e9
    range_s: float = 4e-6
    copy_bytes_per_s: float = 5e9
    copy_range_s: float = 1.5e-7
    ask_s: float = 1e-3

    def direct_s(self, ranges: Sequence[Ranges]) -> float:
        """To read one rank's ranges one by one."""
        return self.range_s * _count(ranges) + _nbytes(ranges) / self.lane_bytes_per_s

    def lays_out(self, nbytes: int) -> bool:
        """Whether ranges of so many bytes are better read with all that is around them, and put in place here."""
        return self.copy_range_s + nbytes / self.copy_bytes_per_s < self.range_s

    def staged_s(self, ranges: Sequence[Ranges], room_nbytes: int) -> float:
        """To have them packed (by all ranks of the source at once), read and unpacked, in rounds of `room_nbytes`."""
        load: dict[int, float] = {}
        for each in ranges:
            copy_s = self.copy_range_s * each.count + each.total_nbytes / self.copy_bytes_per_s
            load[each.rank] = load.get(each.rank, 0.0) + copy_s
        nbytes = _nbytes(ranges)
        rounds = -(-nbytes // room_nbytes)
        asked_s = rounds * self.ask_s + (rounds + len(load)) * self.range_s
        return asked_s + max(load.values(), default=0.0) + nbytes / self.lane_bytes_per_s + sum(load.values())


def choose(ranges: Sequence[Ranges], room_nbytes: int, cost: Cost) -> list[list[Staged]] | None:
    """The rounds through a buffer of `room_nbytes` where that is cheaper, None where reading the ranges directly is."""
    if cost.direct_s(ranges) <= cost.staged_s(ranges, room_nbytes):
        return None
    return stage(ranges, room_nbytes)


# Strips: neighbouring tokens that lie in one page on both sides, and others at regular distances from them.
class _Place(NamedTuple):
    """Pages and tokens from page 0 and token 0 of a page on, on both sides; or a distance."""

    source_page: int
    source_token: int
    sink_page: int
    sink_token: int


class _Strip(NamedTuple):
    at: _Place
    tokens: int
    steps: tuple[tuple[int, _Place], ...] = ()
    """Count and distance, outermost first."""


_NEXT_PAGE = _Place(1, 0, 1, 0)
_Pattern = tuple[KvShape, KvShape, int, int, tuple[int, int]]
"""Both shapes, layers, heads, and which tokens."""


def _part(giver: Shard, taker: Shard, start: int, stop: int, unit: int) -> tuple[int, int] | None:
    """The tokens that `taker` reads from `giver`, None if none; parts begin where pages do on both sides."""
    if not _overlap(giver.first_layer, giver.shape.layers, taker.first_layer, taker.shape.layers):
        return None
    if not _overlap(giver.first_head, giver.shape.kv_heads, taker.first_head, taker.shape.kv_heads):
        return None
    # The replicas at the source that are this taker's, and which of them the giver is.
    low = taker.replica * giver.replicas // taker.replicas
    count = max(1, (taker.replica + 1) * giver.replicas // taker.replicas - low)
    which = giver.replica - low
    if not 0 <= which < count:
        return None
    first, last = start // unit, -(-stop // unit)
    a, b = (first + (last - first) * n // count for n in (which, which + 1))
    a, b = max(start, a * unit), min(stop, b * unit)
    return (a, b) if a < b else None


def _overlap(a: int, a_count: int, b: int, b_count: int) -> range:
    return range(max(a, b), min(a + a_count, b + b_count))


def _strips(sides: tuple[int, int], tables: tuple[Offsets, Offsets], start: int, part: tuple[int, int]) -> list[_Strip]:
    """Tokens `part` as strips, in order; alike ones at a regular distance are one."""
    first, last = part
    cuts = np.unique(np.concatenate([[first, last], *(np.arange(first // s + 1, -(-last // s)) * s for s in sides)]))
    at = cuts[:-1]
    places = [each for s, pages in zip(sides, tables, strict=True) for each in (pages[at // s - start // s], at % s)]
    columns = [column.tolist() for column in (*places, np.diff(cuts))]
    strips = [_Strip(_Place(*place), tokens) for *place, tokens in zip(*columns, strict=True)]
    if sides[0] == sides[1]:
        strips = _fold(strips, _NEXT_PAGE)  # runs of pages first: only those can become one range
    return _fold(_fold(strips))


def _fold(strips: list[_Strip], only: _Place | None = None) -> list[_Strip]:
    """Join strips in a row that are alike but for a constant distance, which must be `only` if given."""
    folded: list[_Strip] = []
    i = 0
    while i < len(strips):
        at, tokens, steps = strips[i]
        count, distance, last = 1, only, at
        while i + count < len(strips):
            after = strips[i + count]
            a, b = last, after.at
            step = _Place(b[0] - a[0], b[1] - a[1], b[2] - a[2], b[3] - a[3])
            if after.tokens != tokens or after.steps != steps or (distance is not None and step != distance):
                break
            count, distance, last = count + 1, step, after.at
        folded.append(_Strip(at, tokens, ((count, distance), *steps) if distance and count > 1 else steps))
        i += count
    return folded


def _between(
    giver: Shard,
    taker: Shard,
    part: tuple[int, int],
    strips: list[_Strip],
    known: dict[_Pattern, list[Ranges]],
) -> list[Ranges]:
    """The strips' ranges between two ranks: of the layers and heads that both hold.

    Between other ranks of the same shapes they lie in the same pattern, which is `known` then.
    """
    layers = _overlap(giver.first_layer, giver.shape.layers, taker.first_layer, taker.shape.layers)
    heads = _overlap(giver.first_head, giver.shape.kv_heads, taker.first_head, taker.shape.kv_heads)
    key = giver.shape, taker.shape, len(layers), len(heads), part
    if key not in known:
        known[key] = _pattern(giver.shape, taker.shape, len(layers), len(heads), strips)
    source, sink = (
        ((layers.start - side.first_layer) * 2 * side.shape.kv_heads + heads.start - side.first_head)
        * side.shape.page_tokens
        * side.shape.row_nbytes
        for side in (giver, taker)
    )
    rank = giver.rank
    return [Ranges(rank, each.source + source, each.sink + sink, each.nbytes, each.axes) for each in known[key]]


def _pattern(source: KvShape, sink: KvShape, layers: int, heads: int, strips: list[_Strip]) -> list[Ranges]:
    """The strips' ranges of so many layers and heads, as if they were the first of both sides."""
    row = source.row_nbytes
    source_page, sink_page = source.page_nbytes, sink.page_nbytes
    source_head, sink_head = source.page_tokens * row, sink.page_tokens * row
    lanes = (
        Axis(layers * 2, source.kv_heads * source_head, sink.kv_heads * sink_head),
        Axis(heads, source_head, sink_head),
    )

    def axis(times: int, step: _Place) -> Axis:
        a, b, c, d = step
        return Axis(times, a * source_page + b * row, c * sink_page + d * row)

    found: list[Ranges] = []
    for (a, b, c, d), tokens, steps in strips:
        axes = tuple([axis(*step) for step in steps])
        first, target = a * source_page + b * row, c * sink_page + d * row
        found.append(Ranges(0, first, target, tokens * row, axes + lanes).joined())
    return found


def _staged(ranges: list[Ranges]) -> list[Staged]:
    """One round: the pieces of a rank lie in its buffer one behind the other, in order."""
    found: list[Staged] = []
    at = 0
    for rank in dict.fromkeys(each.rank for each in ranges):
        packs: list[Ranges] = []
        unpacks: list[Ranges] = []
        nbytes = 0
        for each in ranges:
            if each.rank == rank:
                pack, unpack = [], []
                total = step = each.total_nbytes
                for times, source, sink in each.axes:
                    step //= times
                    pack.append(Axis(times, source, step))
                    unpack.append(Axis(times, step, sink))
                packs.append(Ranges(rank, each.source, nbytes, each.nbytes, tuple(pack)).joined())
                unpacks.append(Ranges(rank, at + nbytes, each.sink, each.nbytes, tuple(unpack)).joined())
                nbytes += total
        found.append(Staged(rank, at, nbytes, tuple(packs), tuple(unpacks)))
        at += nbytes
    return found


def _count(ranges: Sequence[Ranges]) -> int:
    return sum(each.count for each in ranges)


def _nbytes(ranges: Sequence[Ranges]) -> int:
    return sum(each.total_nbytes for each in ranges)


def _flat(data: Bytes) -> NDArray[np.uint8]:
    if isinstance(data, np.ndarray):
        return data.reshape(-1).view(np.uint8)
    return np.frombuffer(data, dtype=np.uint8)
