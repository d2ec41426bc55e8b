"""Runs of neighbouring pages, and the free ones of an arena: where a ledger takes pages from, pure.

Free runs never touch: neighbours are joined as they come. One sorted list of (length, start) finds the tightest run
that fits; two dictionaries find the neighbours of a run that comes back. With r free runs a cut or a return costs
O(log r) comparisons and one move inside a list of r integers, which is cheaper than a tree up to hundreds of thousands
of runs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise, starmap

Run = tuple[int, int]
"""First page, and first page behind the last."""

_SHIFT = 40
_START = (1 << _SHIFT) - 1


class FreeRuns:
    """The free pages among `total`; at first all of them."""

    def __init__(self, total: int) -> None:
        self.count = total
        """Free pages."""
        self._stop: dict[int, int] = {0: total}
        self._start: dict[int, int] = {total: 0}
        # length << _SHIFT | start: integers compare faster than pairs.
        self._by_length: list[int] = [total << _SHIFT]

    def runs(self) -> tuple[Run, ...]:
        """All free runs, by number."""
        return tuple(sorted(self._stop.items()))

    def take(self, count: int, after: int | None = None) -> list[Run]:
        """`count` pages, of which at least so many must be free: from page `after` on if it is free, then the tightest
        run that fits, else the longest runs; of equal ones the first."""
        taken: list[Run] = []
        if count and after in self._stop:
            taken.append(self._cut(after, count))
            count -= taken[0][1] - after
        by_length = self._by_length
        while count:
            index = bisect_left(by_length, count << _SHIFT)
            if index == len(by_length):
                index = bisect_left(by_length, by_length[-1] >> _SHIFT << _SHIFT)
            run = self._cut(by_length[index] & _START, count)
            taken.append(run)
            count -= run[1] - run[0]
        return taken

    def give(self, runs: Iterable[Run]) -> None:
        """Free the pages of `runs`; none of them may be free."""
        starts, stops, by_length = self._start, self._stop, self._by_length
        for start, stop in runs:
            self.count += stop - start
            left = starts.pop(start, None)
            if left is not None:
                del by_length[bisect_left(by_length, (start - left) << _SHIFT | left)]
                start = left
            right = stops.pop(stop, None)
            if right is not None:
                del by_length[bisect_left(by_length, (right - stop) << _SHIFT | stop)]
                stop = right
            stops[start] = stop
            starts[stop] = start
            insort(by_length, (stop - start) << _SHIFT | start)

    def check(self) -> None:
        """Invariants: the three views agree, no run is empty, no two touch."""
        runs = self.runs()
        assert self._start == {stop: start for start, stop in runs}
        assert self._by_length == sorted((stop - start) << _SHIFT | start for start, stop in runs)
        assert self.count == sum(stop - start for start, stop in runs)
        assert all(start < stop for start, stop in runs)
        assert all(before[1] < after[0] for before, after in pairwise(runs)), "free runs not joined"

    def _cut(self, start: int, count: int) -> Run:
        """The head of the run at `start`, at most `count` pages."""
        stop = self._stop.pop(start)
        by_length = self._by_length
        del by_length[bisect_left(by_length, (stop - start) << _SHIFT | start)]
        cut = start + count
        if cut < stop:
            self._stop[cut] = stop
            self._start[stop] = cut
            insort(by_length, (stop - cut) << _SHIFT | cut)
        else:
            cut = stop
            del self._start[stop]
        self.count -= cut - start
        return start, cut


def extend(runs: list[Run], more: Sequence[Run]) -> None:
    """Append pages to a list of runs, joined where the next page is the next number."""
    if runs and more and runs[-1][1] == more[0][0]:
        runs[-1] = runs[-1][0], more[0][1]
        runs.extend(more[1:])
    else:
        runs.extend(more)


def cut_tail(runs: list[Run], count: int) -> list[Run]:
    """Take the last `count` pages off a list of runs; the last run comes first."""
    off: list[Run] = []
    while count:
        start, stop = runs.pop()
        if stop - start > count:
            runs.append((start, stop - count))
            start = stop - count
        off.append((start, stop))
        count -= stop - start
    return off


def cut_head(runs: list[Run], count: int) -> list[Run]:
    """Take the first `count` pages off a list of runs, in order."""
    index = 0
    while count and count >= (size := runs[index][1] - runs[index][0]):
        count -= size
        index += 1
    off = runs[:index]
    del runs[:index]
    if count:
        start, stop = runs[0]
        off.append((start, start + count))
        runs[0] = start + count, stop
    return off


def joined(pages: Sequence[int]) -> list[Run]:
    """Pages in their given order as runs."""
    runs: list[Run] = []
    if pages:
        start = stop = pages[0]
        for page in pages:
            if page != stop:
                runs.append((start, stop))
                start = page
            stop = page + 1
        runs.append((start, stop))
    return runs


def numbers(runs: Sequence[Run]) -> tuple[int, ...]:
    """The pages of runs, in order: the inverse of `joined`."""
    if len(runs) == 1:
        return tuple(range(*runs[0]))
    return tuple(chain.from_iterable(starmap(range, runs)))
