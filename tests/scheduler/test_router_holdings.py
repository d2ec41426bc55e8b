"""What a router tells prefill workers that fetch: who may have more of a prompt than they have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from core.messages import Accept, Cancel, Finished, Handed, Holding, Moved, Offer, Prompt, Tokens
from core.prefix import page_hashes
from core.request import Request, Ticket
from core.sampling import Sampling
from core.worker import Role
from scheduler.dualmap import DualMap
from scheduler.least_loaded import LeastLoaded
from scheduler.placement import Placement
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, ClientGone, End, Satisfied, ToOne, WorkerDown, WorkerUp
from tests.cast import D1, D2, GATEWAY, P1, P2, SHAPE, worker

PAGE = SHAPE.page_tokens
TEXT = tuple(range(100, 200))


def router(*, fetches: bool = True, placement: Placement | None = None) -> Router:
    machine = Router(GATEWAY, RouterConfig(), placement if placement is not None else DualMap())
    for who, role in ((P1, Role.PREFILL), (P2, Role.PREFILL), (D1, Role.DECODE), (D2, Role.DECODE)):
        machine.on(WorkerUp(replace(worker(who, role), fetches=fetches and role.prefills)), 0.0)
    return machine


def ask(tokens: int, most: int = 8, n: int = 1) -> Request:
    prompt = TEXT[:tokens]
    return Request("r", prompt, Sampling(most, n=n), 100.0, prefix=page_hashes(prompt, PAGE))


def placed(machine: Router, counter: int, request: Request, cached: int = 0) -> tuple[Prompt, Offer]:
    """Accepted by the first that is asked."""
    (offer,) = machine.on(Arrived(counter, request), 1.0)
    assert isinstance(offer, ToOne)
    assert isinstance(offer.message, Offer)
    return accepted(machine, offer, cached), offer.message


def accepted(machine: Router, offer: Any, cached: int = 0) -> Prompt:
    (sent,) = machine.on(Accept(offer.message.ticket, cached), 1.0)
    machine.check()
    assert isinstance(sent, ToOne)
    assert isinstance(sent.message, Prompt)
    return sent.message


def answer(machine: Router, ticket: Ticket, upto: int, after: int, finish: str = "length") -> list:
    """It says what comes next in the text, from `after` to `upto`."""
    machine.on(Tokens(ticket, 0, TEXT[after : after + 1]), 2.0)
    machine.on(Handed(ticket, ()), 2.0)
    machine.on(Tokens(ticket, 0, TEXT[after:upto]), 2.0)
    return machine.on(Finished(ticket, finish, upto - after, 7 if finish == "stop" else None, decoded=True), 3.0)


@pytest.mark.parametrize(
    ("finish", "upto", "there"),
    [("length", 18, 16), ("length", 17, 16), ("length", 16, 12), ("stop", 16, 16), ("length", 23, 20)],
)
def test_a_decode_worker_has_the_prompt_and_what_it_said_but_for_the_newest_token(finish, upto, there):
    machine = router()
    prompt, offer = placed(machine, 1, ask(10, upto - 10 if finish == "length" else 90))
    assert prompt.holdings == (), "nobody had anything"
    assert offer.ticket.sink == D1
    (end,) = answer(machine, prompt.ticket, upto, 10, finish)
    assert isinstance(end, End)
    second, _ = placed(machine, 2, ask(40), cached=8)
    assert second.ticket.source == prompt.ticket.source, "it has the prompt"
    assert second.holdings == (Holding(D1, there),)
    again, _ = placed(machine, 3, ask(40), cached=there)
    assert all(each.tokens > there for each in again.holdings)


def test_who_has_most_is_named_first_and_two_at_most():
    placement = DualMap()
    machine = router(placement=placement)
    for who, pages in ((P2, 3), (D1, 2), (D2, 5)):
        post = machine._workers.get(who)
        assert post is not None
        placement.kept(post, page_hashes(TEXT[: pages * PAGE], PAGE))
    prompt, _ = placed(machine, 1, ask(60))
    assert prompt.ticket.source == P2
    assert prompt.holdings == (Holding(D2, 20), Holding(D1, 8))


@pytest.mark.parametrize("machine", [router(fetches=False), router(placement=LeastLoaded())], ids=["not", "by load"])
def test_where_nobody_fetches_or_remembers_nobody_is_named(machine):
    prompt, _ = placed(machine, 1, ask(10, 8))
    answer(machine, prompt.ticket, 18, 10)
    second, _ = placed(machine, 2, ask(40))
    assert second.holdings == ()


def test_who_has_pages_of_another_size_or_is_gone_is_not_named():
    machine = router()
    prompt, _ = placed(machine, 1, ask(10, 8))
    answer(machine, prompt.ticket, 18, 10)
    other = replace(worker(D1, Role.DECODE), kv=replace(SHAPE, page_tokens=8))
    machine.on(WorkerUp(other), 3.0)
    second, _ = placed(machine, 2, ask(40), cached=8)
    assert second.holdings == ()
    machine.on(WorkerUp(worker(D1, Role.DECODE)), 3.0)
    third, _ = placed(machine, 3, ask(40), cached=8)
    assert third.holdings[0].worker == D1
    machine.on(WorkerDown(D1), 3.0)
    fourth, _ = placed(machine, 4, ask(40), cached=8)
    assert D1 not in [each.worker for each in fourth.holdings]


def decoding(machine: Router, counter: int, upto: int, n: int = 1) -> Ticket:
    """A row that has said so much of the text."""
    ticket = placed(machine, counter, ask(10, 80, n))[0].ticket
    for branch in range(n):
        machine.on(Tokens(ticket, 0, TEXT[10:11], branch=branch), 2.0)
    machine.on(Handed(ticket, ()), 2.0)
    for branch in range(n):
        machine.on(Tokens(ticket, 0, TEXT[10:upto], branch=branch), 2.0)
    return ticket


@pytest.mark.parametrize(("upto", "there"), [(30, 28), (29, 28), (28, 24)])
def test_of_an_answer_that_a_stop_string_ended_the_pages_are_kept(upto, there):
    """The decode worker hears their names with the recall, and keeps those that it has written; the newest token may
    have no KV."""
    machine = router()
    ticket = decoding(machine, 1, upto)
    names = page_hashes(TEXT[:upto], PAGE)
    to_source, to_sink, *_ = machine.on(Satisfied(1, 0), 2.0)
    assert to_source == ToOne(P1, Cancel(ticket, "stop string", report=True))
    assert to_sink == ToOne(D1, Cancel(ticket, "stop string", report=True, prefix=names))
    second, _ = placed(machine, 2, ask(40), cached=8)
    assert second.holdings == (Holding(D1, there),)


def test_without_fetches_they_are_kept_as_well():
    machine = router(fetches=False, placement=LeastLoaded())
    decoding(machine, 1, 30)
    *_, to_sink = [each for each in machine.on(Satisfied(1, 0), 2.0) if isinstance(each, ToOne) and each.worker == D1]
    assert to_sink.message.prefix == page_hashes(TEXT[:30], PAGE)


@pytest.mark.parametrize("event", [ClientGone(1, "left"), Satisfied(1, 0)], ids=["left", "one of several"])
def test_an_answer_that_somebody_left_or_that_is_one_of_several_is_not_kept(event):
    machine = router()
    decoding(machine, 1, 30, n=1 if isinstance(event, ClientGone) else 2)
    sent = [each.message for each in machine.on(event, 2.0) if isinstance(each, ToOne)]
    if isinstance(event, Satisfied):
        sent += [each.message for each in machine.on(Satisfied(1, 1), 2.0) if isinstance(each, ToOne)]
    assert sent
    assert {each.prefix for each in sent} == {()}
    second, _ = placed(machine, 2, ask(40), cached=8)
    assert second.holdings == ()


def test_a_row_that_moved_leaves_its_answer_where_it_ended():
    machine = router()
    prompt, _ = placed(machine, 1, ask(10, 8))
    ticket = prompt.ticket
    machine.on(Tokens(ticket, 0, TEXT[10:11]), 2.0)
    machine.on(Tokens(ticket, 0, TEXT[10:13]), 2.0)
    moved = replace(ticket, sink=D2)
    machine.on(Moved(moved, 1), 2.0)
    machine.on(Tokens(moved, 0, TEXT[10:18]), 2.0)
    machine.on(Finished(moved, "length", 8, decoded=True), 2.0)
    second, _ = placed(machine, 2, ask(40), cached=8)
    assert second.holdings == (Holding(D2, 16),)


def test_what_is_left_of_a_lost_answer_is_asked_for_by_the_names_of_all_that_was_said():
    machine = router()
    prompt, _ = placed(machine, 1, ask(10, 40))
    ticket = prompt.ticket
    machine.on(Tokens(ticket, 0, TEXT[10:11]), 2.0)
    machine.on(Handed(ticket, ()), 2.0)
    machine.on(Tokens(ticket, 0, TEXT[10:27]), 2.0)
    *_, offer = machine.on(WorkerDown(ticket.sink), 3.0)
    assert offer.message.prefix == page_hashes(TEXT[:27], PAGE)
    again = accepted(machine, offer, cached=8)
    assert again.request.prompt == TEXT[:27]
    assert again.request.prefix == offer.message.prefix


def test_without_fetches_it_is_asked_for_by_the_prompts_names():
    machine = router(fetches=False)
    prompt, _ = placed(machine, 1, ask(10, 40))
    machine.on(Tokens(prompt.ticket, 0, TEXT[10:11]), 2.0)
    machine.on(Tokens(prompt.ticket, 0, TEXT[10:27]), 2.0)
    *_, offer = machine.on(WorkerDown(prompt.ticket.sink), 3.0)
    assert offer.message.prefix == page_hashes(TEXT[:10], PAGE)


@pytest.mark.parametrize("late", [False, True])
def test_usage_says_what_was_not_computed_in_the_end(late):
    """The prefill worker's word may come after the decode worker's last one."""
    machine = router()
    prompt, _ = placed(machine, 1, ask(10, 8), cached=4)
    ticket, handed = prompt.ticket, Handed(prompt.ticket, (), cached_tokens=8)
    machine.on(Tokens(ticket, 0, TEXT[10:11]), 2.0)
    if not late:
        machine.on(handed, 2.0)
    machine.on(Tokens(ticket, 0, TEXT[10:18]), 2.0)
    ended = machine.on(Finished(ticket, "length", 8, decoded=True), 3.0)
    if late:
        assert ended == []
        ended = machine.on(handed, 3.0)
    (end,) = ended
    assert end.cached_tokens == 8


def test_a_first_token_that_is_the_last_says_it_too():
    machine = router()
    prompt, _ = placed(machine, 1, ask(10, 1), cached=4)
    machine.on(Tokens(prompt.ticket, 0, TEXT[10:11]), 2.0)
    (end,) = machine.on(Finished(prompt.ticket, "length", 1, cached_tokens=8), 3.0)
    assert end.cached_tokens == 8
