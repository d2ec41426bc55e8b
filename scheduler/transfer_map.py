"""Who may pull KV from whom, and for what: one map of the deployment, drawn from its members alone. Pure.

After P/D-Serve (fine-grained organisation, its RoCE map): all prefill workers of a group are connected with all decode
workers of the same group, and with nobody else. The coordinator keeps the map and tells each worker its part of it
with the membership; workers open streams and lanes for what it says, and refuse other pulls (`scheduler/ways.py`).

| use | the reader | the source |
|---|---|---|
| hand_off | decodes | prefills |
| move | gives and takes running rows | does so, too |
| fetch | takes prompts, and fetches pages of them | any, if its pages are named alike |

Both are of one group and understand each other's pages (`alike.mismatch`). What a worker is allowed depends on
what it is, not on who it is: workers that are alike share a *kind*, and there are few kinds however many workers there
are. So a change of one member costs as many steps as there are kinds, and a worker's part as many as it has peers.

The version rises whenever somebody's part changes, and never falls: a coordinator that was started again learns from
those who register which version they were told last, and goes on from there.
"""

from __future__ import annotations

from typing import Any

from core.worker import Identity, Member, Part, Role, Use, Way
from scheduler.alike import mismatch

Kind = tuple[Any, ...]
"""All of a member that the map depends on."""


def uses(reader: Member, source: Member) -> tuple[Use, ...]:
    """What `reader` may pull from `source`, another worker; nothing between groups."""
    if (
        reader.group != source.group
        or Role.GATEWAY in (reader.role, source.role)
        or mismatch(reader, source) is not None
    ):
        return ()
    found = []
    if reader.role.decodes and source.role.prefills:
        found.append(Use.HAND_OFF)
    if reader.migrates and source.migrates:
        found.append(Use.MOVE)
    if reader.fetches and reader.kv == source.kv:
        found.append(Use.FETCH)
    return tuple(found)


def way(me: Member, peer: Member) -> Way:
    """What `me` and `peer` may do by what they say of themselves."""
    return Way(peer.identity, uses(me, peer), uses(peer, me))


class TransferMap:
    """The whole map."""

    def __init__(self) -> None:
        self.version = 0
        """Of everything that `part` says now."""
        self._kinds: dict[Kind, dict[Identity, Member]] = {}
        self._kind_of: dict[Identity, Kind] = {}
        self._uses: dict[tuple[Kind, Kind], tuple[Use, ...]] = {}
        """What one of the first kind may pull from one of the second, of kinds that there are."""

    def __len__(self) -> int:
        return len(self._kind_of)

    def __contains__(self, identity: Identity) -> bool:
        return identity in self._kind_of

    def at_least(self, version: int) -> None:
        """Somebody was told this version before: what we say from now on is newer."""
        if version > self.version:
            self.version = version + 1

    def put(self, member: Member) -> bool:
        """A member is there, or says something else of itself; True if anybody's part has changed."""
        if member.role is Role.GATEWAY:
            return self.drop(member.identity)
        kind, former = _kind(member), self._kind_of.get(member.identity)
        if kind == former:
            return False
        before = self._peers(member.identity)
        if former is not None:
            self._forget(member.identity, former)
        if kind not in self._kinds:
            self._uses |= self._between(kind, member)
        self._kinds.setdefault(kind, {})[member.identity] = member
        self._kind_of[member.identity] = kind
        return self._changed(before != self._peers(member.identity))

    def drop(self, identity: Identity) -> bool:
        """A member is not there any more; True if anybody's part has changed."""
        kind = self._kind_of.get(identity)
        if kind is None:
            return False
        changed = bool(self._peers(identity))
        self._forget(identity, kind)
        return self._changed(changed)

    def part(self, identity: Identity) -> Part | None:
        """What one worker is told; None if it is no member."""
        mine = self._kind_of.get(identity)
        if mine is None:
            return None
        ways = [
            Way(peer, self._uses[mine, kind], self._uses[kind, mine])
            for kind, peers in self._kinds.items()
            if self._uses[mine, kind] or self._uses[kind, mine]
            for peer in peers
            if peer != identity
        ]
        return Part(self.version, tuple(sorted(ways, key=lambda each: each.peer)))

    def check(self) -> None:
        """Invariants, and that kinds stand for their members."""
        assert all(identity in self._kinds[kind] for identity, kind in self._kind_of.items())
        assert sum(map(len, self._kinds.values())) == len(self._kind_of)
        assert all(self._kinds.values())
        assert self._uses.keys() == {(one, other) for one in self._kinds for other in self._kinds}
        for (reader, source), known in self._uses.items():
            one, other = next(iter(self._kinds[reader].values())), next(iter(self._kinds[source].values()))
            assert known == uses(one, other)

    def _between(self, kind: Kind, member: Member) -> dict[tuple[Kind, Kind], tuple[Use, ...]]:
        """What a kind that is new may pull from each, and each from it."""
        found = {(kind, kind): uses(member, member)}
        for other, peers in self._kinds.items():
            like = next(iter(peers.values()))
            found[kind, other] = uses(member, like)
            found[other, kind] = uses(like, member)
        return found

    def _peers(self, identity: Identity) -> dict[Kind, tuple[tuple[Use, ...], tuple[Use, ...]]]:
        """What it may pull from whom, and they from it, by kinds of which there is somebody else."""
        kind = self._kind_of.get(identity)
        if kind is None:
            return {}
        found = {other: (self._uses[kind, other], self._uses[other, kind]) for other in self._kinds}
        alone = len(self._kinds[kind]) == 1
        return {other: both for other, both in found.items() if any(both) and not (alone and other == kind)}

    def _forget(self, identity: Identity, kind: Kind) -> None:
        del self._kind_of[identity], self._kinds[kind][identity]
        if not self._kinds[kind]:
            del self._kinds[kind]
            self._uses = {pair: known for pair, known in self._uses.items() if kind not in pair}

    def _changed(self, anything: bool) -> bool:
        self.version += anything
        return anything


def _kind(member: Member) -> Kind:
    return (
        member.role,
        member.group,
        member.migrates,
        member.fetches,
        member.kv,
        member.numerics,
        member.transport,
        member.protocol,
        member.model,
        member.fingerprint,
    )
