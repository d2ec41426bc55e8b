"""Rows that move, as stories: what one decode policy says to its shell, line by line, and who is chosen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from core.errors import LocalError
from core.messages import Accept, Cancel, Carried, Finished, First, Freeness, Handed, Moved, OfferMigration, Tokens
from core.pages import Owner, Pages
from core.request import Hints, Phase, Request, Ticket
from core.sampling import Sampling
from core.worker import Identity, Role
from scheduler.decode_events import (
    Answer,
    Asked,
    Cut,
    Drain,
    Ended,
    HandOver,
    KvArrived,
    Leave,
    MoveAsked,
    MoveEnded,
    OfferRow,
    PeerCame,
    PeerGone,
    Ran,
    Run,
    SealRow,
    TellMoved,
    TellPeer,
    Withdrawn,
    WithdrawRow,
)
from scheduler.decode_migrating import MigratingPolicy
from scheduler.decode_policy import DecodeConfig
from scheduler.migration import Migration, MigrationConfig
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, Deliver, End, ToOne, WorkerDown, WorkerUp
from tests.cast import D1, D2, GATEWAY, P1, SHAPE, ticket, worker

FAR = Identity("decode-3", 0x23)
CONFIG = MigrationConfig(
    below_steps=8, above_steps=16, max_stages=2, last_pages=1, ahead_tokens=12, deadline_s=5.0, retry_s=1.0
)
MOVE = Ticket(D1, 1, 1, D1, D2)


def policy(pages: int = 64, *, me: Identity = D1, peers: tuple[tuple[Identity, float], ...] = ((D2, 100.0),), **how):
    machine = MigratingPolicy(me, SHAPE, Pages(pages), DecodeConfig(max_steps=100), replace(CONFIG, **how))
    for peer, steps in peers:
        give(machine, PeerCame(peer))
        give(machine, Freeness(peer, steps))
    return machine


def give(machine: MigratingPolicy, event, now: float = 0.0) -> list:
    commands = machine.on(event, now)
    machine.check()
    due = machine.deadline()
    assert due is None or due >= now or event is None
    return commands


def a_row(
    machine: MigratingPolicy, counter: int = 1, prompt: int = 10, most: int = 50, now: float = 0.0, **how
) -> list:
    """A request that asks and whose KV is there at once; returns what its arrival led to."""
    of = ticket(counter)
    request = Request(
        "r", tuple(range(prompt)), Sampling(most, n=how.get("n", 1)), 100.0, hints=Hints(how.get("priority", 0))
    )
    assert Answer(of.key, True) in give(machine, Asked(of, request), now)
    machine._ledger.bind(of.key, SHAPE.pages_for(prompt), Owner.PULLING)
    machine._ledger.move(of.key, Owner.DECODING)
    return give(machine, KvArrived(of, request, tuple(First(7, branch=b) for b in range(request.sampling.n))), now)


def told(commands: list) -> list:
    """Without what is said to peers and the engine's orders."""
    return [each for each in commands if not isinstance(each, TellPeer | Run)]


def offered(machine: MigratingPolicy) -> OfferMigration:
    """A row of 10 tokens that ran 4 steps before its worker was told to drain."""
    a_row(machine)
    (cut,) = told(give(machine, Drain(), 1.0))
    assert isinstance(cut, Cut)
    (offer,) = told(give(machine, Ran(1, 4), 1.5))
    assert isinstance(offer, OfferRow)
    assert offer.deadline == 6.5
    return offer.offer


def test_a_row_moves_in_stages():
    machine = policy()
    offer = offered(machine)
    assert offer == OfferMigration(MOVE, replace(offer.request, timeout_s=98.5), ticket(), 5, 26, 1)
    assert told(give(machine, MoveAsked(MOVE.key), 2.0)) == [Cut(2)]
    key, pages = ticket().key, machine._ledger.pages(ticket().key)
    # 16 tokens have KV by now: 4 full pages. More than one is left, so that the row goes on.
    assert told(give(machine, Ran(2, 2), 2.5)) == [SealRow(MOVE.key, pages[:4], 16)]
    assert told(give(machine, MoveAsked(MOVE.key), 3.0)) == [Cut(3)]
    stopped = give(machine, Ran(3, 5), 3.5)
    (over,) = told(stopped)
    # 21 tokens: one more full page, and one that is not.
    assert over == HandOver(key, MOVE.key, machine._ledger.pages(key), 21, over.stages)
    assert [stage.name for stage in over.stages] == ["join_wait", "decode"]
    assert over.stages[1].detail == {"steps": "11"}
    assert len(over.pages) == 6
    assert not any(isinstance(each, Run) for each in stopped)
    assert told(give(machine, MoveEnded(MOVE.key, True, True), 4.0)) == [
        TellMoved(Moved(replace(ticket(), sink=D2), 1)),
        Leave(key),
    ]
    assert (machine._ledger.holders(), machine.moves.given, machine.moves.stayed) == ((), 1, 0)


def test_a_worker_that_drains_is_waited_for_as_long_as_somebody_may_take_what_it_has():
    machine = policy()
    assert not machine.giving()
    offered(machine)
    assert machine.giving()
    give(machine, Freeness(D2, -math.inf), 2.0)
    assert machine.giving(), "it is on its way"
    give(machine, MoveEnded(MOVE.key, False, True, "draining"), 2.0)
    assert not machine.giving(), "nobody takes it"
    give(machine, Freeness(D2, 0.0), 2.0)
    assert machine.giving(), "who is full now may have room soon"
    give(machine, Ran(2, 44, (Ended(ticket().key, "length", 50),)), 3.0)
    assert not machine.giving()


def test_it_stops_with_the_last_stage_however_much_is_left():
    machine = policy(last_pages=0)
    offered(machine)
    kinds = []
    for run in (2, 3, 4):
        give(machine, MoveAsked(MOVE.key), run)
        (said,) = told(give(machine, Ran(run, 4 if run == 3 else 1), run + 0.5))
        kinds.append(type(said))
    assert kinds == [SealRow, SealRow, HandOver]


def test_it_stops_when_it_has_all_that_memory_was_asked_for():
    machine = policy()
    offered(machine)
    give(machine, MoveAsked(MOVE.key), 2.0)
    commands = give(machine, Ran(2, 1), 2.5)
    (run,) = [each for each in commands if isinstance(each, Run)]
    assert run.steps == 26 - 15
    (over,) = told(give(machine, Ran(3, run.steps), 9.0))
    assert (type(over), over.tokens) == (HandOver, 26)


def test_it_stays_if_nobody_has_answered_by_then():
    machine = policy()
    offered(machine)
    assert told(give(machine, Ran(2, 12), 3.0))[0] == WithdrawRow(MOVE.key, "nobody answered in time")
    assert machine.queue()["running"] == 1


def test_one_that_was_refused_is_asked_again_after_a_while():
    machine = policy()
    offered(machine)
    assert told(give(machine, MoveEnded(MOVE.key, False, True, "no memory"), 2.0)) == []
    assert machine.deadline() == 3.0
    assert told(give(machine, None, 3.0)) == [Cut(2)]
    (again,) = told(give(machine, Ran(2, 1), 3.25))
    assert again.offer.ticket == replace(MOVE, counter=2)
    assert machine.deadline() == 100.0


def test_a_row_whose_last_pages_were_not_taken_goes_on_here():
    machine = policy(last_pages=9)
    offered(machine)
    give(machine, MoveAsked(MOVE.key), 2.0)
    (over,) = told(give(machine, Ran(2, 1), 2.5))
    commands = give(machine, MoveEnded(MOVE.key, False, True, "a page differs"), 3.0)
    assert not told(commands)
    (run,) = [each for each in commands if isinstance(each, Run)]
    (join,) = run.joining
    assert (join.key, join.generated, join.pages[:4], join.recompute) == (ticket().key, 6, over.pages[:4], None)
    assert join.carried is None
    end = give(machine, Ran(run.run_id, 44, (Ended(ticket().key, "length", 50),)), 3.5)
    assert told(end)[0].message.completion_tokens == 50


def test_a_row_that_somebody_silent_may_have_is_given_up():
    machine = policy(last_pages=9)
    offered(machine)
    give(machine, MoveAsked(MOVE.key), 2.0)
    give(machine, Ran(2, 1), 2.5)
    tell, leave = told(give(machine, MoveEnded(MOVE.key, False, False, "decode-2 was lost"), 3.0))
    assert (tell.message.ticket, tell.message.code) == (ticket(), "ABORTED")
    assert leave == Leave(ticket().key)
    assert machine._ledger.holders() == ()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_row_that_is_cancelled_does_not_move(stopped):
    machine = policy(last_pages=9 if stopped else 1)
    offered(machine)
    give(machine, MoveAsked(MOVE.key), 2.0)
    give(machine, Ran(2, 1), 2.5)
    commands = give(machine, Cancel(ticket(), "left"), 3.0)
    if not stopped:
        assert told(commands) == [Cut(3)]
        commands = give(machine, Ran(3, 1), 3.5)
    assert told(commands) == [WithdrawRow(MOVE.key, "ended"), Leave(ticket().key)]
    assert give(machine, MoveAsked(MOVE.key), 4.0) == give(machine, MoveEnded(MOVE.key, True, True), 4.0) == []
    assert (machine._ledger.holders(), machine.ignored) == ((), 1)


def test_a_row_that_ends_while_it_is_copied_has_ended():
    machine = policy()
    offered(machine)
    give(machine, MoveAsked(MOVE.key), 2.0)
    withdraw = WithdrawRow(MOVE.key, "ended")
    tell, *rest = told(give(machine, Ran(2, 3, (Ended(ticket().key, "stop", 7, 2),)), 2.5))
    assert (tell.message.reason, rest) == ("stop", [withdraw, Leave(ticket().key)])


def test_a_worker_gives_when_its_freeness_falls_below_the_bound_and_not_before():
    machine = policy(18)  # 72 tokens
    (run,) = [each for each in a_row(machine, 1, 10, 60) if isinstance(each, Run)]
    assert machine.moves.row is None
    commands = give(machine, Ran(run.run_id, run.steps), 5.0)
    (offer,) = told(commands)
    assert 10 + run.steps >= 72 - 8 - 4, "so late that freeness was below 8 steps"
    assert offer.offer.generated == 1 + run.steps
    lazy = policy(18, peers=((D2, 15.9),))
    a_row(lazy, 1, 10, 60)
    assert not told(give(lazy, Ran(1, run.steps), 5.0)), "nobody is free enough"


def test_it_is_the_freest_that_is_asked_and_nobody_who_is_gone():
    machine = policy(peers=((D2, 50.0), (FAR, 60.0)))
    assert machine.moves.best(False) == FAR
    give(machine, PeerGone(FAR))
    assert machine.moves.best(False) == D2
    give(machine, Freeness(D2, -math.inf))
    assert machine.moves.best(True) is None


def test_peers_hear_when_freeness_has_doubled_or_halved():
    moves = Migration(D1, CONFIG)
    said = [
        moves.news(steps) for steps in (100.0, 120.0, 130.0, 70.0, 60.0, 7.9, 1.0, -5.0, -math.inf, -math.inf, 100.0)
    ]
    assert said == [True, False, True, True, True, True, False, False, True, False, True]


@pytest.mark.parametrize(
    ("rows", "goes"),
    [
        ([(10, 0), (6, 0), (8, 0)], 2),
        ([(10, -1), (6, 0), (8, 0)], 1),
        ([(6, 0), (6, 0)], 2),
        ([(6, 0, 2), (9, 0)], 2),
    ],
    ids=["the shortest", "of the lowest priority", "the newest of equal ones", "not one that shares pages"],
)
def test_which_row_goes(rows, goes):
    machine = policy()
    for counter, (prompt, priority, *n) in enumerate(rows, 1):
        a_row(machine, counter, prompt, priority=priority, n=n[0] if n else 1)
    give(machine, Ran(machine._run_id, 1), 0.5)  # all have joined
    assert told(give(machine, Drain(), 1.0)) == [Cut(machine._run_id)]
    (offer,) = told(give(machine, Ran(machine._run_id, 1), 2.0))
    assert offer.offer.placed == ticket(goes)


# The other side.
def offer_to(machine: MigratingPolicy, counter: int = 1, most: int = 30) -> tuple[OfferMigration, list]:
    request = Request("r", tuple(range(10)), Sampling(50), 90.0)
    offer = OfferMigration(Ticket(D2, counter, 1, D2, D1), request, ticket(counter, sink=D2), 5, most, 3)
    return offer, told(give(machine, Asked(offer.ticket, request, offer), 1.0))


def taken(machine: MigratingPolicy, counter: int = 1) -> tuple[OfferMigration, list]:
    offer, answers = offer_to(machine, counter)
    assert answers == [Answer(offer.ticket.key, True)]
    assert machine._ledger.promised >= 8
    machine._ledger.bind(offer.ticket.key, 5, Owner.PULLING)  # 10 tokens and 8 of the answer have KV
    machine._ledger.move(offer.ticket.key, Owner.DECODING)
    arrived = KvArrived(offer.ticket, offer.request, (First(18),), (), Carried(tuple(range(10, 19))))
    return offer, give(machine, arrived, 2.0)


def test_a_row_comes_and_its_gateway_hears_before_any_token():
    machine = policy(20)
    offer, commands = taken(machine)
    here = replace(ticket(), sink=D1)
    assert commands[0] == TellMoved(Moved(here, 3))
    (run,) = [each for each in commands if isinstance(each, Run)]
    (join,) = run.joining
    assert (join.key, join.ticket, join.generated, join.first) == (offer.ticket.key, here, 9, First(18))
    assert (join.carried, join.recompute) == (Carried(tuple(range(10, 19))), None)
    (tell, leave) = told(give(machine, Ran(run.run_id, 4, (Ended(join.key, "stop", 12, 2),)), 3.0))
    assert (tell.message.ticket, tell.message.completion_tokens, leave) == (here, 12, Leave(join.key))
    assert machine._ledger.holders() == ()


def test_its_gateway_knows_a_row_that_came_by_its_own_ticket():
    machine = policy(20)
    _, commands = taken(machine)
    assert told(give(machine, Cancel(replace(ticket(), sink=D1), "left"), 3.0)) == [Cut(1)]
    assert told(give(machine, Ran(1, 1), 3.5)) == [Leave(commands[-1].rows[0])]
    assert (machine._ledger.holders(), machine.ignored) == ((), 0)


def test_a_row_that_came_may_go_on_to_another():
    machine = policy(40, peers=((FAR, 99.0),))
    taken(machine)
    give(machine, Drain(), 3.0)
    (offer,) = told(give(machine, Ran(1, 1), 3.5))
    assert (offer.offer.moves, offer.offer.placed, offer.offer.generated) == (4, replace(ticket(), sink=D1), 10)


@pytest.mark.parametrize("why", ["draining", "others wait for memory", "no memory for it", "needs 15 pages"])
def test_a_row_that_does_not_fit_now_is_refused_at_once(why):
    machine = policy(10 if why.startswith("needs") else 24)
    if why == "draining":
        give(machine, Drain())
    if why in ("others wait for memory", "no memory for it"):
        a_row(machine, 8)
    if why == "others wait for memory":
        give(machine, Asked(ticket(9), Request("r", (1,) * 40, Sampling(9), 100.0)))
    before = machine._ledger.available
    _, (answer,) = offer_to(machine)
    assert not answer.granted
    assert answer.reason.startswith(why)
    assert (machine._ledger.available, machine._aliases) == (before, {})


def test_a_row_that_did_not_arrive_goes_on_elsewhere_and_nobody_is_told():
    machine = policy(20)
    offer, _ = offer_to(machine)
    assert told(give(machine, Withdrawn(offer.ticket, "a page differs", True), 2.0)) == []
    assert (machine._ledger.available, machine._aliases) == (20, {})
    offer, _ = offer_to(machine)
    assert [type(each).__name__ for each in told(give(machine, None, 91.0))] == ["DropHandOff"]


def test_wrong_settings_are_refused():
    for wrong in ({"below_steps": 9, "above_steps": 8}, {"max_stages": 0}, {"deadline_s": 0.0}, {"last_pages": -1}):
        with pytest.raises(LocalError, match="migration: got "):
            MigrationConfig(**wrong)


# The gateway.
def router() -> Router:
    """One request whose first two tokens came, the second from D1."""
    machine = Router(GATEWAY, RouterConfig())
    for member in (worker(P1, Role.PREFILL), worker(D1, Role.DECODE), worker(D2, Role.DECODE)):
        machine.on(WorkerUp(member), 0.0)
    machine.on(Arrived(1, Request("r", (1, 2, 3), Sampling(8), 100.0)), 0.0)
    machine.on(Accept(AT), 0.0)
    machine.on(Tokens(AT, 0, (7,)), 0.0)
    machine.on(Handed(AT, ()), 0.0)
    machine.on(Tokens(AT, 1, (8,)), 0.0)
    return machine


AT = ticket(1)
THERE = replace(AT, sink=D2)


def test_after_the_word_the_new_worker_is_heard_and_the_old_one_is_not():
    machine = router()
    assert machine.on(Moved(THERE, 1), 1.0) == []
    assert machine.on(Tokens(AT, 2, (9,)), 1.0) == []
    assert machine.on(Tokens(THERE, 0, (7, 8, 9, 10)), 1.0) == [Deliver(1, (9, 10), ())]
    assert machine.on(WorkerDown(D1), 1.0) == []
    again = machine.on(WorkerDown(D2), 1.0)
    assert not any(isinstance(each, End) and each.phase is Phase.DONE for each in again)
    assert not machine._flights or next(iter(machine._flights)).placed != THERE
    machine.check()


def test_an_older_word_that_comes_late_says_nothing():
    machine = router()
    machine.on(Moved(AT, 2), 1.0)
    assert machine.on(Moved(THERE, 1), 1.0) == []
    assert machine.ignored == 1
    assert machine.on(Tokens(AT, 2, (9,)), 1.0) == [Deliver(1, (9,), ())]


def test_the_word_may_come_before_the_tokens_that_the_worker_before_has_sent():
    machine = Router(GATEWAY, RouterConfig())
    for member in (worker(P1, Role.PREFILL), worker(D1, Role.DECODE), worker(D2, Role.DECODE)):
        machine.on(WorkerUp(member), 0.0)
    machine.on(Arrived(1, Request("r", (1, 2, 3), Sampling(8), 100.0)), 0.0)
    machine.on(Accept(AT), 0.0)
    machine.on(Moved(THERE, 1), 0.5)
    assert machine.on(Tokens(AT, 0, (7, 8)), 1.0) == [Deliver(1, (7, 8), ())]
    assert machine.on(Tokens(AT, 2, (9,)), 1.0) == []
    assert machine.on(Tokens(THERE, 0, (7, 8, 9)), 1.0) == [Deliver(1, (9,), ())]
    machine.check()


def test_a_row_that_nobody_wants_is_recalled_where_it_is_now():
    machine = router()
    for each in range(3):
        machine.on(Tokens(AT, 2 + 2 * each, (9, 9)), 1.0)
    machine.on(Finished(AT, "length", 8, decoded=True), 1.0)
    assert len(machine) == 0
    assert machine.on(Moved(THERE, 1), 2.0) == [ToOne(D2, Cancel(THERE, "nobody wants the rest"))]


def test_a_row_that_moved_to_one_who_is_lost_is_placed_again():
    machine = router()
    machine.on(WorkerDown(D2), 0.5)
    commands = machine.on(Moved(THERE, 1), 1.0)
    assert any(isinstance(each, ToOne) and each.worker == P1 and each.message.ticket.attempt == 2 for each in commands)
    machine.check()
