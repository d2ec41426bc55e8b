"""The prefill shell and its policy with engines whose steps stop: a prompt overtakes another in mid-step."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from core.errors import LocalError
from core.kv import KvShape
from core.messages import Cancel, Failed, Finished, Message, Offer, Prompt, Tokens
from core.pages import Owner, Pages
from core.request import Request
from core.sampling import Sampling
from engine.engine import TorchEngine
from engine.paced import LAYERS, PacedEngine
from prefill.shell import PrefillShell
from runtime.driver import Driver
from runtime.jobs import JobThread
from scheduler.prefill_events import ChunkDone, GatewayGone, Resume, RunChunk, Span, Suspend, Suspended
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy
from tests.cast import GATEWAY, P1, ticket
from tests.checkpoints import make_llama
from tests.decode.test_shell import Scripted
from tests.engine.play import alone
from tests.live.forced import Eager
from tests.runtime.test_shells import Silent

PROMPTS = {1: tuple(random.Random(1).choices(range(2, 128), k=90)), 2: tuple(range(5, 25)), 3: tuple(range(40, 47))}
STOPS = {"torch": 4, "paced": LAYERS - 1}


class Slow:
    """The engine, whose first step waits before its `at`th operator until it is to stop, for `wait_s` at most."""

    def __init__(self, engine: Any, at: int, wait_s: float = 5.0, *, fails: bool = False) -> None:
        self._engine, self._at, self._wait_s, self._fails = engine, at, wait_s, fails
        self.waits = False
        self.others = threading.Event()
        """Steps after the first may begin."""
        self.others.set()
        self._first = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def begin(self, rows):
        step = self._engine.begin(rows)
        if not self._first:
            self.others.wait(self._wait_s)
            return step
        self._first = False
        return Waiting(self, step)

    def wait(self, pause: Callable[[], bool]) -> bool:
        self._at -= 1
        if self._at == 0:
            self.waits, until = True, time.monotonic() + self._wait_s
            while not pause() and time.monotonic() < until:
                time.sleep(0.001)
        return pause()


class Waiting:
    """A step of `Slow`."""

    def __init__(self, slow: Slow, step: Any) -> None:
        self._slow, self._step, self._stopped = slow, step, False

    def run(self, pause):
        if self._stopped and self._slow._fails:
            raise ArithmeticError("cursed")
        found = self._step.run(lambda: self._slow.wait(pause))
        self._stopped = found is None
        return found


@pytest.fixture(scope="module", params=["torch", "paced"])
def engine(request, tmp_path_factory):
    folder = make_llama(tmp_path_factory.mktemp("model"))
    options: dict[str, Any] = {"kv_memory": 2**18, "page_tokens": 16, "hash_logits": True}
    one = TorchEngine(folder, exact=True, threads=1, **options) if request.param == "torch" else None
    return request.param, one or PacedEngine(folder, **options)


class Stage:
    """A prefill worker's shell, and what its gateways hear."""

    def __init__(self, engine: Any, machine: Any = None, kv: KvShape | None = None, preempt: bool = True) -> None:
        self.heard: list[Message] = []
        self.bugs: list[BaseException] = []
        self.engine = engine
        self.ledger = Pages(engine.pages)
        self.driver = Driver(self.bugs.append, check=True)
        self.driver.seat("source", Silent(), lambda command: None)
        self.thread = JobThread("engine", self.bugs.append)
        settings = PrefillConfig(preempt=preempt)
        self.policy = PrefillPolicy(P1, engine.kv, self.ledger, settings, Eager())
        self.shell = PrefillShell(
            machine or self.policy,
            self.driver,
            engine,
            self.thread,
            lambda to, said: self.heard.append(said),
            preempt=preempt,
        )

    def ask(self, counter: int, sampling: Sampling) -> None:
        prompt = PROMPTS[counter]
        self.driver.post("prefill", Offer(ticket(counter), len(prompt), 1, 10.0))
        self.driver.post("prefill", Prompt(ticket(counter), Request("r", prompt, sampling, 100.0)))

    async def until(self, done: Callable[[], object]) -> None:
        for _ in range(5_000):
            if done():
                return
            await asyncio.sleep(0.002)
        pytest.fail("it takes too long")

    def over(self) -> list[int]:
        """Counters of those that have ended, in order."""
        return [said.ticket.counter for said in self.heard if isinstance(said, Finished | Failed)]

    def close(self) -> None:
        """Nothing is left."""
        self.thread.close()
        self.driver.close()
        assert not self.bugs
        assert self.ledger.counts()[Owner.FREE] == self.engine.pages
        assert not self.engine._sequences._known
        assert self.shell._suspended is None


def play(scene: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(scene(), 30))


@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, temperature=0.8, seed=4)], ids=["greedy", "seeded"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_prompt_overtakes_one_in_the_middle_of_its_step_and_both_say_the_same(engine, share, sampling):
    kind, one = engine
    at = 1 + round(share * (STOPS[kind] - 1))
    want = {counter: alone(one, prompt, sampling)[0] for counter, prompt in PROMPTS.items()}

    async def scene() -> Stage:
        stage = Stage(Slow(one, at))
        stage.ask(1, sampling)
        await stage.until(lambda: stage.engine.waits)
        stage.ask(2, sampling)
        stage.ask(3, sampling)
        await stage.until(lambda: len(stage.over()) == 3)
        stage.close()
        return stage

    stage = play(scene)
    assert stage.policy.suspensions == 1
    assert stage.over() == [2, 3, 1]
    for said in stage.heard:
        if isinstance(said, Tokens):
            sample = want[said.ticket.counter]
            assert (said.tokens, said.logits_hashes) == ((sample.token,), (sample.logits_hash,))


@pytest.mark.parametrize("event", [Cancel(ticket(1), "left"), GatewayGone(GATEWAY)], ids=["cancel", "gateway"])
def test_who_leaves_while_its_step_has_stopped_leaves_nothing(engine, event):
    """Its step goes on to its end, and is told to nobody."""
    _, one = engine

    async def scene() -> Stage:
        stage = Stage(Slow(one, 3))
        stage.ask(1, Sampling(1))
        await stage.until(lambda: stage.engine.waits)
        stage.engine.others.clear()
        stage.ask(2, Sampling(1))
        await stage.until(lambda: stage.policy.suspensions)
        stage.driver.post("prefill", event)
        stage.engine.others.set()
        await stage.until(lambda: stage.policy._running is None and not stage.policy._requests)
        stage.close()
        return stage

    stage = play(scene)
    assert 1 not in stage.over()


def test_a_step_that_fails_when_it_goes_on_hands_its_requests_back(engine):
    _, one = engine

    async def scene() -> Stage:
        stage = Stage(Slow(one, 3, fails=True))
        stage.ask(1, Sampling(1))
        await stage.until(lambda: stage.engine.waits)
        stage.ask(2, Sampling(1))
        await stage.until(lambda: len(stage.over()) == 2)
        stage.ask(3, Sampling(1))
        await stage.until(lambda: len(stage.over()) == 3)
        stage.close()
        return stage

    heard = {said.ticket.counter: said for said in play(scene).heard}
    assert isinstance(heard[1], Failed)
    assert heard[1].code == "INTERNAL"
    assert isinstance(heard[3], Finished)


def test_without_preemption_nobody_overtakes(engine):
    _, one = engine

    async def scene() -> Stage:
        stage = Stage(Slow(one, 1, 0.0), preempt=False)
        for counter in PROMPTS:
            stage.ask(counter, Sampling(1))
        await stage.until(lambda: len(stage.over()) == 3)
        stage.close()
        return stage

    stage = play(scene)
    assert stage.over() == [1, 2, 3]
    assert stage.policy.suspensions == 0
    assert not stage.engine.waits, "its steps ask nobody whether they are to stop"


def test_a_worker_that_ends_while_a_step_has_stopped_ends(engine):
    _, one = engine

    async def scene() -> None:
        stage = Stage(Slow(one, 3), machine=Scripted([RunChunk(1, (Span("a", 0, 90),))], [Suspend(1)]))
        one.open("prefill a", PROMPTS[1], range(6), Sampling(1), 90)
        stage.driver.post("prefill", ChunkDone(0, ()))
        await stage.until(lambda: stage.engine.waits)
        stage.driver.post("prefill", ChunkDone(0, ()))
        await stage.until(lambda: stage.shell._suspended)
        stage.thread.close()
        stage.driver.close()
        assert not stage.bugs
        one.close("prefill a")

    play(scene)


@pytest.mark.parametrize("run_id", [1, 7])
def test_to_go_on_with_what_has_not_stopped_is_a_bug(engine, run_id):
    _, one = engine

    async def scene() -> list[BaseException]:
        stage = Stage(one, machine=Scripted([Resume(run_id)]))
        stage.driver.post("prefill", Suspended(1))
        await stage.until(lambda: stage.bugs)
        stage.thread.close()
        stage.driver.close()
        return stage.bugs

    (bug,) = play(scene)
    assert isinstance(bug, LocalError)
    assert f"run {run_id} is to go on" in str(bug)


def test_a_word_to_stop_is_for_the_run_that_it_names(engine):
    """It may come when that run is over, and the next must not obey."""
    _, one = engine

    async def scene() -> list[Any]:
        machine = Scripted([Suspend(1), RunChunk(2, (Span("a", 0, 90),))])
        stage = Stage(one, machine=machine)
        one.open("prefill a", PROMPTS[1], range(6), Sampling(5), 90)
        stage.shell._tickets["a"] = ticket(1)
        stage.driver.post("prefill", Suspended(1))
        await stage.until(lambda: len(machine.events) == 2)
        stage.thread.close()
        stage.driver.close()
        one.close("prefill a")
        assert not stage.bugs
        return machine.events

    assert isinstance(play(scene)[1], ChunkDone)
