"""The last requests of a deployment, as its gateways know them: when they came, what they asked for, how far they are.

How long outputs are is asked while most of them are not over. Those that have ended say too little: right after a
change to longer ones they are the short ones, and those of the time before. So ends are counted as in a life table of a
period: of those that were at so many tokens within the last `window_s`, the share that ended there (Kaplan and Meier's
product of these shares, each request counted only for the tokens that it made in the window). Where few are left to
count, the table is not read: right after a change they are of the time before. Whatever has not ended gets an output
drawn from the table beyond what there is of it, without dice; beyond the table, twice as long as it is, or as that is.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from core.request import Phase
from sim.outcome import Outcome
from sim.workload import Arrival

UNKNOWN_TOKENS = 256
"""Of an output, as long as none has ended and none has begun."""
FEW = 0.05
"""Of the most that were at any number of tokens: fewer do not say how long outputs are."""
GOLDEN = 0.6180339887498949
"""Multiples of it, without their whole part, are spread evenly: draws without dice."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A request of the window."""

    at_s: float
    arrival: Arrival
    number: int
    output: int | None = None
    """Once it has ended."""


class Lengths:
    """A life table of outputs: at which tokens what share of those that were there ended."""

    def __init__(self, spans: Iterable[tuple[int, int, bool]]) -> None:
        """Of (from, to, ended): a request made the tokens from `from` + 1 to `to` in the window, and ended there."""
        begins: list[int] = []
        stops: list[int] = []
        ends: Counter[int] = Counter()
        for begin, stop, ended in spans:
            if stop > begin:
                begins.append(begin)
                stops.append(stop)
                ends[stop] += ended
        begins.sort()
        stops.sort()
        there = {tokens: bisect_left(begins, tokens) - bisect_left(stops, tokens) for tokens in stops}
        least = FEW * max(there.values(), default=0)
        self._most = max((tokens for tokens, count in there.items() if count >= least), default=UNKNOWN_TOKENS // 2)
        """Tokens up to which it can be read."""
        self._tokens: list[int] = []
        """At which some ended, rising."""
        self._stay: list[float] = []
        """The share of those that were at each of these that did not end there."""
        for tokens, count in sorted(ends.items()):
            if count and tokens <= self._most:
                self._tokens.append(tokens)
                self._stay.append(1 - count / there[tokens])

    def drawn(self, made: int, share: float) -> int:
        """The output below which this share of those lies that are longer than `made`."""
        left = 1.0
        for index in range(bisect_right(self._tokens, made), len(self._tokens)):
            left *= self._stay[index]
            if left <= 1 - share:
                return self._tokens[index]
        return 2 * max(made, self._most)

    @property
    def mean(self) -> float:
        """Tokens of an output."""
        total, before, left = 0.0, 0, 1.0
        for tokens, stay in zip(self._tokens, self._stay, strict=True):
            total += left * (tokens - before)
            before, left = tokens, left * stay
        return total + left * max(0, 2 * self._most - before)


class Recent:
    """Requests of the last `window_s`, and how long outputs are."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._asked: deque[_Asked] = deque()
        self._open: dict[int, _Asked] = {}
        """All that have not ended, by the address of their arrival, which they hold."""
        self._ended: deque[tuple[float, float, int]] = deque()
        """In the window: when, for how long, tokens."""
        self._number = 0

    def came(self, arrival: Arrival, now: float) -> None:
        """One more."""
        self._number += 1
        asked = self._open[id(arrival)] = _Asked(now, arrival, self._number)
        self._asked.append(asked)
        while self._asked[0].at_s < now - self._window_s:
            self._asked.popleft()

    def ended(self, arrival: Arrival, one: Outcome, now: float) -> None:
        """It is over; only one that was served says how long an output is."""
        asked = self._open.pop(id(arrival), None)
        if one.phase is Phase.DONE:
            self._ended.append((now, one.e2e_s, one.tokens))
            if asked is not None:
                asked.output = one.tokens
        while self._ended and self._ended[0][0] < now - self._window_s:
            self._ended.popleft()

    def lengths(self, now: float, made: dict[int, int]) -> Lengths:
        """Of outputs; `made`: tokens of those that run, by the address of their arrival."""
        since_s = now - self._window_s
        spans = [
            (self._at(since_s, when - took_s, when, tokens), tokens, True)
            for when, took_s, tokens in self._ended
            if when >= since_s
        ]
        for key, tokens in made.items():
            asked = self._open.get(key)
            if asked is not None:
                spans.append((self._at(since_s, asked.at_s, now, tokens), tokens, False))
        return Lengths(spans)

    @staticmethod
    def _at(since_s: float, begin_s: float, end_s: float, tokens: int) -> int:
        """How many of its tokens it had when the window began, if they came evenly."""
        if begin_s >= since_s or end_s <= begin_s:
            return 0
        return min(tokens - 1, math.floor(tokens * (since_s - begin_s) / (end_s - begin_s)))

    def within(self, now: float, made: dict[int, int]) -> tuple[list[Arrival], float]:
        """The window's requests with times from its begin on, outputs as far as known, and the window's length."""
        begin, lengths = max(now - self._window_s, 0.0), self.lengths(now, made)
        found = []
        for each in self._asked:
            if each.at_s < begin:
                continue
            output = each.output
            if output is None:
                output = lengths.drawn(made.get(id(each.arrival), 0), each.number * GOLDEN % 1.0)
            found.append(replace(each.arrival, at_s=each.at_s - begin, output=output))
        return found, now - begin
