"""Clients that leave at any time: what they held is free, and nobody else notices.

On the paced engine: a page that is used again while its former owner still reads or writes it would be a wrong token.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

import grpc
import pytest

from protos.baton.v1 import inference_pb2
from tests.engine.chain import Chain
from tests.live.asks import ENDS, case
from tests.live.cluster import Client, Reply

CASES = [case(1 + 41 * n, 200, n, forever=True) for n in range(12)]


@pytest.fixture(scope="module")
def live(launch, model):
    """Two gateways, two prefill workers and one decode worker."""
    started = launch("cancel", model, prefill=2, gateways=2, engine="paced", pace=0.5)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def reference(model):
    """What `live` must generate."""
    return Chain.of(model, 320, 8192, (0, *ENDS))


async def leaves(client: Client, number: int, how: str, after_s: float, after_tokens: int | None) -> Reply:
    """One client that leaves after a time, or right after its nth token; what it received until then."""
    reply = Reply()
    name = f"{how}-{number}"
    request = inference_pb2.GenerateRequest()
    request.CopyFrom(CASES[number % len(CASES)].request)
    request.request_id = name
    call = client.stub.Generate(request, timeout=60.0)

    async def leave():
        if how == "drop":
            call.cancel()
        else:
            await client.stub.Abort(inference_pb2.AbortRequest(request_id=name))

    async def timer():
        await asyncio.sleep(after_s)
        await leave()

    timing = asyncio.create_task(timer()) if after_tokens is None else None
    with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
        async for response in call:
            reply.take(response)
            if after_tokens is not None and len(reply.tokens) >= after_tokens and reply.end is None:
                after_tokens = None
                await leave()
    if timing is not None:
        await timing
    reply.code = (await call.code()).name
    return reply


@pytest.mark.parametrize("how", ["drop", "abort"])
def test_100_clients_that_leave_at_random_times_leave_nothing_behind(live, reference, how):
    """Most in the first moments, where queue, offer, chunks and hand-off are; some at an exact token."""
    rng = random.Random(how)
    plans = [(rng.choice((0.01, 0.05, 0.3, 1.5)) * rng.random(), rng.choice((None, None, 1, 2, 9))) for _ in range(100)]

    async def run():
        async with Client(live.gateway) as client, Client(live.deployment.gateways[1]) as other:
            tasks = [leaves((client, other)[n % 2], n, how, *plan) for n, plan in enumerate(plans)]
            beside = CASES[0].request
            *replies, undisturbed = await asyncio.gather(*tasks, client.generate(beside))
            return replies, undisturbed

    live.torn = True
    replies, undisturbed = asyncio.run(run())
    assert live.wait_empty(5.0) < 5
    CASES[0].check(undisturbed, reference)
    ends = set()
    for number, reply in enumerate(replies):
        each = CASES[number % len(CASES)]
        assert reply.tokens == reference.tokens(each.prompt, each.sampling)[: len(reply.tokens)]
        ends.add((reply.code, reply.end.finish_reason if reply.end else ""))
    assert ends - {("OK", "length")} == ({("CANCELLED", "")} if how == "drop" else {("OK", "abort")})

    async def next_one():
        async with Client(live.gateway) as client:
            return await client.generate(CASES[5].request)

    CASES[5].check(asyncio.run(next_one()), reference)


@pytest.mark.parametrize("how", ["drop", "abort"])
def test_what_a_client_left_is_not_computed(live, how):
    """One of these requests fills the arena; all of them would take ten times the wait."""
    live.torn = True

    async def run():
        async with Client(live.gateway) as client:
            calls, reads = [], []
            for number in range(10):
                request = case(40, 3500, number, forever=True, request_id=f"{how}-long-{number}").request
                calls.append(client.stub.Generate(request, timeout=60.0))
            reads = [asyncio.create_task(call.read()) for call in calls]
            await asyncio.wait(reads)
            if how == "abort":
                names = [inference_pb2.AbortRequest(request_id=f"{how}-long-{number}") for number in range(10)]
                assert all([(await client.stub.Abort(name)).aborted for name in names])
            for call in calls:
                call.cancel()

    asyncio.run(run())
    live.wait_empty(2.0)


def test_an_abort_says_what_was_generated_and_knows_no_stranger(live, reference):
    each = case(40, 2000, 1, forever=True, request_id="long")

    async def run():
        async with Client(live.gateway) as client:
            reply = Reply()
            stream = client.responses(each.request, reply)
            while len(reply.tokens) < 20:
                reply.take(await anext(stream))
            abort = inference_pb2.AbortRequest
            known = await client.stub.Abort(abort(request_id="long"))
            stranger = await client.stub.Abort(abort(request_id="nobody"))
            async for response in stream:
                reply.take(response)
            late = await client.stub.Abort(abort(request_id="long"))
            return reply, known.aborted, stranger.aborted, late.aborted

    live.torn = True
    reply, *aborted = asyncio.run(run())
    assert aborted == [True, False, False]
    assert reply.last.finish_reason == "abort"
    assert reply.last.completion_tokens == len(reply.tokens)
    assert reply.tokens == reference.tokens(each.prompt, each.sampling)[: len(reply.tokens)]
    live.wait_empty(5.0)
