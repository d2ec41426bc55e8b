"""How the adaptive ratio's bench searches."""

from __future__ import annotations

import pytest

from bench.ratio import Job, recoveries, turns, walk


@pytest.mark.parametrize("edge", range(-6, 7))
@pytest.mark.parametrize("start", [-3, 0, 4])
def test_a_walk_ends_at_the_last_step_that_holds(edge, start):
    asked = []

    def holds(step: int) -> bool:
        asked.append(step)
        return step <= edge

    assert walk(holds, start) == edge
    assert len(set(asked)) <= abs(edge - start) + 2


def test_attainment_is_back_once_it_stays():
    """Right after a step nobody is late yet: that is not what is meant."""
    job = Job("drift", 1, 0.9, 0, 100.0)
    steps = ([99, 20, 95, 95], [50, 91, 80, 90], [92, 93, 80, 80])
    periods = [[95, 100]] * 4 + [[good, 100] for step in steps for good in step]
    assert recoveries({"periods": periods}, job) == [2, 4, 0]


def test_a_turn_takes_back_the_flip_before_it_in_the_same_segment():
    flips = [
        [0.0, "to decode"],
        [50.0, "to prefill"],
        [700.0, "to decode"],
        [1190.0, "to prefill"],
        [1210.0, "to decode"],
    ]
    assert turns({"flips": flips}, 1200.0) == 2
    assert turns({"flips": flips[:1]}, 1200.0) == 0
