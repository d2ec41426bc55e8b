"""What one worker may read of whom, and who of it: its part of the transfer map, carried out. Pure.

A peer whose stream stands and which the map allows something has a way. Lanes are made for what we may read, and no
other pull is begun or answered. What the map allows no more is not begun any more, either; what runs over it already
goes on to its end, and then the lane is given up, and the stream closed if nothing is left of the way.

The map speaks of those that the coordinator lists. Of anybody else, one that has just come or is lost to a coordinator
that was started again, a worker judges by the same rules (`transfer_map.way`), from what the peer says of itself: so a
list that comes back short takes nothing away, and a peer that heard of us first is not sent away.

| parameter | unit | default | meaning |
|---|---|---|---|
| look_s | s | 0.5 | from the end of a permission to the look whether something still runs, and between two looks |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from core.errors import LocalError
from core.ranked import Ranked
from core.worker import Identity, Member, Part, Use, Way
from scheduler.alike import mismatch
from scheduler.transfer_map import way


# Events.
@dataclass(frozen=True, slots=True)
class Told:
    """The coordinator's word: our part of the map, and whom it has listed."""

    part: Part
    listed: tuple[Identity, ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream to a peer stands."""

    peer: Member


@dataclass(frozen=True, slots=True)
class Parted:
    """It does not any more."""

    peer: Identity


@dataclass(frozen=True, slots=True)
class Looked:
    """Whether something that was begun with a peer still runs: the answer to `Look`."""

    peer: Identity
    busy: bool


# Commands.
@dataclass(frozen=True, slots=True)
class Lay:
    """Make a lane to read from a peer."""

    peer: Identity


@dataclass(frozen=True, slots=True)
class Lift:
    """Give it up."""

    peer: Identity


@dataclass(frozen=True, slots=True)
class Turn:
    """What may be begun with a peer is not what it was."""

    peer: Identity


@dataclass(frozen=True, slots=True)
class Look:
    """Does anything run with a peer? Ends in `Looked`."""

    peer: Identity


@dataclass(frozen=True, slots=True)
class Close:
    """End the stream to a peer: nothing runs over it, and nothing will."""

    peer: Identity
    reason: str


WaysEvent = Told | Opened | Parted | Looked
WaysCommand = Lay | Lift | Turn | Look | Close


@dataclass(frozen=True, slots=True)
class WaysConfig:
    """Settings; see the module's table."""

    look_s: float = 0.5

    def __post_init__(self) -> None:
        if not self.look_s > 0:
            raise LocalError(f"ways: got {self}, want look_s above 0")


@dataclass(slots=True)
class _Peer:
    own: Way
    """By what it says of itself."""
    laid: bool = False
    looking: bool = False


class Ways:
    """All peers of one worker. Each `Lift` follows a `Lay`, and each `Look` is answered before the next."""

    def __init__(self, me: Member, config: WaysConfig = WaysConfig()) -> None:
        self._me = me
        self._config = config
        self._peers: dict[Identity, _Peer] = {}
        """Those to whom a stream stands."""
        self._told: dict[Identity, Way] = {}
        self._listed: set[Identity] = set()
        self._due = Ranked()
        """The next look at each that may do less than it does, by the peer's identity as text."""
        self.version = 0
        """Of the map that was told last."""
        self.ignored = 0
        """Words about peers that are gone, and maps older than the one we have."""

    def __len__(self) -> int:
        return len(self._peers)

    def __contains__(self, peer: Identity) -> bool:
        return peer in self._peers

    def pulls(self, peer: Identity, use: Use) -> bool:
        """May we begin to read from it for that?"""
        return use in self._way(peer).pulls

    def serves(self, peer: Identity, use: Use) -> bool:
        """May it begin to read from us for that?"""
        return use in self._way(peer).serves

    def wanted(self, peer: Identity) -> bool:
        """Should a stream to it stand? One that must not be closed yet is wanted as well."""
        way = self._way(peer)
        return bool(way.pulls or way.serves) or peer in self._peers

    def refusal(self, peer: Member) -> str | None:
        """Why a stream to it cannot be, None if it can."""
        if (why := mismatch(self._me, peer)) is not None:
            return why
        if self._me.group != peer.group:
            ours, theirs = self._me, peer
            who, whose = theirs.identity.name, ours.identity.name
            return f"group: got {theirs.group!r} from {who}, want {ours.group!r} as {whose} has"
        if peer.identity in self._listed and peer.identity not in self._told:
            return f"transfer map {self.version}: {peer.identity.name} and {self._me.identity.name} exchange no KV"
        return None

    def on(self, event: WaysEvent | None, now: float) -> list[WaysCommand]:
        match event:
            case None:
                return [self._look(Identity.parse(peer)) for peer in self._due.until(now)]
            case Told(part, listed):
                if part.version < self.version:
                    return self._ignore()
                before = {peer: self._way(peer) for peer in self._peers}
                self.version, self._listed = part.version, set(listed)
                self._told = {each.peer: each for each in part.ways}
                turned = [peer for peer, was in before.items() if self._way(peer) != was]
                return [command for peer in turned for command in (Turn(peer), *self._settle(peer, now))]
            case Opened(member):
                if member.identity in self._peers:
                    raise LocalError(f"ways: {member.identity} has a stream already")
                self._peers[member.identity] = _Peer(way(self._me, member))
                return self._settle(member.identity, now)
            case Parted(identity):
                if self._peers.pop(identity, None) is None:
                    return self._ignore()
                self._due.drop(str(identity))
                return []
            case Looked(identity, busy):
                peer = self._peers.get(identity)
                if peer is None or not peer.looking:
                    return self._ignore()
                peer.looking = False
                return self._settle(identity, now) if busy else self._give_up(identity, peer)
            case _:
                assert_never(event)

    def deadline(self) -> float | None:
        return self._due.lowest() if len(self._due) else None

    def check(self) -> None:
        for identity, peer in self._peers.items():
            allowed = self._way(identity)
            spare = not (allowed.pulls or allowed.serves) or (peer.laid and not allowed.pulls)
            assert spare == (str(identity) in self._due) or peer.looking
            assert not (peer.looking and str(identity) in self._due)
            assert peer.laid or not allowed.pulls
        assert all(Identity.parse(peer) in self._peers for peer, _ in self._due.items())
        assert self._told.keys() <= self._listed

    def _way(self, identity: Identity) -> Way:
        if identity in self._listed:
            return self._told.get(identity) or Way(identity)
        peer = self._peers.get(identity)
        return peer.own if peer is not None else Way(identity)

    def _settle(self, identity: Identity, now: float) -> list[WaysCommand]:
        """Have the lane that is allowed, and look after a while whether one that is not can go."""
        peer, allowed = self._peers[identity], self._way(identity)
        if peer.looking:
            return []
        self._due.drop(str(identity))
        if not (allowed.pulls or allowed.serves) or (peer.laid and not allowed.pulls):
            self._due.put(str(identity), now + self._config.look_s)
        if allowed.pulls and not peer.laid:
            peer.laid = True
            return [Lay(identity)]
        return []

    def _look(self, identity: Identity) -> WaysCommand:
        self._peers[identity].looking = True
        return Look(identity)

    def _give_up(self, identity: Identity, peer: _Peer) -> list[WaysCommand]:
        """Nothing runs: what is not allowed ends, as things stand now."""
        allowed = self._way(identity)
        commands: list[WaysCommand] = []
        if peer.laid and not allowed.pulls:
            peer.laid = False
            commands.append(Lift(identity))
        if not (allowed.pulls or allowed.serves):
            del self._peers[identity]
            reason = f"transfer map {self.version}: we exchange no KV any more"
            return [*commands, Close(identity, reason)]
        if allowed.pulls and not peer.laid:
            peer.laid = True
            commands.append(Lay(identity))
        return commands

    def _ignore(self) -> list[WaysCommand]:
        self.ignored += 1
        return []
