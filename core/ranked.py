"""A priority queue whose keys can change rank and leave. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from heapq import heapify, heappop, heappush

_SPARE = 64
"""Left entries that are kept without rebuilding the heap."""


class Ranked:
    """Keys, the lowest rank first, equal ranks in the order in which they were put.

    `put`, `drop` and `pop` cost O(log n), the rest O(1). An entry that was dropped or put again stays in the heap until
    it comes to the top, where it never stays, or until there are more of these than of the others.
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
        heap, entries = self._heap, self._entries
        before = entries.get(key)
        entry = entries[key] = rank, self._serial, key
        heappush(heap, entry)
        if before is None:
            return
        if heap[0][1] == before[1]:
            self._surface()
        elif len(heap) > 2 * len(entries) + _SPARE:
            self._rebuild()

    def drop(self, key: str) -> bool:
        """Forget `key`; False if it was not there."""
        heap, entries = self._heap, self._entries
        entry = entries.pop(key, None)
        if entry is None:
            return False
        if heap[0][1] == entry[1]:
            heappop(heap)
            if heap:
                self._surface()
        elif len(heap) > 2 * len(entries) + _SPARE:
            self._rebuild()
        return True

    def first(self) -> str | None:
        """The key of lowest rank; None if empty."""
        return self._heap[0][2] if self._heap else None

    def rank(self, key: str) -> float:
        """The key's rank; KeyError if it is not there."""
        return self._entries[key][0]

    def lowest(self) -> float:
        """The rank of the first key; infinite if empty."""
        return self._heap[0][0] if self._heap else math.inf

    def pop(self) -> str | None:
        """Take the first key off; None if empty."""
        if not self._heap:
            return None
        key = self._heap[0][2]
        self.drop(key)
        return key

    def until(self, rank: float) -> list[str]:
        """Take all keys off whose rank is at most this."""
        taken = []
        while self._heap and self._heap[0][0] <= rank:
            taken.append(self._heap[0][2])
            self.drop(taken[-1])
        return taken

    def _surface(self) -> None:
        """Entries at the top that are none any more go."""
        heap, entries = self._heap, self._entries
        while heap:
            _, serial, key = heap[0]
            entry = entries.get(key)
            if entry is not None and entry[1] == serial:
                break
            heappop(heap)

    def _rebuild(self) -> None:
        """All entries that are none any more go."""
        self._heap = list(self._entries.values())
        heapify(self._heap)

    def items(self) -> list[tuple[str, float]]:
        """All keys and ranks, in order. Slow: for `check` and `document`."""
        return [(key, rank) for rank, _, key in sorted(self._entries.values())]
