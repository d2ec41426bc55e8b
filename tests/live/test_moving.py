"""Running rows move between the decode workers of a real deployment, and clients see nothing of it but the stages.

Its bounds of freeness are such that a row of some 200 tokens makes its worker scarce, and leaves the other ample: so
rows go to and fro, and whatever is done to the deployment meets rows in all states of a move.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from typing import Any

import pytest

from core.kv import KvShape
from core.sampling import Sampling
from tests.live.asks import case, prompt
from tests.live.cluster import Client, Reference, Reply, ask, together, until
from tests.live.test_sampling import Case, told

PAGES = KvShape(layers=2, kv_heads=2, head_dim=16, page_tokens=16, dtype="float32")
ARENA = 4 * 2**20
EDGE = int(ARENA / PAGES.page_nbytes * 0.95) * PAGES.page_tokens - 200
"""Steps: what an empty worker is free for, but 200."""
DECODES = ("decode-0", "decode-1")
ALONE = case(150, 250, 99, forever=True, temperature=0.8, seed=9)
LIKELY: dict[str, Any] = {
    "logprobs": 3,
    "prompt_logprobs": 2,
    "presence_penalty": 0.5,
    "temperature": 0.7,
    "top_k": 40,
    "seed": 5,
}
"""Options of which a row that moves must take something along."""
STREAMS = [
    case(40 + 60 * n, 220 + 20 * n, 100 + n, forever=True, temperature=0.8, seed=n, repetition_penalty=1.1)
    for n in range(4)
]


@pytest.fixture(scope="module")
def reference(model):
    """What the deployment must generate, to the bit."""
    return Reference(model, dtype="float32", exact=True)


@pytest.fixture(scope="module")
def started(launch, model):
    """One prefill and two decode workers in exact mode."""
    bounds = {"migrate_below_steps": EDGE, "migrate_above_steps": EDGE}
    live = launch(
        "moving", model, decode=2, dtype="float32", exact=True, hash_logits=True, kv_memory=str(ARENA),
        migrate=True, **bounds,
    )  # fmt: skip
    live.torn = True
    yield live
    live.stop()


@pytest.fixture
def pair(started):
    """All of `started`; who ended in the last test has been started again."""
    started.restart(*started.deployment.ended())
    until(lambda: met(started, *DECODES) and met(started, *DECODES[::-1]), "their lanes are up")
    return started


def met(live, name, other):
    """Whether a worker has measured its lane from another."""
    found = live.metrics(name)
    return any(key == "baton_lane_latency_seconds" and dict(labels)["source"] == other for key, labels in found)


def exact(each, reply, reference):
    """Token by token and bit by bit what one engine says."""
    each.check(reply, reference)
    assert reply.hashes == reference.hashes(each.prompt, each.sampling)


def moves(reply):
    """The stages that say that a row moved."""
    return [stage for stage in reply.last.stages if stage.name == "move"]


async def begun(client, each, tokens):
    """A stream of which so many tokens have come, and the reply so far."""
    reply = Reply()
    stream = client.responses(each.request, reply)
    while len(reply.tokens) < tokens:
        reply.take(await anext(stream))
    return stream, reply


async def rest(stream, reply):
    """The whole reply."""
    async for response in stream:
        reply.take(response)
    return reply


def disturbed(live, tokens, disturb):
    """The replies to all streams, of which each has so many tokens when `disturb` is called."""

    async def run():
        async with Client(live.gateway) as client:
            streams = await asyncio.gather(*(begun(client, each, tokens) for each in STREAMS))
            await asyncio.to_thread(disturb)
            return await together(*(rest(*each) for each in streams))

    return asyncio.run(run())


def test_a_row_goes_to_and_fro_and_says_the_same(pair, reference):
    async def run():
        async with Client(pair.gateway) as client:
            return await client.generate(ALONE.request)

    reply = asyncio.run(run())
    exact(ALONE, reply, reference)
    assert reply.last.attempts == 1
    moved = moves(reply)
    assert len(moved) > 2
    here = "decode-0"  # of two idle workers, the first by name is taken
    for stage in moved:
        assert stage.detail["from"] == here
        assert stage.worker != here
        assert int(stage.detail["nbytes"]) >= 12 * PAGES.page_nbytes
        assert 0 < float(stage.detail["pause_s"]) == pytest.approx(stage.seconds, abs=1e-6)
        here = stage.worker
    decoded = [stage for stage in reply.last.stages if stage.name == "decode"]
    assert len(decoded) == len(moved) + 1
    assert sum(int(stage.detail["steps"]) for stage in decoded) == len(reply.tokens) - 1
    pair.wait_empty()


def test_a_row_takes_its_logprobs_and_penalties_along(pair, reference):
    tokens, most = prompt(170, 98), 120
    sampling = Sampling(most, ignore_eos=True, **LIKELY)
    each = Case(tokens, sampling, ask(tokens, most, ignore_eos=True, **LIKELY))

    async def run():
        async with Client(pair.gateway) as client:
            return await told(client, each.request)

    reply = asyncio.run(run())
    each.check(reply, reference)
    assert moves(reply)
    pair.wait_empty()


def test_a_worker_that_ends_gives_its_rows_away(pair, reference):
    replies = disturbed(pair, 10, lambda: pair.kill("decode-0", signal.SIGTERM))
    for each, reply in zip(STREAMS, replies, strict=True):
        exact(each, reply, reference)
        assert reply.last.attempts == 1, "it was computed again"
    assert any(moves(reply)[-1].worker == "decode-1" for reply in replies if moves(reply))
    until(lambda: "decode-0" in pair.deployment.ended(), "it has ended")
    assert pair.deployment.ended()["decode-0"] == 0
    pair.wait_empty()


def test_clients_that_leave_take_their_rows_along(pair):
    async def run():
        async with Client(pair.gateway) as client:
            streams = await asyncio.gather(*(begun(client, each, 60) for each in STREAMS))
            for stream, _ in streams:
                await stream.aclose()
                await asyncio.sleep(0.01)

    asyncio.run(run())
    pair.wait_empty()


def test_the_loss_of_one_end_of_a_move_changes_no_token(pair, reference):
    replies = disturbed(pair, 100, lambda: pair.kill("decode-1", signal.SIGKILL))
    for each, reply in zip(STREAMS, replies, strict=True):
        exact(each, reply, reference)
    pair.wait_empty()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_losses_at_any_time_of_a_move_change_no_token(pair, reference, seed):
    dice = random.Random(seed)
    name, number = dice.choice(DECODES), dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    replies = disturbed(pair, dice.randrange(1, 200), lambda: pair.kill(name, number))
    for each, reply in zip(STREAMS, replies, strict=True):
        exact(each, reply, reference)
        assert number is signal.SIGKILL or reply.last.attempts == 1
    until(lambda: name in pair.deployment.ended(), "it has ended")
    pair.wait_empty()


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODES)
def test_an_end_of_a_move_that_stood_still_changes_no_token(pair, reference, name):
    def stop() -> None:
        pair.kill(name, signal.SIGSTOP)
        time.sleep(4.5)
        pair.kill(name, signal.SIGCONT)

    replies = disturbed(pair, 100, stop)
    for each, reply in zip(STREAMS, replies, strict=True):
        exact(each, reply, reference)
    pair.wait_empty()
    pair.restart()
