"""How long sessions are kept, and that their KV is there when they come back, but never in anybody's way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.messages import Cancel, First
from core.pages import Owner, Pages
from core.request import Hints
from scheduler.decode_events import Answer, Asked, Cut, Ended, KvArrived, Leave, Ran, Run
from scheduler.decode_policy import DecodeConfig, DecodePolicy
from scheduler.pins import PinConfig, Pins
from tests.cast import D1, SHAPE, ask, ticket


def seen(pauses, tool: str = "grep", **settings) -> Pins:
    pins = Pins(PinConfig(**{"least": 4, "window": 8, **settings}))
    for number, pause_s in enumerate(pauses):
        pins.pause(f"s{number}", tool, 100.0)
        pins.resume(f"s{number}", 100.0 + pause_s)
        pins.forget(f"s{number}")
    return pins


@pytest.mark.parametrize(
    ("pauses", "tool", "want"),
    [
        ([], "grep", 10.0),
        ([1, 2, 3], "grep", 10.0),
        ([4, 3, 2, 1], "grep", 4.0),
        ([5, 4, 3, 2, 1], "grep", 4.0),
        ([5, 4, 3, 2, 1], "never seen", 4.0),
        ([99] * 9 + [1] * 8, "grep", 1.0),
        ([99] * 9, "grep", 60.0),
    ],
)
def test_a_session_is_kept_for_most_of_the_pauses_seen(pauses, tool, want):
    assert seen(pauses).keeps_s(tool) == want


def test_tools_differ():
    pins = seen([1] * 8 + [50] * 4)
    for number in range(4):
        pins.pause(f"t{number}", "compile", 0.0)
        pins.resume(f"t{number}", 30.0)
    assert (pins.keeps_s("compile"), pins.keeps_s("grep")) == (30.0, 50.0)
    assert seen([1] * 8, tools=1).keeps_s("grep") == 1.0


def test_the_tool_not_seen_for_longest_is_forgotten():
    pins = seen([1] * 4, tools=1)
    for number in range(4):
        pins.pause(f"t{number}", "compile", 0.0)
        pins.resume(f"t{number}", 30.0)
    assert pins.keeps_s("grep") == 30.0


def test_a_pause_counts_once():
    pins = seen([], least=1)
    pins.pause("s", "grep", 0.0)
    pins.resume("s", 2.0)
    pins.resume("s", 50.0)
    pins.resume("stranger", 50.0)
    assert pins.keeps_s("grep") == 2.0


def test_only_the_last_pause_of_a_session_ends_its_pin():
    pins = seen([])
    pins.pause("a", "", 0.0)
    pins.pause("b", "", 1.0)
    pins.pause("a", "", 5.0)
    assert pins.deadline() == 11.0
    assert pins.over(14.0) == ["b"]
    assert pins.deadline() == 15.0
    pins.forget("a")
    assert (pins.deadline(), pins.over(99.0), len(pins)) == (None, [], 0)


def turn(
    machine: DecodePolicy,
    ledger: Pages,
    counter: int,
    now: float,
    prefix=(11, 12),
    session: str = "s",
    names=(),
    of_tokens: int = 0,
) -> list:
    """A request of two full pages and a half comes, runs and ends with KV of 13 tokens, and `names`."""
    request = replace(ask(10, 4), hints=Hints(session=session, tool="grep"), prefix=prefix)
    request = replace(request, prefix_page_tokens=of_tokens)
    key = ticket(counter)
    assert machine.on(Asked(key, request), now) == [Answer(key.key, True)]
    ledger.bind(key.key, 3, Owner.PULLING)
    ledger.move(key.key, Owner.DECODING)
    *_, run = machine.on(KvArrived(key, request, (First(5),)), now)
    assert isinstance(run, Run)
    return machine.on(Ran(run.run_id, 3, (Ended(key.key, "length", 4, prefix=names),)), now + 1)


def made(pages: int = 12, **pins) -> tuple[DecodePolicy, Pages]:
    ledger = Pages(pages)
    return DecodePolicy(D1, SHAPE, ledger, DecodeConfig(pins=PinConfig(**pins))), ledger


def test_a_turns_kv_is_kept_until_its_time():
    machine, ledger = made()
    turn(machine, ledger, 1, 0.0)
    assert (ledger.pinned, ledger.available, ledger.cached((11, 12))) == (2, 10, 2)
    assert machine.deadline() == 11.0
    assert machine.on(None, 11.0) == []
    assert (ledger.pinned, ledger.available, machine.deadline()) == (0, 12, None)
    machine.check()


def test_the_next_turn_takes_the_pin_over():
    machine, ledger = made(least=1)
    turn(machine, ledger, 1, 0.0)
    turn(machine, ledger, 2, 4.0, prefix=(11, 12))
    assert ledger.pinned == 2
    assert machine.deadline() == 5.0 + 3.0, "it was away for 3 s"


@pytest.mark.parametrize(("prefix", "session", "most_s"), [((), "s", 60.0), ((11, 12), "", 60.0), ((11, 12), "s", 0.0)])
def test_what_has_no_name_no_session_or_no_time_is_not_kept(prefix, session, most_s):
    machine, ledger = made(most_s=most_s)
    turn(machine, ledger, 1, 0.0, prefix, session)
    assert (ledger.pinned, ledger.available, machine.deadline()) == (0, 12, None)


def test_pages_are_kept_under_the_names_of_their_own_size():
    """Those of two tokens name each second page of four; an answer's go on from there."""
    machine, ledger = made()
    turn(machine, ledger, 1, 0.0, prefix=(1, 11, 2, 12, 3), names=(11, 12, 13), of_tokens=2)
    assert (ledger.cached((11, 12, 13)), ledger.cached((1, 11))) == (3, 0)
    machine, ledger = made()
    turn(machine, ledger, 1, 0.0, prefix=(11,), of_tokens=8)
    assert (ledger.cached((11,)), ledger.pinned) == (0, 0), "eight tokens are no page of ours"


@pytest.mark.parametrize("session", ["s", ""])
@pytest.mark.parametrize(
    ("names", "kept"),
    [((11, 12, 13), 3), ((11, 12, 13, 14), 3), ((11, 12), 2), ((11,), 2), ((11, 99, 13), 2), ((), 2)],
)
def test_full_pages_of_an_answer_are_kept_with_those_of_its_prompt(session, names, kept):
    machine, ledger = made()
    turn(machine, ledger, 1, 0.0, session=session, names=names)
    if not session and not names:
        kept = 0  # who verified the prompt has given its names
    assert ledger.cached((11, 12, 13, 14)) == kept
    assert ledger.pinned == (kept if session else 0)
    assert ledger.available == 12 - ledger.pinned
    machine.check()


@pytest.mark.parametrize("session", ["s", ""])
@pytest.mark.parametrize(
    ("steps", "names", "kept"),
    [(3, (11, 12, 13), 3), (2, (11, 12, 13), 3), (1, (11, 12, 13), 2), (3, (11, 99, 13), 2), (3, (), 0)],
)
def test_an_end_that_only_the_gateway_saw_is_one_too(session, steps, names, kept):
    """Prompt of ten tokens, so that two steps fill the third page; what is not written yet has no name."""
    machine, ledger = made()
    request = replace(ask(10, 9), hints=Hints(session=session), prefix=(11, 12))
    machine.on(Asked(ticket(), request), 0.0)
    ledger.bind(ticket().key, 3, Owner.PULLING)
    ledger.move(ticket().key, Owner.DECODING)
    *_, run = machine.on(KvArrived(ticket(), request, (First(5),)), 0.0)
    assert machine.on(Cancel(ticket(), "stop string", prefix=names), 0.5) == [Cut(run.run_id)]
    assert machine.on(Ran(run.run_id, steps), 1.0) == [Leave(ticket().key)]
    machine.check()
    assert ledger.cached((11, 12, 13)) == kept
    assert ledger.pinned == (kept if session else 0)
    assert ledger.holders() == ()


def test_without_names_for_the_prompt_an_answer_has_none():
    machine, ledger = made()
    turn(machine, ledger, 1, 0.0, (), names=(11, 12, 13))
    assert (ledger.cached((11, 12, 13)), ledger.pinned) == (0, 0)


def test_pins_yield_to_whoever_asks():
    machine, ledger = made(pages=10)
    turn(machine, ledger, 1, 0.0, (11, 12), "old")
    turn(machine, ledger, 2, 1.0, (21, 22), "new")
    assert ledger.pinned == 4
    assert machine.on(Asked(ticket(3), ask(20, 12)), 2.0) == [Answer(ticket(3).key, True)]
    assert (ledger.pinned, ledger.cached((21, 22))) == (2, 2), "the older pin ends first"
    machine.check()
    assert machine.deadline() == 12.0


def test_pins_yield_before_rows_lose_their_memory():
    ledger = Pages(10)
    machine = DecodePolicy(D1, SHAPE, ledger, DecodeConfig(admission="past_future", ahead_pages=1, max_steps=4))
    for _ in range(60):
        machine.forecast.learn(2)
    turn(machine, ledger, 1, 0.0)
    request = ask(20, 20)
    machine.on(Asked(ticket(2), request), 1.0)
    ledger.bind(ticket(2).key, 5, Owner.PULLING)
    ledger.move(ticket(2).key, Owner.DECODING)
    *_, run = machine.on(KvArrived(ticket(2), request, (First(5),)), 1.0)
    machine.on(Asked(ticket(3), ask(4, 20)), 1.0)
    ledger.bind(ticket(3).key, 1, Owner.PULLING)
    ledger.move(ticket(3).key, Owner.DECODING)
    assert machine.on(KvArrived(ticket(3), ask(4, 20), (First(5),)), 1.0) == [Cut(run.run_id)]
    commands = machine.on(Ran(run.run_id, 1), 2.0)
    steps = 1
    while ledger.pinned:
        run = commands[-1]
        assert isinstance(run, Run)
        steps += run.steps
        commands = machine.on(Ran(run.run_id, run.steps), 3.0)
    assert (machine.evicted, machine.revoked) == (0, 0)
    assert steps < 10
    machine.check()
