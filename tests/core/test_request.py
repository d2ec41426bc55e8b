"""A request's phases, and the names of tickets and identities."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LocalError
from core.request import PHASE_NEXT, Phase
from core.worker import Identity
from tests.cast import D2, P2, QUICK, ticket


def test_every_phase_has_its_row_in_the_table():
    assert PHASE_NEXT.keys() == set(Phase)


def test_the_ends_are_where_nothing_follows():
    assert {phase for phase in Phase if phase.ended} == {Phase.DONE, Phase.REJECTED, Phase.CANCELLED, Phase.FAILED}


def test_a_live_request_can_always_be_cancelled_or_fail():
    for phase in Phase:
        if not phase.ended:
            assert {Phase.CANCELLED, Phase.FAILED} <= set(PHASE_NEXT[phase])


def test_every_phase_can_be_reached_and_left():
    reached, edge = {Phase.QUEUED}, [Phase.QUEUED]
    while edge:
        edge = [after for phase in edge for after in PHASE_NEXT[phase] if after not in reached]
        reached.update(edge)
    assert reached == set(Phase)


def test_a_lost_placement_goes_back_to_the_queue_from_anywhere():
    for phase in (Phase.OFFERED, Phase.PREFILLING, Phase.HANDING_OFF, Phase.DECODING):
        assert Phase.QUEUED in PHASE_NEXT[phase]


def test_only_a_queued_request_is_rejected():
    assert [phase for phase in Phase if Phase.REJECTED in PHASE_NEXT[phase]] == [Phase.QUEUED]


def test_a_tickets_key_names_request_and_attempt_but_not_the_workers():
    one = ticket(7, attempt=2)
    assert one.key == "gateway-1#000000000061/7.2"
    assert replace(one, sink=D2, source=P2).key == one.key
    assert ticket(7, attempt=3).key != one.key
    assert ticket(72, attempt=2).key != ticket(7, attempt=22).key


@QUICK
@given(st.text(min_size=1), st.integers(0, 2**48 - 1))
def test_an_identity_survives_being_written(name, incarnation):
    identity = Identity(name, incarnation)
    assert Identity.parse(str(identity)) == identity


@pytest.mark.parametrize("text", ["", "#", "name", "name#", "#12", "name#xyz", "name#1 2"])
def test_what_is_no_identity_is_refused(text):
    with pytest.raises(LocalError, match="want NAME#HEX"):
        Identity.parse(text)
