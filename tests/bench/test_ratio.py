"""How the adaptive ratio's bench searches."""

from __future__ import annotations

import pytest

from bench.ratio import walk


@pytest.mark.parametrize("edge", range(-6, 7))
@pytest.mark.parametrize("start", [-3, 0, 4])
def test_a_walk_ends_at_the_last_step_that_holds(edge, start):
    asked = []

    def holds(step: int) -> bool:
        asked.append(step)
        return step <= edge

    assert walk(holds, start) == edge
    assert len(set(asked)) <= abs(edge - start) + 2
