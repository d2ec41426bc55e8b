"""The batch class and tenants above their share, at each machine: what is theirs, and what never is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from core.messages import Accept, Cancel, Failed, First, Offer, Prompt, Reject, SlotFree, Tokens
from core.pages import Owner, Pages
from core.request import Hints, Request, Slo, Ticket
from core.worker import Identity, Role
from scheduler.cost import CostModel
from scheduler.decode_events import Answer as Promise
from scheduler.decode_events import Asked, Cut, Evict, KvArrived, Ran, Run, Tell
from scheduler.decode_policy import DecodeConfig, DecodePolicy
from scheduler.decode_rows import State as Waits
from scheduler.prefill_events import Answer, AskForSink, Began, ChunkDone, Granted, RunChunk, Span, State
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, ClientGone, End, ToOne, WorkerDown, WorkerUp
from tests.cast import D1, GATEWAY, P1, P2, SHAPE, ask, ticket, worker

BATCH = Slo(batch=True)


def key(counter: int) -> str:
    return ticket(counter).key


# A prefill worker.
def prefill(pages: int = 40, **how) -> PrefillPolicy:
    config = {"chunk_tokens": 16, "max_rows": 4, "batch_tokens": 8, "batch_queue_tokens": 40, **how}
    return PrefillPolicy(P1, SHAPE, Pages(pages), PrefillConfig(**config))


def send(machine: PrefillPolicy, counter: int, prompt: int, now: float = 0.0, batch: bool = False, tenant: str = ""):
    hints = Hints(tenant=tenant)
    (answer,) = machine.on(Offer(ticket(counter), prompt, 8, 9.0, hints, batch=batch), now)
    if isinstance(answer.message, Reject):
        return answer.message.reason
    request = replace(ask(prompt), slo=Slo(batch=batch), hints=hints)
    commands = machine.on(Prompt(ticket(counter), request), now)
    machine.check()
    return commands


def computed(machine: PrefillPolicy, run, now: float, *done: int):
    begun = tuple(Began(key(counter), First(7)) for counter in done)
    commands = machine.on(ChunkDone(run.run_id, begun), now)
    machine.check()
    return commands


def test_the_batch_class_starts_when_its_sink_has_promised_and_runs_while_nobody_else_does():
    machine = prefill()
    (asked,) = send(machine, 1, 20, batch=True)
    assert asked == AskForSink(ticket(1), asked.request, 100.0)
    *_, run = machine.on(Granted(key(1)), 0.1)
    assert run == RunChunk(1, (Span(key(1), 0, 8),)), "in short steps"
    send(machine, 2, 12, 0.2)
    _, _, run = (command for command in computed(machine, run, 0.5) if not isinstance(command, AskForSink))
    assert run == RunChunk(2, (Span(key(2), 0, 12),)), "whoever comes waits for the rest of one step"
    *_, run = computed(machine, run, 1.0, 2)
    assert run == RunChunk(3, (Span(key(1), 8, 16),)), "it goes on where it was"


def test_without_its_sinks_promise_it_holds_nothing():
    machine = prefill()
    send(machine, 1, 20, batch=True)
    assert machine._ledger.available == 40
    assert machine.queue()[State.QUEUED] == 1
    assert machine.deadline() == 100.0, "nothing to wait for but an event"
    *_, run = send(machine, 2, 12)
    assert run.spans == (Span(key(2), 0, 12),)


def test_who_holds_memory_goes_on_whoever_came_before_it():
    machine = prefill(pages=10, batch_queue_tokens=48)
    send(machine, 1, 24, batch=True)
    send(machine, 2, 24, batch=True)
    *_, run = machine.on(Granted(key(2)), 0.1)
    machine.on(Granted(key(1)), 0.2)
    assert machine.standing()[0].waits_for == "time that nobody else wants"
    *_, run = computed(machine, run, 0.5)
    assert run.spans == (Span(key(2), 8, 16),), "4 pages are free, the first in line needs 6"
    *_, run = computed(machine, run, 1.0)
    assert run.spans == (Span(key(2), 16, 24),)


def test_only_so_much_of_the_batch_class_is_taken_and_the_first_always():
    machine = prefill()
    assert machine.on(Offer(ticket(1), 60, 8, 9.0, batch=True), 0.0) == [Answer(Accept(ticket(1)))]
    (refused,) = machine.on(Offer(ticket(2), 4, 8, 9.0, batch=True), 0.0)
    assert refused.message.reason == "60 tokens of the batch class wait"
    machine.on(Cancel(ticket(1), "left"), 0.0)
    assert machine.on(Offer(ticket(2), 4, 8, 9.0, batch=True), 0.0) == [Answer(Accept(ticket(2)))]
    machine.check()


def test_who_comes_during_a_step_of_the_batch_class_is_told_of_its_rest():
    machine = prefill()
    send(machine, 1, 40, batch=True)
    *_, run = machine.on(Granted(key(1)), 0.0)
    *_, run = computed(machine, run, 0.4)
    assert machine.predicted_wait_s(0.5) == pytest.approx(0.3)
    assert machine.predicted_wait_s(0.9) == 0.0


def fed(machine: PrefillPolicy, count: int, tenant: str, at: float, first: int, prompt: int = 16) -> list[str]:
    said = [send(machine, first + index, prompt, at, tenant=tenant) for index in range(count)]
    return [each for each in said if isinstance(each, str)]


def test_a_tenant_above_its_share_leaves_room_for_others():
    machine = prefill(ungranted_share=1.0, spare=0.3)
    *_, run = send(machine, 1, 16, tenant="flood")
    computed(machine, run, 1.0, 1)
    *_, run = send(machine, 2, 16, 1.0, tenant="steady")
    computed(machine, run, 2.0, 2)
    assert machine._speed == 16.0
    # 9 s are allowed; 0.3 of them are 2.7 s, which are 43 tokens.
    refused = fed(machine, 6, "flood", 2.0, 10)
    assert len(refused) == 4
    assert refused[0] == "a line of 3.00 s, 2.70 s of it for tenants above their share"
    assert fed(machine, 2, "steady", 2.0, 20) == [], "who is not has room"


def test_tenants_do_not_matter_where_there_is_one_or_where_all_are_treated_alike():
    for how in ({"spare": math.inf}, {}):
        machine = prefill(40, ungranted_share=1.0, **how)
        *_, run = send(machine, 1, 16, tenant="flood")
        computed(machine, run, 1.0, 1)
        if how:
            send(machine, 2, 4, 1.0, tenant="other")
        assert fed(machine, 5, "flood", 2.0, 10) == []


# A gateway.
def router(*others: Identity, **how) -> Router:
    machine = Router(GATEWAY, RouterConfig(**{"ahead_tokens": 16, **how}))
    for who, role in ((P1, Role.PREFILL), (D1, Role.DECODE), *((each, Role.PREFILL) for each in others)):
        machine.on(WorkerUp(worker(who, role)), 0.0)
    return machine


def comes(machine: Router, counter: int, prompt: int = 8, now: float = 0.0, slo: Slo = BATCH, **hints) -> list:
    prefix = hints.pop("prefix", ())
    request = replace(ask(prompt), slo=slo, hints=Hints(**hints), prefix=prefix)
    commands = machine.on(Arrived(counter, request), now)
    machine.check()
    return commands


def of(machine: Router, counter: int) -> Ticket:
    """Of its last attempt: waiting for idle time is one, too."""
    return machine._calls[counter].flights[0].ticket


def offered(commands: list) -> list[int]:
    """Whose offers are among them."""
    return [c.message.ticket.counter for c in commands if isinstance(c, ToOne) and isinstance(c.message, Offer)]


def test_a_gateway_sends_no_more_of_the_batch_class_than_keeps_workers_busy():
    machine = router()
    assert [offered(comes(machine, counter)) for counter in (1, 2, 3)] == [[1], [2], []]
    assert machine.on(Accept(of(machine, 1)), 0.1)[0].worker == P1
    assert offered(machine.on(Tokens(of(machine, 1), 0, (7,)), 0.2)) == [3], "its prompt is computed"
    machine.check()
    assert offered(comes(machine, 4, 4000)) == []
    machine.on(ClientGone(2, "left"), 0.3)
    machine.on(ClientGone(3, "left"), 0.3)
    machine.check()
    assert machine._workers.get(P1).lent == 0


def test_others_never_wait_for_it():
    machine = router()
    for counter in (1, 2, 3):
        comes(machine, counter)
    assert offered(comes(machine, 4, 300, slo=Slo(0.5))) == [4]
    (offer,) = [c.message for c in comes(machine, 5, slo=Slo(0.5)) if isinstance(c, ToOne)]
    assert not offer.batch
    assert machine._workers.get(P1).queue_tokens == 308, "nor do they see its prompts in the queue"


def test_a_refused_one_comes_again_and_ends_at_its_deadline():
    machine = router(again_s=0.5)
    assert offered(comes(machine, 1)) == [1]
    assert machine.on(Reject(of(machine, 1), "9 tokens of the batch class wait"), 0.1) == []
    machine.check()
    assert machine.deadline() == 0.6
    (again,) = machine.on(None, 0.6)
    machine.on(Reject(again.message.ticket, "still"), 99.9)
    (end,) = machine.on(None, 100.0)
    assert isinstance(end, End)
    assert (end.phase, end.code, end.retry_s) == ("rejected", "RESOURCE_EXHAUSTED", 60.0)
    machine.check()


def test_who_fits_nowhere_any_more_keeps_nobody_waiting():
    machine = Router(GATEWAY, RouterConfig(ahead_tokens=16))
    mixed = worker(P1, Role.MIXED, pages=12)  # its prompt twice, and the answer
    machine.on(WorkerUp(mixed), 0.0)
    assert offered(comes(machine, 1, 20)) == [1]
    assert offered(comes(machine, 2, 8)) == []
    machine.on(Accept(of(machine, 1)), 0.1)
    first = of(machine, 1)
    assert offered(machine.on(Tokens(first, 0, (7,)), 0.2)) == [2]
    machine.on(WorkerDown(P1), 0.3)
    commands = machine.on(WorkerUp(mixed), 0.4)
    machine.check()
    (end,) = (command for command in commands if isinstance(command, End))
    assert (end.counter, end.code) == (1, "RESOURCE_EXHAUSTED"), "21 tokens are a page more"
    assert offered(commands) == [2]


def test_prompts_that_begin_alike_are_sent_one_after_the_other():
    machine = router(ahead_tokens=8)
    order = offered(comes(machine, 1))
    for counter, prefix in ((2, (5, 1)), (3, (2, 1)), (4, (5, 2)), (5, (2, 7))):
        assert offered(comes(machine, counter, prefix=prefix)) == []
    while (flight := next((f for f in machine._flights if f.lent), None)) is not None:
        machine.on(Accept(flight.ticket), 1.0)
        order += offered(machine.on(Tokens(flight.ticket, 0, (7,)), 1.0))
    assert order == [1, 2, 3, 5, 4], "2 was a round of its own"


def test_a_worker_that_comes_is_given_some():
    machine = router()
    for counter in (1, 2, 3, 4):
        comes(machine, counter)
    assert offered(machine.on(WorkerUp(worker(P2, Role.PREFILL)), 1.0)) == [3, 4]
    machine.check()


def test_parked_requests_are_called_in_turns_of_tenants():
    machine = router(max_queue_s=900.0)
    slo = Slo()
    for counter in range(1, 9):
        tenant = "one" if counter != 8 else "two"
        (sent,) = comes(machine, counter, 10, slo=slo, tenant=tenant)
        machine.on(Reject(sent.message.ticket, "busy", 5.0), 0.0)
        machine.check()
    called = []
    commands = machine.on(SlotFree(P1, 99), 1.0)
    for _ in range(4):
        called += offered(commands)
        (sent,) = [c.message for c in commands if isinstance(c, ToOne) and isinstance(c.message, Offer)]
        commands = machine.on(Accept(sent.ticket), 1.0)
        machine.check()
    assert called == [1, 8, 2, 3], "without turns 8 would have been last"


# A decode worker.
COST = CostModel("test", ((0.1, 0.01, 0.0, 0.0),), ((0.05, 0.02, 0.0),))
"""A step of n rows takes 0.05 + 0.02 n seconds."""


def decode(pages: int = 20, cost: CostModel | None = None, **how) -> DecodePolicy:
    return DecodePolicy(D1, SHAPE, Pages(pages), DecodeConfig(**{"max_rows": 2, "max_steps": 50, **how}), cost)


def row(machine: DecodePolicy, counter: int, now: float = 0.0, *, slo: Slo = BATCH, prompt: int = 4, most: int = 8):
    """Asks, and brings its KV if memory is promised; None if it is not."""
    request = Request("r", tuple(range(prompt)), ask(1, most).sampling, 100.0, slo)
    commands = machine.on(Asked(ticket(counter), request), now)
    machine.check()
    if Promise(key(counter), True) not in commands:
        return None
    return commands + arrive(machine, counter, request, now)


def arrive(machine: DecodePolicy, counter: int, request: Request, now: float) -> list:
    machine._ledger.bind(key(counter), SHAPE.pages_for(len(request.prompt)), Owner.PULLING)
    machine._ledger.move(key(counter), Owner.DECODING)
    commands = machine.on(KvArrived(ticket(counter), request, (First(7),)), now)
    machine.check()
    return commands


def ran(machine: DecodePolicy, run: Run, steps: int, now: float) -> list:
    commands = machine.on(Ran(run.run_id, steps, ()), now)
    machine.check()
    return commands


def test_a_row_of_the_batch_class_stops_for_another_and_goes_on_later():
    machine = decode(max_rows=1)
    *_, run = row(machine, 1)
    assert run.rows == (key(1),)
    commands = row(machine, 2, 0.5, slo=Slo())
    assert commands[-1] == Cut(run.run_id), "at once"
    stopped, run = ran(machine, run, 2, 0.6)
    assert stopped == Evict(key(1))
    assert run.rows == (key(2),)
    assert machine._ledger.count(key(1)) == 2, "its KV stays"
    ended = machine.on(Cancel(ticket(2), "left"), 0.7)
    *_, run = ran(machine, run, 1, 0.8)
    assert ended == [Cut(run.run_id - 1)]
    (join,) = run.joining
    assert (join.key, join.generated, join.recompute) == (key(1), 3, None), "nothing is computed again"
    assert machine.stopped == 1


def test_it_stops_where_a_promised_gap_would_not_be_kept():
    machine = decode(max_rows=4, cost=COST)
    *_, run = row(machine, 1)
    row(machine, 2)
    *_, run = ran(machine, run, 1, 0.1)
    assert run.rows == (key(1), key(2))
    row(machine, 3, 0.2, slo=Slo(0.0, 0.1))  # two rows take 0.09 s, three 0.11
    *_, run = ran(machine, run, 1, 0.3)
    assert run.rows == (key(1), key(3)), "the newest stops"


def test_memory_is_lent_only_when_nobody_else_waits_and_never_all_of_it():
    machine = decode(10, max_rows=9, batch_share=0.8)
    assert row(machine, 1, prompt=8, most=12) is not None  # 5 pages in the worst case
    assert row(machine, 2, prompt=8, most=12) is None, "8 pages may be lent, 10 are there"
    assert row(machine, 3, prompt=8, most=12, slo=Slo()) is not None
    assert machine.queue()[Waits.WAITING] == 1


def test_it_gives_its_memory_to_whoever_waits_for_some():
    machine = decode(10, max_rows=9)
    *_, run = row(machine, 1, prompt=8, most=12)
    assert row(machine, 2, 0.2, prompt=16, most=16, slo=Slo()) is None  # 8 pages
    (waiting,) = machine._waiting
    assert waiting.key == key(2)
    commands = machine.on(Ran(run.run_id, 1, ()), 0.3)
    machine.check()
    told = next(c for c in commands if isinstance(c, Tell))
    assert isinstance(told.message, Failed)
    assert (told.message.ticket, told.message.code) == (ticket(1), "ABORTED")
    assert Promise(key(2), True) in commands
    assert (machine.yielded, machine.queue()[Waits.RUNNING]) == (1, 0)


def test_a_large_one_has_all_of_an_idle_workers_memory():
    machine = decode(10)
    assert row(machine, 1, prompt=20, most=20) is not None, "10 pages"


def test_gaps_of_a_deadline_are_planned_when_its_kv_comes():
    machine = decode(cost=COST, max_rows=4)
    row(machine, 1, slo=Slo(2.0, 0.2, 6.0), most=41)
    (guest,) = machine._guests.values()
    assert guest.ends_by == 4.0
    (running,) = guest.rows.values()
    assert running.gap_s == pytest.approx(0.1), "4 s for 40 tokens"


def test_gaps_of_a_deadline_are_planned_anew_when_an_answer_outlives_its_forecast():
    """The time that is left is for what is still to come."""
    machine = decode(cost=COST, max_rows=4, admission="past_future")
    for _ in range(60):
        machine.forecast.learn(11)
    for _ in range(10):
        machine.forecast.learn(41)
    *_, run = row(machine, 1, slo=Slo(2.0, 0.2, 6.0), most=41)
    (guest,) = machine._guests.values()
    (running,) = guest.rows.values()
    assert running.gap_s == pytest.approx(0.4), "4 s for 10 tokens"
    ran(machine, run, 11, 1.0)
    assert running.gap_s == pytest.approx(3.0 / 29), "3 s for 29"
