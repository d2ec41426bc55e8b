"""Who belongs to the deployment: admits, renews, expires. Pure; the coordinator's service is its shell."""

from __future__ import annotations

from dataclasses import dataclass, replace

from core.worker import PROTOCOL_VERSION, Costs, Identity, Lane, Member, Part, ProcessEnded, Role
from scheduler.alike import mismatch, stranger
from scheduler.transfer_map import TransferMap

KEPT = 32
"""Ends of processes that are told to whoever watches, the last ones."""


@dataclass(frozen=True, slots=True)
class Joining:
    """A process asks to belong."""

    member: Member
    told: int = 0
    """Version of the transfer map that it was told last, by whatever coordinator."""


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
        self._map = TransferMap()

    def part(self, identity: Identity) -> Part | None:
        """Who may exchange KV with a member, and for what; None if it is none."""
        return self._map.part(identity)

    @property
    def map_version(self) -> int:
        """Of the transfer map."""
        return self._map.version

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
            case Joining(member, told):
                if member.identity in self._ended:
                    return [Turned(member.identity, "this life of it has ended")]
                reason = self._objection(member)
                if reason is not None:
                    return [Turned(member.identity, reason)]
                former = self._members.get(member.identity.name)
                if former is not None and former.identity != member.identity:
                    self._map.drop(former.identity)
                self._members[member.identity.name] = member
                self._until[member.identity.name] = now + self._lease_s
                self._map.at_least(told)
                self._map.put(member)
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
        self._map.check()
        workers = {member.identity for member in self.members if member.role is not Role.GATEWAY}
        assert all((member.identity in self._map) == (member.identity in workers) for member in self.members)
        assert len(self._map) == len(workers)

    def _objection(self, member: Member) -> str | None:
        if member.protocol != PROTOCOL_VERSION:
            return f"protocol: got {member.protocol} from {member.identity.name}, want {PROTOCOL_VERSION}"
        for name, other in self._members.items():
            if name != member.identity.name:
                apart = Role.GATEWAY in (member.role, other.role) or member.group != other.group
                why = stranger if apart else mismatch
                if (reason := why(other, member)) is not None:
                    return reason
        return None

    def _drop(self, names: list[str]) -> list[MembershipCommand]:
        for name in names:
            self._map.drop(self._members.pop(name).identity)
            del self._until[name]
        return [self._publish()] if names else []

    def _publish(self) -> Publish:
        self._epoch += 1
        return Publish(self.members, self._epoch)
