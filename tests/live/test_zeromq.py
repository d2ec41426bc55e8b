"""The other transport, where it is asked for, and nowhere else."""

from __future__ import annotations

import asyncio

from tests.live.asks import case
from tests.live.cluster import Client, together

CASES = [case(1 + 60 * n, 30, n, temperature=0.4 * (n % 2), seed=n) for n in range(8)]


def test_the_same_tokens_come_over_zeromq(launch, model, reference):
    live = launch("zeromq", model, dtype="float32", transport="zeromq")
    try:

        async def run():
            async with Client(live.gateway) as client:
                return await together(*(client.generate(each.request) for each in CASES))

        for each, reply in zip(CASES, asyncio.run(run()), strict=True):
            each.check(reply, reference)
            pulls = [stage.detail["transport"] for stage in reply.last.stages if stage.name == "pull"]
            assert all(transport.startswith("zeromq") for transport in pulls)
        assert live.total("baton_pulled_bytes") > 0
        assert transports(live) == {"zeromq"}
    finally:
        live.stop()


def test_nothing_falls_to_it_silently(live):
    assert transports(live) == {"zeromq" if live.deployment.transport_reason else "ucx"}


def transports(live):
    """The first word of what every lane says of itself."""
    keys = [key for each in live.workers for key in live.metrics(each.name)]
    found = [dict(labels)["transport"] for name, labels in keys if name == "baton_lane_latency_seconds"]
    return {text.partition(":")[0] for text in found}
