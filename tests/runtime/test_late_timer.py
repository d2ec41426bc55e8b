"""A process that stood still hears what the others said meanwhile, before it judges any of them silent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from core.worker import Identity
from runtime.driver import STALL_S, Driver
from scheduler.liveness import Connected, Heard, How, Liveness, Lost

A, B = Identity("a", 1), Identity("b", 2)
SILENCE_S = 3.5


class Clock(asyncio.SelectorEventLoop):
    """A loop on which time passes only when told to; to everybody on it, the process stood still for that time."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s

    def stand_still(self, seconds: float) -> None:
        self.now_s += seconds


Scene = Callable[[Clock, Driver, list[Lost]], Coroutine[None, None, None]]


def play(scene: Scene, armed: int = 1) -> list[Lost]:
    """Who is lost after `scene`, in which A and B are watched from the start; the timer is set in the loop's next turn,
    which comes before the scene unless `armed` is 0."""
    lost: list[Lost] = []
    clock = Clock()

    async def main() -> None:
        driver = Driver(check=True)
        driver.seat("liveness", Liveness(silence_s=SILENCE_S, grace_s=0.0), lost.append)
        for who in (A, B):
            driver.post("liveness", Connected(who))
        await turns(armed)
        await scene(clock, driver, lost)
        driver.close()

    with asyncio.Runner(loop_factory=lambda: clock) as runner:
        runner.run(main())
    return lost


async def turns(count: int) -> None:
    """Let the loop go round: a message needs some rounds from the socket to its machine."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("armed", [0, 1])
@pytest.mark.parametrize("rounds", [1, 5, 50])
def test_nobody_is_lost_who_spoke_while_we_stood_still(rounds, armed):
    async def scene(clock, driver, lost):
        clock.stand_still(60)
        await turns(rounds)
        driver.post("liveness", Heard(A))
        driver.post("liveness", Heard(B))
        await turns(5)

    assert play(scene, armed) == []


@pytest.mark.parametrize("rounds", [0, 1, 50])
def test_one_that_is_heard_first_does_not_cost_the_others_their_hearing(rounds):
    async def scene(clock, driver, lost):
        clock.stand_still(60)
        await turns(rounds)
        driver.post("liveness", Heard(A))
        await turns(5)
        driver.post("liveness", Heard(B))
        await turns(5)

    assert play(scene) == []


def test_who_says_nothing_even_then_is_lost():
    async def scene(clock, driver, lost):
        clock.stand_still(60)
        await turns(5)
        driver.post("liveness", Heard(A))
        await turns(5)
        assert lost == []
        clock.stand_still(STALL_S / 2)
        await turns(5)

    assert play(scene) == [Lost(B, How.SILENT)]


def test_a_process_that_is_always_late_still_judges():
    """It stands still again whenever it would judge: that is put off once, not for ever."""

    async def scene(clock, driver, lost):
        for _ in range(2):
            clock.stand_still(60)
            await turns(5)

    assert len(play(scene)) == 2


def test_a_timer_that_is_a_little_late_judges_at_once():
    async def scene(clock, driver, lost):
        clock.stand_still(SILENCE_S + STALL_S / 2)
        await turns(5)

    assert len(play(scene)) == 2
