"""Who is still there, judged from what was heard: streams that ended, heartbeats that stopped. Pure.

Silence is judged twice: early that somebody is *quiet*, which may be a stall and costs him nothing but new work, and
later that he is lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from core.worker import Identity


@dataclass(frozen=True, slots=True)
class Connected:
    """A stream to this process stands."""

    identity: Identity


@dataclass(frozen=True, slots=True)
class Heard:
    """Something came from it."""

    identity: Identity


@dataclass(frozen=True, slots=True)
class Disconnected:
    """Its stream ended; `goodbye` if it said so itself, anything else is a loss (a killed peer looks like a close)."""

    identity: Identity
    goodbye: bool = False


class How(StrEnum):
    """What was heard of the end of a life."""

    GOODBYE = "said goodbye"
    BROKE = "stream broke"
    AWAY = "stream broke and did not come back"
    SILENT = "silent"
    RETURNED = "came back on a new stream"
    REPLACED = "replaced by a new incarnation"


@dataclass(frozen=True, slots=True)
class Lost:
    """This life of the process is over for us; it may only come back as another incarnation or a new stream."""

    identity: Identity
    reason: How

    @property
    def crashed(self) -> bool:
        """True if its process may have ended without a word; who started it knows better."""
        return self.reason in (How.BROKE, How.AWAY, How.REPLACED)


@dataclass(frozen=True, slots=True)
class Quiet:
    """Nothing comes from it, though its stream stands; or, not `quiet`, something does again."""

    identity: Identity
    quiet: bool = True


LivenessEvent = Connected | Heard | Disconnected


@dataclass(slots=True)
class _Known:
    heard_at: float
    gone_at: float | None = None
    quiet: bool = False


class Liveness:
    """Declares each identity lost once: at goodbye, `grace_s` after its stream broke, or when silent too long.

    A new incarnation of a name ends the old one at once, and so does a new stream of the same. With `quiet_s` it also
    says who is `Quiet`, after so much silence, and when something is heard again.
    """

    def __init__(self, *, silence_s: float, grace_s: float, quiet_s: float = math.inf) -> None:
        self._silence_s = silence_s
        self._grace_s = grace_s
        self._quiet_s = quiet_s
        self._known: dict[Identity, _Known] = {}

    def alive(self) -> tuple[Identity, ...]:
        """Everybody not declared lost, those in their grace included."""
        return tuple(self._known)

    def on(self, event: LivenessEvent | None, now: float) -> list[Lost | Quiet]:
        lost: list[Lost] = []
        quiet: list[Quiet] = []
        match event:
            case None:
                for who, known in self._known.items():
                    if self._until(known) <= now:
                        lost.append(Lost(who, self._why(known)))
                    elif self._notice(known) <= now:
                        known.quiet = True
                        quiet.append(Quiet(who))
            case Connected(identity):
                # The same life on a new stream has missed what was said meanwhile: both sides start anew.
                lost = [
                    Lost(who, How.RETURNED if who == identity else How.REPLACED)
                    for who in self._known
                    if who.name == identity.name
                ]
            case Heard(identity):
                if (heard := self._known.get(identity)) is not None:
                    heard.heard_at = now
                    if heard.quiet:
                        heard.quiet = False
                        quiet.append(Quiet(identity, quiet=False))
            case Disconnected(identity, goodbye):
                left = self._known.get(identity)
                if left is not None and (goodbye or self._grace_s == 0):
                    lost.append(Lost(identity, How.GOODBYE if goodbye else How.BROKE))
                elif left is not None and left.gone_at is None:
                    left.gone_at = now
        for each in lost:
            del self._known[each.identity]
        if isinstance(event, Connected):
            self._known[event.identity] = _Known(now)
        return [*lost, *quiet]

    def deadline(self) -> float | None:
        return min((min(self._until(known), self._notice(known)) for known in self._known.values()), default=None)

    def check(self) -> None:
        names = [identity.name for identity in self._known]
        assert len(names) == len(set(names)), "two lives of one name"

    def _notice(self, known: _Known) -> float:
        """When it is to be called quiet; never again before it was heard, and not if its stream is known to be gone."""
        return math.inf if known.quiet or known.gone_at is not None else known.heard_at + self._quiet_s

    def _until(self, known: _Known) -> float:
        silent = known.heard_at + self._silence_s
        return silent if known.gone_at is None else min(silent, known.gone_at + self._grace_s)

    def _why(self, known: _Known) -> How:
        return How.SILENT if known.gone_at is None else How.AWAY
