"""Who belongs to the deployment: admits, renews, expires. Pure; the coordinator's service is its shell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from core.kv import KvShape
from core.worker import PROTOCOL_VERSION, Costs, Identity, Lane, Member, Numerics, ProcessEnded, Role

_NUMERICS = tuple(field.name for field in fields(Numerics))
KEPT = 32
"""Ends of processes that are told to whoever watches, the last ones."""
_SAME = ("protocol", "model", "fingerprint")
"""What all processes of a deployment have in common."""
_SAME_KV = (*(f"kv.{field.name}" for field in fields(KvShape) if field.name != "page_tokens"), "transport")
"""And what all its workers have. Pages may differ in their tokens, if one is a multiple of the other."""


def stranger(ours: Member, theirs: Member) -> str | None:
    """Why two processes cannot be of one deployment, naming the field, got and wanted; None if they can."""
    return _unlike(ours, theirs, _SAME)


def mismatch(ours: Member, theirs: Member) -> str | None:
    """Why two workers cannot exchange KV, naming the field, got and wanted; None if they can."""
    if (why := _unlike(ours, theirs, _SAME + _SAME_KV)) is not None:
        return why
    if ours.kv is not None and theirs.kv is not None:
        got, want = theirs.kv.page_tokens, ours.kv.page_tokens
        if max(got, want) % min(got, want):
            who, whose = theirs.identity.name, ours.identity.name
            return f"kv.page_tokens: got {got} from {who}, want a multiple or a divisor of {want} as {whose} has"
    if any(each.numerics is not None and each.numerics.exact for each in (ours, theirs)):
        why = _unlike(ours, theirs, tuple(f"numerics.{name}" for name in _NUMERICS))
        return f"{why}, because exact mode needs the same bits everywhere" if why is not None else None
    return None


def _unlike(ours: Member, theirs: Member, names: Iterable[str]) -> str | None:
    """The first of these fields (or fields of fields) in which two members differ, as a sentence."""
    for name in names:
        outer, _, inner = name.partition(".")
        got, want = getattr(theirs, outer), getattr(ours, outer)
        if got != want and inner and got is not None and want is not None:
            got, want = getattr(got, inner), getattr(want, inner)
        if got != want:
            name = outer if got is None or want is None else name
            got, want = ("none" if value is None else value for value in (got, want))
            return f"{name}: got {got} from {theirs.identity.name}, want {want} as {ours.identity.name} has"
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
    costs: Costs | None = None
    """None: as before."""


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


MembershipEvent = Joining | Renewed | Left | ProcessEnded
MembershipCommand = Admitted | Turned | Unknown | Publish


class Membership:
    """The list of members; each lives for `lease_s` from its last word. A new incarnation replaces the old."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._members: dict[str, Member] = {}
        self._until: dict[str, float] = {}
        self._epoch = 0
        self._ended: dict[Identity, ProcessEnded] = {}

    @property
    def ended(self) -> tuple[ProcessEnded, ...]:
        """The last ends that were heard of, the oldest first."""
        return tuple(self._ended.values())

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
                if member.identity in self._ended:
                    return [Turned(member.identity, "this life of it has ended")]
                reason = self._objection(member)
                if reason is not None:
                    return [Turned(member.identity, reason)]
                self._members[member.identity.name] = member
                self._until[member.identity.name] = now + self._lease_s
                return [Admitted(member.identity), self._publish()]
            case Renewed(identity, ready, lanes, costs):
                known = self._members.get(identity.name)
                if known is None or known.identity != identity:
                    return [Unknown(identity)]
                self._until[identity.name] = now + self._lease_s
                renewed = replace(known, ready=ready, lanes=lanes, costs=costs if costs is not None else known.costs)
                if renewed == known:
                    return []
                self._members[identity.name] = renewed
                return [self._publish()]
            case Left(identity):
                known = self._members.get(identity.name)
                return self._drop([identity.name]) if known and known.identity == identity else []
            case ProcessEnded(identity):
                if identity in self._ended:
                    return []
                self._ended[identity] = event
                for oldest in list(self._ended)[:-KEPT]:
                    del self._ended[oldest]
                known = self._members.get(identity.name)
                if known is not None and known.identity == identity:
                    return self._drop([identity.name])
                return [self._publish()]

    def deadline(self) -> float | None:
        return min(self._until.values(), default=None)

    def check(self) -> None:
        assert self._members.keys() == self._until.keys()
        assert len(self._ended) <= KEPT
        assert all(identity == each.identity for identity, each in self._ended.items())
        assert not self._ended.keys() & {member.identity for member in self._members.values()}
        assert all(name == member.identity.name for name, member in self._members.items())

    def _objection(self, member: Member) -> str | None:
        if member.protocol != PROTOCOL_VERSION:
            return f"protocol: got {member.protocol} from {member.identity.name}, want {PROTOCOL_VERSION}"
        for name, other in self._members.items():
            if name != member.identity.name:
                why = stranger if Role.GATEWAY in (member.role, other.role) else mismatch
                if (reason := why(other, member)) is not None:
                    return reason
        return None

    def _drop(self, names: list[str]) -> list[MembershipCommand]:
        for name in names:
            del self._members[name]
            del self._until[name]
        return [self._publish()] if names else []

    def _publish(self) -> Publish:
        self._epoch += 1
        return Publish(self.members, self._epoch)
