"""Which lanes a worker reads over are up, and when one that is not is made anew. Pure.

A lane is the way from a peer's memory into ours. It is made (connected and probed) when the peer's stream stands, and
what was made may break while both workers live: an interface goes away, a connection is reset. Two kinds of failure
look alike to the request that meets them, and mean different things:

- *this read failed*: the peer refused it, the digest of its pages differs, it was given up. The next one may do, and
  nothing is heard of it here;
- *the lane is broken*: whatever is read over it fails at once, and goes on to (`Transport.broken`). Only a new lane
  helps.

One that is broken is *away*: it is dropped, nobody may announce KV over it, and after a while it is made again, as is
one that could not be made. One that was measured before is used again from its first read that lands, at the price that
it had, and measured meanwhile: who waits for it need not wait for that, too. A peer that is lost has no lane; one that
comes back begins anew.

| parameter | unit | default | meaning |
|---|---|---|---|
| first_s | s | 0.1 | from the failure of a lane to the first time that it is made again |
| most_s | s | 2.0 | the longest such wait; each is twice as long as the one before |
| steady_s | s | 10.0 | a lane that was up for so long before it broke is made again as soon as the first time |
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from core.errors import LocalError
from core.quick import quick_init
from core.ranked import Ranked
from core.worker import Identity, Lane


@dataclass(frozen=True, slots=True)
class LanesConfig:
    """Settings; see the module's table."""

    first_s: float = 0.1
    most_s: float = 2.0
    steady_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.first_s <= self.most_s:
            raise LocalError(f"lanes: got {self}, want 0 < first_s <= most_s")


# Events.
@quick_init
@dataclass(frozen=True, slots=True)
class Met:
    """A peer is there, whose pages we may have to read."""

    peer: Identity


@quick_init
@dataclass(frozen=True, slots=True)
class Parted:
    """A peer is not there any more."""

    peer: Identity


@quick_init
@dataclass(frozen=True, slots=True)
class Answered:
    """The first read over a lane has landed; it is not measured yet."""

    peer: Identity
    attempt: int


@quick_init
@dataclass(frozen=True, slots=True)
class Made:
    """A lane is up, and this is what was measured."""

    peer: Identity
    attempt: int
    lane: Lane


@quick_init
@dataclass(frozen=True, slots=True)
class NotMade:
    """A lane could not be connected, or not be measured."""

    peer: Identity
    attempt: int


@quick_init
@dataclass(frozen=True, slots=True)
class Broke:
    """Nothing can be read any more over a lane, as long as it is not made anew."""

    peer: Identity
    attempt: int


# Commands.
@quick_init
@dataclass(frozen=True, slots=True)
class Make:
    """Connect and probe; ends in `Made`, or in one or more `NotMade`, of this attempt, unless `Drop` comes first."""

    peer: Identity
    attempt: int


@quick_init
@dataclass(frozen=True, slots=True)
class Drop:
    """Disconnect, if it is connected: its unfinished reads end as failures."""

    peer: Identity


@quick_init
@dataclass(frozen=True, slots=True)
class DeclareUp:
    """It may be used, or it may be already and costs something else than was said."""

    peer: Identity
    lane: Lane


@quick_init
@dataclass(frozen=True, slots=True)
class DeclareAway:
    """It must not be used until it is declared up again."""

    peer: Identity


LanesEvent = Met | Parted | Answered | Made | NotMade | Broke
LanesCommand = Make | Drop | DeclareUp | DeclareAway


class State(StrEnum):
    """Where a lane is."""

    MAKING = "making"
    MEASURING = "measuring"
    """It is used, at the price that it had before it broke."""
    UP = "up"
    WAITING = "waiting"
    """It failed, and its time has not come."""


@dataclass(slots=True)
class _Lane:
    attempt: int
    """Under way, or the last; 0 once it is dropped."""
    state: State = State.MAKING
    wait_s: float = 0.0
    """The last one; 0: it has not failed since it was steady."""
    up_at: float = 0.0
    measured: Lane | None = None
    """As it was last; None: it never was up."""

    @property
    def used(self) -> bool:
        return self.state is State.UP or self.state is State.MEASURING


class Lanes:
    """All lanes that one worker reads over. Each `DeclareAway` follows a `DeclareUp` of the same peer, or two."""

    def __init__(self, config: LanesConfig = LanesConfig()) -> None:
        self._config = config
        self._lanes: dict[Identity, _Lane] = {}
        self._due = Ranked()
        """When each that waits is made again, by the peer's identity as text."""
        self._attempts = 0
        self.remade = 0
        """Lanes that broke and were made anew."""
        self.ignored = 0
        """Words about lanes that were dropped, or of attempts that are over."""

    def __len__(self) -> int:
        return len(self._lanes)

    def away(self, peer: Identity) -> bool:
        """True for a lane that was up, broke, and is not up again. One that never was is not away: it is new."""
        return self.was_up(peer) and not self._lanes[peer].used

    def was_up(self, peer: Identity) -> bool:
        """Whether it is, or has been."""
        lane = self._lanes.get(peer)
        return lane is not None and lane.measured is not None

    def measured(self, peer: Identity) -> bool:
        """Whether it is up, and its price is its own."""
        lane = self._lanes.get(peer)
        return lane is not None and lane.state is State.UP

    def tries(self, peer: Identity, attempt: int) -> bool:
        """True if the lane is of this attempt. Of any other one, which was given up here, a failure is no news."""
        return self._of(peer, attempt) is not None

    def on(self, event: LanesEvent | None, now: float) -> list[LanesCommand]:
        match event:
            case None:
                return [command for peer in self._due.until(now) for command in self._make(Identity.parse(peer))]
            case Met(peer):
                parting = self._part(peer)  # on another stream than before, whose end nobody told us
                self._attempts += 1
                self._lanes[peer] = _Lane(self._attempts)
                return [*parting, Make(peer, self._attempts)]
            case Parted(peer):
                return self._part(peer) if peer in self._lanes else self._ignore()
            case Answered(peer, attempt):
                lane = self._of(peer, attempt)
                if lane is None or lane.state is not State.MAKING or lane.measured is None:
                    return self._ignore()
                lane.state, lane.up_at = State.MEASURING, now
                self.remade += 1
                return [DeclareUp(peer, lane.measured)]
            case Made(peer, attempt, measured):
                lane = self._of(peer, attempt)
                if lane is None or lane.state is State.UP:
                    return self._ignore()
                if not lane.used:
                    # One that waits may be up after all: its probe came through although its connect had failed.
                    self._due.drop(str(peer))
                    self.remade += lane.measured is not None
                    lane.up_at = now
                lane.state, lane.measured = State.UP, measured
                return [DeclareUp(peer, measured)]
            case NotMade(peer, attempt):
                lane = self._of(peer, attempt)
                if lane is None or lane.state is State.UP or lane.state is State.WAITING:
                    return self._ignore()
                return self._fail(peer, lane, now) if lane.used else self._wait(peer, lane, now)
            case Broke(peer, attempt):
                lane = self._of(peer, attempt)
                if lane is None or lane.state is State.WAITING:
                    return self._ignore()
                return self._fail(peer, lane, now)
            case _:
                assert_never(event)

    def deadline(self) -> float | None:
        return self._due.lowest() if len(self._due) else None

    def check(self) -> None:
        waiting = {str(peer) for peer, lane in self._lanes.items() if lane.state is State.WAITING}
        assert waiting == {peer for peer, _ in self._due.items()}
        attempts = [lane.attempt for lane in self._lanes.values() if lane.attempt]
        assert all(lane.attempt or lane.state is State.WAITING for lane in self._lanes.values())
        assert len(attempts) == len(set(attempts))
        assert max(attempts, default=0) <= self._attempts
        for lane in self._lanes.values():
            assert 0 <= lane.wait_s <= self._config.most_s
            assert lane.measured is not None or not lane.used

    def _of(self, peer: Identity, attempt: int) -> _Lane | None:
        lane = self._lanes.get(peer)
        return lane if lane is not None and lane.attempt == attempt else None

    def _part(self, peer: Identity) -> list[LanesCommand]:
        lane = self._lanes.pop(peer, None)
        if lane is None:
            return []
        self._due.drop(str(peer))
        return [DeclareAway(peer), Drop(peer)] if lane.used else [Drop(peer)]

    def _fail(self, peer: Identity, lane: _Lane, now: float) -> list[LanesCommand]:
        """It is dropped: what else is said of this attempt is late."""
        used = lane.used
        if used and now - lane.up_at >= self._config.steady_s:
            lane.wait_s = 0.0
        lane.attempt = 0
        self._wait(peer, lane, now)
        return [DeclareAway(peer), Drop(peer)] if used else [Drop(peer)]

    def _wait(self, peer: Identity, lane: _Lane, now: float) -> list[LanesCommand]:
        config = self._config
        lane.state, lane.wait_s = State.WAITING, min(2 * lane.wait_s or config.first_s, config.most_s)
        self._due.put(str(peer), now + lane.wait_s)
        return []

    def _make(self, peer: Identity) -> list[LanesCommand]:
        """Once more, with nothing left of the attempt before."""
        lane = self._lanes[peer]
        self._attempts += 1
        lane.attempt, lane.state = self._attempts, State.MAKING
        return [Drop(peer), Make(peer, lane.attempt)]

    def _ignore(self) -> list[LanesCommand]:
        self.ignored += 1
        return []
