"""A worker's part of the transfer map, carried out: lanes and streams for what it allows, and nothing begun beside."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from core.errors import LocalError
from core.state import dump, load
from core.worker import Identity, Part, Role, Use, Way
from scheduler.transfer_map import way
from scheduler.ways import (
    Close,
    Lay,
    Lift,
    Look,
    Looked,
    Opened,
    Parted,
    Told,
    Turn,
    Ways,
    WaysConfig,
)
from tests.cast import D1, D2, P1, P2, efforts, worker

ME = replace(worker(D1, Role.DECODE), migrates=True)
P, P_ = worker(P1, Role.PREFILL), worker(P2, Role.PREFILL)
D = replace(worker(D2, Role.DECODE), migrates=True)
HANDS, MOVES = Way(P1, (Use.HAND_OFF,), ()), Way(D2, (Use.MOVE,), (Use.MOVE,))
ALL = (D1, D2, P1, P2)


def told(version, *ways, listed=ALL):
    return Told(Part(version, ways), listed)


def over(version):
    return f"transfer map {version}: we exchange no KV any more"


def test_a_lane_is_laid_for_a_peer_whose_stream_stands():
    ways = Ways(ME)
    assert ways.on(told(1, HANDS, MOVES), 0.0) == []
    assert ways.on(Opened(P), 0.0) == [Lay(P1)]
    assert ways.on(Opened(D), 0.0) == [Lay(D2)]
    assert ways.pulls(P1, Use.HAND_OFF)
    assert not ways.pulls(P1, Use.MOVE)
    assert not ways.serves(P1, Use.HAND_OFF)
    assert ways.serves(D2, Use.MOVE)
    assert ways.deadline() is None
    assert len(ways) == 2


def test_one_that_only_reads_from_us_needs_no_lane():
    ways = Ways(P)
    ways.on(told(1, Way(D1, (), (Use.HAND_OFF,))), 0.0)
    assert ways.on(Opened(ME), 0.0) == []
    assert ways.serves(D1, Use.HAND_OFF)
    assert ways.wanted(D1)
    assert not ways.wanted(D2)


def test_what_is_allowed_no_more_is_not_begun_and_what_runs_ends_before_the_lane_goes():
    ways = Ways(ME)
    ways.on(told(1, HANDS), 0.0)
    ways.on(Opened(P), 0.0)
    assert ways.on(told(2), 1.0) == [Turn(P1)]
    assert not ways.pulls(P1, Use.HAND_OFF)
    assert ways.wanted(P1), "its stream is needed for what runs"
    assert ways.deadline() == 1.5
    assert ways.on(None, 1.4) == []
    assert ways.on(None, 1.5) == [Look(P1)]
    assert ways.deadline() is None
    assert ways.on(Looked(P1, busy=True), 1.6) == []
    assert ways.deadline() == 2.1
    assert ways.on(None, 2.1) == [Look(P1)]
    assert ways.on(Looked(P1, busy=False), 2.1) == [Lift(P1), Close(P1, over(2))]
    assert not ways.wanted(P1)
    assert len(ways) == 0
    assert ways.on(Parted(P1), 2.2) == []
    assert ways.ignored == 1


def test_one_that_is_allowed_again_in_time_keeps_its_lane():
    ways = Ways(ME)
    ways.on(told(1, HANDS), 0.0)
    ways.on(Opened(P), 0.0)
    ways.on(told(2), 1.0)
    assert ways.on(told(3, HANDS), 1.2) == [Turn(P1)]
    assert ways.deadline() is None
    ways.on(told(4), 2.0)
    ways.on(None, 2.5)
    assert ways.on(told(5, HANDS), 2.5) == [Turn(P1)], "while somebody looks"
    assert ways.on(Looked(P1, busy=False), 2.5) == []
    assert ways.pulls(P1, Use.HAND_OFF)


def test_where_only_reading_ends_the_stream_stays():
    ways = Ways(ME)
    ways.on(told(1, MOVES), 0.0)
    ways.on(Opened(D), 0.0)
    ways.on(told(2, Way(D2, (), (Use.MOVE,))), 0.0)
    ways.on(None, 0.5)
    assert ways.on(Looked(D2, busy=False), 0.5) == [Lift(D2)]
    assert ways.wanted(D2)
    assert ways.on(told(3, MOVES), 0.6) == [Turn(D2), Lay(D2)]


def test_a_list_without_a_peer_takes_nothing_away():
    """The coordinator was started again, and the peer has not registered yet."""
    ways = Ways(ME)
    ways.on(told(1, HANDS), 0.0)
    ways.on(Opened(P), 0.0)
    assert ways.on(told(2, listed=(D1,)), 1.0) == []
    assert ways.pulls(P1, Use.HAND_OFF)
    assert ways.deadline() is None
    assert ways.refusal(P) is None


def test_a_peer_that_nobody_has_told_of_is_judged_by_what_it_says():
    ways = Ways(ME)
    assert ways.refusal(P) is None
    assert ways.on(Opened(P), 0.0) == [Lay(P1)]
    assert ways.pulls(P1, Use.HAND_OFF)
    assert ways.on(told(4, HANDS), 0.0) == []


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        (replace(P, group="chat"), "group: got 'chat' from prefill-1, want '' as decode-1 has"),
        (replace(P, fingerprint="x"), "fingerprint: got x from prefill-1, want f as decode-1 has"),
        (P, "transfer map 3: prefill-1 and decode-1 exchange no KV"),
        (replace(P, identity=Identity(P1.name, 0x99)), None),
    ],
)
def test_a_stream_from_outside_the_map_is_refused_with_the_reason(peer, why):
    ways = Ways(ME)
    ways.on(told(3, MOVES), 0.0)
    assert ways.refusal(peer) == why


def test_an_older_map_changes_nothing():
    ways = Ways(ME)
    ways.on(told(5, HANDS), 0.0)
    ways.on(Opened(P), 0.0)
    assert ways.on(told(4), 0.0) == []
    assert ways.pulls(P1, Use.HAND_OFF)
    assert ways.version == 5
    assert ways.ignored == 1


def test_what_cannot_be():
    ways = Ways(ME)
    ways.on(Opened(P), 0.0)
    with pytest.raises(LocalError, match="has a stream already"):
        ways.on(Opened(P), 0.0)
    ways.check()
    with pytest.raises(LocalError, match="want look_s above 0"):
        WaysConfig(look_s=0.0)


PEERS = [P, P_, D, replace(worker(Identity("decode-9", 9), Role.DECODE), migrates=True)]


class Worker(RuleBasedStateMachine):
    """Streams come and go, maps are told, tickets run; lanes, streams and tickets are kept as a worker would."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = Ways(ME)
        self.now = 0.0
        self.open: dict = {}
        self.laid: set = set()
        self.running: dict = {}
        """Tickets by peer."""
        self.looks: list = []
        self.version = 0

    def do(self, event):
        allowed = {who: self.allowed(who) for who in self.open}
        commands = self.ways.on(event, self.now)
        self.ways.check()
        for command in commands:
            who = command.peer
            assert who in self.open
            match command:
                case Lay():
                    assert who not in self.laid
                    self.laid.add(who)
                case Lift():
                    assert not self.running.get(who), "a ticket was cut off"
                    self.laid.remove(who)
                case Turn():
                    assert isinstance(event, Told)
                    assert allowed[who] != self.allowed(who)
                case Look():
                    assert who not in self.looks
                    self.looks.append(who)
                case Close():
                    assert not self.running.get(who), "a ticket was cut off"
                    assert who not in self.laid
                    del self.open[who]
                    self.looks = [each for each in self.looks if each != who]

    def allowed(self, who):
        return [(use, self.ways.pulls(who, use), self.ways.serves(who, use)) for use in Use]

    @rule(peer=st.sampled_from(PEERS))
    def opens(self, peer):
        if peer.identity not in self.open and self.ways.refusal(peer) is None:
            self.open[peer.identity] = peer
            self.do(Opened(peer))

    @rule(peer=st.sampled_from(PEERS))
    def breaks(self, peer):
        who = peer.identity
        if who in self.open:
            self.laid.discard(who)
            self.running.pop(who, None)
            self.looks = [each for each in self.looks if each != who]
            self.do(Parted(who))
            del self.open[who]

    @rule(peers=st.sets(st.sampled_from(range(4))), cut=st.sets(st.sampled_from(range(4))), older=st.booleans())
    def tells(self, peers, cut, older):
        """A list of some, of whom the map allows all but those that somebody has `cut`."""
        self.version += not older
        version = self.version - (older and self.version % 2)
        listed = [PEERS[number] for number in sorted(peers)]
        some = [way(ME, PEERS[number]) for number in sorted(peers - cut)]
        self.do(told(version, *some, listed=(D1, *(each.identity for each in listed))))

    @rule(peer=st.sampled_from(PEERS), use=st.sampled_from(Use))
    def begins(self, peer, use):
        who = peer.identity
        if who in self.open and (self.ways.pulls(who, use) or self.ways.serves(who, use)):
            self.running[who] = self.running.get(who, 0) + 1

    @rule(peer=st.sampled_from(PEERS))
    def ends(self, peer):
        if self.running.get(peer.identity):
            self.running[peer.identity] -= 1

    @rule()
    def looked(self):
        if self.looks:
            who = self.looks.pop(0)
            self.do(Looked(who, bool(self.running.get(who))))

    @rule(wait_s=st.sampled_from([0.0, 0.1, 0.5, 2.0]))
    def waits(self, wait_s):
        until = self.now + wait_s
        while (due := self.ways.deadline()) is not None and due <= until:
            assert due >= self.now
            self.now = due
            self.do(None)
        self.now = until

    @rule()
    def restored(self):
        self.ways = load(json.loads(json.dumps(dump(self.ways))), Ways)

    @invariant()
    def lanes_are_what_is_allowed_or_about_to_go(self):
        due = self.ways.deadline()
        assert due is None or self.now <= due <= self.now + 0.5
        for who in self.open:
            pulls = any(self.ways.pulls(who, use) for use in Use)
            assert not pulls or who in self.laid or who in self.looks
        assert len(self.ways) == len(self.open)

    def teardown(self):
        """What is not allowed goes as soon as nothing runs."""
        self.running.clear()
        for _ in range(3):
            while self.looks:
                self.looked()
            self.waits(0.5)
        while self.looks:
            self.looked()
        for who in self.open:
            assert any(allowed for _, *both in self.allowed(who) for allowed in both)
            assert (who in self.laid) == any(self.ways.pulls(who, use) for use in Use)
        assert self.ways.deadline() is None


@efforts
def test_nothing_is_cut_off_and_nothing_stays_that_is_not_allowed(effort):
    run_state_machine_as_test(Worker, settings=settings(effort, max_examples=effort.max_examples // 4))
