"""Who is still there: each life is declared lost once, for the right reason, at the right time."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from core.worker import Identity
from scheduler.liveness import Connected, Disconnected, Heard, How, Liveness, Lost, Quiet
from tests.cast import D1, P1, P2, efforts


def live(grace_s: float = 3.0) -> Liveness:
    return Liveness(silence_s=3.5, grace_s=grace_s)


def test_nobody_known_needs_no_deadline():
    machine = live()
    assert machine.deadline() is None
    assert machine.on(None, 0.0) == []


def test_a_silent_peer_is_lost_when_its_time_is_up():
    machine = live()
    assert machine.on(Connected(P1), 10.0) == []
    assert machine.deadline() == 13.5
    assert machine.on(Heard(P1), 12.0) == []
    assert machine.deadline() == 15.5
    assert machine.on(None, 15.4) == []
    assert machine.on(None, 15.5) == [Lost(P1, How.SILENT)]
    assert machine.alive() == ()


def test_a_goodbye_is_a_loss_at_once():
    machine = live()
    machine.on(Connected(P1), 0.0)
    assert machine.on(Disconnected(P1, goodbye=True), 1.0) == [Lost(P1, How.GOODBYE)]
    assert machine.on(Disconnected(P1), 1.0) == []


def test_without_grace_a_broken_stream_is_a_loss_at_once():
    machine = live(grace_s=0.0)
    machine.on(Connected(P1), 0.0)
    assert machine.on(Disconnected(P1), 1.0) == [Lost(P1, How.BROKE)]


def test_a_life_that_comes_back_on_a_new_stream_starts_anew():
    machine = live(grace_s=2.0)
    machine.on(Connected(P1), 0.0)
    assert machine.on(Disconnected(P1), 1.0) == []
    assert machine.alive() == (P1,)
    assert machine.deadline() == 3.0
    assert machine.on(Connected(P1), 2.9) == [Lost(P1, How.RETURNED)]
    assert machine.alive() == (P1,)
    assert machine.on(None, 3.0) == []
    assert machine.deadline() == 6.4


def test_a_second_break_report_does_not_lengthen_the_grace():
    machine = live(grace_s=2.0)
    machine.on(Connected(P1), 0.0)
    machine.on(Disconnected(P1), 1.0)
    machine.on(Disconnected(P1), 2.5)
    assert machine.on(None, 3.0) == [Lost(P1, How.AWAY)]


def test_silence_counts_during_grace_too():
    machine = live(grace_s=30.0)
    machine.on(Connected(P1), 0.0)
    machine.on(Disconnected(P1), 1.0)
    assert machine.deadline() == 3.5


def test_a_new_incarnation_ends_the_old_one():
    machine, again = live(), Identity(P1.name, 0x99)
    machine.on(Connected(P1), 0.0)
    machine.on(Connected(P2), 0.0)
    assert machine.on(Connected(again), 1.0) == [Lost(P1, How.REPLACED)]
    assert machine.on(Heard(P1), 1.0) == []
    assert set(machine.alive()) == {P2, again}


def test_strangers_are_ignored():
    machine = live()
    machine.on(Connected(P1), 0.0)
    assert machine.on(Heard(D1), 1.0) == []
    assert machine.on(Disconnected(D1, goodbye=True), 1.0) == []
    assert machine.alive() == (P1,)


def test_who_says_nothing_is_quiet_long_before_it_is_lost():
    machine = Liveness(silence_s=3.5, grace_s=0.0, quiet_s=0.8)
    machine.on(Connected(P1), 0.0)
    assert machine.deadline() == 0.8
    assert machine.on(None, 0.8) == [Quiet(P1)]
    assert machine.deadline() == 3.5
    assert machine.on(None, 2.0) == [], "it was said"
    assert machine.on(Heard(P1), 3.0) == [Quiet(P1, quiet=False)]
    assert machine.on(Heard(P1), 3.1) == []
    assert machine.on(None, 4.0) == [Quiet(P1)]
    assert machine.on(None, 6.6) == [Lost(P1, How.SILENT)]
    assert machine.on(Heard(P1), 6.6) == []


def test_a_stream_that_is_gone_is_not_called_quiet():
    machine = Liveness(silence_s=3.5, grace_s=2.0, quiet_s=0.8)
    machine.on(Connected(P1), 0.0)
    machine.on(Disconnected(P1), 0.5)
    assert machine.deadline() == 2.5
    assert machine.on(None, 2.5) == [Lost(P1, How.AWAY)]


class Crowd(RuleBasedStateMachine):
    """Peers come, speak, break and restart in any order; time passes."""

    people = st.builds(Identity, st.sampled_from("abc"), st.integers(1, 2))

    def __init__(self):
        super().__init__()
        self.machine = Liveness(silence_s=4.0, grace_s=2.0, quiet_s=1.0)
        self.quiet: set[Identity] = set()
        self.now = 0.0
        self.last_word: dict[Identity, float] = {}
        self.broke: dict[Identity, float] = {}

    def give(self, event) -> None:
        before = set(self.machine.alive())
        said = self.machine.on(event, self.now)
        for each in said:
            if isinstance(each, Quiet):
                assert (each.identity in self.quiet) != each.quiet, "said twice"
                assert (self.now >= self.last_word[each.identity] + 1.0) == each.quiet
                (self.quiet.add if each.quiet else self.quiet.discard)(each.identity)
        lost = [each.identity for each in said if isinstance(each, Lost)]
        self.quiet -= {*lost}
        assert len(lost) == len(set(lost))
        for who in lost:
            assert who in before
            silent = self.now >= self.last_word[who] + 4.0
            gone = who in self.broke and self.now >= self.broke[who] + 2.0
            replaced = isinstance(event, Connected) and event.identity.name == who.name
            bye = isinstance(event, Disconnected) and event.identity == who and event.goodbye
            assert silent or gone or replaced or bye
            self.broke.pop(who, None)
        now_alive = set(self.machine.alive())
        joined = {event.identity} if isinstance(event, Connected) else set()
        assert now_alive == (before - set(lost)) | joined

    @rule(who=people)
    def connect(self, who):
        self.last_word[who] = self.now
        self.give(Connected(who))
        self.broke.pop(who, None)

    @rule(who=people)
    def hear(self, who):
        if who in self.machine.alive():
            self.last_word[who] = self.now
        self.give(Heard(who))

    @rule(who=people, goodbye=st.booleans())
    def disconnect(self, who, goodbye):
        if who in self.machine.alive():
            self.broke.setdefault(who, self.now)
        self.give(Disconnected(who, goodbye))

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 5.0]))
    def wait(self, seconds):
        """As a driver: nothing happens for so long but deadlines."""
        until = self.now + seconds
        while (due := self.machine.deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            self.give(None)
            after = self.machine.deadline()
            assert after is None or after > self.now, "the driver would spin"
        self.now = until

    @invariant()
    def sound(self):
        self.machine.check()
        for who in self.machine.alive():
            due = self.machine.deadline()
            assert due is not None
            assert self.last_word[who] + 4.0 > self.now or due <= self.now


@efforts
def test_each_life_is_lost_once_and_for_a_reason(effort):
    run_state_machine_as_test(Crowd, settings=effort)
