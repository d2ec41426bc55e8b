"""Reads of pages of another size: every row in its place, no other page touched, in few reads where that pays."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import LocalError
from core.kv import KvShape, page_runs
from transfer.digest import digests
from transfer.plan import Cost
from transfer.repage import block_pages, lay_out, reading

KV = KvShape(layers=2, kv_heads=3, head_dim=4, page_tokens=4, dtype="float16")
LAID, RANGES = Cost(range_s=1.0), Cost(range_s=0.0)
NOISE = 0xEE


class Side:
    """One arena, and pages of it in an order that is not theirs."""

    def __init__(self, page_tokens: int, tokens: int, draw: random.Random, seed: int | None) -> None:
        self.kv = replace(KV, page_tokens=page_tokens)
        units = -(-tokens // page_tokens) + 3
        self.bytes = np.full((units, self.kv.page_nbytes), NOISE, np.uint8)
        if seed is not None:
            self.bytes[:] = np.random.default_rng(seed).integers(0, 256, self.bytes.shape, np.uint8)
        self.pages = draw.sample(range(units), -(-tokens // page_tokens))
        if draw.random() < 0.5:
            self.pages.sort()

    def rows(self, tokens: int) -> np.ndarray:
        """``[token, layer, K|V, head, byte]``."""
        kv = self.kv
        found = self.bytes[self.pages].reshape(-1, kv.layers, 2, kv.kv_heads, kv.page_tokens, kv.row_nbytes)
        return found.transpose(0, 4, 1, 2, 3, 5).reshape(-1, *found.shape[1:4], kv.row_nbytes)[:tokens]


def bring(source: Side, sink: Side, first_page: int, tokens: int, cost: Cost, most: int = 3) -> int:
    """As the transfer thread does; how many reads it took."""
    theirs = source.kv.page_tokens
    read = reading(sink.kv, theirs, page_runs(source.pages), sink.pages, first_page, tokens, cost)
    for span in read.spans:
        sink.bytes.reshape(-1)[span.target : span.target + span.nbytes] = source.bytes.reshape(-1)[
            span.source : span.source + span.nbytes
        ]
    step = block_pages(sink.kv.page_tokens, theirs, most)
    for at in range(0, read.raw_pages, step):
        pages = sink.pages[at : min(at + step, read.raw_pages)]
        left = tokens - at * sink.kv.page_tokens
        lay_out(sink.bytes, sink.kv, theirs, pages, min(left, len(pages) * sink.kv.page_tokens))
    return len(read.spans)


sizes = st.sampled_from([1, 2, 3, 4, 6, 8, 16])


@given(
    theirs=sizes, ours=sizes, tokens=st.integers(1, 80), most=st.integers(1, 40), cost=st.sampled_from([LAID, RANGES])
)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_every_row_comes_to_its_place_and_nobody_elses_page_is_touched(theirs, ours, tokens, most, cost):
    draw = random.Random(tokens * 1000 + theirs * 30 + ours)
    source, sink = Side(theirs, tokens, draw, 7), Side(ours, tokens, draw, None)
    bring(source, sink, 0, tokens, cost, most)
    assert np.array_equal(sink.rows(tokens), source.rows(tokens))
    others = [page for page in range(len(sink.bytes)) if page not in sink.pages]
    assert (sink.bytes[others] == NOISE).all()
    ours_, theirs_ = (digests(side.bytes, side.pages, side.kv, 0, tokens) for side in (sink, source))
    assert sum(ours_) % 2**64 == sum(theirs_) % 2**64


@pytest.mark.parametrize(("theirs", "ours"), [(4, 16), (16, 4), (8, 4)])
def test_whole_pages_are_as_many_reads_as_their_runs(theirs, ours):
    """160 tokens of neighbouring pages: one read, in place of one for each lane of each of the smaller pages."""
    draw = random.Random(1)
    source, sink = Side(theirs, 160, draw, 3), Side(ours, 160, draw, None)
    source.pages, sink.pages = list(range(160 // theirs)), list(range(160 // ours))
    assert bring(source, sink, 0, 160, LAID) == 1
    assert bring(source, sink, 0, 160, RANGES) == 160 // min(theirs, ours) * KV.layers * 2 * KV.kv_heads


def test_a_last_page_that_is_larger_than_what_is_left_of_ours_comes_in_ranges():
    """41 tokens are three pages of 16, which do not fit into eleven of 4 as they are."""
    draw = random.Random(1)
    source, sink = Side(16, 41, draw, 3), Side(4, 41, draw, None)
    read = reading(sink.kv, 16, page_runs(source.pages), sink.pages, 0, 41, LAID)
    assert read.raw_pages == 8
    bring(source, sink, 0, 41, LAID)
    assert np.array_equal(sink.rows(41), source.rows(41))


def test_the_place_in_the_sequence_is_of_no_account_but_must_begin_pages_on_both_sides():
    draw = random.Random(1)
    source, sink = Side(16, 41, draw, 3), Side(4, 41, draw, None)
    bring(source, sink, 8, 41, LAID)
    assert np.array_equal(sink.rows(41), source.rows(41))
    with pytest.raises(LocalError, match="got token 36 as the first, want one where 16 begin as well"):
        bring(source, sink, 9, 41, LAID)


@pytest.mark.parametrize("tokens", [32, 49, 0, -1])
def test_pages_that_are_not_as_many_as_the_tokens_have_are_refused(tokens):
    draw = random.Random(1)
    source, sink = Side(16, 41, draw, 3), Side(4, 41, draw, None)
    with pytest.raises(LocalError, match=r"pull: got \(3, 11\) pages"):
        reading(sink.kv, 16, page_runs(source.pages), sink.pages, 0, tokens, LAID)


def test_small_pieces_are_laid_out_and_large_ones_read():
    """By the defaults: 16 tokens of a head of 128 two-byte numbers, and 128 of them."""
    assert Cost().lays_out(16 * 128 * 2)
    assert Cost().lays_out(64 * 128 * 2)
    assert not Cost().lays_out(128 * 128 * 2)
