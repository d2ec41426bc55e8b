"""Prefill and decode workers with pages of unequal size: what crosses is right to the last bit, or it is noticed.

A token of the paced engine is drawn from all bytes of all pages of its sequence: one row in the wrong place of a page
that was put together from others is a wrong token at once.
"""

from __future__ import annotations

import asyncio

import pytest

from control.client import members
from tests.engine.chain import Chain
from tests.live.asks import ENDS, Case, case
from tests.live.cluster import Client, Live, Reply, ask, together
from tests.transfer.faults import Rule, write


@pytest.fixture(scope="module", params=[(32, 16), (16, 32)], ids=["larger at the source", "smaller at the source"])
def cut(request, launch, model, tmp_path_factory):
    """One worker of each kind, and the larger of their pages."""
    prefill, decode = request.param
    rules = tmp_path_factory.mktemp("faults") / "rules"
    sizes = {"page_tokens": decode, "prefill_page_tokens": prefill, "chunk_tokens": 32}
    live = launch("cut", model, faults=rules, engine="paced", hash_logits=True, **sizes)
    found = {each.role: each.kv.page_tokens for each in members(live.deployment.coordinator) if each.pages}
    assert found == {"prefill": prefill, "decode": decode}
    yield live
    write(rules, {})
    live.stop()


@pytest.fixture(scope="module")
def reference(model):
    """What every client must receive."""
    return Chain.of(model, 320, 8192, (0, *ENDS))


@pytest.fixture
def live(cut):
    """Begins and ends each test with empty arenas and without faults."""
    cut.fault({})
    cut.torn = False
    yield cut
    cut.wait_empty()


def answers(live: Live, cases: list[Case]) -> list[Reply]:
    async def run():
        async with Client(live.gateway) as client:
            return await together(*(client.generate(each.request) for each in cases))

    return asyncio.run(run())


def exact(each: Case, reply: Reply, reference: Chain) -> None:
    each.check(reply, reference)
    assert reply.hashes == reference.hashes(each.prompt, each.sampling)


def test_prompts_of_all_lengths_cross_between_pages_of_unequal_size(live, reference):
    cases = [case(n, 25, n, forever=True) for n in (1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 330, 700)]
    before = live.total("baton_digest_mismatches")
    for each, reply in zip(cases, answers(live, cases), strict=True):
        exact(each, reply, reference)
        assert reply.last.attempts == 1
    assert live.total("baton_digest_mismatches") == before
    assert live.total("baton_pulled_bytes") > 0


def test_what_begins_alike_is_shared_as_far_as_pages_are_whole_on_both_sides(live, reference):
    """Of 100 tokens and an answer: 96 were kept by both, as three pages or six."""
    first = case(100, 40, 1, forever=True)
    (said,) = answers(live, [first])
    exact(first, said, reference)
    tokens = (*first.prompt, *said.tokens, *range(40, 70))
    again = Case(tokens, first.sampling, ask(tokens, 40, ignore_eos=True))
    (reply,) = answers(live, [again])
    exact(again, reply, reference)
    (pull,) = (stage for stage in reply.last.stages if stage.name == "pull")
    assert reply.last.cached_tokens == 96
    assert int(pull.detail["cached"]) == 128, "the answer is there, too"


def test_a_flipped_bit_is_noticed_and_read_again(live, reference):
    live.torn = True
    before = live.total("baton_digest_mismatches")
    live.fault({"decode-0": [Rule("read", "flip")]})
    each = case(200, 30, 9, forever=True)
    (reply,) = answers(live, [each])
    exact(each, reply, reference)
    assert live.acted() == ["decode-0: flip at read"]
    assert live.total("baton_digest_mismatches") == before + 1
    assert reply.last.attempts == 1
