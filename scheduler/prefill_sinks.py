"""What a prefill worker knows of the sinks that it asks for memory: who is quiet, and who waits how long there. Pure.

A sink promises memory in the order in which it is asked. So who asks it now will wait for about as long as the first of
those has waited that it has promised nothing yet.
"""

from __future__ import annotations

from collections.abc import Iterable

from core.worker import Identity


class Sinks:
    """Those that were asked, and those that may be lost."""

    def __init__(self) -> None:
        self._since: dict[Identity, dict[str, float]] = {}
        """Who waits for a promise, and since when: the first one first."""
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

    def asked(self, sink: Identity, key: str, now: float) -> None:
        """A request waits for its promise."""
        self._since.setdefault(sink, {})[key] = now

    def answered(self, sink: Identity, key: str) -> bool:
        """A request waits no more; whether it did."""
        waiting = self._since.get(sink)
        if waiting is None or waiting.pop(key, None) is None:
            return False
        if not waiting:
            del self._since[sink]
        return True

    def behind_s(self, sink: Identity, now: float) -> float:
        """For how long somebody has waited for its promise: about as long will wait who asks now."""
        waiting = self._since.get(sink)
        return now - next(iter(waiting.values())) if waiting else 0.0

    def quickest_s(self, sinks: Iterable[Identity], now: float) -> float:
        """The shortest such wait of these."""
        return min([self.behind_s(sink, now) for sink in sinks])

    def longest_s(self, now: float) -> float:
        """The longest such wait of all."""
        return max([self.behind_s(sink, now) for sink in self._since], default=0.0)

    def is_better(self, second: Identity, first: Identity, left_s: float, now: float) -> bool:
        """Whether one who has `left_s` is to ask the second one first: the other may be lost, or would make it late."""
        if self.quiet(second) or self.quiet(first):
            return not self.quiet(second)
        return self.behind_s(second, now) <= left_s < self.behind_s(first, now)

    def check(self, waiting: dict[str, Identity]) -> None:
        """Raise AssertionError unless those that wait are these, each at its sink."""
        assert {key: sink for sink, keys in self._since.items() for key in keys} == waiting
        assert all(self._since.values())
