"""The list of members: who is admitted, who expires, and when watchers are told."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from core.kv import KvShape
from core.worker import PROTOCOL_VERSION, Costs, Identity, Lane, Numerics, Part, ProcessEnded, Role, Use, Way
from scheduler.alike import mismatch, stranger
from scheduler.membership import (
    Admitted,
    Joining,
    Left,
    Membership,
    Publish,
    Renewed,
    Turned,
    Unknown,
)
from tests.cast import D1, GATEWAY, P1, P2, SHAPE, efforts, worker

EXACT = Numerics(True, "float32", 1, "AVX2")
P = worker(P1, Role.PREFILL)
D = worker(D1, Role.DECODE)
G = replace(worker(GATEWAY, Role.GATEWAY), kv=None, pages=0)


def test_a_member_is_admitted_renewed_and_expires():
    machine = Membership(3.5)
    assert machine.on(Joining(P), 0.0) == [Admitted(P1), Publish((P,), 1)]
    assert machine.deadline() == 3.5
    assert machine.on(Renewed(P1, True, ()), 3.0) == []
    assert machine.on(None, 3.5) == []
    assert machine.deadline() == 6.5
    assert machine.on(None, 6.5) == [Publish((), 2)]
    assert machine.deadline() is None


def test_watchers_hear_of_other_costs_and_a_heartbeat_without_any_changes_none():
    machine = Membership(3.5)
    costs, slower = Costs(((1.0,) * 4,), ((1.0,) * 3,)), Costs(((2.0,) * 4,), ((2.0,) * 3,))
    machine.on(Joining(replace(D, costs=costs)), 0.0)
    assert machine.on(Renewed(D1, True, (), costs), 1.0) == []
    assert machine.on(Renewed(D1, True, ()), 1.5) == []
    assert machine.on(Renewed(D1, True, (), slower), 2.0) == [Publish((replace(D, costs=slower),), 2)]


def test_watchers_hear_when_readiness_or_lanes_change():
    machine, lane = Membership(3.5), Lane(P1, "ucx", 2.0, 30.0)
    machine.on(Joining(D), 0.0)
    assert machine.on(Renewed(D1, False, ()), 1.0) == [Publish((replace(D, ready=False),), 2)]
    assert machine.on(Renewed(D1, True, (lane,)), 1.0) == [Publish((replace(D, lanes=(lane,)),), 3)]
    assert machine.epoch == 3


def test_all_that_expire_together_are_published_once():
    machine = Membership(1.0)
    machine.on(Joining(P), 0.0)
    machine.on(Joining(D), 0.0)
    assert machine.on(None, 2.0) == [Publish((), 3)]


def test_who_leaves_is_gone_at_once():
    machine = Membership(3.5)
    machine.on(Joining(P), 0.0)
    machine.on(Joining(D), 0.0)
    assert machine.on(Left(P1), 1.0) == [Publish((D,), 3)]


def test_whose_end_is_told_is_gone_at_once_and_does_not_come_back():
    machine = Membership(3.5)
    machine.on(Joining(P), 0.0)
    machine.on(Joining(D), 0.0)
    end = ProcessEnded(P1, True)
    assert machine.on(end, 1.0) == [Publish((D,), 3)]
    assert machine.on(end, 1.0) == [], "told once"
    assert machine.on(Renewed(P1, True, ()), 1.0) == [Unknown(P1)]
    assert machine.on(Joining(P), 1.0) == [Turned(P1, "this life of it has ended")]
    again = replace(P, identity=Identity(P1.name, 0x99))
    assert machine.on(Joining(again), 1.0) == [Admitted(again.identity), Publish((D, again), 4)]
    late = ProcessEnded(Identity(D1.name, 0x77), False)
    assert machine.on(late, 2.0) == [Publish((D, again), 5)], "watchers hear of it, and nobody is gone"
    assert machine.ended == (end, late)
    for number in range(40):
        machine.on(ProcessEnded(Identity("decode-9", number), False), 3.0)
        machine.check()
    assert len(machine.ended) == 32
    assert end not in machine.ended


def test_strangers_must_register_again():
    machine = Membership(3.5)
    machine.on(Joining(P), 0.0)
    former = Identity(P1.name, 0x99)
    assert machine.on(Renewed(D1, True, ()), 1.0) == [Unknown(D1)]
    assert machine.on(Renewed(former, True, ()), 1.0) == [Unknown(former)]
    assert machine.on(Left(former), 1.0) == []
    assert machine.on(Left(D1), 1.0) == []
    assert machine.members == (P,)
    assert machine.deadline() == 3.5


def test_a_new_incarnation_replaces_the_old_one():
    machine, again = Membership(3.5), worker(Identity(P1.name, 0x99), Role.PREFILL)
    machine.on(Joining(P), 0.0)
    assert machine.on(Joining(again), 1.0) == [Admitted(again.identity), Publish((again,), 2)]


def test_a_new_incarnation_may_differ_from_its_own_former_life():
    machine = Membership(3.5)
    machine.on(Joining(P), 0.0)
    other = replace(P, identity=Identity(P1.name, 0x99), fingerprint="new")
    assert machine.on(Joining(other), 1.0) == [Admitted(other.identity), Publish((other,), 2)]


SLOW = replace(EXACT, exact=False)
CANNOT = [
    (replace(D, protocol=PROTOCOL_VERSION + 1), f"protocol: got {PROTOCOL_VERSION + 1}", f"want {PROTOCOL_VERSION}"),
    (replace(D, model="other"), "model: got other", "want m as prefill-1 has"),
    (replace(D, fingerprint="0"), "fingerprint: got 0", "want f as prefill-1 has"),
    (replace(D, kv=KvShape(2, 1, 2, 4, "float32")), "kv.layers: got 2", "want 1 as prefill-1 has"),
    (replace(D, kv=KvShape(1, 3, 2, 4, "float32")), "kv.kv_heads: got 3", "want 1 as prefill-1 has"),
    (replace(D, kv=KvShape(1, 1, 8, 4, "float32")), "kv.head_dim: got 8", "want 2 as prefill-1 has"),
    (
        replace(D, kv=KvShape(1, 1, 2, 6, "float32")),
        "kv.page_tokens: got 6",
        "want a multiple or a divisor of 4 as prefill-1 has",
    ),
    (replace(D, kv=KvShape(1, 1, 2, 4, "float16")), "kv.dtype: got float16", "want float32 as prefill-1 has"),
    (replace(D, kv=None), "kv: got none", "want KvShape(layers=1, "),
    (replace(D, transport="zeromq"), "transport: got zeromq", "want nixl as prefill-1 has"),
    (replace(D, numerics=SLOW), "numerics.exact: got False", "want True as prefill-1 has, because exact mode"),
    (replace(D, numerics=replace(EXACT, dtype="bfloat16")), "numerics.dtype: got bfloat16", "want float32"),
    (replace(D, numerics=replace(EXACT, threads=2)), "numerics.threads: got 2", "want 1 as prefill-1 has, because"),
    (replace(D, numerics=replace(EXACT, cpu="AVX512")), "numerics.cpu: got AVX512", "want AVX2 as prefill-1 has"),
    (replace(D, numerics=None), "numerics: got none", "want Numerics(exact=True, "),
]


@pytest.mark.parametrize(("other", "got", "want"), CANNOT, ids=[got.partition(":")[0] for _, got, _ in CANNOT])
def test_a_worker_that_cannot_exchange_kv_is_turned_away_with_the_field_and_both_values(other, got, want):
    ours = replace(P, transport="nixl", numerics=EXACT)
    if other.transport == D.transport:
        other = replace(other, transport="nixl")
    if other.numerics == D.numerics and not got.startswith("numerics"):
        other = replace(other, numerics=EXACT)
    machine = Membership(3.5)
    machine.on(Joining(ours), 0.0)
    (turned,) = machine.on(Joining(other), 1.0)
    assert isinstance(turned, Turned)
    assert turned.identity == D1
    assert turned.reason.startswith(f"{got} from decode-1, {want}"), turned.reason
    assert machine.members == (ours,)
    assert (mismatch(ours, other) or "").startswith(f"{got} from decode-1, {want}")


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 64])
def test_pages_may_be_larger_or_smaller_if_one_is_a_multiple_of_the_other(tokens):
    other = replace(D, kv=replace(SHAPE, page_tokens=tokens))
    assert mismatch(P, other) is mismatch(other, P) is None


def test_every_field_that_must_agree_has_its_line():
    named = {got.partition(":")[0] for _, got, _ in CANNOT}
    layout = {f"kv.{field.name}" for field in fields(KvShape)}
    assert named == {"protocol", "model", "fingerprint", "kv", "transport", "numerics"} | layout | {
        f"numerics.{field.name}" for field in fields(Numerics)
    }


@pytest.mark.parametrize(
    ("field", "other"), [("model", replace(G, model="x")), ("fingerprint", replace(G, fingerprint="x"))]
)
def test_a_gateway_must_serve_the_same_model_whoever_was_first(field, other):
    machine = Membership(3.5)
    machine.on(Joining(P), 0.0)
    (turned,) = machine.on(Joining(other), 1.0)
    assert turned == Turned(GATEWAY, f"{field}: got x from gateway-1, want {getattr(P, field)} as prefill-1 has")
    assert machine.on(Joining(G), 1.0)[0] == Admitted(GATEWAY)
    machine = Membership(3.5)
    machine.on(Joining(other), 0.0)
    (turned,) = machine.on(Joining(P), 1.0)
    assert turned == Turned(P1, f"{field}: got {getattr(P, field)} from prefill-1, want x as gateway-1 has")


def test_gateways_have_no_kv_of_their_own():
    assert stranger(G, P) is stranger(P, G) is None
    machine = Membership(3.5)
    for member in (G, replace(P, numerics=EXACT), replace(G, identity=Identity("gateway-2", 1))):
        assert machine.on(Joining(member), 0.0)[0] == Admitted(member.identity)


def test_numerics_matter_only_when_one_side_is_exact():
    assert mismatch(replace(P, numerics=SLOW), replace(D, numerics=replace(SLOW, threads=9))) is None
    assert mismatch(P, replace(D, numerics=SLOW)) is None
    assert mismatch(replace(P, numerics=EXACT), replace(D, numerics=EXACT)) is None
    for mine, theirs in [(EXACT, SLOW), (SLOW, EXACT), (None, EXACT), (EXACT, replace(EXACT, threads=2))]:
        reason = mismatch(replace(P, numerics=mine), replace(D, numerics=theirs))
        assert reason is not None
        assert "exact mode needs the same bits everywhere" in reason


class Town(RuleBasedStateMachine):
    """Members come, renew, leave and fall silent, against a dictionary of leases."""

    names = st.sampled_from([P1, P2, D1, Identity(P1.name, 0x99)])

    def __init__(self):
        super().__init__()
        self.machine = Membership(3.0)
        self.now = 0.0
        self.lease: dict[Identity, float] = {}
        self.epoch = 0

    def give(self, event):
        commands = self.machine.on(event, self.now)
        published = [command for command in commands if isinstance(command, Publish)]
        assert len(published) <= 1
        if published:
            self.epoch += 1
            assert published[0] == Publish(self.machine.members, self.epoch)
        return commands

    @rule(who=names)
    def join(self, who):
        assert self.give(Joining(worker(who, Role.PREFILL)))[0] == Admitted(who)
        self.lease = {other: until for other, until in self.lease.items() if other.name != who.name}
        self.lease[who] = self.now + 3.0

    @rule(who=names, ready=st.booleans())
    def renew(self, who, ready):
        commands = self.give(Renewed(who, ready, ()))
        assert (commands == [Unknown(who)]) == (who not in self.lease)
        if who in self.lease:
            self.lease[who] = self.now + 3.0

    @rule(who=names)
    def leave(self, who):
        assert bool(self.give(Left(who))) == (self.lease.pop(who, None) is not None)

    @rule(seconds=st.sampled_from([1.0, 2.0, 4.0]))
    def wait(self, seconds):
        until = self.now + seconds
        while (due := self.machine.deadline()) is not None and due <= until:
            self.now = due
            assert self.give(None)
            self.lease = {who: until for who, until in self.lease.items() if until > self.now}
        self.now = until

    @invariant()
    def agree(self):
        self.machine.check()
        assert {member.identity for member in self.machine.members} == self.lease.keys()
        assert self.machine.deadline() == min(self.lease.values(), default=None)
        assert [m.identity.name for m in self.machine.members] == sorted(who.name for who in self.lease)


@efforts
def test_the_list_agrees_with_a_dictionary_of_leases(effort):
    run_state_machine_as_test(Town, settings=effort)


def test_members_are_told_their_part_of_the_transfer_map():
    machine = Membership(3.5)
    machine.on(Joining(P), 0.0)
    assert machine.part(P1) == Part(0, ())
    machine.on(Joining(D), 0.0)
    machine.on(Joining(G), 0.0)
    hands = (Use.HAND_OFF,)
    assert machine.part(P1) == Part(1, (Way(D1, (), hands),))
    assert machine.part(D1) == Part(1, (Way(P1, hands, ()),))
    assert machine.part(GATEWAY) is None
    machine.on(Renewed(P1, False, ()), 1.0)
    assert machine.map_version == 1, "readiness is no part of it"
    again = replace(P, identity=Identity(P1.name, 0x99))
    machine.on(Joining(again), 1.0)
    assert machine.part(P1) is None
    assert machine.part(D1) == Part(3, (Way(again.identity, hands, ()),))
    machine.on(Left(D1), 2.0)
    assert machine.part(again.identity) == Part(4, ())
    machine.check()


def test_a_coordinator_that_was_started_again_goes_on_from_the_version_that_its_members_were_told():
    machine = Membership(3.5)
    machine.on(Joining(P, 7), 0.0)
    assert machine.part(P1) == Part(8, ())
    machine.on(Joining(D, 4), 0.0)
    part = machine.part(D1)
    assert part is not None
    assert part.version == 9


def test_groups_exchange_no_kv_and_may_differ_in_it():
    machine = Membership(3.5)
    machine.on(Joining(P), 0.0)
    other = replace(D, group="chat", kv=replace(SHAPE, page_tokens=6), transport="zeromq")
    assert machine.on(Joining(other), 0.0)[0] == Admitted(D1)
    assert machine.part(D1) == Part(0, ())
    foreign = replace(worker(P2, Role.PREFILL), group="chat", fingerprint="else")
    (turned,) = machine.on(Joining(foreign), 0.0)
    assert isinstance(turned, Turned)
    assert turned.reason.startswith("fingerprint: got else from prefill-2")
    (turned,) = machine.on(Joining(replace(foreign, fingerprint="f", transport="zeromq")), 0.0)
    assert isinstance(turned, Turned)
    assert turned.reason.startswith("kv.page_tokens: got 4 from prefill-2, want a multiple or a divisor of 6")
