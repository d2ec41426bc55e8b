"""Requests of the batch class that wait at a gateway for time that nobody else wants. Pure.

Tenants take turns by `Fair`; within a tenant, requests that begin alike follow each other, so that what one of them has
computed is still there for the next (BatchLLM: the prefix tree depth first). Names of pages are chained hashes, so the
order of their tuples is that of the tree. Its other ideas, who decodes most first and batches by memory, are not here.

**Bound.** A round is all that waited when it began; who comes later is in the next. So a request is preceded, within
its tenant, by what was there when it came, and by what came before the round that was running ended: nobody is
overtaken for ever by those whose prefix is earlier in the order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from scheduler.fair import NO_WEIGHTS, Fair


class _Round:
    """One tenant's."""

    __slots__ = ("later", "now")

    def __init__(self) -> None:
        self.now: deque[str] = deque()
        """Of this round, in order of prefixes; some may have left."""
        self.later: dict[str, tuple[int, ...]] = {}
        """Of the next one: prefixes by key."""


class Lane:
    """Who of those that wait is next. O(log n) a request, and sorting each round."""

    def __init__(self, weights: Mapping[str, float] = NO_WEIGHTS) -> None:
        self.fair = Fair(weights)
        self._rounds: dict[str, _Round] = {}
        self._tenants: dict[str, str] = {}
        """By key."""
        self._counts: dict[str, int] = {}
        """Waiting, by tenant."""

    def __len__(self) -> int:
        return len(self._tenants)

    def __contains__(self, key: str) -> bool:
        return key in self._tenants

    def add(self, key: str, prefix: tuple[int, ...], tenant: str = "") -> None:
        """It waits, for the next round."""
        assert key not in self._tenants
        self._tenants[key] = tenant
        self._counts[tenant] = self._counts.get(tenant, 0) + 1
        self._rounds.setdefault(tenant, _Round()).later[key] = prefix
        self.fair.join(tenant)

    def drop(self, key: str) -> bool:
        """It does not wait any more; False if it did not."""
        tenant = self._tenants.pop(key, None)
        if tenant is None:
            return False
        self._rounds[tenant].later.pop(key, None)
        self._counts[tenant] -= 1
        if not self._counts[tenant]:
            del self._counts[tenant], self._rounds[tenant]
            self.fair.leave(tenant)
        return True

    def first(self) -> str | None:
        """Who is next."""
        tenant = self.fair.first()
        if tenant is None:
            return None
        turn = self._rounds[tenant]
        while True:
            while turn.now:
                if turn.now[0] in self._tenants:
                    return turn.now[0]
                turn.now.popleft()
            later, turn.later = turn.later, {}
            turn.now.extend(sorted(later, key=later.__getitem__))

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        self.fair.check()
        assert sum(self._counts.values()) == len(self._tenants)
        assert self._counts.keys() == self._rounds.keys()
        for tenant, turn in self._rounds.items():
            here = [key for key in turn.now if key in self._tenants] + list(turn.later)
            assert len(here) == len(set(here)) == self._counts[tenant]
