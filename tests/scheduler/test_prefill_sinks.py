"""Who waits at which sink, and which of two sinks is asked first."""

from __future__ import annotations

import pytest

from core.worker import Identity
from scheduler.prefill_sinks import Sinks

ONE, TWO = Identity("decode-0", 1), Identity("decode-1", 1)


def test_the_wait_at_a_sink_is_that_of_the_first_that_has_no_answer():
    sinks = Sinks()
    assert sinks.behind_s(ONE, "", 5.0) == sinks.longest_s(5.0) == 0.0
    sinks.asked(ONE, "a", "", 1.0)
    sinks.asked(ONE, "b", "", 3.0)
    sinks.asked(TWO, "c", "", 4.0)
    assert (sinks.behind_s(ONE, "", 5.0), sinks.behind_s(TWO, "", 5.0)) == (4.0, 1.0)
    assert (sinks.quickest_s((ONE, TWO), "", 5.0), sinks.longest_s(5.0)) == (1.0, 4.0)
    assert sinks.answered(ONE, "a")
    assert sinks.behind_s(ONE, "", 5.0) == 2.0
    assert not sinks.answered(ONE, "a"), "it waits no more"
    assert not sinks.answered(TWO, "b"), "it waits elsewhere"
    assert sinks.answered(ONE, "b")
    assert sinks.answered(TWO, "c")
    assert sinks.longest_s(9.0) == 0.0
    sinks.check({})


@pytest.mark.parametrize(
    ("waiting", "tenant", "behind_s"),
    [
        ("aaaa", "a", 8.0),
        ("aaaa", "b", 2.0),  # after one of a
        ("aaab", "b", 6.0),  # after the one before it, and two of a
        ("aaab", "a", 8.0),
        ("abcd", "e", 8.0),  # after one of each
        ("abcd", "a", 8.0),
        ("aaaa", "twice", 1.0),  # two of its own for one of a
        ("twice twice twice a", "b", 6.0),
    ],
)
def test_the_wait_of_a_tenant_is_for_those_whose_turn_comes_before(waiting, tenant, behind_s):
    sinks, names = Sinks({"twice": 2.0}), waiting.split() if " " in waiting else list(waiting)
    for number, name in enumerate(names):
        sinks.asked(ONE, f"{number}", name, 2.0 + number / 10)
    sinks.check({f"{number}": ONE for number in range(len(names))})
    assert sinks.behind_s(ONE, tenant, 10.0) == pytest.approx(behind_s)
    assert sinks.longest_s(10.0) == 8.0


@pytest.mark.parametrize(
    ("first_s", "second_s", "quiet", "better"),
    [
        (0.0, 0.0, (), False),
        (1.5, 0.0, (), False),  # in time all the same
        (3.0, 1.0, (), True),
        (3.0, 2.5, (), False),  # late at both
        (0.0, 0.0, (ONE,), True),
        (0.0, 9.0, (ONE,), True),
        (3.0, 0.0, (TWO,), False),
        (3.0, 0.0, (ONE, TWO), False),
    ],
)
def test_the_second_sink_is_asked_where_the_first_is_quiet_or_makes_it_late(first_s, second_s, quiet, better):
    sinks = Sinks()
    sinks.asked(ONE, "a", "", 10.0 - first_s)
    sinks.asked(TWO, "b", "", 10.0 - second_s)
    for sink in quiet:
        sinks.hush(sink, True)
    assert sinks.is_better(TWO, ONE, "", left_s=2.0, now=10.0) is better
    for sink in quiet:
        sinks.hush(sink, False)
        assert not sinks.quiet(sink)


def test_those_that_wait_elsewhere_than_they_should_are_found():
    sinks = Sinks()
    sinks.asked(ONE, "a", "", 1.0)
    sinks.check({"a": ONE})
    with pytest.raises(AssertionError):
        sinks.check({"a": TWO})
