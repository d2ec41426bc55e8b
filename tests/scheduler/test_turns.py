"""Sessions whose next turn finds what the one before left, wherever that is: pull-back, prefix fetch, kept answers.

The engines, streams and routers are those of test_together.py: a page that was fetched and is not what its name says
gives a wrong token. The router tells a prefill worker who may have more of a prompt, and that one decides.
"""

from __future__ import annotations

from functools import partial

import pytest

from core.prefix import page_hashes
from core.request import Phase, Request
from core.sampling import Sampling
from core.worker import Identity, Role
from scheduler import prefill_events
from scheduler import prefill_policy as prefill
from tests.cast import SHAPE
from tests.scheduler import test_together as together
from tests.scheduler.test_together import PAGE, VOCABULARY, settle
from transfer import sink as taking

TURNS = 4


class Worker(together.Worker):
    """Counts what it fetches, and what it computes of each prompt."""

    world: World

    def take(self, command: taking.SinkCommand) -> None:
        if isinstance(command, taking.Fetched):
            self.world.fetched[command.ticket.key] = command.reason
            self.world.fetched_pages += command.pull.nbytes // SHAPE.page_nbytes if command.pull else 0
        super().take(command)

    def prefills(self, command: prefill_events.PrefillCommand) -> None:
        self.world.asked += isinstance(command, prefill_events.FetchPages)
        super().prefills(command)

    def chunk(self, command: prefill_events.RunChunk) -> None:
        for span in command.spans:
            key = self.sequences[prefill.holder(span.key)].ticket.key
            self.world.computed[key] = self.world.computed.get(key, 0) + span.stop - span.start
        super().chunk(command)


class World(together.World):
    fetches = True

    def __init__(self, seed: int, faults: float) -> None:
        super().__init__(seed, faults, Worker)
        self.asked = 0
        self.fetched: dict[str, str] = {}
        self.fetched_pages = 0
        self.computed: dict[str, int] = {}
        """Prompt tokens, by ticket."""


def sessions(world: World, prefills: int, decodes: int, faults: float, many: int = 3) -> list[tuple[int, int, int]]:
    """So many sessions of a few turns at one gateway. Of each turn but the first of each: tokens of its prompt, of the
    conversation before it that had KV somewhere, and how many were computed."""
    dice = world.dice
    for letter, role, count, pages in (("p", Role.PREFILL, prefills, 40), ("d", Role.DECODE, decodes, 40)):
        for index in range(count):
            world.join(Worker(world, Identity(f"{letter}{index}", 1), role, pages))
    gateway = together.Gateway(world, Identity("g0", 1))
    world.join(gateway)
    told: list[tuple[int, int, int]] = []

    def ask(prompt: tuple[int, ...], turn: int, before: int) -> None:
        request = Request("r", prompt, Sampling(dice.randint(4, 11)), 500.0, prefix=page_hashes(prompt, PAGE))
        counter = gateway.ask(request)
        gateway.later(0.05, lambda: look(counter, request, turn, before))

    def look(counter: int, request: Request, turn: int, before: int) -> None:
        if counter not in gateway.ends:
            gateway.later(0.05, lambda: look(counter, request, turn, before))
            return
        if turn:
            told.append((len(request.prompt), before, world.computed.get(f"{gateway.me}/{counter}.1", 0)))
        if gateway.ends[counter].phase is not Phase.DONE or turn == TURNS - 1:
            return
        said = (*request.prompt, *gateway.got[counter][0])
        prompt = said + tuple(dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 5)))
        gateway.later(0.1, lambda: ask(prompt, turn + 1, len(said) - 1))

    def trouble() -> None:
        living = [each for each in world.processes.values() if isinstance(each, Worker) and each.alive]
        if len(living) < 2:
            return
        if dice.random() < 0.3:
            world.kill(dice.choice(living))
        else:
            one, two = dice.sample(living, 2)
            world.break_link(one.me, two.me)

    for session in range(many):
        first = tuple(dice.randrange(VOCABULARY) for _ in range(dice.randint(4, 12)))
        world.at(0.1 * session, partial(ask, first, 0, 0))
    for _ in range(int(faults * 12)):
        world.at(dice.uniform(0.0, 4.0), trouble)
    world.run(4.0)
    settle(world)
    assert len(world.fetched) == world.asked or faults, "a fetch hangs"
    return told


@pytest.mark.parametrize(("prefills", "decodes"), [(1, 1), (2, 1), (2, 2)])
def test_no_turn_computes_what_was_generated_before(prefills, decodes):
    for seed in range(4):
        world = World(seed, 0.0)
        told = sessions(world, prefills, decodes, 0.0)
        assert len(told) == 3 * (TURNS - 1)
        for prompt, before, computed in told:
            assert computed == prompt - min(before, prompt - 1) // PAGE * PAGE, "computed although somebody had it"
        assert world.fetched_pages >= 3 * (TURNS - 1)
        assert set(world.fetched.values()) == {""}


@pytest.mark.parametrize(
    "seeds", [range(6), pytest.param(range(6, 200), marks=pytest.mark.slow)], ids=["quick", "long"]
)
def test_with_faults_no_turn_says_anything_wrong_and_nothing_is_left(seeds):
    pages, failed = 0, set()
    for seed in seeds:
        world = World(seed, 1.0)
        sessions(world, 2, 2, 1.0)
        pages += world.fetched_pages
        failed |= {reason for reason in world.fetched.values() if reason}
    assert pages
    assert failed, "nothing ever went wrong"
