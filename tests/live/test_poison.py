"""A request that workers crash with is refused after three crashes; nobody else is, and nobody who was only stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from core.sampling import Sampling
from tests.engine.chain import Chain
from tests.live.asks import ENDS, Case, case, prompt
from tests.live.cluster import Client, Live, Reply, ask, together
from tests.transfer.faults import Rule

CURSED = 300
"""The first token of those that nobody survives; other prompts have smaller ones."""
ALWAYS = 99


@pytest.fixture(scope="module")
def crashing(launch, model, tmp_path_factory):
    """One prefill and two decode paced workers whose steps obey rules."""
    rules = tmp_path_factory.mktemp("faults") / "rules"
    live = launch(
        "poison", model, faults=rules, prefill=1, decode=2, engine="paced", pace=2.0, hash_logits=True, chunk_tokens=32
    )
    live.torn = True
    live.fault({})
    yield live
    live.fault({})
    live.stop()


@pytest.fixture(scope="module")
def reference(model):
    """What each token should be."""
    return Chain.of(model, 320, 8192, (0, *ENDS), 0.0)


def cursed(length: int = 40, max_tokens: int = 60) -> Case:
    """A request whose first token is CURSED."""
    tokens = (CURSED, *prompt(length))
    return Case(tokens, Sampling(max_tokens, stop_token_ids=ENDS), ask(tokens, max_tokens, request_id="cursed"))


def told(live: Live) -> list[str]:
    return [line["message"] for line in live.lines() if line["message"].startswith("poisonous")]


@contextlib.asynccontextmanager
async def revived(live: Live, by: int) -> AsyncIterator[None]:
    """Workers that end by that signal are started again."""

    async def watch() -> None:
        while True:
            for name, code in live.deployment.ended().items():
                if code == -by:
                    await asyncio.to_thread(live.died, name, by=by)
                    await asyncio.to_thread(live.revive, name)
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def crowd(live: Live, each: Case, others: list[Case], by: int, after: int) -> tuple[Reply, list[Reply]]:
    """The reply to one that is asked when all others stream, and theirs; then everybody is there again."""

    async def run() -> tuple[Reply, list[Reply]]:
        async with Client(live.gateway) as client, revived(live, by):
            first = Reply()
            stream = client.responses(others[0].request, first)
            rest = asyncio.create_task(together(*(client.generate(other.request) for other in others[1:])))
            while len(first.tokens) < after:
                first.take(await anext(stream))
            asked = asyncio.create_task(client.generate(each.request))
            async for response in stream:
                first.take(response)
            return await asked, [first, *await rest]

    replies = asyncio.run(run())
    live.wait_ready()
    return replies


def test_what_crashes_a_worker_three_times_is_refused_and_nobody_else_is(crashing, reference):
    crashing.fault({name: [Rule(f"step {CURSED}", "abort", 1, ALWAYS)] for name in ("decode-0", "decode-1")})
    others = [case(20 + 11 * n, 150 + 10 * n, n, forever=True) for n in range(6)]
    reply, replies = crowd(crashing, cursed(), others, signal.SIGABRT, 20)
    for other, got in zip(others, replies, strict=True):
        other.check(got, reference)
        assert got.hashes == reference.hashes(other.prompt, other.sampling)
    assert reply.code == "INTERNAL"
    assert reply.details.startswith("poisonous: present at 3 crashes, the last alone (decode-")
    assert len(crashing.acted()) == 3, "three crashes, and no more"
    assert len(told(crashing)) == 1
    asked = [line for line in crashing.lines() if line["message"] in told(crashing)]
    assert [line["request"] for line in asked] == ["cursed"]
    later = [case(30 + n, 40, 50 + n, forever=True) for n in range(4)]

    async def run() -> list[Reply]:
        async with Client(crashing.gateway) as client:
            return await together(*(client.generate(each.request) for each in later))

    for each, got in zip(later, asyncio.run(run()), strict=True):
        each.check(got, reference)
        assert got.last.attempts == 1


def test_what_raises_in_three_steps_is_refused_and_workers_go_on(crashing, reference):
    names = ("prefill-0", "decode-0", "decode-1")
    crashing.expected.append("is cursed")
    crashing.fault({name: [Rule(f"step {CURSED}", "raise", 1, ALWAYS)] for name in names})
    others = [case(25 + 9 * n, 120, 20 + n, forever=True) for n in range(4)]
    reply, replies = crowd(crashing, cursed(), others, signal.SIGABRT, 10)
    for other, got in zip(others, replies, strict=True):
        other.check(got, reference)
    assert (reply.code, reply.details.partition("(")[0]) == (
        "INTERNAL",
        "poisonous: present at 3 crashes, the last alone ",
    )
    assert len(crashing.acted()) == 3


@pytest.mark.slow
def test_workers_that_an_operator_kills_are_nobodys_fault(crashing, reference):
    """Five times a worker is killed from outside whenever it steps one request, which then ends as it should."""
    names = ("decode-0", "decode-1")
    before = len(told(crashing))
    each = replace(cursed(max_tokens=30), sampling=Sampling(30, stop_token_ids=(), ignore_eos=True))
    each = replace(each, request=ask(each.prompt, 30, ignore_eos=True))
    others = [case(25 + 9 * n, 200, 30 + n, forever=True) for n in range(3)]
    crashing.fault({name: [Rule(f"step {CURSED}", "kill")] for name in names})
    kills = 0

    def count() -> None:
        """Rules of a new life count anew: enough is enough."""
        nonlocal kills
        kills = len(crashing.acted())

    async def enough() -> None:
        while kills < 4:
            await asyncio.to_thread(count)
            await asyncio.sleep(0.02)
        crashing.fault({})

    async def run() -> list[Reply]:
        async with Client(crashing.gateway) as client, revived(crashing, signal.SIGKILL):
            ending = asyncio.create_task(enough())
            replies = await together(*(client.generate(one.request) for one in (each, *others)))
            await ending
            return replies

    replies = asyncio.run(run())
    for one, got in zip((each, *others), replies, strict=True):
        one.check(got, reference)
    assert kills >= 4, "more often than anybody survives who is suspected"
    assert len(told(crashing)) == before
    crashing.wait_ready()
