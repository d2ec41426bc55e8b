"""The simulator's driver: a heap of what happens when, and processes whose machines run to completion.

The counterpart of `runtime/driver.py`: the same FIFO, the same timer over all machines of a process, and time that
jumps. At equal times what ends a step comes first, then reads, messages, timers and arrivals; among those the process
that joined earlier, then what was put there earlier. Nothing depends on hashes or on addresses.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush
from typing import Any

from core.errors import LocalError
from core.machine import Machine

CHECK_EVERY = 1000
"""Machines' invariants are looked at every this many events, unless told otherwise."""
SPIN = 10_000
"""So many turns of the loop at one time, and no time passes any more."""


class Kind(IntEnum):
    """What comes first at equal times."""

    STEP = 0
    READ = 1
    MESSAGE = 2
    TIMER = 3
    ARRIVAL = 4
    FAULT = 5


class Loop:
    """Time, and what happens at which time."""

    def __init__(self, *, check_every: int = CHECK_EVERY) -> None:
        self.now = 0.0
        self.turns = 0
        """Entries of the heap taken so far."""
        self.check_every = check_every
        self.events = 0
        """Events that machines have taken."""
        self._agenda: list[tuple[float, int, int, int, Callable[..., None], Any]] = []
        self._put = 0

    @property
    def pending(self) -> int:
        """Entries on the agenda, stale alarms among them."""
        return len(self._agenda)

    def at(self, when: float, kind: Kind, order: int, call: Callable[..., None], argument: Any = None) -> None:
        """Have `call(argument)` made at `when`, which is not in the past."""
        self._put += 1
        heappush(self._agenda, (when, kind, order, self._put, call, argument))

    def run(self, until: float = float("inf"), *, idle: Callable[[], bool] | None = None) -> None:
        """Until nothing is left to do, or that time, or `idle()` after a turn."""
        agenda = self._agenda
        since, spins = -1.0, 0
        while agenda and agenda[0][0] <= until:
            when, _, _, _, call, argument = heappop(agenda)
            spins = spins + 1 if when == since else 0
            if spins > SPIN:
                raise LocalError(f"loop: got {spins} turns at {when} s, want time to pass")
            self.now = since = when
            self.turns += 1
            call(argument)
            if idle is not None and idle():
                return
        if until != float("inf"):
            self.now = max(self.now, until)


@dataclass(slots=True, eq=False)
class Seat:
    """A machine and the shell that performs its commands."""

    machine: Machine[Any, Any]
    perform: Callable[[Any], None]
    counts: Counter[str] | None = None
    """Commands by kind, if somebody wants to know."""


class Process:
    """One FIFO, its machines, and one timer over all their deadlines."""

    def __init__(self, loop: Loop, order: int) -> None:
        self.loop = loop
        self.order = order
        """Its rank at equal times."""
        self.alive = True
        self._seats: list[Seat] = []
        self._queue: deque[tuple[Seat, Any]] = deque()
        self._draining = False
        self._alarm = float("inf")
        self._checked = order % 97

    def seat(self, machine: Machine[Any, Any], perform: Callable[[Any], None]) -> Seat:
        """Give a machine its place here."""
        seat = Seat(machine, perform)
        self._seats.append(seat)
        return seat

    @property
    def seats(self) -> tuple[Seat, ...]:
        """All machines here, in the order of joining."""
        return tuple(self._seats)

    def post(self, seat: Seat, event: Any) -> None:
        """Give the machine an event, after everything posted before; nothing happens to the dead."""
        if not self.alive:
            return
        self._queue.append((seat, event))
        if not self._draining:
            self._drain()

    def _drain(self) -> None:
        loop, queue = self.loop, self._queue
        self._draining = True
        try:
            while queue:
                seat, event = queue.popleft()
                loop.events += 1
                for command in seat.machine.on(event, loop.now):
                    if seat.counts is not None:
                        seat.counts[type(command).__name__] += 1
                    seat.perform(command)
                self._checked += 1
                if self._checked >= loop.check_every:
                    self._checked = 0
                    for each in self._seats:
                        each.machine.check()
        finally:
            self._draining = False
        self._arm()

    def _arm(self) -> None:
        """One alarm is under way for the earliest deadline; an older, later one finds nothing to do."""
        due = self._alarm
        for seat in self._seats:
            when = seat.machine.deadline()
            if when is not None and when < due:
                due = when
        if due < self._alarm:
            self._alarm = due = max(due, self.loop.now)
            self.loop.at(due, Kind.TIMER, self.order, self._ring, due)

    def _ring(self, alarm: float) -> None:
        if alarm != self._alarm or not self.alive:
            return
        self._alarm = float("inf")
        for seat in self._seats:
            when = seat.machine.deadline()
            if when is not None and when <= self.loop.now:
                self._queue.append((seat, None))
        if self._queue:
            self._drain()
        else:
            self._arm()
