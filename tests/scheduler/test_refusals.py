"""Who is told that there is room again, of how much, and how often."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.refusals import Refusals
from tests.cast import GATEWAY, OTHER_GATEWAY


def told(refusals: Refusals, now: float, fits: int) -> list[int]:
    """What the gateway is told, if offers of up to so many tokens are welcome."""
    found = refusals.told(now, lambda tokens, wait_s: tokens <= fits)
    assert all(gateway == GATEWAY for gateway, _ in found)
    return [tokens for _, tokens in found]


# New tokens that were refused; then what fits at each look, and what is told.
@pytest.mark.parametrize(
    ("refused", "looks"),
    [
        ([100], [(99, []), (100, [100]), (1000, [])]),
        ([100, 700], [(1000, [700]), (1000, [])]),
        ([100, 700], [(100, [100]), (100, []), (199, []), (250, [200]), (400, [400]), (699, []), (700, [700])]),
        ([100, 700], [(450, [400]), (699, []), (9000, [700]), (9000, [])]),
        ([700, 100, 150], [(150, [100]), (200, [200]), (650, [400]), (700, [700]), (700, [])]),
        ([100, 101], [(100, [100]), (100, []), (101, [101]), (101, [])]),
    ],
)  # fmt: skip
def test_a_larger_one_that_waits_is_told_when_it_fits_and_nobody_twice(refused, looks):
    refusals = Refusals()
    for tokens in refused:
        refusals.add(GATEWAY, tokens, 10.0, 0.0)
    for fits, tells in looks:
        assert told(refusals, 1.0, fits) == tells
    assert len(refusals) == 0


def test_a_refusal_after_it_was_told_brings_the_small_ones_back():
    refusals = Refusals()
    refusals.add(GATEWAY, 100, 10.0, 0.0)
    refusals.add(GATEWAY, 700, 10.0, 0.0)
    assert told(refusals, 1.0, 120) == [100]
    assert told(refusals, 1.0, 120) == []
    refusals.add(GATEWAY, 110, 10.0, 1.0)
    assert told(refusals, 2.0, 120) == [110]
    assert told(refusals, 2.0, 5000) == [700]
    assert len(refusals) == 0


def test_nobody_is_told_of_what_nobody_wants_any_more():
    refusals = Refusals()
    refusals.add(GATEWAY, 100, 2.0, 0.0)
    refusals.add(GATEWAY, 700, 5.0, 0.0)
    assert told(refusals, 3.0, 100) == [100]
    assert len(refusals) == 1
    assert told(refusals, 5.0, 700) == []
    assert len(refusals) == 0
    refusals.add(OTHER_GATEWAY, 100, 2.0, 0.0)
    refusals.drop(OTHER_GATEWAY)
    assert told(refusals, 0.0, 700) == []


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.lists(st.integers(0, 6000), max_size=20))
def test_in_the_end_all_are_told_with_few_words(refused, looks):
    """Each number is larger than the one before, the last is the largest that was refused, and they double."""
    refusals = Refusals()
    for tokens in refused:
        refusals.add(GATEWAY, tokens, 10.0, 0.0)
    tells = [tokens for fits in (*looks, max(refused)) for tokens in told(refusals, 1.0, fits)]
    assert tells == sorted(set(tells))
    assert tells[-1] == max(refused)
    assert all(after >= min(2 * before, max(refused)) for before, after in pairwise(tells))
    assert len(refusals) == 0
