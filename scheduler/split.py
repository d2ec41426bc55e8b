"""Which prefill workers compute short prompts and which long ones, by the pressure on each of the two pools. Pure.

LAPS (MLSys 2026, arXiv 2601.11589), spatial mode, algorithm 2: each worker has a pressure

    psi = alpha * backlog + beta * lateness - gamma * spare time

and each pool the 90th percentile of its workers' pressures. If one pool's is more than (1 + tau) times the other's, a
worker moves there, unless it would leave fewer than `least`, or the last move was too recently. The paper subtracts
"utilisation" and gives no numbers; a busy worker is under more pressure, so what is subtracted here is the share of
its time that it had to spare. Its released router moves at twice the other's pending requests, every 5 s, one worker
at most; those are the defaults of `tau`, `period_s` and `least`.

Whom a prompt goes to is a placement's (`scheduler/split_map.py`): it classifies by *new* tokens, and a session goes on
where its prefix is, whichever pool that worker is in. With fewer than `from_workers` prefill workers nothing is split.

The ratio controller changes how many prefill workers there are, at a fifth of this pace at most. A worker that comes
goes to the pool under more pressure; where one leaves a pool too small, the other's lightest follows at once.

| parameter | unit | default | meaning |
|---|---|---|---|
| period_s | s | 5 | between two decisions; 5 to 10 |
| cooldown_s | s | 15 | after a move |
| tau | share | 1.0 | by which a pool's pressure must exceed the other's |
| floor | - | 0.1 | pressure below which nobody is helped |
| least | workers | 1 | of each pool |
| from_workers | workers | 4 | prefill workers from which on they are split |
| alpha | 1/s | 1.0 | of the seconds of work that wait |
| beta | 1/s | 1.0 | of the seconds that the first in line is late |
| gamma | - | 0.1 | of the share of time to spare |
| aggregate | share | 0.9 | the percentile of a pool's pressures |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from core.errors import LocalError
from core.worker import Identity
from scheduler.router_events import Divided


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """Settings; see the module's table."""

    period_s: float = 5.0
    cooldown_s: float = 15.0
    tau: float = 1.0
    floor: float = 0.1
    least: int = 1
    from_workers: int = 4
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.1
    aggregate: float = 0.9

    def __post_init__(self) -> None:
        if not (self.period_s > 0 and self.cooldown_s >= 0 and self.tau >= 0 and 0 < self.aggregate <= 1):
            raise LocalError(f"split: got {self}, want period_s above 0, cooldown_s and tau from 0, 0 < aggregate <= 1")
        if self.least < 1 or self.from_workers < 2 * self.least:
            raise LocalError(f"split: got {self}, want least from 1 on and from_workers twice that at least")


# Events.
@dataclass(frozen=True, slots=True)
class Came:
    """A worker takes prompts."""

    worker: Identity


@dataclass(frozen=True, slots=True)
class Went:
    """A worker does not any more."""

    worker: Identity


@dataclass(frozen=True, slots=True)
class Queued:
    """How a prefill worker does."""

    worker: Identity
    backlog_s: float
    """Work that waits there."""
    late_s: float
    """By which the first in line misses its goal, or will."""
    spare: float
    """Share of its time in which it had nothing to do."""


SplitEvent = Came | Went | Queued


class Because(StrEnum):
    """Why the pools are as they are."""

    FEW = "too few prefill workers to split"
    BEGUN = "there are enough prefill workers to split"
    MEMBERS = "a worker came or went"
    SHORT = "short prompts wait longer"
    LONG = "long prompts wait longer"


@dataclass(frozen=True, slots=True)
class Division:
    """One decision: who is in which pool, and the pressures that it was made from."""

    at_s: float
    because: Because
    moved: str
    """The worker that changed pools; empty if none did."""
    short: tuple[str, ...]
    long: tuple[str, ...]
    short_pressure: float
    long_pressure: float


@dataclass(frozen=True, slots=True)
class Divide:
    """Have every gateway place prompts by these pools, from now on."""

    divided: Divided
    division: Division


@dataclass(slots=True, eq=False)
class _Post:
    """A prefill worker, its pool and its pressure."""

    identity: Identity
    short: bool
    pressure: float = 0.0


class SplitController:
    """Moves one worker at a time between the short and the long pool; each change is one `Divide`, which takes no time.

    `short_tokens` is what a `Divide` says of the boundary.
    """

    def __init__(self, config: SplitConfig = SplitConfig(), short_tokens: int = 512) -> None:
        if short_tokens < 1:
            raise LocalError(f"split: got short_tokens {short_tokens}, want at least 1")
        self._config = config
        self._short_tokens = short_tokens
        self._posts: dict[Identity, _Post] = {}
        self._split = False
        self._due: float | None = None
        self._moved_at = -math.inf
        self.ignored = 0
        """Words about workers that are not known, or not any more."""

    def on(self, event: SplitEvent | None, now: float) -> list[Divide]:
        match event:
            case None:
                if self._due is None or now < self._due:
                    return []
                period_s = self._config.period_s
                self._due += period_s * (1 + math.floor((now - self._due) / period_s))
                return self._period(now)
            case Came(worker):
                if worker in self._posts:
                    self.ignored += 1
                    return []
                return self._came(worker, now)
            case Went(worker):
                post = self._posts.pop(worker, None)
                if post is None:
                    self.ignored += 1
                    return []
                return self._resized(now)
            case Queued(worker, backlog_s, late_s, spare):
                if not (backlog_s >= 0 and late_s >= 0 and 0 <= spare <= 1):
                    raise LocalError(f"queued: got {event}, want times from 0 on and a share")
                post = self._posts.get(worker)
                if post is None:
                    self.ignored += 1
                else:
                    config = self._config
                    post.pressure = config.alpha * backlog_s + config.beta * late_s - config.gamma * spare
                return []

    def deadline(self) -> float | None:
        return self._due

    def check(self) -> None:
        assert all(who == post.identity for who, post in self._posts.items())
        enough = len(self._posts) >= self._config.from_workers
        assert self._split == enough, "split with too few workers, or not with enough"
        assert (self._due is not None) == self._split
        if self._split:
            assert min(len(self._pool(True)), len(self._pool(False))) >= self._config.least

    def pools(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the short and of the long pool; empty if nothing is split."""
        if not self._split:
            return (), ()
        return self._names(True), self._names(False)

    def _pool(self, short: bool) -> list[_Post]:
        return [post for post in self._posts.values() if post.short is short]

    def _names(self, short: bool) -> tuple[str, ...]:
        return tuple(sorted(post.identity.name for post in self._pool(short)))

    def _pressure(self, short: bool) -> float:
        """The nearest rank of the pool's pressures; no worker, no pressure."""
        found = sorted(post.pressure for post in self._pool(short))
        return found[math.ceil(self._config.aggregate * len(found)) - 1] if found else 0.0

    def _came(self, worker: Identity, now: float) -> list[Divide]:
        short = self._pressure(True) > self._pressure(False)
        if not self._split or self._pressure(True) == self._pressure(False):
            short = len(self._pool(True)) < len(self._pool(False))
        self._posts[worker] = _Post(worker, short)
        return self._resized(now)

    def _resized(self, now: float) -> list[Divide]:
        """The members are others: split, stop splitting, or fill a pool that has become too small."""
        if len(self._posts) < self._config.from_workers:
            if not self._split:
                return []
            self._split, self._due = False, None
            return [self._divide(now, Because.FEW, "")]
        because = Because.MEMBERS
        if not self._split:
            self._split, self._due, because = True, now + self._config.period_s, Because.BEGUN
            for index, who in enumerate(sorted(self._posts)):
                self._posts[who].short = index < len(self._posts) // 2
        moved = ""
        for short in (True, False):
            while len(self._pool(short)) < self._config.least:
                post = self._lightest(not short)
                post.short, moved = short, post.identity.name
        return [self._divide(now, because, moved)]

    def _period(self, now: float) -> list[Divide]:
        config = self._config
        short, long = self._pressure(True), self._pressure(False)
        if now < self._moved_at + config.cooldown_s or max(short, long) < config.floor:
            return []
        for helps, mine, other in ((True, short, long), (False, long, short)):
            # Pressures may be below 0, where a pool has time to spare.
            if mine > (1 + config.tau) * max(other, 0.0) and len(self._pool(not helps)) > config.least:
                post = self._lightest(not helps)
                post.short, self._moved_at = helps, now
                return [self._divide(now, Because.SHORT if helps else Because.LONG, post.identity.name, short, long)]
        return []

    def _lightest(self, short: bool) -> _Post:
        return min(self._pool(short), key=lambda post: (post.pressure, post.identity))

    def _divide(
        self, now: float, because: Because, moved: str, short: float | None = None, long: float | None = None
    ) -> Divide:
        pools = self.pools()
        pressures = (
            self._pressure(True) if short is None else short,
            self._pressure(False) if long is None else long,
        )
        return Divide(Divided(*pools, self._short_tokens), Division(now, because, moved, *pools, *pressures))
