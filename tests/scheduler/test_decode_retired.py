"""Rows without memory: the oldest request comes back first, and host memory counts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from core.messages import First
from core.pages import Owner, Pages
from core.sampling import Sampling
from scheduler.cost import CostModel, Lane
from scheduler.decode_retired import Retired
from scheduler.decode_rows import Guest, Place, Row
from tests.cast import SHAPE, ask, ticket


def row(order: int, branch: int = 0, pages: int = 0) -> Row:
    request = ask(4 * max(1, pages))
    guest = Guest(ticket(order), request, f"{order}", order, 100.0, 0.0, pages)
    made = Row(f"{order}/{branch}", guest, replace(request, sampling=Sampling(8)), First(1, branch=branch), 4, 0)
    made.bound, made.place = pages, Place.EVICTED
    return made


@pytest.mark.parametrize("order", list(itertools.permutations(((1, 0), (2, 0), (2, 1), (3, 0)))))
def test_the_oldest_comes_back_first_whoever_lost_its_memory_first(order):
    retired, rows = Retired(SHAPE, Pages(8), 0, "host"), [row(*each) for each in order]
    for each in rows:
        retired.put(each)
    retired.check(rows)
    came = []
    while retired:
        came.append((retired.first.guest.order, retired.first.first.branch))
        retired.take(retired.first)
    assert came == sorted(order)


def cost(prefill_s: float, transfer_s: float) -> CostModel:
    lanes = (Lane("host", transfer_s, 0.0, 0.0),)
    return CostModel("made", prefill=((prefill_s, 0.0, 0.0, 0.0),), decode=((1.0, 0.0, 0.0),), lanes=lanes)


@pytest.mark.parametrize(
    ("room", "model", "swaps"),
    [
        (0, None, False),
        (3, None, False),
        (4, None, True),
        (4, cost(1.0, 0.4), True),
        (4, cost(1.0, 0.6), False),
    ],
)
def test_it_is_swapped_if_there_is_room_and_there_and_back_is_quicker_than_computing(room, model, swaps):
    ledger, one = Pages(8), row(1, pages=4)
    ledger.bind(one.key, 4, Owner.DECODING)
    assert Retired(SHAPE, ledger, room, "host").swaps(one, model) == swaps


def test_host_memory_counts_those_that_are_there_or_on_their_way():
    retired, (one, two) = Retired(SHAPE, Pages(8), 6, "host"), (row(1, pages=4), row(2, pages=3))
    retired.leaves(one)
    retired.put(one)
    assert (one.place, retired.pages) == (Place.LEAVING, 4)
    assert not retired.swaps(two, None), "3 beside 4 of 6"
    one.place = Place.AWAY
    retired.take(one)
    retired.returns(one)
    assert (one.place, retired.pages, retired.returning) == (Place.RETURNING, 4, 1)
    retired.check([one])
    retired.is_back(one)
    one.place = Place.JOINING
    assert (retired.pages, retired.returning) == (0, 0)
    retired.check([one])
