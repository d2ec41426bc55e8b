"""Lanes that break and are made anew: stories, then a transfer thread that does as it likes."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core.errors import LocalError
from core.worker import Identity, Lane
from scheduler.lanes import (
    Answered,
    Broke,
    DeclareAway,
    DeclareUp,
    Drop,
    Lanes,
    LanesConfig,
    Made,
    Make,
    Met,
    NotMade,
    Parted,
    State,
)
from tests.cast import D1, P1, P2, efforts

LANE = Lane(P1, "ucx: cma/memory", 9.0, 20.0)
CONFIG = LanesConfig(first_s=0.1, most_s=1.0, steady_s=10.0)

STORIES = {
    "a lane is made when its peer is met and dropped when it is gone": """
        0.0 met             : make 1
        0.5 made 1          : up
        9.0 parted          : away, drop
    """,
    "one that could not be made is tried again, later and later, and never later than that": """
        0.0 met             : make 1
        0.5 not made 1      : -
        0.6 timer           : drop, make 2
        0.6 not made 2      : -
        0.8 timer           : drop, make 3
        0.8 not made 3      : -
        1.2 timer           : drop, make 4
        1.2 not made 4      : -
        2.0 timer           : drop, make 5
        2.0 not made 5      : -
        3.0 timer           : drop, make 6
        3.0 not made 6      : -
        4.0 timer           : drop, make 7
        4.2 made 7          : up
    """,
    "one that breaks is away until it is made anew": """
        0.0 met             : make 1
        0.5 made 1          : up
        20  broke 1         : away, drop
        20.1 timer          : drop, make 2
        20.2 made 2         : up
    """,
    "one that was measured before is used from its first read on": """
        0.0 met             : make 1
        0.1 answered 1      : -
        0.5 made 1          : up
        20  broke 1         : away, drop
        20.1 answered 1     : -
        20.1 timer          : drop, make 2
        20.1 answered 2     : up
        20.2 answered 2     : -
        20.9 made 2         : up
        21.0 made 2         : -
        21.0 not made 2     : -
    """,
    "one that breaks while it is measured anew was used": """
        0.0 met             : make 1
        0.5 made 1          : up
        20  broke 1         : away, drop
        20.1 timer          : drop, make 2
        20.2 answered 2     : up
        20.3 broke 2        : away, drop
        20.5 timer          : drop, make 3
        20.6 answered 3     : up
        20.7 not made 3     : away, drop
        20.7 made 3         : -
        21.1 timer          : drop, make 4
        21.2 answered 4     : up
        21.3 parted         : away, drop
    """,
    "one that breaks again and again is made later and later, until it was steady": """
        0.0 met             : make 1
        0.0 made 1          : up
        1.0 broke 1         : away, drop
        1.1 timer           : drop, make 2
        1.1 made 2          : up
        1.5 broke 2         : away, drop
        1.7 timer           : drop, make 3
        1.7 made 3          : up
        11.6 broke 3        : away, drop
        12.0 timer          : drop, make 4
        12.0 made 4         : up
        22.0 broke 4        : away, drop
        22.1 timer          : drop, make 5
    """,
    "what is said of a lane that is no more is not believed": """
        0.0 met             : make 1
        0.0 made 1          : up
        1.0 broke 1         : away, drop
        1.0 broke 1         : -
        1.0 not made 1      : -
        1.1 timer           : drop, make 2
        1.1 made 1          : -
        1.1 broke 1         : -
        1.2 made 2          : up
        1.3 not made 2      : -
    """,
    "one that breaks while it is measured was never up": """
        0.0 met             : make 1
        0.1 broke 1         : drop
        0.1 not made 1      : -
        0.2 timer           : drop, make 2
    """,
    "a failed connect is two failures to the thread and one to us": """
        0.0 met             : make 1
        0.1 not made 1      : -
        0.1 not made 1      : -
        0.2 timer           : drop, make 2
    """,
    "a probe may come through although the connect had failed": """
        0.0 met             : make 1
        0.1 not made 1      : -
        0.15 made 1         : up
        9.0 idle            : -
    """,
    "a peer that is gone while its lane waits is not waited for": """
        0.0 met             : make 1
        0.1 not made 1      : -
        0.15 parted         : drop
        0.15 idle           : -
        0.2 parted          : -
        0.3 made 1          : -
        0.4 met             : make 2
    """,
    "a peer that is met again has another stream": """
        0.0 met             : make 1
        0.1 made 1          : up
        0.2 met             : away, drop, make 2
        0.3 broke 1         : -
        0.4 made 2          : up
    """,
}


def said(command) -> str:
    match command:
        case Make(peer, attempt):
            text = f"make {attempt}"
        case Drop(peer):
            text = "drop"
        case DeclareUp(peer, lane):
            assert lane is LANE
            text = "up"
        case DeclareAway(peer):
            text = "away"
        case _:
            raise AssertionError(command)
    assert peer == P1
    return text


@pytest.mark.parametrize("name", STORIES)
def test_story(name):
    machine = Lanes(CONFIG)
    for line in filter(None, map(str.strip, STORIES[name].splitlines())):
        told, _, wanted = line.partition(":")
        when, *words = told.split()
        now = float(when)
        match words:
            case ["met"]:
                commands = machine.on(Met(P1), now)
            case ["parted"]:
                commands = machine.on(Parted(P1), now)
            case ["made", attempt]:
                commands = machine.on(Made(P1, int(attempt), LANE), now)
            case ["answered", attempt]:
                commands = machine.on(Answered(P1, int(attempt)), now)
            case ["not", "made", attempt]:
                commands = machine.on(NotMade(P1, int(attempt)), now)
            case ["broke", attempt]:
                commands = machine.on(Broke(P1, int(attempt)), now)
            case ["timer"]:
                assert machine.deadline() == pytest.approx(now), line
                commands = machine.on(None, machine.deadline() or now)
            case ["idle"]:
                assert machine.deadline() is None, line
                commands = []
            case _:
                raise AssertionError(line)
        machine.check()
        assert ", ".join(map(said, commands)) == wanted.strip().replace("-", ""), line


def test_a_lane_is_away_from_its_break_until_it_is_up_again_and_a_new_one_is_not():
    machine = Lanes(CONFIG)
    assert not machine.away(P1)
    machine.on(Met(P1), 0.0)
    assert not machine.away(P1)
    assert not machine.was_up(P1)
    machine.on(Made(P1, 1, LANE), 0.0)
    assert not machine.away(P1)
    assert machine.was_up(P1)
    machine.on(Broke(P1, 1), 20.0)
    assert machine.away(P1)
    assert machine.was_up(P1)
    machine.on(None, 20.1)
    assert machine.away(P1)
    assert machine.remade == 0
    machine.on(Answered(P1, 2), 20.2)
    assert not machine.away(P1)
    machine.on(Made(P1, 2, LANE), 20.4)
    assert not machine.away(P1)
    assert machine.remade == 1


def test_a_lane_costs_what_it_did_until_it_is_measured_anew():
    machine = Lanes(CONFIG)
    slower = Lane(P1, "ucx: tcp/eth0", 1.0, 90.0)
    machine.on(Met(P1), 0.0)
    assert machine.on(Made(P1, 1, LANE), 0.0) == [DeclareUp(P1, LANE)]
    machine.on(Broke(P1, 1), 20.0)
    machine.on(None, 20.1)
    assert machine.on(Answered(P1, 2), 20.2) == [DeclareUp(P1, LANE)]
    assert machine.on(Made(P1, 2, slower), 20.4) == [DeclareUp(P1, slower)]
    machine.on(Broke(P1, 2), 40.0)
    machine.on(None, 40.1)
    assert machine.on(Answered(P1, 3), 40.2) == [DeclareUp(P1, slower)]


def test_a_lane_is_of_its_last_attempt_only():
    machine = Lanes(CONFIG)
    assert not machine.tries(P1, 1)
    machine.on(Met(P1), 0.0)
    assert machine.tries(P1, 1)
    assert not machine.tries(P2, 1)
    machine.on(Met(P1), 1.0)
    assert machine.tries(P1, 2)
    assert not machine.tries(P1, 1), "its peer is back"
    machine.on(NotMade(P1, 2), 2.0)
    assert machine.tries(P1, 2), "more may be said of what failed"
    machine.on(Broke(P1, 2), 3.0)
    machine.on(None, machine.deadline() or 3.0)
    assert machine.tries(P1, 3)
    assert not machine.tries(P1, 2)
    machine.on(Parted(P1), 4.0)
    assert not machine.tries(P1, 3)


def test_peers_do_not_disturb_each_other():
    machine = Lanes(CONFIG)
    machine.on(Met(P1), 0.0)
    machine.on(Met(P2), 0.0)
    machine.on(Made(P2, 2, LANE), 0.0)
    machine.on(NotMade(P1, 1), 1.0)
    assert machine.on(Broke(P1, 2), 1.0) == []
    assert machine.on(None, 1.1) == [Drop(P1), Make(P1, 3)]
    assert not machine.away(P2)


@pytest.mark.parametrize("settings", [{"first_s": 0.0}, {"first_s": 3.0, "most_s": 2.0}])
def test_waits_that_make_no_sense_are_refused(settings):
    with pytest.raises(LocalError, match="first_s"):
        LanesConfig(**settings)


class Worker(RuleBasedStateMachine):
    """Its transfer thread makes lanes or does not, breaks them, and says so late, of old attempts too."""

    def __init__(self):
        super().__init__()
        self.lanes = Lanes(CONFIG)
        self.twin = Lanes(CONFIG)
        self.now = 0.0
        self.there: set[Identity] = set()
        self.up: set[Identity] = set()
        self.made: dict[Identity, int] = {}
        """The attempt that the thread has connected last and not dropped."""
        self.words: list[Answered | Made | NotMade | Broke] = []
        self.measured: set[Identity] = set()
        self.failed_at: dict[Identity, float] = {}

    def give(self, event) -> None:
        commands = self.lanes.on(event, self.now)
        assert commands == self.twin.on(event, self.now), "same input, same output"
        for command in commands:
            peer = command.peer
            match command:
                case Make(_, attempt):
                    assert peer in self.there, "nobody is there"
                    assert peer not in self.made, "connected twice"
                    if peer in self.failed_at:
                        assert self.now - self.failed_at.pop(peer) <= CONFIG.most_s + 1e-9, "it waited for too long"
                    self.made[peer] = attempt
                case Drop():
                    self.made.pop(peer, None)
                case DeclareUp():
                    assert peer not in self.up or isinstance(event, Made)
                    assert isinstance(event, Made) or peer in self.measured, "used, and nobody knows its price"
                    assert peer in self.made, "up, and nobody has connected it"
                    self.up.add(peer)
                    if isinstance(event, Made):
                        self.measured.add(peer)
                case DeclareAway():
                    assert peer in self.up
                    self.up.discard(peer)

    @rule(peer=st.sampled_from([P1, P2, D1]))
    def meet(self, peer):
        self.there.add(peer)
        self.measured.discard(peer)
        self.failed_at.pop(peer, None)
        self.give(Met(peer))

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def part(self, data):
        peer = data.draw(st.sampled_from(sorted(self.there)))
        self.there.discard(peer)
        self.failed_at.pop(peer, None)
        self.give(Parted(peer))
        assert peer not in self.up
        assert peer not in self.made

    @precondition(lambda self: self.made)
    @rule(data=st.data(), kind=st.sampled_from([Answered, Made, NotMade, Broke]))
    def happens(self, data, kind):
        peer = data.draw(st.sampled_from(sorted(self.made)))
        attempt = self.made[peer]
        self.words.append(Made(peer, attempt, LANE) if kind is Made else kind(peer, attempt))

    @precondition(lambda self: self.words)
    @rule(data=st.data(), twice=st.booleans())
    def hear(self, data, twice):
        word = self.words.pop(data.draw(st.integers(0, len(self.words) - 1)))
        if twice:
            self.words.append(word)
        before = word.peer in self.up
        self.give(word)
        if isinstance(word, NotMade | Broke) and before and word.peer not in self.up:
            self.failed_at[word.peer] = self.now

    @rule(seconds=st.sampled_from([0.05, 0.3, 2.0, 30.0]))
    def wait(self, seconds):
        until = self.now + seconds
        while (due := self.lanes.deadline()) is not None and due <= until:
            assert due >= self.now
            self.now = due
            self.give(None)
            after = self.lanes.deadline()
            assert after is None or after > self.now
        self.now = until

    @invariant()
    def sound(self):
        self.lanes.check()
        known = self.lanes._lanes
        assert known.keys() == self.there
        assert self.up == {peer for peer, lane in known.items() if lane.state in (State.UP, State.MEASURING)}
        assert not [peer for peer in self.up if self.lanes.away(peer)]
        due = self.lanes.deadline()
        assert due is None or due >= self.now

    def teardown(self):
        """Whatever was: once all lanes can be made, all are up."""
        for _ in range(10):
            self.words.clear()
            for peer, attempt in list(self.made.items()):
                self.give(Made(peer, attempt, LANE))
            if (due := self.lanes.deadline()) is not None:
                self.now = max(self.now, due)
                self.give(None)
        assert self.up == self.there


@efforts
def test_every_lane_is_up_in_the_end_and_never_used_while_it_is_away(effort):
    run_state_machine_as_test(Worker, settings=effort)
