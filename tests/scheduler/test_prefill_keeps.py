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
from hypothesis.stateful import rule, run_state_machine_as_test

from core.messages import Cancel, Failed, First, Offer, Prompt
from core.pages import Owner, Pages
from core.request import Hints, Request
from scheduler.prefill_keeps import Keeps, KeepsConfig
from scheduler.prefill_policy import (
    Answer,
    AskForSink,
    Began,
    Begin,
    ChunkDone,
    Granted,
    HandOffOver,
    PrefillConfig,
    PrefillPolicy,
    RunChunk,
    SealPages,
    WithdrawHandOff,
)
from scheduler.programs import ProgramsConfig
from tests.cast import P1, SHAPE, ask, efforts, ticket
from tests.scheduler.orders import COST, ORDERS, SLOW
from tests.scheduler.test_prefill_policy import PrefillWorker
from tests.scheduler.twins import doubled, written

ROOT = Path(__file__).parents[2]
PROGRAMS = ProgramsConfig(first_s=5.0, least=3, window=6, fresh=1, programs=4, tools=2, over_s=30.0)
CONFIG = KeepsConfig(PROGRAMS, patience_s=20.0, headroom=0.1, small=0.05)


class Story:
    """A worker of 20 pages whose steps, sinks and reads take no time; a line for each thing that happens."""

    def __init__(self, config: KeepsConfig | None = CONFIG, pages: int = 20) -> None:
        self.ledger = Pages(pages)
        keeps = Keeps(SHAPE, self.ledger, COST, config) if config is not None else None
        self.machine = PrefillPolicy(P1, SHAPE, self.ledger, PrefillConfig(), keeps=keeps)
        self.now = 0.0
        self.names: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self.log: list[str] = []

    def give(self, event) -> None:
        for command in self.machine.on(event, self.now):
            self.perform(command)
        self.machine.check()

    def perform(self, command) -> None:
        match command:
            case Begin(ticket_, _, pages):
                self.log.append(f"{self.now:g} {self.names[ticket_.key]} begins in {len(pages)} pages")
            case RunChunk(run_id, spans):
                names = " ".join(f"{self.names[span.key]}:{span.stop - span.start}" for span in spans)
                self.log.append(f"{self.now:g} computes {names}")
                done = [Began(span.key, First(7)) for span in spans if span.stop == self.tokens[span.key]]
                self.give(ChunkDone(run_id, tuple(done)))
            case AskForSink(ticket_):
                self.give(Granted(ticket_.key))
            case SealPages(key, _, _, firsts):
                if firsts:
                    self.give(HandOffOver(key, True))
            case WithdrawHandOff(key):
                self.give(HandOffOver(key, False))
            case Answer(Failed(ticket_, _, reason)):
                self.log.append(f"{self.now:g} {self.names[ticket_.key]} failed: {reason}")

    def at(self, when: float) -> Story:
        """Time passes, as by a driver."""
        while (due := self.machine.deadline()) is not None and due <= when:
            self.now = max(self.now, due)
            self.give(None)
        self.now = when
        return self

    def turn(self, name: str, prompt: int, *, session: str | None = None, salt: int = 0, tool: str = "") -> str:
        """A prompt whose first tokens repeat those of others with its salt; returns its key."""
        number = len(self.names) + 1
        hints = Hints(session=name[0] if session is None else session, tool=tool)
        prefix = tuple((salt or ord(name[0])) * 1000 + page for page in range(prompt // 4))
        new = ticket(number)
        request = replace(ask(prompt), hints=hints, prefix=prefix)
        self.names[new.key], self.tokens[new.key] = name, prompt
        self.give(Offer(new, prompt, 8, 100.0, hints, prefix))
        self.give(Prompt(new, request))
        return new.key

    def cancel(self, key: str) -> None:
        number = list(self.names).index(key) + 1
        self.give(Cancel(ticket(number), "left"))


def test_the_next_turn_finds_what_was_kept_though_others_want_the_memory():
    told = {}
    for config in (CONFIG, None):
        story = Story(config)
        story.turn("a1", 32)
        for name in ("u1", "v1", "x1", "y1", "z1"):
            story.turn(name, 16, session="")
        story.at(2.0).turn("a2", 36)
        told[config is None] = story.log[-1]
    assert told == {False: "2 computes a2:4", True: "2 computes a2:36"}


STORIES = {
    "a program that is kept too long makes room": (
        """
        0 a1 32
        6 b1 60
        """,
        """
        0 a1 begins in 8 pages
        0 computes a1:32
        6 b1 begins in 15 pages
        6 computes b1:60
        """,
    ),
    "one for whom there is no room waits until what is kept may go": (
        """
        0 a1 32
        1 b1 60
        3 c1 8
        """,
        """
        """,
    ),
    "those who came first go in first": (
        """
        0 a1 32
        1 b1 60
        2 c1 60
        """,
        """
        """,
    ),
    "nobody waits for longer than patience": (
        """
        0 a1 32
        1 b1 60
        4 a2 36
        8 a3 40
        12 a4 44
        16 a5 48
        20 a6 52
        24 a7 56
        """,
        """
        """,
    ),
    "who has no session waits for no pin": (
        """
        0 a1 32
        1 -1 60
        2 a2 36
        """,
        """
        """,
    ),
    "a turn that waits keeps what it will use": (
        """
        0 a1 32
        """,
        """
        """,
    ),
}
"""Time, name (its first letter is the session's) and tokens of each turn, on 20 pages of 4 tokens; and what came of it."""


def told(script: str) -> list[str]:
    """What happens."""
    story = Story()
    for line in script.split("\n"):
        if line.strip():
            when, name, prompt = line.split()
            story.at(float(when)).turn(name, int(prompt), session="" if name[0] == "-" else None)
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
        return Hints(session=data.draw(st.sampled_from(["", "a", "b", "c"])), tool=data.draw(st.sampled_from("xyz")))

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

    def sound(self):
        super().sound()
        keeps = self.machine.keeps
        for key, since in keeps._since.items():
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
