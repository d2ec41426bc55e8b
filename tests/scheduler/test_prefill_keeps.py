"""KV of programs stays while their tools run, those for which there is no room wait, and nobody else notices."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from core.messages import Failed, First, Offer, Prompt
from core.pages import Pages
from core.request import Hints
from scheduler.prefill_events import (
    Answer,
    AskForSink,
    Began,
    Begin,
    ChunkDone,
    Granted,
    HandOffOver,
    RunChunk,
    SealPages,
)
from scheduler.prefill_keeps import Keeps, KeepsConfig
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy
from scheduler.programs import ProgramsConfig
from tests.cast import P1, SHAPE, ask, efforts, ticket
from tests.scheduler.orders import ORDERS, SLOW
from tests.scheduler.test_prefill_policy import PrefillWorker
from tests.scheduler.twins import doubled

ROOT = Path(__file__).parents[2]
PROGRAMS = ProgramsConfig(first_s=5.0, least=3, window=6, fresh=1, programs=4, tools=2, over_s=30.0)
CONFIG = KeepsConfig(PROGRAMS, patience_s=20.0, headroom=0.1, small=0.05)

TOLD = KeepsConfig(ProgramsConfig(first_s=10.0), patience_s=5.0, headroom=0.1, small=0.05)
"""Too few pauses are known: all is kept for 10 s."""


class Story:
    """A worker of 20 pages; a step takes 0.1 s a token, sinks and reads take no time. A line for each thing it does."""

    def __init__(self, config: KeepsConfig | None = TOLD) -> None:
        ledger = Pages(20)
        keeps = Keeps(SHAPE, ledger, SLOW, config) if config is not None else None
        self.machine = PrefillPolicy(P1, SHAPE, ledger, PrefillConfig(), keeps=keeps)
        self.now = 0.0
        self.names: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self.step: tuple[float, RunChunk] | None = None
        self.log: list[str] = []

    def give(self, event) -> None:
        for command in self.machine.on(event, self.now):
            self.perform(command)
        self.machine.check()

    def perform(self, command) -> None:
        match command:
            case Begin(ticket_, _, pages):
                self.log.append(f"{self.now:g} {self.names[ticket_.key]} begins in {len(pages)} pages")
            case RunChunk(_, spans):
                names = " ".join(f"{self.names[span.key]}:{span.stop - span.start}" for span in spans)
                self.log.append(f"{self.now:g} computes {names}")
                self.step = self.now + sum(span.stop - span.start for span in spans) / 10, command
            case AskForSink(ticket_):
                self.give(Granted(ticket_.key))
            case SealPages(key, _, _, firsts):
                if firsts:
                    self.give(HandOffOver(key, True))
            case Answer(Failed(ticket_, _, reason)):
                self.log.append(f"{self.now:g} {self.names[ticket_.key]} failed: {reason}")

    def at(self, when: float) -> Story:
        """Time passes, as by a driver; ends of steps come first."""
        while True:
            due = self.machine.deadline()
            if self.step is not None and self.step[0] <= when and (due is None or self.step[0] <= due):
                (self.now, step), self.step = self.step, None
                done = [Began(span.key, First(7)) for span in step.spans if span.stop == self.tokens[span.key]]
                self.give(ChunkDone(step.run_id, tuple(done)))
            elif due is not None and due <= when:
                self.now = max(self.now, due)
                self.give(None)
                after = self.machine.deadline()
                assert after is None or after > self.now, "the driver would spin"
            else:
                self.now = when
                return self

    def turn(self, name: str, prompt: int) -> None:
        """A prompt of the program of its first letter, which repeats the one before; of none from letter u on.

        The number is the turn's, from 1 on.
        """
        hints = Hints(session=name[0], program_step=int(name[1:]) - 1) if name[0] < "u" else Hints()
        prefix = tuple(ord(name[0]) * 1000 + page for page in range(prompt // 4))
        new = ticket(len(self.names) + 1)
        self.names[new.key], self.tokens[new.key] = name, prompt
        self.give(Offer(new, prompt, 8, 100.0, hints, prefix))
        self.give(Prompt(new, replace(ask(prompt), hints=hints, prefix=prefix)))


@pytest.mark.parametrize(("config", "computed"), [(TOLD, 4), (None, 36)])
def test_the_next_turn_finds_what_was_kept_though_others_want_the_memory(config, computed):
    story = Story(config)
    story.turn("a1", 32)
    for number, name in enumerate(("u1", "v1", "x1", "y1", "z1")):
        story.at(4.0 + 1.7 * number).turn(name, 16)
    story.at(13.0).turn("a2", 36)
    assert story.log[-1] == f"13 computes a2:{computed}"


STORIES = {
    "what is kept too long makes room": (
        """
        0 a1 32
        14 b1 60
        """,
        """
        0 a1 begins in 8 pages
        0 computes a1:32
        14 b1 begins in 15 pages
        14 computes b1:60
        """,
    ),
    "one for whom there is no room waits until what is kept may go, and lets others by": (
        """
        0 a1 32
        9 x1 24
        10 b1 48
        11 y1 24
        """,
        """
        0 a1 begins in 8 pages
        0 computes a1:32
        9 x1 begins in 6 pages
        9 computes x1:24
        11.4 y1 begins in 6 pages
        11.4 computes y1:24
        13.8 b1 begins in 12 pages
        13.8 computes b1:48
        """,
    ),
    "nobody waits for longer than patience": (
        """
        0 a1 32
        4 x1 24
        5 b1 48
        6 y1 24
        8 z1 24
        """,
        """
        0 a1 begins in 8 pages
        0 computes a1:32
        4 x1 begins in 6 pages
        4 computes x1:24
        6.4 y1 begins in 6 pages
        6.4 computes y1:24
        8.8 z1 begins in 6 pages
        8.8 computes z1:24
        11.2 b1 begins in 12 pages
        11.2 computes b1:48
        """,
    ),
    "nobody waits at an idle worker": (
        """
        0 a1 32
        4 x1 24
        5 b1 48
        """,
        """
        0 a1 begins in 8 pages
        0 computes a1:32
        4 x1 begins in 6 pages
        4 computes x1:24
        6.4 b1 begins in 12 pages
        6.4 computes b1:48
        """,
    ),
    "of two for whom there is no room the older program goes first": (
        """
        0 c1 8
        12 a1 32
        16 x1 24
        16.5 b1 48
        17 c2 48
        """,
        """
        0 c1 begins in 2 pages
        0 computes c1:8
        12 a1 begins in 8 pages
        12 computes a1:32
        16 x1 begins in 6 pages
        16 computes x1:24
        18.4 c2 begins in 12 pages
        18.4 computes c2:40
        22.4 b1 begins in 12 pages
        22.4 computes b1:48
        """,
    ),
    "who was elsewhere before is as old as so many turns of others": (
        """
        0 c1 8
        4 c2 8
        12 a1 32
        16 x1 24
        16.5 b1 48
        17 d3 48
        """,
        """
        0 c1 begins in 2 pages
        0 computes c1:8
        4 c2 begins in 2 pages
        4 computes c2:4
        12 a1 begins in 8 pages
        12 computes a1:32
        16 x1 begins in 6 pages
        16 computes x1:24
        18.4 d3 begins in 12 pages
        18.4 computes d3:48
        23.2 b1 begins in 12 pages
        23.2 computes b1:48
        """,
    ),
    "a program that is kept waits for no room": (
        """
        0 a1 32
        4 x1 24
        5 b1 48
        6 a2 36
        """,
        """
        0 a1 begins in 8 pages
        0 computes a1:32
        4 x1 begins in 6 pages
        4 computes x1:24
        6.4 a2 begins in 9 pages
        6.4 computes a2:4
        6.8 b1 begins in 12 pages
        6.8 computes b1:48
        """,
    ),
    "who has no session waits for no pin": (
        """
        0 a1 32
        4 x1 60
        5 a2 36
        """,
        """
        0 a1 begins in 8 pages
        0 computes a1:32
        4 x1 begins in 15 pages
        4 computes x1:60
        10 a2 begins in 9 pages
        10 computes a2:16
        """,
    ),
}
"""Time, name (its first letter is the session) and tokens of each turn, on 20 pages of 4 tokens; what came of it."""


def told(script: str) -> list[str]:
    """What happens."""
    story = Story()
    for line in script.split("\n"):
        if line.strip():
            when, name, prompt = line.split()
            story.at(float(when)).turn(name, int(prompt))
    return story.at(100.0).log


@pytest.mark.parametrize("title", STORIES)
def test_story(title):
    script, want = STORIES[title]
    assert told(script) == [line.strip() for line in want.split("\n") if line.strip()]


def test_another_process_with_another_hash_seed_tells_the_same_stories():
    code = "from tests.scheduler.test_prefill_keeps import STORIES, told; print([told(s) for s, _ in STORIES.values()])"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip() == repr([told(script) for script, _ in STORIES.values()])


class Programmed(PrefillWorker):
    """The prefill worker's own test with sessions: nothing that holds without them is different with them."""

    bound_s = CONFIG.patience_s

    def made(self, config: PrefillConfig) -> PrefillPolicy:
        keeps = Keeps(SHAPE, self.ledger, SLOW, CONFIG)
        return PrefillPolicy(P1, SHAPE, self.ledger, config, ORDERS[self.order](6, 3, SLOW), keeps=keeps)

    def hints(self, data) -> Hints:
        session, tool = data.draw(st.sampled_from(["", "a", "b", "c"])), data.draw(st.sampled_from("xyz"))
        return Hints(session=session, tool=tool, program_step=data.draw(st.sampled_from([0, 0, 3])))

    def rest(self) -> bool:
        due = self.machine.deadline()
        if due is None:
            return False
        self.turn_clock(max(self.now, due))
        return True

    @rule(sure=st.sampled_from([False, False, True]))
    def restore(self, sure):
        if sure:
            self.machine, self.ledger = doubled(self.machine, self.ledger)

    @invariant()
    def sound(self):
        super().sound()
        keeps = self.machine.keeps
        for key, since in keeps.waiting.items():
            assert self.now <= since + self.bound_s, "it waits for longer than was said"
            assert not self.jobs[key].begun

    def teardown(self):
        super().teardown()
        assert not self.ledger.pinned
        assert not self.machine.keeps._here
        assert not self.machine.keeps.waiting
        assert not self.machine.keeps._expected


@efforts
@pytest.mark.parametrize("order", ["shortest", "dual queue"])
def test_every_accepted_request_ends_once_and_waits_no_longer_than_was_said(order, effort):
    machine = type(order, (Programmed,), {"order": order})
    run_state_machine_as_test(machine, settings=settings(effort, max_examples=effort.max_examples // 4))
