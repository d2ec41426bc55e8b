"""Pages that the taking side asks for: a pull-back or a prefix fetch at both ends, scripts with exact commands.

What becomes of them on a bad day: tests/transfer/test_source_sink.py.
"""

from __future__ import annotations

import json

import pytest

from core.errors import LocalError
from core.kv import PageRun
from core.messages import Carried, Fetch, First, Ready, Refuse, Release, Taken
from core.pages import Owner, Pages
from core.state import dump, load
from tests.cast import D1, P1, SHAPE, ticket
from transfer.sink import (
    AskSource,
    Drop,
    Fence,
    Fenced,
    Fetched,
    Pull,
    Pulled,
    Read,
    SendToSource,
    Sink,
    SourceLost,
)
from transfer.source import Digest, Digested, FetchEnded, SendToSink, SinkLost, Source, Withdraw

FETCH = ticket(minter=D1)
"""D1 wants pages that P1 has."""
WANTED = (11, 12, 13)


def keeping(names: tuple[int, ...], pages: int = 40) -> Pages:
    """A ledger in which nobody holds the first pages, and each has a name."""
    ledger = Pages(pages)
    ledger.bind("before", len(names), Owner.DECODING)
    ledger.name("before", names)
    ledger.release("before")
    return ledger


def lending(cached: int = 0, names: tuple[int, ...] = WANTED) -> tuple[Source, Pages, list]:
    ledger = keeping(names)
    machine = Source(SHAPE, ledger)
    return machine, ledger, machine.on(Fetch(FETCH, WANTED, cached, 5.0), 1.0)


def fetching(here: int = 0, pages: int = 40) -> tuple[Sink, Pages]:
    """The sink of a fetch, under way, that had so many of the pages."""
    ledger = keeping(WANTED[:here], pages)
    machine = Sink(SHAPE, ledger)
    assert machine.on(AskSource(FETCH, WANTED, 6.0), 1.0) == [SendToSource(Fetch(FETCH, WANTED, here, 5.0, 4))]
    machine.check()
    return machine, ledger


@pytest.mark.parametrize(("cached", "names"), [(0, WANTED), (1, WANTED), (0, (11, 12)), (1, (11, 12, 13, 14))])
def test_a_source_announces_at_once_what_it_has_of_what_is_wanted(cached, names):
    machine, ledger, commands = lending(cached, names)
    found = min(3, len(names))
    pages = tuple(range(cached, found))
    assert commands == [Digest(FETCH.key, cached, pages, 4 * len(pages))]
    assert machine.deadline() == 6.0
    machine.check()
    digests = tuple(100 + page for page in pages)
    ready = Ready(FETCH, cached, (PageRun(cached, len(pages)),), digests)
    assert machine.on(Digested(FETCH.key, cached, digests), 1.5) == [SendToSink(ready)]
    machine.check()
    assert machine.on(Taken(FETCH), 2.0) == [FetchEnded(FETCH.key, True)]
    assert (len(machine), machine.deadline(), machine.ignored) == (0, None, 0)
    assert (ledger.holders(), ledger.cached(names)) == ((), len(names))


@pytest.mark.parametrize(("cached", "names"), [(0, ()), (0, (12, 13)), (2, (11, 12)), (2, (11,)), (3, WANTED), (9, ())])
def test_a_source_may_have_nothing_to_announce(cached, names):
    machine, _, commands = lending(cached, names)
    assert commands == [SendToSink(Ready(FETCH, min(cached, 3), (), ()))]
    machine.check()
    assert machine.on(Taken(FETCH), 2.0) == [FetchEnded(FETCH.key, True)]


@pytest.mark.parametrize(
    ("event", "said", "reason"),
    [
        (Release(FETCH, "left"), [], "left"),
        (Withdraw(FETCH.key, "digest: x"), [SendToSink(Release(FETCH, "digest: x"))], "digest: x"),
        (SinkLost(D1), [], "decode-1 was lost"),
        (None, [SendToSink(Release(FETCH, "deadline"))], "deadline"),
    ],
)
@pytest.mark.parametrize("announced", [False, True])
def test_what_is_fetched_stays_where_it_is_until_the_ticket_ends(event, said, reason, announced):
    machine, ledger, _ = lending()
    if announced:
        machine.on(Digested(FETCH.key, 0, (1, 2, 3)), 1.5)
    assert machine.on(Fetch(FETCH, WANTED, 0, 5.0), 1.5) == [], "said twice"
    ledger.bind("all", ledger.available, Owner.DECODING)
    assert ledger.pages("all") == tuple(range(3, 40))
    ledger.release("all")
    assert machine.on(event, 6.0) == [*said, FetchEnded(FETCH.key, False, reason)]
    assert (ledger.holders(), ledger.available, machine.deadline()) == ((), 40, None)
    assert machine.on(Digested(FETCH.key, 0, (1, 2, 3)), 6.0) == []


def test_a_fetch_goes_on_from_a_document():
    source, _, (digest,) = lending()
    sink, _ = fetching()
    source, sink = load(json.loads(json.dumps(dump([source, sink]))), list)
    (announce,) = source.on(Digested(FETCH.key, 0, (7, 8, 9)), 2.0)
    (read,) = sink.on(announce.message, 2.0)
    assert (read.runs, read.tokens) == ((PageRun(0, 3),), digest.tokens)
    taken, fetched = sink.on(Pulled(read.read_id, 0.1, (7, 8, 9)), 2.0)
    assert (fetched.pages, source.on(taken.message, 2.0)) == (3, [FetchEnded(FETCH.key, True)])


def test_others_may_use_and_compute_what_is_fetched():
    machine, ledger, _ = lending()
    ledger.share("user", WANTED, Owner.PREFILLING)
    ledger.bind("writer", 3, Owner.PREFILLING)
    ledger.name("writer", WANTED)
    machine.check()
    machine.on(Taken(FETCH), 2.0)
    machine.on(Digested(FETCH.key, 0, (1, 2, 3)), 2.0)
    assert machine.on(Taken(FETCH), 2.0) == [FetchEnded(FETCH.key, True)]
    ledger.check()


@pytest.mark.parametrize(("here", "found"), [(0, 3), (0, 2), (1, 3), (2, 3)])
def test_what_a_sink_fetches_it_keeps_under_its_names(here, found):
    machine, ledger = fetching(here)
    assert (machine.deadline(), ledger.promised, ledger.available) == (6.0, 3 - here, 37)
    count = found - here
    digests = tuple(range(count))
    (read,) = machine.on(Ready(FETCH, here, (PageRun(20, count),), digests), 2.0)
    assert (read.source, read.runs, read.first_page, read.tokens) == (P1, (PageRun(20, count),), here, 4 * count)
    machine.check()
    assert ledger.cached(WANTED) == here
    pull = Pull(count * SHAPE.page_nbytes, here * 4, 1, 0.5, 1.0, 0.0)
    assert machine.on(Pulled(1, 0.5, digests), 3.0) == [SendToSource(Taken(FETCH)), Fetched(FETCH, found, "", pull)]
    assert (ledger.cached(WANTED), ledger.holders(), ledger.available) == (found, (), 40)
    assert (len(machine), machine.deadline(), machine.ignored) == (0, None, 0)
    ledger.check()


def test_a_fetch_that_finds_no_more_than_is_here_is_an_ordinary_one():
    machine, ledger = fetching(1)
    pull = Pull(0, 4, 0, 0.0, 0.0, 0.0)
    assert machine.on(Ready(FETCH, 1, (), ()), 2.0) == [SendToSource(Taken(FETCH)), Fetched(FETCH, 1, "", pull)]
    assert (ledger.cached(WANTED), ledger.holders()) == (1, ())


def test_nobody_is_asked_for_what_is_here():
    machine = Sink(SHAPE, keeping(WANTED))
    assert machine.on(AskSource(FETCH, WANTED[:2], 6.0), 1.0) == [Fetched(FETCH, 2)]
    assert (len(machine), machine.deadline(), machine._ledger.holders()) == (0, None, ())


def test_nothing_is_fetched_without_memory_for_all_of_it():
    machine = Sink(SHAPE, keeping(WANTED[:1], 4))
    machine._ledger.promise("others", 2, Owner.DECODING)
    assert machine.on(AskSource(FETCH, WANTED, 6.0), 1.0) == [Fetched(FETCH, 1, "no memory for 2 pages")]
    assert (len(machine), machine._ledger.holders(), machine._ledger.available) == (0, ("others",), 2)


def test_what_is_being_fetched_is_not_fetched_again():
    machine, _ = fetching()
    with pytest.raises(LocalError, match="fetched already"):
        machine.on(AskSource(FETCH, WANTED, 6.0), 1.0)
    machine.check()


@pytest.mark.parametrize(
    ("event", "told", "reason"),
    [
        (Refuse(FETCH, "no lane"), False, "no lane"),
        (Release(FETCH, "left"), False, "left"),
        (SourceLost(P1), False, "prefill-1 was lost"),
        (Drop(FETCH.key, "left"), True, "left"),
        (None, True, "deadline"),
    ],
)
@pytest.mark.parametrize("reading", [False, True])
def test_a_fetch_that_fails_leaves_nothing_but_reads_in_doubt(event, told, reason, reading):
    machine, ledger = fetching(1)
    if reading:
        machine.on(Ready(FETCH, 1, (PageRun(20, 2),), (1, 2)), 2.0)
    commands = machine.on(event, 6.0)
    said = [SendToSource(Release(FETCH, reason))] if told else []
    fences = [Fence((1,))] if reading and isinstance(event, SourceLost) else []
    assert commands == [*said, Fetched(FETCH, 1, reason), *fences]
    machine.check()
    assert ledger.counts()[Owner.IN_DOUBT] == 2 * reading
    machine.on(Fenced((1,)) if fences else Pulled(1, 0.1, (1, 2)), 7.0)
    assert (ledger.cached(WANTED), ledger.holders(), ledger.available) == (1, (), 40)


def test_what_differs_twice_from_its_digest_gets_no_name():
    machine, ledger = fetching()
    machine.on(Ready(FETCH, 0, (PageRun(20, 3),), (1, 2, 3)), 2.0)
    (again,) = machine.on(Pulled(1, 0.1, (1, 2, 4)), 2.0)
    assert isinstance(again, Read)
    reason = "1 pages differ from their digests"
    assert machine.on(Pulled(2, 0.1, (1, 2, 4)), 3.0) == [
        SendToSource(Release(FETCH, reason)),
        Fetched(FETCH, 0, reason),
    ]
    assert (ledger.cached(WANTED), ledger.available) == (0, 40)


@pytest.mark.parametrize(
    "ready",
    [
        Ready(FETCH, 0, (PageRun(7, 2),), (1, 2)),
        Ready(FETCH, 1, (PageRun(7, 3),), (1, 2, 3)),
        Ready(FETCH, 1, (PageRun(7, 2),), (1,)),
        Ready(FETCH, 1, (PageRun(7, 2),), (1, 2), (First(7),)),
        Ready(FETCH, 1, (PageRun(7, 2),), (1, 2), (), Carried((1,))),
    ],
)
def test_an_announcement_that_is_not_what_was_asked_for_ends_the_fetch(ready):
    machine, ledger = fetching(1)
    release, fetched = machine.on(ready, 2.0)
    assert (release.message.ticket, fetched.pages) == (FETCH, 1)
    assert ledger.holders() == ()


def test_a_fetch_is_announced_once():
    machine, _ = fetching()
    machine.on(Ready(FETCH, 0, (PageRun(7, 1),), (1,)), 2.0)
    release, fetched = machine.on(Ready(FETCH, 1, (PageRun(9, 1),), (2,)), 2.0)
    assert (release.message.ticket, fetched.ticket) == (FETCH, FETCH)
