"""How long the KV of a session is kept after a turn, for its next one. Pure.

Continuum keeps a program's KV while a tool runs, for as long as the tool will probably take, and weighs the chance that
it is back by then against what waiting and computing again would cost. Here the time is a quantile of the pauses seen,
of the same tool where enough of them are known; pins yield as soon as anybody wants the memory, so that one that is too
long costs nothing but the place of another.

| parameter | unit | default | meaning |
|---|---|---|---|
| most_s | seconds | 60 | no pin is longer; 0: nothing is pinned |
| first_s | seconds | 10 | a pin's time while too few pauses are known |
| quantile | share | 0.8 | of pauses that a pin should outlast |
| least | pauses | 10 | of a tool, or of all, before they count |
| window | pauses | 200 | how many are remembered, of each tool and of all |
| tools | tools | 64 | whose pauses are remembered; the one not seen for longest goes first |
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PinConfig:
    """See the table above."""

    most_s: float = 60.0
    first_s: float = 10.0
    quantile: float = 0.8
    least: int = 10
    window: int = 200
    tools: int = 64


class _Pauses:
    """The last pauses, by age and by length."""

    __slots__ = ("ordered", "recent")

    def __init__(self) -> None:
        self.recent: deque[float] = deque()
        self.ordered: list[float] = []

    def add(self, pause_s: float, window: int) -> None:
        self.recent.append(pause_s)
        insort(self.ordered, pause_s)
        if len(self.recent) > window:
            del self.ordered[bisect_left(self.ordered, self.recent.popleft())]


class Pins:
    """The sessions that pause and until when each is kept; every call costs O(log n)."""

    def __init__(self, config: PinConfig) -> None:
        self._config = config
        self._all = _Pauses()
        self._tools: dict[str, _Pauses] = {}
        """In order of the last pause."""
        self._paused: dict[str, tuple[float, float, str]] = {}
        """By session: since when (below 0: it is back), until when it is kept, and for which tool."""
        self._ends: list[tuple[float, str]] = []
        """A heap; stale if the session is kept until another time, or not at all."""

    def __len__(self) -> int:
        return len(self._paused)

    def __contains__(self, session: str) -> bool:
        return session in self._paused

    def keeps_s(self, tool: str) -> float:
        """How long a session is kept that pauses now."""
        config = self._config
        for pauses in (self._tools.get(tool), self._all):
            if pauses is not None and len(pauses.ordered) >= config.least:
                at = math.ceil(config.quantile * len(pauses.ordered)) - 1
                return min(config.most_s, pauses.ordered[at])
        return min(config.most_s, config.first_s)

    def pause(self, session: str, tool: str, now: float) -> None:
        """A turn ended; whoever asks for `tool` will be back."""
        until = now + self.keeps_s(tool)
        self._paused[session] = now, until, tool
        heapq.heappush(self._ends, (until, session))

    def resume(self, session: str, now: float) -> None:
        """The next turn is here. The pin goes on, until its time or the end of this turn."""
        known = self._paused.get(session)
        if known is None or known[0] < 0:
            return
        since, until, tool = known
        self._paused[session] = -1.0, until, tool
        pause_s, config = now - since, self._config
        self._all.add(pause_s, config.window)
        pauses = self._tools.pop(tool, None) or _Pauses()
        pauses.add(pause_s, config.window)
        self._tools[tool] = pauses
        if len(self._tools) > config.tools:
            del self._tools[next(iter(self._tools))]

    def forget(self, session: str) -> None:
        """It is not kept any more."""
        self._paused.pop(session, None)

    def over(self, now: float) -> list[str]:
        """Sessions whose time is up; they are forgotten."""
        sessions = []
        while (due := self.deadline()) is not None and due <= now:
            session = heapq.heappop(self._ends)[1]
            del self._paused[session]
            sessions.append(session)
        return sessions

    def deadline(self) -> float | None:
        """When the next one's time is up."""
        ends = self._ends
        while ends:
            until, session = ends[0]
            known = self._paused.get(session)
            if known is not None and known[1] == until:
                return until
            heapq.heappop(ends)
        return None
