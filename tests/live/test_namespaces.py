"""Prefill and decode worker in network namespaces of their own: KV over TCP, on a link that loses packets and is cut.

The workers are paced ones, so a token is drawn from every byte of KV that came over the link, and must be right.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager

import pytest

from tests.checkpoints import make_llama
from tests.engine.chain import Chain
from tests.live.asks import ENDS, case
from tests.live.cluster import Client, Reply, together, until
from tests.live.namespaces import Namespaces, Shape, Unavailable, places

TIMEOUT_S = 30.0
"""Deadline of requests that a cut meets."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """2 KiB of KV a token: a prompt of 400 is 800 kB."""
    folder = tmp_path_factory.mktemp("model") / "wide"
    return make_llama(
        folder,
        layers=4,
        kv_heads=4,
        head_dim=32,
        vocab=320,
        context=8192,
        dtype="bfloat16",
        tokenizer=True,
        eos=list(ENDS),
    )


@pytest.fixture(scope="module")
def reference(model):
    return Chain.of(model, 320, 8192, (0, *ENDS))


@contextmanager
def apart(launch, model, name, *, decode=1, near=(), far=("decode-0",), shape=None):
    """A deployment of which the workers in `far` are behind the link. Nothing of it is left afterwards."""
    try:
        both = Namespaces(shape)
    except Unavailable as error:
        pytest.skip(f"needs network namespaces ({error})")
    with both:
        where = places(("coordinator", "gateway-0", "prefill-0", *near), far, both)
        how = {"env": both.environment(), "places": where}
        options = {"engine": "paced", "pace": 0.0, "kv_memory": "32M", "chunk_tokens": 128}
        live = launch(name, model, how=how, decode=decode, transport="nixl", **options)
        live.torn = True
        try:
            yield live, both
        finally:
            live.stop()


def crowd(count, tokens=40):
    """Prompts of 20 to 460 tokens: 40 kB to 920 kB each."""
    return [
        case(20 + 40 * n, tokens + 3 * n, n, forever=True, temperature=0.7 * (n % 2), seed=n if n % 2 else 0)
        for n in range(count)
    ]


def lanes(live):
    """Transport of each lane, as the worker's metrics name it."""
    return {
        (each.name, dict(labels)["source"]): dict(labels)["transport"]
        for each in live.workers
        for key, labels in live.metrics(each.name)
        if key == "baton_lane_latency_seconds"
    }


def test_streams_over_a_link_that_drops_packets_and_is_cut_for_two_seconds(launch, model, reference):
    with apart(launch, model, "namespaces") as (live, both):
        assert lanes(live) == {("decode-0", "prefill-0"): "ucx: tcp/data emulated"}

        async def lossy(cases):
            async with Client(live.gateway) as client:
                return await together(*(client.generate(each.request) for each in cases))

        cases = crowd(12)
        before, pulled = both.counters(), live.total("baton_pulled_bytes")
        replies = asyncio.run(lossy(cases))
        after = both.counters()
        print("count", before, after, live.total("baton_pulled_bytes"))
        for each, reply in zip(cases, replies, strict=True):
            each.check(reply, reference)
        assert after["drops"] > before["drops"]
        assert live.total("baton_pulled_bytes") - pulled > 12 * 40_000
        live.wait_empty()
