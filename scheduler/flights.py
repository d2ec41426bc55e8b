"""The flights of a gateway: by the key of their last ticket, by who may have them, and by when each needs a look. Pure.

A worker that is lost or quiet concerns those that it may have: its prompt, its KV on the way there, or its rows. They
are found by the worker, so that a loss costs what it breaks and not what there is. What broke in the middle of an
attempt stays broken for it, even if the worker is met again: it has dropped what it had. So losses are counted, and an
attempt knows how many there were before it.

All operations are O(1), or O(log n) where the next look changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from core.ranked import Ranked
from core.worker import Identity
from scheduler.calls import Flight

_MEMORY = 256
"""Losses that are remembered before those that no attempt has met are looked for."""


class Flights:
    """Every flight at rest is here once."""

    def __init__(self) -> None:
        self._of: dict[str, Flight] = {}
        self._looks = Ranked()
        self._at: dict[Identity, dict[str, Flight]] = {}
        """In order of coming there."""
        self._losses = 0
        self._lost: dict[Identity, int] = {}
        """Which of the losses was a worker's last."""
        self._memory = _MEMORY

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._of.values())

    def __contains__(self, key: str) -> bool:
        return key in self._of

    def __getitem__(self, key: str) -> Flight:
        return self._of[key]

    def get(self, key: str) -> Flight | None:
        """The flight whose last ticket has this key."""
        return self._of.get(key)

    def stands(self, flight: Flight) -> bool:
        """Whether it is here."""
        return self._of.get(flight.key) is flight

    # Where they are.
    def put(self, flight: Flight, look_at: float, *workers: Identity) -> None:
        """It stands under its key, and begins an attempt at these workers, if at any."""
        self._of[flight.key] = flight
        self._looks.put(flight.key, look_at)
        flight.losses = self._losses
        for worker in workers:
            self.reach(flight, worker)

    def reach(self, flight: Flight, worker: Identity) -> None:
        """This worker may have it as well."""
        if worker not in flight.workers:
            flight.workers += (worker,)
            self._at.setdefault(worker, {})[flight.key] = flight

    def leave(self, flight: Flight) -> None:
        """It has no ticket any more, and nobody has it."""
        del self._of[flight.key]
        self._looks.drop(flight.key)
        for worker in flight.workers:
            there = self._at[worker]
            del there[flight.key]
            if not there:
                del self._at[worker]
        flight.workers = ()

    def at(self, worker: Identity) -> list[Flight]:
        """Those that a worker may have."""
        return list(self._at.get(worker, {}).values())

    # Losses.
    def lose(self, worker: Identity) -> list[Flight]:
        """A worker's stream broke; those that it may have had."""
        self._losses += 1
        self._lost.pop(worker, None)
        self._lost[worker] = self._losses
        if len(self._lost) > self._memory:
            oldest = min([flight.losses for flight in self._of.values()], default=self._losses)
            self._lost = {who: number for who, number in self._lost.items() if number > oldest}
            self._memory = max(_MEMORY, 2 * len(self._lost))
        return self.at(worker)

    def broken(self, flight: Flight, worker: Identity) -> bool:
        """Whether a worker was lost during this attempt: even if it is back, it has dropped it."""
        return self._lost.get(worker, 0) > flight.losses

    # Looks.
    def look(self, flight: Flight, at: float) -> None:
        """When it needs one, if nothing happens before."""
        self._looks.put(flight.key, at)

    def next_look(self) -> float:
        """When the next is due; infinity if there is none."""
        return self._looks.lowest()

    def due(self, now: float) -> Flight | None:
        """The first that needs a look by now."""
        key = self._looks.first()
        return self._of[key] if key is not None and self._looks.lowest() <= now else None

    def check(self, looks: Iterable[float]) -> None:
        """Raise AssertionError if an invariant does not hold; `looks`: when each needs one, in their order."""
        assert dict(self._looks.items()) == dict(zip(self._of, looks, strict=True))
        assert all(key == flight.key for key, flight in self._of.items())
        where: dict[Identity, set[str]] = {}
        for flight in self._of.values():
            assert len(set(flight.workers)) == len(flight.workers)
            for worker in flight.workers:
                where.setdefault(worker, set()).add(flight.key)
        assert where == {worker: set(there) for worker, there in self._at.items()}
        assert all(self._of[key] is flight for there in self._at.values() for key, flight in there.items())
