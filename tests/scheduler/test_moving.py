"""Rows that move between decode workers: all machines together, with late, broken and lying links, and by hand.

The engines, streams and routers are those of test_together.py: the client's tokens are compared with what the model
says, so that a token that is lost, repeated, or made of KV that did not arrive is seen at once.
"""

from __future__ import annotations

import random
from functools import partial

import pytest

from core.messages import Carried, CaughtUp, First, Freeness, OfferMigration, Refuse
from core.worker import Identity, Role
from scheduler import decode_policy as decode
from scheduler.decode_migrating import MigratingPolicy
from scheduler.migration import MigrationConfig
from tests.cast import SHAPE
from tests.scheduler import test_together as together
from tests.scheduler.test_together import PAGE, mark, play
from transfer import sink as taking
from transfer import source as giving

EAGER = MigrationConfig(
    below_steps=30, above_steps=30, max_stages=2, last_pages=1, ahead_tokens=7, deadline_s=1.0, retry_s=0.1
)


class Worker(together.Worker):
    """Does what a policy with migration commands, beside the rest."""

    def policy(self) -> decode.DecodePolicy:
        return MigratingPolicy(self.me, SHAPE, self.ledger, decode.DecodeConfig(max_rows=4, max_steps=6), EAGER)

    def decodes(self, command: decode.DecodeCommand) -> None:
        match command:
            case decode.OfferRow(offer, deadline):
                self.post("source", giving.AskToMove(offer, deadline))
            case decode.SealRow(key, pages, tokens):
                self.post("source", giving.Sealed(key, pages, tokens))
            case decode.HandOver(row, key, pages, tokens, stages):

                def part() -> None:
                    sequence = self.sequences[row]
                    assert len(sequence.tokens) == tokens + 1
                    assert len(pages) == -(-tokens // PAGE)
                    said = tuple(sequence.tokens[sequence.prompt :])
                    first = First(said[-1], mark(said[-1]))
                    self.world.tally["handed over"] += 1
                    self.post("source", giving.Sealed(key, pages, tokens, (first,), Carried(said, stages)))

                self.at_once(part)
            case decode.WithdrawRow(key, reason):
                self.post("source", giving.Withdraw(key, reason))
            case decode.TellMoved(message):
                self.world.tally["moved"] += 1
                self.world.tally["again"] += message.moves > 1
                self.world.send(self.me, message.ticket.minter, message)
            case decode.TellPeer(peer, message):
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
                self.post("decode", decode.MoveAsked(key))
            case giving.MoveEnded(key, taken, sure, reason):
                self.world.tally["stayed"] += not taken and sure
                self.world.tally["in doubt"] += not sure
                self.post("decode", decode.MoveEnded(key, taken, sure, reason))
            case _:
                super().give(command)

    def take(self, command: taking.SinkCommand) -> None:
        match command:
            case taking.AskForMore(message):
                self.world.send(self.me, message.ticket.source, message)
            case taking.AskPolicy(ticket, request, offer):
                self.post("decode", decode.Asked(ticket, request, offer))
            case taking.Arrived(ticket, request, firsts, _, carried):
                self.post("decode", decode.KvArrived(ticket, request, firsts, (), carried))
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
            self.post("decode", decode.PeerCame(peer))

    def down(self, peer: Identity) -> None:
        super().down(peer)
        if self.role.decodes and isinstance(self.world.processes[peer], Worker):
            self.post("decode", decode.PeerGone(peer))

    def retire(self) -> None:
        if self.alive:
            self.leaving = True
            self.post("decode", decode.Drain())
            for other in self.world.processes.values():
                if isinstance(other, together.Gateway) and self.world.link(self.me, other.me).up:
                    other.up(self.me)


class World(together.World):
    moves = True

    def __init__(self, seed: int, faults: float) -> None:
        super().__init__(seed, faults, Worker)
        self.tally = dict.fromkeys(("offered", "handed over", "moved", "again", "stayed", "in doubt"), 0)


DEPLOYMENT = {"p": (Role.PREFILL, 1, 20), "d": (Role.DECODE, 3, 30)}


def live(seed: int, faults: float) -> dict[str, int]:
    world = World(seed, faults)
    drained = random.Random(seed)
    for _ in range(2):
        name, at = f"d{drained.randrange(2)}", drained.uniform(0.3, 3.0)

        def drain(name: str) -> None:
            for process in list(world.processes.values()):
                if process.me.name == name:
                    process.retire()

        world.at(at, partial(drain, name))
    play(world, DEPLOYMENT, faults, longest=30)
    return world.tally


@pytest.mark.parametrize(
    "seeds", [range(12), pytest.param(range(12, 300), marks=pytest.mark.slow)], ids=["quick", "long"]
)
@pytest.mark.parametrize("faults", [0.0, 1.0], ids=["calm", "faults"])
def test_rows_move_and_no_token_is_lost_or_repeated(seeds, faults):
    total: dict[str, int] = {}
    for seed in seeds:
        for what, count in live(seed, faults).items():
            total[what] = total.get(what, 0) + count
    assert total["moved"] > 3 * len(seeds), total
    assert total["stayed"] > len(seeds), total
    assert total["again"], total
    if faults:
        assert total["in doubt"], total
