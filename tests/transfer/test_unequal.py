"""Hand-offs between pages of unequal size, step by step: what is held back, what is bound, and what is compared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.kv import PageRun
from core.messages import Carried, Fetch, First, Grant, OfferMigration, Ready, Refuse, Release, Reserve, Taken
from core.pages import Owner, Pages
from core.prefix import page_hashes
from core.request import Ticket
from tests.cast import D1, D2, P1, SHAPE, ask, ticket
from transfer.sink import Arrived, AskPolicy, Decided, Pulled, Read, SendToSource, Sink
from transfer.source import AskSink, AskToMove, Digest, Digested, GrantCame, MoveAsked, Sealed, SendToSink, Source

KEY = ticket().key
LAST = (First(77),)
TOP = 2**64


def shape(page_tokens: int):
    return replace(SHAPE, page_tokens=page_tokens)


def giving(prompt: int, ours: int, theirs: int, cached: int = 0) -> Source:
    machine = Source(shape(ours), Pages(40))
    assert machine.on(AskSink(ticket(), ask(prompt), 50.0), 0.0) == [SendToSink(Reserve(ticket(), ask(prompt), ours))]
    assert machine.on(Grant(ticket(), cached, theirs), 0.0) == [GrantCame(KEY)]
    machine.check()
    return machine


def taking(prompt: int, ours: int, theirs: int, *, names=(), of_tokens: int = 0, here: int = 0) -> tuple[Sink, Pages]:
    """A sink that has granted, and has had so many of the pages since before."""
    machine = Sink(shape(ours), ledger := Pages(40))
    request = replace(ask(prompt), prefix=names, prefix_page_tokens=of_tokens)
    own = shape(ours).names(names, of_tokens)[:here]
    ledger.bind("before", here, Owner.DECODING)
    ledger.name("before", own)
    ledger.release("before")
    assert machine.on(Reserve(ticket(), request, theirs), 0.0) == [AskPolicy(ticket(), request)]
    ledger.promise(KEY, shape(ours).pages_for(prompt + 8), Owner.PULLING)
    return machine, ledger


def granted(prompt: int, ours: int, theirs: int) -> tuple[Sink, Pages]:
    machine, ledger = taking(prompt, ours, theirs)
    assert machine.on(Decided(KEY, True), 0.0) == [SendToSource(Grant(ticket(), 0, ours))]
    return machine, ledger


# The giving side.
def test_a_source_announces_as_many_small_pages_as_fill_the_sinks():
    machine, pages = giving(22, ours=4, theirs=8), (3, 4, 5, 6, 9, 1)
    assert machine.on(Sealed(KEY, pages, 7), 0.0) == [Digest(KEY, 0, (3,), 4)]
    assert machine.on(Digested(KEY, 0, (10,)), 0.0) == [], "half a page of the sink's"
    assert machine.on(Sealed(KEY, pages, 12), 0.0) == [Digest(KEY, 1, (4, 5), 8)]
    ready = Ready(ticket(), 0, (PageRun(3, 2),), (10, 11))
    assert machine.on(Digested(KEY, 1, (11, 12)), 0.0) == [SendToSink(ready)]
    machine.check()
    machine.on(Sealed(KEY, pages, 22, LAST), 0.0)
    ready = Ready(ticket(), 2, (PageRun(5, 2), PageRun(9, 1), PageRun(1, 1)), (12, 13, 14, 15), LAST)
    assert machine.on(Digested(KEY, 3, (13, 14, 15)), 0.0) == [SendToSink(ready)], "the last ends anywhere"
    machine.check()


def test_what_was_digested_before_the_grant_is_held_back_as_well():
    machine = Source(shape(4), Pages(40))
    machine.on(AskSink(ticket(), ask(16), 50.0), 0.0)
    machine.on(Sealed(KEY, (0, 1, 2, 3), 12), 0.0)
    machine.on(Digested(KEY, 0, (10, 11, 12)), 0.0)
    ready = Ready(ticket(), 0, (PageRun(0, 2),), (10, 11))
    assert machine.on(Grant(ticket(), 0, 8), 0.0) == [GrantCame(KEY), SendToSink(ready)]
    machine.check()


@pytest.mark.parametrize(("ours", "theirs"), [(8, 4), (4, 8), (8, 2)])
def test_pages_that_the_sink_has_are_left_out_in_whole_ones_of_both(ours, theirs):
    machine = giving(20, ours, theirs, cached=16)
    pages = tuple(range(-(-20 // ours)))
    first = 16 // ours
    assert machine.on(Sealed(KEY, pages, 20, LAST), 0.0) == [Digest(KEY, first, pages[first:], 4)]
    digests = tuple(range(len(pages) - first))
    ready = Ready(ticket(), first, (PageRun(first, len(digests)),), digests, LAST)
    assert machine.on(Digested(KEY, first, digests), 0.0) == [SendToSink(ready)]
    machine.check()


def test_a_sink_that_counts_parts_of_pages_is_given_them_whole():
    """It would refuse the announcement; nothing is left out that it might not have."""
    machine = giving(20, ours=4, theirs=8, cached=12)
    assert machine.on(Sealed(KEY, (0, 1, 2, 3, 4), 16), 0.0) == [Digest(KEY, 2, (2, 3), 8)]
    machine = giving(20, ours=8, theirs=4, cached=12)
    assert machine.on(Sealed(KEY, (0, 1, 2), 16), 0.0) == [Digest(KEY, 1, (1,), 8)]


def test_a_row_that_has_nothing_whole_to_announce_is_asked_for_more():
    """Nothing goes out that the sink could catch up with: the policy would wait for ever."""
    move = Ticket(D1, 1, 1, D1, D2)
    offer = OfferMigration(move, ask(6, 20), ticket(), 3, 20)
    machine = Source(shape(4), Pages(40))
    (said,) = machine.on(AskToMove(offer, 50.0), 0.0)
    assert said.message == replace(offer, page_tokens=4)
    assert machine.on(Grant(move, 0, 8), 0.0) == [MoveAsked(move.key)]
    machine.on(Sealed(move.key, (5,), 4), 0.0)
    assert machine.on(Digested(move.key, 0, (10,)), 0.0) == [MoveAsked(move.key)]
    machine.on(Sealed(move.key, (5, 6, 7), 12), 0.0)
    ready = Ready(move, 0, (PageRun(5, 2),), (10, 11))
    assert machine.on(Digested(move.key, 1, (11, 12)), 0.0) == [SendToSink(ready)]
    machine.check()


def test_pages_that_are_fetched_must_be_of_one_size():
    """Whoever fetches gives names of its own pages, and those of larger ones say nothing of smaller ones."""
    machine, fetch = Source(shape(8), Pages(40)), Fetch(Ticket(D1, 1, 1, P1, D1), (11, 12), 0, 5.0, 4)
    (refused,) = machine.on(fetch, 0.0)
    assert refused == SendToSink(Refuse(fetch.ticket, "page_tokens: got 4 in names of pages, want 8 as here"))
    assert (len(machine), machine.deadline()) == (0, None)


# The taking side.
@pytest.mark.parametrize(
    ("ours", "theirs", "told", "found"),
    [
        (4, 8, (30, 7), ((10, 20), (5, 2))),
        (4, 8, (30, 7), ((TOP - 10, 40), (7, 0))),
        (8, 4, (10, 20, 5, 2), ((30,), (7,))),
        (8, 4, (TOP - 10, 40, 5, 2), ((30,), (7,))),
    ],
)
def test_digests_are_compared_by_what_is_whole_on_both_sides(ours, theirs, told, found):
    machine, ledger = granted(16, ours, theirs)
    half = len(told) // 2
    first = Ready(ticket(), 0, (PageRun(7, half),), told[:half])
    pages = 8 // ours
    assert machine.on(first, 1.0) == [Read(1, P1, (PageRun(7, half),), tuple(range(pages)), 0, 8, theirs)]
    machine.check()
    last = Ready(ticket(), half, (PageRun(20, half),), told[half:], LAST)
    target = tuple(range(pages, 2 * pages))
    assert machine.on(last, 1.0) == [Read(2, P1, (PageRun(20, half),), target, pages, 8, theirs)]
    machine.check()
    assert machine.on(Pulled(1, 0.1, found[0]), 2.0) == []
    taken, arrived = machine.on(Pulled(2, 0.1, found[1]), 2.0)
    assert taken == SendToSource(Taken(ticket()))
    assert isinstance(arrived, Arrived)
    assert arrived.pull.nbytes == 16 * SHAPE.token_nbytes
    assert machine.mismatches == 0
    assert ledger.count(KEY) == 2 * pages


@pytest.mark.parametrize(
    ("ours", "theirs", "source_pages", "sink_pages"), [(4, 8, 2, 3), (8, 4, 3, 2), (2, 8, 2, 5), (16, 4, 3, 1)]
)
def test_the_last_page_binds_no_more_than_its_tokens_need(ours, theirs, source_pages, sink_pages):
    machine, _ = granted(10, ours, theirs)
    runs, pages = (PageRun(3, source_pages),), tuple(range(sink_pages))
    ready = Ready(ticket(), 0, runs, (1,) * source_pages, LAST)
    assert machine.on(ready, 1.0) == [Read(1, P1, runs, pages, 0, 10, theirs)]
    machine.check()


def test_a_part_that_differs_is_one_mismatch_however_it_is_cut():
    machine, _ = granted(16, ours=4, theirs=8)
    runs = (PageRun(7, 2),)
    machine.on(Ready(ticket(), 0, runs, (30, 7), LAST), 1.0)
    assert machine.on(Pulled(1, 0.1, (10, 21, 5, 2)), 2.0) == [Read(2, P1, runs, (0, 1, 2, 3), 0, 16, 8)]
    assert machine.mismatches == 1
    release, gone = machine.on(Pulled(2, 0.1, (10, 21, 5, 3)), 2.0)
    assert (release.message, gone.recompute) == (Release(ticket(), "2 pages differ from their digests"), True)


@pytest.mark.parametrize(
    "ready",
    [
        pytest.param(Ready(ticket(), 0, (PageRun(7, 1),), (1,)), id="half a page of ours"),
        pytest.param(Ready(ticket(), 0, (PageRun(7, 3),), (1, 2, 3)), id="one and a half"),
        pytest.param(Ready(ticket(), 2, (PageRun(7, 2),), (1, 2)), id="not from the first on"),
        pytest.param(Ready(ticket(), 0, (PageRun(7, 3),), (1, 2, 3), LAST), id="not all of it"),
        pytest.param(Ready(ticket(), 0, (PageRun(7, 6),), (1,) * 6, LAST), id="more than all"),
    ],
)
def test_an_announcement_that_does_not_end_where_our_pages_do_is_refused(ready):
    machine, ledger = granted(18, ours=8, theirs=4)
    release, gone = machine.on(ready, 1.0)
    assert isinstance(release.message, Release)
    assert gone.recompute
    assert ledger.available == 40


CHAIN = page_hashes(range(40), 4)


@pytest.mark.parametrize(
    ("ours", "theirs", "here", "cached"),
    [
        pytest.param(4, 8, 3, 8, id="the half page over is read again"),
        pytest.param(4, 8, 4, 16, id="all that is here"),
        pytest.param(4, 8, 1, 0, id="less than a page of theirs"),
        pytest.param(8, 4, 2, 16, id="large ones are whole small ones"),
        pytest.param(4, 16, 3, 0, id="four to a page"),
    ],
)
def test_as_much_is_shared_as_is_whole_on_both_sides(ours, theirs, here, cached):
    machine, ledger = taking(20, ours, theirs, names=CHAIN[:5], of_tokens=4, here=here)
    assert machine.on(Decided(KEY, True), 1.0) == [SendToSource(Grant(ticket(), cached, ours))]
    assert ledger.count(KEY) == cached // ours
    machine.check()
    first, count = cached // theirs, -(-20 // theirs) - cached // theirs
    (read,) = machine.on(Ready(ticket(), first, (PageRun(3, count),), (1,) * count, LAST), 2.0)
    assert (read.first_page, read.tokens) == (cached // ours, 20 - cached)
    machine.check()


def test_pages_get_the_names_of_their_own_size_and_no_others():
    assert shape(4).names(CHAIN, 4) == CHAIN == shape(4).names(CHAIN, 0)
    assert shape(8).names(CHAIN, 4) == CHAIN[1::2]
    assert shape(16).names(CHAIN, 4) == CHAIN[3::4]
    assert shape(2).names(CHAIN, 4) == shape(6).names(CHAIN, 4) == (), "a name of four tokens names no two of them"
    machine, ledger = taking(20, 8, 4, names=CHAIN[:5], of_tokens=4)
    machine.on(Decided(KEY, True), 1.0)
    machine.on(Ready(ticket(), 0, (PageRun(3, 5),), (1, 2, 3, 4, 5), LAST), 2.0)
    machine.on(Pulled(1, 0.1, (3, 7, 5)), 2.5)
    assert ledger.cached((CHAIN[1], CHAIN[3])) == 2
    assert ledger.cached(CHAIN) == 0


def test_a_row_moves_between_pages_of_unequal_size():
    move = Ticket(D2, 1, 1, D2, D1)
    request = ask(10, 20)
    offer = OfferMigration(move, request, ticket(), 5, 24, page_tokens=4)
    machine = Sink(shape(8), ledger := Pages(40))
    assert machine.on(offer, 0.0) == [AskPolicy(move, request, offer)]
    ledger.promise(move.key, 3, Owner.PULLING)
    assert machine.on(Decided(move.key, True), 0.0) == [SendToSource(Grant(move, 0, 8))]
    (read,) = machine.on(Ready(move, 0, (PageRun(3, 4),), (1, 2, 3, 4)), 1.0)
    assert (read.pages, read.tokens) == ((0, 1), 16)
    (more,) = machine.on(Pulled(1, 0.1, (3, 7)), 1.5)
    assert more.message.ticket == move
    machine.check()
    carried = Carried(tuple(range(9)))
    (read,) = machine.on(Ready(move, 4, (PageRun(9, 1),), (5,), LAST, carried), 2.0)
    assert (read.pages, read.first_page, read.tokens) == ((2,), 2, 2)
    taken, arrived = machine.on(Pulled(2, 0.1, (5,)), 2.5)
    assert (taken.message, arrived.carried) == (Taken(move), carried)
