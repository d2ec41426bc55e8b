"""The one shape of every policy and protocol: a deterministic state machine without I/O and without a clock.

Rules (docs/architecture.md, "Machines"): same state and same input give the same output; a *local* contract
violation raises `LocalError` and changes nothing; a *remote* message about an unknown ticket, an old attempt or a
dead incarnation is normal, is ignored and counted. A command that takes time ends in exactly one event with the
same id. Cancel only asks; what a command holds is freed by the command's own end event.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

E = TypeVar("E", contravariant=True)
C = TypeVar("C")


class Machine(Protocol[E, C]):
    """Events in, commands out; `now` is seconds on the driver's clock."""

    def on(self, event: E | None, now: float) -> list[C]:
        """Take one event, or None when the deadline came; returns what is to be done, in order."""
        ...

    def deadline(self) -> float | None:
        """Call `on(None, now)` at this time if nothing happens before; None: no need."""
        ...

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        ...
