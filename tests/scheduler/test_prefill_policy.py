"""The prefill policy: scripts with exact commands, then an engine, a source and gateways that do as they please."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core.errors import LocalError
from core.messages import Accept, Cancel, Failed, Finished, First, Handed, Offer, Prompt, Reject
from core.pages import Owner, Pages
from core.request import Hints, Request, Slo, Stage, Ticket
from core.sampling import Sampling
from core.worker import Identity
from scheduler.cost import Repriced
from scheduler.dual_queue import DualQueue, DualQueueSettings
from scheduler.fcfs import Fcfs
from scheduler.prefill_events import (
    Answer,
    AskForSink,
    Began,
    Begin,
    ChunkDone,
    ChunkFailed,
    EndSequence,
    GatewayGone,
    Granted,
    HandOffOver,
    Invite,
    PeerQuiet,
    Resume,
    RunChunk,
    SealPages,
    Span,
    State,
    Suspend,
    Suspended,
    WithdrawHandOff,
)
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy, holder
from scheduler.shortest import Shortest
from tests.cast import D1, D2, GATEWAY, MIXED, OTHER_GATEWAY, P1, P2, SHAPE, ask, efforts, ticket
from tests.scheduler.orders import COST, ORDERS, SLOW

KEY = ticket(1).key


def policy(pages: int = 40, me: Identity = P1, **how) -> PrefillPolicy:
    return PrefillPolicy(me, SHAPE, Pages(pages), PrefillConfig(**{"chunk_tokens": 8, "max_rows": 4, **how}))


def ledger(machine: PrefillPolicy) -> Pages:
    return machine._ledger


def offer(counter: int = 1, prompt: int = 6, *, wait_s: float = 9.0, **who) -> Offer:
    return Offer(ticket(counter, **who), prompt, 8, wait_s)


def queued(machine: PrefillPolicy, counter: int = 1, prompt: int = 6, max_tokens: int = 8, **how) -> list:
    """Offer and prompt of one request; returns what the prompt led to."""
    second = how.pop("second", None)
    machine.on(offer(counter, prompt, **how), 0.0)
    commands = machine.on(Prompt(ticket(counter), ask(prompt, max_tokens), second), 0.0)
    machine.check()
    return commands


def test_a_request_from_offer_to_hand_over():
    machine, request = policy(), ask(12)
    assert machine.on(offer(prompt=12), 0.0) == [Answer(Accept(ticket()))]
    assert machine.deadline() == 1.0
    assert machine.on(Prompt(ticket(), request, D2), 0.5) == [
        AskForSink(ticket(), request, 100.5),
        Begin(ticket(), request, (0, 1, 2)),
        RunChunk(1, (Span(KEY, 0, 8),)),
    ]
    assert machine.deadline() == 100.5
    assert machine.on(Granted(KEY), 0.6) == []
    assert machine.on(ChunkDone(1, ()), 1.0) == [
        SealPages(KEY, (0, 1, 2), 8),
        RunChunk(2, (Span(KEY, 8, 12),)),
    ]
    assert machine.on(ChunkDone(2, (Began(KEY, First(77)),)), 1.5) == [SealPages(KEY, (0, 1, 2), 12, (First(77),))]
    assert ledger(machine).counts()[Owner.HANDING_OFF] == 3
    stages = (
        Stage("batch_wait", "prefill-1", 0.5),
        Stage("prefill", "prefill-1", 1.0, {"tokens": "12", "chunks": "2"}),
        Stage("handing_off", "prefill-1", 0.5, {"ready_to_taken_s": "0.250000"}),
    )
    assert machine.on(HandOffOver(KEY, taken=True, taken_s=0.25), 2.0) == [
        Answer(Handed(ticket(), stages)),
        EndSequence(KEY),
    ]
    assert (ledger(machine).available, machine.deadline(), machine.ignored) == (40, None, 0)


def test_one_token_is_no_reason_to_ask_a_decode_worker():
    machine = policy()
    assert queued(machine, max_tokens=1) == [
        Begin(ticket(), ask(6, 1), (0, 1)),
        RunChunk(1, (Span(KEY, 0, 6),)),
    ]
    stages = (Stage("batch_wait", "prefill-1", 0.0), Stage("prefill", "prefill-1", 1.0, {"tokens": "6", "chunks": "1"}))
    end = Answer(Finished(ticket(), "length", 1, None, stages))
    assert machine.on(ChunkDone(1, (Began(KEY, First(77), "length"),)), 1.0) == [end, EndSequence(KEY)]


def test_a_first_token_that_stops_ends_the_hand_over_too():
    machine = policy()
    queued(machine)
    answer, withdraw = machine.on(ChunkDone(1, (Began(KEY, First(2), "stop"),)), 1.0)
    assert (answer.message.reason, answer.message.completion_tokens, answer.message.stop_token_id) == ("stop", 0, 2)
    assert withdraw == WithdrawHandOff(KEY, "finished with its first token")
    assert machine.on(HandOffOver(KEY, taken=False), 1.0) == [EndSequence(KEY)]
    assert ledger(machine).available == 40


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (offer(1, 6), "offered twice or to an earlier life of this worker"),
        (offer(2, 6, source=P2), "offered twice or to an earlier life of this worker"),
        (offer(2, 161), "prompt of 161 tokens, room for 160"),
    ],
)
def test_an_offer_that_cannot_be_met_is_rejected(event, reason):
    machine = policy()
    machine.on(offer(1, 6), 0.0)
    assert machine.on(event, 0.0) == [Answer(Reject(event.ticket, reason))]
    assert machine.queue()[State.OFFERED] == 1


def test_an_offer_is_rejected_when_the_queue_would_make_it_late():
    machine = policy()
    queued(machine, 1, 8)
    machine.on(ChunkDone(1, (Began(KEY, First(5)),)), 1.0)
    queued(machine, 2, 80, wait_s=99.0)
    assert machine.predicted_wait_s(1.0, 8) == 11.0
    (answer,) = machine.on(offer(3, 8, wait_s=10.0), 1.0)
    assert answer.message == Reject(ticket(3), "first token in 11.00 s, wanted in 10.00 s", 11.0, 1.0)
    (answer,) = machine.on(offer(4, 8, wait_s=11.0), 1.0)
    assert answer.message == Accept(ticket(4), wait_s=11.0)


def test_an_accepted_offer_lapses_without_its_prompt():
    machine = policy()
    machine.on(offer(), 0.0)
    assert machine.on(None, 1.0) == []
    assert machine.queue()[State.OFFERED] == 0
    late = Answer(Failed(ticket(), "ABORTED", "the offer has lapsed"))
    assert machine.on(Prompt(ticket(), ask()), 1.1) == [late]


def test_a_prompt_that_is_not_as_long_as_offered_is_not_taken():
    machine = policy()
    machine.on(offer(), 0.0)
    (answer,) = machine.on(Prompt(ticket(), ask(7)), 0.0)
    assert isinstance(answer.message, Failed)
    assert machine.queue()[State.OFFERED] == 1


def test_chunks_fill_one_step_in_order_of_arrival():
    machine = policy(max_rows=2)
    queued(machine, 1, 3)
    machine.on(Granted(ticket(1).key), 0.0)
    for counter, prompt in [(2, 7), (3, 2), (4, 2)]:
        queued(machine, counter, prompt)
        machine.on(Granted(ticket(counter).key), 0.0)
    commands = machine.on(ChunkDone(1, (Began(KEY, First(5)),)), 1.0)
    assert commands[-1] == RunChunk(2, (Span(ticket(2).key, 0, 7), Span(ticket(3).key, 0, 1)))
    commands = machine.on(ChunkDone(2, (Began(ticket(2).key, First(5)),)), 2.0)
    assert commands[-1] == RunChunk(3, (Span(ticket(3).key, 1, 2), Span(ticket(4).key, 0, 2)))


def test_while_a_step_runs_the_next_in_line_asks_its_sink():
    machine = policy()
    queued(machine, 1)
    machine.on(offer(2), 0.0)
    assert machine.on(Prompt(ticket(2), ask()), 0.0) == [AskForSink(ticket(2), ask(), 100.0)]


def test_a_cancelled_head_of_the_line_does_not_keep_the_next_from_asking():
    machine = policy()
    queued(machine, 1)
    queued(machine, 2)
    queued(machine, 3)
    assert machine.on(Cancel(ticket(2), "x"), 0.0) == [
        WithdrawHandOff(ticket(2).key, "x"),
        AskForSink(ticket(3), ask(), 100.0),
    ]


def test_nobody_is_overtaken_while_the_first_waits_for_pages():
    machine = policy(pages=10, ungranted_share=1.0)
    queued(machine, 1, 32)
    queued(machine, 2, 20)
    queued(machine, 3, 4)
    machine.on(Granted(ticket(2).key), 0.0)
    machine.on(Granted(ticket(3).key), 0.0)
    for run in range(1, 5):
        commands = machine.on(ChunkDone(run, (Began(KEY, First(5)),) if run == 4 else ()), float(run))
    assert commands == [SealPages(KEY, tuple(range(8)), 32, (First(5),))]
    commands = machine.on(HandOffOver(KEY, taken=True), 5.0)
    assert [command.ticket.counter for command in commands if isinstance(command, Begin)] == [2]
    assert commands[-1] == RunChunk(5, (Span(ticket(2).key, 0, 8),))


def test_who_has_started_goes_on_before_one_that_was_offered_earlier():
    machine = policy(pages=10, ungranted_share=1.0)
    machine.on(offer(1, 32), 0.0)
    queued(machine, 2, 16)
    machine.on(Prompt(ticket(1), ask(32)), 0.5)
    assert machine.on(ChunkDone(1, ()), 1.0)[-1] == RunChunk(2, (Span(ticket(2).key, 8, 16),))


def test_the_line_is_in_order_of_prompts_as_it_is_at_the_sink():
    machine = policy(ungranted_share=0.0)
    machine.on(offer(1), 0.0)
    assert queued(machine, 2) == [AskForSink(ticket(2), ask(), 100.0)]
    assert machine.on(Prompt(ticket(1), ask()), 0.5) == []
    commands = machine.on(Granted(ticket(2).key), 1.0)
    assert commands[1:] == [AskForSink(ticket(1), ask(), 100.5), RunChunk(1, (Span(ticket(2).key, 0, 6),))]


def test_only_a_share_of_the_arena_is_computed_before_its_grant():
    machine = policy(pages=40, ungranted_share=0.1)
    assert RunChunk(1, (Span(KEY, 0, 8),)) in queued(machine, 1, 16)
    queued(machine, 2, 4)
    assert machine.on(ChunkDone(1, ()), 1.0)[-1] == RunChunk(2, (Span(KEY, 8, 16),))
    assert machine.on(Granted(ticket(2).key), 1.0) == []
    commands = machine.on(ChunkDone(2, (Began(KEY, First(5)),)), 1.0)
    assert commands[-1] == RunChunk(3, (Span(ticket(2).key, 0, 4),))


def asked_for(commands: list) -> list[int]:
    return [command.ticket.counter for command in commands if isinstance(command, AskForSink)]


def test_a_sink_is_not_asked_for_what_finds_no_room_beside_those_that_wait_for_sinks():
    """Else two such prompts wait for each other around a ring: each sink's memory for the other worker's arena."""
    machine = policy(pages=20, ungranted_share=0.1)
    assert asked_for(queued(machine, 1, 8)) == [1]
    assert queued(machine, 2, 76) == []
    assert asked_for(machine.on(ChunkDone(1, (Began(KEY, First(5)),)), 1.0)) == []
    machine.check()
    assert asked_for(machine.on(Granted(KEY), 2.0)) == [2]
    machine.check()


def test_nobody_waits_for_a_sink_in_the_way_of_one_whose_sink_was_asked():
    machine = policy(pages=20, ungranted_share=0.1)
    ledger(machine).bind("somebody", 2, Owner.DECODING)
    machine._order = Shortest(8, 4)
    assert asked_for(queued(machine, 1, 76)) == [1]
    machine.on(Granted(KEY), 0.0)
    machine.check()
    assert asked_for(queued(machine, 2, 8)) == [2], "it is next, but it does not start"
    assert machine.queue()[State.RUNNING] == 0
    machine.check()
    assert any(isinstance(command, Begin) for command in machine.on(Granted(ticket(2).key), 0.0))
    machine.check()


def test_a_worker_that_hands_over_to_itself_waits_for_the_grant():
    machine = policy(me=MIXED)
    key = ticket(1, source=MIXED, sink=MIXED)
    machine.on(Offer(key, 6, 8, 9.0), 0.0)
    assert machine.on(Prompt(key, ask()), 0.0) == [AskForSink(key, ask(), 100.0)]
    commands = machine.on(Granted(key.key), 0.0)
    assert commands == [Begin(key, ask(), (0, 1)), RunChunk(1, (Span(key.key, 0, 6),))]


def test_memory_that_others_freed_wakes_the_first_in_line():
    machine = policy(pages=10)
    ledger(machine).bind("somebody", 9, Owner.DECODING)
    assert queued(machine, 1) == [AskForSink(ticket(), ask(), 100.0)]
    machine.on(Granted(KEY), 0.0)
    assert machine.deadline() == 100.0
    ledger(machine).release("somebody")
    due = machine.deadline()
    assert due is not None
    assert due <= 0.0
    assert machine.on(None, 0.5) == [Begin(ticket(), ask(), (0, 1)), RunChunk(1, (Span(KEY, 0, 6),))]
    assert machine.deadline() == 100.0


def test_a_refusal_before_the_start_turns_to_the_second_choice():
    machine = policy(ungranted_share=0.0)
    queued(machine, 1, second=D2)
    again = replace(ticket(), sink=D2)
    assert machine.on(HandOffOver(KEY, taken=False, reason="full"), 0.1) == [AskForSink(again, ask(), 100.0)]
    (answer,) = machine.on(HandOffOver(KEY, taken=False, reason="full too"), 0.2)
    assert answer.message == Failed(again, "UNAVAILABLE", "no decode worker took it: full too")
    assert machine.queue() == dict.fromkeys(State, 0)


def test_a_refusal_in_the_middle_shows_the_second_choice_what_is_there():
    machine = policy()
    queued(machine, 1, 12, second=D2)
    machine.on(ChunkDone(1, ()), 1.0)
    again = replace(ticket(), sink=D2)
    assert machine.on(HandOffOver(KEY, taken=False), 1.1) == [
        AskForSink(again, ask(12), 100.0),
        SealPages(KEY, (0, 1, 2), 8),
    ]
    assert machine.on(ChunkDone(2, (Began(KEY, First(5)),)), 2.0) == [SealPages(KEY, (0, 1, 2), 12, (First(5),))]
    assert machine.on(HandOffOver(KEY, taken=True), 2.0)[0].message.ticket == again


@pytest.mark.parametrize("granted", [False, True])
def test_nobody_waits_for_a_sink_that_is_quiet_while_another_would_take_it(granted):
    machine = policy()
    queued(machine, 1, 12, second=D2)
    if granted:
        machine.on(Granted(KEY), 0.1)
    assert machine.on(PeerQuiet(D1), 0.2) == [WithdrawHandOff(KEY, "decode-1 is quiet")]
    assert machine.on(HandOffOver(KEY, taken=False), 0.2)[0] == AskForSink(replace(ticket(), sink=D2), ask(12), 100.0)
    assert machine.on(PeerQuiet(D1, False), 0.3) == []
    assert machine.on(PeerQuiet(D2), 0.4) == [WithdrawHandOff(KEY, "decode-2 is quiet")]
    (answer, *_) = machine.on(HandOffOver(KEY, taken=False, reason="decode-2 is quiet"), 0.4)
    assert answer.message.code == "UNAVAILABLE", "who places it may know a third one"


def test_who_turns_to_a_sink_that_is_found_quiet_then_is_given_back_too():
    machine = policy()
    queued(machine, 1, 12, second=D2)
    assert machine.on(HandOffOver(KEY, taken=False, reason="its lane is away"), 0.1)[0].ticket.sink == D2
    assert machine.on(PeerQuiet(D1), 0.2) == []
    assert machine.on(PeerQuiet(D2), 0.3) == [WithdrawHandOff(KEY, "decode-2 is quiet")]


def test_nobody_turns_to_a_sink_that_is_quiet():
    machine = policy()
    queued(machine, 1, 12, second=D2)
    machine.on(PeerQuiet(D2), 0.1)
    (answer, *_) = machine.on(HandOffOver(KEY, taken=False, reason="its lane is away"), 0.2)
    assert answer.message.code == "UNAVAILABLE"


def test_who_has_no_second_choice_waits_for_its_sink_as_the_gateway_knows():
    machine = policy()
    queued(machine, 1, 12)
    assert machine.on(PeerQuiet(D1), 0.2) == []


def test_who_comes_while_its_sink_is_quiet_asks_the_second_choice_first():
    machine = policy()
    machine.on(PeerQuiet(D1), 0.0)
    *_, asks = [each for each in queued(machine, 1, second=D2) if isinstance(each, AskForSink)]
    assert asks.ticket.sink == D2
    (answer, *_) = machine.on(HandOffOver(KEY, taken=False, reason="full"), 0.1)
    assert answer.message.code == "UNAVAILABLE"


def test_of_quiet_sinks_the_first_choice_is_asked_and_one_that_is_heard_is_again():
    machine = policy()
    for sink in (D1, D2):
        machine.on(PeerQuiet(sink), 0.0)
    *_, asks = [each for each in queued(machine, 1, second=D2) if isinstance(each, AskForSink)]
    assert asks.ticket.sink == D1
    assert machine.on(PeerQuiet(D1, False), 0.1) == []
    machine.on(PeerQuiet(D2, False), 0.1)
    assert machine.on(PeerQuiet(D1), 0.2) == [WithdrawHandOff(KEY, "decode-1 is quiet")]


def test_who_would_wait_too_long_for_its_sinks_is_refused():
    machine = policy()
    queued(machine, 1)
    assert isinstance(machine.on(offer(2, wait_s=2.0), 1.9)[0].message, Accept)
    refused = machine.on(offer(3, wait_s=2.0), 2.5)[0].message
    assert refused == Reject(ticket(3), "decode-1 promised nothing for 2.50 s, wanted in 2.00 s", 0.0, 2.5)
    assert isinstance(machine.on(offer(4, wait_s=3.0), 2.5)[0].message, Accept), "it may wait for longer"
    for counter, second, sink, taken in ((5, D2, D1, True), (6, None, D2, True), (7, D1, D1, False)):
        answer = machine.on(replace(offer(counter, sink=sink, wait_s=2.0), second=second), 2.5)[0].message
        assert isinstance(answer, Accept) == taken
    first_only = replace(offer(9, wait_s=2.0), max_tokens=1)
    assert isinstance(machine.on(first_only, 2.5)[0].message, Accept), "it goes to no decode worker"
    assert invites(machine.on(Granted(KEY), 2.6)) == [(GATEWAY, 6)]
    assert isinstance(machine.on(offer(8, wait_s=2.0), 2.6)[0].message, Accept), "it promises again"


@pytest.mark.parametrize(("now", "second", "asked"), [(1.0, D2, D1), (2.5, D2, D2), (2.5, None, D1)])
def test_a_sink_that_would_make_it_late_is_passed_over_for_the_second_choice(now, second, asked):
    machine = policy()
    queued(machine, 1)  # since 0 s it waits for D1
    machine.on(offer(2, wait_s=2.0), 0.9)
    assert AskForSink(replace(ticket(2), sink=asked), ask(6), now + 100.0) in machine.on(
        Prompt(ticket(2), ask(6), second), now
    )
    machine.check()


@pytest.mark.parametrize(("other", "stays"), [(16, True), (24, False)])
def test_a_loss_of_a_sink_leaves_nobody_in_the_way_of_one_whose_sink_holds_memory(other, stays):
    """With 8 pages: three of a prompt that would wait for memory again, beside four or six that somebody else needs."""
    machine = policy(pages=8)
    queued(machine, 1, 12, second=D2)
    machine.on(Granted(KEY), 0.1)
    assert AskForSink(ticket(2), ask(other), 100.0) in queued(machine, 2, other)
    commands = machine.on(HandOffOver(KEY, taken=False, reason="lost"), 0.2)
    machine.check()
    if stays:
        assert commands[0] == AskForSink(replace(ticket(), sink=D2), ask(12), 100.0)
    else:
        assert commands[0].message == Failed(ticket(), "UNAVAILABLE", "no decode worker took it: lost")


def test_a_refusal_after_the_last_choice_waits_for_the_running_step():
    machine = policy()
    queued(machine, 1, 12)
    (answer,) = machine.on(HandOffOver(KEY, taken=False, reason="full"), 0.5)
    assert answer.message.code == "UNAVAILABLE"
    assert ledger(machine).available == 37
    assert machine.on(ChunkDone(1, ()), 1.0) == [EndSequence(KEY)]
    assert ledger(machine).available == 40


def test_a_cancel_frees_nothing_before_engine_and_source_are_done():
    machine = policy()
    queued(machine)
    assert machine.on(Cancel(ticket(), "left"), 0.5) == [WithdrawHandOff(KEY, "left")]
    assert machine.on(Cancel(ticket(), "left again"), 0.5) == []
    assert machine.on(HandOffOver(KEY, taken=False), 0.5) == []
    machine.check()
    assert ledger(machine).available == 38
    assert machine.on(ChunkDone(1, (Began(KEY, First(5)),)), 1.0) == [EndSequence(KEY)]
    assert ledger(machine).available == 40


def test_a_stop_string_in_the_first_token_gets_the_stages_so_far():
    machine = policy()
    queued(machine)
    machine.on(ChunkDone(1, (Began(KEY, First(5)),)), 1.0)
    told, withdrawn = machine.on(Cancel(ticket(), "stop string", report=True), 1.5)
    assert withdrawn == WithdrawHandOff(KEY, "stop string")
    assert told.message.cancelled
    assert [(stage.name, stage.seconds) for stage in told.message.stages] == [("batch_wait", 0.0), ("prefill", 1.0)]
    assert machine.on(HandOffOver(KEY, taken=True), 1.5) == [EndSequence(KEY)]


def test_a_request_that_was_taken_while_its_cancel_was_under_way_is_not_answered():
    machine = policy()
    queued(machine)
    machine.on(ChunkDone(1, (Began(KEY, First(5)),)), 1.0)
    machine.on(Cancel(ticket(), "left"), 1.0)
    assert machine.on(HandOffOver(KEY, taken=True), 1.0) == [EndSequence(KEY)]


def test_a_gateway_takes_its_requests_along():
    machine = policy()
    queued(machine, 1)
    machine.on(offer(2), 0.0)
    machine.on(offer(3, minter=OTHER_GATEWAY), 0.0)
    assert machine.on(GatewayGone(GATEWAY), 0.0) == [WithdrawHandOff(KEY, "its gateway was lost")]
    assert machine.queue()[State.OFFERED] == 1


@pytest.mark.parametrize("where", ["queued", "running", "handing_off"])
def test_a_deadline_ends_a_request_in_every_state(where):
    machine = policy(ungranted_share=0.0 if where == "queued" else 0.5)
    queued(machine)
    if where == "handing_off":
        machine.on(ChunkDone(1, (Began(KEY, First(5)),)), 1.0)
    assert machine.on(None, 100.0) == [
        Answer(Failed(ticket(), "DEADLINE_EXCEEDED", f"ended while {where}")),
        WithdrawHandOff(KEY, "deadline"),
    ]
    assert machine.deadline() is None
    machine.on(HandOffOver(KEY, taken=False), 100.0)
    if where == "running":
        machine.on(ChunkDone(1, ()), 101.0)
    assert ledger(machine).holders() == ()


def test_strangers_are_ignored_and_counted():
    machine = policy()
    queued(machine)
    for event in (Cancel(ticket(9), "x"), GatewayGone(OTHER_GATEWAY), Granted("?"), HandOffOver("?", taken=True)):
        assert machine.on(event, 0.0) == []
    assert machine.ignored == 4
    machine.check()


@pytest.mark.parametrize("event", [ChunkDone(7, ()), ChunkDone(2, ())])
def test_the_end_of_a_step_that_does_not_run_is_our_own_bug(event):
    machine = policy()
    queued(machine, 1, 12)
    with pytest.raises(LocalError, match="chunk done: got run"):
        machine.on(event, 0.5)
    machine.check()
    assert machine.on(ChunkDone(1, ()), 1.0)[-1] == RunChunk(2, (Span(KEY, 8, 12),))


# Prefixes.
def chain(prompt: int) -> tuple[int, ...]:
    return tuple(range(100, 100 + prompt // 4))


def cached(machine: PrefillPolicy, prompt: int = 16) -> None:
    """Somebody computed that prompt, and is gone."""
    ledger(machine).bind("earlier", prompt // 4, Owner.PREFILLING)
    ledger(machine).name("earlier", chain(prompt))
    ledger(machine).release("earlier")


def test_what_is_cached_is_not_computed_again():
    machine, request = policy(ungranted_share=1.0), replace(ask(18), prefix=chain(18))
    cached(machine)
    assert machine.on(Offer(ticket(), 18, 8, 9.0, prefix=chain(18)), 0.0) == [Answer(Accept(ticket(), 16))]
    asked, begun, run = machine.on(Prompt(ticket(), request), 0.0)
    assert isinstance(asked, AskForSink)
    assert begun == Begin(ticket(), request, (0, 1, 2, 3, 4))
    assert run == RunChunk(1, (Span(KEY, 16, 18),))
    assert machine.on(ChunkDone(1, (Began(KEY, First(5)),)), 1.0) == [SealPages(KEY, (0, 1, 2, 3, 4), 18, (First(5),))]
    answer, _ = machine.on(HandOffOver(KEY, taken=True), 1.0)
    assert answer.message.stages[1].detail == {"tokens": "18", "chunks": "1", "cached": "16"}
    assert ledger(machine).cached(chain(18)) == 4


@pytest.mark.parametrize(("of_tokens", "found"), [(2, 16), (4, 16), (0, 16), (1, 16), (8, 0), (3, 0)])
def test_names_of_smaller_pages_name_ours_and_those_of_larger_ones_do_not(of_tokens, found):
    machine, names = policy(ungranted_share=1.0), tuple(range(18 // (of_tokens or 4)))
    own = SHAPE.names(names, of_tokens)
    ledger(machine).bind("earlier", len(own), Owner.PREFILLING)
    ledger(machine).name("earlier", own)
    ledger(machine).release("earlier")
    offer = Offer(ticket(), 18, 8, 9.0, prefix=names, prefix_page_tokens=of_tokens)
    assert machine.on(offer, 0.0) == [Answer(Accept(ticket(), found))]
    request = replace(ask(18), prefix=names, prefix_page_tokens=of_tokens)
    asked, *_ = machine.on(Prompt(ticket(), request), 0.0)
    assert asked.request == request, "a sink has pages of its own"
    assert ledger(machine).count(holder(KEY)) == 5
    for run in range(1, 4 if not found else 2):
        machine.on(ChunkDone(run, (Began(KEY, First(5)),)), float(run))
    assert ledger(machine).cached(own) == len(own)
    machine.check()


@pytest.mark.parametrize(("prompt", "found"), [(16, 12), (17, 16), (8, 4), (4, 0), (3, 0)])
def test_one_token_at_least_is_computed(prompt, found):
    machine = policy(ungranted_share=1.0)
    cached(machine)
    (answer,) = machine.on(Offer(ticket(), prompt, 8, 9.0, prefix=chain(prompt)), 0.0)
    assert answer.message.cached_tokens == found
    commands = machine.on(Prompt(ticket(), replace(ask(prompt), prefix=chain(prompt))), 0.0)
    assert commands[-1] == RunChunk(1, (Span(KEY, found, prompt),))
    machine.check()


def test_pages_are_named_chunk_by_chunk():
    machine = policy(ungranted_share=1.0)
    machine.on(Offer(ticket(), 18, 8, 9.0, prefix=chain(18)), 0.0)
    machine.on(Prompt(ticket(), replace(ask(18), prefix=chain(18))), 0.0)
    known = []
    for run in range(1, 4):
        known.append(ledger(machine).cached(chain(18)))
        machine.on(ChunkDone(run, (Began(KEY, First(5)),) if run == 3 else ()), float(run))
    assert [*known, ledger(machine).cached(chain(18))] == [0, 2, 4, 4]


def test_what_was_cached_at_the_offer_and_is_gone_is_computed():
    machine = policy(pages=6, ungranted_share=1.0)
    cached(machine)
    machine.on(Offer(ticket(), 18, 8, 9.0, prefix=chain(18)), 0.0)
    ledger(machine).bind("neighbour", 6, Owner.DECODING)
    machine.on(Prompt(ticket(), replace(ask(18), prefix=chain(18))), 0.0)
    ledger(machine).release("neighbour")
    assert machine.on(None, 0.5)[-1] == RunChunk(1, (Span(KEY, 0, 8),))


# Refusals.
def busy(**settings) -> PrefillPolicy:
    """A worker of 8 tokens a second with 88 of them before it."""
    machine = policy(**settings)
    queued(machine, 1, 8)
    machine.on(ChunkDone(1, (Began(KEY, First(5)),)), 1.0)
    queued(machine, 2, 80, wait_s=99.0)
    machine.on(Granted(ticket(2).key), 1.0)
    return machine


def invites(commands: list) -> list:
    return [(command.gateway, command.message.tokens) for command in commands if isinstance(command, Invite)]


def test_who_was_refused_is_told_once_when_it_would_be_accepted():
    machine = busy()
    for counter, prompt, wait_s in ((3, 8, 10.0), (4, 40, 10.0)):
        (answer,) = machine.on(offer(counter, prompt, wait_s=wait_s), 1.0)
        assert isinstance(answer.message, Reject)
    machine.on(offer(5, 8, wait_s=9.0, minter=OTHER_GATEWAY), 1.0)
    assert [invites(machine.on(ChunkDone(run, ()), float(run))) for run in (2, 3)] == [[], []], "as late as it was"
    assert invites(machine.on(Cancel(ticket(2), "left"), 3.5)) == [(GATEWAY, 40), (OTHER_GATEWAY, 8)]
    assert invites(machine.on(ChunkDone(4, ()), 4.0)) == []
    machine.on(offer(6, 8, wait_s=0.5), 4.0)
    assert invites(machine.on(HandOffOver(KEY, taken=True), 4.1)) == []


def test_nobody_is_told_who_was_refused_for_good_or_has_died():
    machine = busy(pages=30)
    machine.on(offer(3, 200, wait_s=99.0), 1.0)
    machine.on(offer(4, 8, wait_s=10.5, minter=OTHER_GATEWAY), 1.0)
    machine.on(GatewayGone(OTHER_GATEWAY), 1.0)
    for run in range(2, 8):
        assert invites(machine.on(ChunkDone(run, ()), float(run))) == []


def test_more_than_the_accepted_share_of_the_arena_is_refused_until_pages_are_handed_over():
    machine = policy(pages=10, accept_share=1.0, ungranted_share=1.0)
    queued(machine, 1, 32)
    (answer,) = machine.on(offer(2, 12), 0.0)
    assert answer.message.reason == "3 pages beside 8 of requests before it"
    assert machine.on(offer(3, 8), 0.0) == [Answer(Accept(ticket(3)))]
    for run in range(1, 5):
        commands = machine.on(ChunkDone(run, (Began(KEY, First(5)),) if run == 4 else ()), run / 10)
        assert invites(commands) == []
    assert invites(machine.on(HandOffOver(KEY, taken=True), 0.5)) == [(GATEWAY, 12)]


# Suspension.
def long_step() -> PrefillPolicy:
    """A step of 0.6 s runs, of a prompt that is in no hurry."""
    config = PrefillConfig(chunk_tokens=6, max_rows=3, ungranted_share=1.0, preempt=True)
    machine = PrefillPolicy(P1, SHAPE, Pages(40), config, DualQueue(6, 3, SLOW))
    assert queued(machine, 1, 14)[-1] == RunChunk(1, (Span(KEY, 0, 6),))
    return machine


def test_a_long_step_is_suspended_for_an_urgent_request_and_resumed():
    machine, urgent = long_step(), ticket(2).key
    assert queued(machine, 2, 2, wait_s=0.45)[-1] == Suspend(1)
    assert [type(command) for command in queued(machine, 3, 2, wait_s=2.0)] == []
    assert machine.on(Suspended(1), 0.1)[-1].spans[0] == Span(urgent, 0, 2)
    machine.check()
    commands = machine.on(ChunkDone(2, (Began(urgent, First(5)),)), 0.4)
    assert commands[-1] == Resume(1)
    machine.check()
    answer = machine.on(offer(4, 2, wait_s=0.45), 0.4)[0]
    assert isinstance(answer.message, Reject), "a step is suspended once only"
    assert machine.on(ChunkDone(1, ()), 0.9)[0] == SealPages(KEY, (0, 1, 2, 3), 6)
    assert machine.suspensions == 1


def test_a_step_may_end_before_it_stops():
    machine = long_step()
    queued(machine, 2, 2, wait_s=0.45)
    assert machine.on(ChunkDone(1, ()), 0.1)[-1].spans[0] == Span(ticket(2).key, 0, 2)
    with pytest.raises(LocalError, match="suspended: got run 1"):
        machine.on(Suspended(1), 0.1)


def test_a_cancelled_sequence_of_a_suspended_step_is_freed_by_the_steps_own_end():
    machine = long_step()
    queued(machine, 2, 2, wait_s=0.45)
    machine.on(Suspended(1), 0.1)
    machine.on(Cancel(ticket(1), "left"), 0.2)
    machine.on(HandOffOver(KEY, taken=False), 0.2)
    assert ledger(machine).count(holder(KEY)) == 4
    commands = machine.on(ChunkDone(2, (Began(ticket(2).key, First(5)),)), 0.4)
    assert commands[-1] == Resume(1)
    assert machine.on(ChunkDone(1, ()), 0.9) == [EndSequence(KEY)]
    assert ledger(machine).count(holder(KEY)) == 0


def test_who_would_make_another_one_late_is_told_when_it_might_come_again():
    """A token takes 0.1 s. 10 tokens are wanted within 2 s: 12 more before them would make them 0.2 s late."""
    config = PrefillConfig(chunk_tokens=6, max_rows=3, ungranted_share=1.0)
    machine = PrefillPolicy(P1, SHAPE, Pages(40), config, DualQueue(6, 3, SLOW, DualQueueSettings(headroom=0.0)))
    machine.on(offer(1, 10, wait_s=2.0), 0.0)
    (answer,) = machine.on(offer(2, 12, wait_s=1.9), 0.0)
    no = answer.message
    assert (no.wait_s, no.again_s) == (pytest.approx(1.2), pytest.approx(0.2))
    assert no.reason == "first token in 1.20 s, wanted in 1.90 s, but there is no time to spare for 0.20 s"


@pytest.mark.parametrize("event", [Suspended(1), Suspended(7)])
def test_a_step_that_nobody_asked_to_stop_is_not_suspended(event):
    machine = long_step()
    with pytest.raises(LocalError, match="suspended: got run"):
        machine.on(event, 0.5)
    machine.check()


def test_nothing_is_suspended_unless_the_engine_can():
    config = PrefillConfig(chunk_tokens=6, max_rows=3, ungranted_share=1.0)
    machine = PrefillPolicy(P1, SHAPE, Pages(40), config, DualQueue(6, 3, SLOW))
    queued(machine, 1, 14)
    (answer,) = machine.on(offer(2, 2, wait_s=0.45), 0.0)
    assert isinstance(answer.message, Reject)


def test_the_end_of_the_window_wakes_the_worker():
    config = PrefillConfig(chunk_tokens=64, max_rows=8)
    machine = PrefillPolicy(P1, SHAPE, Pages(40), config, DualQueue(64, 8, COST))
    assert [type(command) for command in queued(machine, 1, 6)] == [AskForSink]
    due = machine.deadline()
    assert due == pytest.approx(0.01)
    assert [type(command) for command in machine.on(None, due or 0.0)] == [Begin, RunChunk]


@pytest.mark.parametrize(
    "takes",
    [[("?", 1)], [(KEY, 0)], [(KEY, 9)], [(KEY, 4), (KEY, 1)], [(KEY, 6)]],
    ids=["unknown", "none", "too many", "twice", "too long a step"],
)
def test_an_order_that_breaks_its_contract_is_found_out(takes):
    class Wrong(Fcfs):
        def next(self, now, start):
            return [] if self.head(now) is None or start(KEY) is None else takes

    machine = PrefillPolicy(P1, SHAPE, Pages(40), PrefillConfig(chunk_tokens=5), Wrong(8, 4))
    machine.on(offer(), 0.0)
    with pytest.raises(LocalError, match="the order takes"):
        machine.on(Prompt(ticket(), ask()), 0.0)


@dataclass
class Asked:
    """The source's side of one hand-off."""

    ticket: Ticket
    granted: bool = False
    sealed: int = 0
    complete: bool = False
    over: bool = False
    """Its `HandOffOver` is under way."""


def hashes(request: Request) -> tuple[int, ...]:
    """Of the full pages of a prompt that counts up: where it starts and how far it goes is all there is to know."""
    return tuple(request.prompt[0] * 1000 + page + 1 for page in range(len(request.prompt) // 4))


@dataclass
class Job:
    """What the gateway and the engine know of a request."""

    ticket: Ticket
    request: Request
    second: Identity | None
    answer: str = ""
    prompted: bool = False
    deadline: float = 0.0
    ends: int = 0
    unwanted: bool = False
    """Cancelled, its gateway dead, or its time up: no end needs to be told."""
    place: int = 0
    """In line, by when its prompt came."""
    begun: bool = False
    computed: int = 0
    closed: bool = False
    reports: bool = False
    """Its gateway wants its stages."""
    handed: Ticket | None = None
    """The hand-off that ended last."""


class PrefillWorker(RuleBasedStateMachine):
    """An engine that ends every step once, a source that ends every ask once, gateways and a neighbour in memory."""

    order = "measured"

    def __init__(self):
        super().__init__()
        self.ledger = Pages(20)
        self.ledger.bind("scratch", 1, Owner.SCRATCH)
        config = PrefillConfig(
            chunk_tokens=6, max_rows=3, offer_s=1.0, ungranted_share=0.5, accept_share=4.0, preempt=True
        )
        self.machine = self.made(config)
        self.now = 0.0
        self.jobs: dict[str, Job] = {}
        self.asked: dict[str, Asked] = {}
        self.run: RunChunk | None = None
        self.suspending = False
        self.suspended: RunChunk | None = None
        self.suspended_once: set[int] = set()
        self.last_run = 0
        self.written: dict[int, int] = {}
        """Pages that are full, and the hash of what is in them."""
        self.refused: dict[Identity, int] = {}
        """Gateways, and the most that each was told of since its last refusal."""
        self.line = 0
        self.from_source: deque = deque()

    # What a subclass may have otherwise.
    def made(self, config: PrefillConfig) -> PrefillPolicy:
        """The machine."""
        return PrefillPolicy(P1, SHAPE, self.ledger, config, ORDERS[self.order](6, 3, SLOW))

    def hints(self, data) -> Hints:
        """What a caller says of a request."""
        return Hints()

    def rest(self) -> bool:
        """Nothing is under way: whether something may still come of waiting."""
        return False

    # What the policy asks for.
    def give(self, event) -> None:
        for command in self.machine.on(event, self.now):
            self.perform(command)
        self.machine.check()
        self.turn_clock(self.now)

    def turn_clock(self, until: float) -> None:
        """As a driver: call whenever the deadline has come, also if it came because a neighbour freed memory."""
        while (due := self.machine.deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            commands = self.machine.on(None, self.now)
            after = self.machine.deadline()
            assert after is None or after > self.now, "the driver would spin"
            for command in commands:
                self.perform(command)
            self.machine.check()
        self.now = until

    def perform(self, command) -> None:
        match command:
            case Answer(message):
                self.answered(message)
            case Begin(ticket, request, pages):
                job = self.jobs[ticket.key]
                assert job.prompted
                assert not job.begun
                assert request == job.request
                assert pages == self.ledger.pages(holder(ticket.key))
                assert len(pages) == SHAPE.pages_for(len(request.prompt))
                waiting = [j for j in self.jobs.values() if j.prompted and not (j.begun or j.unwanted or j.ends)]
                if request.slo.batch and not request.alone:
                    asked, alone = self.asked.get(ticket.key), request.sampling.max_tokens == 1
                    assert alone or (asked is not None and asked.granted), "it holds memory while it waits for some"
                elif self.order in ("fcfs", "measured") or request.alone:
                    waiting = [j for j in waiting if j.request.alone == request.alone]
                    waiting = [j for j in waiting if request.alone or not j.request.slo.batch]
                    assert min(waiting, key=lambda j: j.place) is job, "overtaken"
                job.begun = True
            case Suspend(run_id):
                assert self.run is not None
                assert self.run.run_id == run_id
                assert not self.suspending
                assert self.suspended is None, "two suspended steps"
                assert run_id not in self.suspended_once, "suspended twice"
                assert not self.jobs[self.run.spans[0].key].request.alone, "another step comes between"
                assert not self.jobs[self.run.spans[0].key].request.slo.batch, "the batch class is never suspended"
                self.suspended_once.add(run_id)
                self.suspending = True
            case Resume(run_id):
                assert self.run is None
                assert self.suspended is not None
                assert self.suspended.run_id == run_id
                self.run, self.suspended = self.suspended, None
            case Invite(gateway, message):
                assert message.worker == P1
                assert message.tokens > self.refused[gateway], "told twice"
                self.refused[gateway] = message.tokens
            case RunChunk(run_id, spans):
                assert self.run is None
                assert run_id == self.last_run + 1
                assert 1 <= len(spans) <= 3
                assert sum(span.stop - span.start for span in spans) <= 6
                assert len(spans) == 1 or not any(self.jobs[span.key].request.alone for span in spans), "not alone"
                together = {self.jobs[span.key].request.slo.batch for span in spans}
                assert len(together) == 1, "the batch class in a step of others"
                for span in spans:
                    job = self.jobs[span.key]
                    assert job.begun
                    assert not job.closed
                    if not job.computed:
                        assert span.start % 4 == 0
                        shared = self.ledger.pages(holder(span.key))[: span.start // 4]
                        assert tuple(self.written[page] for page in shared) == hashes(job.request)[: len(shared)]
                        job.computed = span.start
                    assert job.computed == span.start < span.stop <= len(job.request.prompt)
                    assert self.suspended is None or span.key not in [each.key for each in self.suspended.spans]
                self.run, self.last_run, self.suspending = command, run_id, False
            case AskForSink(ticket, request, deadline):
                job = self.jobs[ticket.key]
                assert ticket.key not in self.asked
                assert request == job.request
                assert deadline == job.deadline
                assert ticket in (job.ticket, replace(job.ticket, sink=job.second or D1))
                assert request.sampling.max_tokens > 1
                self.asked[ticket.key] = Asked(ticket)
            case SealPages(key, pages, tokens, firsts):
                asked = self.asked.get(key)
                assert pages == self.ledger.pages(holder(key))
                if asked is not None:
                    assert not asked.complete
                    assert tokens >= asked.sealed
                    assert bool(firsts) == (tokens == len(self.jobs[key].request.prompt))
                    asked.sealed, asked.complete = tokens, bool(firsts)
            case WithdrawHandOff(key):
                asked = self.asked.get(key)
                if asked is not None and not asked.over:
                    self.end_ask(asked, False)
            case EndSequence(key):
                job = self.jobs[key]
                assert job.begun
                assert not job.closed
                assert key not in self.asked
                for step in (self.run, self.suspended):
                    assert step is None or key not in [span.key for span in step.spans]
                job.closed = True

    def answered(self, message) -> None:
        job = self.jobs[message.ticket.key]
        match message:
            case Accept() | Reject():
                assert not job.answer
                job.answer = type(message).__name__
                batch = job.request.slo.batch
                if isinstance(message, Reject) and "room for" not in message.reason and not batch:
                    self.refused[message.ticket.minter] = 0
            case Handed(ticket, _, cancelled):
                assert job.reports if cancelled else ticket == job.handed
                job.ends += 1
            case Failed() | Finished():
                job.ends += 1
        assert job.ends <= 1, "ended twice"

    def end_ask(self, asked: Asked, taken: bool) -> None:
        asked.over = True
        self.from_source.append(HandOffOver(asked.ticket.key, taken, "" if taken else "no"))

    # What gateways do.
    @rule(long=st.integers(12, 20), short=st.integers(0, 3))
    def arrive(self, long, short):
        """Offered and sent at once: a prompt of many steps, and perhaps one that can hardly wait for the first."""
        for prompt, wait_s in ((long, 1000.0), (short, 0.45)):
            if prompt:
                new = ticket(len(self.jobs) + 1)
                job = self.jobs[new.key] = Job(new, ask(prompt, 4), None)
                self.give(Offer(new, prompt, 4, wait_s))
                if job.answer == "Accept":
                    self.send(job)

    @rule(prompt=st.sampled_from([1, 2, 3, 4, 5, 9, 16, 30]), max_tokens=st.integers(1, 4), data=st.data())
    def offer(self, prompt, max_tokens, data):
        minter = data.draw(st.sampled_from([GATEWAY, OTHER_GATEWAY]))
        new = ticket(len(self.jobs) + 1, minter=minter)
        timeout_s = data.draw(st.sampled_from([2.0, 50.0]))
        request = ask(prompt, max_tokens, timeout_s=timeout_s, start=data.draw(st.integers(0, 2)))
        batch = data.draw(st.sampled_from([False] * 3 + [True]))
        request = replace(request, alone=data.draw(st.sampled_from([False] * 4 + [True])), slo=Slo(batch=batch))
        if request.prompt[0]:
            request = replace(request, prefix=hashes(request))
        tenant = data.draw(st.sampled_from(["", "", "a", "b"]))
        request = replace(request, hints=replace(self.hints(data), tenant=tenant))
        self.jobs[new.key] = Job(new, request, data.draw(st.sampled_from([None, D2])))
        wait_s = data.draw(st.sampled_from([0.45, 0.7, 5.0, 1000.0]))
        self.give(Offer(new, prompt, max_tokens, wait_s, request.hints, prefix=request.prefix, batch=batch))
        if self.jobs[new.key].answer == "Accept" and data.draw(st.booleans()):
            self.send(self.jobs[new.key])

    @precondition(lambda self: any(job.answer == "Accept" and not job.prompted for job in self.jobs.values()))
    @rule(data=st.data())
    def prompt(self, data):
        waiting = [job for job in self.jobs.values() if job.answer == "Accept" and not job.prompted]
        self.send(data.draw(st.sampled_from(waiting)))

    def send(self, job: Job) -> None:
        self.line += 1
        job.deadline, job.prompted, job.place = self.now + job.request.timeout_s, True, self.line
        self.give(Prompt(job.ticket, job.request, job.second))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data):
        job = data.draw(st.sampled_from(list(self.jobs.values())))
        report = data.draw(st.booleans())
        job.reports = job.reports or (report and not job.unwanted)
        if job.answer == "Accept":
            job.unwanted = True
        self.give(Cancel(job.ticket, "left", report))

    @rule(who=st.sampled_from([GATEWAY, OTHER_GATEWAY]))
    def gateway_dies(self, who):
        self.refused.pop(who, None)
        for job in self.jobs.values():
            if job.ticket.minter == who and job.answer == "Accept":
                job.unwanted = True
        self.give(GatewayGone(who))

    # What the engine does.
    def compute(self, run: RunChunk) -> None:
        for span in run.spans:
            job = self.jobs[span.key]
            job.computed = span.stop
            pages = self.ledger.pages(holder(span.key))
            for index, each in enumerate(hashes(job.request)[: span.stop // 4]):
                if index >= span.start // 4:
                    self.written[pages[index]] = each

    @precondition(lambda self: self.run is not None)
    @rule(no=st.integers(0, 8))
    def chunk_failed(self, no):
        if no == 0:
            run, self.run = self.run, None
            self.give(ChunkFailed(run.run_id, "boom"))

    @precondition(lambda self: self.run is not None and self.suspending)
    @rule()
    def suspend(self):
        run, self.run = self.run, None
        self.suspended, self.suspending = run, False
        self.give(Suspended(run.run_id))

    @precondition(lambda self: self.run is not None)
    @rule(data=st.data())
    def chunk_done(self, data):
        self.now += data.draw(st.sampled_from([0.0, 0.1, 0.5]))
        run, self.run = self.run, None
        assert run is not None
        self.compute(run)
        firsts = []
        for span in run.spans:
            job = self.jobs[span.key]
            if span.stop == len(job.request.prompt):
                stops = data.draw(st.integers(0, 4)) == 0
                length = job.request.sampling.max_tokens == 1
                firsts.append(Began(span.key, First(7), "stop" if stops else "length" if length else None))
        self.give(ChunkDone(run.run_id, tuple(firsts)))

    # What the source does.
    @precondition(lambda self: any(not asked.over for asked in self.asked.values()))
    @rule(data=st.data(), no=st.integers(0, 3))
    def source(self, data, no):
        asked = data.draw(st.sampled_from([asked for asked in self.asked.values() if not asked.over]))
        if not no:
            self.end_ask(asked, False)
        elif not asked.granted:
            asked.granted = True
            self.from_source.append(Granted(asked.ticket.key))
        elif asked.complete:
            self.end_ask(asked, True)

    @precondition(lambda self: self.from_source)
    @rule()
    def deliver(self):
        event = self.from_source.popleft()
        if isinstance(event, HandOffOver):
            job, asked = self.jobs[event.key], self.asked.pop(event.key)
            job.handed = asked.ticket
        self.give(event)

    # What else happens.
    @rule(who=st.sampled_from([D1, D2]), quiet=st.booleans())
    def hush(self, who, quiet):
        """A decode worker is not heard for a while, or again."""
        self.give(PeerQuiet(who, quiet))

    @rule(factor=st.sampled_from([0.3, 1.0, 4.0]))
    def machine_changes(self, factor):
        """What was promised and who waits stays; only predictions are others."""
        self.give(Repriced(SLOW.at(factor, factor)))

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def wait(self, seconds):
        self.turn_clock(self.now + seconds)

    @rule(count=st.integers(0, 12))
    def neighbour(self, count):
        """Somebody else in this arena takes pages or gives them back."""
        self.ledger.release("neighbour")
        for page in self.ledger.bind("neighbour", min(count, self.ledger.available), Owner.DECODING):
            self.written.pop(page, None)
        self.turn_clock(self.now)

    @invariant()
    def sound(self):
        self.machine.check()
        self.ledger.check()
        assert sum(self.machine.queue().values()) <= sum(job.answer == "Accept" for job in self.jobs.values())

    def teardown(self):
        self.ledger.release("neighbour")
        self.turn_clock(self.now)
        for job in list(self.jobs.values()):
            if job.answer == "Accept" and not job.prompted:
                self.send(job)
        for _ in range(1000):
            if self.from_source:
                self.deliver()
            elif self.run is not None:
                run, self.run = self.run, None
                self.compute(run)
                firsts = []
                for span in run.spans:
                    job = self.jobs[span.key]
                    if span.stop == len(job.request.prompt):
                        last = job.request.sampling.max_tokens == 1
                        firsts.append(Began(span.key, First(7), "length" if last else None))
                self.give(ChunkDone(run.run_id, tuple(firsts)))
            else:
                todo = [a for a in self.asked.values() if not a.over and (a.complete or not a.granted)]
                if not todo:
                    if self.rest():
                        continue
                    break
                if not todo[0].granted:
                    todo[0].granted = True
                    self.from_source.append(Granted(todo[0].ticket.key))
                else:
                    self.end_ask(todo[0], True)
        assert sum(self.machine.queue().values()) == 0, "a request hangs"
        assert self.machine.deadline() is None
        assert self.ledger.holders() == ("scratch",)
        for job in self.jobs.values():
            assert job.answer
            assert job.begun == job.closed
            if job.answer == "Accept" and not job.unwanted:
                assert job.ends == 1, "a request without an end"


@efforts
@pytest.mark.parametrize("order", ORDERS)
def test_every_accepted_request_ends_once_and_leaves_no_page(order, effort):
    machine = type(order, (PrefillWorker,), {"order": order})
    run_state_machine_as_test(machine, settings=settings(effort, max_examples=effort.max_examples // 4))


def test_continuations_begin_together_and_only_those_that_go_on_are_handed_over():
    machine = policy()
    request = replace(ask(max_tokens=4), sampling=Sampling(4, n=3))
    machine.on(offer(), 0.0)
    machine.on(Prompt(ticket(), request), 0.0)
    begun = (Began(KEY, First(5)), Began(KEY, First(2, branch=1), "stop"), Began(KEY, First(6, branch=2)))
    told, sealed = machine.on(ChunkDone(1, begun), 1.0)
    assert told.message == Finished(ticket(), "stop", 0, 2, told.message.stages, branch=1)
    assert sealed.firsts == (First(5), First(6, branch=2))
    assert machine.on(Cancel(ticket(), "stop string", branch=0), 1.0) == [], "the prompt is that of the others, too"
