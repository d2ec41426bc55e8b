"""One worker that does both phases needs nobody else."""

from __future__ import annotations

import asyncio

import pytest

from tests.live.asks import case
from tests.live.cluster import Client, ask, together


@pytest.fixture(scope="module")
def mixed(launch, model):
    """One gateway and one mixed worker; requests may take 4 s."""
    live = launch("mixed", model, mixed=1, prefill=0, decode=0, dtype="float32", timeout_s=4.0)
    yield live
    live.stop()


def test_a_lone_mixed_worker_serves(mixed, reference):
    cases = [case(1 + 23 * n, 10 + 3 * n, n, temperature=0.5 * (n % 3), seed=n) for n in range(20)]

    async def run():
        async with Client(mixed.gateway) as client:
            return await together(*(client.generate(each.request) for each in cases))

    for each, reply in zip(cases, asyncio.run(run()), strict=True):
        each.check(reply, reference)
        assert reply.last.attempts == 1


def test_its_pages_cross_its_own_memory_and_are_verified(mixed, reference):
    each = case(333, 5, 1, forever=True)

    async def run():
        async with Client(mixed.gateway) as client:
            return await client.generate(each.request)

    reply = asyncio.run(run())
    each.check(reply, reference)
    (pull,) = (stage for stage in reply.last.stages if stage.name == "pull")
    assert int(pull.detail["nbytes"]) == reference.engine.kv.pages_for(333) * reference.engine.kv.page_nbytes
    assert pull.detail["from"] == pull.worker == "mixed-0"


def test_a_request_without_a_deadline_ends_at_the_deployments(mixed, reference):
    mixed.torn = True
    slow, each = case(20, 3000, 2, forever=True), case(30, 10, 3)

    async def run():
        async with Client(mixed.gateway) as client:
            crowd = [client.generate(ask(slow.prompt, 3000, ignore_eos=True)) for _ in range(12)]
            late = await together(*crowd)
            return late, await client.generate(each.request)

    late, reply = asyncio.run(run())
    each.check(reply, reference)
    assert {each.code for each in late} <= {"OK", "DEADLINE_EXCEEDED"}
    failed = [each for each in late if each.code == "DEADLINE_EXCEEDED"]
    assert failed
    assert all("not done within 4 s" in each.details or "ended while" in each.details for each in failed)
    mixed.wait_empty(5.0)
