"""The router and what comes with tokens: logprobs once each, in order, and a rest that counts what was generated."""

from __future__ import annotations

from dataclasses import replace

from core.messages import Accept, Failed, Finished, Handed, Prompt, Tokens
from core.request import Phase, Request, Ticket
from core.sampling import Logprobs, Sampling
from scheduler.router import Router
from scheduler.router_events import Arrived, Deliver, ToOne, WorkerDown
from tests.cast import D1, P1, ask
from tests.scheduler.test_router import only_end, router

TOLD = (None, *(Logprobs(token, -1.0) for token in range(1, 6)))
"""Of the prompt of `ask()`."""


def known(*tokens: int) -> tuple[Logprobs, ...]:
    return tuple(Logprobs(token, -0.5, (token, 1), (-0.5, -0.7)) for token in tokens)


def prefilling(machine: Router, **options) -> Ticket:
    """A request at P1 with D1 as its sink."""
    request = replace(ask(), sampling=Sampling(8, **options))
    (offer,) = machine.on(Arrived(1, request), 0.0)
    machine.on(Accept(offer.message.ticket), 0.0)
    return offer.message.ticket


def placed_again(machine: Router, commands) -> Request:
    """What the next prefill worker is asked to do."""
    (offer,) = (each for each in commands if isinstance(each, ToOne) and hasattr(each.message, "wait_s"))
    (prompt,) = machine.on(Accept(offer.message.ticket), 1.0)
    assert isinstance(prompt.message, Prompt)
    return prompt.message.request


def test_logprobs_are_cut_where_their_tokens_are():
    machine = router()
    key = prefilling(machine, logprobs=2)
    first = Tokens(key, 0, (100,), (1,), 0, known(100))
    assert machine.on(first, 0.0) == [Deliver(1, (100,), (1,), 0, known(100))]
    both = Tokens(key, 0, (100, 101), (1, 2), 0, known(100, 101))
    assert machine.on(both, 0.0) == [Deliver(1, (101,), (2,), 0, known(101))]
    assert machine.on(both, 0.0) == []


def test_a_prompts_logprobs_come_with_the_first_token_and_once():
    machine = router()
    key = prefilling(machine, prompt_logprobs=0)
    first = Tokens(key, 0, (100,), prompt_logprobs=TOLD)
    assert machine.on(first, 0.0) == [Deliver(1, (100,), (), prompt_logprobs=TOLD)]
    assert machine.on(first, 0.0) == []
    assert machine.on(Tokens(key, 0, (100, 101)), 0.0) == [Deliver(1, (101,), ())]
    request = placed_again(machine, machine.on(WorkerDown(D1), 1.0))
    assert request.sampling.prompt_logprobs is None
    assert request.prompt == (*range(6), 100, 101)


def test_a_rest_knows_how_much_of_its_prompt_was_generated_and_what_is_left_of_its_least():
    machine = router()
    key = prefilling(machine, min_tokens=3, presence_penalty=0.5, logprobs=1, seed=7, temperature=1.0)
    machine.on(Tokens(key, 0, (100, 101)), 0.0)
    request = placed_again(machine, machine.on(WorkerDown(D1), 1.0))
    assert request.generated == 2
    assert request.sampling == Sampling(6, min_tokens=1, presence_penalty=0.5, logprobs=1, seed=7, temperature=1.0)
    (again,) = (flight.ticket for flight in machine._flights)
    machine.on(Tokens(again, 0, (102, 103, 104)), 1.0)
    request = placed_again(machine, machine.on(Failed(again, "DATA_LOSS", "why"), 2.0))
    assert (request.generated, request.sampling.max_tokens, request.sampling.min_tokens) == (5, 3, 0)
    assert request.prompt == (*range(6), 100, 101, 102, 103, 104)


def test_tokens_of_the_decode_worker_wait_for_the_prompts_logprobs():
    """Two streams: the prefill worker's first message may come last."""
    machine = router()
    key = prefilling(machine, prompt_logprobs=0, logprobs=0)
    assert machine.on(Tokens(key, 0, (100, 101), (), 0, known(100, 101)), 0.0) == []
    assert machine.on(Finished(key, "stop", 2, 1, decoded=True), 0.0) == []
    machine.check()
    commands = machine.on(Tokens(key, 0, (100,), (), 0, known(100), TOLD), 0.5)
    assert commands[:2] == [Deliver(1, (100,), (), 0, known(100), TOLD), Deliver(1, (101,), (), 0, known(101))]
    commands += machine.on(Handed(key, ()), 0.6)
    assert (only_end(commands).phase, only_end(commands).stop_token_id) == (Phase.DONE, 1)


def test_a_prefill_worker_lost_before_it_told_of_the_prompt_costs_nothing():
    machine = router()
    key = prefilling(machine, prompt_logprobs=0)
    assert machine.on(Tokens(key, 0, (100, 101)), 0.0) == []
    request = placed_again(machine, machine.on(WorkerDown(P1), 1.0))
    assert (request.sampling.prompt_logprobs, request.generated, request.prompt) == (0, 0, tuple(range(6)))
    (again,) = (flight.ticket for flight in machine._flights)
    told = Tokens(again, 0, (100,), prompt_logprobs=TOLD)
    assert machine.on(told, 2.0) == [Deliver(1, (100,), (), prompt_logprobs=TOLD)]


def test_a_text_that_ends_at_once_still_tells_of_its_prompt():
    machine = router()
    key = prefilling(machine, prompt_logprobs=0)
    told = Tokens(key, 0, (), prompt_logprobs=TOLD)
    assert machine.on(told, 0.0) == [Deliver(1, (), (), prompt_logprobs=TOLD)]
    assert only_end(machine.on(Finished(key, "stop", 0, 1), 0.0)).phase is Phase.DONE
