"""Gaps counted by stretches are those counted one by one."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from sim.gaps import LONGEST_S, SHORTEST_S, GapLog, beyond, edges, quantile


def test_edges_rise_by_a_tenth_and_hold_the_bound():
    upper = edges(0.05)
    assert upper[0] == SHORTEST_S
    assert upper[-1] >= LONGEST_S
    assert 0.05 in upper
    assert all(a < b <= a * 1.1000001 for a, b in pairwise(upper))
    assert len(edges()) == len(upper) - 1


@pytest.mark.parametrize("seed", range(20))
def test_a_stretch_is_its_steps(seed):
    dice = random.Random(seed)
    upper = edges(0.02)
    one, many = GapLog(upper), GapLog(upper)
    for _ in range(10):
        base, slope = dice.uniform(1e-4, 0.05), dice.choice([0.0, 1e-6, 1e-3])
        start = dice.randrange(5)
        stop = start + dice.randrange(40)

        def seconds(index: int, base: float = base, slope: float = slope) -> float:
            return base + slope * index

        before = one.mark()
        many.span(seconds, start, stop)
        for index in range(start, stop):
            one.add(seconds(index))
        assert one.mark() == many.mark()
        assert sum(one.since(before)) == stop - start


def test_rows_that_join_together_share_a_mark():
    log = GapLog(edges())
    first = log.mark()
    assert log.mark() is first
    log.add(0.01)
    assert log.mark() is not first
    assert sum(log.since(first)) == 1


def test_quantile_is_the_edge_of_the_nearest_rank():
    upper = (1.0, 2.0, 4.0)
    assert quantile((0, 0, 0, 0), upper, 0.99, 0) == 0.0
    assert quantile((98, 1, 1, 0), upper, 0.98, 100) == 1.0
    assert quantile((98, 1, 1, 0), upper, 0.99, 100) == 2.0
    assert quantile((98, 1, 1, 0), upper, 1.0, 100) == 4.0
    assert quantile((0, 0, 0, 1), upper, 0.5, 1) == math.inf


def test_beyond_counts_what_is_above_and_not_what_is_equal():
    upper = edges(0.05)
    log = GapLog(upper)
    for seconds in (0.049, 0.05, 0.0500001, 1.0):
        log.add(seconds)
    assert beyond(log.mark(), upper, 0.05) == 2
