"""Joins machines to the world: one FIFO of events, one timer, on the process's event loop.

Nothing else calls a machine. A machine's commands are performed by its shell at once, in order; what they lead to
comes back as events through `post`, from any machine's commands, the engine thread, the transfer thread or a stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.errors import RemoteError
from core.machine import Machine
from runtime.recorder import Recorded, Recorder

log = logging.getLogger("baton.driver")

STALL_S = 0.5
"""A timer that is this late means that the whole process was stopped."""


@dataclass(slots=True)
class _Seat:
    machine: Machine[Any, Any]
    perform: Callable[[Any], None]


class Driver:
    """Runs the machines of one process to completion, event by event, in the order of posting.

    All methods but `post_threadsafe` are called on the loop's thread. An exception out of a machine is a bug of ours:
    it is logged with the event, handed to `on_bug`, and the other machines go on.
    """

    def __init__(self, on_bug: Callable[[BaseException], None] | None = None, *, check: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._seats: dict[str, _Seat] = {}
        self._queue: deque[tuple[str, Any]] = deque()
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._arming: asyncio.Handle | None = None
        self._due = 0.0
        self._patient_until = float("-inf")
        self._on_bug = on_bug
        self._check = check
        self._recorder: Recorder | None = None
        self.turns = 0
        """Events taken; grows while the loop is alive."""

    def now(self) -> float:
        """Seconds on the clock that every machine of this process is given."""
        return self._loop.time()

    def seat(self, name: str, machine: Machine[Any, Any], perform: Callable[[Any], None]) -> None:
        """Add a machine under a name, with the shell that performs its commands."""
        if self._recorder is not None:
            machine = self._recorder.around(name, machine)
        self._seats[name] = _Seat(machine, perform)

    def record(self, recorder: Recorder) -> None:
        """Write down what all machines take from now on. It stands around them: unused it costs nothing."""
        self._recorder = recorder
        for name, seat in self._seats.items():
            seat.machine = recorder.around(name, seat.machine)

    @property
    def machines(self) -> dict[str, Machine[Any, Any]]:
        """All that were added, by their names, in the order in which they were."""
        machines = {name: seat.machine for name, seat in self._seats.items()}
        return {name: each.machine if isinstance(each, Recorded) else each for name, each in machines.items()}

    def post(self, name: str, event: object) -> None:
        """Give `event` to the named machine after everything posted before."""
        self._queue.append((name, event))
        if not self._draining:
            self._drain()

    def post_threadsafe(self, name: str, event: object) -> None:
        """`post` from another thread; after the loop has closed the event is dropped, as nobody is left to hear it."""
        try:
            self._loop.call_soon_threadsafe(self.post, name, event)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def close(self) -> None:
        """No more deadlines."""
        for handle in (self._timer, self._arming):
            if handle is not None:
                handle.cancel()

    def _drain(self) -> None:
        self._draining = True
        try:
            while self._queue:
                name, event = self._queue.popleft()
                self._step(name, event)
        finally:
            self._draining = False
        if self._arming is None:
            # In the loop's next turn: what the events led to, a message to be written for one, goes first.
            self._arming = self._loop.call_soon(self._arm)
            self._due = self.now() if self._timer is None else min(self._due, self.now())

    def _step(self, name: str, event: object) -> None:
        self.turns += 1
        try:
            seat = self._seats[name]
            for command in seat.machine.on(event, self.now()):
                seat.perform(command)
            if self._check:
                seat.machine.check()
        except RemoteError as error:
            log.warning("%s: %s", name, error)
        except Exception as error:
            log.exception("%s failed on %s", name, type(event).__name__)
            if self._on_bug is not None:
                self._on_bug(error)

    def _arm(self) -> None:
        self._arming = None
        self._stalled()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # All of them: machines that share a ledger may be woken by what another freed.
        deadlines = [when for seat in self._seats.values() if (when := seat.machine.deadline()) is not None]
        if deadlines:
            self._due = max(min(deadlines), self.now(), self._patient_until)
            self._timer = self._loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._stalled():
            self._arm()
            return
        now = self.now()
        for name, seat in self._seats.items():
            when = seat.machine.deadline()
            if when is not None and when <= now:
                self._queue.append((name, None))
        if not self._draining:
            self._drain()

    def _stalled(self) -> bool:
        """True if we are so late, for the timer or to set it, that we were stopped, not the others.

        What they said meanwhile is heard, whoever comes first, before anybody is judged silent. This is put off once.
        """
        now = self.now()
        if now - self._due <= STALL_S or self._due == self._patient_until:
            return False
        self._patient_until = now + STALL_S / 2
        return True
