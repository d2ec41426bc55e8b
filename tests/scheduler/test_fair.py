"""Turns and shares of tenants: bounds, weights, no credit for idleness, and nothing at all with one tenant."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from scheduler.fair import MOST_RESTS, Fair, Parked, Queue, Shares
from scheduler.lane import Lane
from scheduler.waiting import Waiting
from tests.cast import efforts

COSTS = st.lists(st.integers(1, 1000), min_size=1, max_size=60)


@given(st.data(), st.sampled_from([1.0, 2.0, 0.5, 7.0]), st.sampled_from([1.0, 3.0]), COSTS)
def test_of_two_that_wait_neither_is_ahead_by_more_than_a_charge_of_each(data, weight_a, weight_b, costs):
    fair = Fair({"a": weight_a, "b": weight_b})
    for _ in range(data.draw(st.integers(0, 5))):  # a was there long before
        fair.join("a")
        fair.charge("a", 500)
    had, most = {"a": 0.0, "b": 0.0}, {"a": 0, "b": 0}
    fair.join("a")
    fair.join("b")
    weights = {"a": weight_a, "b": weight_b}
    for cost in costs:
        who = fair.first()
        assert who is not None
        fair.charge(who, cost)
        had[who] += cost / weights[who]
        most[who] = max(most[who], cost)
        fair.check()
        bound = most["a"] / weight_a + most["b"] / weight_b
        assert abs(had["a"] - had["b"]) <= bound * (1 + 1e-9)


def test_who_was_idle_has_saved_up_nothing():
    fair = Fair()
    fair.join("busy")
    fair.join("idle")
    fair.leave("idle")
    for _ in range(10):
        fair.charge("busy", 100)
    fair.join("idle")
    turns: list[str] = []
    for _ in range(6):
        turns.append(fair.first() or "")
        fair.charge(turns[-1], 100)
    assert sorted(turns) == ["busy"] * 3 + ["idle"] * 3, "they take turns from then on"


def test_what_was_charged_beyond_others_is_not_forgotten_by_leaving():
    fair = Fair()
    for tenant in ("a", "b"):
        fair.join(tenant)
    fair.charge("a", 1000)
    fair.leave("a")
    fair.join("a")
    for _ in range(10):
        assert fair.first() == "b"
        fair.charge("b", 99)


def test_a_charge_that_is_taken_back_leaves_nothing():
    fair = Fair()
    for tenant in ("a", "b"):
        fair.join(tenant)
    fair.charge("a", 1000)
    fair.charge("a", -1000)
    assert fair.first() in ("a", "b")
    fair.charge("b", 1)
    assert fair.first() == "a"


def test_many_tenants_that_come_once_are_not_remembered_for_ever():
    fair = Fair()
    fair.join("waits")
    for number in range(5 * MOST_RESTS):
        fair.charge(f"t{number}", 10)
    assert len(fair._rests) <= MOST_RESTS
    fair.leave("waits")
    assert not fair._rests


class ParkedTenants(RuleBasedStateMachine):
    """Who waits, beside a list of them."""

    def __init__(self):
        super().__init__()
        self.parked = Parked({"b": 2.0})
        self.there: dict[str, tuple[str, int, float, int]] = {}
        self.count = 0

    @rule(tenant=st.sampled_from(["", "a", "b"]), tokens=st.integers(0, 40), until=st.integers(0, 9))
    def add(self, tenant, tokens, until):
        self.count += 1
        key = f"k{self.count}"
        self.there[key] = (tenant, tokens, float(until), self.count)
        self.parked.add(key, tokens, float(until), self.count, tenant)

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def remove(self, data):
        key = data.draw(st.sampled_from(sorted(self.there)))
        assert self.parked.remove(key) == self.there.pop(key)[1]

    @precondition(lambda self: self.there)
    @rule(room=st.integers(1, 50))
    def serve(self, room):
        key = self.parked.first(room)
        small = {each: facts for each, facts in self.there.items() if facts[1] <= room}
        if not small:
            assert key is None
            return
        assert key is not None
        tenant, tokens, until, age = self.there.pop(key)
        assert key in small
        others = [facts for facts in small.values() if facts[0] == tenant]
        assert (until, age) == min((facts[2], facts[3]) for facts in others), "not the most urgent of its tenant"
        self.parked.fair.charge(tenant, tokens)
        self.parked.remove(key)

    @invariant()
    def sound(self):
        self.parked.check()
        assert len(self.parked) == len(self.there)


@efforts
def test_of_those_that_fit_the_most_urgent_of_the_next_tenant_is_served(effort):
    run_state_machine_as_test(ParkedTenants, settings=effort)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=30), st.integers(1, 50))
def test_with_one_tenant_it_is_the_order_of_urgency(entries, room):
    parked, waiting = Parked(), Waiting()
    for age, (tokens, until) in enumerate(entries):
        parked.add(f"k{age}", tokens, until, age, "one")
        waiting.add(f"k{age}", tokens, until, age)
    while (key := waiting.first(room)) is not None:
        assert parked.first(room) == key
        parked.fair.charge("one", 7)
        parked.remove(key)
        waiting.remove(key)
    assert parked.first(room) is None


STORIES = {
    "two tenants take turns, whatever each has sent": (
        "a: 100 100 100 100 b: 100 100 | 6",
        "a100 b100 a100 b100 a100 a100",
    ),
    "who sends small prompts has more of them, as many tokens": (
        "a: 300 300 b: 100 100 100 100 | 6",
        "a300 b100 b100 b100 a300 b100",
    ),
    "a weight of 2 is worth twice the tokens": (
        "a: 100 100 100 twice: 100 100 100 100 | 7",
        "a100 twice100 twice100 a100 twice100 twice100 a100",
    ),
    "who comes late has saved up nothing": (
        "a: 100 100 100 100 b: 100 | 4 c: 100 100 100 | 4",
        "a100 b100 a100 a100 | a100 c100 c100 c100",
    ),
    "who does not fit waits, and loses no turn by it": (
        "a: 500 b: 100 100 100 | 3 of 200 | 1",
        "b100 b100 b100 | a500",
    ),
}
"""Prompts that tenants send; after a bar how many are served, if they have at most so many tokens; and who is."""


def served(script: str) -> str:
    parked, log, tenant, age, words = Parked({"twice": 2.0}), list[str](), "", 0, script.split()
    while words:
        match words.pop(0):
            case "|":
                count, most = int(words.pop(0)), 10_000
                if words[:1] == ["of"]:
                    most = int(words[1])
                    del words[:2]
                for _ in range(count):
                    key = parked.first(most)
                    assert key is not None
                    who, tokens, _ = key.split("/")
                    parked.fair.charge(who, int(tokens))
                    parked.remove(key)
                    log.append(f"{who}{tokens}")
                log.append("|")
            case word if word.endswith(":"):
                tenant = word[:-1]
            case tokens:
                age += 1
                parked.add(f"{tenant}/{tokens}/{age}", int(tokens), 0.0, age, tenant)
    return " ".join(log[:-1])


@pytest.mark.parametrize("title", STORIES)
def test_story(title):
    script, want = STORIES[title]
    assert served(script) == want


class Queues(RuleBasedStateMachine):
    """A queue of tenants, beside a list: nobody overtakes its own, and tenants are served by `Fair`."""

    def __init__(self):
        super().__init__()
        self.queue = Queue[int]({"b": 2.0})
        self.there: list[tuple[str, int]] = []
        self.count = 0

    @rule(tenant=st.sampled_from(["", "a", "b"]))
    def append(self, tenant):
        self.count += 1
        self.queue.append(self.count, tenant)
        self.there.append((tenant, self.count))

    @precondition(lambda self: self.there)
    @rule(data=st.data(), tokens=st.integers(0, 40))
    def pop(self, data, tokens):
        tenant, first = data.draw(st.sampled_from(list(self.queue.firsts())))
        assert first == min(number for name, number in self.there if name == tenant)
        self.queue.pop(tenant, tokens)
        self.there.remove((tenant, first))

    @invariant()
    def sound(self):
        self.queue.fair.check()
        assert sorted(self.queue) == [number for _, number in self.there]
        assert len(self.queue) == len(self.there)
        assert bool(self.queue) == bool(self.there)
        firsts = [tenant for tenant, _ in self.queue.firsts()]
        assert not self.queue.fair or firsts == list(self.queue.fair.in_order())
        assert self.queue.fair or len(firsts) <= 1
        assert sorted(firsts) == sorted({tenant for tenant, _ in self.there})


@efforts
def test_in_a_queue_of_tenants_nobody_overtakes_its_own(effort):
    run_state_machine_as_test(Queues, settings=effort)


# Shares of a worker.
def test_one_tenant_alone_is_never_above_its_share_and_nothing_is_counted():
    shares = Shares()
    for second in range(100):
        name, above = shares.offer("one", float(second))
        assert (name, above) == ("one", False)
        shares.add(name, 10_000, float(second))
    assert not shares._had
    shares.check()


def test_who_floods_is_above_its_share_at_once_and_who_does_not_never():
    shares = Shares()
    now = 0.0
    for step in range(2000):
        now += 0.005
        name, above = shares.offer("flood", now)
        assert not above or step
        if not above:
            shares.add(name, 1000, now)
        if step % 10 == 0:
            name, above = shares.offer("steady", now)
            assert not above or step < 20, "it has had less"
            shares.add(name, 300, now)
        shares.check()
    assert shares.offer("flood", now)[1] != shares.offer("steady", now)[1]


def test_who_has_not_come_for_a_while_reserves_nothing():
    shares = Shares(recent_s=10.0)
    shares.offer("a", 0.0)
    name, _ = shares.offer("b", 0.1)
    shares.add(name, 5, 0.1)
    for tenth in range(2, 200):
        name, above = shares.offer("a", tenth / 10)
        shares.add(name, 100, tenth / 10)
        assert above == (3 <= tenth <= 101), "b came last at 0.1 s"
        shares.check()


@given(COSTS, st.sampled_from([1.0, 2.0, 5.0]), st.integers(0, 2**32))
def test_of_two_that_always_offer_neither_has_had_more_than_a_request_beyond_the_other(costs, weight, seed):
    """As in a line that is long: whoever is above its share is refused."""
    shares, now, most = Shares({"a": weight}), 0.0, max(costs)
    shares.offer("a", now)
    shares.offer("b", now)
    for index, cost in enumerate(costs):
        now += ((seed >> index % 32) & 7) * 0.1
        for tenant in ("a", "b"):
            name, above = shares.offer(tenant, now)
            if not above:
                shares.add(name, cost, now)
        scale = 2.718281828459045 ** (-(now - shares._base) / 2.0)
        had = {tenant: shares._had.get(tenant, 0.0) * scale for tenant in ("a", "b")}
        assert abs(had["a"] / weight - had["b"]) <= most * max(1.0, 1 / weight) + 1e-6
        shares.check()


def test_of_too_many_tenants_the_rest_are_one():
    shares = Shares(most=3)
    names = {shares.offer(f"t{number}", number / 100)[0] for number in range(20)}
    assert len(names) == 4
    shares.check()


# The lane.
def test_prompts_that_begin_alike_follow_each_other():
    lane = Lane()
    prefixes = {"a1": (5, 1), "b1": (2, 9), "a2": (5, 1, 7), "c": (9,), "b2": (2, 9, 1), "a3": (5, 3), "none": ()}
    for key, prefix in prefixes.items():
        lane.add(key, prefix)
    assert drained(lane) == ["none", "b1", "b2", "a1", "a2", "a3", "c"]


def test_who_comes_during_a_round_is_in_the_next():
    lane = Lane()
    lane.add("z", (9,))
    lane.add("y", (8,))
    assert lane.first() == "y"
    lane.drop("y")
    for number in range(20):
        lane.add(f"early{number}", (0, number))
    assert lane.first() == "z", "nobody is overtaken for ever"


def test_tenants_take_turns_in_the_lane():
    lane = Lane({"paid": 3.0})
    for number in range(40):
        lane.add(f"paid{number}", (), "paid")
        lane.add(f"free{number}", (), "free")
    served = []
    for _ in range(40):
        key = lane.first() or ""
        served.append(key[:4])
        lane.fair.charge(served[-1], 100)
        lane.drop(key)
        lane.check()
    assert abs(served.count("paid") - 30) <= 1


@given(st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 3), max_size=3), st.booleans()), max_size=40))
def test_everybody_leaves_the_lane_once(entries):
    lane, there = Lane(), set()
    for number, (tenant, prefix, leaves) in enumerate(entries):
        lane.add(f"k{number}", tuple(prefix), tenant)
        there.add(f"k{number}")
        if leaves:
            gone = lane.first()
            assert gone in there
            there.remove(gone)
            assert lane.drop(gone)
            assert not lane.drop(gone)
        lane.check()
    assert set(drained(lane)) == there


def drained(lane: Lane) -> list[str]:
    keys = []
    while (key := lane.first()) is not None:
        keys.append(key)
        lane.drop(key)
    return keys


PLAY = """
import random
from scheduler.fair import Parked, Shares
from scheduler.lane import Lane
dice, parked, lane, shares, said = random.Random(5), Parked({"a": 2.0}), Lane(), Shares(), []
for number in range(400):
    tenant, tokens = dice.choice("abcd"), dice.randint(1, 50)
    name, above = shares.offer(tenant, number / 50)
    shares.add(name, tokens, number / 50)
    parked.add(f"p{number}", tokens, dice.randint(0, 9), number, tenant)
    lane.add(f"l{number}", (dice.randint(0, 3), number), tenant)
    said.append(above)
    if dice.random() < 0.5:
        for who in (parked, lane):
            key = parked.first(dice.randint(1, 50)) if who is parked else lane.first()
            if key is not None:
                who.fair.charge(dice.choice("abcd"), tokens)
                (parked.remove if who is parked else lane.drop)(key)
                said.append(key)
print(said)
"""


@pytest.mark.parametrize("seed", ["1", "77"])
def test_another_process_with_another_hash_seed_decides_the_same(seed):
    runs = [
        subprocess.run(
            [sys.executable, "-c", PLAY], env={"PYTHONHASHSEED": each}, capture_output=True, text=True, check=True
        )
        for each in ("0", seed)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) > 1000
