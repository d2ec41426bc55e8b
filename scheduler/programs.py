"""What a worker remembers of programs, and for how long it is worth keeping their KV while they pause. Pure.

A program is what a caller names as a session: turns of a model and, between them, tools. Each turn ends in a pause
after which the next one probably comes, with all of the history in front; the pauses of a tool resemble each other.
Who is not known here, but names a later step, ran elsewhere before: it is as old as so many turns of others.

**How long KV is kept** (Continuum's formula): for the time t that maximises

    P(back within t) * (reload_s + queue * wait_s) - price * share * t

where P is the distribution of the pauses after this tool that were seen, those that never ended included; `reload_s`
what computing the KV again takes, `wait_s` how long those without KV wait for memory at present, and `share` the part
of the arena that the KV holds. `price` says what the whole arena is worth: a second of it for so many seconds of
somebody's. Programs that end are not told apart from programs whose tool takes long; but as the pauses grow longer, the
chance that anybody comes back falls, and so does the time that waiting is worth. The best t is one of the pauses seen,
on the upper concave envelope of their distribution, which is made anew after every `fresh` of them.

| parameter | unit | default | meaning |
|---|---|---|---|
| most_s | seconds | 60 | nothing is kept longer; 0: nothing is kept |
| first_s | seconds | 10 | for how long, while too few pauses are known |
| least | pauses | 10 | of a tool, or of all, before they count |
| window | pauses | 200 | that are remembered, of each tool and of all |
| fresh | pauses | 8 | after which a tool's best times are computed anew |
| tools | tools | 64 | whose pauses are remembered; the one not seen for longest goes first |
| programs | programs | 4096 | that are remembered; the one not seen for longest goes first |
| over_s | seconds | 300 | a program that has not come back by then never will |
| price | s/s | 1 | of a second of the whole arena |
| queue | share | 1 | of the wait for memory that kept KV is taken to save |
| forget | share | 0.1 | of the mean time from turn to turn, at each one |
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class ProgramsConfig:
    """See the table above."""

    most_s: float = 60.0
    first_s: float = 10.0
    least: int = 10
    window: int = 200
    fresh: int = 8
    tools: int = 64
    programs: int = 4096
    over_s: float = 300.0
    price: float = 1.0
    queue: float = 1.0
    forget: float = 0.1


@dataclass(slots=True)
class Program:
    """One of them, as far as this worker has seen it."""

    came_at: float
    """Its first turn, here or, guessed from its step, elsewhere."""
    turn_at: float
    """Its last one."""
    paused_at: float = -1.0
    """Since when it is away; below 0: it is here."""
    tool: str = ""
    """Of the last turn that ended."""


class Pauses:
    """The last pauses of a tool, by age and by length; infinite ones are those that never ended."""

    __slots__ = ("_age", "envelope", "ordered", "recent")

    def __init__(self) -> None:
        self.recent: deque[float] = deque()
        self.ordered: list[float] = []
        self.envelope: list[tuple[float, float]] = []
        """(1 / slope, pause) of the vertices of the distribution's concave envelope, rising in both."""
        self._age = 0
        """Pauses since it was made."""

    def add(self, pause_s: float, window: int, fresh: int) -> None:
        """One more; the oldest beyond the window goes."""
        self.recent.append(pause_s)
        insort(self.ordered, pause_s)
        if len(self.recent) > window:
            del self.ordered[bisect_left(self.ordered, self.recent.popleft())]
        self._age += 1
        if self._age >= fresh or not self.envelope:
            self._age = 0
            self.envelope = _envelope(self.ordered)

    def best_s(self, worth_s: float) -> float:
        """The time t with the greatest P(back within t) * worth_s - t; 0 if no time is worth it."""
        at = bisect_left(self.envelope, (worth_s, math.inf))
        return self.envelope[at - 1][1] if at else 0.0


def _envelope(ordered: list[float]) -> list[tuple[float, float]]:
    """Vertices of the least concave function above the share of pauses within a time; with each, what the step up to it
    costs, in seconds for a probability of 1."""
    count = len(ordered)
    hull: list[tuple[float, int]] = [(0.0, 0)]
    for number, pause_s in enumerate(ordered, 1):
        if pause_s == math.inf:
            break
        if number < count and ordered[number] == pause_s:
            continue
        while len(hull) > 1:
            (before_s, before), (last_s, last) = hull[-2], hull[-1]
            if (last - before) * (pause_s - last_s) > (number - last) * (last_s - before_s):
                break
            hull.pop()
        hull.append((pause_s, number))
    return [
        ((later_s - earlier_s) * count / (later - earlier), later_s)
        for (earlier_s, earlier), (later_s, later) in pairwise(hull)
    ]


class Programs:
    """Programs by session, and pauses by tool; every call costs O(log n), and the envelope O(window) now and then."""

    def __init__(self, config: ProgramsConfig = ProgramsConfig()) -> None:
        self.config = config
        self._all = Pauses()
        self._tools: dict[str, Pauses] = {}
        """In order of the last pause."""
        self._programs: dict[str, Program] = {}
        """In order of the last change."""
        self._away: dict[str, None] = {}
        """Those that pause, the longest first."""
        self._turn_s = 0.0
        """From one turn of a program to the next, lately; 0: not known."""

    def __len__(self) -> int:
        return len(self._programs)

    def get(self, session: str) -> Program | None:
        """What is known of one; None: nothing."""
        return self._programs.get(session)

    def came(self, session: str, now: float, step: int = 0) -> Program:
        """A turn is here; the pause before it, if there was one, is over. `step`: turns that it had before."""
        program = self._programs.pop(session, None)
        if program is None:
            program = Program(now - step * self._turn_s, now)
            self._bound()
        self._programs[session] = program
        if program.paused_at >= 0:
            pause_s, program.paused_at = now - program.paused_at, -1.0
            del self._away[session]
            if pause_s <= self.config.over_s:
                self._turned(now - program.turn_at)
            else:
                pause_s = math.inf
            self._learn(program.tool, pause_s)
        program.turn_at = now
        self._over(now)
        return program

    def left(self, session: str, tool: str, now: float) -> None:
        """A turn has left this worker; the next one comes when its answer and `tool` are over."""
        program = self._programs.pop(session, None)
        if program is None:
            return
        self._programs[session] = program
        program.paused_at, program.tool = now, tool
        self._away.pop(session, None)
        self._away[session] = None

    def keeps_s(self, tool: str, reload_s: float, wait_s: float, share: float) -> float:
        """How long the KV of a program is kept that pauses for `tool` now; 0: not at all."""
        config = self.config
        price = config.price * share
        worth_s = (reload_s + config.queue * wait_s) / price if price > 0 else math.inf
        for pauses in (self._tools.get(tool), self._all):
            if pauses is not None and len(pauses.ordered) >= config.least:
                return min(config.most_s, pauses.best_s(worth_s))
        return min(config.most_s, config.first_s)

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        config = self.config
        assert len(self._programs) <= config.programs
        assert len(self._tools) <= config.tools
        assert self._away.keys() == {name for name, program in self._programs.items() if program.paused_at >= 0}
        for pauses in (self._all, *self._tools.values()):
            assert sorted(pauses.recent) == pauses.ordered
            assert len(pauses.ordered) <= config.window
            assert pauses.envelope == sorted(pauses.envelope)

    def _over(self, now: float) -> None:
        """Programs that have not come back for so long that they never will; two at most a call, the oldest first."""
        for _ in range(2):
            session = next(iter(self._away), None)
            if session is None or self._programs[session].paused_at >= now - self.config.over_s:
                return
            self._learn(self._forget(session).tool, math.inf)

    def _bound(self) -> None:
        if len(self._programs) >= self.config.programs:
            self._forget(next(iter(self._programs)))

    def _forget(self, session: str) -> Program:
        self._away.pop(session, None)
        return self._programs.pop(session)

    def _turned(self, turn_s: float) -> None:
        self._turn_s += (self.config.forget if self._turn_s else 1.0) * (turn_s - self._turn_s)

    def _learn(self, tool: str, pause_s: float) -> None:
        config = self.config
        self._all.add(pause_s, config.window, config.fresh)
        pauses = self._tools.pop(tool, None) or Pauses()
        pauses.add(pause_s, config.window, config.fresh)
        self._tools[tool] = pauses
        if len(self._tools) > config.tools:
            del self._tools[next(iter(self._tools))]
