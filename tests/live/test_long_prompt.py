"""A prompt of 32,000 tokens crosses between processes whole, and an answer as long is dropped with its gateway."""

from __future__ import annotations

import asyncio
import signal

import grpc
import pytest

from core.config import nbytes
from protos.baton.v1 import inference_pb2
from tests.checkpoints import make_llama
from tests.live.asks import case
from tests.live.cluster import LEASE_S, MARGIN_S, Client, Reference, Reply

TOKENS = 32_000
LONG = case(TOKENS, 12, forever=True)
SHORT = case(40, 400, forever=True)
ARENA = "40M"
"""Room for one such prompt and a little."""


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    """Two layers, one KV head, a context of 33,000 tokens."""
    folder = tmp_path_factory.mktemp("model") / "long"
    return make_llama(folder, vocab=320, heads=2, kv_heads=1, hidden=32, context=33_000, tokenizer=True)


@pytest.fixture(scope="module", params=["fast", pytest.param("exact", marks=pytest.mark.slow)])
def pair(request, launch, long_model):
    """Two gateways, one prefill and one decode worker, and one engine of the same kind."""
    exact = request.param == "exact"
    settings = {"exact": exact, "dtype": "float32", "page_tokens": 64}
    live = launch(
        f"long-{request.param}",
        long_model,
        gateways=2,
        kv_memory=ARENA,
        chunk_tokens=512,
        hash_logits=exact,
        **settings,
    )
    yield live, Reference(long_model, kv_memory=nbytes(ARENA), **settings)
    live.stop()


def test_a_prompt_of_32000_tokens_gives_what_one_engine_gives(pair):
    """Every page of it crosses once, and a short request beside it is served."""
    live, reference = pair

    async def run():
        async with Client(live.gateway) as client:
            long = asyncio.create_task(client.generate(LONG.request, 500.0))
            short = await client.generate(SHORT.request)
            return await long, short

    long, short = asyncio.run(run())
    SHORT.check(short, reference)
    LONG.check(long, reference)
    if reference.engine.exact:
        assert long.hashes == reference.hashes(LONG.prompt, LONG.sampling)
    stages = {stage.name: stage for stage in long.last.stages}
    assert int(stages["pull"].detail["nbytes"]) == TOKENS // 64 * reference.engine.kv.page_nbytes


def test_an_answer_of_32000_tokens_is_not_computed_for_a_dead_gateway(pair):
    """It would take several times the lease."""
    live, _ = pair
    live.torn = True
    running = {"phase": "decode", "state": "running"}

    async def run():
        async with Client(live.deployment.gateways[1]) as client:
            reply = Reply()
            stream = client.responses(case(40, TOKENS, forever=True).request, reply)
            while len(reply.tokens) < 10:
                reply.take(await anext(stream))
            live.kill("gateway-1", signal.SIGKILL)
            assert live.metric("decode-0", "baton_requests", **running) == 1
            with pytest.raises(grpc.aio.AioRpcError):
                await drain(stream, reply)

    asyncio.run(run())
    assert live.held()
    live.wait_empty(LEASE_S + MARGIN_S)


async def drain(stream, reply):
    async for response in stream:
        reply.take(response)


def test_a_chat_needs_a_template(pair):
    """This model has none."""
    live, _ = pair
    request = inference_pb2.GenerateRequest(max_tokens=3)
    request.chat.messages.append(inference_pb2.ChatMessage(role="user", content="Hello?"))

    async def run():
        async with Client(live.gateway) as client:
            return await client.generate(request)

    reply = asyncio.run(run())
    assert (reply.code, reply.details) == ("FAILED_PRECONDITION", "chat: tiny has no chat template")
