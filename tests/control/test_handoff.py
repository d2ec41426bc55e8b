"""The hand-off shell: who hears what of a hand-off and of a row that moves, and what no stream can carry."""

from __future__ import annotations

import asyncio

import pytest

from control.handoff import HandOffShell
from core.messages import (
    Carried,
    CaughtUp,
    Fetch,
    First,
    Freeness,
    Grant,
    OfferMigration,
    Ready,
    Refuse,
    Release,
    Reserve,
)
from core.worker import Lane, Use
from runtime.driver import Driver
from scheduler.decode_events import Asked, KvArrived, MoveAsked, MoveEnded, PeerCame, PeerGone
from scheduler.prefill_events import FetchOver
from tests.cast import D1, D2, P1, ask, ticket
from tests.decode.test_shell import Scripted
from transfer import sink as taking
from transfer import source as giving

USES = tuple(Use)
GIVEN = ticket(1, minter=D1, source=D1, sink=D2)
"""A row of ours."""
TAKEN = ticket(1, minter=D2, source=D2, sink=D1)
"""A row of theirs."""


class Transfer:
    """Of the transfer thread what the shell asks for here."""

    def __init__(self) -> None:
        self.lively_: list[bool] = []

    def lively(self, on: bool) -> None:
        self.lively_.append(on)


class Giving(Scripted):
    """A source that says it has something."""

    def __len__(self) -> int:
        return 1


class Stage:
    """The hand-off shell of D1, between scripted machines; `reached` are those to whom a stream stands."""

    def __init__(
        self, *, source=(), sink=(), moves=True, fetches=False, reached=(D2, P1), away=(), pulls=USES, serves=USES
    ) -> None:
        self.bugs: list[BaseException] = []
        self.sent: list = []
        self.driver = Driver(self.bugs.append)
        self.source, self.sink, self.decode = Giving(*source), Scripted(*sink), Scripted()
        self.driver.seat("decode", self.decode, lambda command: None)
        self.prefill = Scripted()
        self.driver.seat("prefill", self.prefill, lambda command: None)
        self.transfer = Transfer()
        lane = Lane(D2, "ucx: tcp", 1.0, 9.0)

        def send(peer, message) -> bool:
            self.sent.append((peer, message))
            return peer in reached

        self.shell = HandOffShell(
            D1,
            self.source,  # type: ignore[arg-type]
            self.sink,  # type: ignore[arg-type]
            self.driver,
            self.transfer,  # type: ignore[arg-type]
            send,
            lambda peer: lane,
            lambda: True,
            moves=moves,
            fetches=fetches,
            away=lambda peer: peer in away,
            pulls=lambda peer, use: use in pulls,
            serves=lambda peer, use: use in serves,
        )


def play(act, **how) -> Stage:
    async def scene() -> Stage:
        stage = Stage(**how)
        act(stage)
        stage.driver.close()
        assert not stage.bugs
        return stage

    return asyncio.run(asyncio.wait_for(scene(), 10))


OFFERED = OfferMigration(TAKEN, ask(), ticket(), 3, 20)
LOST = Release(GIVEN, "no")


@pytest.mark.parametrize(
    ("peer", "message", "seat"),
    [
        (D2, OFFERED, "sink"),
        (D2, Ready(TAKEN, 0, (), ()), "sink"),
        (D2, Release(TAKEN, "no"), "sink"),
        (D2, Grant(GIVEN), "source"),
        (D2, Refuse(GIVEN, "no"), "source"),
        (D2, Refuse(TAKEN, "no"), "sink"),
        (D2, Fetch(GIVEN, (1, 2), 0, 9.0), "source"),
        (D2, Fetch(TAKEN, (1, 2), 0, 9.0), ""),
        (P1, Fetch(GIVEN, (1, 2), 0, 9.0), ""),
        (D2, CaughtUp(GIVEN), "source"),
        (D2, LOST, "source"),
        (D2, Freeness(D2, 3.0), "decode"),
        (P1, OFFERED, ""),
        (P1, CaughtUp(GIVEN), ""),
        (D2, CaughtUp(TAKEN), ""),
        (D2, Grant(TAKEN), ""),
        (P1, LOST, ""),
        (P1, Freeness(D2, 3.0), ""),
        (P1, Reserve(ticket(sink=D1), ask()), "sink"),
    ],
)
def test_a_peers_word_reaches_the_machine_it_is_for_and_nobody_elses_counts(peer, message, seat):
    stage = play(lambda stage: stage.shell.heard(peer, message))
    heard = {"source": stage.source.events, "sink": stage.sink.events, "decode": stage.decode.events}
    assert {name for name, events in heard.items() if events} == ({seat} if seat else set())
    assert not stage.sent


def test_where_rows_do_not_move_they_are_refused_and_freeness_is_not_heard():
    def act(stage: Stage) -> None:
        stage.shell.heard(D2, OFFERED)
        stage.shell.heard(D2, Freeness(D2, 3.0))
        stage.shell.met(D2)

    stage = play(act, moves=False)
    assert stage.sent == [(D2, Refuse(TAKEN, "rows do not move here"))]
    assert stage.decode.events == stage.sink.events == []


def test_nothing_new_comes_over_a_lane_that_is_away_and_what_was_begun_goes_on():
    """The lane may be up again when the next of it is read."""
    reserve, going = Reserve(ticket(sink=D1), ask()), Ready(ticket(2, sink=D1), 0, (), ())

    def act(stage: Stage) -> None:
        for peer, message in ((P1, reserve), (D2, OFFERED), (P1, going)):
            stage.shell.heard(peer, message)

    stage = play(act, away=(P1, D2))
    assert stage.sent == [
        (P1, Refuse(reserve.ticket, "the lane from prefill-1 is away")),
        (D2, Refuse(TAKEN, "the lane from decode-2 is away")),
    ]
    assert stage.sink.events == [going]


def unmapped(use, peer):
    return f"the transfer map has no {use} between {peer} and decode-1"


@pytest.mark.parametrize(
    ("peer", "message", "use", "by"),
    [
        (P1, Reserve(ticket(sink=D1), ask()), Use.HAND_OFF, "pulls"),
        (D2, OFFERED, Use.MOVE, "pulls"),
        (D2, Fetch(GIVEN, (1, 2), 0, 9.0), Use.FETCH, "serves"),
    ],
)
def test_what_the_map_does_not_allow_is_refused_and_what_was_begun_goes_on(peer, message, use, by):
    going = Ready(ticket(2, sink=D1), 0, (), ()), Grant(ticket(3, minter=D1, source=D1, sink=D2))

    def act(stage: Stage) -> None:
        stage.shell.heard(peer, message)
        stage.shell.heard(P1, going[0])
        stage.shell.heard(D2, going[1])

    others = tuple(each for each in Use if each is not use)
    stage = play(act, **{by: others})
    assert stage.sent == [(peer, Refuse(message.ticket, unmapped(use, peer.name)))]
    assert stage.sink.events == [going[0]]
    assert stage.source.events == [going[1]]
    stage = play(act, **{"pulls": (use,), "serves": ()} if by == "pulls" else {"pulls": (), "serves": (use,)})
    assert stage.sent == []


@pytest.mark.parametrize(
    ("command", "seat", "use", "by"),
    [
        (giving.SendToSink(Reserve(GIVEN, ask())), "source", Use.HAND_OFF, "serves"),
        (giving.SendOffer(OfferMigration(GIVEN, ask(), ticket(), 3, 20)), "source", Use.MOVE, "serves"),
        (taking.SendToSource(Fetch(TAKEN, (1, 2), 0, 9.0)), "sink", Use.FETCH, "pulls"),
    ],
)
def test_nothing_is_begun_that_the_map_does_not_allow(command, seat, use, by):
    others = tuple(each for each in Use if each is not use)
    stage = play(lambda stage: stage.driver.post(seat, None), **{seat: [[command]], by: others})
    refused = Refuse(GIVEN if seat == "source" else TAKEN, unmapped(use, "decode-2"))
    assert getattr(stage, seat).events == [None, refused]
    assert not stage.sent
    stage = play(lambda stage: stage.driver.post(seat, None), **{seat: [[command]], by: (use,)})
    assert getattr(stage, seat).events == [None]
    assert len(stage.sent) == 1


@pytest.mark.parametrize("moves", [True, False])
def test_rows_do_not_move_over_a_lane_that_is_away(moves):
    stage = play(lambda stage: stage.shell.parted(D2), moves=moves)
    assert stage.decode.events == ([PeerGone(D2)] if moves else [])
    assert stage.source.events == stage.sink.events == [], "nobody is lost"


@pytest.mark.parametrize("moves", [True, False])
def test_peers_come_and_go(moves):
    def act(stage: Stage) -> None:
        stage.shell.met(D2)
        stage.shell.lost(D2)

    stage = play(act, moves=moves)
    assert stage.decode.events == ([PeerCame(D2), PeerGone(D2)] if moves else [])
    assert (stage.source.events, stage.sink.events) == ([giving.SinkLost(D2)], [taking.SourceLost(D2)])


def test_an_offer_that_no_stream_can_carry_is_refused_at_once():
    offer = OfferMigration(GIVEN, ask(), ticket(), 3, 20)
    stage = play(lambda stage: stage.driver.post("source", None), source=[[giving.SendOffer(offer)]], reached=())
    assert stage.sent == [(D2, offer)]
    assert stage.source.events == [None, Refuse(GIVEN, "no lane to decode-2")]
    assert stage.transfer.lively_ == [True], "an emulated lane moves only while we poll"


@pytest.mark.parametrize("reached", [(D2,), ()])
def test_a_fetch_goes_to_who_has_the_pages_or_is_refused_at_once(reached):
    fetch = Fetch(TAKEN, (1, 2), 0, 9.0)
    stage = play(lambda stage: stage.driver.post("sink", None), sink=[[taking.SendToSource(fetch)]], reached=reached)
    assert stage.sent == [(D2, fetch)]
    assert stage.sink.events[1:] == ([] if reached else [Refuse(TAKEN, "no lane to decode-2")])


CAME = taking.Pull(8192, 16, 2, 0.004, 0.01, 0.0)


@pytest.mark.parametrize(
    ("fetched", "nbytes", "detail"),
    [
        (
            taking.Fetched(TAKEN, 6, "", CAME),
            8192,
            {
                "from": "decode-2",
                "nbytes": "8192",
                "runs": "2",
                "gbytes_per_s": "0.00205",
                "transport": "ucx: tcp",
                "read_s": "0.004000",
            },
        ),
        (taking.Fetched(TAKEN, 4, "deadline"), 0, {"from": "decode-2", "failed": "deadline"}),
    ],
)
@pytest.mark.parametrize("fetches", [True, False])
def test_what_became_of_a_fetch_is_told_where_somebody_wants_to_know(fetched, nbytes, detail, fetches):
    stage = play(lambda stage: stage.driver.post("sink", None), sink=[[fetched]], fetches=fetches)
    assert stage.prefill.events == ([FetchOver(TAKEN.key, nbytes, detail)] if fetches else [])


@pytest.mark.parametrize(
    ("command", "event"),
    [
        (giving.MoveAsked(GIVEN.key), MoveAsked(GIVEN.key)),
        (giving.MoveEnded(GIVEN.key, True, True), MoveEnded(GIVEN.key, True, True)),
        (giving.MoveEnded(GIVEN.key, False, False, "lost"), MoveEnded(GIVEN.key, False, False, "lost")),
    ],
)
def test_what_the_source_says_of_a_move_is_the_policys(command, event):
    stage = play(lambda stage: stage.driver.post("source", None), source=[[command]])
    assert stage.decode.events == [event]


def test_a_row_that_comes_says_from_where_and_how_long_it_stood_still():
    carried = Carried((1, 2, 3), stopped_s=0.5)
    pull = taking.Pull(8000, 0, 2, 0.004, 1.25, 0.25, 0.75)
    arrived = taking.Arrived(TAKEN, ask(), (First(3),), pull, carried)
    stage = play(
        lambda stage: [stage.driver.post("sink", None) for _ in range(3)],
        sink=[[taking.AskPolicy(TAKEN, ask(), OFFERED)], [taking.AskForMore(CaughtUp(TAKEN))], [arrived]],
    )
    asked, came = stage.decode.events
    assert asked == Asked(TAKEN, ask(), OFFERED)
    assert stage.sent == [(D2, CaughtUp(TAKEN))]
    assert (came, came.carried) == (KvArrived(TAKEN, ask(), (First(3),), came.stages, carried), carried)
    (stage_,) = came.stages
    assert (stage_.name, stage_.worker, stage_.seconds) == ("move", "decode-1", 0.75)
    assert stage_.detail == {
        "from": "decode-2",
        "nbytes": "8000",
        "runs": "2",
        "gbytes_per_s": "0.002",
        "transport": "ucx: tcp",
        "read_s": "0.004000",
        "copy_s": "1.250000",
        "pause_s": "0.750000",
    }
