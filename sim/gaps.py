"""Gaps between tokens, counted once a run of steps and not once a token.

All rows of a worker see the same steps. So the worker keeps one growing histogram of the times of its steps, and a
row's gaps are what was added between its joining and its end.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import sub

SHORTEST_S, LONGEST_S, RATIO = 2e-4, 200.0, 1.1
"""Edges of the histogram: from 0.2 ms to 200 s, each a tenth above the one before."""


def edges(bound_s: float = 0.0, ratio: float = RATIO) -> tuple[float, ...]:
    """Upper edges of the buckets in seconds; `bound_s` is one of them, so that what is above it is counted exactly."""
    count = math.ceil(math.log(LONGEST_S / SHORTEST_S) / math.log(ratio))
    found = [SHORTEST_S * ratio**index for index in range(count + 1)]
    if bound_s > 0 and bound_s not in found:
        insort(found, bound_s)
    return tuple(found)


class GapLog:
    """Counts of gaps by bucket, only ever growing; the last bucket is for those beyond all edges."""

    def __init__(self, upper: Sequence[float]) -> None:
        self._edges = upper
        self._counts = [0] * (len(upper) + 1)
        self._low, self._high = len(upper), 0
        """The first bucket that is not empty, and the first behind the last such."""
        self._mark: tuple[int, ...] | None = None

    def add(self, seconds: float, count: int = 1) -> None:
        """`count` gaps of that length."""
        bucket = bisect_left(self._edges, seconds)
        self._counts[bucket] += count
        self._reach(bucket, bucket)

    def span(self, of: Callable[[int], float], start: int, stop: int) -> None:
        """The gaps of steps [start, stop), of which `of` gives the seconds and never falls."""
        if stop <= start:
            return
        low, high = bisect_left(self._edges, of(start)), bisect_left(self._edges, of(stop - 1))
        self._split(of, start, stop, low, high)
        self._reach(low, high)

    def _split(self, of: Callable[[int], float], start: int, stop: int, low: int, high: int) -> None:
        if low == high:
            self._counts[low] += stop - start
        elif stop - start == 2:
            self._counts[low] += 1
            self._counts[high] += 1
        else:
            middle = (start + stop) // 2
            before, after = bisect_left(self._edges, of(middle - 1)), bisect_left(self._edges, of(middle))
            self._split(of, start, middle, low, before)
            self._split(of, middle, stop, after, high)

    def _reach(self, low: int, high: int) -> None:
        """Something was counted, and from bucket `low` to bucket `high`."""
        self._mark = None
        if low < self._low:
            self._low = low
        if high >= self._high:
            self._high = high + 1

    def mark(self) -> tuple[int, ...]:
        """The counts of now; rows that join together share one."""
        if self._mark is None:
            self._mark = tuple(self._counts)
        return self._mark

    def since(self, mark: tuple[int, ...]) -> list[int]:
        """What was counted after `mark`."""
        counts, low, high = self._counts, self._low, self._high
        gaps = [0] * len(counts)
        gaps[low:high] = map(sub, counts[low:high], mark[low:high])
        return gaps


def beyond(counts: Sequence[int], upper: Sequence[float], bound_s: float) -> int:
    """How many are longer than `bound_s`, which is an edge."""
    return sum(counts[bisect_left(upper, bound_s) + 1 :])


def quantile(counts: Sequence[int], upper: Sequence[float], share: float, total: int) -> float:
    """The upper edge of the bucket of the nearest rank among `total`, the sum of the counts; 0 without any gap."""
    if not total:
        return 0.0
    index = bisect_left(list(accumulate(counts)), math.ceil(share * total))
    return upper[index] if index < len(upper) else math.inf
