"""A priority queue whose keys can change rank and leave. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

_SPARE = 64
"""Left entries that are kept without rebuilding the heap."""


class Ranked:
    """Keys, the lowest rank first, equal ranks in the order in which they were put.

    `put` and `pop` cost O(log n), the rest O(1) on average. An entry that was dropped or put again stays in the heap
    until it comes to the top, or until there are more of these than of the others.
    """

    __slots__ = ("_entries", "_heap", "_serial")

    def __init__(self, entries: Iterable[tuple[str, float]] = ()) -> None:
        self._entries: dict[str, tuple[float, int, str]] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._serial = 0
        for key, rank in entries:
            self.put(key, rank)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def put(self, key: str, rank: float) -> None:
        """Add `key`, or give it another rank."""
        self._serial += 1
        entry = rank, self._serial, key
        self._entries[key] = entry
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + _SPARE:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def drop(self, key: str) -> bool:
        """Forget `key`; False if it was not there."""
        return self._entries.pop(key, None) is not None

    def first(self) -> str | None:
        """The key of lowest rank; None if empty."""
        heap, entries = self._heap, self._entries
        while heap:
            entry = heap[0]
            if entries.get(entry[2]) is entry:
                return entry[2]
            heapq.heappop(heap)
        return None

    def rank(self, key: str) -> float:
        """The key's rank; KeyError if it is not there."""
        return self._entries[key][0]

    def lowest(self) -> float:
        """The rank of the first key; infinite if empty."""
        heap = self._heap
        if heap and self._entries.get(heap[0][2]) is heap[0]:
            return heap[0][0]
        return math.inf if self.first() is None else self._heap[0][0]

    def pop(self) -> str | None:
        """Take the first key off; None if empty."""
        key = self.first()
        if key is not None:
            del self._entries[key]
            heapq.heappop(self._heap)
        return key

    def until(self, rank: float) -> list[str]:
        """Take all keys off whose rank is at most this."""
        taken = []
        while (key := self.first()) is not None and self._heap[0][0] <= rank:
            taken.append(key)
            self.pop()
        return taken

    def items(self) -> list[tuple[str, float]]:
        """All keys and ranks, in order. Slow: for `check` and `document`."""
        return [(key, rank) for rank, _, key in sorted(self._entries.values())]
