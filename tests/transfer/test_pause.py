"""How long a row that moves stands still, as its source and its sink count it together, each on its own clock."""

from __future__ import annotations

from core.messages import Carried, CaughtUp, First, Grant, OfferMigration
from core.pages import Owner, Pages
from core.request import Stage
from tests.cast import D1, D2, SHAPE, ask, ticket
from transfer import sink as taking
from transfer import source as giving

OFFER = OfferMigration(ticket(minter=D1, source=D1, sink=D2), ask(6, 20), ticket(), 3, 20)
KEY = OFFER.ticket.key
STAGES = (Stage("decode", "decode-1", 1.0),)


def test_the_pause_is_the_time_since_it_stopped_at_either_end():
    source, ledger = giving.Source(SHAPE, Pages(20)), Pages(20)
    sink = taking.Sink(SHAPE, ledger)
    source.on(giving.AskToMove(OFFER, 90.0), 1.0)
    source.on(Grant(OFFER.ticket), 2.0)
    source.on(giving.Sealed(KEY, (1, 2), 8), 3.0)
    (first,) = source.on(giving.Digested(KEY, 0, (10, 11)), 4.0)
    source.on(CaughtUp(OFFER.ticket), 5.0)
    carried = Carried((1, 2, 3, 4, 5), STAGES, stopped_s=0.25)
    source.on(giving.Sealed(KEY, (1, 2, 3), 10, (First(5),), carried), 6.0)
    (last,) = source.on(giving.Digested(KEY, 2, (12,)), 8.0)
    assert first.message.carried is None
    assert last.message.carried == Carried((1, 2, 3, 4, 5), STAGES, stopped_s=2.25)

    sink.on(OFFER, 101.0)
    ledger.promise(KEY, 5, Owner.PULLING)
    sink.on(taking.Decided(KEY, True), 101.0)
    (read,) = sink.on(first.message, 102.0)
    assert sink.on(taking.Pulled(read.read_id, 0.1, (10, 11)), 104.0) == [taking.AskForMore(CaughtUp(OFFER.ticket))]
    (read,) = sink.on(last.message, 110.0)
    _, arrived = sink.on(taking.Pulled(read.read_id, 0.1, (12,)), 110.5)
    assert arrived.carried == last.message.carried
    assert arrived.pull.paused_s == 2.75
    assert arrived.pull.total_s == 8.5
