"""Resharding: bit-exact against a reference that moves row by row, each byte once, in as few ranges as there can be."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from core.errors import LocalError
from core.kv import KvShape, page_runs
from transfer.digest import MASK, digests
from transfer.plan import Axis, Cost, Layout, Ranges, choose, copy, misfit, reshard, stage
from transfer.transport import Arena, Card, plan

TPS, HEADS, SIZES, STAGES = (1, 2, 4, 8), (1, 2, 4, 8), (16, 32, 64), ((), (1, 2), (2, 1))
MATRIX = list(itertools.product(HEADS, TPS, TPS, SIZES, SIZES, STAGES, STAGES))
MOST = 150
"""Tokens at most."""


def layout(heads, tp, size, stages=(), head_dim=2, dtype="bfloat16"):
    return Layout(KvShape(3, heads, head_dim, size, dtype), tp, stages)


def table(rng, count, fragments):
    """Page numbers in runs of up to `fragments`, in any order; some pages of the arena are others'."""
    pages, at = [], rng.randrange(3)
    while len(pages) < count:
        run = rng.randint(1, fragments)
        pages.append(range(at, at + run))
        at += run + rng.randrange(3)
    rng.shuffle(pages)
    return [page for run in pages for page in run][:count]


class World:
    """One request's KV at a source, and a sink's arenas full of something else."""

    def __init__(self, source, sink, start, stop, seed, fragments=8):
        rng = random.Random(seed)
        self.source, self.sink, self.start, self.stop = source, sink, start, stop
        self.kv = np.random.default_rng(seed).integers(
            0, 256, (source.kv.layers, 2, source.kv.kv_heads, MOST + 64, source.kv.row_nbytes), dtype=np.uint8
        )
        sizes = source.kv.page_tokens, sink.kv.page_tokens
        ours, theirs = (table(rng, -(-stop // size) - start // size, fragments) for size in sizes)
        self.tables = ours, theirs
        pages = max(max(self.tables[0]), max(self.tables[1])) + 2
        self.given = [self.arena(shard, pages, 0xAA) for shard in source.shards()]
        self.taken = [self.arena(shard, pages, 0x55) for shard in sink.shards()]
        for shard, arena in zip(source.shards(), self.given, strict=True):
            self.place(shard, arena, self.tables[0], 0, MOST + 64)
        self.plans = reshard(source, sink, ours, theirs, start, stop)

    def arena(self, shard, pages, filling):
        shape = shard.shape
        return np.full(
            (pages, shape.layers, 2, shape.kv_heads, shape.page_tokens, shape.row_nbytes), filling, dtype=np.uint8
        )

    def place(self, shard, arena, pages, start, stop):
        """Row by row, the tokens of [start, stop) that the table's pages hold."""
        size, first = shard.shape.page_tokens, self.start // shard.shape.page_tokens
        for token in range(max(start, first * size), min(stop, (first + len(pages)) * size)):
            page, slot = pages[token // size - first], token % size
            for layer in range(shard.shape.layers):
                for kv in (0, 1):
                    for head in range(shard.shape.kv_heads):
                        row = self.kv[shard.first_layer + layer, kv, shard.first_head + head, token]
                        arena[page, layer, kv, head, slot] = row

    @property
    def end(self):
        """First token that is not moved."""
        return min(-(-self.stop // side.kv.page_tokens) * side.kv.page_tokens for side in (self.source, self.sink))

    def wanted(self):
        """The sink's arenas as they should be."""
        arenas = [np.copy(arena) for arena in self.taken]
        for shard, arena in zip(self.sink.shards(), arenas, strict=True):
            self.place(shard, arena, self.tables[1], self.start, self.end)
        return arenas

    def read(self):
        """What reading the ranges directly makes of the sink's arenas."""
        arenas = [np.copy(arena) for arena in self.taken]
        for arena, ranges in zip(arenas, self.plans, strict=True):
            for each in ranges:
                copy([each], self.given[each.rank].data.cast("B"), arena)
        return arenas

    def staged(self, room):
        """What packing, one read of each source and unpacking makes of them."""
        arenas = [np.copy(arena) for arena in self.taken]
        for arena, ranges in zip(arenas, self.plans, strict=True):
            for reads in stage(ranges, room):
                buffer = np.full(room, 0xEE, dtype=np.uint8)
                assert len({each.rank for each in reads}) == len(reads)
                for each in reads:
                    packed = np.full(each.nbytes, 0xDD, dtype=np.uint8)
                    copy(each.pack, self.given[each.rank], packed)
                    buffer[each.at : each.at + each.nbytes] = packed
                for each in reads:
                    copy(each.unpack, buffer.data, arena)
        return arenas


def same(found, wanted):
    return all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


@st.composite
def worlds(draw, *, aligned=False):
    heads, source_tp, sink_tp, source_size, sink_size, source_stages, sink_stages = draw(st.sampled_from(MATRIX))
    start = draw(st.sampled_from([0, 64])) if aligned else draw(st.sampled_from([0, 0, 16, 64]) | st.integers(0, 99))
    stop = draw(st.integers(start + 1, MOST))
    source = layout(heads, source_tp, source_size, source_stages)
    sink = layout(heads, sink_tp, sink_size, sink_stages)
    return World(source, sink, start, stop, draw(st.integers(0, 2**32)), draw(st.sampled_from([1, 3, 99])))


STEADY = settings(
    derandomize=True, deadline=None, print_blob=False, phases=(Phase.explicit, Phase.generate, Phase.shrink)
)


@given(worlds(), st.integers(1, 5000))
@settings(STEADY, max_examples=60)
def test_every_byte_arrives_directly_and_through_a_buffer(world, room):
    wanted = world.wanted()
    assert same(world.read(), wanted)
    assert same(world.staged(room), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
def test_every_byte_arrives_over_the_whole_matrix(heads):
    rng = random.Random(heads)
    for case in MATRIX:
        if case[0] == heads:
            _, source_tp, sink_tp, source_size, sink_size, source_stages, sink_stages = case
            start = rng.choice([0, 0, rng.randrange(70)])
            stop = rng.randint(start + 1, min(MOST, start + 90))
            source = layout(heads, source_tp, source_size, source_stages, head_dim=1)
            sink = layout(heads, sink_tp, sink_size, sink_stages, head_dim=1)
            world = World(source, sink, start, stop, rng.randrange(2**32), rng.choice([1, 3, 99]))
            wanted = world.wanted()
            assert same(world.read(), wanted), case
            assert same(world.staged(rng.randint(1, 2000)), wanted), case


@given(worlds())
@settings(STEADY, max_examples=60)
def test_every_byte_is_written_once_and_read_once(world):
    for shard, arena, ranges in zip(world.sink.shards(), world.taken, world.plans, strict=True):
        written = np.zeros(arena.nbytes, dtype=np.uint8)
        read = {rank: np.zeros(given.nbytes, dtype=np.uint8) for rank, given in enumerate(world.given)}
        for each in ranges:
            assert each.total_nbytes == each.nbytes * len(each.offsets()[0])
            for source, sink in zip(*each.offsets(), strict=True):
                written[sink : sink + each.nbytes] += 1
                read[each.rank][source : source + each.nbytes] += 1
        marks = np.zeros_like(arena)
        world.kv[:] = 1
        world.place(shard, marks, world.tables[1], world.start, world.end)
        assert np.array_equal(written.reshape(arena.shape), marks)
        assert max(int(each.max()) for each in read.values()) == 1


@given(worlds())
@settings(STEADY, max_examples=60)
def test_no_neighbours_are_left_apart(world):
    """But where a page ends on both sides that was not taken as a whole: its last head's tokens touch the next page."""
    sizes = [side.kv.page_tokens for side in (world.source, world.sink)]
    givers = world.source.shards()
    for taker, ranges in zip(world.sink.shards(), world.plans, strict=True):
        found = sorted(
            (int(sink), int(source), each.nbytes, each.rank)
            for each in ranges
            for source, sink in zip(*each.offsets(), strict=True)
        )
        for (sink, source, nbytes, rank), after in itertools.pairwise(found):
            if rank == after[3] and (sink + nbytes, source + nbytes) == after[:2]:
                assert after[0] % taker.shape.page_nbytes == after[1] % givers[rank].shape.page_nbytes == 0
                assert sizes[0] != sizes[1] or world.start % sizes[0], "pages that were taken as a whole"


@given(st.sampled_from(TPS), st.sampled_from(HEADS), st.integers(1, MOST), st.integers(0, 99), st.integers(1, 9))
@settings(STEADY, max_examples=40)
def test_alike_layouts_give_the_page_runs_that_a_plain_read_has(tp, heads, stop, seed, fragments):
    world = World(layout(heads, tp, 16, (1, 2)), layout(heads, tp, 16, (1, 2)), 0, stop, seed, fragments)
    ours, theirs = (page_runs(pages) for pages in world.tables)
    for shard, given_, taken, ranges in zip(world.sink.shards(), world.given, world.taken, world.plans, strict=True):
        size = shard.shape.page_nbytes
        card = Card("inprocess", "p#1", 0, size, given_.nbytes // size, 0, b"")
        spans = plan(Arena(memoryview(taken).cast("B"), size), card, ours, theirs)
        found = [(int(a), int(b), each.nbytes) for each in ranges for a, b in zip(*each.offsets(), strict=True)]
        assert found == [(span.source, span.target, span.nbytes) for span in spans]
        assert {each.rank for each in ranges} == {shard.rank}


@given(worlds(aligned=True))
@settings(STEADY, max_examples=40)
def test_digests_of_the_pieces_add_up_to_those_of_the_pages(world):
    """Over any TP, PP and page size, each head and layer counted at one of its replicas."""

    def total(side, arenas, pages):
        return sum(
            sum(
                digests(
                    arena,
                    pages,
                    shard.shape,
                    world.start // side.kv.page_tokens,
                    world.stop - world.start,
                    first_head=shard.first_head,
                    first_layer=shard.first_layer,
                )
            )
            for shard, arena in zip(side.shards(), arenas, strict=True)
            if shard.replica == 0
        )

    arrived = world.read()
    announced = total(world.source, world.given, world.tables[0]) & MASK
    assert total(world.sink, arrived, world.tables[1]) & MASK == announced
    token = world.stop - 1
    size = world.sink.kv.page_tokens
    arrived[0][world.tables[1][token // size - world.start // size], 0, 1, 0, token % size, 0] ^= 1
    assert total(world.sink, arrived, world.tables[1]) & MASK != announced


@pytest.mark.parametrize(
    ("heads", "source_tp", "sink_tp"),
    [(1, 8, 1), (1, 8, 2), (1, 4, 8), (2, 8, 1), (2, 8, 4), (2, 8, 8), (4, 8, 2), (2, 4, 2), (8, 8, 4)],
)
def test_all_source_ranks_give_the_same_share(heads, source_tp, sink_tp):
    plans = reshard(layout(heads, source_tp, 16), layout(heads, sink_tp, 16), range(16), range(16), 0, 256)
    given_: dict[int, int] = {}
    for each in itertools.chain(*plans):
        given_[each.rank] = given_.get(each.rank, 0) + each.total_nbytes
    assert len(given_) == source_tp, given_
    assert len(set(given_.values())) == 1, given_


def test_replicas_that_meet_replicas_read_whole_runs():
    """Each of theirs reads one of ours: no token is split, so the request stays one range."""
    plans = reshard(layout(2, 8, 16), layout(2, 8, 16), range(4, 20), range(16), 0, 256)
    assert [[(each.rank, each.count) for each in ranges] for ranges in plans] == [[(rank, 1)] for rank in range(8)]


def test_a_share_is_of_whole_pages():
    """7 pages of one head from 8 replicas: one page each, and one of them gives none."""
    ((*ranges,),) = reshard(layout(1, 8, 16), layout(1, 1, 16), range(7), range(7), 0, 100)
    page = layout(1, 1, 16).kv.page_nbytes
    assert [(each.source, each.total_nbytes) for each in ranges] == [(n * page, page) for n in range(7)]
    assert len({each.rank for each in ranges}) == 7


def test_ranks_and_replicas_are_where_the_docstring_says():
    shards = Layout(KvShape(5, 2, 4, 16, "float32"), 4, (2, 3)).shards()
    assert [(s.rank, s.first_layer, s.shape.layers, s.first_head, s.shape.kv_heads, s.replica) for s in shards] == [
        (0, 0, 2, 0, 1, 0),
        (1, 0, 2, 0, 1, 1),
        (2, 0, 2, 1, 1, 0),
        (3, 0, 2, 1, 1, 1),
        (4, 2, 3, 0, 1, 0),
        (5, 2, 3, 0, 1, 1),
        (6, 2, 3, 1, 1, 0),
        (7, 2, 3, 1, 1, 1),
    ]
    assert {s.replicas for s in shards} == {2}
    whole = Layout(KvShape(5, 8, 4, 16, "float32"), 2).shards()
    assert [(s.first_head, s.shape.kv_heads, s.replicas) for s in whole] == [(0, 4, 1), (4, 4, 1)]


def test_32_thousand_tokens_of_a_large_model_are_a_handful_of_strides():
    """80 layers and 8 heads, TP 4 to 8: 81,920 ranges of 16 KiB a rank, planned as one nest of strides a page run."""
    source = Layout(KvShape(80, 8, 128, 64, "bfloat16"), 4)
    sink = replace(source, tp=8)
    for ranges in reshard(source, sink, range(512), range(100, 612), 0, 32768):
        assert [(each.count, each.nbytes) for each in ranges] == [(81920, 16384)]
        assert ranges[0].axes == (Axis(81920, 32768, 16384),)
    smaller = Layout(replace(source.kv, page_tokens=16), 4)
    for ranges in reshard(smaller, sink, range(2048), range(512), 0, 32768):
        assert [(each.count, each.nbytes) for each in ranges] == [(327680, 4096)]


@pytest.mark.parametrize(
    ("source", "sink", "pages", "cost", "staged"),
    [
        pytest.param((8, 64), (8, 64), 512, Cost(), False, id="whole runs"),
        pytest.param((4, 64), (8, 64), 512, Cost(), False, id="16 KiB pieces"),
        pytest.param((4, 16), (8, 64), 2048, Cost(), True, id="4 KiB pieces"),
        pytest.param((4, 16), (8, 64), 4, Cost(ask_s=1e-2), False, id="too few to ask for"),
        pytest.param((4, 16), (8, 64), 2048, Cost(range_s=1e-7), False, id="a lane that minds no pieces"),
        pytest.param((4, 64), (8, 64), 512, Cost(range_s=1.2e-5), True, id="a lane that does"),
        pytest.param((4, 16), (8, 64), 2048, Cost(range_s=1.8e-6), False, id="pieces that cost something to copy"),
    ],
)
def test_pieces_are_packed_where_that_is_cheaper(source, sink, pages, cost, staged):
    shape = KvShape(80, 8, 128, 64, "bfloat16")
    ours, theirs = (Layout(replace(shape, page_tokens=size), tp) for tp, size in (source, sink))
    tokens = pages * source[1]
    ranges = reshard(ours, theirs, range(pages), range(tokens // sink[1]), 0, tokens)[0]
    rounds = choose(ranges, 2**30, cost)
    assert (rounds is not None) == staged
    if rounds is not None:
        assert sum(each.nbytes for reads in rounds for each in reads) == sum(each.total_nbytes for each in ranges)
        assert all(sum(each.nbytes for each in reads) <= 2**30 for reads in rounds)


def test_what_is_asked_for_must_be_possible():
    ours = layout(4, 2, 16)
    for other, why in [
        (Layout(replace(ours.kv, layers=9), 2), "layers: got 3 at the source, want 9 as the sink has"),
        (Layout(replace(ours.kv, kv_heads=8), 2), "kv_heads: got 4"),
        (Layout(replace(ours.kv, head_dim=3), 2), "head_dim: got 2"),
        (Layout(replace(ours.kv, dtype="float32"), 2), "dtype: got bfloat16 at the source, want float32"),
    ]:
        with pytest.raises(LocalError, match=why):
            reshard(ours, other, [0], [0], 0, 16)
    assert misfit(ours, layout(4, 8, 64, (1, 2))) is None
    for call, why in [
        (lambda: reshard(ours, ours, [0], [0], 0, 17), "source pages: got 1 for tokens"),
        (lambda: reshard(ours, ours, [0, 1], [0], 0, 17), "sink pages: got 1"),
        (lambda: reshard(ours, ours, [], [], 5, 5), "tokens: got"),
        (lambda: layout(4, 3, 16), "tp: got 3 for 4 kv heads"),
        (lambda: layout(4, 0, 16), "tp: got 0"),
        (lambda: layout(4, 1, 16, (1, 1)), "stages: got"),
        (lambda: layout(4, 1, 16, (3, 0)), "stages: got"),
        (lambda: stage([], 0), "staging room: got 0"),
    ]:
        with pytest.raises(LocalError, match=why):
            call()


@pytest.mark.parametrize(
    "ranges",
    [
        Ranges(0, 60, 0, 8),
        Ranges(0, 0, 60, 8),
        Ranges(0, 0, 0, 8, (Axis(9, 8, 0),)),
        Ranges(0, 0, 0, 8, (Axis(2, -8, 8),)),
    ],
)
def test_a_copy_never_leaves_its_memory(ranges):
    ours, theirs = np.zeros(64, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    with pytest.raises(LocalError, match="copy: "):
        copy([ranges], ours, theirs)
