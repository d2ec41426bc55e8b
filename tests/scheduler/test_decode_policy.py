"""The decode policy, by scripts with exact commands."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.errors import LocalError
from core.messages import Cancel, Failed, Finished, First
from core.pages import Owner, Pages
from core.request import Hints, Stage
from core.sampling import Sampling
from core.worker import Identity
from scheduler.decode_events import (
    Answer,
    Asked,
    Cut,
    DecodeCommand,
    Drain,
    DropHandOff,
    Ended,
    Evict,
    GatewayCame,
    GatewayGone,
    Grow,
    Join,
    KvArrived,
    Leave,
    Ran,
    Run,
    SwapIn,
    SwappedIn,
    SwappedOut,
    Tell,
    Withdrawn,
)
from scheduler.decode_policy import DecodeConfig, DecodePolicy
from scheduler.decode_rows import State
from tests.cast import D1, GATEWAY, MIXED, OTHER_GATEWAY, SHAPE, ask, ticket

KEY = ticket(1).key


def policy(pages: int = 20, me: Identity = D1, **settings) -> DecodePolicy:
    return DecodePolicy(
        me, SHAPE, Pages(pages), DecodeConfig(**{"max_rows": 4, "max_steps": 8, "ahead_pages": 1, **settings})
    )


def ledger(machine: DecodePolicy) -> Pages:
    return machine._ledger


def arrive(machine: DecodePolicy, counter: int = 1, prompt: int = 6, max_tokens: int = 8, now: float = 0.0) -> list:
    """The sink binds the prompt's pages, hands them over and says so; returns what that led to."""
    key = ticket(counter)
    if not ledger(machine).pages(key.key):
        ledger(machine).bind(key.key, SHAPE.pages_for(prompt), Owner.PULLING)
        ledger(machine).move(key.key, Owner.DECODING)
    commands = machine.on(KvArrived(key, ask(prompt, max_tokens), (First(100),)), now)
    machine.check()
    return commands


def running(machine: DecodePolicy, counter: int = 1, prompt: int = 6, max_tokens: int = 8) -> list:
    assert machine.on(Asked(ticket(counter), ask(prompt, max_tokens)), 0.0) == [Answer(ticket(counter).key, True)]
    return arrive(machine, counter, prompt, max_tokens)


def test_a_request_from_its_question_to_its_end():
    machine, request = policy(), ask(6, 8)
    assert machine.on(Asked(ticket(), request), 0.0) == [Answer(KEY, True)]
    assert (ledger(machine).promised, ledger(machine).available, machine.deadline()) == (4, 16, 100.0)
    assert arrive(machine, now=1.0) == [
        Run(1, (KEY,), (Join(KEY, ticket(), request, First(100), (0, 1, 2, 3)),), (), 7)
    ]
    assert machine.on(Ran(1, 3), 2.0) == [Run(2, (KEY,), (), (), 4)]
    stages = (Stage("join_wait", "decode-1", 0.0), Stage("decode", "decode-1", 2.0, {"steps": "7"}))
    end = Tell(Finished(ticket(), "length", 8, None, stages, decoded=True))
    assert machine.on(Ran(2, 4, (Ended(KEY, "length", 8),)), 3.0) == [end, Leave(KEY)]
    assert (ledger(machine).holders(), machine.deadline(), machine.ignored) == ((), None, 0)


def test_a_stop_token_is_not_counted():
    machine = policy()
    running(machine)
    told, left = machine.on(Ran(1, 2, (Ended(KEY, "stop", 2, 7),)), 1.0)
    assert (told.message.completion_tokens, told.message.stop_token_id, left) == (2, 7, Leave(KEY))


def test_pages_for_all_steps_of_an_order_are_bound_before_it():
    machine = policy(max_steps=3)
    (run,) = running(machine, 1, 4, 20)
    assert run.joining[0].pages == (0, 1)
    (run,) = machine.on(Ran(1, 1), 1.0)
    assert (run.growing, run.steps) == ((), 3)
    (run,) = machine.on(Ran(2, 3), 2.0)
    assert run.growing == (Grow(KEY, (2,), 2),)
    machine.check()


def test_an_order_is_as_long_as_its_shortest_row():
    machine = policy()
    running(machine, 1, 6, 8)
    machine.on(Asked(ticket(2), ask(6, 3)), 0.0)
    assert arrive(machine, 2, 6, 3) == [Cut(1)]
    (run,) = machine.on(Ran(1, 1), 1.0)
    assert (run.rows, run.steps) == ((KEY, ticket(2).key), 2)


def test_who_arrives_joins_at_the_next_step_end():
    machine = policy()
    running(machine, 1)
    machine.on(Asked(ticket(2), ask()), 0.0)
    assert arrive(machine, 2) == [Cut(1)]
    machine.on(Asked(ticket(3), ask()), 0.0)
    assert arrive(machine, 3) == []
    (run,) = machine.on(Ran(1, 1), 1.0)
    assert [join.ticket.counter for join in run.joining] == [2, 3]


def test_nothing_is_promised_beside_a_full_batch_and_it_is_not_cut():
    machine = policy(max_rows=1)
    running(machine, 1)
    assert machine.on(Asked(ticket(2), ask()), 0.0) == []
    commands = machine.on(Ran(1, 7, (Ended(KEY, "length", 8),)), 1.0)
    assert commands[1:] == [Leave(KEY), Answer(ticket(2).key, True)]


def test_more_continuations_than_a_step_may_have_are_promised_memory_alone():
    machine = policy(max_rows=2)
    running(machine, 1)
    three = replace(ask(), sampling=replace(ask().sampling, n=3))
    assert machine.on(Asked(ticket(2), three), 0.0) == []
    commands = machine.on(Ran(1, 7, (Ended(KEY, "length", 8),)), 1.0)
    assert commands[2:] == [Answer(ticket(2).key, True)]


def shares(*tenants: str, spare: float = 0.25) -> tuple[DecodePolicy, list[str]]:
    """A worker of four rows that these ask in turn; whom it promises memory at once."""
    machine, promised = policy(pages=40, spare=spare), []
    for number, tenant in enumerate(tenants, 1):
        request = replace(ask(), hints=Hints(tenant=tenant))
        if machine.on(Asked(ticket(number), request), 0.1 * number):
            promised.append(tenant)
        machine.check()
    return machine, promised


@pytest.mark.parametrize(
    ("tenants", "promised"),
    [
        ("aaaaaa", "aaaa"),  # alone it may have all
        ("abaaaa", "aba"),
        ("abaaab", "abab"),
        ("aabbbb", "aab"),  # what a had while it was alone is not counted
    ],
)
def test_a_tenant_above_its_share_leaves_some_rows_to_others(tenants, promised):
    assert "".join(shares(*tenants)[1]) == promised


def test_memory_is_promised_in_order_of_asking():
    machine = policy(pages=10)
    running(machine, 1, 6, 10)
    assert machine.on(Asked(ticket(2), ask(6, 22)), 0.0) == []
    assert machine.on(Asked(ticket(3), ask(4, 4)), 0.0) == []
    assert machine.queue()[State.WAITING] == 2
    commands = machine.on(Ran(1, 9, (Ended(KEY, "length", 10),)), 1.0)
    assert commands[2:] == [Answer(ticket(2).key, True), Answer(ticket(3).key, True)]


def test_what_can_never_fit_is_refused_at_once():
    machine = policy(pages=10)
    assert machine.on(Asked(ticket(), ask(20, 21)), 0.0) == [Answer(KEY, False, "needs 11 pages, the worker has 10")]
    assert machine.queue() == dict.fromkeys(State, 0)


def test_a_worker_that_hands_over_to_itself_must_hold_the_prompt_twice():
    machine, key = policy(pages=10, me=MIXED), ticket(1, source=MIXED, sink=MIXED)
    assert machine.on(Asked(key, ask(16, 16)), 0.0) == [Answer(key.key, False, "needs 12 pages, the worker has 10")]
    assert machine.on(Asked(key, ask(8, 16)), 0.0) == [Answer(key.key, True)]


def test_memory_that_others_freed_wakes_who_waits():
    machine = policy(pages=10)
    ledger(machine).bind("doubt/7", 8, Owner.IN_DOUBT)
    assert machine.on(Asked(ticket(), ask()), 5.0) == []
    assert machine.deadline() == 105.0
    ledger(machine).release("doubt/7")
    due = machine.deadline()
    assert due is not None
    assert due <= 5.0
    assert machine.on(None, 6.0) == [Answer(KEY, True)]
    assert machine.deadline() == 105.0


def test_a_cancel_while_waiting_ends_with_the_hand_over():
    machine = policy(pages=4)
    running(machine, 1)
    machine.on(Asked(ticket(2), ask()), 0.0)
    assert machine.on(Cancel(ticket(2), "left"), 0.0) == [DropHandOff(ticket(2).key, "left")]
    assert machine.on(Cancel(ticket(2), "left"), 0.0) == []
    machine.on(Ran(1, 7, (Ended(KEY, "length", 8),)), 1.0)
    assert ledger(machine).promised == 0, "promised to nobody"
    assert machine.on(Withdrawn(ticket(2), "left"), 1.0) == []
    assert machine.queue() == dict.fromkeys(State, 0)


def test_a_cancel_while_the_kv_is_on_its_way_ends_with_the_hand_over():
    machine = policy()
    machine.on(Asked(ticket(), ask()), 0.0)
    assert machine.on(Cancel(ticket(), "left"), 0.0) == [DropHandOff(KEY, "left")]
    ledger(machine).release(KEY)
    assert machine.on(Withdrawn(ticket(), "left", recompute=True), 0.0) == []
    assert machine.queue() == dict.fromkeys(State, 0)


def test_kv_that_arrives_after_its_cancel_is_freed():
    machine = policy()
    machine.on(Asked(ticket(), ask()), 0.0)
    machine.on(Cancel(ticket(), "left"), 0.0)
    assert arrive(machine) == []
    assert ledger(machine).available == 20


def test_a_cancel_before_the_join_frees_at_once():
    machine = policy()
    running(machine, 1)
    machine.on(Asked(ticket(2), ask()), 0.0)
    assert arrive(machine, 2) == [Cut(1)]
    assert machine.on(Cancel(ticket(2), "left"), 0.0) == []
    assert ledger(machine).holders() == (KEY,)


def test_a_cancel_of_a_running_row_frees_at_the_step_end():
    machine = policy()
    running(machine, 1)
    assert machine.on(Cancel(ticket(), "left"), 0.5) == [Cut(1)]
    assert ledger(machine).available == 16
    assert machine.on(Ran(1, 1), 1.0) == [Leave(KEY)]
    assert ledger(machine).available == 20


def test_a_row_that_ends_after_its_cancel_is_not_told():
    machine = policy()
    running(machine, 1)
    machine.on(Cancel(ticket(), "left"), 0.5)
    assert machine.on(Ran(1, 1, (Ended(KEY, "stop", 1, 2),)), 1.0) == [Leave(KEY)]


def test_a_running_row_reports_its_stages_when_its_step_is_over():
    machine = policy()
    running(machine, 1)
    assert machine.on(Cancel(ticket(), "stop string", report=True), 0.5) == [Cut(1)]
    told, left = machine.on(Ran(1, 3), 1.0)
    assert left == Leave(KEY)
    assert (told.message.reason, told.message.completion_tokens) == ("cancelled", 4)
    assert told.message.stages[-1] == Stage("decode", "decode-1", 1.0, {"steps": "3"})


def test_a_row_that_waits_to_join_reports_at_once():
    machine = policy()
    running(machine, 1)
    machine.on(Asked(ticket(2), ask()), 0.0)
    assert arrive(machine, 2) == [Cut(1)]
    (told,) = machine.on(Cancel(ticket(2), "stop string", report=True), 0.0)
    assert told.message.reason == "cancelled"
    assert ledger(machine).holders() == (KEY,)


def test_nothing_is_reported_of_a_row_whose_kv_is_elsewhere():
    machine = policy()
    machine.on(Asked(ticket(), ask()), 0.0)
    assert machine.on(Cancel(ticket(), "stop string", report=True), 0.0) == [DropHandOff(KEY, "stop string")]


def test_a_gateway_takes_its_requests_along():
    machine = policy()
    running(machine, 1)
    machine.on(Asked(ticket(2), ask()), 0.0)
    machine.on(Asked(ticket(3, minter=OTHER_GATEWAY), ask()), 0.0)
    assert machine.on(GatewayGone(GATEWAY), 0.0) == [Cut(1), DropHandOff(ticket(2).key, "its gateway was lost")]


def test_nothing_is_promised_to_requests_of_a_gateway_that_was_lost():
    """Their prefill workers have not heard of it yet. The same gateway may come back, and so may its name."""
    machine = policy()
    machine.on(GatewayGone(GATEWAY), 0.0)
    assert machine.on(Asked(ticket(), ask()), 0.1) == [Answer(KEY, False, "its gateway was lost")]
    other, next_life = ticket(2, minter=OTHER_GATEWAY), ticket(3, minter=GATEWAY._replace(incarnation=9))
    for each in (other, next_life):
        assert machine.on(Asked(each, ask()), 0.1) == [Answer(each.key, True)]
    machine.on(GatewayCame(OTHER_GATEWAY), 0.2)
    assert machine.on(Asked(ticket(4), ask()), 0.2) == [Answer(ticket(4).key, False, "its gateway was lost")]
    machine.on(GatewayCame(GATEWAY), 0.3)
    assert machine.on(Asked(ticket(5), ask()), 0.3) == [Answer(ticket(5).key, True)]


@pytest.mark.parametrize("where", ["waiting", "promised", "running"])
def test_a_deadline_ends_a_request_in_every_state(where):
    machine = policy(pages=4)
    if where == "waiting":
        ledger(machine).bind("somebody", 1, Owner.PREFILLING)
    if where == "running":
        running(machine)
    else:
        machine.on(Asked(ticket(), ask()), 0.0)
    stop = Cut(1) if where == "running" else DropHandOff(KEY, "deadline")
    assert machine.on(None, 100.0) == [Tell(Failed(ticket(), "DEADLINE_EXCEEDED", f"ended while {where}")), stop]
    assert machine.deadline() is None


def test_damaged_kv_is_computed_anew():
    machine = policy()
    machine.on(Asked(ticket(), ask()), 0.0)
    ledger(machine).release(KEY)
    told = Tell(Failed(ticket(), "DATA_LOSS", "wrong"))
    assert machine.on(Withdrawn(ticket(), "wrong", recompute=True), 1.0) == [told]
    assert machine.queue() == dict.fromkeys(State, 0)


def test_a_hand_over_that_went_elsewhere_is_not_told():
    machine = policy()
    machine.on(Asked(ticket(), ask()), 0.0)
    ledger(machine).release(KEY)
    assert machine.on(Withdrawn(ticket(), "prefill-1 was lost"), 1.0) == []


def test_strangers_are_ignored_and_counted():
    machine = policy()
    running(machine)
    assert machine.on(Cancel(ticket(9), "x"), 0.0) == []
    assert machine.on(GatewayGone(OTHER_GATEWAY), 0.0) == []
    assert machine.on(Withdrawn(ticket(9), "x"), 0.0) == []
    assert machine.ignored == 3
    machine.check()


@pytest.mark.parametrize(
    "event",
    [
        Ran(2, 1),
        Ran(0, 1),
        Asked(ticket(), ask()),
        KvArrived(ticket(), ask(), (First(5),)),
        Withdrawn(ticket(), "x"),
    ],
)
def test_an_event_that_cannot_be_is_our_own_bug_and_changes_nothing(event):
    machine = policy()
    running(machine)
    with pytest.raises(LocalError):
        machine.on(event, 0.5)
    machine.check()
    assert len(ledger(machine).pages(KEY)) == 4
    assert machine.on(Ran(1, 1), 1.0) == [Run(2, (KEY,), (), (), 6)]


def fork(machine: DecodePolicy, prompt: int = 6, max_tokens: int = 8, n: int = 2, branches: tuple[int, ...] = (0, 1)):
    """Continuations of one prompt join; returns the request and the commands."""
    request = replace(ask(prompt, max_tokens), sampling=Sampling(max_tokens, seed=5, n=n))
    machine.on(Asked(ticket(), request), 0.0)
    ledger(machine).bind(KEY, SHAPE.pages_for(prompt), Owner.PULLING)
    ledger(machine).move(KEY, Owner.DECODING)
    firsts = tuple(First(100 + branch, branch=branch) for branch in branches)
    return request, machine.on(KvArrived(ticket(), request, firsts, (Stage("pull", "decode-1", 0.5),)), 1.0)


def test_continuations_share_the_full_pages_of_their_prompt_and_copy_the_open_one():
    machine = policy()
    request, (run,) = fork(machine)
    alone = [replace(request, sampling=request.sampling.branch(branch)) for branch in (0, 1)]
    assert run.joining == (
        Join(f"{KEY}/0", ticket(), alone[0], First(100), (0, 2, 3, 4), (1, 2)),
        Join(f"{KEY}/1", ticket(), alone[1], First(101, branch=1), (0, 5, 6, 7), (1, 5)),
    )
    assert (run.rows, run.growing, run.steps) == ((f"{KEY}/0", f"{KEY}/1"), (), 7)
    assert (alone[0].sampling.seed, alone[0].sampling.n) == (5, 1)
    assert ledger(machine).available == 20 - SHAPE.pages_for_branches(6, 8, 2) == 12
    machine.check()


def test_a_prompt_that_fills_its_pages_is_shared_whole():
    machine = policy()
    _, (run,) = fork(machine, prompt=8)
    assert [(join.pages, join.copied) for join in run.joining] == [((0, 1, 2, 3), None), ((0, 1, 4, 5), None)]


def test_a_shared_prompt_stays_until_its_last_continuation_ends():
    machine = policy()
    fork(machine)
    told, left = machine.on(Ran(1, 3, (Ended(f"{KEY}/1", "stop", 3, 9),)), 2.0)[:2]
    assert left == Leave(f"{KEY}/1")
    assert told.message == Finished(ticket(), "stop", 3, 9, told.message.stages, 1, decoded=True)
    assert [stage.name for stage in told.message.stages] == ["pull", "join_wait", "decode"]
    assert ledger(machine).pages(KEY) == (0, 1)
    machine.check()
    told, left = machine.on(Ran(2, 4, (Ended(f"{KEY}/0", "length", 8),)), 3.0)
    assert (told.message.branch, left) == (0, Leave(f"{KEY}/0"))
    assert ledger(machine).available == 20


def test_one_continuation_is_cancelled_and_the_others_go_on():
    machine = policy()
    fork(machine)
    assert machine.on(Cancel(ticket(), "stop string", branch=0), 1.5) == [Cut(1)]
    assert machine.on(Cancel(ticket(), "stop string", branch=0), 1.5) == []
    left, run = machine.on(Ran(1, 1), 2.0)
    assert left == Leave(f"{KEY}/0")
    assert run.rows == (f"{KEY}/1",)
    assert machine.on(Cancel(ticket(), "left"), 2.5) == [Cut(2)]
    assert machine.on(Ran(2, 1), 3.0) == [Leave(f"{KEY}/1")]
    assert ledger(machine).available == 20


def test_continuations_that_ended_with_their_first_token_are_not_joined():
    machine = policy()
    _, (run,) = fork(machine, n=3, branches=(2,))
    assert run.rows == (f"{KEY}/2",)
    assert ledger(machine).available == 20 - 2 - 3


def test_a_worker_that_drains_takes_nothing_more_and_ends_what_it_has():
    machine = policy(pages=9)
    running(machine, 1, 6, 8)
    assert machine.on(Asked(ticket(2), ask(6, 8)), 0.0) == [Answer(ticket(2).key, True)]
    assert machine.on(Asked(ticket(3), ask(6, 8)), 0.0) == []
    assert machine.on(Drain(), 1.0) == [Answer(ticket(3).key, False, "draining")]
    assert machine.on(Asked(ticket(4), ask(6, 8)), 1.0) == [Answer(ticket(4).key, False, "draining")]
    machine.check()
    assert machine.freeness() == float("-inf")
    assert arrive(machine, 2) == [Cut(1)]
    (run,) = machine.on(Ran(1, 1), 2.0)
    assert run.rows == (KEY, ticket(2).key)


def test_freeness_is_the_steps_that_memory_lasts_for():
    machine = policy(pages=20, max_steps=16)
    assert machine.freeness() == 80
    running(machine, 1, 8, 40)
    assert machine.freeness() == 68  # 17 pages
    machine.on(Asked(ticket(2), ask(40, 8)), 0.0)
    assert machine.freeness() == 28  # the first in line would take 10 of them
    assert machine.on(Asked(ticket(3), ask(4, 8)), 0.0) == []
    assert machine.freeness() == 28


def forgetful(pages: int = 8, **settings) -> DecodePolicy:
    """One that expects short outputs."""
    machine = policy(pages, admission="past_future", max_steps=1000, **settings)
    for _ in range(60):
        machine.forecast.learn(3)
    return machine


def test_memory_that_runs_out_takes_the_newer_row_and_gives_it_back():
    machine = forgetful()
    running(machine, 1, 7, 24)
    machine.on(Asked(ticket(2), ask(7, 24)), 0.0)
    arrive(machine, 2, 7, 24)
    run, taken, commands = 1, 1, machine.on(Ran(1, 1), 1.0)
    while not machine.evicted:
        (order,) = commands
        run, taken = order.run_id, taken + order.steps
        commands = machine.on(Ran(run, order.steps), float(taken))
        machine.check()
    evict, order = commands
    assert evict == Evict(ticket(2).key)
    assert order.rows == (KEY,)
    assert ledger(machine).count(ticket(2).key) == 0
    assert machine.queue()[State.EVICTED] == 1
    assert machine.on(Asked(ticket(3), ask(1, 2)), 20.0) == [], "nobody overtakes a retired row"
    _, left, answer, order = machine.on(Ran(order.run_id, 1, (Ended(KEY, "stop", taken + 1, 2),)), 21.0)
    assert (left, answer) == (Leave(KEY), Answer(ticket(3).key, True))
    (join,) = order.joining
    assert (join.generated, join.recompute) == (taken, (0, 7 + taken - 1))
    assert len(join.pages) >= SHAPE.pages_for(7 + taken)
    assert machine.recomputed_tokens == 7 + taken - 1


def test_swaps_that_nobody_began_are_our_own_bug():
    machine = forgetful(host_pages=4)
    running(machine)
    for event in (SwappedOut(KEY), SwappedIn(KEY), SwappedOut("stranger")):
        with pytest.raises(LocalError):
            machine.on(event, 1.0)
    machine.check()


def run_out(machine: DecodePolicy, run: DecodeCommand) -> tuple[list, float]:
    """Order after order, until one is not followed by an order alone; returns what is said then, and when."""
    commands, now = [run], 1.0
    while len(commands) == 1 and isinstance(commands[0], Run):
        run = commands[0]
        now += run.steps
        commands = machine.on(Ran(run.run_id, run.steps), now)
        machine.check()
    return commands, now


def test_a_row_on_its_way_to_host_memory_does_not_come_back_before_it_is_there():
    machine = forgetful(host_pages=8)
    running(machine, 1, 7, 24)
    machine.on(Asked(ticket(2), ask(7, 24)), 0.0)
    arrive(machine, 2, 7, 24)
    (swap,), now = run_out(machine, machine.on(Ran(1, 1), 1.0)[0])
    assert (swap.key, len(swap.pages)) == (ticket(2).key, 4)
    assert machine.on(Cancel(ticket(1), "left"), now) == [Leave(KEY)]
    assert machine.on(Cancel(ticket(2), "left"), now) == [], "its pages are being read"
    assert ledger(machine).count(ticket(2).key) == 4
    machine.check()
    assert machine.on(SwappedOut(ticket(2).key), now) == [Leave(ticket(2).key)]
    assert (ledger(machine).available, machine.host_pages) == (8, 0)

    machine = forgetful(host_pages=8)
    running(machine, 1, 7, 24)
    machine.on(Asked(ticket(2), ask(7, 24)), 0.0)
    arrive(machine, 2, 7, 24)
    (swap,), now = run_out(machine, machine.on(Ran(1, 1), 1.0)[0])
    assert machine.on(Cancel(ticket(1), "left"), now) == [Leave(KEY)]
    (back,) = machine.on(SwappedOut(ticket(2).key), now)
    assert back == SwapIn(ticket(2).key, ledger(machine).pages(ticket(2).key))
    (order,) = machine.on(SwappedIn(ticket(2).key), now)
    assert (order.joining[0].recompute, order.joining[0].generated) == (None, 9)
    assert machine.host_pages == 0


def test_a_promise_that_was_taken_back_is_not_taken_back_twice():
    machine = forgetful(pages=9)
    for counter, prompt in ((1, 7), (2, 8), (3, 4)):
        assert machine.on(Asked(ticket(counter), ask(prompt, 24)), 0.0) == [Answer(ticket(counter).key, True)]
    (run,) = arrive(machine, 1, 7, 24)
    assert arrive(machine, 2, 8, 24) == [Cut(1)]
    (run,) = machine.on(Ran(1, 1), 1.0)
    (drop, evict, order), now = run_out(machine, run)
    assert drop == DropHandOff(ticket(3).key, "memory ran out"), "not enough: both rows want a page"
    assert evict == Evict(ticket(2).key)
    assert order.rows == (KEY,)
    assert machine.on(Cancel(ticket(3), "left"), now) == [], "it was dropped already"
    ledger(machine).release(ticket(3).key)
    assert machine.on(Withdrawn(ticket(3), "memory ran out"), now) == []
    machine.check()
    assert (machine.revoked, machine.evicted) == (1, 1)


def test_a_promise_that_was_taken_back_may_come_true_all_the_same():
    machine = forgetful(pages=7)
    running(machine, 1, 7, 20)
    machine.on(Asked(ticket(2), ask(8, 4)), 0.0)
    (drop,), now = run_out(machine, Run(1, (KEY,), (), (), 2))
    assert drop == DropHandOff(ticket(2).key, "memory ran out")
    evict_or_run = arrive(machine, 2, 8, 4, now)
    assert [type(command) for command in evict_or_run] == [Run], "what had come before is the newest, and makes room"
    assert (machine.evicted, machine.queue()[State.EVICTED]) == (1, 1)


def test_the_only_row_waits_for_memory_that_is_on_its_way_and_is_not_retired():
    machine = forgetful(pages=8)
    running(machine, 1, 7, 24)
    machine.on(Asked(ticket(2), ask(16, 12)), 0.0)
    ledger(machine).bind(ticket(2).key, 4, Owner.PULLING)
    commands, now = run_out(machine, Run(1, (KEY,), (), (), 2))
    assert commands == []
    assert machine.on(None, now) == []
    assert machine.deadline() == 100.0
    ledger(machine).move(ticket(2).key, Owner.DECODING)
    order = machine.on(KvArrived(ticket(2), ask(16, 12), (First(1),)), now)[-1]
    assert (order.rows, machine.evicted) == ((KEY,), 1), "what came last was never begun, and makes room"
    machine.check()


def test_pages_that_a_row_has_early_are_given_back_when_somebody_needs_them():
    """But for those that the order under way writes to; and the engine hears that the rest of its table is void."""
    machine = forgetful(pages=9, ahead_pages=4)
    (run,) = running(machine, 1, 7, 24)
    assert (run.steps, len(run.joining[0].pages), ledger(machine).available) == (2, 6, 3)
    assert machine.on(Asked(ticket(2), ask(20, 12)), 0.5) == [Answer(ticket(2).key, True)]
    assert (ledger(machine).count(KEY), ledger(machine).available) == (3, 1)
    machine.check()
    ledger(machine).bind(ticket(2).key, 5, Owner.PULLING)
    (run,) = machine.on(Ran(1, 2), 1.0)
    while not run.growing:
        (run,) = machine.on(Ran(run.run_id, run.steps), 2.0)
    assert run.growing == (Grow(KEY, ledger(machine).pages(KEY)[3:], 3),)
