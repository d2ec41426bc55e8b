"""Who belongs to the deployment: admits, renews, expires. Pure; the coordinator's service is its shell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from core.worker import PROTOCOL_VERSION, Identity, Lane, Member, Role


def mismatch(ours: Member, theirs: Member) -> str | None:
    """Why two workers cannot exchange KV, naming the field, got and wanted; None if they can."""
    for field in ("protocol", "model", "fingerprint", "kv", "transport"):
        got, want = getattr(theirs, field), getattr(ours, field)
        if got != want:
            return f"{field}: got {got} from {theirs.identity.name}, want {want} as {ours.identity.name} has"
    mine, others = ours.numerics, theirs.numerics
    if mine and others and (mine.exact or others.exact) and mine != others:
        return (
            f"numerics: got {others} from {theirs.identity.name}, want {mine} as {ours.identity.name} has, "
            "because exact mode needs the same bits everywhere"
        )
    return None


@dataclass(frozen=True, slots=True)
class Joining:
    """A process asks to belong."""

    member: Member


@dataclass(frozen=True, slots=True)
class Renewed:
    """It is still there."""

    identity: Identity
    ready: bool
    lanes: tuple[Lane, ...]


@dataclass(frozen=True, slots=True)
class Left:
    """It says that it goes."""

    identity: Identity


@dataclass(frozen=True, slots=True)
class Admitted:
    """It belongs; renew its lease before it ends."""

    identity: Identity


@dataclass(frozen=True, slots=True)
class Turned:
    """It cannot belong, and why."""

    identity: Identity
    reason: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """We do not know it (any more): it must register again."""

    identity: Identity


@dataclass(frozen=True, slots=True)
class Publish:
    """The membership changed: tell all watchers."""

    members: tuple[Member, ...]
    epoch: int


MembershipEvent = Joining | Renewed | Left
MembershipCommand = Admitted | Turned | Unknown | Publish


class Membership:
    """The list of members; each lives for `lease_s` from its last word. A new incarnation replaces the old."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._members: dict[str, Member] = {}
        self._until: dict[str, float] = {}
        self._epoch = 0

    @property
    def members(self) -> tuple[Member, ...]:
        """All members by name."""
        return tuple(self._members[name] for name in sorted(self._members))

    @property
    def epoch(self) -> int:
        """Counts changes."""
        return self._epoch

    def on(self, event: MembershipEvent | None, now: float) -> list[MembershipCommand]:
        match event:
            case None:
                expired = [name for name, until in self._until.items() if until <= now]
                return self._drop(expired)
            case Joining(member):
                reason = self._objection(member)
                if reason is not None:
                    return [Turned(member.identity, reason)]
                self._members[member.identity.name] = member
                self._until[member.identity.name] = now + self._lease_s
                return [Admitted(member.identity), self._publish()]
            case Renewed(identity, ready, lanes):
                known = self._members.get(identity.name)
                if known is None or known.identity != identity:
                    return [Unknown(identity)]
                self._until[identity.name] = now + self._lease_s
                if (known.ready, known.lanes) == (ready, lanes):
                    return []
                self._members[identity.name] = replace(known, ready=ready, lanes=lanes)
                return [self._publish()]
            case Left(identity):
                known = self._members.get(identity.name)
                return self._drop([identity.name]) if known and known.identity == identity else []

    def deadline(self) -> float | None:
        return min(self._until.values(), default=None)

    def check(self) -> None:
        assert self._members.keys() == self._until.keys()
        assert all(name == member.identity.name for name, member in self._members.items())

    def _objection(self, member: Member) -> str | None:
        if member.protocol != PROTOCOL_VERSION:
            return f"protocol: got {member.protocol} from {member.identity.name}, want {PROTOCOL_VERSION}"
        others: Iterable[Member] = (m for name, m in self._members.items() if name != member.identity.name)
        if member.role is Role.GATEWAY:
            wrong = (
                f"{field}: got {getattr(member, field)} from {member.identity.name}, want {getattr(other, field)}"
                for other in others
                for field in ("model", "fingerprint")
                if getattr(other, field) != getattr(member, field)
            )
            return next(wrong, None)
        return next((why for other in others if other.kv and (why := mismatch(other, member))), None)

    def _drop(self, names: list[str]) -> list[MembershipCommand]:
        for name in names:
            del self._members[name]
            del self._until[name]
        return [self._publish()] if names else []

    def _publish(self) -> Publish:
        self._epoch += 1
        return Publish(self.members, self._epoch)
