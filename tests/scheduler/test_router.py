"""The router: scripts with exact commands, then a small deployment in which everything goes wrong."""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core.errors import LocalError
from core.messages import (
    Accept,
    Cancel,
    Failed,
    Finished,
    Handed,
    Offer,
    Prompt,
    Reject,
    SlotFree,
    Tokens,
)
from core.request import Phase, Request, Stage, Ticket
from core.sampling import Sampling
from core.worker import Identity, ProcessEnded, Role
from scheduler.router import Router, RouterConfig
from scheduler.router_events import (
    Arrived,
    ClientGone,
    Complete,
    Deliver,
    End,
    Satisfied,
    ToOne,
    WorkerDown,
    WorkerQuiet,
    WorkerUp,
)
from tests.cast import D1, D2, GATEWAY, MIXED, P1, P2, SHAPE, ask, efforts, ticket, worker

UP = [worker(P1, Role.PREFILL), worker(P2, Role.PREFILL), worker(D1, Role.DECODE), worker(D2, Role.DECODE)]


CUT = [
    worker(P1, Role.PREFILL),
    replace(worker(D1, Role.DECODE, pages=20), kv=replace(SHAPE, page_tokens=8)),
    replace(worker(D2, Role.DECODE, pages=78), kv=replace(SHAPE, page_tokens=2)),
]
"""Pages of four, eight and two tokens; where a request has continuations, it may fit into the small ones alone."""


def router(*members, **settings) -> Router:
    machine = Router(GATEWAY, RouterConfig(**settings))
    for member in members or UP:
        assert machine.on(WorkerUp(member), 0.0) == []
    return machine


finished = partial(Finished, decoded=True)
"""As the decode worker says it."""


def placed(key: Ticket, prompt: int, most: int, wait_s: float) -> Offer:
    """The offer of a request; the other decode worker is the second choice."""
    return Offer(key, prompt, most, wait_s, second=D2 if key.sink == D1 else D1)


def prefilling(machine: Router, *, max_tokens: int = 8, now: float = 0.0) -> Ticket:
    """A request of 6 tokens at P1 with D1 as its sink and D2 as the second choice."""
    (offer,) = machine.on(Arrived(1, ask(max_tokens=max_tokens)), now)
    assert isinstance(offer, ToOne)
    machine.on(Accept(offer.message.ticket), now)
    return offer.message.ticket


def decoding(machine: Router, **how) -> Ticket:
    """The same, decoded at D1 and two tokens on."""
    key = prefilling(machine, **how)
    machine.on(Tokens(key, 0, (100,)), 0.0)
    machine.on(Tokens(key, 0, (100, 101)), 0.0)
    assert machine.phases()[Phase.DECODING] == 1
    return key


def only_end(commands) -> End:
    (end,) = [command for command in commands if isinstance(command, End)]
    return end


def test_a_request_from_arrival_to_its_end():
    machine, request, key = router(), ask(), ticket(1)
    assert machine.on(Arrived(1, request), 10.0) == [ToOne(P1, placed(key, 6, 8, 30.0))]
    assert machine.deadline() == 11.0
    prompt = Prompt(key, replace(request, timeout_s=99.5), D2)
    assert machine.on(Accept(key, cached_tokens=4), 10.5) == [ToOne(P1, prompt)]
    assert machine.deadline() == 110.0
    assert machine.on(Tokens(key, 0, (7,), (1,)), 11.0) == [Deliver(1, (7,), (1,))]
    handed = Stage("prefill", "prefill-1", 0.5)
    assert machine.on(Handed(key, (handed,)), 11.1) == []
    assert machine.on(Tokens(key, 0, (7, 8), (0, 2)), 11.2) == [Deliver(1, (8,), (2,))]
    assert machine.on(Tokens(key, 2, (9,), (3,)), 11.3) == [Deliver(1, (9,), (3,))]
    stages = (Stage("queued", "gateway-1", 0.0), Stage("offered", "gateway-1", 0.5), handed)
    end = End(1, Phase.DONE, "stop", stop_token_id=2, cached_tokens=4, stages=stages)
    assert machine.on(finished(key, "stop", 3, 2), 11.4) == [end]
    assert (len(machine), machine.deadline(), machine.ignored) == (0, None, 0)


def test_a_refusal_sends_the_offer_to_the_next_worker():
    machine = router()
    machine.on(Arrived(1, ask()), 0.0)
    again = ticket(1, attempt=2, source=P2)
    assert machine.on(Reject(ticket(1), "busy", 3.0), 0.5) == [ToOne(P2, placed(again, 6, 8, 29.5))]
    assert machine.on(Reject(again, "busy too", 2.0), 0.5) == [], "it may be yes soon enough"
    assert machine.deadline() == 30.0
    end = End(1, Phase.REJECTED, "all 2 prefill workers refused; prefill-2: busy too", "RESOURCE_EXHAUSTED", 2.0)
    assert machine.on(None, 30.0) == [end]


def test_a_request_is_shed_at_once_where_waiting_cannot_help():
    machine = router()
    machine.on(Arrived(1, ask()), 0.0)
    machine.on(Reject(ticket(1), "busy", 31.0), 0.5)
    end = End(1, Phase.REJECTED, "all 2 prefill workers refused; prefill-2: busy too", "RESOURCE_EXHAUSTED", 29.6)
    assert machine.on(Reject(ticket(1, attempt=2, source=P2), "busy too", 29.6), 0.5) == [end]


def test_who_may_come_again_later_is_not_kept_waiting():
    """Its first token would be in time, but somebody's would not be any more; the soonest chance is what it is told."""
    machine = router()
    machine.on(Arrived(1, ask()), 0.0)
    machine.on(Reject(ticket(1), "busy", 3.0, 9.0), 0.5)
    end = End(1, Phase.REJECTED, "all 2 prefill workers refused; prefill-2: busy too", "RESOURCE_EXHAUSTED", 7.0)
    assert machine.on(Reject(ticket(1, attempt=2, source=P2), "busy too", 4.0, 7.0), 0.5) == [end]


def test_an_offer_that_is_not_answered_is_recalled_and_goes_to_the_next_worker():
    machine = router()
    machine.on(Arrived(1, ask()), 0.0)
    again = ticket(1, attempt=2, source=P2)
    commands = [ToOne(P1, Cancel(ticket(1), "offer not answered")), ToOne(P2, placed(again, 6, 8, 29.0))]
    assert machine.on(None, 1.0) == commands
    assert machine.on(Accept(ticket(1)), 1.1) == []
    assert machine.ignored == 1
    assert machine.on(None, 2.0)[1] == ToOne(P1, placed(ticket(1, attempt=3, source=P1), 6, 8, 28.0)), "busy, not lost"
    now = 2.0
    while not (ends := [command for command in machine.on(None, now) if isinstance(command, End)]):
        now = machine.deadline() or 0.0
    assert (now, ends[0].code, ends[0].reason) == (30.0, "UNAVAILABLE", "no worker with room for it answers")


def test_the_ttft_goal_bounds_the_wait_that_is_offered():
    machine = router(max_queue_s=5.0)
    (offer,) = machine.on(Arrived(1, replace(ask(), slo=replace(ask().slo, ttft_s=0.7))), 0.0)
    assert offer.message.wait_s == 0.7


def test_no_first_token_is_wanted_later_than_the_last_one():
    machine = router()
    (offer,) = machine.on(Arrived(1, replace(ask(), timeout_s=4.0)), 1.0)
    assert offer.message.wait_s == 4.0


def test_without_goals_everybody_queues_for_as_long_as_the_client_waits():
    machine = router(max_queue_s=5.0, by_goal=False)
    request = replace(ask(), slo=replace(ask().slo, ttft_s=0.7), timeout_s=60.0)
    (offer,) = machine.on(Arrived(1, request), 0.0)
    assert offer.message.wait_s == 60.0


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([], "no prefill and no decode worker is ready"),
        ([UP[0]], "no decode worker is ready"),
        ([UP[2]], "no prefill worker is ready"),
    ],
)
def test_without_workers_a_request_is_rejected_at_once(members, reason):
    machine = Router(GATEWAY, RouterConfig())
    for member in members:
        machine.on(WorkerUp(member), 0.0)
    assert machine.missing() == reason
    assert machine.on(Arrived(1, ask()), 0.0) == [End(1, Phase.REJECTED, reason, "UNAVAILABLE")]


@pytest.mark.parametrize(
    ("members", "size", "reason"),
    [
        ([worker(P1, Role.PREFILL, pages=2), UP[2]], (9, 1), "prompt: got 9 tokens, no worker holds more than 8"),
        ([UP[0], worker(D1, Role.DECODE, pages=3)], (6, 7), "prompt and max_tokens: got 13 tokens, no decode "),
        ([worker(MIXED, Role.MIXED, pages=4)], (6, 7), "prompt and max_tokens: got 13 tokens, no decode "),
    ],
)
def test_a_request_that_fits_nowhere_is_the_callers_error(members, size, reason):
    (end,) = router(*members).on(Arrived(1, ask(*size)), 0.0)
    assert (end.phase, end.code) == (Phase.REJECTED, "INVALID_ARGUMENT")
    assert end.reason.startswith(reason)


def test_the_least_loaded_workers_are_chosen():
    machine = router()
    machine.on(Arrived(1, ask(20)), 0.0)
    assert machine.on(Arrived(2, ask(6)), 0.0) == [ToOne(P2, placed(ticket(2, source=P2, sink=D2), 6, 8, 30.0))]
    assert machine.on(Arrived(3, ask(6)), 0.0) == [ToOne(P2, placed(ticket(3, source=P2, sink=D2), 6, 8, 30.0))]


def test_a_mixed_worker_hands_over_to_itself():
    machine = router(worker(MIXED, Role.MIXED), UP[2])
    (offer,) = machine.on(Arrived(1, ask()), 0.0)
    assert offer.message.ticket == ticket(1, source=MIXED, sink=MIXED)
    (prompt,) = machine.on(Accept(offer.message.ticket), 0.0)
    assert prompt.message.second is None


def test_a_mixed_worker_that_cannot_hold_both_parts_hands_over_to_another():
    machine = router(worker(MIXED, Role.MIXED, pages=5), UP[2])
    (offer,) = machine.on(Arrived(1, ask(6, 8)), 0.0)
    assert offer.message.ticket == ticket(1, source=MIXED, sink=D1)


def test_a_client_that_leaves_frees_every_worker_that_may_hold_something():
    machine = router()
    key = prefilling(machine)
    recalled = [ToOne(who, Cancel(key, "left")) for who in (P1, D1, D2)]
    end = only_end(commands := machine.on(ClientGone(1, "left"), 1.0))
    assert commands[:-1] == recalled
    assert (end.phase, end.code, end.reason) == (Phase.CANCELLED, "CANCELLED", "left")
    assert machine.on(ClientGone(1, "left"), 1.0) == []


def test_an_offered_request_is_recalled_where_it_was_offered_only():
    machine = router()
    machine.on(Arrived(1, ask()), 0.0)
    assert machine.on(ClientGone(1, "left"), 0.0)[:-1] == [ToOne(P1, Cancel(ticket(1), "left"))]


def test_a_request_that_takes_too_long_fails_with_what_it_has():
    machine = router()
    key = decoding(machine)
    assert machine.deadline() == 100.0
    commands = machine.on(None, 100.0)
    assert commands[:-1] == [ToOne(who, Cancel(key, only_end(commands).reason)) for who in (P1, D1, D2)]
    assert only_end(commands).code == "DEADLINE_EXCEEDED"
    assert only_end(commands).reason == "not done within 100 s, 2 tokens were sent"


def test_a_prefill_worker_that_is_lost_while_offered_costs_nothing():
    machine = router()
    machine.on(Arrived(1, ask()), 0.0)
    assert machine.on(WorkerDown(P1), 0.5) == [ToOne(P2, placed(ticket(1, attempt=2, source=P2), 6, 8, 29.5))]


@pytest.mark.parametrize("first_token", [False, True])
def test_a_prefill_worker_that_is_lost_before_the_hand_over_is_replaced(first_token):
    machine = router()
    key = prefilling(machine)
    if first_token:
        machine.on(Tokens(key, 0, (100,)), 0.0)
    commands = machine.on(WorkerDown(P1), 2.0)
    again = ticket(1, attempt=2, source=P2)
    recalled = [ToOne(who, Cancel(key, "prefill-1 was lost")) for who in (D1, D2)]
    assert commands == [*recalled, ToOne(P2, placed(again, 6 + first_token, 8 - first_token, 98.0))]
    (prompt,) = machine.on(Accept(again), 2.0)
    assert prompt.message.request.prompt == (*range(6), *[100] * first_token)
    assert machine.on(Tokens(again, 0, (101,)), 3.0) == [Deliver(1, (101,), ())]


@pytest.mark.parametrize(
    ("lost", "first", "reason"),
    [
        ([D2, D1], D1, "no decode worker is ready"),
        ([D2, D1], D2, "no decode worker is ready"),
        ([P1, P2, D1], P2, "no prefill worker is ready"),
        ([D2, P2, P1, D1], P1, "no prefill and no decode worker is ready"),
    ],
)
def test_a_request_that_was_begun_waits_for_workers_until_its_deadline(lost, first, reason):
    """`first` is the first of its kind that is back; then whoever else it needs comes."""
    machine, roles = router(), {up.identity: up for up in UP}
    key = decoding(machine)
    for who in lost:
        commands = machine.on(WorkerDown(who), 1.0)
        assert not [command for command in commands if isinstance(command, End)]
        machine.check()
    assert machine.phases()[Phase.QUEUED] == 1
    assert machine.deadline() == 100.0
    late = copy.deepcopy(machine)
    end = only_end(late.on(None, 100.0))
    assert (end.phase, end.code) == (Phase.FAILED, "UNAVAILABLE")
    assert end.reason == f"{reason}: not done within 100 s, 2 tokens were sent"
    assert late.deadline() is None
    assert machine.on(Tokens(key, 2, (102,)), 2.0) == [], "a late word of the worker that is lost"
    commands = machine.on(WorkerUp(roles[first]), 3.0)
    for who in lost:
        if who != first and not commands:
            commands = machine.on(WorkerUp(roles[who]), 3.0)
        machine.check()
    (offer,) = (command.message for command in commands)
    assert isinstance(offer, Offer)
    assert (offer.prompt_tokens, offer.wait_s) == (8, 97.0)
    (prompt,) = machine.on(Accept(offer.ticket), 3.0)
    assert prompt.message.request.prompt == (*range(6), 100, 101)
    assert machine.on(Tokens(offer.ticket, 0, (102,)), 3.5) == [Deliver(1, (102,), ())]
    end = only_end(machine.on(Finished(offer.ticket, "length", 1), 4.0))
    assert (end.phase, end.attempts) == (Phase.DONE, 2)


def test_a_worker_that_comes_and_is_not_ready_is_not_waited_for_and_one_that_becomes_ready_is():
    machine = router(UP[0], UP[2])
    decoding(machine)
    machine.on(WorkerDown(D1), 1.0)
    assert machine.on(WorkerUp(replace(UP[2], ready=False)), 2.0) == []
    assert machine.on(WorkerUp(UP[1]), 2.0) == [], "there was a prefill worker all the time"
    assert machine.phases()[Phase.QUEUED] == 1
    (offer,) = machine.on(WorkerUp(UP[2]), 3.0)
    assert (offer.worker, offer.message.wait_s) == (P1, 97.0)
    machine.check()


def test_a_request_that_was_begun_waits_for_a_worker_with_room_for_it():
    machine = router(UP[0], worker(D1, Role.DECODE), worker(D2, Role.DECODE, pages=3))
    decoding(machine)
    machine.on(WorkerDown(D1), 1.0)
    assert machine.phases()[Phase.QUEUED] == 1
    assert machine.missing() is None
    end = only_end(copy.deepcopy(machine).on(None, 100.0))
    assert (end.code, end.reason) == (
        "UNAVAILABLE",
        "no worker with room for it is ready: not done within 100 s, 2 tokens were sent",
    )
    (offer,) = machine.on(WorkerUp(worker(D1, Role.DECODE)), 3.0)
    assert offer.message.ticket.sink == D1


def test_who_is_to_blame_is_asked_again_where_nobody_else_could_do_it():
    machine = router(UP[0], worker(P2, Role.PREFILL, pages=1), UP[2])
    key = prefilling(machine)
    commands = machine.on(Failed(key, "UNAVAILABLE", "oh"), 1.0)
    assert commands[-1] == ToOne(P1, Offer(ticket(1, attempt=2, source=P1), 6, 8, 99.0))


def test_who_is_to_blame_and_the_only_one_is_asked_again_a_little_later():
    machine = router(UP[0], UP[2])
    commands = machine.on(Failed(prefilling(machine), "UNAVAILABLE", "oh"), 1.0)
    assert not [command for command in commands if isinstance(command.message, Offer)], "not at once"
    assert machine.deadline() == 1.1
    assert machine.on(WorkerUp(UP[3]), 1.05) == [], "nor when anybody comes"
    assert machine.on(None, 1.1) == [ToOne(P1, placed(ticket(1, attempt=3, source=P1), 6, 8, 98.9))]


def put_off(machine: Router, key: Ticket, times: int) -> tuple[list[float], Ticket, float]:
    """How long an attempt is waited for after each of so many failures, the last attempt, and when that was made."""
    now, waits = 0.0, []
    for _ in range(times):
        machine.on(Failed(key, "UNAVAILABLE", "no lane"), now)
        machine.check()
        due = machine.deadline()
        assert due is not None
        waits.append(round(due - now, 4))
        now = due
        (offer,) = machine.on(None, now)
        key = offer.message.ticket
        machine.on(Accept(key), now)
    return waits, key, now


def test_news_of_a_broken_way_is_faster_than_the_attempts_that_it_fails():
    """One prefill and one decode worker: the eighth failure, after 4.5 s, would be the last."""
    machine = router(UP[0], UP[2], again_s=0.1)
    waits, key, now = put_off(machine, prefilling(machine), 7)
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert only_end(machine.on(Failed(key, "UNAVAILABLE", "no lane"), now)).attempts == 8


def test_with_little_time_left_attempts_are_put_off_for_less_and_never_made_at_once():
    """Two seconds are left: half of what is left at most is waited, and what is wrong may be over by then."""
    machine = router(UP[0], UP[2])
    (offer,) = machine.on(Arrived(1, replace(ask(), timeout_s=2.0)), 0.0)
    machine.on(Accept(offer.message.ticket), 0.0)
    assert put_off(machine, offer.message.ticket, 6)[0] == [0.1, 0.2, 0.4, 0.65, 0.325, 0.1625]


def test_a_worker_that_goes_while_an_attempt_is_put_off_is_waited_for():
    machine = router(UP[0], UP[2])
    machine.on(Failed(prefilling(machine), "UNAVAILABLE", "no lane"), 0.0)
    machine.on(WorkerUp(replace(UP[2], ready=False)), 0.05)
    assert machine.on(None, 0.1) == []
    assert machine.deadline() == 100.0
    (offer,) = machine.on(WorkerUp(UP[2]), 5.0)
    assert (offer.worker, offer.message.wait_s) == (P1, 95.0)


@pytest.mark.parametrize("offered", [True, False], ids=["offered", "new"])
@pytest.mark.parametrize(("goal_s", "within_s"), [(0.0, 3.0), (0.7, 0.7)])
def test_a_request_waits_a_moment_for_a_pair_of_workers_if_there_was_one_lately(offered, goal_s, within_s):
    def scene():
        machine, request = router(UP[0], UP[2]), replace(ask(), slo=replace(ask().slo, ttft_s=goal_s))
        if offered:
            machine.on(Arrived(1, request), 1.0)
        assert machine.on(WorkerDown(P1), 1.0) == []
        if not offered:
            assert machine.on(Arrived(1, request), 1.0) == []
        (stands,) = machine.standing()
        assert (stands.state, stands.waits_for) == (Phase.QUEUED, "no prefill worker is ready")
        assert machine.deadline() == 1.0 + within_s
        machine.check()
        return machine

    machine = scene()
    assert machine.missing() == "no prefill worker is ready", "which its health says at once"
    (sent,) = machine.on(WorkerUp(UP[1]), 1.5)
    assert (sent.worker, sent.message.prompt_tokens, sent.message.max_tokens) == (P2, 6, 8)
    (_,) = machine.on(Accept(sent.message.ticket), 1.5)
    trace = machine.trace(1)
    assert trace is not None
    assert trace.stages[0] == Stage("queued", "gateway-1", 0.5)
    machine = scene()
    (end,) = machine.on(None, 1.0 + within_s)
    assert (end.phase, end.code, end.reason) == (Phase.REJECTED, "UNAVAILABLE", "no prefill worker is ready")
    machine = scene()
    assert only_end(machine.on(ClientGone(1, "left"), 1.1)).phase is Phase.CANCELLED
    assert (len(machine), machine.deadline()) == (0, None)


def test_whoever_waits_for_a_pair_is_refused_what_none_can_hold_when_it_is_there():
    machine = router(UP[0], UP[2])
    machine.on(WorkerDown(D1), 1.0)
    machine.on(Arrived(1, ask(6, 300)), 1.0)
    machine.on(Arrived(2, replace(ask(6, 30), sampling=Sampling(30, n=3))), 1.0)
    end, sent = machine.on(WorkerUp(worker(D2, Role.DECODE, pages=50)), 1.5)
    assert (end.phase, end.code) == (Phase.REJECTED, "INVALID_ARGUMENT")
    assert (sent.message.ticket.counter, sent.message.ticket.sink) == (2, D2)
    machine.check()


def test_what_fits_is_as_it_was_while_a_pair_is_away_for_a_moment():
    machine = router(UP[0], UP[2])
    before = machine.most_tokens()(6, 1)
    machine.on(WorkerDown(D1), 1.0)
    assert machine.most_tokens()(6, 1) == before is not None


@pytest.mark.parametrize("after_s", [31.0, 1.0])
def test_nobody_waits_for_a_pair_that_is_long_gone_or_that_is_not_to_be_waited_for(after_s):
    machine = router(UP[0], UP[2], pair_s=3.0 if after_s > 30 else 0.0)
    machine.on(WorkerDown(D1), 1.0)
    (end,) = machine.on(Arrived(1, ask()), 1.0 + after_s)
    assert (end.phase, end.code, end.reason) == (Phase.REJECTED, "UNAVAILABLE", "no decode worker is ready")


def test_a_rest_that_has_grown_too_large_for_all_workers_that_there_are_waits_for_none():
    """A mixed worker alone holds a prompt twice while it hands over to itself, and the tokens so far are prompt now."""
    machine = Router(GATEWAY, RouterConfig())
    machine.on(WorkerUp(worker(MIXED, Role.MIXED, pages=11)), 0.0)
    key = machine.on(Arrived(1, ask(16, 12)), 0.0)[0].message.ticket
    machine.on(Accept(key), 0.0)
    machine.on(Tokens(key, 0, (100, 101)), 0.0)
    assert machine.on(WorkerDown(MIXED), 1.0) == []
    (end,) = machine.on(WorkerUp(worker(Identity(MIXED.name, 2), Role.MIXED, pages=11)), 2.0)
    assert (end.phase, end.code) == (Phase.FAILED, "UNAVAILABLE")
    assert end.reason == "no worker with room for it answers"
    machine.check()


def test_whoever_leaves_or_has_enough_while_it_waits_for_a_worker_leaves_nothing_behind():
    for event, phase in ((ClientGone(1, "left"), Phase.CANCELLED), (Satisfied(1), Phase.DONE)):
        machine = router(UP[0], UP[2])
        decoding(machine)
        machine.on(WorkerDown(D1), 1.0)
        (end,) = machine.on(event, 2.0)
        assert end.phase is phase
        assert machine.deadline() is None
        machine.check()
        assert machine.on(WorkerUp(UP[2]), 3.0) == []


def test_who_waits_for_room_is_offered_what_nobody_could_use_while_decode_workers_were_away():
    machine = router(UP[0], UP[2])
    machine.on(Arrived(1, ask()), 0.0)
    machine.on(Reject(ticket(1), "busy", 5.0), 0.0)
    machine.on(WorkerDown(D1), 1.0)
    assert machine.on(SlotFree(P1, 10), 2.0) == []
    (offer,) = machine.on(WorkerUp(UP[2]), 3.0)
    assert (offer.worker, offer.message.ticket.attempt) == (P1, 2)
    machine.check()


def test_continuations_wait_for_a_worker_each_for_itself():
    machine = router(UP[0], UP[2])
    several(machine, n=3, decodes=True)
    machine.on(WorkerDown(D1), 1.0)
    machine.check()
    assert machine.phases()[Phase.QUEUED] == 3
    assert machine.on(Satisfied(1, 1), 2.0) == [Complete(1, 1, "stop")]
    machine.check()
    offers = [command.message for command in machine.on(WorkerUp(UP[2]), 3.0)]
    assert [type(offer) for offer in offers] == [Offer, Offer]
    machine.check()


def test_a_prefill_worker_that_is_lost_after_the_hand_over_is_not_missed():
    machine = router()
    key = decoding(machine)
    assert machine.on(WorkerDown(P1), 2.0) == []
    assert machine.on(Tokens(key, 2, (102,)), 3.0) == [Deliver(1, (102,), ())]


@pytest.mark.parametrize("lost", [D1, D2])
def test_a_decode_worker_that_is_lost_before_it_has_the_kv_is_the_prefill_workers_affair(lost):
    machine = router()
    key = prefilling(machine)
    assert machine.on(WorkerDown(lost), 1.0) == []
    machine.on(Tokens(key, 0, (100,)), 1.0)
    assert machine.phases()[Phase.HANDING_OFF] == 1


def test_a_hand_over_to_a_decode_worker_that_has_been_lost_starts_anew():
    machine = router()
    key = prefilling(machine)
    machine.on(Tokens(key, 0, (100,)), 1.0)
    machine.on(WorkerDown(D1), 1.0)
    commands = machine.on(Handed(key, ()), 1.0)
    again = ticket(1, attempt=2, source=P1, sink=D2)
    reason = "decode-1 was lost"
    assert commands == [
        ToOne(P1, Cancel(key, reason)),
        ToOne(D2, Cancel(key, reason)),
        ToOne(P1, Offer(again, 7, 7, 99.0)),
    ]


def test_a_decode_worker_that_is_lost_while_decoding_is_replaced_and_no_token_is_sent_twice():
    machine = router()
    key = decoding(machine)
    commands = machine.on(WorkerDown(D1), 2.0)
    again = ticket(1, attempt=2, sink=D2)
    assert commands[-1] == ToOne(P1, Offer(again, 8, 6, 98.0))
    assert machine.on(Tokens(key, 2, (999,)), 2.0) == []
    (prompt,) = machine.on(Accept(again), 2.0)
    assert prompt.message.request.prompt == (*range(6), 100, 101)
    assert machine.on(Tokens(again, 0, (102,)), 3.0) == [Deliver(1, (102,), ())]
    assert machine.on(Finished(again, "length", 1), 3.0)[0].attempts == 2


def test_the_second_choice_counts_once_it_has_the_kv():
    machine = router()
    key = prefilling(machine)
    machine.on(Tokens(key, 0, (100,)), 0.0)
    taken = replace(key, sink=D2)
    assert machine.on(Handed(taken, ()), 0.0) == []
    assert machine.on(WorkerDown(D1), 0.0) == []
    assert machine.on(WorkerDown(D2), 0.0) == [ToOne(P1, Cancel(taken, "decode-2 was lost"))]
    assert machine.missing() == "no decode worker is ready"
    assert machine.phases()[Phase.QUEUED] == 1


def test_both_choices_are_recalled_after_the_second_took_the_kv():
    machine = router()
    key = prefilling(machine)
    machine.on(Tokens(key, 0, (100,)), 0.0)
    taken = replace(key, sink=D2)
    machine.on(Handed(taken, ()), 0.0)
    assert machine.on(ClientGone(1, "left"), 0.0)[:-1] == [ToOne(who, Cancel(taken, "left")) for who in (P1, D2, D1)]


def test_tokens_of_the_sink_that_did_not_get_the_request_are_ignored():
    machine = router()
    key = decoding(machine)
    assert machine.on(Tokens(replace(key, sink=D2), 1, (101, 102)), 0.0) == []
    assert machine.ignored == 1
    assert machine.on(finished(replace(key, sink=D2), "length", 8), 0.0) == []
    assert machine.on(Tokens(key, 2, (102,)), 0.0) == [Deliver(1, (102,), ())]


@pytest.mark.parametrize("code", ["UNAVAILABLE", "ABORTED", "DATA_LOSS", "INTERNAL"])
def test_a_failed_attempt_is_tried_again(code):
    machine = router()
    key = prefilling(machine)
    commands = machine.on(Failed(key, code, "oh"), 1.0)
    again = ticket(1, attempt=2, source=P2)
    assert commands[:-1] == [ToOne(who, Cancel(key, "oh")) for who in (P1, D1, D2)]
    assert commands[-1] == ToOne(P2, placed(again, 6, 8, 99.0))


def test_a_failure_of_the_request_itself_is_not_tried_again():
    machine = router()
    key = prefilling(machine)
    end = only_end(machine.on(Failed(key, "DEADLINE_EXCEEDED", "slow"), 1.0))
    assert (end.phase, end.code, end.reason) == (Phase.FAILED, "DEADLINE_EXCEEDED", "slow")


def test_attempts_are_bounded():
    machine = router(max_attempts=2)
    machine.on(Failed(prefilling(machine), "UNAVAILABLE", "one"), 0.0)
    again = ticket(1, attempt=2, source=P2)
    machine.on(Accept(again), 0.0)
    end = only_end(machine.on(Failed(again, "UNAVAILABLE", "two"), 0.0))
    assert (end.code, end.reason, end.attempts) == ("UNAVAILABLE", "2 attempts, the last: two", 2)


def test_a_refused_retry_fails_a_request_whose_tokens_were_sent():
    machine = router(UP[0], UP[2], UP[3])
    key = decoding(machine)
    machine.on(WorkerDown(D1), 0.0)
    again = replace(key, attempt=2, sink=D2)
    end = only_end(machine.on(Reject(again, "busy", 1000.0), 0.0))
    assert (end.phase, end.code) == (Phase.FAILED, "RESOURCE_EXHAUSTED")


@pytest.mark.parametrize(("wait_s", "again_s"), [(0.05, 0.01), (150.0, 50.0)])
def test_a_retry_that_is_refused_for_now_asks_again_until_it_may(wait_s, again_s):
    """A client has tokens of it: it is not refused for the sake of those who may come, nor because of a forecast."""
    machine = router(UP[0], UP[2], UP[3])
    key = decoding(machine)
    machine.on(WorkerDown(D1), 0.0)
    again = replace(key, attempt=2, sink=D2)
    for turn in range(12):  # more often than those who come are refused before they wait for room
        now = 0.1 * turn
        assert machine.on(Reject(again, "not now", wait_s, again_s), now) == []
        assert machine.on(Accept(again), now) == []
        assert machine.deadline() == pytest.approx(now + 0.1)
        (offer,) = machine.on(None, now + 0.1)
        assert offer.message.ticket.source == P1
        again = offer.message.ticket
    machine.on(Accept(again), 1.4)
    assert machine.on(Tokens(again, 0, (102,)), 1.5) == [Deliver(1, (102,), ())]
    end = only_end(machine.on(Finished(again, "length", 1), 1.6))
    assert (end.phase, end.code) == (Phase.DONE, "OK")


@pytest.mark.parametrize("how", ["lost", "failed"])
def test_a_worker_lost_between_the_last_token_and_the_end_costs_nothing(how):
    machine = router()
    key = decoding(machine, max_tokens=2)
    event = WorkerDown(D1) if how == "lost" else Failed(key, "UNAVAILABLE", "x")
    end = only_end(machine.on(event, 1.0))
    assert (end.phase, end.reason, end.code) == (Phase.DONE, "length", "OK")


def test_a_gap_in_the_tokens_loses_the_attempt_not_the_gateway():
    machine = router()
    key = prefilling(machine)
    machine.on(Tokens(key, 0, (100,)), 0.0)
    commands = machine.on(Tokens(key, 5, (105,)), 1.0)
    assert [command.message for command in commands[:-1]] == [Cancel(key, "token 5 came after 1 tokens")] * 3
    assert commands[-1] == ToOne(P1, placed(ticket(1, attempt=2, source=P1), 7, 7, 99.0))


def test_an_end_that_counts_more_tokens_than_came_loses_the_attempt():
    machine = router()
    key = decoding(machine)
    commands = machine.on(finished(key, "length", 8), 1.0)
    assert commands[0] == ToOne(P1, Cancel(key, "8 tokens were generated, 2 came"))
    assert isinstance(commands[-1].message, Offer)


def test_late_answers_are_ignored_and_counted():
    machine = router()
    key = prefilling(machine)
    for message in (
        Accept(key),
        Reject(key, "late"),
        Accept(ticket(9)),
        Tokens(replace(key, attempt=7), 0, (1,)),
        Failed(replace(key, minter=P1), "UNAVAILABLE", "not ours"),
    ):
        assert machine.on(message, 0.0) == []
    assert machine.ignored == 5
    assert machine.on(WorkerDown(Identity("stranger", 1)), 0.0) == []


def test_a_counter_is_used_once():
    machine = router()
    machine.on(Arrived(1, ask()), 0.0)
    before = machine.phases(), machine.deadline()
    with pytest.raises(LocalError, match="request 1 arrived twice"):
        machine.on(Arrived(1, ask()), 0.5)
    assert (machine.phases(), machine.deadline()) == before


@dataclass
class Placement:
    """One attempt as the workers see it."""

    ticket: Ticket
    request: Request
    second: Identity | None
    at: Identity
    decodes: bool = False
    sent: int = 0
    """Tokens told to the gateway."""


@dataclass
class Client:
    request: Request
    got: list[int] = field(default_factory=list)
    end: End | None = None
    alone: bool = False
    due: float = 0.0


def token_at(position: int) -> int:
    """What the model says at a position, whoever asks."""
    return 1000 + position


class Deployment(RuleBasedStateMachine):
    """Workers that answer, compute, hand over, fail, die and come back; streams keep their order, each on its own."""

    people = (P1, P2, D1, D2)

    def __init__(self):
        super().__init__()
        self.router = Router(GATEWAY, RouterConfig(offer_s=1.0, max_queue_s=5.0, max_attempts=5))
        self.now = 0.0
        self.up: set[Identity] = set()
        self.streams: dict[Identity, deque] = {who: deque() for who in self.people}
        self.offers: list[Offer] = []
        self.placements: list[Placement] = []
        self.clients: dict[int, Client] = {}
        self.lost: set[Identity] = set()
        self.doubled: set[str] = set()
        self.crashes = 0
        for who in self.people:
            self.come(who)

    # The gateway's side.
    def give(self, event) -> None:
        for command in self.router.on(event, self.now):
            match command:
                case ToOne(who, message):
                    assert who in self.up, "sent to a worker that is not there"
                    self.receive(who, message)
                case Deliver(counter, tokens, hashes):
                    client = self.clients[counter]
                    assert client.end is None
                    assert tokens
                    client.got += tokens
                    first = len(client.request.prompt)
                    assert client.got == [token_at(first + i) for i in range(len(client.got))]
                    assert hashes == tuple(token * 3 for token in tokens)
                case End(counter):
                    client = self.clients[counter]
                    assert client.end is None, "ended twice"
                    client.end = command
                    if command.phase is Phase.REJECTED:
                        assert not client.got, "a request whose tokens were sent was not rejected but failed"
                    assert command.reason != "cancelled"
                    assert client.alone or not command.poisonous, "refused without a try of its own"
                    if client.got and command.code == "UNAVAILABLE":
                        assert self.now >= client.due or "attempts, the last" in command.reason, "it was to wait"
                    if command.phase is Phase.DONE and command.reason == "length":
                        assert len(client.got) == client.request.sampling.max_tokens

    def receive(self, who: Identity, message) -> None:
        match message:
            case Offer(ticket):
                assert ticket.source == who
                assert ticket.sink in (D1, D2)
                self.offers.append(message)
            case Prompt(ticket, request, second):
                assert ticket.source == who
                assert second != ticket.sink
                client = self.clients[ticket.counter]
                if request.alone:
                    client.alone = True
                    there = [p for p in self.placements if p.request.alone and not p.decodes and p.at in self.up]
                    assert all(p.ticket.source != who for p in there), "two are tried at one worker"
                    assert self.crashes >= 2
                    assert second is None
                assert request.prompt == (*client.request.prompt, *client.got)
                assert request.sampling.max_tokens == client.request.sampling.max_tokens - len(client.got)
                self.placements.append(Placement(ticket, request, second, who))
            case Cancel(ticket, _, report):
                for place in self.placements:
                    if report and (place.ticket.key, place.at) == (ticket.key, who):
                        part = finished(ticket, "cancelled", 1) if place.decodes else Handed(ticket, (), cancelled=True)
                        self.tell(who, part)
                self.offers = [o for o in self.offers if (o.ticket.key, o.ticket.source) != (ticket.key, who)]
                self.placements = [p for p in self.placements if (p.ticket.key, p.at) != (ticket.key, who)]

    def tell(self, who: Identity, message) -> None:
        """A worker says something; nobody hears it while its stream is down."""
        if who in self.up:
            self.streams[who].append(message)

    def come(self, who: Identity) -> None:
        self.up.add(who)
        self.give(WorkerUp(worker(who, Role.PREFILL if who in (P1, P2) else Role.DECODE)))

    @rule(prompt=st.integers(1, 5), max_tokens=st.integers(1, 4), timeout_s=st.sampled_from([3.0, 50.0]))
    def arrive(self, prompt, max_tokens, timeout_s):
        counter = len(self.clients) + 1
        request = Request("r", tuple(token_at(i) for i in range(prompt)), ask(1, max_tokens).sampling, timeout_s)
        self.clients[counter] = Client(request, due=self.now + timeout_s)
        self.give(Arrived(counter, request))

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data):
        self.give(ClientGone(data.draw(st.sampled_from(sorted(self.clients))), "left"))

    @precondition(lambda self: any(client.got and client.end is None for client in self.clients.values()))
    @rule(data=st.data())
    def satisfy(self, data):
        having = [counter for counter, client in self.clients.items() if client.got and client.end is None]
        self.give(Satisfied(data.draw(st.sampled_from(having))))

    @precondition(lambda self: any(self.streams.values()))
    @rule(data=st.data(), how_many=st.integers(1, 4))
    def hear(self, data, how_many):
        who = data.draw(st.sampled_from([who for who in self.people if self.streams[who]]))
        for _ in range(min(how_many, len(self.streams[who]))):
            if not self.streams[who]:
                break
            self.give(self.streams[who].popleft())

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]))
    def wait(self, seconds):
        until = self.now + seconds
        while (due := self.router.deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            self.give(None)
            after = self.router.deadline()
            assert after is None or after > self.now, "the driver would spin"
        self.now = until

    # The workers' side.
    @precondition(lambda self: self.offers)
    @rule(data=st.data(), yes=st.integers(0, 3))
    def answer(self, data, yes):
        offer = data.draw(st.sampled_from(self.offers))
        self.offers.remove(offer)
        self.tell(offer.ticket.source, Accept(offer.ticket) if yes else Reject(offer.ticket, "busy", 1.0))

    @rule(who=st.sampled_from([P1, P2]), tokens=st.integers(1, 6))
    def room(self, who, tokens):
        self.tell(who, SlotFree(who, tokens))

    @precondition(lambda self: self.placements)
    @rule(data=st.data())
    def compute(self, data):
        """A prefill worker gives the first token and hands over; a decode worker gives another token."""
        place = data.draw(st.sampled_from(self.placements))
        first, most = len(place.request.prompt), place.request.sampling.max_tokens
        if not place.decodes and not place.sent:
            self.tell(place.at, Tokens(place.ticket, 0, (token_at(first),), (token_at(first) * 3,)))
            place.sent = 1
            if most == 1:
                self.finish(place, "length")
            return
        if not place.decodes:
            choices = [who for who in (place.ticket.sink, place.second) if who is not None]
            sink = data.draw(st.sampled_from(choices))
            ticket = replace(place.ticket, sink=sink)
            self.placements.append(Placement(ticket, place.request, None, sink, decodes=True))
            if data.draw(st.integers(0, 5)) or len(choices) == 1:
                self.placements.remove(place)
                self.tell(place.at, Handed(ticket, ()))
            else:  # Taken was lost on its way: the prefill worker tries its second choice as well
                place.ticket, place.second = replace(place.ticket, sink=choices[choices[0] is sink]), None
                self.doubled.add(place.ticket.key)
            return
        count = 2 if not place.sent else 1
        start = place.sent
        place.sent += count
        tokens = tuple(token_at(first + i) for i in range(start, place.sent))
        self.tell(place.at, Tokens(place.ticket, start, tokens, tuple(token * 3 for token in tokens)))
        if place.sent == most:
            self.finish(place, "length")
        elif data.draw(st.integers(0, 9)) == 0:
            self.finish(place, "stop")

    def finish(self, place: Placement, reason: str) -> None:
        self.placements.remove(place)
        self.tell(place.at, Finished(place.ticket, reason, place.sent, decoded=place.decodes))

    @precondition(lambda self: self.placements)
    @rule(data=st.data())
    def fail(self, data):
        place = data.draw(st.sampled_from(self.placements))
        self.placements.remove(place)
        code = data.draw(st.sampled_from(["UNAVAILABLE", "DATA_LOSS", "ABORTED", "INTERNAL"]))
        self.crashes += code == "INTERNAL"
        self.tell(place.at, Failed(place.ticket, code, "oh"))

    @precondition(lambda self: self.up)
    @rule(data=st.data(), dies=st.booleans())
    def lose(self, data, dies):
        """A worker dies, or only its stream to the gateway does: then it goes on, unheard. It may have crashed."""
        who = data.draw(st.sampled_from(sorted(self.up)))
        if data.draw(st.booleans()):
            self.streams[who].clear()
        while self.streams[who]:
            self.give(self.streams[who].popleft())
        self.up.discard(who)
        self.lost.add(who)
        if dies:
            self.offers = [offer for offer in self.offers if offer.ticket.source != who]
            self.placements = [place for place in self.placements if place.at != who]
        crashed = data.draw(st.booleans())
        self.crashes += crashed
        self.give(WorkerDown(who, crashed))

    @precondition(lambda self: self.up)
    @rule(data=st.data(), quiet=st.booleans())
    def hush(self, data, quiet):
        """A worker is not heard for a while, or again."""
        self.give(WorkerQuiet(data.draw(st.sampled_from(sorted(self.up))), quiet))

    @precondition(lambda self: self.lost)
    @rule(data=st.data(), crashed=st.booleans())
    def word(self, data, crashed):
        """Somebody says how a worker ended, whether it did or not."""
        self.crashes += crashed
        self.give(ProcessEnded(data.draw(st.sampled_from(sorted(self.lost))), crashed))

    @precondition(lambda self: len(self.up) < 4)
    @rule(data=st.data())
    def back(self, data):
        self.come(data.draw(st.sampled_from([who for who in self.people if who not in self.up])))

    @invariant()
    def sound(self):
        self.router.check()
        live = {counter for counter, client in self.clients.items() if client.end is None}
        assert len(self.router) == len(live) == sum(self.router.phases().values())
        if {P1, P2} & self.up and {D1, D2} & self.up:
            waits = [flight for flight in self.router._stranded.values() if flight.resumes == math.inf]
            assert all(flight.placements or flight.gives_up <= flight.call.arrived_at + 5.0 for flight in waits)
            waits = [flight for flight in waits if not (flight.alone and self.router._suspects)]
            assert not waits or self.router._workers.quiet, "it waits beside workers that could take it"

    def teardown(self):
        for who in self.people:
            if who not in self.up:
                self.come(who)
            self.give(WorkerQuiet(who, False))
        for _ in range(400):
            if not len(self.router):
                break
            for stream in self.streams.values():
                while stream:
                    self.give(stream.popleft())
            due = self.router.deadline()
            if due is not None:
                self.now = max(self.now, due)
                self.give(None)
        assert len(self.router) == 0
        assert all(client.end is not None for client in self.clients.values())
        assert self.router.deadline() is None
        kept = [place for place in self.placements if place.ticket.key not in self.doubled]
        assert not [place for place in kept if place.at not in self.lost], (
            "a worker goes on with a request that is over"
        )
        assert not [offer for offer in self.offers if offer.ticket.source not in self.lost]


@efforts
def test_every_request_ends_once_with_the_right_tokens_whatever_fails(effort):
    run_state_machine_as_test(Deployment, settings=effort)


def test_a_worker_that_is_not_ready_goes_on_with_what_it_has_and_gets_nothing_new():
    machine = router()
    key = decoding(machine)
    for up in UP:
        machine.on(WorkerUp(replace(up, ready=up.role is Role.PREFILL)), 0.0)
    assert machine.missing() == "no decode worker is ready"
    assert machine.on(Tokens(key, 2, (102,)), 1.0) == [Deliver(1, (102,), ())]
    assert machine.on(Arrived(2, ask()), 1.0) == []
    assert only_end(machine.on(None, 4.0)).code == "UNAVAILABLE"
    assert machine.on(Handed(key, ()), 1.0) == []
    assert machine.on(finished(key, "length", 3), 1.0)[0].phase is Phase.DONE


def test_an_end_waits_a_moment_for_the_stages_of_the_prefill():
    """The two workers' last words come on two streams, in any order."""
    machine, stage, last = router(), Stage("prefill", "prefill-1", 0.1), Stage("decode", "decode-1", 0.2)
    key = decoding(machine)
    assert machine.on(finished(key, "length", 2, None, (last,)), 1.0) == []
    assert machine.deadline() == 1.25
    machine.check()
    assert machine.on(Tokens(key, 2, (102,)), 1.1) == []
    end = only_end(machine.on(Handed(key, (stage,)), 1.1))
    assert (end.phase, end.reason) == (Phase.DONE, "length")
    assert last in end.stages
    assert stage in end.stages


@pytest.mark.parametrize("event", [None, WorkerDown(P1)])
def test_an_end_whose_prefill_worker_says_nothing_comes_without_its_stages(event):
    machine = router()
    key = decoding(machine)
    machine.on(finished(key, "stop", 2, 5), 1.0)
    assert machine.on(WorkerDown(D1), 1.0) == []
    end = only_end(machine.on(event, 1.25))
    assert (end.phase, end.stop_token_id) == (Phase.DONE, 5)


def test_a_sink_that_came_back_during_the_hand_over_has_dropped_it():
    """Both sides of a broken stream start anew, so its KV there is gone although the worker is there again."""
    machine = router()
    key = prefilling(machine)
    machine.on(Tokens(key, 0, (100,)), 1.0)
    assert machine.on(WorkerDown(D1), 1.0) == []
    machine.on(WorkerUp(worker(D1, Role.DECODE)), 1.0)
    commands = machine.on(Handed(key, ()), 1.0)
    assert isinstance(commands[-1].message, Offer)
    assert commands[-1].message.ticket.attempt == 2


def stage(name: str) -> Stage:
    return Stage(name, "somebody", 0.1)


def test_a_stop_string_recalls_the_rest_and_waits_for_the_stages_of_both_workers():
    machine = router()
    key = decoding(machine)
    assert machine.on(Satisfied(1), 1.0) == [ToOne(who, Cancel(key, "stop string", True)) for who in (P1, D1, D2)]
    machine.check()
    assert machine.deadline() == 1.25
    assert machine.on(Tokens(key, 2, (102,)), 1.1) == [], "more than it wanted"
    assert machine.on(finished(key, "cancelled", 3, None, (stage("decode"),)), 1.1) == []
    assert machine.on(Satisfied(1), 1.1) == []
    end = only_end(machine.on(Handed(key, (stage("prefill"),)), 1.1))
    assert (end.phase, end.reason, end.code) == (Phase.DONE, "stop", "OK")
    assert [each.name for each in end.stages] == ["queued", "offered", "prefill", "decode"]


def test_a_stop_string_waits_only_for_those_who_have_something_to_say():
    machine = router()
    key = decoding(machine)
    machine.on(Handed(key, ()), 1.0)
    machine.on(Satisfied(1), 1.0)
    assert only_end(machine.on(finished(key, "length", 8), 1.1)).reason == "stop", "it crossed the cancel"


def test_a_stop_string_in_the_first_token_waits_for_the_prefill_worker():
    machine = router()
    key = prefilling(machine)
    machine.on(Tokens(key, 0, (100,)), 0.0)
    assert machine.on(Satisfied(1), 0.0) == [ToOne(who, Cancel(key, "stop string", True)) for who in (P1, D1, D2)]
    assert only_end(machine.on(Handed(key, (stage("prefill"),), cancelled=True), 0.1)).stages[-1] == stage("prefill")


@pytest.mark.parametrize("lost", [P1, D1])
def test_a_stop_string_does_not_wait_for_a_lost_worker(lost):
    machine = router()
    key = decoding(machine)
    machine.on(Satisfied(1), 1.0)
    assert machine.on(WorkerDown(lost), 1.1) == []
    last = Handed(key, ()) if lost == D1 else finished(key, "cancelled", 2)
    assert only_end(machine.on(last, 1.2)).phase is Phase.DONE


def test_a_stop_string_waits_a_moment_at_most():
    machine = router()
    decoding(machine)
    machine.on(Satisfied(1), 1.0)
    assert only_end(machine.on(None, 1.25)).reason == "stop"


def test_a_stop_string_while_the_rest_is_placed_anew_ends_it_at_once():
    machine = router()
    key = decoding(machine)
    machine.on(WorkerDown(D1), 1.0)
    end = only_end(machine.on(Satisfied(1), 1.0))
    assert (end.phase, end.reason) == (Phase.DONE, "stop")
    assert machine.on(Accept(replace(key, attempt=2, sink=D2)), 1.1) == []


def several(machine: Router, n: int = 2, *, decodes: bool = False, max_tokens: int = 8) -> Ticket:
    """A request for `n` continuations, each with its first token; with `decodes` each has two, from D1."""
    request = replace(ask(max_tokens=max_tokens), sampling=Sampling(max_tokens, seed=5, n=n))
    key = machine.on(Arrived(1, request), 0.0)[0].message.ticket
    machine.on(Accept(key), 0.0)
    for branch in range(n):
        assert machine.on(Tokens(key, 0, (100,), (), branch), 0.0) == [Deliver(1, (100,), (), branch)]
    for branch in range(n if decodes else 0):
        machine.on(Tokens(key, 1, (101,), (), branch), 0.0)
    machine.check()
    return key


def test_each_continuation_is_completed_once_and_the_last_one_ends_the_request():
    machine = router()
    key = several(machine, decodes=True)
    machine.on(Handed(key, (stage("prefill"),)), 0.0)
    assert machine.on(finished(key, "stop", 2, 7, (stage("decode"),), 1), 1.0) == [Complete(1, 1, "stop", 7)]
    machine.check()
    assert machine.on(Tokens(key, 2, (102,), (), 0), 1.0) == [Deliver(1, (102,), (), 0)]
    end = only_end(machine.on(finished(key, "length", 3, None, (stage("decode"),), 0), 2.0))
    assert (end.phase, end.reason, end.branch) == (Phase.DONE, "length", 0)
    assert [each.name for each in end.stages] == ["queued", "offered", "prefill", "decode"]


def test_a_stop_string_ends_one_continuation():
    machine = router()
    key = several(machine, decodes=True)
    where = (P1, D1, D2)
    assert machine.on(Satisfied(1, 0), 1.0) == [
        *[ToOne(who, Cancel(key, "stop string", branch=0)) for who in where],
        Complete(1, 0, "stop"),
    ]
    assert machine.on(Tokens(key, 2, (102,), (), 0), 1.0) == [], "more than it wanted"
    assert machine.on(Satisfied(1, 0), 1.0) == []
    assert machine.on(Satisfied(1, 1), 1.0) == [ToOne(who, Cancel(key, "stop string", True)) for who in where]


def test_a_sink_hears_on_arrival_which_continuations_are_done_already():
    machine = router()
    key = several(machine)
    assert machine.on(Satisfied(1, 1), 0.5) == [Complete(1, 1, "stop")]
    assert machine.on(Handed(key, ()), 1.0) == [ToOne(D1, Cancel(key, "stop string", branch=1))]


def test_what_goes_on_only_for_a_stopped_continuation_is_recalled():
    """The prefill worker hands over for continuation 0, which is done; 1 ends with its first token."""
    machine = router()
    key = several(machine)
    machine.on(Satisfied(1, 0), 0.5)
    commands = machine.on(Finished(key, "length", 1, None, (), 1), 0.6)
    assert commands == [ToOne(who, Cancel(key, "done", True)) for who in (P1, D1, D2)]
    assert only_end(machine.on(Handed(key, (), cancelled=True), 0.7)).branch == 1


def test_a_loss_before_the_first_token_places_all_continuations_together_again():
    machine = router()
    request = replace(ask(), sampling=Sampling(8, n=3))
    key = machine.on(Arrived(1, request), 0.0)[0].message.ticket
    machine.on(Accept(key), 0.0)
    (offer,) = [c for c in machine.on(WorkerDown(P1), 0.0) if isinstance(c.message, Offer)]
    (prompt,) = machine.on(Accept(offer.message.ticket), 0.0)
    assert prompt.message.request.sampling == request.sampling


def test_a_loss_after_it_lets_each_go_on_alone_with_its_own_tokens_and_seed():
    machine = router()
    key = several(machine, n=3, decodes=True, max_tokens=3)
    machine.on(Tokens(key, 2, (102,), (), 2), 0.5)
    commands = machine.on(WorkerDown(D1), 1.0)
    assert Complete(1, 2, "length") in commands, "it had all of its tokens"
    offers = [c.message for c in commands if isinstance(c, ToOne) and isinstance(c.message, Offer)]
    assert [offer.ticket.attempt for offer in offers] == [2, 3]
    machine.check()
    seeds = [Sampling(1, seed=5).branch(branch).seed for branch in (0, 1)]
    for offer, seed in zip(offers, seeds, strict=True):
        (prompt,) = machine.on(Accept(offer.ticket), 1.0)
        request = prompt.message.request
        assert request.prompt == (*range(6), 100, 101)
        assert (request.sampling, request.generated) == (Sampling(1, seed=seed), 2)
    one, other = (offer.ticket for offer in offers)
    assert machine.on(Tokens(one, 0, (102,)), 2.0) == [Deliver(1, (102,), (), 0)]
    assert machine.on(Finished(one, "length", 1), 2.0) == [Complete(1, 0, "length")]
    machine.check()
    assert machine.on(Tokens(other, 0, (103,)), 2.0) == [Deliver(1, (103,), (), 1)]
    end = only_end(machine.on(Finished(other, "length", 1), 2.0))
    assert (end.branch, end.attempts) == (1, 2)


def test_a_continuation_that_cannot_be_placed_again_fails_the_request_and_recalls_the_others():
    machine = router(UP[0], UP[2], UP[3])
    several(machine, decodes=True)
    offers = [c.message for c in machine.on(WorkerDown(D1), 1.0) if isinstance(c, ToOne) and c.worker == P1][1:]
    machine.on(Accept(offers[0].ticket), 1.0)
    commands = machine.on(Reject(offers[1].ticket, "busy", 1000.0), 1.0)
    recalled = [c.message.ticket for c in commands if isinstance(c, ToOne)]
    assert set(recalled) == {offers[0].ticket}
    assert commands[-1].phase is Phase.FAILED
    assert len(machine) == 0


def test_a_client_that_leaves_takes_all_continuations_along():
    machine = router()
    several(machine, decodes=True)
    offers = [
        c.message for c in machine.on(WorkerDown(D1), 1.0) if isinstance(c, ToOne) and isinstance(c.message, Offer)
    ]
    commands = machine.on(ClientGone(1, "left"), 1.0)
    assert {c.message.ticket for c in commands[:-1]} == {offer.ticket for offer in offers}
    assert machine.deadline() is None


def test_continuations_need_room_for_all_of_them():
    machine = router(worker(P1, Role.PREFILL), worker(D1, Role.DECODE, pages=7))
    machine.on(Arrived(1, ask()), 0.0)
    end = only_end(machine.on(Arrived(2, replace(ask(), sampling=Sampling(8, n=2))), 0.0))
    assert end.reason == "prompt and max_tokens: got 32 tokens, no decode worker holds more than 28"


def test_a_mixed_worker_never_hands_over_to_another():
    """Each could promise the other memory that it needs itself to begin: found by the simulation of all machines."""
    other = MIXED._replace(name="mixed-2")
    machine = router(worker(MIXED, Role.MIXED, pages=4), worker(other, Role.MIXED, pages=4), worker(D1, Role.DECODE))
    offer = machine.on(Arrived(1, ask()), 0.0)[0].message
    assert (offer.ticket.source, offer.ticket.sink) == (MIXED, D1)
    assert machine.on(Accept(offer.ticket), 0.0)[0].message.second is None


def test_a_request_that_was_begun_waits_for_its_second_worker_as_long_as_it_may():
    """However late in its life: the goal for its first token was met long ago."""
    machine = router()
    prompt = replace(ask(), slo=replace(ask().slo, ttft_s=0.5))
    key = machine.on(Arrived(1, prompt), 0.0)[0].message.ticket
    machine.on(Accept(key), 0.0)
    machine.on(Tokens(key, 0, (100, 101)), 0.4)
    offer = machine.on(WorkerDown(D1), 40.0)[-1].message
    assert offer.wait_s == 60.0


def test_the_prefill_worker_ends_a_continuation_although_the_kv_went_elsewhere():
    """The second sink's tokens overtook it."""
    machine = router()
    key = several(machine)
    moved = replace(key, sink=D2)
    assert machine.on(Tokens(moved, 0, (100, 101), (), 0), 0.5) == [Deliver(1, (101,), (), 0)]
    assert machine.on(Finished(key, "length", 1, None, (), 1), 0.6) == [Complete(1, 1, "length")]
    machine.on(Handed(moved, ()), 0.7)
    assert only_end(machine.on(finished(moved, "length", 2), 0.8)).branch == 0


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("prompt", [1, 4, 6, 11])
@pytest.mark.parametrize(
    "members", [UP, [worker(MIXED, Role.MIXED)], CUT, CUT[::-1]], ids=["apart", "mixed", "unequal", "unequal, turned"]
)
def test_what_is_said_to_fit_does_and_one_token_more_does_not(members, prompt, n):
    machine = router(*members)
    most = machine.most_tokens()(prompt, n) or 0
    fits, more = (replace(ask(prompt), sampling=Sampling(most + extra, n=n)) for extra in (0, 1))
    (offer,) = machine.on(Arrived(1, fits), 0.0)
    assert isinstance(offer, ToOne)
    sink = next(member for member in members if member.identity == offer.message.ticket.sink)
    assert sink.kv.pages_for_branches(prompt, most, n) <= sink.pages
    assert only_end(machine.on(Arrived(2, more), 0.0)).code == "INVALID_ARGUMENT"


@pytest.mark.parametrize("members", [CUT, CUT[::-1]])
def test_prompts_are_named_by_the_smallest_pages(members):
    machine = router(*members)
    assert machine.page_tokens == 2
    request = replace(ask(), prefix=(1, 2, 3), prefix_page_tokens=2)
    (offer,) = machine.on(Arrived(1, request), 0.0)
    assert (offer.message.prefix, offer.message.prefix_page_tokens) == ((1, 2, 3), 2)
    (prompt,) = machine.on(Accept(offer.message.ticket), 0.0)
    assert prompt.message.request == request
    machine.on(WorkerDown(D2), 0.0)
    assert machine.page_tokens == 4


def test_nobody_is_there_to_say_what_fits():
    assert Router(GATEWAY, RouterConfig()).most_tokens()(5, 1) is None
