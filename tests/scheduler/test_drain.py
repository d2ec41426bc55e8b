"""A worker that is to end: it waits while that helps, and not for longer than it may."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LocalError
from scheduler.drain import Begun, Drain, DrainConfig, Drained, Look, Looked
from tests.cast import QUICK


def test_it_ends_as_soon_as_nothing_is_left_that_somebody_may_take():
    machine = Drain()
    assert machine.deadline() is None
    assert machine.on(Begun(), 10.0) == [Look()]
    assert machine.deadline() is None, "a look is under way"
    assert machine.on(Looked(True), 10.0) == []
    assert machine.deadline() == 10.02
    assert machine.on(None, 10.01) == []
    assert machine.on(None, 10.02) == [Look()]
    assert machine.on(Looked(False), 10.03) == [Drained()]
    assert machine.deadline() is None
    assert machine.on(None, 11.0) == []


def test_who_has_nothing_ends_at_once():
    machine = Drain()
    machine.on(Begun(), 1.0)
    assert machine.on(Looked(False), 1.0) == [Drained()]


@QUICK
@given(st.lists(st.floats(0.0, 0.7), max_size=60), st.floats(0.0, 3.0), st.floats(0.01, 1.0))
def test_patience_ends_however_late_the_looks_are(late, patience_s, look_s):
    machine = Drain(DrainConfig(patience_s, look_s))
    now, commands = 100.0, machine.on(Begun(), 100.0)
    for each in [*late, *[0.0] * 400]:
        assert commands == [Look()]
        now += each
        commands = machine.on(Looked(True), now)
        machine.check()
        if commands:
            break
        due = machine.deadline()
        assert due is not None
        assert now < due <= 100.0 + patience_s
        now = due
        commands = machine.on(None, now)
    assert commands == [Drained()]
    assert 100.0 + patience_s <= now <= 100.0 + patience_s + 0.7


def test_what_makes_no_sense_is_refused_and_changes_nothing():
    machine = Drain()
    with pytest.raises(LocalError, match="nobody has asked"):
        machine.on(Looked(True), 0.0)
    machine.on(Begun(), 1.0)
    with pytest.raises(LocalError, match="twice"):
        machine.on(Begun(), 2.0)
    assert machine.on(Looked(True), 5.99) == []
    with pytest.raises(LocalError, match="nobody has asked"):
        machine.on(Looked(False), 5.99)
    assert machine.deadline() == 6.0
    for settings in ({"patience_s": -1.0}, {"look_s": 0.0}):
        with pytest.raises(LocalError, match="drain"):
            DrainConfig(**settings)
