"""How many rows a promise of gaps allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.cost import CostModel
from scheduler.pace import Pace

COST = CostModel("test", ((1.0, 0, 0, 0),), ((0.010, 0.001, 0.00001),))
ROUGH = CostModel("rough", ((1.0, 0, 0, 0),), ((0.010, 0.001, 0.00001),), (), (("decode", (0, 0, 0.5, 0.5, 0.5)),))


def room(pace: Pace, gap_s: float, context: int) -> int:
    """Rows of a kind that come in."""
    count = 0
    while count < 99 and pace.allows(gap_s, context):
        pace.add(gap_s, context)
        count += 1
    return count


@pytest.mark.parametrize(
    ("cost", "share", "gap_s", "context", "want"),
    [
        (COST, 1.0, 0.0301, 1000, 1),  # 10 ms and 11 ms a row: 21 ms for one, 32 ms for two
        (COST, 1.0, 0.0321, 1000, 2),
        (COST, 0.5, 0.0641, 1000, 2),
        (ROUGH, 1.0, 0.0481, 1000, 2),  # half longer than it says
        (COST, 1.0, 0.001, 1000, 1),  # alone everything is allowed
        (COST, 1.0, 0.0, 1000, 99),
        (None, 1.0, 0.001, 1000, 99),
    ],
)
def test_a_step_stays_below_the_promised_gap(cost, share, gap_s, context, want):
    assert room(Pace(cost, share, 0.9), gap_s, context) == want


def test_the_smallest_promise_counts_as_long_as_it_is_there():
    pace = Pace(COST, 1.0, 0.9)
    pace.add(0.033, 1000)
    assert pace.allows(0.0, 1000)
    pace.add(0.0, 1000)
    assert not pace.allows(9.0, 1000)
    pace.remove(0.033, 1000)
    assert pace.allows(9.0, 1000)
    assert not pace.allows(0.02, 1000)


def test_rows_that_have_grown_count_as_long_as_they_are():
    pace = Pace(COST, 1.0, 0.9)
    pace.add(0.0325, 0)
    assert pace.allows(0.0325, 0, step=1000)
    assert not pace.allows(0.0325, 0, step=1100)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.02, 0.03, 0.05])), max_size=30))
def test_it_remembers_every_promise(steps):
    pace, there = Pace(COST, 1.0, 0.9), []
    for joins, gap_s in steps:
        if joins:
            pace.add(gap_s, 10)
            there.append(gap_s)
        elif there:
            pace.remove(there.pop(0), 10)
        gaps = [gap for gap in (*there, 0.04) if gap > 0]
        want = not there or COST.decode_s(len(there) + 1, 10 * (len(there) + 1)) <= min(gaps)
        assert pace.allows(0.04, 10) == want
