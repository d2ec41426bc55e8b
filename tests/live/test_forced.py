"""Prefill steps are suspended and rows are swapped as often as can be, in a real deployment: no client sees any of it.

Its workers serve as all do, but for what they decide (tests/live/forced.py).
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.engine.chain import Chain
from tests.live.asks import ENDS, case
from tests.live.cluster import Client, Reference, Reply, together, until

SAMPLINGS = ({}, {"temperature": 0.8, "seed": 11}, {"temperature": 1.3, "top_k": 3, "seed": 2**62})
LONG = case(1500, 3, 1, forever=True)
CROWD = [case(1 + 5 * n % 71, 60 + 3 * n % 41, n, forever=True, **SAMPLINGS[n % 3]) for n in range(24)]
"""2,700 tokens in the end. Who was promised memory that others then need is placed again."""
FORCED = {
    "preempt": True,
    "chunk_tokens": 2048,
    "prefix_cache": False,
    "hash_logits": True,
    "how": {"worker_entry": "tests.live.forced"},
}


@pytest.fixture(scope="module")
def paced(launch, model):
    """A prefill and a decode worker, slow ones, with memory for 1,712 tokens and host memory for 1,600 more."""
    live = launch("forced", model, engine="paced", pace=8.0, kv_memory="448K", host_memory="400K", **FORCED)
    live.torn = True
    yield live
    live.stop()


@pytest.fixture(scope="module")
def chain(model):
    """What paced workers must say."""
    return Chain.of(model, 320, 8192, (0, *ENDS), 0.0)


def exact(each, reply, reference):
    """Token by token and hash by hash what one engine says."""
    each.check(reply, reference)
    assert reply.hashes == reference.hashes(each.prompt, each.sampling)


def computing(live):
    return live.metric("prefill-0", "baton_requests", phase="prefill", state="running") > 0


def test_a_short_prompt_overtakes_a_long_one_in_the_middle_of_its_step(paced, chain):
    """It is one step of a quarter of a second."""
    short = case(20, 3, 2, forever=True)

    async def run():
        async with Client(paced.gateway) as client:
            order: list[str] = []

            async def ask(name, each):
                reply = Reply()
                async for response in client.responses(each.request, reply):
                    if not reply.tokens:
                        order.append(name)
                    reply.take(response)
                return reply

            long = asyncio.create_task(ask("long", LONG))
            await asyncio.to_thread(until, lambda: computing(paced), "its prompt is being computed")
            return order, await ask("short", short), await long

    for _ in range(5):  # a busy machine may be too late for the step
        before = paced.total("baton_prefill_suspensions")
        order, reply, longs = asyncio.run(run())
        exact(short, reply, chain)
        exact(LONG, longs, chain)
        if paced.total("baton_prefill_suspensions") > before:
            break
    assert paced.total("baton_prefill_suspensions") == before + 1
    assert order == ["short", "long"]
    paced.wait_empty()


def test_rows_that_are_swapped_say_the_same(paced, chain):
    async def run():
        async with Client(paced.gateway) as client:
            return await together(*(client.generate(each.request) for each in CROWD))

    for each, reply in zip(CROWD, asyncio.run(run()), strict=True):
        exact(each, reply, chain)
    assert paced.total("baton_rows_retired", how="swapped") > 0
    paced.wait_empty()
    assert paced.metric("decode-0", "baton_host_pages", what="used") == 0
    assert paced.metric("decode-0", "baton_host_pages", what="all") == 100


def test_clients_that_leave_while_rows_are_swapped_and_steps_suspended_leave_nothing(paced):
    async def run():
        async with Client(paced.gateway) as client:
            dice = random.Random(1)

            async def leave(each, tokens):
                reply = Reply()
                async for response in client.responses(each.request, reply):
                    reply.take(response)
                    if len(reply.tokens) > tokens:
                        break

            await together(*(leave(each, dice.randrange(50)) for each in CROWD))
            going = [asyncio.create_task(client.generate(each.request)) for each in (LONG, *CROWD[:3])]
            await asyncio.sleep(0.1)
            for task in going:
                task.cancel()
            await asyncio.gather(*going, return_exceptions=True)

    asyncio.run(run())
    paced.wait_empty()


@pytest.mark.slow
def test_the_models_engine_says_the_same_to_the_bit(launch, model):
    """200 requests in exact mode, forty at a time, prompts of 900 tokens among them."""
    live = launch(
        "forced-exact", model, exact=True, dtype="float32", kv_memory="1M", host_memory="800K", **FORCED
    )  # fmt: skip
    live.torn = True
    reference, dice = Reference(model, dtype="float32", exact=True), random.Random(7)
    cases = [
        case(dice.choice([5, 30, 30, 80, 900]), dice.randrange(1, 80), n, forever=True, **SAMPLINGS[n % 3])
        for n in range(200)
    ]

    async def run():
        async with Client(live.gateway) as client:
            for first in range(0, 200, 40):
                yield await together(*(client.generate(each.request) for each in cases[first : first + 40]))

    async def check():
        left = iter(cases)
        async for replies in run():
            for reply in replies:
                exact(next(left), reply, reference)

    try:
        asyncio.run(check())
        assert live.total("baton_rows_retired", how="swapped") > 0
        assert live.total("baton_prefill_suspensions") > 0
    finally:
        live.stop()
