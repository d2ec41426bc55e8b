"""The decode policy: scripts with exact commands, a sink and an engine that do as they please, and long orders
against single steps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core.errors import LocalError
from core.messages import Cancel, Failed, Finished, First
from core.pages import Owner, Pages
from core.request import Request, Stage, Ticket
from core.sampling import Sampling
from core.worker import Identity
from scheduler.decode_policy import (
    Answer,
    Asked,
    Cut,
    DecodeConfig,
    DecodePolicy,
    DropHandOff,
    Ended,
    GatewayGone,
    Grow,
    Join,
    KvArrived,
    Leave,
    Ran,
    Run,
    State,
    Tell,
    Withdrawn,
)
from tests.cast import D1, GATEWAY, MIXED, OTHER_GATEWAY, SHAPE, ask, efforts, ticket

KEY = ticket(1).key


def policy(pages: int = 20, me: Identity = D1, **settings) -> DecodePolicy:
    return DecodePolicy(me, SHAPE, Pages(pages), DecodeConfig(**{"max_rows": 4, "max_steps": 8, **settings}))


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
    assert run.growing == (Grow(KEY, (2,)),)
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


def test_a_full_batch_is_not_cut():
    machine = policy(max_rows=1)
    running(machine, 1)
    machine.on(Asked(ticket(2), ask()), 0.0)
    assert arrive(machine, 2) == []
    commands = machine.on(Ran(1, 7, (Ended(KEY, "length", 8),)), 1.0)
    assert commands[1:] == [Leave(KEY), Run(2, (ticket(2).key,), commands[2].joining, (), 7)]


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
    machine = policy(max_rows=1)
    running(machine, 1)
    machine.on(Asked(ticket(2), ask()), 0.0)
    arrive(machine, 2)
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
    machine = policy(max_rows=1)
    running(machine, 1)
    machine.on(Asked(ticket(2), ask()), 0.0)
    arrive(machine, 2)
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


@dataclass
class Row:
    """What the sink and the engine know of a request."""

    ticket: Ticket
    request: Request
    stops_at: int
    """Tokens after which it says its stop token; beyond `max_tokens` never."""
    hand_off: str = "asked"
    """asked, promised, arriving, withdrawing, over."""
    deadline: float = 0.0
    unwanted: bool = False
    reports: bool = False
    """Its gateway wants its stages."""
    elsewhere: bool = False
    """Refused or withdrawn: its end is told by the prefill worker."""
    told: int = 0
    generated: int = 0
    finish: str = ""
    pages: tuple[int, ...] = ()
    engine: str = ""
    """running, left."""


class DecodeWorker(RuleBasedStateMachine):
    """A sink that ends every question once, an engine that ends every order once, gateways, and memory in doubt."""

    def __init__(self):
        super().__init__()
        self.ledger = Pages(16)
        self.machine = DecodePolicy(D1, SHAPE, self.ledger, DecodeConfig(max_rows=3, max_steps=4))
        self.now = 0.0
        self.rows: dict[str, Row] = {}
        self.run: Run | None = None
        self.done = 0
        self.cut = False
        self.last_run = 0
        self.from_sink: deque = deque()
        self.doubts = 0

    def give(self, event) -> None:
        for command in self.machine.on(event, self.now):
            self.perform(command)
        self.machine.check()
        self.turn_clock(self.now)

    def turn_clock(self, until: float) -> None:
        """As a driver: call whenever the deadline has come, also if it came because somebody freed memory."""
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
            case Answer(key, granted):
                row = self.rows[key]
                if row.hand_off == "asked":
                    row.hand_off = "promised" if granted else "over"
                    row.elsewhere = not granted
                    order = list(self.rows)
                    waiting = [k for k, r in self.rows.items() if r.hand_off == "asked" and not r.unwanted]
                    late = {k for k in waiting if self.rows[k].deadline <= self.now}
                    assert all(order.index(k) > order.index(key) for k in set(waiting) - late), "overtaken"
                else:  # the sink has forgotten it by now
                    self.ledger.release(key)
            case Run(run_id, rows, joining, growing, steps):
                assert self.run is None
                assert run_id == self.last_run + 1
                assert 1 <= len(rows) <= 3
                assert 1 <= steps <= 4
                for join in joining:
                    row = self.rows[join.ticket.key]
                    assert (row.hand_off, row.engine) == ("over", "")
                    assert join.pages == self.ledger.pages(join.ticket.key)
                    assert join.first == First(7)
                    row.engine, row.pages, row.generated = "running", join.pages, 1
                for grow in growing:
                    row = self.rows[grow.key]
                    row.pages += grow.pages
                for key in rows:
                    row = self.rows[key]
                    assert row.engine == "running"
                    assert row.pages == self.ledger.pages(key)
                    assert steps <= row.request.sampling.max_tokens - row.generated
                    last = len(row.request.prompt) + row.generated + steps - 1
                    assert last <= len(row.pages) * SHAPE.page_tokens, "a step without a page"
                assert {key for key, row in self.rows.items() if row.engine == "running"} == set(rows)
                self.run, self.last_run, self.done, self.cut = command, run_id, 0, False
            case Cut(run_id):
                assert self.run is not None
                assert self.run.run_id == run_id
                assert not self.cut
                self.cut = True
            case Leave(key):
                assert self.run is None
                assert self.rows[key].engine == "running"
                self.rows[key].engine = "left"
            case DropHandOff(key):
                row = self.rows[key]
                if row.hand_off in ("asked", "promised"):
                    self.withdraw(row, False)
            case Tell(message):
                row = self.rows[message.ticket.key]
                row.told += 1
                assert row.told == 1, "told twice"
                if isinstance(message, Finished):
                    assert message.completion_tokens == max(row.generated, 1)
                    assert message.reason == ("cancelled" if row.reports else row.finish)

    def withdraw(self, row: Row, recompute: bool) -> None:
        """As the sink: pages of an unfinished read stay in doubt, the rest is free."""
        row.hand_off = "withdrawing"
        key = row.ticket.key
        self.ledger.unpromise(key)
        if self.ledger.pages(key):
            self.doubts += 1
            self.ledger.move(key, Owner.IN_DOUBT, to=f"doubt/{self.doubts}")
        else:
            self.ledger.release(key)
        self.from_sink.append(Withdrawn(row.ticket, "no", recompute))
        row.elsewhere = not recompute

    @rule(prompt=st.integers(1, 20), max_tokens=st.integers(2, 12), data=st.data())
    def ask(self, prompt, max_tokens, data):
        minter = data.draw(st.sampled_from([GATEWAY, OTHER_GATEWAY]))
        new = ticket(len(self.rows) + 1, minter=minter)
        request = ask(prompt, max_tokens, timeout_s=data.draw(st.sampled_from([3.0, 60.0])))
        self.rows[new.key] = Row(new, request, data.draw(st.integers(1, 30)), deadline=self.now + request.timeout_s)
        self.give(Asked(new, request))

    @precondition(lambda self: any(row.hand_off in ("asked", "promised") for row in self.rows.values()))
    @rule(data=st.data(), how=st.sampled_from(["arrives", "arrives", "pulls", "ends", "breaks"]))
    def sink(self, data, how):
        row = data.draw(st.sampled_from([row for row in self.rows.values() if row.hand_off in ("asked", "promised")]))
        key = row.ticket.key
        if how in ("ends", "breaks"):
            self.withdraw(row, how == "breaks")
        elif row.hand_off == "promised":
            pages = SHAPE.pages_for(len(row.request.prompt)) - len(self.ledger.pages(key))
            if how == "pulls":
                self.ledger.bind(key, min(1, pages), Owner.PULLING)
            else:
                self.ledger.bind(key, pages, Owner.PULLING)
                self.ledger.move(key, Owner.DECODING)
                row.hand_off = "arriving"
                self.from_sink.append(KvArrived(row.ticket, row.request, (First(7),)))

    @precondition(lambda self: self.from_sink)
    @rule()
    def deliver(self):
        event = self.from_sink.popleft()
        row = self.rows[event.ticket.key]
        row.hand_off = "over"
        self.give(event)

    @rule(count=st.integers(1, 3))
    def fence(self, count):
        """Reads in doubt end, and nobody tells the policy."""
        for holder in [name for name in self.ledger.holders() if name.startswith("doubt/")][:count]:
            self.ledger.release(holder)
        self.turn_clock(self.now)

    @precondition(lambda self: self.run is not None)
    @rule()
    def step(self):
        """The engine takes a step; the order ends with its last one, with a sequence, or after a cut."""
        assert self.run is not None
        run, self.now = self.run, self.now + 0.25
        self.done += 1
        ended = []
        for key in run.rows:
            row = self.rows[key]
            if row.generated == row.stops_at:
                row.finish = "stop"
                ended.append(Ended(key, "stop", row.generated, 2))
                continue
            row.generated += 1
            if row.generated == row.request.sampling.max_tokens:
                row.finish = "length"
                ended.append(Ended(key, "length", row.generated))
        if ended or self.cut or self.done == run.steps:
            self.run = None
            self.give(Ran(run.run_id, self.done, tuple(ended)))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def cancel(self, data):
        row = data.draw(st.sampled_from(list(self.rows.values())))
        report = data.draw(st.booleans())
        row.reports = row.reports or (report and not row.unwanted)
        row.unwanted = True
        self.give(Cancel(row.ticket, "left", report))

    @rule(who=st.sampled_from([GATEWAY, OTHER_GATEWAY]))
    def gateway_dies(self, who):
        for row in self.rows.values():
            row.unwanted = row.unwanted or row.ticket.minter == who
        self.give(GatewayGone(who))

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds):
        self.turn_clock(self.now + seconds)

    @invariant()
    def sound(self):
        self.machine.check()
        self.ledger.check()

    def teardown(self):
        for _ in range(500):
            self.fence(99)
            if self.from_sink:
                self.deliver()
            elif self.run is not None:
                self.step()
            else:
                promised = [row for row in self.rows.values() if row.hand_off == "promised"]
                if not promised:
                    break
                row = promised[0]
                pages = SHAPE.pages_for(len(row.request.prompt)) - len(self.ledger.pages(row.ticket.key))
                self.ledger.bind(row.ticket.key, pages, Owner.PULLING)
                self.ledger.move(row.ticket.key, Owner.DECODING)
                row.hand_off = "arriving"
                self.from_sink.append(KvArrived(row.ticket, row.request, (First(7),)))
        assert self.machine.queue() == dict.fromkeys(State, 0), "a request hangs"
        assert self.machine.deadline() is None
        assert self.ledger.holders() == ()
        for row in self.rows.values():
            assert row.engine in ("", "left")
            assert row.unwanted or row.elsewhere or row.told == 1


@efforts
def test_every_request_ends_once_and_leaves_no_page(effort):
    run_state_machine_as_test(DecodeWorker, settings=effort)


@dataclass(frozen=True)
class Visit:
    """A request in a play: when it asks, how long its KV takes to come, and when its client leaves."""

    at: int
    prompt: int
    max_tokens: int
    stops_at: int
    pull: int
    leaves: int | None


def play(visits: list[Visit], max_steps: int) -> list[tuple[int, str]]:
    """What the policy decides and when, with steps of one second, each taking all events of its time before it."""
    book = Pages(14)
    machine = DecodePolicy(D1, SHAPE, book, DecodeConfig(max_rows=3, max_steps=max_steps))
    tickets = [ticket(index + 1) for index in range(len(visits))]
    by_key = {tickets[i].key: visits[i] for i in range(len(visits))}
    decided: list[tuple[int, str]] = []
    due: dict[int, list] = {}
    generated: dict[str, int] = {}
    order: dict = {"run": None, "taken": 0, "cut": False}

    def later(at: int, event) -> None:
        due.setdefault(at, []).append(event)

    def give(event, now: int) -> None:
        for command in machine.on(event, now):
            match command:
                case Answer(key, granted):
                    decided.append((now, f"{'grants' if granted else 'refuses'} {key}"))
                    if granted:
                        later(now + by_key[key].pull, key)
                case Run(_, rows, joining):
                    decided.extend((now, f"joins {join.ticket.key}") for join in joining)
                    generated.update({join.ticket.key: 1 for join in joining})
                    order.update(run=command, taken=0, cut=False)
                    assert len(rows) <= 3
                case Cut():
                    order["cut"] = True
                case Leave(key):
                    decided.append((now, f"leaves {key}"))
                case DropHandOff(key):
                    book.release(key)
                    later(now, Withdrawn(tickets[list(by_key).index(key)], "left"))
                    dropped.add(key)
                case Tell(message):
                    decided.append((now, f"tells {message}"))
        machine.check()

    dropped: set[str] = set()
    for visit, key in zip(visits, tickets, strict=True):
        later(visit.at, Asked(key, ask(visit.prompt, visit.max_tokens, timeout_s=1000.0)))
        if visit.leaves is not None:
            later(visit.at + visit.leaves, Cancel(key, "left"))
    for now in range(200):
        run = order["run"]
        if run is not None:  # step ends come first
            order["taken"] += 1
            ended = []
            for key in run.rows:
                visit = by_key[key]
                if generated[key] == visit.stops_at:
                    ended.append(Ended(key, "stop", generated[key], 2))
                    continue
                generated[key] += 1
                if generated[key] == visit.max_tokens:
                    ended.append(Ended(key, "length", generated[key]))
            if ended or order["cut"] or order["taken"] == run.steps:
                order["run"] = None
                give(Ran(run.run_id, order["taken"], tuple(ended)), now)
        while due.get(now):
            event = due[now].pop(0)
            if isinstance(event, str):
                if event in dropped:
                    continue
                visit = by_key[event]
                book.bind(event, SHAPE.pages_for(visit.prompt), Owner.PULLING)
                book.move(event, Owner.DECODING)
                event = KvArrived(tickets[list(by_key).index(event)], ask(visit.prompt, visit.max_tokens), (First(7),))
            give(event, now)
    assert machine.queue() == dict.fromkeys(State, 0)
    assert book.holders() == ()
    return decided


visits = st.lists(
    st.builds(
        Visit,
        at=st.integers(0, 12),
        prompt=st.integers(1, 20),
        max_tokens=st.integers(2, 20),
        stops_at=st.integers(1, 40),
        pull=st.integers(0, 3),
        leaves=st.none() | st.integers(0, 15),
    ),
    min_size=2,
    max_size=8,
)


@efforts
def test_single_steps_give_the_same_decisions_at_the_same_times_as_long_orders(effort):
    bound = []

    @effort
    @given(visits)
    def compare(arrivals):
        single = play(arrivals, 1)
        assert play(arrivals, 16) == single
        assert play(arrivals, 3) == single
        asked = {ticket(index + 1).key: visit.at for index, visit in enumerate(arrivals)}
        bound.append(any(what.startswith("grants") and at > asked[what.split()[1]] for at, what in single))

    compare()
    assert sum(bound) > len(bound) / 4, "memory was rarely short: this proved nothing"


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
        Join(f"{KEY}/0", ticket(), alone[0], First(100), (0, 2, 4, 5), (1, 2)),
        Join(f"{KEY}/1", ticket(), alone[1], First(101, branch=1), (0, 3, 6, 7), (1, 3)),
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
