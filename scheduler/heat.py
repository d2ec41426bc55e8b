"""What a router knows of prefixes: which are so common that they must be told apart, and who computed which. Pure.

Both forget in two generations: what was noted goes to the young one; when that is full it becomes the old one, and the
old one is dropped. So memory is bounded, a step is O(1), and what is used stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any


class Heat:
    """The key that a prefix is placed by: its first few pages, and more of them where those are hot.

    DualMap (ICLR 2026), hot-prefix lengthening: a prefix that more than `hot` / n of the requests of a sliding window
    have would be too much for its two workers, so it is split: its requests are placed by twice as many pages, if they
    have them; when it has cooled below `cool` / n they are placed by it again.
    """

    def __init__(self, *, first_pages: int, window: int, hot: float, cool: float) -> None:
        self._first = first_pages
        self._window = window
        self._hot = hot
        self._cool = cool
        self._young: dict[int, int] = {}
        """Requests of each prefix that was looked at."""
        self._old: dict[int, int] = {}
        self._count = 0
        """Requests of the young generation."""
        self._full = False
        """The old one is that of a whole window."""
        self._split: set[int] = set()

    def key(self, prefix: Sequence[int], workers: int) -> int:
        """Counts one request; `prefix` has at least one page."""
        if self._count == self._window:
            self._old, self._young, self._count, self._full = self._young, {}, 0, True
            self._split = {each for each in self._split if each in self._old}
        self._count += 1
        # The window slides over the old generation as the young one grows.
        left = 1 - self._count / self._window
        total = self._window if self._full else max(self._count, self._window // 8)
        pages = min(self._first, len(prefix))
        while True:
            key = prefix[pages - 1]
            count = self._young[key] = self._young.get(key, 0) + 1
            share = (count + left * self._old.get(key, 0)) / total
            split = share > (self._cool if key in self._split else self._hot) / workers
            if not split:
                self._split.discard(key)
                return key
            self._split.add(key)
            if pages == len(prefix):
                return key
            pages = min(2 * pages, len(prefix))

    def document(self) -> dict[str, Any]:
        """What it remembers, as JSON."""
        return {
            "young": [list(item) for item in sorted(self._young.items())],
            "old": [list(item) for item in sorted(self._old.items())],
            "count": self._count,
            "full": self._full,
            "split": sorted(self._split),
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        """Remember that instead."""
        self._young = dict(document["young"])
        self._old = dict(document["old"])
        self._count, self._full = document["count"], document["full"]
        self._split = set(document["split"])


class Known:
    """Pages that one worker was sent, so that it may have them: at most `pages`, in two generations of half as many."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._half = max(1, pages // 2)
        self._young: set[int] = set()
        self._old: set[int] = set()

    def __contains__(self, page: int) -> bool:
        return page in self._young or page in self._old

    def __iter__(self) -> Iterator[int]:
        yield from self._young
        yield from self._old - self._young

    def add(self, prefix: Sequence[int]) -> Collection[int]:
        """It computes these pages, or has them; others are forgotten for them, which are among those returned."""
        self._young.update(prefix)
        if len(self._young) <= self._half:
            return ()
        forgotten, self._old, self._young = self._old, self._young, set()
        return forgotten

    def pages(self, prefix: Sequence[int]) -> int:
        """How many of its first pages it may have. A page is there only with all before it, so halving finds it."""
        low, high = 0, len(prefix)
        while low < high:
            middle = (low + high + 1) // 2
            each = prefix[middle - 1]
            if each in self._young or each in self._old:
                low = middle
            else:
                high = middle - 1
        return low

    def document(self) -> dict[str, Any]:
        """What it remembers, as JSON."""
        return {"pages": self._pages, "young": sorted(self._young), "old": sorted(self._old)}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Known:
        """One that remembers that."""
        known = cls(document["pages"])
        known._young, known._old = set(document["young"]), set(document["old"])
        return known
