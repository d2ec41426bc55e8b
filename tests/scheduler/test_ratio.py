"""How many workers prefill and how many decode: what is asked, what is done about it, and what never is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from core.errors import LocalError
from core.state import dump, load
from core.worker import Identity, Role
from scheduler.ratio import RatioConfig, RatioController
from scheduler.ratio_events import (
    ANY,
    BACK,
    Act,
    Add,
    Bounded,
    Bounds,
    Changed,
    Decided,
    Decision,
    Flip,
    Gone,
    Offered,
    Pinned,
    Pressed,
    Ratio,
    RatioCommand,
    RatioEvent,
    Remove,
    Score,
    Seen,
    Simulate,
    Simulated,
    Why,
    explain,
)
from tests.cast import efforts

ROOT = Path(__file__).resolve().parents[2]
CONFIG = RatioConfig(period_s=10.0, window_s=10.0, cooldown_s=0.0)


def who(role: Role, number: int) -> Identity:
    return Identity(f"{role}-{number}", 1)


class Fleet:
    """A deployment that does what it is told: how good a ratio is says a table, and time passes by periods."""

    def __init__(
        self,
        prefill: int,
        decode: int,
        good: Callable[[Ratio, float], float],
        config: RatioConfig = CONFIG,
        bounds: Bounds = ANY,
    ) -> None:
        self.machine = RatioController(config, bounds)
        self.good = good
        self.feasible = 1.0
        self.roles: dict[Identity, Role] = {}
        self.now = 0.0
        self.rate, self.tokens, self.outputs = 10.0, 1000, 100
        self.refused = 0.3
        self.loads = (0.8, 0.8)
        self.acts: list[tuple[float, str]] = []
        self.decisions: list[Decision] = []
        self.stuck: list[RatioCommand] = []
        """Commands that somebody else ends, while `slow` is set."""
        self.slow = False
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for number in range(count):
                self.seen(who(role, number), role)

    @property
    def ratio(self) -> Ratio:
        prefill = sum(role is Role.PREFILL for role in self.roles.values())
        return Ratio(prefill, len(self.roles) - prefill)

    def seen(self, worker: Identity, role: Role) -> None:
        self.roles[worker] = role
        self.tell(Seen(worker, role))

    def tell(self, event: RatioEvent | None) -> None:
        for command in self.machine.on(event, self.now):
            self.perform(command)
        self.machine.check()
        due = self.machine.deadline()
        assert due is None or due > self.now

    def perform(self, command: RatioCommand) -> None:
        match command:
            case Decided(decision):
                self.decisions.append(decision)
                assert explain(decision)
            case Simulate() if self.slow:
                self.stuck.append(command)
            case Simulate(number, candidates):
                scores = tuple(Score(self.good(each.ratio, each.stress), 100) for each in candidates)
                self.tell(Simulated(number, scores, self.feasible))
            case Flip() | Add() | Remove() if self.slow:
                self.stuck.append(command)
            case Flip(number, worker, role):
                self.acts.append((self.now, f"{worker.name} to {role}"))
                self.roles[worker] = role
                self.tell(Changed(number, True))
            case Add(number, role):
                self.acts.append((self.now, f"add {role}"))
                self.seen(Identity(f"{role}-new-{len(self.roles)}", 1), role)
                self.tell(Changed(number, True))
            case Remove(number, worker):
                self.acts.append((self.now, f"remove {worker.name}"))
                del self.roles[worker]
                self.tell(Changed(number, True))

    def pass_(self, periods: int) -> None:
        for _ in range(periods):
            self.now += 9.0
            requests = round(10 * self.rate)
            for worker, role in self.roles.items():
                load = self.loads[role is Role.DECODE]
                self.tell(Pressed(worker, load, 0, 0.0))
            refused = round(self.refused * requests)
            self.tell(Offered(10.0, requests, requests * self.tokens, 0, requests * self.outputs, refused))
            self.now += 1.0
            due = self.machine.deadline()
            assert due is not None
            self.now = max(self.now, due)
            self.tell(None)

    def flip_ordered(self) -> Flip:
        """One period in which nothing is done by itself: the question is answered, and what it led to is returned."""
        self.slow = True
        self.pass_(1)
        question = self.stuck.pop()
        assert isinstance(question, Simulate)
        scores = tuple(Score(self.good(each.ratio, each.stress), 100) for each in question.candidates)
        self.tell(Simulated(question.number, scores))
        flip = self.stuck.pop()
        assert isinstance(flip, Flip)
        return flip

    @property
    def last(self) -> Decision:
        return self.decisions[-1]


def peak(prefill: int) -> Callable[[Ratio, float], float]:
    """Good as far as the number of prefill workers is right."""
    return lambda ratio, stress: max(0.0, 1.0 - 0.2 * abs(ratio.prefill - prefill))


def test_it_goes_to_the_best_ratio_at_once_asks_at_every_worker_and_stays_there():
    fleet = Fleet(5, 3, peak(2))
    fleet.pass_(1)
    assert fleet.ratio == Ratio(2, 6)
    assert [at for at, _ in fleet.acts] == [10.0, 10.0, 10.0]
    flips = [each for each in fleet.decisions if each.chosen.act is Act.TO_DECODE]
    assert [tuple(each.inputs.ratio) for each in flips] == [(5, 3), (4, 4), (3, 5)]
    assert all(each.scores for each in flips)
    fleet.pass_(20)
    assert fleet.ratio == Ratio(2, 6)
    assert len(fleet.acts) == 3


def test_after_a_single_flip_it_waits_for_the_next_period():
    fleet = Fleet(5, 3, lambda ratio, _: {5: 0.5, 4: 0.7, 3: 0.8}.get(ratio.prefill, 0.1))
    fleet.loads, fleet.refused = (0.8, 0.8), 0.05  # no distress: only the next ratio is looked at
    fleet.pass_(2)
    assert [at for at, _ in fleet.acts] == [10.0, 20.0]


def test_a_way_is_left_where_it_no_longer_gains():
    fleet = Fleet(5, 3, peak(2))
    flip = fleet.flip_ordered()
    fleet.good, fleet.slow = peak(4), False  # traffic is another by now
    fleet.roles[flip.worker] = flip.role
    fleet.tell(Changed(flip.number, True))
    assert fleet.ratio == Ratio(4, 4)
    assert fleet.last.chosen.act is Act.KEEP
    assert fleet.last.scores


def test_a_way_is_gone_to_its_end_where_nothing_is_lost_by_it_and_not_beyond():
    fleet = Fleet(7, 1, peak(3))
    flip = fleet.flip_ordered()
    fleet.good, fleet.slow = lambda ratio, _: 0.4, False  # a burst, of which nothing is known yet: all do alike
    fleet.roles[flip.worker] = flip.role
    fleet.tell(Changed(flip.number, True))
    assert fleet.ratio == Ratio(3, 5)
    assert len(fleet.acts) == 3, "at once"
    fleet.pass_(10)
    assert fleet.ratio == Ratio(3, 5)


def test_who_has_just_changed_its_role_does_not_make_its_phase_look_idle():
    fleet = Fleet(2, 6, peak(7))
    fleet.pass_(1)
    assert fleet.ratio == Ratio(7, 1)
    assert not any(Why.BUSIER in dict(each.against).values() for each in fleet.decisions)


def test_where_one_worker_more_changes_nothing_it_looks_further():
    fleet = Fleet(5, 3, lambda ratio, _: 0.95 if ratio.prefill <= 1 else 0.05)
    fleet.pass_(4)
    assert fleet.ratio == Ratio(1, 7)
    first = fleet.decisions[0]
    assert (first.chosen.act, first.chosen.steps, first.chosen.ratio) == (Act.TO_DECODE, 4, Ratio(1, 7))
    assert "flip prefill-0 to decode, 5+3 on the way to 1+7: more of the last requests" in explain(first)
    assert "4+4 (to decode: prefill-0): 5.0 % of 100 good; no: no change gains enough" in explain(first)


def test_nothing_is_asked_while_all_is_calm():
    fleet = Fleet(4, 4, peak(1))
    fleet.refused, fleet.loads = 0.0, (0.3, 0.3)
    fleet.pass_(5)
    assert {each.why for each in fleet.decisions} == {Why.CALM}
    assert not any(each.scores for each in fleet.decisions)
    fleet.loads = (0.3, 0.6)
    fleet.pass_(1)
    assert fleet.last.scores


def test_too_few_requests_say_nothing():
    fleet = Fleet(4, 4, peak(1))
    fleet.rate = 2.9
    fleet.pass_(1)
    assert fleet.last.why is Why.FEW
    fleet.rate = 3.0
    fleet.pass_(1)
    assert fleet.decisions[1].chosen.act is Act.TO_DECODE


def test_the_busier_phase_gives_nobody():
    fleet = Fleet(4, 4, lambda ratio, _: 0.5)
    fleet.refused, fleet.loads = 0.05, (0.6, 0.86)
    fleet.pass_(1)
    assert [each.act for each in fleet.last.candidates] == [Act.KEEP, Act.TO_DECODE]
    assert dict(fleet.last.against)[fleet.last.against[-1][0]] is Why.BUSIER
    fleet.loads = (0.62, 0.86)
    fleet.tell(Pinned(None))  # and what was found before is forgotten
    fleet.pass_(1)
    assert {each.act for each in fleet.last.candidates} == {Act.KEEP, Act.TO_DECODE, Act.TO_PREFILL}


def test_the_lightest_worker_that_can_is_flipped():
    fleet = Fleet(3, 2, peak(1))
    stays, light, heavy = (who(Role.PREFILL, number) for number in range(3))
    fleet.tell(Seen(stays, Role.PREFILL, flips=False))
    loads = {stays: 0.1, light: 0.5, heavy: 0.9}
    fleet.now = 9.0
    fleet.tell(Offered(10.0, 100, 1000, 0, 1000, 50))
    for worker, taken in loads.items():
        fleet.tell(Pressed(worker, taken, 0, 0.0))
    for number in range(2):
        fleet.tell(Pressed(who(Role.DECODE, number), 0.5, 0, 0.0))
    fleet.now = 10.0
    fleet.tell(None)
    assert fleet.acts == [(10.0, f"{light.name} to decode")]


@pytest.mark.parametrize("told_at", [0.0, 0.1, 1.9])
@pytest.mark.parametrize("every_s", [2.0, 3.0, 4.0])
def test_rates_are_those_of_the_time_that_was_told_of_whenever_it_decides(told_at, every_s):
    fleet = Fleet(2, 2, peak(2))
    for index in range(30):
        told = told_at + every_s * index
        while (due := fleet.machine.deadline()) is not None and due <= told:
            fleet.now = due
            fleet.tell(None)
        fleet.now = told
        requests, new, cached, output = (round(each * every_s) for each in (10, 500, 100, 200))
        fleet.tell(Offered(every_s, requests, new, cached, output, 0))
    assert fleet.decisions
    for each in fleet.decisions:
        inputs = each.inputs
        rates = (inputs.requests_per_s, inputs.new_tokens_per_s, inputs.cached_tokens_per_s, inputs.output_tokens_per_s)
        assert rates == pytest.approx((10.0, 500.0, 100.0, 200.0))


def test_a_gain_that_noise_could_make_moves_nobody():
    fleet = Fleet(4, 4, lambda ratio, _: 0.80 + (0.019 if ratio.prefill == 3 else 0.0))
    fleet.pass_(1)
    assert fleet.last.why is Why.SHORT
    assert not fleet.acts


def test_asking_in_vain_becomes_seldom_until_traffic_moves():
    fleet = Fleet(4, 4, lambda ratio, _: 0.95)
    fleet.pass_(40)
    asked = [each.at_s for each in fleet.decisions if each.scores]
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert pauses == [10.0, 20.0, 40.0, 80.0, 160.0]
    fleet.tokens *= 2
    fleet.pass_(1)
    assert fleet.last.scores


@pytest.mark.parametrize(("tokens", "outputs", "moved"), [(1400, 100, True), (1000, 140, False), (1000, 200, True)])
def test_outputs_must_differ_by_more_for_traffic_to_have_moved(tokens, outputs, moved):
    """They are estimated, and a few are long: what the mean of 450 requests says of prompts it does not of them."""
    fleet = Fleet(4, 4, lambda ratio, _: 0.95)
    fleet.rate = 45.0
    fleet.pass_(38)
    fleet.tokens, fleet.outputs = tokens, outputs
    fleet.pass_(1)
    assert bool(fleet.last.scores) == moved


def test_distress_is_asked_about_though_traffic_is_what_it_was():
    fleet = Fleet(4, 4, lambda ratio, _: 0.95)
    fleet.refused = 0.1
    fleet.pass_(5)
    assert fleet.last.why is Why.RESTING
    fleet.refused = 0.21
    fleet.pass_(1)
    assert fleet.last.scores


def test_what_comes_in_waves_is_asked_about_once_and_then_as_seldom_as_all_else():
    fleet = Fleet(4, 4, lambda ratio, _: 0.95)
    for _ in range(10):
        fleet.refused = 0.05
        fleet.pass_(2)
        fleet.refused = 0.25
        fleet.pass_(2)
    assert sum(bool(each.scores) for each in fleet.decisions) == 6
    fleet.refused = 0.4  # worse than any wave so far
    fleet.pass_(1)
    assert fleet.last.scores


def test_where_nothing_was_asked_when_its_rest_was_over_it_knows_what_traffic_was():
    fleet = Fleet(1, 7, lambda ratio, _: 0.95)
    fleet.pass_(45)  # its rest is over by now
    fleet.loads = (0.1, 0.8)
    fleet.pass_(12)
    assert fleet.last.why is Why.NO_GAIN
    assert not fleet.last.scores, "nobody can be flipped"
    fleet.loads, fleet.tokens = (0.8, 0.8), 4 * fleet.tokens
    since = fleet.now
    fleet.pass_(32)
    assert [each.at_s - since for each in fleet.decisions if each.scores and each.at_s > since] == [
        10.0, 20.0, 40.0, 80.0, 160.0, 320.0,
    ]  # fmt: skip


def test_flapping_scores_turn_once_in_ten_minutes_of_constant_load():
    flip = [0]

    def good(ratio: Ratio, stress: float) -> float:
        flip[0] += 1
        return 0.5 + (0.3 if ratio.prefill == 3 + flip[0] // 3 % 2 else 0.0)

    fleet = Fleet(4, 4, good)
    fleet.pass_(240)
    turns = []
    for (_, one), (at, two) in pairwise(fleet.acts):
        if one.split(" to ")[1] != two.split(" to ")[1]:
            turns.append(at)
    assert turns, "nothing flapped"
    for at in turns:
        assert sum(at <= each < at + 600.0 for each in turns) == 1


def test_after_a_step_of_load_it_turns_at_once():
    fleet = Fleet(4, 4, peak(3))
    fleet.pass_(10)
    assert fleet.ratio == Ratio(3, 5)
    fleet.good, fleet.tokens = peak(5), 3000
    fleet.pass_(2)
    assert fleet.ratio == Ratio(5, 3)
    fleet.good, fleet.tokens = peak(3), 1000
    fleet.pass_(2)
    assert fleet.ratio == Ratio(3, 5)


def test_what_traffic_a_flip_was_made_for_is_known_when_the_window_is_full_of_it():
    """At the step outputs of who has just come are not over; that they are later is no other load."""
    fleet = Fleet(4, 4, peak(3))
    fleet.rate, fleet.outputs = 45.0, 100
    fleet.pass_(1)
    assert fleet.ratio == Ratio(3, 5)
    fleet.outputs = 300
    fleet.pass_(2)
    fleet.good = lambda ratio, _: 0.9 + (0.04 if ratio.prefill == 4 else 0.0)
    fleet.pass_(60)
    assert fleet.ratio == Ratio(3, 5), "a turn at constant load gains twice as much"
    fleet.outputs = 900
    fleet.pass_(1)
    assert fleet.ratio == Ratio(4, 4)


def test_bounds_are_kept_and_said():
    fleet = Fleet(4, 4, peak(1), bounds=Bounds(least_prefill=3, most_decode=6))
    fleet.pass_(6)
    assert fleet.ratio == Ratio(3, 5)
    against = {each.act: why for each, why in fleet.last.against}
    assert against[Act.TO_DECODE] is Why.BOUND
    assert "outside of the bounds" in explain(fleet.last)
    fleet.tell(Bounded(Bounds(least_prefill=1, most_decode=6)))
    fleet.pass_(3)
    assert fleet.ratio == Ratio(2, 6)


def test_the_last_worker_of_a_phase_never_goes():
    fleet = Fleet(1, 1, peak(8))
    fleet.pass_(3)
    assert fleet.ratio == Ratio(1, 1)
    assert not fleet.acts


def test_goals_that_nobody_can_meet_ask_for_nobody():
    fleet = Fleet(4, 4, lambda ratio, _: 0.1, bounds=Bounds(most_workers=99))
    fleet.feasible = 0.1
    fleet.pass_(3)
    assert fleet.ratio == Ratio(4, 4)
    assert fleet.decisions[0].infeasible
    assert explain(fleet.decisions[0]).startswith("decision 2 at 10.0 s: infeasible goals, no change: the goals cannot")


def test_more_are_asked_for_only_if_no_flip_helps():
    fleet = Fleet(4, 4, lambda ratio, _: min(1.0, 0.1 * sum(ratio)) - 0.05 * abs(ratio.prefill - 3))
    assert fleet.machine.bounds.most_workers is None
    fleet.pass_(2)
    assert [act for _, act in fleet.acts] == ["prefill-0 to decode"]
    assert fleet.last.why is Why.SHORT
    fleet.tell(Bounded(Bounds(most_workers=9)))
    fleet.pass_(1)
    assert fleet.acts[-1][1] == "add decode"
    fleet.pass_(5)
    assert sum(fleet.ratio) == 9


def test_who_is_spare_is_given_up_after_three_looks_and_a_reserve():
    fleet = Fleet(4, 4, lambda ratio, stress: 1.0 if sum(ratio) >= 6 * stress else 0.5, bounds=Bounds(least_workers=1))
    fleet.refused, fleet.loads = 0.0, (0.2, 0.2)
    fleet.pass_(2)
    assert not fleet.acts
    fleet.pass_(60)
    assert sum(fleet.ratio) == 8, "7 workers serve 1.16 times the traffic, 1.2 are wanted"
    fleet.good = lambda ratio, stress: 1.0 if sum(ratio) >= 5 * stress else 0.5
    fleet.pass_(100)
    assert sum(fleet.ratio) == 6
    assert all(act.startswith("remove") for _, act in fleet.acts)


def test_nobody_is_kept_for_traffic_that_has_stopped():
    fleet = Fleet(4, 4, lambda ratio, stress: 1.0, bounds=Bounds(least_workers=2))
    fleet.refused, fleet.loads, fleet.rate = 0.0, (0.0, 0.0), 0.1
    fleet.pass_(400)
    assert fleet.ratio == Ratio(1, 1)


def test_an_operators_ratio_is_taken_up_without_asking():
    fleet = Fleet(4, 4, peak(7))
    fleet.tell(Pinned(Ratio(2, 6)))
    fleet.pass_(4)
    assert fleet.ratio == Ratio(2, 6)
    assert {each.why for each in fleet.decisions} == {Why.PINNED}
    assert not any(each.scores for each in fleet.decisions)
    fleet.tell(Pinned(None))
    fleet.pass_(1)
    assert fleet.ratio == Ratio(7, 1)


def test_while_a_change_is_under_way_nothing_else_is_done():
    fleet = Fleet(4, 4, peak(1))

    def why() -> Why:
        return fleet.last.why

    fleet.slow = True
    fleet.pass_(1)
    (question,) = fleet.stuck
    assert isinstance(question, Simulate)
    fleet.pass_(1)
    assert why() is Why.UNANSWERED
    fleet.stuck.clear()
    fleet.tell(Simulated(question.number, tuple(Score(peak(1)(each.ratio, 1.0), 100) for each in question.candidates)))
    (flip,) = fleet.stuck
    assert isinstance(flip, Flip)
    fleet.pass_(3)
    assert why() is Why.UNDER_WAY
    assert fleet.stuck == [flip]


def test_a_worker_that_dies_in_the_middle_of_a_flip_is_not_waited_for():
    fleet = Fleet(4, 4, peak(1))
    flip = fleet.flip_ordered()
    del fleet.roles[flip.worker]
    fleet.tell(Gone(flip.worker))
    fleet.tell(Changed(flip.number, False, "was lost"))
    assert fleet.machine.ratio == Ratio(3, 4)
    fleet.slow = False
    fleet.pass_(1)
    assert fleet.machine.ratio == Ratio(1, 6) == fleet.ratio


def test_one_that_was_lost_while_it_was_asked_is_not_flipped():
    fleet = Fleet(4, 4, peak(1))
    fleet.slow = True
    fleet.pass_(1)
    question = fleet.stuck.pop()
    assert isinstance(question, Simulate)
    named = question.candidates[1].worker
    assert named is not None
    del fleet.roles[named]
    fleet.tell(Gone(named))
    fleet.tell(Simulated(question.number, tuple(Score(peak(1)(each.ratio, 1.0), 100) for each in question.candidates)))
    assert not fleet.stuck
    assert fleet.last.why is Why.OTHERS


def test_what_could_not_be_simulated_changes_nothing():
    fleet = Fleet(4, 4, peak(1))
    fleet.slow = True
    fleet.pass_(1)
    question = fleet.stuck.pop()
    assert isinstance(question, Simulate)
    fleet.tell(Simulated(question.number, (), reason="no traffic"))
    assert fleet.last.why is Why.UNKNOWN
    assert "(no traffic)" in explain(fleet.last)
    assert not fleet.stuck


def test_words_about_others_are_counted():
    fleet = Fleet(1, 1, peak(1))
    stranger = Identity("stranger", 1)
    for event in (Gone(stranger), Pressed(stranger, 0.0, 0, 0.0), Changed(77, True), Simulated(77, ())):
        fleet.tell(event)
    assert fleet.machine.ignored == 4


@pytest.mark.parametrize(
    "event",
    [
        Seen(who(Role.MIXED, 0), Role.MIXED),
        Offered(0.0, 1, 1, 0, 1, 0),
        Offered(1.0, -1, 1, 0, 1, 0),
        Pressed(who(Role.PREFILL, 0), -0.1, 0, 0.0),
        Pinned(Ratio(0, 2)),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(event):
    fleet = Fleet(2, 2, peak(1))
    before = dump(fleet.machine)
    with pytest.raises(LocalError):
        fleet.machine.on(event, 1.0)
    assert dump(fleet.machine) == before


def test_an_answer_of_another_length_is_refused_and_changes_nothing():
    fleet = Fleet(4, 4, peak(1))
    fleet.slow = True
    fleet.pass_(1)
    question = fleet.stuck.pop()
    assert isinstance(question, Simulate)
    before = dump(fleet.machine)
    with pytest.raises(LocalError, match="scores"):
        fleet.machine.on(Simulated(question.number, (Score(1.0, 1),)), fleet.now)
    assert dump(fleet.machine) == before


@pytest.mark.parametrize("settings", [{"period_s": 0.0}, {"share": 0.0}, {"gain": 1.0}, {"patience": 0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(LocalError, match="ratio"):
        RatioConfig(**settings)


def test_bounds_that_make_no_sense_are_refused():
    for wrong in ({"least_prefill": 0}, {"most_decode": 0}, {"least_workers": 3, "most_workers": 2}):
        with pytest.raises(LocalError, match="bounds"):
            Bounds(**wrong)


def test_a_coordinator_that_starts_again_goes_on_as_if_it_had_not():
    one, two = Fleet(5, 3, peak(2)), Fleet(5, 3, peak(2))
    one.pass_(1)
    two.pass_(1)
    document = json.loads(json.dumps(dump(two.machine)))
    two.machine = load(document, RatioController)
    one.pass_(30)
    two.pass_(30)
    assert one.acts == two.acts
    assert list(map(explain, one.decisions)) == list(map(explain, two.decisions))
    assert dump(one.machine) == dump(two.machine)


STORY = """
step of load: 4+4 | 1000 x3 | 3000 x4
drift: 4+4 | 1000 x2 | 1500 x2 | 2200 x2 | 3300 x2 | 5000 x2
"""


def tell(line: str) -> tuple[str, str]:
    """Prompt tokens by periods; a prefill worker is wanted for each 1,000 of them."""
    name, _, script = line.partition(": ")
    ratio, *parts = script.split(" | ")
    prefill, decode = map(int, ratio.split("+"))
    fleet = Fleet(prefill, decode, peak(4))
    said = []
    for part in parts:
        tokens, _, periods = part.partition(" x")
        fleet.tokens, fleet.good = int(tokens), peak(max(1, min(7, round(int(tokens) / 1000))))
        fleet.pass_(int(periods))
        said.append(str(fleet.ratio))
    return name, " ".join(said)


def test_stories():
    told = dict(tell(line) for line in STORY.strip().splitlines())
    assert told == {"step of load": "1+7 3+5", "drift": "1+7 2+6 2+6 3+5 5+3"}


def decisions(seed: int) -> str:
    import random

    dice = random.Random(seed)
    fleet = Fleet(5, 3, lambda ratio, stress: dice.random(), bounds=Bounds(least_workers=4, most_workers=10))
    fleet.pass_(60)
    return "\n".join(map(explain, fleet.decisions))


def test_another_process_with_another_hash_seed_decides_the_same():
    script = "from tests.scheduler.test_ratio import decisions; print(decisions(5))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "4711"}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == decisions(5).strip()


class Machine(RuleBasedStateMachine):
    """Anything at any time: each question and each change ends once, and what holds always is looked at after each."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.bounds = Bounds(least_workers=2, most_workers=9)
        self.machine = RatioController(CONFIG, self.bounds)
        self.twin = RatioController(CONFIG, self.bounds)
        self.there: dict[Identity, Role] = {}
        self.open: dict[int, RatioCommand] = {}
        self.numbers: set[int] = set()
        self.flips: list[tuple[float, Act, bool]] = []
        self.lives = 0

    def tell(self, event: RatioEvent | None) -> None:
        commands = self.machine.on(event, self.now)
        assert commands == self.twin.on(event, self.now)
        for command in commands:
            match command:
                case Decided(decision):
                    assert explain(decision)
                    assert decision.chosen.act is Act.KEEP or len(commands) == 2
                    named = {decision.chosen.act, *(each.act for each, _ in decision.against)}
                    assert named >= {act for act in Act if act.flips}, "nothing is said of what might have been done"
                    every = [each for each in decision.candidates if each != decision.chosen]
                    assert not decision.scores or {each for each, _ in decision.against} >= {
                        each for each in every if each.act is not Act.KEEP
                    }
                case Simulate() | Flip() | Add() | Remove():
                    assert command.number not in self.numbers
                    assert not self.open, "two things are under way"
                    self.numbers.add(command.number)
                    self.open[command.number] = command
                    if isinstance(command, Flip | Remove):
                        assert command.worker in self.there
                        role = self.there[command.worker]
                        left = sum(each is role for each in self.there.values()) - 1
                        assert left >= 1, "the last of a phase was taken"

    @rule(role=st.sampled_from((Role.PREFILL, Role.DECODE)), flips=st.booleans())
    def comes(self, role: Role, flips: bool) -> None:
        if len(self.there) < 9:
            self.lives += 1
            worker = Identity(f"w-{self.lives % 12}", self.lives)
            self.there[worker] = role
            self.tell(Seen(worker, role, flips))

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def goes(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.there)))
        del self.there[worker]
        self.tell(Gone(worker))

    @rule(requests=st.integers(0, 300), tokens=st.integers(0, 4000), refused=st.floats(0, 1))
    def offers(self, requests: int, tokens: int, refused: float) -> None:
        self.tell(Offered(5.0, requests, requests * tokens, 0, requests * 50, int(refused * requests)))

    @precondition(lambda self: self.there)
    @rule(data=st.data(), load=st.floats(0, 1), oldest=st.floats(0, 5))
    def presses(self, data: st.DataObject, load: float, oldest: float) -> None:
        self.tell(Pressed(data.draw(st.sampled_from(sorted(self.there))), load, 1, oldest))

    @rule(seconds=st.floats(0.0, 25.0))
    def passes(self, seconds: float) -> None:
        self.now += seconds
        due = self.machine.deadline()
        if due is not None and due <= self.now:
            self.tell(None)

    @rule(ratio=st.none() | st.tuples(st.integers(1, 5), st.integers(1, 5)))
    def pins(self, ratio: tuple[int, int] | None) -> None:
        self.tell(Pinned(None if ratio is None else Ratio(*ratio)))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), done=st.booleans())
    def ends(self, data: st.DataObject, done: bool) -> None:
        number, command = self.open.popitem()
        if isinstance(command, Simulate):
            shares = st.floats(0, 1)
            size = len(command.candidates)
            scores = data.draw(st.just(()) | st.lists(shares, min_size=size, max_size=size).map(tuple))
            self.tell(Simulated(number, tuple(Score(each, 50) for each in scores), data.draw(shares)))
            return
        if isinstance(command, Flip) and done and command.worker in self.there:
            self.there[command.worker] = command.role
        if isinstance(command, Remove) and done:
            self.there.pop(command.worker, None)
        self.tell(Changed(number, done))

    @rule()
    def starts_again(self) -> None:
        self.twin = load(json.loads(json.dumps(dump(self.machine))), RatioController)

    @rule(number=st.integers(10**6, 10**6 + 3))
    def hears_of_what_is_over(self, number: int) -> None:
        before = self.machine.ignored
        self.tell(Changed(number, True))
        assert self.machine.ignored == before + 1

    @invariant()
    def holds(self) -> None:
        self.machine.check()
        assert self.machine.ratio == Ratio(
            sum(role is Role.PREFILL for role in self.there.values()),
            sum(role is Role.DECODE for role in self.there.values()),
        )
        due = self.machine.deadline()
        assert due is None or due > self.now


@efforts
def test_whatever_happens(effort):
    run_state_machine_as_test(Machine, settings=replace_budget(effort))


def replace_budget(effort):
    """Half of what others take: a step is cheap, a document of the state is not."""
    from hypothesis import settings

    return settings(effort, max_examples=max(20, effort.max_examples // 4))


@given(st.integers(0, 2**32))
def test_a_turn_is_rare_while_load_is_constant_whatever_simulations_say(seed):
    import random

    dice = random.Random(seed)
    fleet = Fleet(4, 4, lambda ratio, stress: dice.random())
    fleet.pass_(70)
    done = [(each.at_s, each.chosen.act) for each in fleet.decisions if each.chosen.act is not Act.KEEP]
    turns = [at for (_, one), (at, two) in pairwise(done) if BACK[one] is two]
    for at in turns:
        assert sum(at <= each < at + CONFIG.turn_s for each in turns) == 1
