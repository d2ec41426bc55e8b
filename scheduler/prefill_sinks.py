"""What a prefill worker knows of the sinks that it asks for memory: who is quiet, and who waits how long there. Pure.

A sink promises memory in the order in which it is asked, and between tenants in turn. So who asks it now will wait for
about as long as the first of those has waited that it has promised nothing yet; and if those are several tenants', for
the part of that time in which it serves those whose turn comes before: of each other tenant, by weight, no more than
the asker has waiting there, and one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from core.worker import Identity
from scheduler.fair import NO_WEIGHTS


class Sinks:
    """Those that were asked, and those that may be lost."""

    def __init__(self, weights: Mapping[str, float] = NO_WEIGHTS) -> None:
        self._weights = weights
        self._since: dict[Identity, dict[str, tuple[float, str]]] = {}
        """Who waits for a promise, since when, and of which tenant: the first one first."""
        self._counts: dict[Identity, dict[str, int]] = {}
        """How many of each tenant."""
        self._quiet: dict[Identity, None] = {}

    def hush(self, sink: Identity, quiet: bool) -> None:
        """It may be lost, or is heard again."""
        if quiet:
            self._quiet[sink] = None
        else:
            self._quiet.pop(sink, None)

    def quiet(self, sink: Identity | None) -> bool:
        """Whether it may be lost."""
        return sink in self._quiet

    def asked(self, sink: Identity, key: str, tenant: str, now: float) -> None:
        """A request waits for its promise."""
        self._since.setdefault(sink, {})[key] = now, tenant
        counts = self._counts.setdefault(sink, {})
        counts[tenant] = counts.get(tenant, 0) + 1

    def answered(self, sink: Identity, key: str) -> bool:
        """A request waits no more; whether it did."""
        waiting = self._since.get(sink)
        if waiting is None or key not in waiting:
            return False
        _, tenant = waiting.pop(key)
        counts = self._counts[sink]
        counts[tenant] -= 1
        if not counts[tenant]:
            del counts[tenant]
        if not waiting:
            del self._since[sink], self._counts[sink]
        return True

    def behind_s(self, sink: Identity, tenant: str, now: float) -> float:
        """About how long one of that tenant will wait for a promise that asks now. O(tenants that wait there)."""
        waiting = self._since.get(sink)
        if waiting is None:
            return 0.0
        first_at, _ = next(iter(waiting.values()))
        counts = self._counts[sink]
        if len(counts) == 1 and tenant in counts:
            return now - first_at
        turns = (counts.get(tenant, 0) + 1) / self._weights.get(tenant, 1.0)
        before = sum([min(count, turns * self._weights.get(other, 1.0)) for other, count in counts.items()])
        return (now - first_at) * before / len(waiting)

    def quickest_s(self, sinks: Iterable[Identity], tenant: str, now: float) -> float:
        """The shortest such wait of these."""
        return min([self.behind_s(sink, tenant, now) for sink in sinks])

    def longest_s(self, now: float) -> float:
        """For how long anybody has waited for a promise."""
        return max([now - next(iter(waiting.values()))[0] for waiting in self._since.values()], default=0.0)

    def is_better(self, second: Identity, first: Identity, tenant: str, left_s: float, now: float) -> bool:
        """Whether one who has `left_s` is to ask the second one first: the other may be lost, or would make it late."""
        if self.quiet(second) or self.quiet(first):
            return not self.quiet(second)
        return self.behind_s(second, tenant, now) <= left_s < self.behind_s(first, tenant, now)

    def check(self, waiting: dict[str, Identity]) -> None:
        """Raise AssertionError unless those that wait are these, each at its sink."""
        assert {key: sink for sink, keys in self._since.items() for key in keys} == waiting
        assert all(self._since.values())
        for sink, keys in self._since.items():
            tenants = [tenant for _, tenant in keys.values()]
            assert self._counts[sink] == {tenant: tenants.count(tenant) for tenant in tenants}
        assert self._counts.keys() == self._since.keys()
