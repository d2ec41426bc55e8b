"""The simulator's driver: a heap of what happens when, and processes whose machines run to completion.

The counterpart of `runtime/driver.py`: the same FIFO, the same timer over all machines of a process, and time that
jumps. At equal times what ends a step comes first, then reads, messages, timers and arrivals; among those the process
that joined earlier, then what was put there earlier. Nothing depends on hashes or on addresses.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
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
        self.check_every = check_every
        self.processes: list[Process] = []
        """All that have been here, the dead among them."""
        self.stopped = False
        """Set it, and `run` returns after this turn."""
        self._agenda: list[tuple[float, int, int, int, Callable[..., None], Any]] = []
        self._put = 0

    @property
    def events(self) -> int:
        """Events that machines have taken."""
        return sum(process.events for process in self.processes)

    @property
    def pending(self) -> int:
        """Entries on the agenda, stale alarms among them."""
        return len(self._agenda)

    def at(self, when: float, kind: Kind, order: int, call: Callable[..., None], argument: Any = None) -> None:
        """Have `call(argument)` made at `when`, which is not in the past."""
        self._put += 1
        heappush(self._agenda, (when, kind, order, self._put, call, argument))

    def run(self, until: float = float("inf")) -> None:
        """Until nothing is left to do, or that time, or somebody has set `stopped`."""
        agenda = self._agenda
        since, spins = -1.0, 0
        while agenda:
            entry = heappop(agenda)
            when, _, _, _, call, argument = entry
            if when != since:
                if when > until:
                    heappush(agenda, entry)
                    break
                self.now = since = when
                spins = 0
            elif spins < SPIN:
                spins += 1
            else:
                raise LocalError(f"loop: got {spins + 1} turns at {when} s, want time to pass")
            call(argument)
            if self.stopped:
                self.stopped = False
                return
        if until != float("inf"):
            self.now = max(self.now, until)


class Seat:
    """A machine and the shell that performs its commands."""

    __slots__ = ("alone", "fresh", "machine", "on", "perform")

    def __init__(self, machine: Machine[Any, Any], perform: Callable[[Any], None], alone: bool) -> None:
        self.machine = machine
        self.on = machine.on
        self.perform = perform
        self.alone = alone
        """Its deadline is changed by its own events only; others may be woken by memory that somebody else freed."""
        self.fresh = True
        """It has had an event since it was asked for its deadline, or the alarm that was set for it has rung."""

    def count(self) -> Counter[str]:
        """From now on, its commands are counted there by kind."""
        counts: Counter[str] = Counter()
        perform = self.perform

        def counted(command: Any) -> None:
            counts[type(command).__name__] += 1
            perform(command)

        self.perform = counted
        return counts


class Process:
    """One FIFO, its machines, and one timer over all their deadlines."""

    def __init__(self, loop: Loop, order: int) -> None:
        self.loop = loop
        self.order = order
        """Its rank at equal times."""
        self.alive = True
        self.events = 0
        """That its machines have taken."""
        self._seats: list[Seat] = []
        self._queue: deque[tuple[Seat, Any]] = deque()
        self._draining = False
        self._alarm = float("inf")
        self._unchecked = max(1, loop.check_every - order % 97)
        """Events until the machines' invariants are looked at; not of all processes at the same time."""
        loop.processes.append(self)

    def seat(self, machine: Machine[Any, Any], perform: Callable[[Any], None], *, alone: bool = False) -> Seat:
        """Give a machine its place here."""
        seat = Seat(machine, perform, alone)
        self._seats.append(seat)
        return seat

    def unseat(self, seat: Seat) -> None:
        """Its machine has no events coming, and gets none any more."""
        self._seats.remove(seat)

    @property
    def seats(self) -> tuple[Seat, ...]:
        """All machines here, in the order of joining."""
        return tuple(self._seats)

    def post(self, seat: Seat, event: Any) -> None:
        """Give the machine an event, after everything posted before; nothing happens to the dead."""
        queue = self._queue
        if self._draining:
            queue.append((seat, event))
            return
        if not self.alive:
            return
        now, count = self.loop.now, 1
        self._draining = True
        try:
            while True:
                seat.fresh = True
                perform = seat.perform
                for command in seat.on(event, now):
                    perform(command)
                if not queue:
                    break
                count += 1
                seat, event = queue.popleft()
        finally:
            self._draining = False
        self.events += count
        self._unchecked -= count
        if self._unchecked <= 0:
            self._check()
        self._arm()

    def _check(self) -> None:
        self._unchecked = self.loop.check_every
        for seat in self._seats:
            seat.machine.check()

    def _arm(self) -> None:
        """One alarm is under way for the earliest deadline; an older, later one finds nothing to do."""
        due = alarm = self._alarm
        for seat in self._seats:
            if seat.fresh or not seat.alone:
                seat.fresh = False
                when = seat.machine.deadline()
                if when is not None and when < due:
                    due = when
        if due < alarm:
            now = self.loop.now
            self._alarm = due = due if due > now else now
            self.loop.at(due, Kind.TIMER, self.order, self._ring, due)

    def _ring(self, alarm: float) -> None:
        if alarm != self._alarm or not self.alive:
            return
        self._alarm = float("inf")
        now = self.loop.now
        late = []
        for seat in self._seats:
            seat.fresh = True
            when = seat.machine.deadline()
            if when is not None and when <= now:
                late.append(seat)
        if late:
            self._queue.extend([(seat, None) for seat in late[1:]])
            self.post(late[0], None)
        else:
            self._arm()
