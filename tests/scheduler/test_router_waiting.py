"""Requests that everybody refused: who waits, whom a worker with room is offered, and that nobody waits in vain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core.messages import Accept, Cancel, Offer, Prompt, Reject, SlotFree, Tokens
from core.request import Phase, Slo, Ticket
from core.worker import Identity, Role
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, ClientGone, End, RouterEvent, Satisfied, ToOne, WorkerDown, WorkerUp
from scheduler.waiting import Waiting
from tests.cast import D1, D2, GATEWAY, P1, P2, QUICK, ask, efforts, worker

PEOPLE = {"p1": P1, "p2": P2, "p3": Identity("prefill-3", 0x13), "p4": Identity("prefill-4", 0x14), "d1": D1}
NAMES = {identity: name for name, identity in PEOPLE.items()}

STORIES = {
    "two wait, and the worker with room is offered the one that fits": """
        0.0 up p1 d1
        0.0 ask 1 of 40            : p1? 1
        0.1 p1 refuses 1, 5 s      : -
        0.1 ask 2 of 10            : p1? 2
        0.2 p1 refuses 2, 5 s      : -
        1.0 p1 has room for 20     : p1? 2
        1.1 p1 accepts 2           : p1! 2
        2.0 p1 has room for 39     : -
        3.0 p1 has room for 40     : p1? 1
    """,
    "each that is accepted calls the next one, most urgent first, until one is refused": """
        0.0 up p1 d1
        0.0 ask 1 of 10            : p1? 1
        0.0 p1 refuses 1, 5 s      : -
        0.0 ask 2 of 10 in 9 s     : p1? 2
        0.0 p1 refuses 2, 5 s      : -
        0.0 ask 3 of 10            : p1? 3
        0.0 p1 refuses 3, 5 s      : -
        1.0 p1 has room for 10     : p1? 2
        1.1 p1 accepts 2           : p1! 2, p1? 1
        1.2 p1 refuses 1, 5 s      : -
        1.3 p1 has room for 9      : -
        9.9 p1 has room for 10     : p1? 1
    """,
    "a worker is called for one at a time": """
        0.0 up p1 d1
        0.0 ask 1 of 10            : p1? 1
        0.0 p1 refuses 1, 5 s      : -
        0.0 ask 2 of 10            : p1? 2
        0.0 p1 refuses 2, 5 s      : -
        1.0 p1 has room for 10     : p1? 1
        1.1 p1 has room for 30     : -
        1.2 p1 accepts 1           : p1! 1, p1? 2
    """,
    "a worker that has room before the last one has refused is not forgotten": """
        0.0 up p1 p2 d1
        0.0 ask 1 of 10            : p1? 1
        0.1 p1 refuses 1, 5 s      : p2? 1
        0.2 p1 has room for 10     : -
        0.3 p2 refuses 1, 5 s      : p1? 1
        0.4 p1 refuses 1, 5 s      : -
        30.0 timer                 : end 1 RESOURCE_EXHAUSTED
    """,
    "room that was said before a refusal is over": """
        0.0 up p1 p2 d1
        0.0 p1 has room for 99     : -
        0.0 ask 1 of 10            : p1? 1
        0.1 p1 refuses 1, 5 s      : p2? 1
        0.3 p2 refuses 1, 5 s      : -
    """,
    "a client that leaves while its request is called makes way for the next": """
        0.0 up p1 d1
        0.0 ask 1 of 10            : p1? 1
        0.0 p1 refuses 1, 5 s      : -
        0.0 ask 2 of 10            : p1? 2
        0.0 p1 refuses 2, 5 s      : -
        1.0 p1 has room for 10     : p1? 1
        1.1 client 1 leaves        : p1x 1, end 1 CANCELLED, p1? 2
        1.2 p1 accepts 2           : p1! 2
    """,
    "a client that leaves while its request waits leaves nothing behind": """
        0.0 up p1 d1
        0.0 ask 1 of 10            : p1? 1
        0.0 p1 refuses 1, 5 s      : -
        0.5 client 1 leaves        : end 1 CANCELLED
        1.0 p1 has room for 10     : -
    """,
    "an offer to a worker with room that is not answered goes to the next who waits": """
        0.0 up p1 d1
        0.0 ask 1 of 10            : p1? 1
        0.0 p1 refuses 1, 5 s      : -
        0.0 ask 2 of 10            : p1? 2
        0.0 p1 refuses 2, 5 s      : -
        1.0 p1 has room for 10     : p1? 1
        2.0 timer                  : p1x 1, p1? 1, p1? 2
    """,
    "nobody waits for longer than the refusals say, if that is too long": """
        0.0 up p1 p2 d1
        0.0 ask 1 of 10 in 4 s     : p1? 1
        0.5 p1 refuses 1, 9 s      : p2? 1
        1.0 p2 refuses 1, 3.1 s    : end 1 RESOURCE_EXHAUSTED
        1.0 ask 2 of 10 in 4 s     : p1? 2
        1.5 p1 refuses 2, 9 s      : p2? 2
        2.0 p2 refuses 2, 2.9 s    : -
        5.0 timer                  : end 2 RESOURCE_EXHAUSTED
    """,
    "a worker that has just come is offered those who wait": """
        0.0 up p1 d1
        0.0 ask 1 of 10            : p1? 1
        0.0 p1 refuses 1, 5 s      : -
        0.0 ask 2 of 10            : p1? 2
        0.0 p1 refuses 2, 5 s      : -
        1.0 up p2                  : p2? 1
        1.1 p2 accepts 1           : p2! 1, p2? 2
        1.2 p2 refuses 2, 1 s      : -
    """,
    "a worker that is lost while its offer is out costs the request nothing": """
        0.0 up p1 p2 d1
        0.0 ask 1 of 10            : p1? 1
        0.0 p1 refuses 1, 5 s      : p2? 1
        0.0 p2 refuses 1, 5 s      : -
        1.0 p1 has room for 10     : p1? 1
        1.5 down p1                : p2? 1
    """,
    "whoever waits is offered another worker with room while the one with most of it is about to answer": """
        0.0 up p1 p2 p3 d1
        0.0 tries 1
        0.0 ask 1 of 10            : p1? 1
        0.1 p1 refuses 1, 5 s      : -
        0.2 p2 has room for 50     : p2? 1
        0.3 p3 has room for 20     : -
        0.4 ask 2 of 10            : p1? 2
        0.5 p1 refuses 2, 5 s      : p3? 2
        0.6 p3 refuses 2, 5 s      : -
        0.7 p2 accepts 1           : p2! 1, p2? 2
    """,
    "four refusals are enough": """
        0.0 up p1 p2 p3 p4 d1
        0.0 tries 3
        0.0 ask 1 of 10            : p1? 1
        0.0 p1 refuses 1, 5 s      : p2? 1
        0.0 p2 refuses 1, 5 s      : p3? 1
        0.0 p3 refuses 1, 5 s      : -
        0.5 p4 has room for 10     : p4? 1
        0.6 p4 refuses 1, 50 s     : -
        30.0 timer                 : end 1 RESOURCE_EXHAUSTED
    """,
}


@dataclass
class Stage:
    """Reads a story: time, event, and what must be commanded for it."""

    router: Router = field(default_factory=lambda: Router(GATEWAY, RouterConfig()))
    tickets: dict[int, Ticket] = field(default_factory=dict)

    def play(self, story: str) -> Iterator[tuple[str, str, str]]:
        """Each line with what was commanded and what was wanted."""
        for line in filter(None, map(str.strip, story.splitlines())):
            told, _, wanted = line.partition(":")
            when, *words = told.replace(",", "").split()
            got = self.event(words, float(when))
            self.router.check()
            yield line, got, wanted.strip() or "-"

    def event(self, words: list[str], now: float) -> str:
        events: list[RouterEvent | None]
        match words:
            case ["up", *names]:
                roles = {"p": Role.PREFILL, "d": Role.DECODE}
                events = [WorkerUp(worker(PEOPLE[name], roles[name[0]])) for name in names]
            case ["tries", count]:
                self.router._config = replace(self.router._config, max_tries=int(count))
                events = []
            case ["down", name]:
                events = [WorkerDown(PEOPLE[name])]
            case ["ask", counter, "of", tokens, *within]:
                request = ask(int(tokens))
                events = [Arrived(int(counter), replace(request, slo=Slo(float(within[1]))) if within else request)]
            case ["client", counter, "leaves"]:
                events = [ClientGone(int(counter), "left")]
            case [_, "refuses", counter, wait_s, "s"]:
                events = [Reject(self.tickets[int(counter)], "busy", float(wait_s))]
            case [_, "accepts", counter]:
                events = [Accept(self.tickets[int(counter)])]
            case [name, "has", "room", "for", tokens]:
                events = [SlotFree(PEOPLE[name], int(tokens))]
            case ["timer"]:
                assert self.router.deadline() == now
                events = [None]
            case _:
                raise AssertionError(words)
        return ", ".join(self.said(command) for event in events for command in self.router.on(event, now)) or "-"

    def said(self, command) -> str:
        match command:
            case ToOne(who, Offer(ticket)):
                self.tickets[ticket.counter] = ticket
                return f"{NAMES[who]}? {ticket.counter}"
            case ToOne(who, Prompt(ticket)):
                return f"{NAMES[who]}! {ticket.counter}"
            case ToOne(who, Cancel(ticket)):
                return f"{NAMES[who]}x {ticket.counter}"
            case End(counter):
                return f"end {counter} {command.code}"
            case _:
                raise AssertionError(command)


@pytest.mark.parametrize("name", STORIES)
def test_story(name):
    for line, got, wanted in Stage().play(STORIES[name]):
        assert got == wanted, line


def test_a_request_that_was_begun_waits_too_and_may_still_end_with_its_stop_string():
    machine = Router(GATEWAY, RouterConfig())
    for identity, role in ((P1, Role.PREFILL), (D1, Role.DECODE), (D2, Role.DECODE)):
        machine.on(WorkerUp(worker(identity, role)), 0.0)
    key = machine.on(Arrived(1, ask()), 0.0)[0].message.ticket
    machine.on(Accept(key), 0.0)
    machine.on(Tokens(key, 0, (100, 101)), 0.0)
    offer = machine.on(WorkerDown(D1), 1.0)[-1].message
    assert machine.on(Reject(offer.ticket, "busy", 50.0), 1.0) == []
    assert machine.phases()[Phase.QUEUED] == 1
    assert machine.deadline() == 100.0
    assert machine.on(Accept(offer.ticket), 1.1) == []
    assert machine.on(Tokens(offer.ticket, 0, (102,)), 1.1) == []
    assert machine.ignored == 2, "it was refused"
    machine.check()
    (end,) = machine.on(Satisfied(1), 2.0)
    assert (end.phase, end.reason, machine.deadline()) == (Phase.DONE, "stop", None)


def test_room_of_a_stranger_or_of_a_decode_worker_is_ignored():
    machine = Router(GATEWAY, RouterConfig())
    for identity, role in ((P1, Role.PREFILL), (D1, Role.DECODE)):
        machine.on(WorkerUp(worker(identity, role)), 0.0)
    assert machine.on(SlotFree(P2, 5), 0.0) == []
    assert machine.on(SlotFree(D1, 5), 0.0) == []
    assert machine.ignored == 2


@QUICK
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2**31), st.integers(0, 5)), max_size=120))
def test_the_most_urgent_of_those_that_are_small_enough(steps):
    waiting, model = Waiting(), {}
    for serial, (kind, tokens, until) in enumerate(steps):
        tokens = tokens if kind % 2 else tokens % 9 + 1
        key = str(serial % 11)  # comes again, with other tokens
        if kind < 2 and key not in model:
            waiting.add(key, tokens, float(until), serial)
            model[key] = (until, serial, tokens)
        fitting = [(until, serial, key) for key, (until, serial, size) in model.items() if size <= tokens]
        first = waiting.first(tokens)
        assert first == (min(fitting)[2] if fitting else None)
        if kind > 2 and first is not None:
            assert waiting.remove(first) == model.pop(first)[2]
        assert len(waiting) == len(model)
    assert waiting.first(0) is None


def test_what_departs_does_not_stay():
    waiting = Waiting()
    for number in range(5000):
        waiting.add(str(number), 100, -float(number), number)
        if number >= 10:
            waiting.remove(str(number - 10))
    assert sum(map(len, waiting._nodes.values())) < 40 * (10 + 2 * 64)


CROWD = [Identity(f"prefill-{number}", number) for number in range(1, 6)]


class Crowd(RuleBasedStateMachine):
    """Five workers that refuse as they like, say that they have room, are silent, are lost and come back."""

    def __init__(self):
        super().__init__()
        self.config = RouterConfig(offer_s=1.0, max_queue_s=6.0, max_attempts=3, max_tries=2)
        self.router = Router(GATEWAY, self.config)
        self.now = 0.0
        self.up: set[Identity] = set()
        self.offers: dict[int, Offer] = {}
        self.asked = 0
        self.ended: set[int] = set()
        self.refused: set[tuple[int, Identity]] = set()
        """(request, worker): it has refused, and not said since that it has room."""
        self.tries: Counter[int] = Counter()
        self.allowed: Counter[int] = Counter()
        """Offers beyond the first round: one for each worker that had said it has room when the request came, one more
        whenever somebody says so, is lost or does not answer."""
        self.words: set[Identity] = set()
        """Workers that said they have room and have refused nobody since."""
        self.refusals: Counter[int] = Counter()
        """Of each request since it began to be placed."""
        self.give(WorkerUp(worker(D1, Role.DECODE)))
        for who in CROWD:
            self.come(who)

    def give(self, event) -> list:
        commands = self.router.on(event, self.now)
        for command in commands:
            match command:
                case ToOne(who, Offer(ticket) as offer):
                    assert who in self.up
                    assert ticket.counter not in self.ended
                    assert ticket.counter not in self.offers, "offered to two workers at once"
                    assert (ticket.counter, who) not in self.refused, "a duplicate offer"
                    self.offers[ticket.counter] = offer
                    self.tries[ticket.counter] += 1
                    assert self.tries[ticket.counter] <= self.config.max_tries + self.allowed[ticket.counter]
                    if self.refusals[ticket.counter] >= self.config.max_tries:
                        assert who in self.words, "nobody else is asked any more"
                case ToOne(_, Cancel(ticket)):
                    self.offers.pop(ticket.counter, None)
                case End(counter):
                    assert counter not in self.ended, "ended twice"
                    self.ended.add(counter)
                    self.offers.pop(counter, None)
        return commands

    def more(self) -> None:
        for counter in range(1, self.asked + 1):
            self.allowed[counter] += 1

    def has_room(self, who: Identity) -> None:
        self.refused = {(counter, refuser) for counter, refuser in self.refused if refuser != who}
        self.more()

    def anew(self, counter: int) -> None:
        """It is placed again, its tries with it."""
        self.allowed[counter] += 1 + self.config.max_tries
        self.refusals[counter] = 0

    def come(self, who: Identity) -> None:
        self.up.add(who)
        if self.router.phases()[Phase.QUEUED]:
            self.words.add(who)
        self.has_room(who)
        self.give(WorkerUp(worker(who, Role.PREFILL)))

    @rule(tokens=st.integers(1, 9), ttft_s=st.sampled_from([0.0, 2.0, 20.0]), timeout_s=st.sampled_from([3.0, 50.0]))
    def arrive(self, tokens, ttft_s, timeout_s):
        self.asked += 1
        self.allowed[self.asked] = len(self.words)
        self.give(Arrived(self.asked, replace(ask(tokens, timeout_s=timeout_s), slo=Slo(ttft_s))))

    @precondition(lambda self: self.offers)
    @rule(data=st.data(), wait_s=st.sampled_from([0.0, 1.0, 5.0, 30.0]))
    def refuse(self, data, wait_s):
        counter = data.draw(st.sampled_from(sorted(self.offers)))
        offer = self.offers.pop(counter)
        self.refused.add((counter, offer.ticket.source))
        self.words.discard(offer.ticket.source)
        self.refusals[counter] += 1
        self.give(Reject(offer.ticket, "busy", wait_s))

    @precondition(lambda self: self.offers)
    @rule(data=st.data())
    def accept(self, data):
        offer = self.offers.pop(data.draw(st.sampled_from(sorted(self.offers))))
        commands = self.give(Accept(offer.ticket))
        assert isinstance(commands[0].message, Prompt)
        for command in commands[1:]:
            assert command.worker == offer.ticket.source, "only the worker that has room calls"

    @precondition(lambda self: self.up)
    @rule(data=st.data(), tokens=st.integers(0, 9))
    def room(self, data, tokens):
        who = data.draw(st.sampled_from(sorted(self.up)))
        self.has_room(who)
        self.words = self.words | {who} if tokens else self.words - {who}
        offers = self.give(SlotFree(who, tokens))
        assert len(offers) <= 1
        for command in offers:
            assert command.worker == who
            assert command.message.prompt_tokens <= tokens

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def leave(self, data):
        self.give(ClientGone(data.draw(st.integers(1, self.asked)), "left"))

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]))
    def wait(self, seconds):
        until = self.now + seconds
        while (due := self.router.deadline()) is not None and due <= until:
            assert due >= self.now
            self.now = due
            self.more()
            self.give(None)
            after = self.router.deadline()
            assert after is None or after > self.now, "the driver would spin"
        self.now = until

    @precondition(lambda self: self.up)
    @rule(data=st.data())
    def lose(self, data):
        who = data.draw(st.sampled_from(sorted(self.up)))
        self.up.discard(who)
        self.words.discard(who)
        for counter in [counter for counter, offer in self.offers.items() if offer.ticket.source == who]:
            del self.offers[counter]
            self.refused = {pair for pair in self.refused if pair[0] != counter}
            self.anew(counter)
        self.refused = {pair for pair in self.refused if pair[1] != who}
        placed = [flight for flight in self.router._flights if flight.phase is Phase.PREFILLING]
        for flight in placed:
            if flight.ticket.source == who:  # it is placed anew
                self.refused = {pair for pair in self.refused if pair[0] != flight.call.counter}
                self.anew(flight.call.counter)
        self.give(WorkerDown(who))

    @precondition(lambda self: len(self.up) < len(CROWD))
    @rule(data=st.data())
    def back(self, data):
        self.come(data.draw(st.sampled_from([who for who in CROWD if who not in self.up])))

    @invariant()
    def sound(self):
        self.router.check()
        assert len(self.router) == self.asked - len(self.ended)

    @invariant()
    def nobody_waits_beside_room(self):
        for who in self.up:
            post = self.router._workers.get(who)
            assert post is not None
            if who not in self.router._called:
                assert self.router._parked.first(post.free) is None

    def teardown(self):
        for _ in range(1000):
            due = self.router.deadline()
            if due is None:
                break
            self.now = max(self.now, due)
            self.more()
            self.give(None)
        assert len(self.router) == 0
        assert self.ended == set(range(1, self.asked + 1))
        assert not len(self.router._parked)
        assert not self.router._called
        self.router.check()


@efforts
def test_everyone_who_waits_is_called_or_ends_and_nobody_is_asked_twice(effort):
    run_state_machine_as_test(Crowd, settings=effort)
