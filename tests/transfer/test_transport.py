"""The parts that all transports share: planning spans, cutting pieces, the card."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LocalError, RemoteError
from core.kv import PageRun, page_runs
from transfer.transport import Arena, Card, Span, pieces, plan

UNIT = 16
ARENA = Arena(memoryview(bytearray(UNIT * 64)), UNIT)
CARD = Card("x", "peer#01", 0, UNIT, 64, 7, b"body")

pages = st.lists(st.integers(0, 63), min_size=1, max_size=40)


@given(pages, st.randoms(use_true_random=False), st.data())
def test_spans_say_where_every_byte_goes(source, random, data):
    target = random.sample(range(64), len(source))
    nbytes = data.draw(st.none() | st.integers(1, len(source) * UNIT))
    spans = plan(ARENA, CARD, page_runs(source), page_runs(target), nbytes)
    got = [(s.source + i, s.target + i) for s in spans for i in range(s.nbytes)]
    want = [(a * UNIT + i, b * UNIT + i) for a, b in zip(source, target, strict=True) for i in range(UNIT)]
    assert got == want[:nbytes]
    for one, two in pairwise(spans):
        assert (one.source + one.nbytes, one.target + one.nbytes) != (two.source, two.target), "could be joined"


def test_neighbouring_runs_are_one_span():
    spans = plan(ARENA, CARD, [PageRun(4, 2), PageRun(6, 6)], [PageRun(20, 5), PageRun(25, 3)])
    assert spans == [Span(4 * UNIT, 20 * UNIT, 8 * UNIT)]


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 64), st.integers(1, 5))
def test_pieces_are_bounded_and_complete(sizes, most_nbytes, most_spans):
    spans = [Span(1000 * i, 2000 * i, size) for i, size in enumerate(sizes)]
    cut = list(pieces(spans, most_nbytes, most_spans))
    assert all(len(piece) <= most_spans and sum(span.nbytes for span in piece) <= most_nbytes for piece in cut)
    flat = [(s.source + i, s.target + i) for piece in cut for s in piece for i in range(s.nbytes)]
    assert flat == [(s.source + i, s.target + i) for s in spans for i in range(s.nbytes)]


def test_the_card_survives_the_wire():
    card = Card("nixl", "wörker#0123", 2**63, 4096, 2**33, 2**64 - 1, bytes(range(256)))
    assert Card.decode(card.encode()) == card


@given(st.binary(max_size=80))
def test_anything_else_is_refused(noise):
    with pytest.raises(RemoteError):
        Card.decode(noise)


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(RemoteError, match="not text"):
        Card.decode(CARD.encode().replace(b"peer", b"\xff\xff\xff\xff"))


def test_arenas_must_be_whole_writable_pages():
    for memory, unit in ((bytes(64), 16), (bytearray(65), 16), (bytearray(0), 16), (bytearray(64), 0)):
        with pytest.raises(LocalError, match="arena"):
            Arena(memoryview(memory), unit)
