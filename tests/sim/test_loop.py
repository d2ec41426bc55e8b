"""The simulator's driver: order at equal times, one alarm for all deadlines, and no spinning."""

from __future__ import annotations

import pytest

from core.errors import LocalError
from sim.loop import SPIN, Kind, Loop, Process


class Clock:
    """A machine that wants to be called at given times, and says when it was."""

    def __init__(self, *dues: float) -> None:
        self.dues = list(dues)
        self.heard: list[tuple[object, float]] = []
        self.checked = 0

    def on(self, event, now):
        self.heard.append((event, now))
        if event is None:
            self.dues.pop(0)
        return [event] if isinstance(event, str) else []

    def deadline(self):
        return self.dues[0] if self.dues else None

    def check(self):
        self.checked += 1


def test_at_equal_times_kind_then_process_then_order_of_putting():
    loop, said = Loop(), []
    for kind, order, name in (
        (Kind.ARRIVAL, 0, "arrival"),
        (Kind.MESSAGE, 2, "message of 2, first"),
        (Kind.MESSAGE, 2, "message of 2, second"),
        (Kind.MESSAGE, 1, "message of 1"),
        (Kind.TIMER, 0, "timer"),
        (Kind.STEP, 9, "step"),
        (Kind.READ, 9, "read"),
    ):
        loop.at(1.0, kind, order, said.append, name)
    loop.at(0.5, Kind.FAULT, 0, said.append, "earlier")
    loop.run()
    assert said == [
        "earlier", "step", "read", "message of 1", "message of 2, first", "message of 2, second", "timer", "arrival",
    ]  # fmt: skip
    assert loop.now == 1.0


def test_until_leaves_the_rest_for_later():
    loop, said = Loop(), []
    loop.at(1.0, Kind.TIMER, 0, said.append, 1)
    loop.at(3.0, Kind.TIMER, 0, said.append, 3)
    loop.run(2.0)
    assert (said, loop.now) == ([1], 2.0)
    loop.run()
    assert (said, loop.now) == ([1, 3], 3.0)


def test_who_stops_it_has_the_last_turn():
    loop, said = Loop(), []

    def say(when: float) -> None:
        said.append(when)
        loop.stopped = when == 2.0

    for when in (1.0, 2.0, 3.0):
        loop.at(when, Kind.TIMER, 0, say, when)
    loop.run()
    assert said == [1.0, 2.0]
    loop.run()
    assert said == [1.0, 2.0, 3.0]


def test_a_loop_without_time_passing_is_an_error():
    loop = Loop()

    def again(_: object) -> None:
        loop.at(loop.now, Kind.TIMER, 0, again)

    again(None)
    with pytest.raises(LocalError, match=f"{SPIN + 1} turns at 0.0 s"):
        loop.run()


def test_every_machine_of_a_process_is_called_at_its_deadlines():
    loop = Loop()
    process, one, two = Process(loop, 0), Clock(1.0, 2.0), Clock(1.0, 1.5)
    seats = [process.seat(machine, lambda command: None) for machine in (one, two)]
    process.post(seats[0], "go")
    loop.run()
    assert one.heard == [("go", 0.0), (None, 1.0), (None, 2.0)]
    assert two.heard == [(None, 1.0), (None, 1.5)]


def test_a_deadline_that_moves_closer_is_kept():
    loop = Loop()
    process, clock = Process(loop, 0), Clock(5.0)
    seat = process.seat(clock, lambda command: None)
    process.post(seat, 1)

    def closer(_: object) -> None:
        clock.dues = [2.0]
        process.post(seat, 2)

    loop.at(1.0, Kind.MESSAGE, 0, closer)
    loop.run()
    assert clock.heard == [(1, 0.0), (2, 1.0), (None, 2.0)]


def test_events_posted_by_commands_come_after_those_before():
    loop = Loop()
    process, clock = Process(loop, 0), Clock()

    def perform(command: str) -> None:
        if len(command) < 3:
            process.post(seat, command + "!")

    seat = process.seat(clock, perform)
    process.post(seat, "a")
    assert [event for event, _ in clock.heard] == ["a", "a!", "a!!"]


def test_the_dead_hear_nothing():
    loop = Loop()
    process, clock = Process(loop, 0), Clock(1.0)
    seat = process.seat(clock, lambda command: None)
    process.post(seat, 1)
    process.alive = False
    process.post(seat, 2)
    loop.run()
    assert clock.heard == [(1, 0.0)]


def test_invariants_are_looked_at_now_and_then():
    loop = Loop(check_every=10)
    process, clock = Process(loop, 0), Clock()
    seat = process.seat(clock, lambda command: None)
    for event in range(95):
        process.post(seat, event)
    assert clock.checked == 9
    assert loop.events == 95


def test_one_who_is_alone_is_asked_for_its_deadline_after_its_own_events_only():
    loop = Loop()
    process, alone, other = Process(loop, 0), Clock(), Clock()
    seats = [process.seat(alone, lambda command: None, alone=True), process.seat(other, lambda command: None)]
    process.post(seats[1], 1)
    alone.dues = [2.0]
    process.post(seats[1], 2)
    assert loop.pending == 0
    process.post(seats[0], 3)
    assert loop.pending == 1
    loop.run()
    assert alone.heard == [(3, 0.0), (None, 2.0)]
