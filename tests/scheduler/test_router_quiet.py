"""Workers that nothing comes from: who cannot wait for what that means leaves them, and nobody new goes there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.messages import Accept, Cancel, Handed, Offer, Prompt, Tokens
from core.request import Phase
from core.worker import Role
from scheduler.router_events import Arrived, Deliver, End, ToOne, WorkerDown, WorkerQuiet, WorkerUp
from tests.cast import D1, D2, P1, P2, ask, ticket, worker
from tests.scheduler.test_router import decoding, only_end, prefilling, router

SOON = replace(ask(), timeout_s=4.0)
"""A request that the verdict on a worker would cost more than half of its time."""


def offers(commands):
    return [command.message for command in commands if isinstance(command.message, Offer)]


def at(phase: Phase, machine, request=SOON):
    """The request at P1 and D1, in this phase at 0 s."""
    machine.on(Arrived(1, request), 0.0)
    key = ticket(1)
    if phase is not Phase.OFFERED:
        machine.on(Accept(key), 0.0)
    if phase in (Phase.HANDING_OFF, Phase.DECODING):
        machine.on(Tokens(key, 0, (100,)), 0.0)
    if phase is Phase.DECODING:
        machine.on(Tokens(key, 0, (100, 101)), 0.0)
    assert machine.phases()[phase] == 1
    return key


@pytest.mark.parametrize(
    ("phase", "who", "source", "sink", "tokens"),
    [
        (Phase.PREFILLING, P1, P2, None, 6),
        (Phase.HANDING_OFF, P1, P2, None, 7),
        (Phase.DECODING, D1, None, D2, 8),
    ],
)
def test_who_has_little_time_leaves_a_worker_that_is_quiet_for_another(phase, who, source, sink, tokens):
    machine = router()
    key = at(phase, machine)
    commands = machine.on(WorkerQuiet(who), 1.0)
    machine.check()
    assert ToOne(who, Cancel(key, f"{who.name} is quiet")) in commands, "it hears so when it goes on"
    (offer,) = offers(commands)
    assert (offer.prompt_tokens, offer.wait_s) == (tokens, 3.0)
    assert source in (None, offer.ticket.source)
    assert sink in (None, offer.ticket.sink)
    assert who not in (offer.ticket.source, offer.ticket.sink)
    machine.on(Accept(offer.ticket), 1.0)
    late = machine.on(Tokens(key, 0, (100, 101, 102)), 1.5)
    assert late == [], "what the quiet one says later is of an attempt that is over"
    fresh = 100 + tokens - 6
    assert machine.on(Tokens(offer.ticket, 0, (fresh,)), 1.6) == [Deliver(1, (fresh,), ())]


@pytest.mark.parametrize("phase", [Phase.PREFILLING, Phase.HANDING_OFF])
def test_a_prefill_worker_turns_to_the_second_choice_itself_where_it_was_told_of_one(phase):
    machine = router()
    key = at(phase, machine)
    assert machine.on(WorkerQuiet(D1), 1.0) == []
    machine.on(Tokens(key, 0, (100,)), 1.0)
    machine.on(Handed(replace(key, sink=D2), ()), 1.1)
    assert machine.phases()[Phase.DECODING] == 1
    machine.check()


@pytest.mark.parametrize("phase", [Phase.PREFILLING, Phase.HANDING_OFF])
def test_who_was_placed_without_a_second_choice_is_placed_again(phase):
    machine = router()
    machine.on(WorkerQuiet(D2), 0.0)
    at(phase, machine)
    machine.on(WorkerQuiet(D2, False), 0.5)
    (offer,) = offers(machine.on(WorkerQuiet(D1), 1.0))
    assert offer.ticket.sink == D2


@pytest.mark.parametrize("phase", [Phase.PREFILLING, Phase.HANDING_OFF])
@pytest.mark.parametrize(("after", "leaves"), [(2.6, True), (2.8, False)])
def test_a_prompt_leaves_a_quiet_worker_if_it_has_been_there_for_less_than_it_may_have_to_wait(phase, after, leaves):
    machine = router()
    at(phase, machine, ask())
    found = [offer.ticket.source for offer in offers(machine.on(WorkerQuiet(P1), after))]
    assert found == ([P2] if leaves else [])
    machine.check()


def test_who_has_time_waits_for_what_the_silence_comes_to():
    machine = router()
    key = decoding(machine)
    assert machine.on(WorkerQuiet(D1), 1.0) == []
    assert machine.on(Tokens(key, 2, (102,)), 1.5) == [Deliver(1, (102,), ())]
    assert machine.on(WorkerQuiet(D1, False), 1.5) == []
    assert machine.on(WorkerQuiet(D1), 4.0) == []
    (offer,) = offers(machine.on(WorkerDown(D1), 6.7))
    assert offer.ticket.sink == D2


@pytest.mark.parametrize(("phase", "who"), [(Phase.PREFILLING, P1), (Phase.DECODING, D1)])
def test_nobody_leaves_the_last_worker_of_a_phase(phase, who):
    machine = router(worker(P1, Role.PREFILL), worker(D1, Role.DECODE))
    at(phase, machine)
    assert machine.on(WorkerQuiet(who), 1.0) == []
    assert machine.missing() is None
    (offer,) = machine.on(Arrived(2, ask()), 1.0)
    assert (offer.message.ticket.source, offer.message.ticket.sink) == (P1, D1)


def test_nobody_leaves_workers_that_are_all_quiet():
    machine = router()
    at(Phase.DECODING, machine)
    machine.on(WorkerQuiet(D2), 1.0)
    assert machine.on(WorkerQuiet(D1), 1.0) == []


@pytest.mark.parametrize("phase", [Phase.PREFILLING, Phase.DECODING])
def test_who_had_nowhere_to_go_leaves_a_quiet_worker_when_another_comes(phase):
    machine = router()
    away = replace(worker(D2, Role.DECODE), ready=False)
    machine.on(WorkerUp(away), 0.0)
    at(phase, machine)
    assert machine.on(WorkerQuiet(D1), 1.0) == []
    (offer,) = offers(machine.on(WorkerUp(replace(away, ready=True)), 1.2))
    assert offer.ticket.sink == D2
    machine.check()


def test_those_who_need_a_quiet_worker_no_more_stay():
    machine = router()
    key = at(Phase.DECODING, machine)
    machine.on(Handed(key, ()), 0.5)
    assert machine.on(WorkerQuiet(P1), 1.0) == []


def test_an_offer_that_a_quiet_worker_has_goes_to_the_next_at_once():
    machine = router()
    at(Phase.OFFERED, machine, ask())
    commands = machine.on(WorkerQuiet(P1), 0.3)
    assert commands[0] == ToOne(P1, Cancel(ticket(1), "offer not answered"))
    assert [offer.ticket.source for offer in offers(commands)] == [P2]
    machine.check()


def test_new_requests_pass_over_quiet_workers_until_they_are_heard():
    machine = router()
    for who in (P1, D1):
        machine.on(WorkerQuiet(who), 0.0)
    for counter in (1, 2, 3):
        (offer,) = offers(machine.on(Arrived(counter, ask()), 0.0))
        assert (offer.ticket.source, offer.ticket.sink) == (P2, D2)
        (prompt,) = machine.on(Accept(offer.ticket), 0.0)
        assert isinstance(prompt.message, Prompt)
        assert prompt.message.second is None
    for who in (P1, D1):
        machine.on(WorkerQuiet(who, False), 1.0)
    (offer,) = offers(machine.on(Arrived(4, ask()), 1.0))
    assert (offer.ticket.source, offer.ticket.sink) == (P1, D1)
    machine.check()


def test_who_only_fits_a_quiet_worker_waits_until_it_is_heard():
    members = [worker(P1, Role.PREFILL), worker(D1, Role.DECODE), worker(D2, Role.DECODE, pages=3)]
    machine = router(*members)
    machine.on(WorkerQuiet(D1), 0.0)
    assert machine.on(Arrived(1, ask()), 0.0) == [], "it is not too large: a worker that is there holds it"
    machine.check()
    (offer,) = offers(machine.on(WorkerQuiet(D1, False), 1.0))
    assert offer.ticket.sink == D1


def test_who_only_fits_a_quiet_worker_is_refused_when_it_stays_quiet():
    members = [worker(P1, Role.PREFILL), worker(D1, Role.DECODE), worker(D2, Role.DECODE, pages=3)]
    machine = router(*members)
    machine.on(WorkerQuiet(D1), 0.0)
    machine.on(Arrived(1, ask()), 0.0)
    assert machine.deadline() == 3.0
    end = only_end(machine.on(None, 3.0))
    assert isinstance(end, End)
    assert (end.code, end.reason) == ("UNAVAILABLE", "no worker with room for it answers")


def test_a_life_that_comes_back_is_not_quiet_any_more():
    machine = router()
    machine.on(WorkerQuiet(P1), 0.0)
    prefilling(machine)
    machine.on(WorkerDown(P1), 1.0)
    machine.on(WorkerUp(worker(P1, Role.PREFILL)), 1.0)
    assert [offer.ticket.source for offer in offers(machine.on(Arrived(2, ask()), 1.0))] == [P1]
