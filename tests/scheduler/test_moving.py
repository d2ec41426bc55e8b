"""Rows that move between decode workers: all machines together, with late, broken and lying links, and by hand.

The engines, streams and routers are those of test_together.py: the client's tokens are compared with what the model
says, so that a token that is lost, repeated, or made of KV that did not arrive is seen at once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from core.messages import Carried, CaughtUp, First, Freeness, OfferMigration, Refuse
from core.request import Request
from core.sampling import Sampling
from core.state import load
from core.worker import Identity, Role
from scheduler import decode_events
from scheduler import decode_policy as decode
from scheduler import router_events as front
from scheduler.decode_migrating import MigratingPolicy
from scheduler.migration import MigrationConfig
from tests.cast import efforts
from tests.scheduler import test_together as together
from tests.scheduler.test_together import mark, play
from tests.scheduler.twins import sets_sorted, written
from transfer import sink as taking
from transfer import source as giving

EAGER = MigrationConfig(
    below_steps=30, above_steps=30, max_stages=2, last_pages=1, ahead_tokens=7, deadline_s=1.0, retry_s=0.1
)

rarely = st.sampled_from([False] * 7 + [True])


class Worker(together.Worker):
    """Does what a policy with migration commands, beside the rest."""

    world: World

    def policy(self) -> decode.DecodePolicy:
        return MigratingPolicy(self.me, self.shape, self.ledger, decode.DecodeConfig(max_rows=4, max_steps=6), EAGER)

    def decodes(self, command: decode_events.DecodeCommand) -> None:
        match command:
            case decode_events.OfferRow(offer, deadline):
                self.post("source", giving.AskToMove(offer, deadline))
            case decode_events.SealRow(key, pages, tokens):
                self.post("source", giving.Sealed(key, pages, tokens))
            case decode_events.HandOver(row, key, pages, tokens, stages):

                def part() -> None:
                    sequence = self.sequences[row]
                    assert len(sequence.tokens) == tokens + 1
                    assert len(pages) == -(-tokens // self.size)
                    said = tuple(sequence.tokens[sequence.prompt :])
                    first = First(said[-1], mark(said[-1]))
                    self.world.tally["handed over"] += 1
                    self.post("source", giving.Sealed(key, pages, tokens, (first,), Carried(said, stages)))

                self.at_once(part)
            case decode_events.WithdrawRow(key, reason):
                self.post("source", giving.Withdraw(key, reason))
            case decode_events.TellMoved(message):
                self.world.tally["moved"] += 1
                self.world.tally["again"] += message.moves > 1
                self.world.send(self.me, message.ticket.minter, message)
            case decode_events.TellPeer(peer, message):
                self.world.send(self.me, peer, message)
            case _:
                super().decodes(command)

    def give(self, command: giving.SourceCommand) -> None:
        match command:
            case giving.SendOffer(offer):
                self.world.tally["offered"] += 1
                if not self.world.send(self.me, offer.ticket.sink, offer):
                    self.post("source", Refuse(offer.ticket, "no lane"))
            case giving.MoveAsked(key):
                self.post("decode", decode_events.MoveAsked(key))
            case giving.MoveEnded(key, taken, sure, reason):
                self.world.tally["stayed"] += not taken and sure
                self.world.tally["in doubt"] += not sure
                self.post("decode", decode_events.MoveEnded(key, taken, sure, reason))
            case _:
                super().give(command)

    def take(self, command: taking.SinkCommand) -> None:
        match command:
            case taking.AskForMore(message):
                self.world.send(self.me, message.ticket.source, message)
            case taking.AskPolicy(ticket, request, offer):
                self.post("decode", decode_events.Asked(ticket, request, offer))
            case taking.Arrived(ticket, request, firsts, _, carried):
                self.post("decode", decode_events.KvArrived(ticket, request, firsts, (), carried))
            case _:
                super().take(command)

    def heard(self, peer: Identity, message) -> None:
        match message:
            case OfferMigration():
                self.post("sink", message)
            case CaughtUp():
                self.post("source", message)
            case Freeness():
                self.post("decode", message)
            case _:
                super().heard(peer, message)

    def up(self, peer: Identity) -> None:
        super().up(peer)
        if self.role.decodes and self.world.processes[peer].me.name.startswith("d"):
            self.post("decode", decode_events.PeerCame(peer))

    def down(self, peer: Identity) -> None:
        super().down(peer)
        if self.role.decodes and isinstance(self.world.processes[peer], Worker):
            self.post("decode", decode_events.PeerGone(peer))

    def retire(self) -> None:
        if self.alive:
            self.leaving = True
            self.post("decode", decode_events.Drain())
            for other in self.world.processes.values():
                if isinstance(other, together.Gateway) and self.world.link(self.me, other.me).up:
                    other.up(self.me)


class World(together.World):
    moves = True

    def __init__(self, seed: int, faults: float, sizes: Mapping[str, int] | None = None) -> None:
        super().__init__(seed, faults, Worker, sizes)
        self.tally = dict.fromkeys(("offered", "handed over", "moved", "again", "stayed", "in doubt"), 0)


DEPLOYMENT = {"p": (Role.PREFILL, 1, 20), "d": (Role.DECODE, 3, 30)}


UNEQUAL = {"p0": 8, "d0": 8, "d1": 2}


def live(seed: int, faults: float) -> dict[str, int]:
    world = World(seed, faults, UNEQUAL if seed % 2 else None)
    drained = random.Random(seed)
    for _ in range(2):
        name, at = f"d{drained.randrange(2)}", drained.uniform(0.3, 3.0)

        def drain(name: str) -> None:
            world.calm = False  # it takes nothing more, what is on its way to it included
            for process in list(world.processes.values()):
                if process.me.name == name:
                    process.retire()

        world.at(at, partial(drain, name))
    play(world, DEPLOYMENT, faults, longest=30)
    return world.tally


@pytest.mark.parametrize(
    "seeds", [range(6), pytest.param(range(6, 200), marks=pytest.mark.slow)], ids=["quick", "long"]
)
@pytest.mark.parametrize("faults", [0.0, 1.0], ids=["calm", "faults"])
def test_rows_move_and_no_token_is_lost_or_repeated(seeds, faults):
    total: dict[str, int] = {}
    for seed in seeds:
        for what, count in live(seed, faults).items():
            total[what] = total.get(what, 0) + count
    assert min(total["moved"], total["stayed"]) >= len(seeds), total
    if len(seeds) > 100:
        assert total["again"], total
        assert not faults or total["in doubt"], total


class TwoWorkers(RuleBasedStateMachine):
    """Two decode workers that give each other rows, over a link that is late, breaks, and comes back."""

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed):
        self.world = world = World(seed, 0.0, {"d1": (2, 4, 8)[seed % 3]})
        world.calm = False
        for name, role, pages in (("p0", Role.PREFILL, 30), ("d0", Role.DECODE, 24), ("d1", Role.DECODE, 24)):
            world.join(Worker(world, Identity(name, 1), role, pages))
        self.gateway = together.Gateway(world, Identity("g0", 1))
        world.join(self.gateway)

    def worker(self, name: str) -> Worker | None:
        living = [each for each in self.world.processes.values() if each.me.name == name and each.alive]
        return living[-1] if living and isinstance(living[-1], Worker) else None

    @rule(
        prompt=st.integers(1, 16),
        most=st.sampled_from([2, 20, 40, 40]),
        n=st.sampled_from([1, 1, 1, 2]),
        stop=st.booleans(),
        count=st.integers(1, 4),
    )
    def ask(self, count, **how):
        for _ in range(count):
            self.one(**how)

    def one(self, prompt, most, n, stop):
        dice = self.world.dice
        tokens = tuple(dice.randrange(together.VOCABULARY) for _ in range(prompt))
        counter = self.gateway.ask(Request("r", tokens, Sampling(most, n=n), timeout_s=500.0))
        if stop:
            self.gateway.stops[counter] = [most // 2 + 1] * n

    @rule(seconds=st.sampled_from([0.002, 0.01, 0.05, 0.2]))
    def wait(self, seconds):
        self.world.run(self.world.now + seconds)

    @rule(data=st.data())
    def client_leaves(self, data):
        under_way = [counter for counter in self.gateway.requests if counter not in self.gateway.ends]
        if under_way:
            self.gateway.post("router", front.ClientGone(data.draw(st.sampled_from(under_way)), "left"))

    @rule(ends=st.sampled_from([("d0", "d1"), ("d0", "d1"), ("d0", "g0"), ("d1", "g0"), ("p0", "d0")]), sure=rarely)
    def link_breaks(self, ends, sure):
        one, two = (self.worker(name) if name != "g0" else self.gateway for name in ends)
        if sure and one is not None and two is not None:
            self.world.break_link(one.me, two.me)

    @rule(name=st.sampled_from(["d0", "d1"]), sure=rarely)
    def dies(self, name, sure):
        worker = self.worker(name)
        if sure and worker is not None:
            self.world.kill(worker)

    @rule(name=st.sampled_from(["d0", "d1"]), sure=st.booleans())
    def drains(self, name, sure):
        """Its launcher takes it away in the end: then requests that found no other come again."""
        worker = self.worker(name)
        if sure and worker is not None and not worker.leaving:
            worker.retire()
            worker.later(5.0, lambda: self.world.kill(worker))

    @rule(name=st.sampled_from(["d0", "d1"]))
    def goes_on_from_json(self, name):
        """At any time all three machines of a worker, whose ledger is one, may be written and read again."""
        worker = self.worker(name)
        if worker is not None and not worker.queue:
            machines = [worker.decode, worker.source, worker.sink]
            copies = load(written(machines), list)
            assert sets_sorted(written(copies)) == sets_sorted(written(machines))
            worker.decode, worker.source, worker.sink = copies
            worker.ledger = worker.decode._ledger
            assert worker.sink._ledger is worker.ledger
            for seat, machine in zip(("decode", "source", "sink"), copies, strict=True):
                worker.machines[seat] = machine, worker.machines[seat][1]

    def teardown(self):
        if hasattr(self, "world"):
            together.settle(self.world)
            TALLY["moved"] += self.world.tally["moved"]


TALLY = {"moved": 0}


@efforts
def test_two_workers_give_each_other_rows_whatever_happens(effort):
    TALLY["moved"] = 0
    run_state_machine_as_test(TwoWorkers, settings=settings(effort, max_examples=effort.max_examples // 8))
    assert TALLY["moved"] > 2, "rows hardly moved: this proved nothing"
