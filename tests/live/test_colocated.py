"""Mixed workers that compute both phases in one step: the policies that the simulator compares us with, live."""

from __future__ import annotations

import asyncio
import signal

import pytest

from core.sampling import Sampling
from tests.engine.chain import Chain
from tests.live.asks import ENDS, case, prompt
from tests.live.cluster import Client, ask, several, together, until

SMALL = {"prefill": 0, "decode": 0, "engine": "paced", "pace": 0.3, "hash_logits": True}


@pytest.fixture(scope="module")
def definition(model):
    """What a paced engine says."""
    return Chain.of(model, 320, 8192, (0, *ENDS), 0.0)


@pytest.fixture(
    scope="module", params=["colocated-chunked", pytest.param("colocated-prefill-first", marks=pytest.mark.slow)]
)
def colocated(launch, model, request):
    """Two workers of 61 pages each, without memory for what the tests ask of them at once."""
    live = launch(request.param, model, mixed=2, policy=request.param, kv_memory="256K", **SMALL)
    yield live
    live.stop()


def ask_all(live, cases):
    async def run():
        async with Client(live.gateway) as client:
            return await together(*(client.generate(each.request) for each in cases))

    return asyncio.run(run())


def test_a_crowd_of_short_and_long_gets_its_exact_tokens(colocated, definition):
    cases = [case(1 + 37 * n % 400, 10 + 7 * n % 90, n, temperature=0.5 * (n % 3), seed=n) for n in range(40)]
    for each, reply in zip(cases, ask_all(colocated, cases), strict=True):
        each.check(reply, definition)
        assert reply.hashes == definition.hashes(each.prompt, each.sampling)
        assert reply.last.attempts == 1


def test_who_loses_its_memory_goes_on_with_the_same_tokens(colocated, definition):
    """Six rows of 500 tokens each, and memory for four in all."""
    before = colocated.total("baton_rows_retired", how="evicted")
    cases = [case(20 + n, 480, 300 + n, forever=True) for n in range(6)]
    for each, reply in zip(cases, ask_all(colocated, cases), strict=True):
        each.check(reply, definition)
        assert reply.hashes == definition.hashes(each.prompt, each.sampling)
    assert colocated.total("baton_rows_retired", how="evicted") > before


def test_a_step_has_prompts_and_rows_at_once(colocated, definition):
    """Both phases are learned from, by each worker."""
    cases = [case(300, 60, 500 + n, forever=True) for n in range(4)]
    for each, reply in zip(cases, ask_all(colocated, cases), strict=True):
        each.check(reply, definition)
        names = {stage.name for stage in reply.last.stages}
        assert "pull" not in names
    for worker in colocated.workers:
        for phase in ("prefill", "decode"):
            assert colocated.metric(worker.name, "baton_step_cost_ratio_count", phase=phase) > 0


def test_the_model_computes_both_in_one_forward(launch, model, reference):
    live = launch(
        "colocated-model", model, prefill=0, decode=0, mixed=1, policy="colocated-chunked", dtype="float32",
        exact=False, engine="torch",
    )  # fmt: skip
    cases = [case(1 + 31 * n, 8 + 3 * n, 700 + n) for n in range(8)]
    for each, reply in zip(cases, ask_all(live, cases), strict=True):
        each.check(reply, reference)
    live.stop()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 77}], ids=["greedy", "seeded"])
def test_each_continuation_is_what_it_is_alone(colocated, definition, options):
    """50 tokens do not fill their pages of 16, so the last of them is copied."""
    tokens, sampling = prompt(50, 60), Sampling(40, n=4, stop_token_ids=ENDS, **options)
    for branch, reply in enumerate(several(colocated, ask(tokens, 40, n=4, **options))):
        assert reply.tokens == definition.tokens(tokens, sampling.branch(branch))
    colocated.wait_empty()


def test_who_leaves_frees_its_pages(colocated):
    async def run():
        async with Client(colocated.gateway) as client:
            going = [
                asyncio.create_task(client.generate(case(300, 400, 800 + n, forever=True).request)) for n in range(8)
            ]
            await asyncio.sleep(0.3)
            for task in going:
                task.cancel()
            await asyncio.gather(*going, return_exceptions=True)

    asyncio.run(run())
    colocated.wait_empty()


def test_another_goes_on_when_one_is_killed(launch, model, definition):
    live = launch("killed", model, mixed=2, policy="colocated-chunked", **{**SMALL, "pace": 3.0})
    live.torn = True
    cases = [case(30 + n, 60, 900 + n, forever=True) for n in range(8)]

    async def run():
        async with Client(live.gateway) as client:
            going = asyncio.create_task(together(*(client.generate(each.request) for each in cases)))
            rows = {"phase": "mixed", "state": "decoding"}
            await asyncio.to_thread(until, lambda: live.metric("mixed-0", "baton_requests", **rows) > 0, "it decodes")
            live.kill("mixed-0", signal.SIGKILL)
            return await going

    replies = asyncio.run(run())
    for each, reply in zip(cases, replies, strict=True):
        each.check(reply, definition)
    assert max(reply.last.attempts for reply in replies) > 1
    live.restart("mixed-0")
    live.stop()
