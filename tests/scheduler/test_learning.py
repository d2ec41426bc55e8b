"""What a worker learns of its steps, when its policies hear of it, and when everybody else does."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core.state import dump, load
from scheduler.cost import CostModel, Repriced
from scheduler.learning import Announce, Learning, LearningSettings, StepTook, differ
from tests.cast import efforts

PRIOR = CostModel("p", ((5e-3, 2e-5, 1e-9, 1e-4),), ((4e-3, 1e-4, 1e-7),), margins=(("decode", (0.5,) * 5),))
SETTINGS = LearningSettings(eager=8, pause_s=0.1, look_s=1.0, announce_s=10.0)


def step(rng: random.Random, truth: CostModel) -> StepTook:
    """Some step of either phase, as long as `truth` says."""
    if rng.random() < 0.5:
        rows = ((rng.randint(1, 2000), rng.choice((0, 500))),) * rng.randint(1, 3)
        return StepTook(rows, 0, 0, truth.prefill_s(rows))
    batch = rng.randint(1, 40)
    context = batch * rng.randint(1, 2000)
    return StepTook((), batch, context, truth.decode_s(batch, context))


def play(machine: Learning, truth: CostModel, seconds: float, start: float = 0.0, seed: int = 1) -> list[tuple]:
    """Steps every 20 ms; what it commanded, and when."""
    rng, said = random.Random(seed), []
    for at in range(int(seconds * 50)):
        now = start + at / 50
        said += [(now, command) for command in machine.on(step(rng, truth), now)]
        machine.check()
    return said


def test_a_worker_as_fast_as_its_prior_tells_nobody_but_that_it_is_surer():
    machine = Learning(PRIOR, SETTINGS)
    said = play(machine, PRIOR, 30.0)
    assert {type(command) for _, command in said} == {Repriced}, "its margins were a guess"
    assert machine.cost.margin("decode", 0.9) < 0.01
    assert machine.announced is PRIOR


def test_a_slower_worker_tells_its_policies_soon_and_everybody_else_once():
    machine = Learning(PRIOR, SETTINGS)
    truth = PRIOR.at(1.8, 1.8)
    said = play(machine, truth, 60.0)
    told = [now for now, command in said if isinstance(command, Repriced)]
    announced = [now for now, command in said if isinstance(command, Announce)]
    assert told[0] <= 1.1
    assert all(later - sooner >= SETTINGS.look_s for sooner, later in itertools.pairwise(told))
    assert len(told) < 15, "what does not change is not told again"
    assert 1 <= len(announced) <= 3
    assert all(b - a >= SETTINGS.announce_s for a, b in itertools.pairwise(announced))
    assert differ(machine.cost, truth) < 0.06
    assert differ(machine.announced, truth) < 0.3


def test_a_change_that_comes_right_after_an_announcement_is_told_when_the_pause_is_over():
    machine = Learning(PRIOR, SETTINGS)
    first = [now for now, c in play(machine, PRIOR.at(2.0, 2.0), 5.0) if isinstance(c, Announce)]
    play(machine, PRIOR.at(8.0, 8.0), 4.0, start=5.0)
    assert machine.announced.decode_s(1, 100) < PRIOR.decode_s(1, 100) * 3
    now = 9.0  # no step comes any more: its deadline alone tells it
    said = []
    while not said and (due := machine.deadline()) is not None and now < 60:
        now = max(now, due)
        said += [command for command in machine.on(None, now) if isinstance(command, Announce)]
    assert said
    assert now >= max(at for at in first if at < 9.0) + SETTINGS.announce_s - 1e-9
    assert machine.deadline() is None


def test_most_steps_are_not_learned_from():
    machine = Learning(PRIOR, SETTINGS)
    play(machine, PRIOR, 20.0)
    assert 2 * SETTINGS.eager < machine.learned <= 2 * (SETTINGS.eager + 20.0 / SETTINGS.pause_s) + 2
    assert machine.outliers == 0


def test_nothing_that_was_learned_waits_for_ever_and_nothing_is_due_before():
    machine = Learning(PRIOR, SETTINGS)
    assert machine.deadline() is None
    rng = random.Random(3)
    machine.on(step(rng, PRIOR), 5.0)
    assert machine.deadline() is None, "looked at at once: nobody had for long"
    machine.on(step(rng, PRIOR), 5.1)
    assert machine.deadline() == 6.0
    assert machine.on(None, 5.5) == []
    machine.on(None, 6.0)
    assert machine.deadline() is None


def test_probes_notice_each_coefficient():
    (a, b, c, d), (e, f, g) = PRIOR.prefill[0], PRIOR.decode[0]
    for line in ((3 * a, b, c, d), (a, 3 * b, c, d)):
        assert differ(PRIOR, replace(PRIOR, prefill=(line,))) > 0.05
    for short in ((3 * e, f, g), (e, 3 * f, g), (e, f, 3 * g)):
        assert differ(PRIOR, replace(PRIOR, decode=(short,))) > 0.05
    assert differ(PRIOR, PRIOR) == 0


class World(RuleBasedStateMachine):
    """Steps of any length at any time, on a machine that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.machine = Learning(PRIOR, SETTINGS)
        self.told: list[float] = []
        self.announced: list[float] = []

    def give(self, event: StepTook | None) -> None:
        cost, announced = self.machine.cost, self.machine.announced
        commands = self.machine.on(event, self.now)
        self.machine.check()
        assert len({type(command) for command in commands}) == len(commands)
        for command in commands:
            if isinstance(command, Repriced):
                self.told.append(self.now)
                assert command.cost is self.machine.cost
            else:
                self.announced.append(self.now)
                assert command.cost is self.machine.announced
        if not any(isinstance(command, Repriced) for command in commands):
            assert self.machine.cost is cost, "it changed and nobody was told"
        if not any(isinstance(command, Announce) for command in commands):
            assert self.machine.announced is announced

    @rule(seed=st.integers(0, 99), slowness=st.sampled_from((0.0, 0.3, 1.0, 1.0, 2.0, 1e6)), count=st.integers(1, 4))
    def steps(self, seed: int, slowness: float, count: int) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            taken = step(rng, PRIOR)
            self.now += 0.01
            self.give(replace(taken, seconds=taken.seconds * slowness))

    @rule(seconds=st.sampled_from((0.05, 1.0, 20.0)))
    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while (due := self.machine.deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            self.give(None)
        self.now = until

    @precondition(lambda self: self.machine.learned > 3)
    @rule()
    def write_and_read(self) -> None:
        self.machine = load(json.loads(json.dumps(dump(self.machine))), Learning)

    @invariant()
    def seldom(self) -> None:
        assert all(b - a >= SETTINGS.look_s - 1e-9 for a, b in itertools.pairwise(self.told))
        assert all(b - a >= SETTINGS.announce_s - 1e-9 for a, b in itertools.pairwise(self.announced))


@efforts
def test_policies_and_gateways_hear_no_more_often_than_is_said(effort):
    run_state_machine_as_test(World, settings=effort)


SCRIPT = """
import random
from tests.scheduler.test_learning import PRIOR, SETTINGS, Learning, play
machine = Learning(PRIOR, SETTINGS)
print([(now, type(c).__name__, c.cost.document()) for now, c in play(machine, PRIOR.at(1.5, 0.7), 6.0)])
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_with_another_hash_seed_learns_the_same(seed):
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
    )
    machine = Learning(PRIOR, SETTINGS)
    want = [(now, type(c).__name__, c.cost.document()) for now, c in play(machine, PRIOR.at(1.5, 0.7), 6.0)]
    assert out.stdout.strip() == str(want)
    assert want
