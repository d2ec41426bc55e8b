"""All machines together as live workers run them: our policy by name, with rows that outgrow what was forecast.

The rest is as in test_together.py: each token is drawn from the KV in its pages, every request ends, no page is lost.
Memory is promised as if every answer had two tokens, so that it runs out all the time, and cost models change.
"""

from __future__ import annotations

from typing import Any

import pytest

from core.worker import Identity, Role
from scheduler import decode_events
from scheduler import decode_policy as decode
from scheduler.cost import CostModel, Repriced
from scheduler.policies import live
from tests.cast import SHAPE
from tests.scheduler.test_together import DEPLOYMENTS, Worker, World, play

COST = CostModel("play", ((0.005, 0.001, 0.0, 0.0),), ((0.006, 0.0005, 0.0),))
"""About what the engines here take."""


class LiveWorker(Worker):
    """Composed as by `control/worker.py`; its engine keeps an evicted sequence's tokens, and computes its KV again."""

    def __init__(self, world: World, identity: Identity, role: Role, pages: int):
        policy = live("baton").sized(
            chunk_tokens=8, max_rows=4, max_steps=1 if role is Role.MIXED else 6, suspends=False
        )
        self.ours = policy
        super().__init__(world, identity, role, pages)
        if role.prefills:
            self.prefill = policy.prefill(identity, SHAPE, self.ledger, COST)
            self.seat("prefill", self.prefill, self.prefills)
        self.later(world.dice.uniform(0.1, 0.5), self.reprice)

    def policy(self) -> decode.DecodePolicy:
        made = self.ours.decode(self.me, SHAPE, self.ledger, COST)
        for _ in range(made.forecast.config.least):
            made.forecast.learn(2)
        return made

    def reprice(self) -> None:
        """The machine is faster or slower than it was; a few times, so that the world comes to rest."""
        factor = self.world.dice.choice((0.5, 1.0, 3.0))
        for seat in ("prefill", "decode"):
            if seat in self.machines:
                self.post(seat, Repriced(COST.at(factor, factor)))
        if self.world.now < 4.0:
            self.later(self.world.dice.uniform(0.1, 0.5), self.reprice)

    def decodes(self, command: decode_events.DecodeCommand) -> None:
        match command:
            case decode_events.Evict():
                pass  # its tokens stay; of its pages nobody reads until it joins again
            case _:
                super().decodes(command)

    def start(self, command: decode_events.Run) -> None:
        super().start(command)
        for join in command.joining:
            if join.recompute is not None:
                sequence = self.sequences[join.key]
                for position in range(*join.recompute):
                    self.write(sequence, position)


def run(deployment: str, seed: int, faults: float) -> int:
    """The rows that were evicted."""
    made: list[LiveWorker] = []

    def make(*arguments: Any) -> LiveWorker:
        made.append(LiveWorker(*arguments))
        return made[-1]

    world = World(seed, faults, make)
    world.calm = False  # one whose promise is taken back may be prefilled twice
    play(world, DEPLOYMENTS[deployment], faults, longest=16)
    return sum(each.decode.evicted for each in made if each.role.decodes)


SEEDS = pytest.mark.parametrize(
    "seeds", [range(5, 9), pytest.param(range(9, 200), marks=pytest.mark.slow)], ids=["quick", "long"]
)


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@SEEDS
def test_without_faults_every_request_is_served_though_memory_runs_out(deployment, seeds):
    assert sum(run(deployment, seed, 0.0) for seed in seeds) > 0, "memory did not run out"


@pytest.mark.parametrize(
    ("deployment", "seed", "faults"),
    [
        ("mixed", 7, 0.0),
        ("two mixed and a decode worker", 4, 0.0),
        ("mixed", 16, 1.0),
        ("unequal pages", 63, 0.0),
        ("mixed", 39, 1.0),
    ],
    ids=[
        "each is promised what the other computes in",
        "alone, and no page free",
        "the same with faults",
        "of the batch class, the first in line and who has begun",
        "of the batch class, what has grown too large",
    ],
)
def test_rings_of_memory_that_were_met_on_the_way(deployment, seed, faults):
    """In an arena of both phases."""
    run(deployment, seed, faults)


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@SEEDS
def test_with_faults_every_request_ends_and_nothing_is_wrong_or_lost(deployment, seeds):
    for seed in seeds:
        run(deployment, seed, 1.0)
