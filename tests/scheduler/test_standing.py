"""What machines say of their requests: of everybody, in the right words, and without changing anything."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from core.messages import Accept, Failed, First, Grant, Prompt, Reject, Reserve, Tokens
from core.pages import Owner, Pages
from core.request import Stage
from core.state import dump
from core.worker import Role
from scheduler.decode_events import Asked
from scheduler.prefill_events import Began, ChunkDone, Granted
from scheduler.router_events import Arrived, End, WorkerDown, WorkerUp
from tests.cast import D1, P1, P2, SHAPE, ask, efforts, ticket, worker
from tests.scheduler.test_decode_machine import RULES, DecodeWorker
from tests.scheduler.test_decode_policy import policy as decode_policy
from tests.scheduler.test_decode_policy import running
from tests.scheduler.test_mixed_machine import Colocated
from tests.scheduler.test_prefill_policy import PrefillWorker, offer, queued
from tests.scheduler.test_prefill_policy import policy as prefill_policy
from tests.scheduler.test_router import Deployment, decoding, finished, prefilling, router
from transfer.sink import Decided, Sink
from transfer.source import AskSink, Digested, Sealed, Source

KEY = ticket(1).key


def told(machine) -> list[tuple[str, str]]:
    """State and what is waited for, of all."""
    return [(str(each.state), each.waits_for) for each in machine.standing()]


def test_a_gateway_names_who_has_it_and_what_it_waits_for_on_its_way():
    machine = router()
    machine.on(Arrived(1, ask()), 5.0)
    (said,) = machine.standing()
    assert (said.key, said.request, said.since, said.until, said.owner) == (KEY, "r", 5.0, 105.0, "prefill-1")
    assert told(machine) == [("offered", "prefill-1 to answer an offer")]
    machine.on(Accept(ticket(1)), 5.0)
    assert told(machine) == [("prefilling", "its first token from prefill-1")]
    machine.on(Tokens(ticket(1), 0, (7,)), 5.0)
    assert told(machine) == [("handing_off", "decode-1 to take its KV from prefill-1")]
    machine.on(Tokens(ticket(1), 0, (7, 8)), 5.0)
    assert told(machine) == [("decoding", "tokens from decode-1")]
    (said,) = machine.standing()
    assert (said.owner, said.tokens) == ("decode-1", 2)
    machine.on(finished(ticket(1), "length", 2), 5.0)
    assert told(machine) == [("decoding", "stages from prefill-1")]


def test_a_gateway_says_who_refused_and_whom_it_lacks():
    machine = router(worker(P1, Role.PREFILL), worker(D1, Role.DECODE))
    machine.on(Arrived(1, ask()), 0.0)
    machine.on(Reject(ticket(1), "busy", 3.0), 0.5)
    assert told(machine) == [("queued", "room: 1 refused, prefill-1: busy")]
    (said,) = machine.standing()
    assert said.owner == "gateway-1"

    machine = router(worker(P1, Role.PREFILL), worker(D1, Role.DECODE))
    decoding(machine)
    machine.on(WorkerDown(D1), 1.0)
    assert told(machine) == [("queued", machine.missing())]
    assert machine.missing()


def test_stages_name_their_attempt_from_the_second_on():
    machine = router()
    key = prefilling(machine)
    machine.on(Failed(key, "ABORTED", "the engine failed", (Stage("prefill", "prefill-1", 2.0),)), 1.0)
    (said,) = machine.standing()
    machine.on(Accept(ticket(1, attempt=2, source=P2)), 1.0)
    trace = machine.trace(1)
    assert trace is not None
    assert [(stage.name, stage.worker, stage.detail.get("attempt")) for stage in trace.stages] == [
        ("queued", "gateway-1", None),
        ("offered", "gateway-1", None),
        ("prefill", "prefill-1", None),
        ("queued", "gateway-1", "2"),
        ("offered", "gateway-1", "2"),
    ]
    assert (trace.attempts, trace.tokens, said.owner) == (2, 0, "prefill-2")
    again = ticket(1, attempt=2, source=P2)
    machine.on(Tokens(again, 0, (7,)), 1.5)
    stages = (Stage("decode", "decode-1", 3.0, {"steps": "1"}),)
    machine.on(Tokens(again, 0, (7, 8)), 1.6)
    assert machine.on(finished(again, "length", 2, stages=stages), 2.0) == []
    (end,) = machine.on(None, 9.0)
    assert isinstance(end, End)
    assert end.stages[-1] == Stage("decode", "decode-1", 3.0, {"steps": "1", "attempt": "2"})
    assert machine.trace(1) is None


def test_a_prefill_worker_names_the_prompt_the_turn_the_sink_and_its_own_memory():
    machine = prefill_policy(pages=6)
    machine.on(offer(1, 16), 0.0)
    assert told(machine) == [("offered", "its prompt from gateway-1")]
    machine.on(Prompt(ticket(1), ask(16)), 0.0)
    assert told(machine) == [("queued", "memory at decode-1, which promised none yet")]
    machine.on(Granted(KEY), 0.0)
    assert told(machine) == [("running", "")]
    queued(machine, 2, 12)
    assert told(machine)[1] == ("queued", "its turn: 0 others are queued, 1 run")
    machine.on(ChunkDone(1, ()), 1.0)
    machine.on(ChunkDone(2, (Began(KEY, First(77)),)), 2.0)
    assert told(machine) == [
        ("handing_off", "decode-1 to take its KV"),
        ("queued", "memory: 3 pages, 2 are free"),
    ]


def test_a_decode_worker_names_memory_the_line_and_the_kv():
    machine = decode_policy(pages=8)
    machine.on(Asked(ticket(1), ask(6, 20)), 0.0)
    machine.on(Asked(ticket(2), ask(6, 20)), 0.0)
    machine.on(Asked(ticket(3), ask(6, 20)), 0.0)
    assert told(machine) == [
        ("promised", "its KV from prefill-1"),
        ("waiting", "memory: 2 pages, 1 are free"),
        ("waiting", "memory: 1 wait before it"),
    ]
    machine = decode_policy()
    running(machine)
    assert [(str(each.state), each.tokens) for each in machine.standing()] == [("running", 1)]


def test_both_ends_of_a_hand_off_say_how_far_it_is():
    source = Source(SHAPE, Pages(40))
    source.on(AskSink(ticket(), ask(12), 50.0), 3.0)
    assert told(source) == [("asked", "memory at decode-1")]
    assert [(each.since, each.until) for each in source.standing()] == [(3.0, 50.0)]
    source.on(Sealed(KEY, (3, 4, 7), 4), 3.1)
    source.on(Grant(ticket()), 3.1)
    assert told(source) == [("granted", "digests of 1 pages")]
    source.on(Digested(KEY, 0, (100,)), 3.2)
    assert told(source) == [("granted", "the rest of the prompt: 1 pages are announced")]
    source.on(Sealed(KEY, (3, 4, 7), 12, (First(1),)), 3.3)
    source.on(Digested(KEY, 1, (101, 102)), 3.4)
    assert told(source) == [("announced", "decode-1 to read 3 pages")]

    ledger = Pages(40)
    sink = Sink(SHAPE, ledger)
    sink.on(Reserve(ticket(), ask(12)), 0.0)
    assert told(sink) == [("asked", "memory here")]
    ledger.promise(KEY, 3, Owner.PULLING)
    sink.on(Decided(KEY, True), 0.1)
    assert told(sink) == [("pulling", "prefill-1 to announce more than 0 pages")]


def looking(world, held, machine):
    """The same world, in which after each step all are asked, and answers cost nothing but time."""

    class Looked(world):  # type: ignore[misc, valid-type]
        @invariant()
        def looked_at(self):
            found = machine(self)
            if found is None:
                return
            before = dump(found)
            said = found.standing()
            assert dump(found) == before, "to look changed something"
            assert len({each.key for each in said}) >= len(getattr(found, held)), "somebody is not told of"
            assert all(each.request or each.state in ("offered", "cancelled") for each in said)

    return Looked


WORLDS = {
    "router": looking(Deployment, "_flights", lambda world: getattr(world, "router", None)),
    "prefill": looking(PrefillWorker, "_requests", lambda world: getattr(world, "machine", None)),
    "mixed": looking(Colocated, "_jobs", lambda world: getattr(world, "machine", None)),
    "decode": looking(DecodeWorker, "_guests", lambda world: world.world.machine if hasattr(world, "world") else None),
}


@efforts
@pytest.mark.parametrize("world", WORLDS)
def test_to_look_changes_nothing_and_leaves_out_nobody(world, effort):
    kind = WORLDS[world]
    if world == "decode":
        kind = type("Swapping", (kind,), {"config": RULES["past_future"], "cost": None})
    steps = min(effort.stateful_step_count, 40)
    few = settings(effort, max_examples=max(1, effort.max_examples // 33), stateful_step_count=steps)
    run_state_machine_as_test(kind, settings=few)


def test_nobody_is_told_of_who_has_ended():
    machine = router()
    machine.on(WorkerUp(worker(P1, Role.PREFILL)), 0.0)
    assert machine.standing() == []
    assert machine.trace(1) is None
