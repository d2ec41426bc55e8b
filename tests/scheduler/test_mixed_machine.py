"""The mixed policy under a machine that does as it pleases, long orders against single steps, and another process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core.errors import LocalError
from core.messages import Accept, Cancel, Failed, Finished, Handed, Offer, Prompt, Reject
from core.pages import Owner, Pages
from core.request import Request, Ticket
from core.sampling import Sampling
from scheduler.cost import CostModel
from scheduler.decode_events import Ended
from scheduler.mixed_batch import State
from scheduler.mixed_events import Begin, MixedConfig, Step, Stepped, Suspend
from scheduler.mixed_policy import MixedPolicy
from scheduler.prefill_events import Answer, EndSequence, GatewayGone, Invite
from tests.cast import GATEWAY, MIXED, OTHER_GATEWAY, SHAPE, ask, efforts, ticket
from tests.scheduler.mixed_worker import Worker, prefix_of, text

ROOT = Path(__file__).parents[2]
COST = CostModel("slow", ((0.5, 0.05, 0.001, 0.0),), ((0.5, 0.05, 0.01),))
CONFIGS = {
    "prefill_first": MixedConfig("prefill_first", 12, 3, "prompt", 0.1, 4, 2),
    "sarathi": MixedConfig("chunked", 8, 3, "prompt", 0.1, 4, 1),
    "vllm": MixedConfig("chunked", 8, 3, "optimistic", 0.0, 4, 2),
    "worst_case": MixedConfig("chunked", 8, 3, "worst_case", 0.0, 4, 2),
    "gap": MixedConfig("chunked", 16, 4, "optimistic", 0.0, 4, 1, gap_s=1.5, least_tokens=2),
}


@dataclass
class Asked:
    """What a gateway knows of a request."""

    ticket: Ticket
    request: Request
    deadline: float
    order: int = 0
    """Of its prompt; 0 while it has only been offered."""
    answered: str = ""
    """accepted, rejected."""
    handed: bool = False
    unwanted: bool = False
    reports: bool = False
    failed: int = 0
    ends: dict[int, Finished] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    """Continuations that were cancelled by themselves."""


def wrongly(event: Stepped) -> Iterator[Stepped]:
    """What no step of a true shell is."""
    yield replace(event, step_id=event.step_id + 1)
    yield replace(event, steps=0)
    yield replace(event, ended=(*event.ended, Ended("nobody", "length", 1)))
    for each in event.ended:
        yield replace(event, ended=(*event.ended, each))
    for one in event.begun:
        yield replace(event, begun=(*event.begun, one))
        yield replace(event, ended=(*event.ended, Ended(one.key, "length", 1)))


class Colocated(RuleBasedStateMachine):
    """An engine that ends every order once, gateways that come, leave and lose interest, and memory in doubt."""

    @initialize(config=st.sampled_from(sorted(CONFIGS)))
    def start(self, config):
        self.config = CONFIGS[config]
        self.ledger = Pages(14)
        self.machine = MixedPolicy(MIXED, SHAPE, self.ledger, self.config, COST)
        self.worker = Worker(14)
        self.now = 0.0
        self.asked: dict[str, Asked] = {}
        self.waiting: dict[str, tuple[int, int]] = {}
        """Sequences in line, by key, in the order in which they must start."""
        self.running: dict[str, tuple[int, int]] = {}
        self.prompts = 0
        self.doubts = 0
        self.refused: dict = {}

    def give(self, event) -> None:
        self.perform_all(self.machine.on(event, self.now))
        self.machine.check()
        self.turn_clock(self.now)

    def turn_clock(self, until: float) -> None:
        """As a driver: call whenever the deadline has come, also if it came because somebody freed memory."""
        while (due := self.machine.deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            commands = self.machine.on(None, self.now)
            after = self.machine.deadline()
            assert after is None or after > self.now, "the driver would spin"
            self.perform_all(commands)
            self.machine.check()
        self.now = until

    def perform_all(self, commands) -> None:
        for command in commands:
            match command:
                case Answer(message):
                    self.told(message)
                case Invite(gateway, message):
                    assert message.worker == MIXED
                    least, most = self.refused.pop(gateway)
                    assert least < message.tokens <= most, "told twice, or of what nobody asked for"
                    if message.tokens < most:
                        self.refused[gateway] = message.tokens, most
                case _:
                    self.follow(command)
                    self.worker.perform(command)

    def follow(self, command) -> None:
        """Who starts, who is suspended, and that nobody is overtaken."""
        match command:
            case Begin(key, of, made=made, branch=branch):
                asked = self.asked[of.key]
                order = self.waiting.pop(key)
                assert order == (asked.order, branch)
                assert made or not asked.handed
                assert all(order < other for other in self.waiting.values()), "somebody was overtaken"
                self.running[key] = order
            case Suspend(key):
                # A continuation may be suspended before it has joined.
                order = self.running.pop(key) if key in self.running else self.waiting[key]
                foreign = any(name.startswith("doubt/") for name in self.ledger.holders())
                assert foreign or self.running, "the last one was suspended"
                assert all(order > other for other in self.running.values()), "an older one was suspended"
                self.waiting[key] = order
            case EndSequence(key):
                self.waiting.pop(key, None)
                self.running.pop(key, None)
            case Step(joining=joining):
                assert {join.key for join in joining} <= self.running.keys()
                assert len(self.running) <= self.config.max_rows

    def told(self, message) -> None:
        asked = self.asked[message.ticket.key]
        request = asked.request
        match message:
            case Accept():
                assert not asked.answered
                assert 0 <= message.cached_tokens < len(request.prompt)
                asked.answered = "accepted"
            case Reject():
                assert not asked.answered
                asked.answered = "rejected"
                if message.wait_s:
                    new = len(request.prompt)
                    minter = message.ticket.minter
                    self.refused[minter] = 0, max(self.refused.get(minter, (0, 0))[1], new)
            case Handed():
                assert not asked.handed
                assert not asked.unwanted
                assert [stage.name for stage in message.stages] == ["batch_wait", "prefill"]
                asked.handed = True
                if request.sampling.n > 1:  # its continuations join or wait
                    for branch in range(request.sampling.n):
                        key = f"{message.ticket.key}/{branch}"
                        if key in self.worker.sequences:
                            line = self.running if key in self.machine._batch.rows else self.waiting
                            line[key] = (asked.order, branch)
            case Finished(reason="cancelled"):
                assert asked.reports
                asked.reports = False
                assert [stage.name for stage in message.stages] == ["decode"]
            case Finished():
                assert not asked.unwanted
                assert message.branch not in asked.ends, "ended twice"
                asked.ends[message.branch] = message
                said = self.worker.said.get((message.ticket.key, message.branch), [])
                assert message.completion_tokens == len(said)
                assert message.decoded == asked.handed
            case Failed():
                self.waiting.pop(message.ticket.key, None)
                if asked.order:
                    asked.failed += 1
                    assert not asked.unwanted
                    asked.unwanted = True

    @rule(
        prompt=st.integers(1, 24),
        most=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        family=st.sampled_from([0, 0, 1000]),
        named=st.booleans(),
        again=st.booleans(),
        data=st.data(),
    )
    def offer(self, prompt, most, n, family, named, again, data):
        """Mostly the prompt follows at once; it may be the next turn of a request that has ended."""
        minter = data.draw(st.sampled_from([GATEWAY, OTHER_GATEWAY]))
        new = ticket(len(self.asked) + 1, source=MIXED, sink=MIXED, minter=minter)
        request = ask(prompt, most, timeout_s=data.draw(st.sampled_from([8.0, 200.0])), start=family)
        talks = [known for known in self.asked.values() if known.ends and known.request.sampling.n == 1]
        if again and talks:
            known = data.draw(st.sampled_from(talks))
            said = self.worker.said.get((known.ticket.key, 0), ())
            request = replace(request, prompt=(*known.request.prompt, *said, *request.prompt)[: 24 + prompt])
            prompt = len(request.prompt)
        request = replace(request, sampling=Sampling(most, seed=len(self.asked), n=n))
        if named:
            request = replace(request, prefix=prefix_of(request.prompt))
        self.asked[new.key] = Asked(new, request, 0.0)
        self.worker.stops[new.key] = data.draw(st.integers(0, 30))
        wait_s = data.draw(st.sampled_from([2.0, 1000.0]))
        self.give(Offer(new, prompt, most, wait_s, prefix=request.prefix))
        if data.draw(st.sampled_from([True, True, True, False])):
            self.prompt(self.asked[new.key])

    def prompt(self, asked: Asked) -> None:
        if asked.answered != "accepted" or asked.order or asked.unwanted:
            return
        self.prompts += 1
        asked.order = self.prompts
        asked.deadline = self.now + asked.request.timeout_s
        self.waiting[asked.ticket.key] = (asked.order, 0)
        self.give(Prompt(asked.ticket, asked.request))

    @precondition(lambda self: any(a.answered == "accepted" and not a.order for a in self.asked.values()))
    @rule(data=st.data())
    def late_prompt(self, data):
        those = [a for a in self.asked.values() if a.answered == "accepted" and not a.order]
        self.prompt(data.draw(st.sampled_from(those)))

    @precondition(lambda self: self.worker.order is not None)
    @rule(times=st.integers(1, 4))
    def step(self, times):
        for _ in range(times):
            if self.worker.order is None:
                return
            self.now += 0.25
            event = self.worker.step()
            if event is not None:
                self.misreport(event)
                self.give(event)

    def told_apart(self):
        """What a change would show in."""
        return self.machine.queue(), self.machine.deadline(), self.ledger.holders(), self.ledger.available

    def misreport(self, event: Stepped) -> None:
        """A shell that says what did not happen, or twice what did, is told so, and nothing has changed."""
        before = self.told_apart()
        for wrong in wrongly(event):
            with pytest.raises(LocalError):
                self.machine.on(wrong, self.now)
            self.machine.check()
            assert self.told_apart() == before

    @precondition(lambda self: self.worker.order is not None)
    @rule(really=st.sampled_from([True, False, False, False]))
    def fail(self, really):
        if really:
            self.give(self.worker.fail())

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), report=st.booleans(), alone=st.booleans())
    def cancel(self, data, report, alone):
        asked = data.draw(st.sampled_from(list(self.asked.values())))
        if alone and asked.request.sampling.n > 1:
            if asked.handed:
                branch = data.draw(st.integers(0, asked.request.sampling.n - 1))
                asked.dropped.add(branch)
                self.give(Cancel(asked.ticket, "stop string", branch=branch))
            return
        live = asked.handed and not asked.unwanted and self.live(asked)
        asked.reports = asked.reports or bool(report and live)
        asked.unwanted = True
        if not asked.handed:
            self.waiting.pop(asked.ticket.key, None)
        self.give(Cancel(asked.ticket, "left", report))

    def live(self, asked: Asked) -> bool:
        return any(known.ticket == asked.ticket for known in self.worker.sequences.values())

    @rule(who=st.sampled_from([GATEWAY, OTHER_GATEWAY]), really=st.sampled_from([True, False, False, False]))
    def gateway_dies(self, who, really):
        if not really:
            return
        self.refused.pop(who, None)
        for asked in self.asked.values():
            if asked.ticket.minter == who:
                asked.unwanted = True
                if not asked.handed:
                    self.waiting.pop(asked.ticket.key, None)
        self.give(GatewayGone(who))

    @rule(count=st.integers(1, 6))
    def doubt(self, count):
        """Somebody else in the arena holds memory."""
        count = min(count, self.ledger.available)
        if count and self.config.admission != "worst_case":
            self.doubts += 1
            self.ledger.bind(f"doubt/{self.doubts}", count, Owner.IN_DOUBT)

    @rule()
    def fence(self):
        """Nobody tells the policy."""
        for holder in [name for name in self.ledger.holders() if name.startswith("doubt/")][:1]:
            self.ledger.release(holder)
        self.turn_clock(self.now)

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds):
        self.turn_clock(self.now + seconds)

    @invariant()
    def sound(self):
        self.machine.check()
        for (key, branch), said in self.worker.said.items():
            assert said == text(self.asked[key].request, branch, len(said)), "a wrong token"
        foreign = any(name.startswith("doubt/") for name in self.ledger.holders())
        busy = self.worker.order is not None
        counts = self.machine.queue()
        at_work = counts[State.WAITING] + counts[State.PREFILLING] + counts[State.DECODING]
        assert busy or foreign or not at_work, "idle beside work"

    def teardown(self):
        for holder in [name for name in self.ledger.holders() if name.startswith("doubt/")]:
            self.ledger.release(holder)
        self.turn_clock(self.now)
        for _ in range(5000):
            if self.worker.order is None:
                break
            self.step(1)
        self.turn_clock(self.now + 2.0)
        self.machine.check()
        assert self.machine.queue() == dict.fromkeys(State, 0), "a request hangs"
        assert self.machine.deadline() is None
        assert self.ledger.holders() == ()
        assert self.worker.sequences == {}
        for asked in self.asked.values():
            assert asked.answered or asked.unwanted or not asked.order
            assert not asked.reports, "stages were not reported"
            if asked.order and not asked.unwanted:
                assert set(asked.ends) | asked.dropped == set(range(asked.request.sampling.n))


@efforts
def test_every_request_ends_once_with_the_right_tokens_and_leaves_no_page(effort):
    run_state_machine_as_test(Colocated, settings=effort)


@dataclass(frozen=True)
class Visit:
    """A request in a play: when it is offered, what of, and when its client leaves."""

    at: int
    prompt: int
    most: int
    stops_at: int
    n: int
    wait_s: float
    leaves: int | None
    timeout_s: float = 500.0


def play(visits: list[Visit], config: MixedConfig) -> list[tuple[int, str]]:
    """What is decided and when, with steps of one second that end before all else of their time."""
    machine = MixedPolicy(MIXED, SHAPE, Pages(14), config, COST)
    worker = Worker(14)
    decided: list[tuple[int, str]] = []
    due: dict[int, deque] = {}
    prompts: dict[str, Prompt] = {}
    for index, visit in enumerate(visits):
        of = ticket(index + 1, source=MIXED, sink=MIXED)
        sampling = Sampling(visit.most, seed=index, n=visit.n)
        request = replace(ask(visit.prompt, visit.most, timeout_s=visit.timeout_s, start=50 * index), sampling=sampling)
        prompts[of.key] = Prompt(of, request)
        worker.stops[of.key] = visit.stops_at
        due.setdefault(visit.at, deque()).append(Offer(of, visit.prompt, visit.most, visit.wait_s))
        if visit.leaves is not None:
            due.setdefault(visit.at + visit.leaves, deque()).append(Cancel(of, "left", report=True))

    def give(event, now: int) -> None:
        for command in machine.on(event, now):
            match command:
                case Answer(message):
                    decided.append((now, f"tells {message}"))
                    if isinstance(message, Accept):
                        due.setdefault(now, deque()).append(prompts[message.ticket.key])
                case Begin(key, made=made):
                    decided.append((now, f"begins {key} with {made}"))
                case Suspend(key) | EndSequence(key):
                    decided.append((now, f"{type(command).__name__} {key}"))
                case Invite():
                    decided.append((now, f"{command}"))
                case Step(spans=spans, joining=joining, rows=rows):
                    decided.extend((now, f"computes {span} beside {rows} rows") for span in spans)
                    decided.extend((now, f"joins {join.key}") for join in joining)
            if not isinstance(command, Answer | Invite):
                worker.perform(command)
        machine.check()

    for now in range(600):
        if worker.order is not None:
            event = worker.step()
            if event is not None:
                give(event, now)
        while (when := machine.deadline()) is not None and when <= now:
            give(None, now)
        while due.get(now):
            give(due[now].popleft(), now)
    assert machine.queue() == dict.fromkeys(State, 0)
    assert machine._ledger.holders() == ()
    return decided


visits = st.lists(
    st.builds(
        Visit,
        at=st.integers(0, 25),
        prompt=st.integers(1, 20),
        most=st.integers(1, 24),
        stops_at=st.integers(0, 60),
        n=st.sampled_from([1, 1, 1, 1, 2]),
        wait_s=st.sampled_from([20.0, 1000.0, 1000.0]),
        leaves=st.none() | st.integers(0, 30),
        timeout_s=st.sampled_from([30.0, 500.0, 500.0]),
    ),
    min_size=3,
    max_size=10,
)


@efforts
def test_single_steps_give_the_same_decisions_at_the_same_times_as_long_orders(effort):
    short = []

    @effort
    @given(st.sampled_from(sorted(CONFIGS)), visits)
    def compare(name, arrivals):
        config = CONFIGS[name]
        single = play(arrivals, replace(config, max_steps=1))
        assert play(arrivals, replace(config, max_steps=64)) == single
        assert play(arrivals, replace(config, max_steps=3)) == single
        short.append(any(what.startswith("Suspend") for _, what in single))

    compare()
    assert sum(short) > len(short) / 8, "memory was rarely short: this proved nothing"


def digest() -> str:
    """Of what is decided in many plays."""
    random = Random(3)
    told = hashlib.blake2b()
    for config in CONFIGS.values():
        for _ in range(3):
            arrivals = [
                Visit(
                    random.randrange(25),
                    random.randrange(1, 21),
                    random.randrange(1, 25),
                    random.randrange(60),
                    random.choice([1, 1, 2]),
                    random.choice([20.0, 1000.0]),
                    random.choice([None, None, random.randrange(30)]),
                )
                for _ in range(10)
            ]
            told.update(repr(play(arrivals, config)).encode())
    return told.hexdigest()


def test_another_process_with_other_hashes_decides_the_same():
    script = "from tests.scheduler.test_mixed_machine import digest; print(digest())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest()
