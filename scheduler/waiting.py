"""Requests that wait for room at a worker: the most urgent of those that are small enough, in O(log n). Pure."""

from __future__ import annotations

from heapq import heappop, heappush

MOST = 2**31
"""No request has more tokens."""
SLACK = 64
"""Departed entries that are always tolerated."""

Entry = tuple[float, int, str]


class Waiting:
    """Keys by tokens and urgency. A Fenwick tree over tokens whose nodes are heaps by urgency.

    Every key lies in the heaps of about log2(2^31 / tokens) nodes, and "up to so many tokens" is the union of at most
    31 of them. Departed keys are dropped when they come up; all heaps are built anew when more have departed than wait.
    """

    def __init__(self) -> None:
        self._nodes: dict[int, list[Entry]] = {}
        self._waiting: dict[str, tuple[int, Entry]] = {}
        self._departed = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: str) -> bool:
        return key in self._waiting

    def add(self, key: str, tokens: int, until: float, age: int) -> None:
        """It waits; a smaller `until` is more urgent, and of equals the one with the smaller `age`."""
        assert key not in self._waiting
        entry = (until, age, key)
        self._waiting[key] = (tokens, entry)
        self._push(tokens, entry)

    def remove(self, key: str) -> int:
        """It waits no more; how many tokens it has."""
        tokens, _ = self._waiting.pop(key)
        self._departed += 1
        if self._departed > len(self._waiting) + SLACK:
            self._departed = 0
            self._nodes = {}
            for held, entry in self._waiting.values():
                self._push(held, entry)
        return tokens

    def first(self, tokens: int) -> str | None:
        """The most urgent of those with at most so many tokens."""
        best: Entry | None = None
        at = min(tokens, MOST)
        while at > 0:
            heap = self._nodes.get(at)
            while heap:
                entry = heap[0]
                waiting = self._waiting.get(entry[2])
                if waiting is not None and waiting[1] is entry:
                    best = entry if best is None or entry < best else best
                    break
                heappop(heap)
            at -= at & -at
        return None if best is None else best[2]

    def _push(self, tokens: int, entry: Entry) -> None:
        at = max(1, min(tokens, MOST))
        while at <= MOST:
            heappush(self._nodes.setdefault(at, []), entry)
            at += at & -at
