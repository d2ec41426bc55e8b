"""A prompt of 32,000 tokens crosses between processes whole."""

from __future__ import annotations

import asyncio

import pytest

from tests.checkpoints import make_llama
from tests.live.asks import case
from tests.live.cluster import Client, Reference

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


def check(launch, model, *, exact):
    """One prefill and one decode worker give what one engine gives, and every page of the prompt crossed once."""
    settings = {"exact": exact, "hash_logits": exact, "dtype": "float32", "page_tokens": 64, "chunk_tokens": 512}
    live = launch(f"long-{exact}", model, kv_memory=ARENA, **settings)
    try:

        async def run():
            async with Client(live.gateway) as client:
                long = asyncio.create_task(client.generate(LONG.request))
                short = await client.generate(SHORT.request)
                return await long, short

        long, short = asyncio.run(run())
        reference = Reference(model, dtype="float32", exact=exact, kv_memory=40 * 2**20, page_tokens=64)
        SHORT.check(short, reference)
        LONG.check(long, reference)
        if exact:
            assert long.hashes == reference.hashes(LONG.prompt, LONG.sampling)
        stages = {stage.name: stage for stage in long.last.stages}
        assert int(stages["pull"].detail["nbytes"]) == TOKENS // 64 * reference.engine.kv.page_nbytes
        assert int(stages["prefill"].detail["chunks"]) >= TOKENS // 512
    finally:
        live.stop()


def test_a_prompt_of_32000_tokens_gives_what_one_engine_gives(launch, long_model):
    check(launch, long_model, exact=False)


@pytest.mark.slow
def test_a_prompt_of_32000_tokens_gives_the_same_bits(launch, long_model):
    check(launch, long_model, exact=True)
