"""The driver: one FIFO, one timer, and a machine that fails alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from core.errors import RemoteError
from runtime.driver import Driver


class Echo:
    """Repeats each event as a command and writes down what it was given."""

    def __init__(self, heard: list[Any], due: float | None = None) -> None:
        self.heard = heard
        self.due = due
        self.checked = 0

    def on(self, event: object, now: float) -> list[object]:
        self.heard.append(event)
        if event is None:
            self.due = None
        if isinstance(event, Exception):
            raise event
        return [event]

    def deadline(self) -> float | None:
        return self.due

    def check(self) -> None:
        self.checked += 1
        assert "broken" not in self.heard


def nothing(command: object) -> None:
    """Performs no command."""


def run(scene: Callable[[], object]) -> None:
    """Call `scene` on an event loop, and let it finish if it is a coroutine."""

    async def main() -> None:
        result = scene()
        if asyncio.iscoroutine(result):
            await asyncio.wait_for(result, 5)

    asyncio.run(main())


def test_events_are_taken_in_the_order_of_posting_across_machines():
    def scene():
        driver, order = Driver(), []

        def perform(command):
            if command == 1:
                driver.post("b", 2)
                driver.post("a", 3)
                driver.post("b", 4)
                order.append("posted")

        driver.seat("a", Echo(order), perform)
        driver.seat("b", Echo(order), perform)
        driver.post("a", 1)
        assert order == [1, "posted", 2, 3, 4]
        assert driver.turns == 4

    run(scene)


def test_all_commands_of_an_event_are_performed_before_the_next_event():
    def scene():
        driver, order = Driver(), []

        class Pair(Echo):
            def on(self, event, now):
                return [(event, 1), (event, 2)]

        def perform(command):
            order.append(command)
            if command == ("x", 1):
                driver.post("pair", "y")

        driver.seat("pair", Pair([]), perform)
        driver.post("pair", "x")
        assert order == [("x", 1), ("x", 2), ("y", 1), ("y", 2)]

    run(scene)


def test_a_deadline_calls_its_machine_and_nobody_else():
    async def scene():
        driver, soon, later = Driver(), [], []
        driver.seat("soon", Echo(soon, driver.now() + 0.02), nothing)
        driver.seat("later", Echo(later, driver.now() + 60), nothing)
        driver.post("later", "hello")
        await asyncio.sleep(0.1)
        assert soon == [None]
        assert later == ["hello"]
        driver.close()

    run(scene)


def test_a_deadline_that_has_passed_already_comes_at_once_and_once():
    async def scene():
        driver, heard = Driver(), []
        driver.seat("late", Echo(heard, float("-inf")), nothing)
        driver.post("late", "hello")
        assert heard == ["hello"]
        await asyncio.sleep(0.01)
        assert heard == ["hello", None]

    run(scene)


def test_a_deadline_may_change_with_every_event():
    async def scene():
        driver, heard = Driver(), []
        machine = Echo(heard, driver.now() + 0.01)
        driver.seat("m", machine, nothing)
        driver.post("m", "armed")
        machine.due = None
        driver.post("m", "disarmed")
        await asyncio.sleep(0.05)
        assert heard == ["armed", "disarmed"]

    run(scene)


def test_no_deadline_comes_after_close():
    async def scene():
        driver, heard = Driver(), []
        driver.seat("m", Echo(heard, driver.now() + 0.01), nothing)
        driver.post("m", "armed")
        driver.close()
        await asyncio.sleep(0.05)
        assert heard == ["armed"]

    run(scene)


def test_a_machine_that_fails_is_reported_and_the_others_go_on():
    def scene():
        bugs, a, b = [], [], []
        driver = Driver(bugs.append)

        def perform(command):
            if command == "go":
                driver.post("b", ValueError("mine"))
                driver.post("a", "after")
                driver.post("b", "still there")

        driver.seat("a", Echo(a), perform)
        driver.seat("b", Echo(b), perform)
        driver.post("a", "go")
        assert [str(bug) for bug in bugs] == ["mine"]
        assert a == ["go", "after"]
        assert b[1:] == ["still there"]

    run(scene)


def test_a_shell_that_fails_is_reported_too():
    def scene():
        bugs = []
        driver = Driver(bugs.append)

        def perform(command):
            raise KeyError(command)

        driver.seat("a", Echo([]), perform)
        driver.post("a", "x")
        assert len(bugs) == 1

    run(scene)


def test_an_event_for_a_seat_that_does_not_exist_is_reported_and_the_others_go_on():
    def scene():
        bugs, heard = [], []
        driver = Driver(bugs.append)

        def perform(command):
            if command == "go":
                driver.post("nobody", 1)
                driver.post("a", "after")

        driver.seat("a", Echo(heard), perform)
        driver.post("a", "go")
        assert heard == ["go", "after"]
        assert len(bugs) == 1

    run(scene)


def test_what_a_peer_did_wrong_is_no_bug():
    def scene():
        bugs = []
        driver = Driver(bugs.append)
        driver.seat("a", Echo([]), nothing)
        driver.post("a", RemoteError("theirs"))
        assert bugs == []

    run(scene)


@pytest.mark.parametrize("check", [False, True])
def test_invariants_are_checked_after_every_event_if_asked_for(check):
    def scene():
        bugs = []
        driver, machine = Driver(bugs.append, check=check), Echo([])
        driver.seat("a", machine, nothing)
        driver.post("a", "fine")
        assert (machine.checked, bugs) == (int(check), [])
        driver.post("a", "broken")
        assert [type(bug) for bug in bugs] == ([AssertionError] if check else [])

    run(scene)


def test_events_come_from_other_threads_through_the_loop():
    async def scene():
        driver, heard = Driver(), []
        driver.seat("a", Echo(heard), nothing)
        await asyncio.to_thread(driver.post_threadsafe, "a", "from afar")
        await asyncio.sleep(0)
        assert heard == ["from afar"]

    run(scene)


def test_an_event_that_comes_after_the_loop_has_closed_is_dropped():
    kept = []

    def scene():
        driver = Driver()
        driver.seat("a", Echo(kept), nothing)
        kept.append(driver)

    run(scene)
    kept.pop().post_threadsafe("a", "too late")
    assert kept == []
