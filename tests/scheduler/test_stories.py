"""The named stories of hand-offs and moves, played by all machines together; tests/live plays them with processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from core.kv import pages_of
from core.messages import Message, Ready
from core.request import Phase, Request
from core.sampling import Sampling
from core.worker import Identity, Role
from scheduler import decode_policy as decode
from scheduler.decode_migrating import MigratingPolicy
from tests.cast import SHAPE
from tests.scheduler import test_moving as moving
from tests.scheduler import test_together as together
from tests.scheduler.test_together import PAGE
from tests.transfer.faults import Rule, Rules
from tests.transfer.stories import FAULTS, GIVERS, OTHER_SINK, SINK, SINKS, SOURCE, SOURCES, TAKERS, Story
from transfer import sink as taking

EDGE = 60
"""Steps: a worker with a row of some thirty tokens is free for less, one without for more."""


class Obeying(together.Worker):
    """Its messages to and from workers, and its reads, obey the rules of its world."""

    world: World

    def heard(self, peer: Identity, message: Any) -> None:
        hears = super().heard
        if isinstance(self.world.processes[peer], together.Worker):
            link = self.world.link(self.me, peer)
            epoch = link.epoch

            def go() -> None:
                if link.epoch == epoch:
                    hears(peer, message)

            self.world.obey(self, "hear", "heard", message, go)
        else:
            hears(peer, message)

    def read(self, command: taking.Read) -> None:
        reading = together.Reading(command.pages, command.source)
        self.reads[command.read_id] = reading
        begins, took, flipped = 0.0, 0.01, False
        for rule in self.world.ruled(self, "read"):
            match rule.do:
                case "flip":
                    flipped = True
                case "delay":
                    took += rule.seconds
                case "stall":
                    begins = rule.seconds
                case "fail":
                    reading.settled = True
                    self.post("sink", taking.PullFailed(command.read_id, "a fault was injected", in_doubt=False))
                    return
                case "doubt":
                    self.give_up(command.read_id, reading)
                    return
                case _:
                    assert rule.do == "kill"
                    self.world.fell(self, rule)
        self.later(begins + took, lambda: self.come(command, reading, flipped))

    def come(self, command: taking.Read, reading: together.Reading, flipped: bool) -> None:
        if reading.failed:
            return
        process = self.world.processes[command.source]
        for rule in self.world.ruled(self, "done"):
            self.world.fell(self, rule)
        if not process.alive or not self.alive:
            self.give_up(command.read_id, reading)
            return
        assert isinstance(process, together.Worker)
        reading.settled = True
        for mine, theirs in zip(command.pages, pages_of(command.runs), strict=True):
            self.arena[mine] = list(process.arena[theirs])
        if flipped:
            self.arena[command.pages[0]][0] ^= 1
        pulled = partial(taking.Pulled, command.read_id, 0.001)
        self.digest(command.first_page, command.pages, command.tokens, lambda found: self.post("sink", pulled(found)))


class Moving(Obeying, moving.Worker):
    """Gives its rows away when they fill it."""

    world: World

    def policy(self) -> decode.DecodePolicy:
        eager = replace(moving.EAGER, below_steps=EDGE, above_steps=EDGE)
        return MigratingPolicy(self.me, SHAPE, self.ledger, decode.DecodeConfig(max_rows=4, max_steps=6), eager)


class World(moving.World):
    """Four workers, a gateway, and a story's rules."""

    def __init__(self, seed: int, story: Story, make: type[Obeying], pages: int) -> None:
        super().__init__(seed, 0.0)
        self.make, self.calm, self.moves = make, False, make is Moving
        self.acted: list[str] = []
        self.rules = {name: Rules(rules, partial(self.note, name)) for name, rules in story.rules.items()}
        for name in (SOURCE, "prefill-1", SINK, OTHER_SINK):
            role = Role.PREFILL if name.startswith("prefill") else Role.DECODE
            self.join(make(self, Identity(name, 1), role, pages))
        self.gateway = together.Gateway(self, Identity("gateway-0", 1))
        self.join(self.gateway)

    def note(self, name: str, rule: Rule) -> None:
        self.acted.append(f"{name}: {rule.do} at {rule.at}")

    def ruled(self, process: together.Process, event: str) -> list[Rule]:
        """Who has died has no rules when it is back."""
        return self.rules[process.me.name].on(event) if process.alive and process.me.name in self.rules else []

    def fell(self, process: together.Process, rule: Rule) -> None:
        def die() -> None:
            if process.alive:
                assert isinstance(process, together.Worker)
                self.kill(process)
                self.rules[process.me.name].put(())

        self.at(self.now + rule.seconds, die) if rule.seconds else die()

    def obey(self, process: together.Process, before: str, after: str, message: Message, go: Callable[[], Any]) -> bool:
        """As `tests/live/faulty.py` does: false only if nothing went out."""
        name = type(message).__name__
        last = isinstance(message, Ready) and bool(message.firsts)

        def found(when: str) -> list[Rule]:
            return self.ruled(process, f"{when} {name}") + (self.ruled(process, f"{when} last {name}") if last else [])

        times = 1
        for rule in found(before):
            match rule.do:
                case "drop":
                    return True
                case "delay":
                    process.later(rule.seconds, go)
                    return True
                case "twice":
                    times = 2
                case _:
                    assert rule.do == "kill"
                    self.fell(process, rule)
        done = process.alive and go() is not False
        for _ in range(times - 1):
            go()
        for rule in found(after):
            self.fell(process, rule)
        return done

    def send(self, sender: Identity, to: Identity, message: Any) -> bool:
        process, sends = self.processes[sender], super().send
        if not process.alive:
            return False
        if isinstance(self.processes[to], together.Worker) and isinstance(process, together.Worker):
            return self.obey(process, "send", "sent", message, lambda: sends(sender, to, message))
        return sends(sender, to, message)


def tell(story: Story, seed: int, make: type[Obeying], arena: int, most: int) -> World:
    """One request, to its end; the gateway compares each token, and nothing is left."""
    world = World(seed, story, make, arena)
    dice = world.dice
    prompt = tuple(dice.randrange(together.VOCABULARY) for _ in range(story.pages * PAGE - (story.pages > 1)))
    counter = world.gateway.ask(Request("r", prompt, Sampling(most), timeout_s=story.timeout_s))
    together.settle(world)
    end = world.gateway.ends[counter]
    assert end.phase is (Phase.DONE if story.code == "OK" else Phase.FAILED), end
    assert story.attempts[0] <= end.attempts <= story.attempts[1], (end, world.acted)
    acts = {f"{name}: {rule.do} at {rule.at}" for name, rules in story.rules.items() for rule in rules}
    kills = {act for act in acts if ": kill at " in act}
    assert (acts if story.every else kills) <= set(world.acted), world.acted
    return world


some = pytest.mark.parametrize(
    "seeds", [range(1), pytest.param(range(1, 30), marks=pytest.mark.slow)], ids=["quick", "long"]
)


@some
@pytest.mark.parametrize("story", FAULTS, ids=str)
def test_a_hand_off_with_a_fault(story, seeds):
    for seed in seeds:
        world = tell(story, seed, Obeying, 16, 12)
        wrong = sum(each.sink.mismatches for each in world.processes.values() if isinstance(each, together.Worker))
        assert wrong >= story.mismatches


@some
@pytest.mark.parametrize("story", [*SOURCES, *SINKS], ids=str)
def test_a_hand_off_one_side_of_which_is_killed(story, seeds):
    for seed in seeds:
        tell(story, seed, Obeying, 16, 12)


@some
@pytest.mark.parametrize("story", [*GIVERS, *TAKERS], ids=str)
def test_a_move_one_side_of_which_is_killed(story, seeds):
    for seed in seeds:
        world = tell(story, seed, Moving, 24, 55)
        assert world.tally["offered"] or story.name == "before the offer"
