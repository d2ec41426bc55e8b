"""The coordinator is not on the request path: it may die, come back and stand still while streams run."""

from __future__ import annotations

import asyncio
import re
import signal
from contextlib import asynccontextmanager

import pytest

from tests.engine.chain import Chain
from tests.live.asks import ENDS, case
from tests.live.cluster import Client, together, until
from tests.transfer.faults import Rule

STREAMS = [case(30 + 50 * n, 700, n, forever=True) for n in range(4)]
NEW = [case(20 + 40 * n, 30, n, forever=True) for n in range(6)]


@pytest.fixture(scope="module")
def apart(launch, model, tmp_path_factory):
    """Two gateways, one prefill and one decode worker: who loses one of these has nobody else."""
    faults = tmp_path_factory.mktemp("faults") / "rules"
    live = launch("coordinator", model, faults=faults, gateways=2, kv_memory="8M", engine="paced", pace=0.5)
    yield live
    live.stop()


@pytest.fixture(scope="module")
def reference(model):
    """What `apart` must generate."""
    return Chain.of(model, 320, 8192, (0, *ENDS))


@asynccontextmanager
async def traffic(live, reference):
    """Clients of both gateways, while streams run in four lines; all streams are right, and nobody is lost."""
    over, before = asyncio.Event(), len(live.lines())

    async def line(client, each):
        replies = []
        while not over.is_set():
            replies.append(await client.generate(each.request))
        return replies

    first, second = live.deployment.gateways
    async with Client(first) as one, Client(second) as two:
        lines = [asyncio.create_task(line((one, two)[n % 2], each)) for n, each in enumerate(STREAMS)]
        await asyncio.to_thread(until, lambda: sum(live.phases().values()) == len(STREAMS), "all streams run")
        yield one, two
        over.set()
        for each, replies in zip(STREAMS, await asyncio.gather(*lines), strict=True):
            check([each] * len(replies), replies, reference)
    assert not [line["message"] for line in live.lines()[before:] if re.search(r"\blost\b", line["message"])]


async def ask_all(clients, reference):
    """New requests at both gateways are served."""
    check(NEW, await together(*(clients[n % 2].generate(each.request) for n, each in enumerate(NEW))), reference)


def check(cases, replies, reference):
    """Each is what its tokens imply, at the first attempt."""
    for each, reply in zip(cases, replies, strict=True):
        each.check(reply, reference)
        assert reply.last.attempts == 1


def test_streams_and_new_requests_go_on_while_the_coordinator_is_killed_and_comes_back(apart, reference):
    async def run():
        async with traffic(apart, reference) as clients:
            apart.kill("coordinator", signal.SIGKILL)
            await ask_all(clients, reference)
            await asyncio.to_thread(apart.restart, "coordinator")
            await ask_all(clients, reference)

    asyncio.run(run())


def test_streams_and_new_requests_go_on_while_the_coordinator_stands_still(apart, reference):
    """For longer than the leases that it gives."""

    async def run():
        async with traffic(apart, reference) as clients:
            apart.kill("coordinator", signal.SIGSTOP)
            over = asyncio.create_task(asyncio.sleep(5))
            try:
                while not over.done():
                    await ask_all(clients, reference)
            finally:
                apart.kill("coordinator", signal.SIGCONT)
            await asyncio.to_thread(apart.wait_ready)
            await ask_all(clients, reference)

    asyncio.run(run())


def test_workers_that_get_ready_again_meanwhile_are_used_again(apart, reference):
    """Their only lane breaks while the coordinator stands still: they tell the gateways themselves, both times."""
    before, gateways = len(apart.lines()), {"gateway-0", "gateway-1"}

    def said(what: str) -> set[str]:
        return {line["worker"] for line in apart.lines()[before:] if line["message"].startswith(what)} & gateways

    async def run():
        async with Client(apart.gateway) as client:
            await ask_all((client, client), reference)

    apart.kill("coordinator", signal.SIGSTOP)
    try:
        apart.fault({"decode-0": (Rule("read", "break", nth=1),)})
        each = case(30, 40, 90, forever=True)
        asyncio.run(one(apart, each))
        until(lambda: said("not ready: ") == gateways, "both hear that nobody is ready")
        until(lambda: said("ready") == gateways, "and that they are again")
        asyncio.run(run())
    finally:
        apart.kill("coordinator", signal.SIGCONT)
        apart.fault({})
    apart.wait_ready()


async def one(live, each):
    """Ask, whatever comes of it."""
    async with Client(live.gateway) as client:
        return await client.generate(each.request, 30.0)


def test_a_worker_that_starts_after_that_is_found(apart, reference):
    """All processes watch the coordinator that came back."""
    apart.kill("prefill-0", signal.SIGKILL)
    apart.restart("prefill-0")

    async def run():
        first, second = apart.deployment.gateways
        async with Client(first) as one, Client(second) as two:
            await ask_all((one, two), reference)

    asyncio.run(run())
