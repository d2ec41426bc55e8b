"""Whose KV a prefill worker keeps while a program's tool runs, and which programs wait because of that. Pure; part of
the worker's policy.

A cache that forgets what was used least recently works until the programs at once have more KV than it holds. From
then on each turn finds its history gone, computes it again, and pushes out somebody else's: all of them are slowed to
what computing everything every time takes. So the KV of a program stays for as long as `Programs` says that it will
probably be back (Continuum), and goes on to stay while its next turn waits for its start. And a turn whose KV is not
here, a program's first or one that came back too late, waits out of the line until there is room for it beside what is
kept (ThunderAgent pauses programs), the program that came first before others (Continuum's order), until the worker has
nothing else to compute, or for `patience_s`; then pins yield to it. So nobody waits for longer than that, and nobody at
an idle worker: what is pushed out then costs time that was to be had for nothing.

Pins yield at once, the least recent first, to everybody who is in line: to those that have no session and to turns of
programs that are kept. A request without a session makes no pin, and never waits here.

| parameter | unit | default | meaning |
|---|---|---|---|
| programs | | `ProgramsConfig` | for how long |
| patience_s | seconds | 120 | most that a turn waits here for room |
| headroom | share | 0.1 | of the arena that stays free for the growth of those who are in |
| small | share | 0.01 | of the arena: who takes no more does not wait |
| forget | share | 0.1 | of the waits so far, at each one that ends |
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.kv import KvShape
from core.pages import Pages
from core.ranked import Ranked
from scheduler.cost import CostModel
from scheduler.programs import Programs, ProgramsConfig

PIN = "program "
"""Before a session in the names of our pins: others in this arena may pin it, too."""


@dataclass(frozen=True, slots=True)
class KeepsConfig:
    """See the table above."""

    programs: ProgramsConfig = field(default=ProgramsConfig())
    patience_s: float = 120.0
    headroom: float = 0.1
    small: float = 0.01
    forget: float = 0.1


class Keeps:
    """The pins of one prefill worker; every call costs O(log n) and the pieces of the prefix."""

    def __init__(self, shape: KvShape, ledger: Pages, cost: CostModel, config: KeepsConfig = KeepsConfig()) -> None:
        self._page_tokens = shape.page_tokens
        self._ledger = ledger
        self._cost = cost
        self._config = config
        self.programs = Programs(config.programs)
        self.kept: set[str] = set()
        """Sessions with a pin, as far as nobody else in this arena ended it."""
        self._ends = Ranked()
        """Of these, those that pause, by when their pin ends."""
        self._here: dict[str, int] = {}
        """Turns of a session that are here and have not begun; what is kept of it stays till then."""
        self._line = Ranked()
        """Turns that wait for room, in the order in which they are let in."""
        self.waiting: dict[str, float] = {}
        """Since when these wait."""
        self._late = Ranked()
        """They go in then at the latest."""
        self._coming: dict[str, int] = {}
        """Pages of those that were let in and have not begun."""
        self._expected = 0
        """Their sum."""
        self._wait_s = 0.0
        """Of turns without KV, lately."""
        self.yielded = 0
        """Pins that ended before their time."""
        self.held = 0
        """Turns that had to wait for room."""

    def reprice(self, cost: CostModel) -> None:
        """Computing again takes as long as this model says, from now on."""
        self._cost = cost

    # A turn's way.
    def came(self, session: str, prefix: tuple[int, ...], now: float, step: int = 0) -> None:
        """A turn was accepted; `prefix` is what it may use of what is kept, which stays until it begins.

        `step`: turns that its program had before this one, as its caller says.
        """
        self.programs.came(session, now, step)
        self._here[session] = self._here.get(session, 0) + 1
        if session in self.kept:
            self._ends.drop(session)
            self._ledger.pin(PIN + session, prefix)  # the last to yield, from now on

    def holds(self, key: str, session: str, pages: int, all_pages: int, until: float, now: float) -> bool:
        """Whether a turn that takes so many of its pages waits for room: it is `first` some time, and then let in.

        `until`: it waits no longer than that, whatever the patience.
        """
        if pages <= max(self._config.small * self._ledger.total, all_pages / 2):
            return False
        if until <= now or (not self.waiting and self._fits(pages)):
            self._enter(key, pages, 0.0)
            return False
        program = self.programs.get(session)
        self._line.put(key, now if program is None else program.came_at)
        self.waiting[key] = now
        if self._here[session] == 1:
            self._unpin(session)
        self._late.put(key, min(until, now + self._config.patience_s))
        self.held += 1
        return True

    def first(self, now: float) -> str | None:
        """Who would be let in next: who has waited long enough, else who is first in line."""
        return self._late.first() if self._late.lowest() <= now else self._line.first()

    def lets_in(self, key: str, pages: int, now: float, idle: bool = False) -> bool:
        """Whether the first of those who wait may go in now, as it takes so many pages; `idle`: even without room."""
        if not idle and now < self._late.rank(key) and not self._fits(pages):
            return False
        since = self.waiting.pop(key)
        self._line.drop(key)
        self._late.drop(key)
        self._enter(key, pages, now - since)
        return True

    def began(self, key: str, session: str) -> None:
        """A turn has started, with what there was."""
        self._expected -= self._coming.pop(key, 0)
        if self._gone(session):
            self._unpin(session)

    def left(self, key: str, session: str, now: float) -> None:
        """A turn has gone before it started."""
        self._line.drop(key)
        self._late.drop(key)
        self.waiting.pop(key, None)
        self._expected -= self._coming.pop(key, 0)
        if self._gone(session) and session in self.kept:
            self._ends.put(session, now + self._config.programs.first_s)

    def paused(self, session: str, tool: str, prefix: tuple[int, ...], now: float) -> None:
        """A turn is over here: keep `prefix`, the full pages of its prompt, for as long as that is worth it."""
        self.programs.left(session, tool, now)
        if not prefix:
            return
        reload_s = self._cost.prefill_s([(len(prefix) * self._page_tokens, 0)])
        share = len(prefix) / self._ledger.total
        keeps_s = self.programs.keeps_s(tool, reload_s, self._wait_s, share)
        if keeps_s > 0:
            self._ledger.pin(PIN + session, prefix)
            self.kept.add(session)
            if session not in self._here:
                self._ends.put(session, now + keeps_s)

    # Memory.
    def yields(self, pages: int) -> bool:
        """Whether pins have ended for somebody who lacks so many pages."""
        if pages <= 0 or not self._ledger.pinned:
            return False
        names = self._ledger.yield_pins(pages)
        self.yielded += len(names)
        for name in names:
            session = name.removeprefix(PIN)
            self._ends.drop(session)
            self.kept.discard(session)
        return bool(names)

    def over(self, now: float) -> bool:
        """End the pins whose time is up; whether there were any."""
        ended = self._ends.until(now)
        for session in ended:
            self._unpin(session)
        return bool(ended)

    def deadline(self) -> float:
        """When the next pin ends, or somebody has waited long enough; infinite if neither."""
        return min(self._ends.lowest(), self._late.lowest())

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        self.programs.check()
        assert all(count > 0 for count in self._here.values())
        pausing = {session for session, _ in self._ends.items()}
        assert not self._here.keys() & pausing
        assert self.kept <= self._here.keys() | pausing, "kept for ever"
        assert self.waiting.keys() == {key for key, _ in self._line.items()} == {key for key, _ in self._late.items()}
        assert self._expected == sum(self._coming.values())

    def _fits(self, pages: int) -> bool:
        spare = self._ledger.available - self._expected - pages
        return spare >= self._config.headroom * self._ledger.total or self._ledger.available == self._ledger.total

    def _enter(self, key: str, pages: int, waited_s: float) -> None:
        self._wait_s += self._config.forget * (waited_s - self._wait_s)
        self._coming[key] = pages
        self._expected += pages

    def _unpin(self, session: str) -> None:
        self.kept.discard(session)
        self._ledger.unpin(PIN + session)

    def _gone(self, session: str) -> bool:
        """One turn less is here before its start; whether it was the last."""
        count = self._here[session] - 1
        if count:
            self._here[session] = count
            return False
        del self._here[session]
        return True
