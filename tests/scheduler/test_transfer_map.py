"""The transfer map: who may pull from whom, by what they are; its version rises with every change, and only then."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from core import words
from core.state import dump, load
from core.worker import Identity, Numerics, Part, Role, Use, Way
from scheduler.alike import mismatch
from scheduler.transfer_map import TransferMap, uses, way
from tests.cast import D1, D2, GATEWAY, MIXED, P1, P2, SHAPE, efforts, worker

P, P_, D, D_, M = (
    worker(P1, Role.PREFILL),
    worker(P2, Role.PREFILL),
    worker(D1, Role.DECODE),
    worker(D2, Role.DECODE),
    worker(MIXED, Role.MIXED),
)
LARGE = replace(SHAPE, page_tokens=12)
ODD = replace(SHAPE, page_tokens=6)
EXACT = Numerics(True, "float32", 1, "AVX2")


@pytest.mark.parametrize(
    ("reader", "source", "found"),
    [
        (D, P, (Use.HAND_OFF,)),
        (P, D, ()),
        (P_, P, ()),
        (D_, D, ()),
        (M, P, (Use.HAND_OFF,)),
        (D, M, (Use.HAND_OFF,)),
        (P, M, ()),
        (replace(D, migrates=True), replace(D_, migrates=True), (Use.MOVE,)),
        (replace(D, migrates=True), D_, ()),
        (replace(P, fetches=True), D, (Use.FETCH,)),
        (replace(P, fetches=True), P_, (Use.FETCH,)),
        (replace(P, fetches=True), replace(D, kv=LARGE), ()),
        (replace(D, kv=LARGE), P, (Use.HAND_OFF,)),
        (replace(D, kv=ODD), P, ()),
        (replace(M, fetches=True), P, (Use.HAND_OFF, Use.FETCH)),
        (replace(D, group="chat"), P, ()),
        (replace(D, group="chat"), replace(P, group="chat"), (Use.HAND_OFF,)),
        (replace(D, numerics=EXACT), replace(P, numerics=replace(EXACT, cpu="AVX512")), ()),
        (replace(D, transport="zeromq"), P, ()),
        (replace(D, fingerprint="other"), P, ()),
        (worker(GATEWAY, Role.GATEWAY), P, ()),
    ],
)
def test_what_one_worker_may_pull_from_another(reader, source, found):
    assert uses(reader, source) == found
    assert way(reader, source).pulls == found
    assert way(source, reader) == Way(reader.identity, uses(source, reader), found)


def test_each_worker_is_told_its_peers_in_order_and_those_of_other_groups_are_none():
    whole = TransferMap()
    for member in (D_, replace(M, group="chat"), P, D, replace(P_, group="chat")):
        whole.put(member)
    hands = (Use.HAND_OFF,)
    assert whole.part(P1) == Part(whole.version, (Way(D1, (), hands), Way(D2, (), hands)))
    assert whole.part(D1) == Part(whole.version, (Way(P1, hands, ()),))
    assert whole.part(MIXED) == Part(whole.version, (Way(P2, hands, ()),))
    assert whole.part(GATEWAY) is None


def test_the_version_rises_with_whatever_changes_anybodys_part():
    whole = TransferMap()
    assert not whole.put(P), "alone"
    assert not whole.put(worker(GATEWAY, Role.GATEWAY))
    assert whole.version == 0
    assert whole.put(D)
    assert not whole.put(replace(D, ready=False, pages=3, lanes=())), "nothing that the map depends on"
    assert whole.version == 1
    assert whole.put(replace(D, group="chat"))
    assert whole.part(P1) == Part(2, ())
    assert not whole.drop(D1), "nobody was its peer"
    assert not whole.drop(D1)
    assert whole.version == 2


def test_who_was_told_a_newer_version_before_is_never_told_an_older_one():
    whole = TransferMap()
    whole.put(P)
    whole.at_least(7)
    assert whole.part(P1) == Part(8, ())
    whole.at_least(8)
    whole.at_least(3)
    assert whole.version == 8


FEW = [Identity(f"w-{number}", number) for number in range(6)]
MEMBERS = st.builds(
    lambda who, role, group, kv, migrates, fetches, exact: replace(
        worker(who, role),
        group=group,
        kv=kv,
        migrates=migrates and role is Role.DECODE,
        fetches=fetches and role.prefills,
        numerics=EXACT if exact else None,
    ),
    st.sampled_from(FEW),
    st.sampled_from([Role.PREFILL, Role.DECODE, Role.MIXED]),
    st.sampled_from(["", "chat"]),
    st.sampled_from([SHAPE, LARGE, ODD]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([False, False, False, True]),
)


class Drawn(RuleBasedStateMachine):
    """Members come, change and go; a plain table says what the map has to be."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = TransferMap()
        self.members: dict = {}
        self.told = self.parts()

    def parts(self):
        """By definition: every pair is looked at."""
        found = {}
        for me in self.members.values():
            ways = [way(me, other) for other in self.members.values() if other.identity != me.identity]
            found[me.identity] = tuple(sorted((w for w in ways if w.pulls or w.serves), key=lambda w: w.peer))
        return found

    def changed(self, said):
        """Members who have peers now, or had."""
        now = {who: ways for who, ways in self.parts().items() if ways}
        before = {who: ways for who, ways in self.told.items() if ways}
        assert said == (now != before)
        assert (self.whole.version > self.version) == said
        self.told = self.parts()

    @rule(member=MEMBERS)
    def put(self, member):
        self.version = self.whole.version
        self.members[member.identity] = member
        self.changed(self.whole.put(member))

    @rule(who=st.sampled_from(FEW))
    def drop(self, who):
        self.version = self.whole.version
        self.members.pop(who, None)
        self.changed(self.whole.drop(who))

    @rule(version=st.integers(0, 40))
    def at_least(self, version):
        before = self.whole.version
        self.whole.at_least(version)
        assert self.whole.version >= before
        assert self.whole.version > version or self.whole.version == before

    @rule()
    def restored(self):
        self.whole = load(json.loads(json.dumps(dump(self.whole))), TransferMap)

    @invariant()
    def says_what_pairs_say(self):
        self.whole.check()
        parts = {who: self.whole.part(who) for who in FEW}
        assert {who: part.ways for who, part in parts.items() if part} == self.parts()
        for me, part in parts.items():
            for each in part.ways if part else ():
                assert self.members[me].group == self.members[each.peer].group
                back = next(w for w in parts[each.peer].ways if w.peer == me)
                assert (back.pulls, back.serves) == (each.serves, each.pulls)
                assert (Use.MOVE in each.pulls) == (Use.MOVE in each.serves), "rows go both ways"
                assert mismatch(self.members[me], self.members[each.peer]) is None


@efforts
def test_the_map_is_what_all_pairs_say(effort):
    run_state_machine_as_test(Drawn, settings=settings(effort, max_examples=effort.max_examples // 5))


def story() -> list:
    """All parts after each of many changes, as JSON."""
    whole, said = TransferMap(), []
    for number, (role, group, migrates) in enumerate(
        itertools.product((Role.PREFILL, Role.DECODE, Role.MIXED), ("", "a", "b"), (False, True))
    ):
        who = Identity(f"w-{number * 7 % 11}", number)
        whole.put(replace(worker(who, role), group=group, migrates=migrates and role is Role.DECODE))
        if number % 4 == 3:
            whole.drop(Identity(f"w-{(number - 2) * 7 % 11}", number - 2))
        said += [words.written(whole.part(each)) for each in sorted(whole._kind_of)]
    return said


def test_the_same_members_give_the_same_map_whatever_hashes_are():
    command = "from tests.scheduler.test_transfer_map import story; import json; print(json.dumps(story()))"
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, check=True, text=True)
        assert json.loads(done.stdout) == story()


def test_a_change_costs_as_many_steps_as_there_are_kinds_not_members(monkeypatch):
    """`uses` is asked for kinds alone: once for each pair of them, however many members there are."""
    asked = []

    def counted(reader, source):
        asked.append((reader, source))
        return uses(reader, source)

    monkeypatch.setattr("scheduler.transfer_map.uses", counted)
    whole = TransferMap()
    for number in range(200):
        whole.put(worker(Identity(f"p-{number}", number), Role.PREFILL))
        whole.put(worker(Identity(f"d-{number}", number), Role.DECODE))
    assert len(asked) == 4
    part = whole.part(Identity("p-7", 7))
    assert part is not None
    assert len(part.ways) == 200
