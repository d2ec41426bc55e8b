"""The mixed policy: scripts with exact commands. What it does under stress is in `test_mixed_machine.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.errors import LocalError
from core.messages import Accept, Cancel, Failed, Finished, First, Handed, Offer, Prompt, Reject, SlotFree
from core.pages import Owner, Pages
from core.request import Stage, Ticket
from core.sampling import Sampling
from core.worker import Identity
from scheduler.cost import CostModel, Repriced
from scheduler.decode_events import Ended, Grow, Join
from scheduler.mixed_batch import State
from scheduler.mixed_chunk import Chunks
from scheduler.mixed_events import (
    PREFILL_FIRST,
    SARATHI,
    VLLM,
    Begin,
    Cut,
    MixedConfig,
    Step,
    StepFailed,
    Stepped,
    Suspend,
    continuation,
)
from scheduler.mixed_policy import MixedPolicy
from scheduler.prefill_events import Answer, Began, EndSequence, GatewayGone, Invite, Span
from tests.cast import D1, GATEWAY, MIXED, OTHER_GATEWAY, SHAPE, ask
from tests.cast import ticket as any_ticket
from tests.scheduler.mixed_worker import prefix_of


def ticket(counter: int = 1, *, minter: Identity = GATEWAY, sink: Identity = MIXED) -> Ticket:
    return any_ticket(counter, source=MIXED, sink=sink, minter=minter)


KEY = ticket(1).key
TWO = ticket(2).key
THREE = ticket(3).key
COST = CostModel("round", ((1.0, 0.125, 0.0, 0.0),), ((1.0, 0.25, 0.0),))
"""A prefill step is 1 s and 1/8 s a token, a decode step 1 s and 1/4 s a row; together they share 1 s."""


def policy(pages: int = 40, cost: CostModel | None = None, **settings) -> MixedPolicy:
    config = MixedConfig(**{"budget_tokens": 8, "max_rows": 4, "max_steps": 8, "ahead_pages": 1, **settings})
    return MixedPolicy(MIXED, SHAPE, Pages(pages), config, cost)


def ledger(machine: MixedPolicy) -> Pages:
    return machine._ledger


def give(machine: MixedPolicy, event, now: float = 0.0) -> list:
    commands = machine.on(event, now)
    machine.check()
    return commands


def queued(machine: MixedPolicy, counter: int = 1, prompt: int = 6, most: int = 8, now: float = 0.0, **how) -> list:
    """Offer and prompt of one request; returns what the prompt led to."""
    request = replace(ask(prompt, most, start=1000 * counter), sampling=Sampling(most, n=how.pop("n", 1)))
    request = replace(request, prefix=how.pop("prefix", ()), timeout_s=how.pop("timeout_s", 100.0))
    of = ticket(counter, **how)
    (answer,) = give(machine, Offer(of, prompt, most, 1e9, prefix=request.prefix), now)
    assert isinstance(answer.message, Accept), answer
    return give(machine, Prompt(of, request), now)


def began(*counters: int, token: int = 50) -> tuple[Began, ...]:
    return tuple(Began(ticket(counter).key, First(token)) for counter in counters)


def spans(commands: list) -> list[tuple[str, int, int]]:
    return [(span.key, span.start, span.stop) for span in commands[-1].spans]


def test_a_request_from_its_offer_to_its_end():
    machine, request = policy(), ask(10, 8)
    assert give(machine, Offer(ticket(), 10, 8, 9.0)) == [Answer(Accept(ticket()))]
    assert machine.deadline() == 1.0
    first = Step(1, (Span(KEY, 0, 8),), (), (), 0, 1)
    assert give(machine, Prompt(ticket(), request), 0.5) == [Begin(KEY, ticket(), request, (0, 1)), first]
    assert machine.deadline() == 100.5
    assert give(machine, Stepped(1), 1.0) == [Step(2, (Span(KEY, 8, 10),), (), (Grow(KEY, (2,)),), 0, 1)]
    stages = (Stage("batch_wait", "mixed-1", 0.5), Stage("prefill", "mixed-1", 1.5, {"tokens": "10", "chunks": "2"}))
    assert give(machine, Stepped(2, 1, began(1)), 2.0) == [
        Answer(Handed(ticket(), stages)),
        Step(3, (), (), (Grow(KEY, (3, 4)),), 1, 7),
    ]
    end = Finished(ticket(), "length", 8, None, (Stage("decode", "mixed-1", 3.0, {"steps": "7"}),), 0, True)
    assert give(machine, Stepped(3, 7, (), (Ended(KEY, "length", 8),)), 5.0) == [Answer(end), EndSequence(KEY)]
    assert (ledger(machine).holders(), machine.deadline(), machine.ignored) == ((), None, 0)


def test_a_first_token_may_be_the_last():
    machine = policy()
    queued(machine, 1, 6, 1)
    told, left = give(machine, Stepped(1, 1, (Began(KEY, First(50), "length"),)), 1.0)
    assert (told.message.completion_tokens, told.message.decoded, left) == (1, False, EndSequence(KEY))
    assert [stage.name for stage in told.message.stages] == ["batch_wait", "prefill"]
    queued(machine, 2, 6, 4)
    told, _ = give(machine, Stepped(2, 1, (Began(TWO, First(9), "stop"),)), 2.0)
    assert (told.message.completion_tokens, told.message.stop_token_id) == (0, 9)


def test_prompt_chunks_fill_up_what_decode_rows_leave_of_a_step():
    machine = policy()
    queued(machine, 1, 6)
    assert queued(machine, 2, 12, now=0.5) == []
    step = give(machine, Stepped(1, 1, began(1)), 1.0)[-1]
    assert (step.spans, step.rows, step.steps) == ((Span(TWO, 0, 7),), 1, 1)
    queued(machine, 3, 6, now=1.5)
    commands = give(machine, Stepped(2), 2.0)
    assert spans(commands) == [(TWO, 7, 12), (THREE, 0, 2)]
    assert commands[-1].rows == 1
    commands = give(machine, Stepped(3, 1, began(2)), 3.0)
    assert (spans(commands), commands[-1].rows) == ([(THREE, 2, 6)], 2)


def test_decode_rows_stall_while_prompts_go_first():
    machine = policy(order="prefill_first", admission="prompt")
    queued(machine, 1, 6)
    assert give(machine, Stepped(1, 1, began(1)), 1.0)[-1].steps == 7
    assert queued(machine, 2, 12, now=1.5) == [Cut(2)]
    assert queued(machine, 3, 3, now=1.5) == []
    commands = give(machine, Stepped(2, 1), 2.0)
    assert (spans(commands), commands[-1].rows) == ([(TWO, 0, 12)], 0), "a long prompt runs alone"
    commands = give(machine, Stepped(3, 1, began(2)), 3.0)
    assert (spans(commands), commands[-1].rows) == ([(THREE, 0, 3)], 0)
    commands = give(machine, Stepped(4, 1, began(3)), 4.0)
    assert (spans(commands), commands[-1].rows, commands[-1].steps) == ([], 3, 6)


def test_an_order_ends_with_the_first_row_that_must():
    machine = policy(budget_tokens=16)
    queued(machine, 1, 6, 20)
    queued(machine, 2, 6, 4)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    assert give(machine, Stepped(2, 1, began(2)), 2.0)[-1].steps == 3
    step = give(machine, Stepped(3, 3, (), (Ended(TWO, "length", 4),)), 5.0)[-1]
    assert (step.rows, step.steps) == (1, 8)


def test_orders_continue_each_other_up_to_the_horizon():
    machine = policy(max_steps=3)
    queued(machine, 1, 6, 9)
    assert give(machine, Stepped(1, 1, began(1)), 1.0)[-1] == Step(2, (), (), (Grow(KEY, (2,)),), 1, 3)
    assert give(machine, Stepped(2, 3), 4.0) == [Step(3, (), (), (), 1, 3)]
    assert give(machine, Stepped(3, 3), 7.0) == [Step(4, (), (), (Grow(KEY, (3,)),), 1, 2)]


def test_who_comes_starts_at_the_next_step_end():
    machine = policy()
    queued(machine, 1)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    assert queued(machine, 2, 3, now=1.5) == [Cut(2)]
    assert queued(machine, 3, 3, now=1.5) == []
    assert spans(give(machine, Stepped(2, 1), 2.0)) == [(TWO, 0, 3), (THREE, 0, 3)]


def test_the_next_in_line_starts_when_the_first_leaves():
    machine = policy(pages=9, budget_tokens=40, admission="prompt")
    queued(machine, 1, 6, 20)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    assert queued(machine, 2, 32, 4, now=1.5) == [Cut(2)]
    assert queued(machine, 3, 3, now=1.5) == []
    assert give(machine, Stepped(2, 1), 2.0)[-1].spans == (), "the first in line lacks memory"
    assert give(machine, Cancel(ticket(2), "left"), 2.5) == [Cut(3)]
    assert spans(give(machine, Stepped(3, 1), 3.0)) == [(THREE, 0, 3)]


def test_nobody_is_cut_for_while_all_rows_are_taken():
    machine = policy(max_rows=1)
    queued(machine, 1)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    assert queued(machine, 2, 3, now=1.5) == []
    commands = give(machine, Stepped(2, 7, (), (Ended(KEY, "length", 8),)), 8.0)
    assert [type(each) for each in commands] == [Answer, EndSequence, Begin, Step]


def test_the_newest_is_suspended_when_memory_is_used_up_and_computed_again_first():
    machine = policy(pages=5, budget_tokens=16)
    queued(machine, 1, 6, 12)
    queued(machine, 2, 6, 12, now=0.5)
    step = give(machine, Stepped(1, 1, began(1)), 1.0)[-1]
    assert (step.spans, step.rows) == ((Span(TWO, 0, 6),), 1)
    step = give(machine, Stepped(2, 1, began(2)), 2.0)[-1]
    assert (step.rows, step.steps) == (2, 2), "then memory is used up"
    queued(machine, 3, 3, now=3.5)
    commands = give(machine, Stepped(3, 2), 4.0)
    assert commands == [Suspend(TWO), Step(4, (), (), (), 1, 1)]
    assert machine.suspensions == 1
    # It had 3 tokens, and takes 3 pages now: nobody overtakes it.
    assert give(machine, Stepped(4, 1), 5.0) == [Step(5, (), (), (Grow(KEY, (2, 3)),), 1, 7)]
    commands = give(machine, Stepped(5, 5, (), (Ended(KEY, "stop", 9, 2),)), 10.0)
    assert [type(each) for each in commands] == [Answer, EndSequence, Begin, Begin, Step]
    assert (commands[2].key, commands[2].made) == (TWO, 3)
    assert spans(commands) == [(TWO, 0, 9), (THREE, 0, 3)]
    assert machine.recomputed_tokens == 8, "its last token had no KV yet"
    commands = give(machine, Stepped(commands[-1].step_id, 1, began(2, 3)), 11.0)
    assert [type(each.message) for each in commands[:-1]] == [Handed], "the gateway has heard of it before"
    end = Stepped(commands[-1].step_id, 1, (), (Ended(TWO, "stop", 4, 2),))
    told = give(machine, end, 12.0)[0].message
    assert told.stages == (Stage("decode", "mixed-1", 10.0, {"steps": "4", "suspended": "1"}),)


@pytest.mark.parametrize(("admission", "starts"), [("optimistic", [0, 1, 2]), ("prompt", [0, 1]), ("worst_case", [0])])
def test_what_must_be_free_to_start(admission, starts):
    """Three prompts of 8 tokens that may come to 16 each, 5 pages, 12 tokens a step."""
    machine = policy(pages=5, budget_tokens=18, admission=admission)
    for counter in (1, 2, 3):
        give(machine, Offer(ticket(counter), 8, 8, 1e9))
    ledger(machine).bind("others", 5, Owner.IN_DOUBT)
    for counter in (1, 2, 3):
        give(machine, Prompt(ticket(counter), ask(8, 8)))
    ledger(machine).release("others")
    assert machine.deadline() == 0.0
    commands = give(machine, None)
    assert [ticket(index + 1).key for index in starts] == [each.key for each in commands if isinstance(each, Begin)]
    promised = {"worst_case": 2}
    assert ledger(machine).promised == promised.get(admission, 0)


def test_a_start_leaves_the_watermark_to_those_that_run():
    machine = policy(pages=10, watermark_share=0.3, budget_tokens=16)
    queued(machine, 1, 6)
    queued(machine, 2, 8)
    assert spans(give(machine, Stepped(1, 1, began(1)), 1.0)) == [(TWO, 0, 8)]
    queued(machine, 3, 11, now=1.0)
    assert spans(give(machine, Stepped(2, 1, began(2)), 2.0)) == [], "3 pages of 10 stay free"


def test_a_lone_request_need_not_leave_the_watermark():
    assert spans(queued(policy(pages=4, watermark_share=0.5, budget_tokens=16), 1, 15, 1)) == [(KEY, 0, 15)]


def test_a_promise_covers_all_that_a_row_may_come_to():
    machine = policy(pages=8, admission="worst_case", max_steps=4)
    queued(machine, 1, 6, 10)
    assert ledger(machine).available == 4
    give(machine, Stepped(1, 1, began(1)), 1.0)
    ledger(machine).bind("others", 4, Owner.IN_DOUBT)
    step = give(machine, Stepped(2, 4), 5.0)[-1]
    assert (step.rows, step.steps, step.growing) == (1, 4, (Grow(KEY, (7,)),))


def test_a_prompt_goes_on_out_of_its_promise():
    machine = policy(pages=5, admission="worst_case")
    queued(machine, 1, 12, 8)
    assert ledger(machine).available == 0
    assert spans(give(machine, Stepped(1), 1.0)) == [(KEY, 8, 12)]


def test_even_the_oldest_is_suspended_when_others_took_the_memory_and_begins_when_it_is_back():
    machine = policy(pages=6, max_steps=1)
    queued(machine, 1, 7, 8)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    ledger(machine).bind("others", 4, Owner.IN_DOUBT)
    suspend, begin, step = give(machine, Stepped(2, 1), 2.0)
    assert (suspend, begin.made, spans([step])) == (Suspend(KEY), 2, [(KEY, 0, 8)]), "it has 9 tokens, and room for 8"
    assert give(machine, Stepped(3), 3.0) == []
    assert machine.deadline() == 100.0
    ledger(machine).release("others")
    assert machine.deadline() == 3.0
    assert spans(give(machine, None, 4.0)) == [(KEY, 8, 9)]


def test_memory_that_others_freed_is_seen_at_a_step_end_too():
    machine = policy(pages=6, max_steps=1)
    queued(machine, 1, 6, 12)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    ledger(machine).bind("others", 3, Owner.IN_DOUBT)
    assert queued(machine, 2, 8, now=1.5) == [Cut(2)]
    assert give(machine, Stepped(2, 1), 2.0) == [Step(3, (), (), (), 1, 1)]
    ledger(machine).release("others")
    assert spans(give(machine, Stepped(3, 1), 3.0)) == [(TWO, 0, 7)]


def test_a_step_with_a_prompt_is_not_disturbed_by_memory_that_is_freed():
    machine = policy(pages=6, budget_tokens=16)
    ledger(machine).bind("others", 3, Owner.IN_DOUBT)
    queued(machine, 3, 4, 1)
    queued(machine, 1, 8)
    queued(machine, 2, 8)
    commands = give(machine, Stepped(1, 1, (Began(THREE, First(1), "length"),)), 1.0)
    assert spans(commands) == [(KEY, 0, 8)], "there is one page for the other"
    ledger(machine).release("others")
    assert machine.deadline() == 100.0
    assert spans(give(machine, Stepped(2, 1, began(1)), 2.0)) == [(TWO, 0, 8)]


def test_who_is_suspended_waits_behind_those_who_came_earlier():
    machine = policy(pages=10, max_rows=2, budget_tokens=16, max_steps=1)
    queued(machine, 3, 4, 1)
    queued(machine, 1, 6, 8, n=2)
    queued(machine, 2, 6, 8)
    assert spans(give(machine, Stepped(1, 1, (Began(THREE, First(1), "length"),)), 1.0)) == [(KEY, 0, 6), (TWO, 0, 6)]
    both = (Began(KEY, First(100)), Began(KEY, First(101, branch=1)))
    commands = give(machine, Stepped(2, 1, both + began(2)), 2.0)
    assert [join.key for join in commands[-1].joining] == [f"{KEY}/0"], "all rows are taken"
    ledger(machine).bind("others", ledger(machine).available, Owner.IN_DOUBT)
    assert give(machine, Stepped(3, 1), 3.0) == [Step(4, (), (), (), 2, 1)]
    assert give(machine, Stepped(4, 1), 4.0)[0] == Suspend(TWO)
    assert [row.key for row in machine._line.values()] == [f"{KEY}/1", TWO]


def test_pages_bound_ahead_are_free_for_who_needs_them():
    machine = policy(pages=8, budget_tokens=32)
    queued(machine, 1, 4, 20)
    assert give(machine, Stepped(1, 1, began(1)), 1.0)[-1].growing == (Grow(KEY, (1, 2)),)
    assert ledger(machine).available == 5
    queued(machine, 2, 24, 8, now=1.5)
    commands = give(machine, Stepped(2, 1), 2.0)
    assert spans(commands) == [(TWO, 0, 24)]
    assert ledger(machine).available == 0
    assert ledger(machine).pages(KEY) == (0, 1)
    machine.on(Cancel(ticket(2), "left"), 2.5)
    step = give(machine, Stepped(3, 1, began(2)), 3.0)[-1]
    assert step.growing == (Grow(KEY, step.growing[0].pages, 2),), "what the engine had there before is void"


@pytest.mark.parametrize(("pages", "held"), [(40, 5), (10, 5), (9, 3)])
def test_while_there_is_plenty_a_row_gets_several_pages_at_once(pages, held):
    machine = policy(pages=pages, max_steps=1, ahead_pages=4)
    queued(machine, 1, 4, 30 if pages > 30 else 20)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    assert len(ledger(machine).pages(KEY)) == (held if pages > 9 else 2)
    while machine._batch.stored(machine._batch.rows[KEY]) < 8:
        give(machine, Stepped(machine._steps_ordered, 1), 2.0)
    assert len(ledger(machine).pages(KEY)) == held


def test_a_row_gets_no_page_that_it_cannot_use():
    machine = policy(ahead_pages=8, max_steps=1)
    queued(machine, 1, 4, 6)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    assert len(ledger(machine).pages(KEY)) == 3


@pytest.mark.parametrize(
    ("n", "most", "names", "found"),
    [
        (1, 6, (1, 2, 3, 4), 3),  # 15 tokens have KV: 10 of the prompt and 5 of the answer, whose last has none
        (1, 7, (1, 2, 3, 4), 4),
        (1, 6, (1, 2, 3), 3),
        (1, 6, (1, 9, 3, 4), 2),  # it goes on from another prompt than the worker was told of
        (1, 6, (), 2),
        (2, 6, (1, 2, 3, 4), 2),
    ],
)
def test_the_pages_of_an_answer_are_kept_for_the_next_turn(n, most, names, found):
    machine = policy(budget_tokens=16)
    queued(machine, 1, 10, most, prefix=(1, 2), n=n)
    begun = tuple(Began(KEY, First(50, branch=branch)) for branch in range(n))
    commands = give(machine, Stepped(1, 1, begun), 1.0)
    assert commands[-1].steps == most - 1
    keys = [KEY] if n == 1 else [continuation(KEY, branch) for branch in range(n)]
    give(machine, Stepped(2, most - 1, (), tuple(Ended(key, "length", most, prefix=names) for key in keys)), 2.0)
    assert (ledger(machine).holders(), ledger(machine).available) == ((), 40)
    (answer,) = give(machine, Offer(ticket(2), 20, 4, 1e9, prefix=(1, 2, 3, 4, 5)), 3.0)
    assert answer.message.cached_tokens == 4 * found
    request = replace(ask(20, 4), prefix=(1, 2, 3, 4, 5))
    assert spans(give(machine, Prompt(ticket(2), request), 3.0)) == [(TWO, 4 * found, min(20, 4 * found + 16))]


def test_a_cached_prefix_is_not_computed_again():
    machine, prompt = policy(budget_tokens=32), tuple(range(1000, 1010))
    queued(machine, 1, 10, 4, prefix=prefix_of(prompt))
    give(machine, Stepped(1, 1, (Began(KEY, First(5), "stop"),)), 1.0)
    assert ledger(machine).counts()[Owner.CACHED] == 2
    for counter, told, start in ((2, 8, 8), (3, 8, 0)):
        logprobs = 3 if counter == 3 else None
        request = replace(ask(10, 4), prompt=prompt, prefix=prefix_of(prompt))
        request = replace(request, sampling=Sampling(4, prompt_logprobs=logprobs))
        offer = Offer(ticket(counter), 10, 4, 1e9, prefix=request.prefix)
        assert give(machine, offer, 2.0) == [Answer(Accept(ticket(counter), told))]
        commands = give(machine, Prompt(ticket(counter), request), 2.0)
        assert spans(commands) == [(ticket(counter).key, start, 10)], "logprobs take all of it"
        last = Began(ticket(counter).key, First(5), "stop")
        (told, _) = give(machine, Stepped(commands[-1].step_id, 1, (last,)), 3.0)
        assert told.message.stages[1].detail.get("cached") == (str(start) if start else None)


@pytest.mark.parametrize(("of_tokens", "found"), [(2, 8), (8, 0)])
def test_names_of_smaller_pages_name_ours_and_those_of_larger_ones_do_not(of_tokens, found):
    machine, names = policy(budget_tokens=32), (1, 11, 2, 12, 3)[: 10 // of_tokens]
    request = replace(ask(10, 4), prefix=names, prefix_page_tokens=of_tokens)
    for counter, cached in ((1, 0), (2, found)):
        key = ticket(counter)
        offer = Offer(key, 10, 4, 1e9, prefix=names, prefix_page_tokens=of_tokens)
        assert give(machine, offer, 0.0) == [Answer(Accept(key, cached))]
        commands = give(machine, Prompt(key, request), 0.0)
        assert spans(commands) == [(key.key, cached, 10)]
        give(machine, Stepped(commands[-1].step_id, 1, (Began(key.key, First(5), "stop"),)), 1.0)
        assert ledger(machine).cached((11, 12)) * 4 == found
    assert ledger(machine).cached((1,)) == 0


def test_of_a_prompt_that_is_all_there_the_last_token_is_computed():
    machine, prompt = policy(budget_tokens=32), tuple(range(1000, 1008))
    queued(machine, 1, 8, 4, prefix=prefix_of(prompt))
    give(machine, Stepped(1, 1, (Began(KEY, First(5), "stop"),)), 1.0)
    request = replace(ask(8, 4), prompt=prompt, prefix=prefix_of(prompt))
    assert give(machine, Offer(ticket(2), 8, 4, 1e9, prefix=request.prefix), 2.0)[0].message.cached_tokens == 4
    assert spans(give(machine, Prompt(ticket(2), request), 2.0)) == [(TWO, 4, 8)]


def test_a_suspended_prompt_finds_its_own_pages_again():
    machine = policy(pages=6, budget_tokens=8, max_steps=1)
    queued(machine, 1, 7, 17)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    prompt = tuple(range(2000, 2016))
    queued(machine, 2, 16, 8, now=1.0, prefix=prefix_of(prompt))
    assert spans(give(machine, Stepped(2, 1), 2.0)) == [(TWO, 0, 7)]
    now, commands = 2.0, []
    while Suspend(TWO) not in commands:
        now += 1.0
        commands = give(machine, Stepped(machine._steps_ordered, 1), now)
        assert now < 30.0
    assert ledger(machine).counts()[Owner.CACHED] > 0
    assert ledger(machine).cached(prefix_of(prompt)) > 0


def test_chunks_are_cut_to_keep_the_gap():
    """1 s fixed, 1/4 s a row, 1/8 s a token: of 3 s two rows leave 12 tokens."""
    machine = policy(pages=100, cost=COST, gap_s=3.0, budget_tokens=64, least_tokens=4)
    queued(machine, 1, 6, 20)
    queued(machine, 2, 6, 20)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    give(machine, Stepped(2, 1, began(2)), 2.0)
    queued(machine, 3, 50, now=2.5)
    assert spans(give(machine, Stepped(3, 1), 3.0)) == [(THREE, 0, 12)]


@pytest.mark.parametrize(
    ("gap_s", "others", "most", "beside", "want"),
    [
        (3.0, [], 64, (2, 0), 12),
        (3.0, [], 10, (2, 0), 10),
        (3.0, [(8, 0)], 64, (2, 0), 4),
        (3.0, [(12, 0)], 64, (2, 0), 0),
        (3.0, [], 64, (0, 0), 16),
        (0.5, [], 64, (2, 0), 4),
        (0.5, [], 3, (2, 0), 3),
        (0.0, [], 64, (2, 0), 64),
    ],
)
def test_the_largest_chunk_below_the_gap(gap_s, others, most, beside, want):
    chunks = Chunks(MixedConfig(gap_s=gap_s, least_tokens=4), COST)
    assert chunks.take(most, 0, 64, others, beside) == want


@pytest.mark.parametrize(("want", "others", "took"), [(9, [], 9), (6, [], 6), (6, [(2, 0)], 6), (7, [(2, 0)], 0)])
def test_whole_prompts_share_a_step_within_the_budget(want, others, took):
    chunks = Chunks(MixedConfig("prefill_first", 8), None)
    assert chunks.take(want, 0, 8 - sum(new for new, _ in others), others, (0, 0)) == took


def test_an_offer_is_accepted_if_its_first_token_will_be_soon_enough():
    machine = policy(cost=COST, budget_tokens=16)
    queued(machine, 1, 40)
    # 40 and 24 tokens are four full steps of 3 s.
    told = give(machine, Offer(ticket(2), 24, 8, 11.9))
    late_s = 12.0 - 11.9
    assert told == [Answer(Reject(ticket(2), "first token in 12.00 s, wanted in 11.90 s", 12.0, late_s))]
    assert give(machine, Offer(ticket(3), 24, 8, 12.0)) == [Answer(Accept(ticket(3), 0, 12.0))]


def test_what_was_learned_of_steps_sizes_chunks_and_predicts_waits():
    """Somebody was refused: it hears of a machine that is faster than was thought."""
    machine = policy(cost=COST, budget_tokens=16, gap_s=3.0)
    queued(machine, 1, 40)
    give(machine, Offer(ticket(2), 24, 8, 6.0))
    told = give(machine, Repriced(COST.at(0.5, 0.5)))
    assert [command.message for command in told if isinstance(command, Invite)] == [SlotFree(MIXED, 24)]
    assert machine.predicted_wait_s(0.0, 24) == 6.0
    (step,) = [command for command in give(machine, Stepped(1), 1.0) if isinstance(command, Step)]
    assert step.spans[0].stop - step.spans[0].start == 16
    give(machine, Repriced(COST.at(2.0, 2.0)), 1.5)
    (step,) = [command for command in give(machine, Stepped(2), 2.0) if isinstance(command, Step)]
    assert step.spans[0].stop - step.spans[0].start < 16, "a full step would take longer than the gap"


def test_a_decode_step_that_is_under_way_is_waited_for():
    machine = policy(cost=COST, budget_tokens=16)
    queued(machine, 1, 6, 8)
    assert machine.predicted_wait_s(0.5, 9) == COST.prefill_s([(15, 0)])
    give(machine, Stepped(1, 1, began(1)), 1.0)
    assert machine.predicted_wait_s(1.5, 8) == COST.step_s([(8, 0)], 1, 7) + COST.decode_s(1, 7)


@pytest.mark.parametrize("max_steps", [1, 8])
def test_an_end_is_counted_with_the_pages_that_it_needed(max_steps):
    machine = policy(pages=12, budget_tokens=16, max_steps=max_steps, cost=COST)
    queued(machine, 1, 4, 20)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    give(machine, Stepped(2, 1, (), (Ended(KEY, "stop", 2, 3),)), 2.0)
    assert machine._waits._ends[:2] == (1.0, 2.0), "one ended, whose KV took two pages"


def test_without_a_cost_model_the_speed_of_full_steps_predicts():
    machine = policy(budget_tokens=16)
    queued(machine, 1, 40)
    give(machine, Stepped(1), 2.0)
    assert machine.predicted_wait_s(2.0, 8) == 4.0, "24 and 8 tokens, 8 a second"


def test_waits_for_rows_and_memory_are_predicted_by_the_rate_of_ends():
    machine = policy(pages=8, max_rows=2, budget_tokens=16, cost=COST)
    for counter in range(1, 41):
        queued(machine, counter, 8, 1, now=5.0 * counter)
        give(machine, Stepped(counter, 1, (Began(ticket(counter).key, First(5), "length"),)), 5.0 * counter + 4.0)
    now = 205.0
    assert machine.predicted_wait_s(now, 8) == COST.prefill_s([(8, 0)])
    queued(machine, 41, 8, 8, now=now)
    queued(machine, 42, 8, 8, now=now)
    give(machine, Stepped(41, 1, began(41)), now)
    give(machine, Stepped(42, 1, began(42)), now)
    assert 4.0 < machine.predicted_wait_s(now, 8) < 6.0, "both rows are taken, and one ends every five seconds"
    assert 8.0 < machine.predicted_wait_s(now, 32) < 12.0, "four pages are short, and who ended had two"


def test_who_was_refused_is_told_when_there_is_less_to_do():
    machine = policy(cost=COST, budget_tokens=16)
    queued(machine, 1, 40)
    (answer,) = give(machine, Offer(ticket(2), 24, 8, 8.0))
    assert isinstance(answer.message, Reject)
    assert not any(isinstance(each, Invite) for each in give(machine, Stepped(1), 0.5)), "9 s, and 7.5 are left"
    assert give(machine, Stepped(2), 1.0)[-1] == Invite(GATEWAY, SlotFree(MIXED, 24)), "6 s, and 7 are left"
    assert not any(isinstance(each, Invite) for each in give(machine, Stepped(3, 1, began(1)), 1.5)), "told once"


def test_a_gateway_that_is_gone_is_told_nothing():
    machine = policy(cost=COST, budget_tokens=16)
    queued(machine, 1, 40, minter=OTHER_GATEWAY)
    give(machine, Offer(ticket(2), 24, 8, 8.0))
    give(machine, GatewayGone(GATEWAY))
    assert not any(isinstance(each, Invite) for each in give(machine, Stepped(1), 0.1) + give(machine, Stepped(2), 0.2))


def test_a_cancel_makes_room_for_who_was_refused():
    machine = policy(cost=COST, budget_tokens=16)
    queued(machine, 1, 6)
    queued(machine, 2, 40)
    give(machine, Offer(ticket(3), 16, 8, 8.0))
    assert give(machine, Cancel(ticket(2), "left"), 0.1) == [Invite(GATEWAY, SlotFree(MIXED, 16))]


def test_what_can_never_fit_is_refused_at_once():
    machine = policy(pages=10)
    assert give(machine, Offer(ticket(), 20, 21, 9.0)) == [
        Answer(Reject(ticket(), "needs 11 pages, the worker has 10"))
    ]
    give(machine, Offer(ticket(2), 20, 8, 9.0))
    request = replace(ask(20, 8), sampling=Sampling(8, n=4))
    failed = Failed(ticket(2), "ABORTED", "needs 13 pages, the worker has 10")
    assert give(machine, Prompt(ticket(2), request)) == [Answer(failed)]
    assert machine.queue() == dict.fromkeys(State, 0)


@pytest.mark.parametrize("of", [any_ticket(), ticket(sink=D1)])
def test_a_request_that_would_be_decoded_elsewhere_is_refused(of):
    machine = policy()
    (answer,) = give(machine, Offer(of, 6, 8, 9.0))
    assert isinstance(answer.message, Reject)
    assert machine.ignored == 1


def test_an_offer_lapses():
    machine = policy()
    give(machine, Offer(ticket(), 6, 8, 9.0))
    assert machine.deadline() == 1.0
    assert give(machine, None, 1.0) == []
    lapsed = [Answer(Failed(ticket(), "ABORTED", "the offer has lapsed"))]
    assert give(machine, Prompt(ticket(), ask()), 1.5) == lapsed
    assert (machine.ignored, machine.deadline()) == (1, None)


PLACES = ["offered", "waiting", "prefilling", "decoding", "suspended"]


def placed(where: str) -> MixedPolicy:
    """Request 2 is there; an order for request 1 is out unless it is offered."""
    machine = policy(pages=5, budget_tokens=16, max_rows=1 if where == "waiting" else 4)
    if where == "offered":
        give(machine, Offer(ticket(2), 6, 8, 1e9))
        return machine
    queued(machine, 1, 6, 12)
    queued(machine, 2, 6, 12)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    if where in ("decoding", "suspended"):
        give(machine, Stepped(2, 1, began(2)), 2.0)
    if where == "suspended":
        assert give(machine, Stepped(3, 2), 4.0)[0] == Suspend(TWO)
    return machine


@pytest.mark.parametrize("where", PLACES)
def test_a_cancel_frees_in_every_state(where):
    machine = placed(where)
    asked = give(machine, Cancel(ticket(2), "left"), 4.5)
    assert give(machine, Cancel(ticket(2), "left"), 4.5) == []
    if where == "decoding":
        assert asked == [Cut(3)]
        asked = give(machine, Stepped(3, 1), 5.0)
    if where == "prefilling":
        assert asked == []
        asked = give(machine, Stepped(2, 1, began(2)), 5.0)
    gone = [] if where in ("offered", "waiting") else [EndSequence(TWO)]
    assert [each for each in asked if not isinstance(each, Step)] == gone
    assert machine._jobs.keys() == ({KEY} if where != "offered" else set())
    assert ledger(machine).pages(TWO) == ()


@pytest.mark.parametrize("where", PLACES)
def test_a_deadline_ends_a_request_in_every_state(where):
    machine = placed(where)
    told = [each.message for each in give(machine, None, 100.0) if isinstance(each, Answer)]
    mine = [each for each in told if each.ticket == ticket(2)]
    state = "waiting" if where == "suspended" else where
    late = Failed(ticket(2), "DEADLINE_EXCEEDED", f"ended while {state}")
    assert mine == ([] if where == "offered" else [late])
    assert machine.deadline() is None


def test_stages_are_reported_of_a_row_that_is_cancelled_for_its_stop_string():
    machine = placed("decoding")
    assert give(machine, Cancel(ticket(2), "stop string", report=True), 2.5) == [Cut(3)]
    told, left = give(machine, Stepped(3, 1), 3.0)[:2]
    assert (told.message.reason, told.message.completion_tokens, left) == ("cancelled", 2, EndSequence(TWO))
    assert told.message.stages == (Stage("decode", "mixed-1", 1.0, {"steps": "1"}),)


def test_stages_are_reported_of_a_suspended_row():
    machine = placed("suspended")
    told, left = give(machine, Cancel(ticket(2), "stop string", report=True), 4.5)[:2]
    assert (told.message.reason, told.message.completion_tokens, left) == ("cancelled", 3, EndSequence(TWO))


def test_a_gateway_takes_its_requests_along():
    machine = policy(budget_tokens=16)
    queued(machine, 1)
    queued(machine, 2, minter=OTHER_GATEWAY)
    give(machine, Offer(ticket(3), 6, 8, 1e9))
    assert give(machine, GatewayGone(GATEWAY)) == []
    assert machine.queue()[State.OFFERED] == 0
    left, begin, step = give(machine, Stepped(1, 1, began(1)), 1.0)
    assert (left, begin.ticket.minter, step.rows) == (EndSequence(KEY), OTHER_GATEWAY, 0)


def test_a_failed_step_fails_all_that_it_computed_and_nobody_else():
    machine = placed("prefilling")
    queued(machine, 3, 3, now=1.5)
    commands = give(machine, StepFailed(2, "boom"), 2.0)
    told = [each.message for each in commands if isinstance(each, Answer)]
    assert [(each.ticket.counter, each.code, each.message) for each in told] == [
        (2, "ABORTED", "the engine failed: boom"),
        (1, "ABORTED", "the engine failed: boom"),
    ]
    assert spans(commands) == [(THREE, 0, 3)]


def test_a_row_that_stalls_is_freed_at_once():
    machine = policy(order="prefill_first", admission="prompt")
    queued(machine, 1)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    queued(machine, 2, 6, now=1.5)
    give(machine, Stepped(2, 1), 2.0)
    assert give(machine, Cancel(ticket(1), "left"), 2.5) == [EndSequence(KEY)]


def test_rows_that_stalled_do_not_fail_with_a_step():
    machine = policy(order="prefill_first", admission="prompt")
    queued(machine, 1)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    queued(machine, 2, 6, now=1.5)
    give(machine, Stepped(2, 1), 2.0)
    commands = give(machine, StepFailed(3, "boom"), 3.0)
    assert [each.message.ticket.counter for each in commands if isinstance(each, Answer)] == [2]
    assert commands[-1].rows == 1


def test_continuations_share_the_full_pages_of_their_prompt_and_copy_the_open_one():
    machine = policy()
    queued(machine, 1, 6, 8, n=2)
    both = (Began(KEY, First(100)), Began(KEY, First(101, branch=1)))
    handed, left, step = give(machine, Stepped(1, 1, both), 1.0)
    assert isinstance(handed.message, Handed)
    assert left == EndSequence(KEY)
    request = replace(ask(6, 8, start=1000), sampling=Sampling(8, n=2))
    alone = [replace(request, sampling=request.sampling.branch(branch)) for branch in (0, 1)]
    assert step.joining == (
        Join(f"{KEY}/0", ticket(), alone[0], First(100), (0, *ledger(machine).pages(f"{KEY}/0")), (1, 2)),
        Join(f"{KEY}/1", ticket(), alone[1], First(101, branch=1), (0, *ledger(machine).pages(f"{KEY}/1")), (1, 3)),
    )
    assert (step.rows, step.steps, step.growing) == (2, 7, ())
    end = Ended(f"{KEY}/1", "stop", 3, 9)
    told, left = give(machine, Stepped(2, 2, (), (end,)), 2.0)[:2]
    assert (told.message.branch, told.message.completion_tokens, left) == (1, 3, EndSequence(f"{KEY}/1"))
    assert ledger(machine).pages(KEY) == (0, 1), "the prompt stays for the other"
    assert give(machine, Cancel(ticket(), "stop string", branch=0), 2.5) == [Cut(3)]
    assert give(machine, Stepped(3, 1), 3.0) == [EndSequence(f"{KEY}/0")]
    assert ledger(machine).holders() == ()


def test_a_continuation_without_memory_goes_on_by_itself():
    machine = policy(pages=10)
    queued(machine, 1, 7, 8, n=2)
    ledger(machine).bind("others", 7, Owner.IN_DOUBT)
    both = (Began(KEY, First(100)), Began(KEY, First(101, branch=1)))
    commands = give(machine, Stepped(1, 1, both), 1.0)
    assert [join.key for join in commands[-1].joining] == [f"{KEY}/0"]
    ledger(machine).release("others")
    commands = give(machine, None, 1.5)
    assert commands == [Cut(2)]
    begin, step = give(machine, Stepped(2, 1), 2.0)
    assert (begin.key, begin.made, begin.branch, begin.request.sampling.n) == (f"{KEY}/1", 1, 1, 1)
    assert spans([step])[0][:2] == (f"{KEY}/1", 0)


def test_continuations_of_a_prompt_that_nobody_wants_are_forgotten():
    machine = policy()
    queued(machine, 1, 6, 8, n=3)
    give(machine, Cancel(ticket(), "left"))
    begun = [Began(KEY, First(100, branch=branch), "stop" if branch == 1 else None) for branch in range(3)]
    gone = give(machine, Stepped(1, 1, tuple(begun)), 1.0)
    assert gone == [EndSequence(f"{KEY}/0"), EndSequence(f"{KEY}/2"), EndSequence(KEY)]


def test_strangers_are_ignored_and_counted():
    machine = policy()
    assert give(machine, Cancel(ticket(9), "x")) == []
    assert give(machine, GatewayGone(OTHER_GATEWAY)) == []
    assert machine.ignored == 2


@pytest.mark.parametrize(
    "event",
    [
        Stepped(3),
        Stepped(1, 1, began(2)),
        Stepped(2, 2, began(2)),
        Stepped(2, 0, began(2)),
        Stepped(2, 1),
        Stepped(2, 1, began(1, 2)),
        Stepped(2, 1, began(2), (Ended(THREE, "stop", 1),)),
        Stepped(2, 1, began(2), (Ended(TWO, "stop", 1),)),
        StepFailed(1, "boom"),
    ],
)
def test_an_event_that_cannot_be_is_our_own_bug_and_changes_nothing(event):
    machine = placed("prefilling")
    with pytest.raises(LocalError):
        machine.on(event, 1.5)
    machine.check()
    assert [type(each) for each in give(machine, Stepped(2, 1, began(2)), 2.0)] == [Answer, Step]


def test_rows_that_stall_cannot_end():
    machine = policy(order="prefill_first", admission="prompt")
    queued(machine, 1)
    give(machine, Stepped(1, 1, began(1)), 1.0)
    queued(machine, 2, 6, now=1.5)
    give(machine, Stepped(2, 1), 2.0)
    with pytest.raises(LocalError):
        machine.on(Stepped(3, 1, began(2), (Ended(KEY, "stop", 1),)), 3.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_rows": 0},
        {"max_steps": 0},
        {"ahead_pages": 0},
        {"least_tokens": 0},
        {"budget_tokens": 3, "max_rows": 4},
        {"budget_tokens": 0, "order": "prefill_first"},
        {"order": "prefill_first", "gap_s": 0.1},
        {"watermark_share": 1.0},
        {"offer_s": 0.0},
        {"gap_s": -1.0},
        {"admission": "hopeful"},
        {"order": "lifo"},
    ],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError):
        MixedConfig(**settings)


def test_a_gap_takes_a_cost_model():
    with pytest.raises(LocalError):
        policy(gap_s=1.0)


def test_the_named_baselines_differ_in_settings_alone():
    assert (PREFILL_FIRST.order, SARATHI.order, VLLM.order) == ("prefill_first", "chunked", "chunked")
    assert (PREFILL_FIRST.admission, SARATHI.admission, VLLM.admission) == ("prompt", "prompt", "optimistic")
