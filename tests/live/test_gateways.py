"""Several gateways share all workers; what dies with one is its own requests."""

from __future__ import annotations

import asyncio
import signal
import time

from tests.live.asks import case
from tests.live.cluster import LEASE_S, MARGIN_S, Client, together

ITS_OWN = [case(30 + n, 3500, n, forever=True) for n in range(10)]
OTHERS = [case(20 + 9 * n, 150 + n, n, forever=True) for n in range(12)]


def test_a_killed_gateway_takes_only_its_own_requests_along(live, reference):
    """One of its requests fills the arena; ten would do so for long, if nobody cancelled them."""
    dead, alive = "gateway-1", "gateway-0"
    addresses = {name: live.deployment.running[name].address for name in (dead, alive)}

    async def run():
        async with Client(addresses[dead]) as lost, Client(addresses[alive]) as kept:
            doomed = [asyncio.create_task(lost.generate(each.request)) for each in ITS_OWN]
            others = asyncio.create_task(together(*(kept.generate(each.request) for each in OTHERS)))
            await asyncio.sleep(0.3)
            assert live.held()
            live.kill(dead, signal.SIGKILL)
            at = time.monotonic()
            failed = await asyncio.gather(*doomed)
            told_s = time.monotonic() - at
            return failed, told_s, await others

    live.torn = True
    failed, told_s, replies = asyncio.run(run())
    assert {reply.code for reply in failed} == {"UNAVAILABLE"}
    assert told_s < 1
    for each, reply in zip(OTHERS, replies, strict=True):
        each.check(reply, reference)
        assert reply.last.attempts == 1
    live.wait_empty(LEASE_S + MARGIN_S)
    live.restart(dead)

    async def again():
        async with Client(addresses[dead]) as back:
            return await back.generate(OTHERS[0].request)

    OTHERS[0].check(asyncio.run(again()), reference)


def test_both_gateways_serve_with_all_workers(live, reference):
    cases = [case(40 + n, 40, n) for n in range(16)]
    before = {name: live.metric(name, "baton_prefill_tokens") for name in ("prefill-0", "prefill-1")}

    async def run():
        first, second = live.deployment.gateways
        async with Client(first) as one, Client(second) as two:
            return await together(*((one, two)[n % 2].generate(each.request) for n, each in enumerate(cases)))

    for each, reply in zip(cases, asyncio.run(run()), strict=True):
        each.check(reply, reference)
    for name, count in before.items():
        assert live.metric(name, "baton_prefill_tokens") > count
