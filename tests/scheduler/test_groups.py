"""Groups at a gateway: a router each, that shares nothing with the others, and requests that go where they say."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from core import words
from core.errors import LocalError
from core.messages import Accept, Cancel, Finished, Handed, Moved, Offer, Prompt, Reject, SlotFree, Tokens
from core.request import Hints, Phase
from core.state import dump, load
from core.worker import Identity, ProcessEnded, Role
from scheduler.dualmap import DualMap
from scheduler.groups import Groups
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, ClientGone, Deliver, End, ToOne, WorkerDown, WorkerUp
from tests.cast import D1, GATEWAY, P1, ask, efforts, worker

NAMES = ("", "chat", "code")


def who(group, role, number=0):
    return Identity(f"{group or 'plain'}-{role}-{number}", 1 + number)


def member(group, role, number=0):
    return replace(worker(who(group, role, number), role, pages=100), group=group)


def gateway(declared=NAMES):
    return Groups(Router(GATEWAY, RouterConfig(), DualMap()), declared)


def full(declared=NAMES, count=1):
    """A gateway whose groups have workers of both phases."""
    groups = gateway(declared)
    for group in declared:
        for number in range(count):
            for role in (Role.PREFILL, Role.DECODE):
                groups.on(WorkerUp(member(group, role, number)), 0.0)
    return groups


def of(group, prompt=6, tokens=8):
    return replace(ask(prompt, tokens), hints=Hints(group=group))


def offered(commands):
    (command,) = commands
    assert isinstance(command, ToOne)
    assert isinstance(command.message, Offer)
    return command.message.ticket


@pytest.mark.parametrize("group", NAMES)
def test_a_request_is_offered_to_its_groups_workers(group):
    groups = full()
    ticket = offered(groups.on(Arrived(1, of(group)), 0.0))
    assert (ticket.source, ticket.sink) == (who(group, Role.PREFILL), who(group, Role.DECODE))
    assert groups.phases(group)[Phase.OFFERED] == 1
    assert sum(groups.phases(other)[Phase.OFFERED] for other in NAMES) == 1
    groups.check()


def test_one_of_no_group_that_there_is_is_refused_with_their_names():
    groups = full()
    (end,) = groups.on(Arrived(1, of("cats")), 0.0)
    assert end == End(1, Phase.REJECTED, "hints.group: got 'cats', want one of '', 'chat', 'code'", "NOT_FOUND")
    assert len(groups) == 0
    assert groups.unknown("cats") == end.reason
    assert groups.unknown("code") is None


def test_where_there_are_no_groups_any_name_is_a_label():
    """The room of the workers is known meanwhile, whether anybody is served or not."""
    groups = Groups(Router(GATEWAY, RouterConfig(), DualMap()))
    for member in (worker(P1, Role.PREFILL), worker(D1, Role.DECODE)):
        groups.on(WorkerUp(member), 0.0)
    alone = Router(GATEWAY, RouterConfig(), DualMap())
    for member in (worker(P1, Role.PREFILL), worker(D1, Role.DECODE)):
        alone.on(WorkerUp(member), 0.0)
    for group in ("", "cats"):
        assert groups.unknown(group) is None
        assert groups.served_by(group) == ""
        assert groups.most_tokens(group)(8, 1) == alone.most_tokens()(8, 1)
        assert alone.most_tokens()(8, 1) is not None
        assert groups.page_tokens(group) == alone.page_tokens
    (offer,) = groups.on(Arrived(1, replace(ask(), hints=Hints(group="cats"))), 0.0)
    assert isinstance(offer, ToOne)
    groups.check()


def test_a_group_without_workers_is_known_and_unavailable_and_others_serve():
    groups = gateway()
    assert groups.missing() == "; ".join(f"group {name!r}: no prefill and no decode worker is ready" for name in NAMES)
    groups.on(WorkerUp(member("chat", Role.PREFILL)), 0.0)
    groups.on(WorkerUp(member("chat", Role.DECODE)), 0.0)
    assert groups.missing() is None
    (end,) = groups.on(Arrived(1, of("code")), 0.0)
    assert (end.phase, end.code, end.reason) == (
        Phase.REJECTED,
        "UNAVAILABLE",
        "no prefill and no decode worker is ready",
    )
    offered(groups.on(Arrived(2, of("chat")), 0.0))


def test_one_group_alone_says_what_it_lacks_as_ever():
    assert gateway(("",)).missing() == "no prefill and no decode worker is ready"


def test_a_group_is_there_from_its_first_worker_on_and_stays():
    groups = gateway(("",))
    new = member("new", Role.PREFILL)
    assert groups.names == ("",)
    groups.on(WorkerUp(new), 0.0)
    groups.on(WorkerDown(new.identity), 1.0)
    assert groups.names == ("", "new")
    assert groups.page_tokens("new") == 0
    assert groups.page_tokens("other") == 0
    assert groups.most_tokens("new")(1, 1) is None


def test_a_request_does_not_leave_its_group_when_that_is_full_or_gone():
    groups = full()
    ticket = offered(groups.on(Arrived(1, of("chat")), 0.0))
    commands = groups.on(Reject(ticket, "full", 0.1), 0.1)
    assert commands == [], "it waits for room"
    assert groups.on(SlotFree(who("code", Role.PREFILL), 1000), 0.2) == [], "another group's is none of its own"
    again = offered(groups.on(SlotFree(ticket.source, 1000), 0.3))
    assert again.source == ticket.source
    groups.on(Accept(again), 0.4)
    commands = groups.on(WorkerDown(ticket.source), 0.5)
    assert not [each for each in commands if isinstance(each, ToOne) and isinstance(each.message, Offer)]
    assert [each.waits_for for each in groups.standing()] == ["no prefill worker is ready"]
    groups.check()


def test_a_request_runs_to_its_end_and_is_forgotten():
    groups = full()
    ticket = offered(groups.on(Arrived(7, of("code", tokens=2)), 0.0))
    (prompt,) = groups.on(Accept(ticket), 0.1)
    assert isinstance(prompt.message, Prompt)
    assert groups.on(Tokens(ticket, 0, (5,)), 0.2) == [Deliver(7, (5,), (), 0, (), ())]
    trace = groups.trace(7)
    assert trace is not None
    assert trace.tokens == 1
    groups.on(Handed(ticket, ()), 0.3)
    groups.on(Tokens(ticket, 1, (6,)), 0.4)
    ends = groups.on(Finished(ticket, "length", 2), 0.5)
    assert isinstance(ends[-1], End)
    assert ends[-1].phase is Phase.DONE
    assert (len(groups), groups.trace(7), groups.deadline()) == (0, None, None)
    assert groups.on(Tokens(ticket, 1, (6,)), 0.6) == []
    assert groups.on(ClientGone(7, "gone"), 0.6) == []
    assert groups.ignored == 1
    groups.check()


def test_a_row_that_moved_after_its_request_was_over_is_recalled_where_it_is():
    groups = full()
    ticket = replace(offered(groups.on(Arrived(7, of("chat")), 0.0)), sink=who("code", Role.DECODE))
    groups.on(ClientGone(7, "gone"), 0.1)
    assert groups.on(Moved(ticket, 1), 0.2) == [ToOne(ticket.sink, Cancel(ticket, "nobody wants the rest"))]
    assert groups.on(Moved(replace(ticket, sink=Identity("nobody", 1)), 1), 0.2) == []


def test_the_deadline_is_the_earliest_of_all_and_only_whose_it_is_acts():
    groups = full()
    first = offered(groups.on(Arrived(1, of("chat")), 0.0))
    offered(groups.on(Arrived(2, of("code")), 0.5))
    assert groups.deadline() == 1.0
    commands = groups.on(None, 1.0)
    assert {each.message.ticket.counter for each in commands if isinstance(each, ToOne)} == {first.counter}
    assert groups.deadline() == 1.5


def test_a_worker_that_changes_its_group_is_lost_to_the_one_and_there_for_the_other():
    groups = full()
    ticket = offered(groups.on(Arrived(1, of("chat")), 0.0))
    groups.on(Accept(ticket), 0.0)
    moved = replace(member("chat", Role.PREFILL), group="code")
    groups.on(WorkerUp(moved), 1.0)
    groups.check()
    (end,) = groups.on(ClientGone(1, "gone"), 1.0)
    assert end.phase is Phase.CANCELLED
    sources = {offered(groups.on(Arrived(2 + n, of("code", 6 + n)), 1.0)).source.name for n in range(4)}
    assert sources == {"chat-prefill-0", "code-prefill-0"}


def test_how_a_process_ended_reaches_whom_it_concerns_before_and_after_its_loss():
    groups = full()
    ticket = offered(groups.on(Arrived(1, of("chat")), 0.0))
    groups.on(Accept(ticket), 0.0)
    groups.on(WorkerDown(ticket.source, True), 1.0)
    groups.on(ProcessEnded(ticket.source, False), 1.1)
    groups.on(ProcessEnded(who("code", Role.DECODE), True), 1.1)
    groups.on(WorkerDown(who("code", Role.DECODE), True), 1.2)
    assert groups.on(WorkerDown(who("code", Role.DECODE), True), 1.3) == []
    assert groups.ignored == 1
    groups.check()


def test_a_request_cannot_arrive_twice():
    groups = full()
    groups.on(Arrived(1, of("chat")), 0.0)
    with pytest.raises(LocalError, match="request 1 arrived twice"):
        groups.on(Arrived(1, of("code")), 0.0)
    groups.check()


class Tally:
    """A crowd at a gateway: workers that accept and refuse by dice, come and go; every ticket is looked at."""

    def __init__(self, seed, groups):
        self.dice = random.Random(seed)
        self.groups = groups
        self.now = 0.0
        self.group: dict[int, str] = {}
        self.ends: dict[int, End] = {}
        self.asked: list = []
        self.away: set = set()
        self.said: list = []

    def do(self, event):
        commands = self.groups.on(event, self.now)
        self.groups.check()
        due = self.groups.deadline()
        assert due is None or due >= self.now
        for command in commands:
            match command:
                case ToOne(worker_, message):
                    assert worker_.name.startswith(self.group[message.ticket.counter] or "plain")
                    if isinstance(message, Offer | Prompt):
                        assert message.ticket.sink.name.startswith(self.group[message.ticket.counter] or "plain")
                        self.asked.append(message)
                case End(counter):
                    assert counter not in self.ends
                    self.ends[counter] = command
        self.said.append([words.written(each) for each in commands])

    def arrives(self, group, prompt):
        counter = len(self.group) + 1
        self.group[counter] = group
        self.do(Arrived(counter, of(group, prompt, 3)))

    def comes_or_goes(self, group, role, number):
        worker_ = member(group, role, number)
        there = worker_.identity not in self.away
        (self.away.add if there else self.away.discard)(worker_.identity)
        self.do(WorkerDown(worker_.identity) if there else WorkerUp(worker_))

    def waits(self, seconds):
        self.now += seconds
        while (due := self.groups.deadline()) is not None and due <= self.now:
            self.do(None)

    def step(self):
        dice = self.dice
        match dice.randrange(7):
            case 0 | 1:
                self.arrives(dice.choice(NAMES), dice.randrange(1, 40))
            case 2 | 3 if self.asked:
                message = self.asked.pop(dice.randrange(len(self.asked)))
                self.answer(message, refuses=isinstance(message, Offer) and dice.random() < 0.3)
            case 4 if self.group:
                self.do(ClientGone(dice.randrange(1, len(self.group) + 1), "gone"))
            case 5:
                self.comes_or_goes(dice.choice(NAMES), dice.choice([*Role][1:3]), dice.randrange(2))
            case _:
                self.waits(dice.choice([0.01, 0.3, 1.0]))

    def over(self):
        for counter in self.group:
            if counter not in self.ends:
                self.do(ClientGone(counter, "the end"))

    def answer(self, message, refuses):
        ticket = message.ticket
        if ticket.source in self.away:
            return
        if isinstance(message, Offer):
            self.do(Reject(ticket, "full", 0.2) if refuses else Accept(ticket))
            return
        self.do(Tokens(ticket, 0, (1,)))
        self.do(Handed(ticket, ()))
        self.do(Tokens(ticket, 1, (2, 3)))
        self.do(Finished(ticket, "length", len(message.request.prompt) and 3))


def crowd(seed, steps=150, through_json=False):
    tally = Tally(seed, full(count=2))
    for number in range(steps):
        tally.step()
        if through_json and number % 10 == 9:
            tally.groups = load(json.loads(json.dumps(dump(tally.groups))), Groups)
    tally.over()
    return tally


@pytest.mark.parametrize("seed", range(3))
def test_in_a_crowd_nobody_leaves_its_group_and_everybody_ends_once(seed):
    tally = crowd(seed)
    assert tally.ends.keys() == tally.group.keys()
    assert len(tally.groups) == 0
    assert any(end.phase is Phase.DONE for end in tally.ends.values())
    assert crowd(seed, through_json=True).said == tally.said, "a copy goes on as the original does"


class Crowd(RuleBasedStateMachine):
    """The same, by whatever rules in whatever order; a copy from its document goes on in its place."""

    def __init__(self):
        super().__init__()
        self.tally = Tally(0, full(count=2))

    @rule(group=st.sampled_from(NAMES), prompt=st.integers(1, 40))
    def arrives(self, group, prompt):
        self.tally.arrives(group, prompt)

    @precondition(lambda self: self.tally.asked)
    @rule(data=st.data(), refuses=st.booleans())
    def is_answered(self, data, refuses):
        asked = self.tally.asked
        self.tally.answer(asked.pop(data.draw(st.integers(0, len(asked) - 1))), refuses)

    @precondition(lambda self: self.tally.group)
    @rule(data=st.data())
    def leaves(self, data):
        self.tally.do(ClientGone(data.draw(st.integers(1, len(self.tally.group))), "gone"))

    @rule(group=st.sampled_from(NAMES), role=st.sampled_from([Role.PREFILL, Role.DECODE]), number=st.integers(0, 1))
    def worker_comes_or_goes(self, group, role, number):
        self.tally.comes_or_goes(group, role, number)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 20.0]))
    def time_passes(self, seconds):
        self.tally.waits(seconds)

    @rule()
    def is_restored(self):
        self.tally.groups = load(json.loads(json.dumps(dump(self.tally.groups))), Groups)

    def teardown(self):
        self.tally.over()
        assert self.tally.ends.keys() == self.tally.group.keys()
        assert len(self.tally.groups) == 0


@efforts
def test_whatever_happens_nobody_leaves_its_group_and_everybody_ends_once(effort):
    run_state_machine_as_test(Crowd, settings=settings(effort, max_examples=max(20, effort.max_examples // 4)))


STORIES = {
    "each goes to its own, and waits for its own": (
        """
        0 chat prefill up
        0 chat decode up
        0 code prefill up
        0 code decode up
        1 chat a
        1 code b
        1 cats c
        2 a refused
        2 b refused
        3 code prefill has room
        4 chat prefill has room
        """,
        """
        1 a offered to chat-prefill-0 for chat-decode-0
        1 b offered to code-prefill-0 for code-decode-0
        1 c rejected: hints.group: got 'cats', want one of '', 'chat', 'code'
        3 b offered to code-prefill-0 for code-decode-0
        4 a offered to chat-prefill-0 for chat-decode-0
        """,
    ),
    "a group whose worker dies has nobody else's, and waits for the next of its own": (
        """
        0 chat prefill up
        0 chat decode up
        0 code prefill up
        0 code decode up
        1 chat a
        2 chat prefill down
        2 chat b
        2 code c
        3 chat prefill up
        """,
        """
        1 a offered to chat-prefill-0 for chat-decode-0
        2 c offered to code-prefill-0 for code-decode-0
        3 a offered to chat-prefill-0 for chat-decode-0
        3 b offered to chat-prefill-0 for chat-decode-0
        """,
    ),
    "a worker is another group's from the moment it says so": (
        """
        0 chat prefill up
        0 chat decode up
        0 code decode up
        1 code a
        2 chat prefill up as code
        2 code b
        2 chat c
        """,
        """
        1 a rejected: no prefill worker is ready
        2 b offered to chat-prefill-0 for code-decode-0
        """,
    ),
}
"""Time and what happens: workers of a group, requests that name one, answers; then who was offered to whom."""


def told(script):
    groups, names, offers, log = gateway(), [], {}, []

    def do(now, event):
        for command in groups.on(event, now):
            match command:
                case ToOne(to, Offer(ticket)):
                    name = names[ticket.counter - 1]
                    offers[name] = ticket
                    log.append(f"{now:g} {name} offered to {to.name} for {ticket.sink.name}")
                case End(counter, phase, reason):
                    log.append(f"{now:g} {names[counter - 1]} {phase}: {reason}")
        groups.check()

    for line in filter(None, map(str.strip, script.split("\n"))):
        when, *said = line.split()
        now = float(when)
        while (due := groups.deadline()) is not None and due < now:
            do(due, None)
        match said:
            case [group, role, "up"]:
                do(now, WorkerUp(member(group, Role(role))))
            case [group, role, "up", "as", other]:
                do(now, WorkerUp(replace(member(group, Role(role)), group=other)))
            case [group, role, "down"]:
                do(now, WorkerDown(who(group, Role(role))))
            case [group, role, "has", "room"]:
                do(now, SlotFree(who(group, Role(role)), 1000))
            case [name, "refused"]:
                do(now, Reject(offers[name], "full", 5.0))
            case [group, name]:
                names.append(name)
                do(now, Arrived(len(names), of(group)))
    return log


@pytest.mark.parametrize("title", STORIES)
def test_story(title):
    script, want = STORIES[title]
    assert told(script) == [line.strip() for line in want.split("\n") if line.strip()]


def test_the_same_crowd_is_told_the_same_whatever_hashes_are():
    command = "from tests.scheduler.test_groups import crowd; import json; print(json.dumps(crowd(9, 80).said))"
    env = {**os.environ, "PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, check=True, text=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(crowd(9, 80).said))


def test_one_group_decides_as_its_router_alone_would():
    """Nothing is different where nobody speaks of groups."""
    alone = Router(GATEWAY, RouterConfig(), DualMap())
    groups = gateway(("",))
    dice = random.Random(3)
    events: list = [WorkerUp(member("", role, number)) for role in (Role.PREFILL, Role.DECODE) for number in range(3)]
    for counter in range(1, 40):
        events.append(Arrived(counter, of("", dice.randrange(1, 60))))
    for number, event in enumerate(events):
        assert groups.on(event, number * 0.05) == alone.on(event, number * 0.05)
        assert groups.deadline() == alone.deadline()
    while (due := alone.deadline()) is not None and due < 5.0:
        assert groups.on(None, due) == alone.on(None, due)
