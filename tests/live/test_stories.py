"""The named stories of hand-offs and moves (tests/transfer/stories.py), told by a deployment's own processes.

A worker kills itself at an event of the protocol, by rule (tests/live/faulty.py): nothing that happens after it in the
worker's own order is done. The prompt has four chunks, so the points between the first announcement and the last are
in the middle of its computation, with pages announced, read and verified.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from core.kv import KvShape
from tests.engine.chain import Chain
from tests.live.asks import ENDS, Case, case
from tests.live.cluster import Client, Live, Reply, together, until
from tests.transfer.faults import write
from tests.transfer.stories import FAULTS, GIVERS, OTHER_SINK, SINK, SINKS, SOURCES, TAKERS, Story

PAGE_TOKENS, ARENA = 16, 2**18
PAGES = KvShape(layers=2, kv_heads=2, head_dim=16, page_tokens=PAGE_TOKENS, dtype="bfloat16")
EDGE = int(ARENA / PAGES.page_nbytes * 0.95) * PAGE_TOKENS - 200
"""Steps: what an empty worker is free for, but 200."""


@pytest.fixture(scope="module")
def reference(model):
    """What every client must receive."""
    return Chain.of(model, 320, 8192, (0, *ENDS))


@pytest.fixture(scope="module")
def moving(launch, model, tmp_path_factory) -> Iterator[Live]:
    """As `faulty`; a row of two hundred tokens is given away."""
    settings = {"prefill": 2, "decode": 2, "engine": "paced", "hash_logits": True, "chunk_tokens": 32, "pace": 2.0}
    bounds = {"migrate": True, "migrate_below_steps": EDGE, "migrate_above_steps": EDGE}
    rules = tmp_path_factory.mktemp("moves") / "rules"
    started = launch("moves", model, faults=rules, kv_memory=str(ARENA), prefix_cache=False, **settings, **bounds)
    started.torn = True
    yield started
    write(rules, {})
    started.stop()


def exact(each: Case, reply: Reply, reference: Chain) -> None:
    """Token by token what the definition says, and drawn from what it says."""
    each.check(reply, reference)
    assert reply.hashes == reference.hashes(each.prompt, each.sampling)


def acts(story: Story) -> list[str]:
    """What its rules say when they act."""
    return [f"{name}: {rule.do} at {rule.at}" for name, rules in story.rules.items() for rule in rules]


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[str(story) for story in FAULTS])
def test_a_hand_off_with_a_fault(faulty, reference, number):
    story, before = FAULTS[number], faulty.total("baton_digest_mismatches")
    length = story.pages * PAGE_TOKENS - (story.pages > 1)
    each = case(length, 30, 3000 + number, forever=True)

    async def run() -> Reply:
        async with Client(faulty.gateway) as client:
            return await client.generate(each.request, story.timeout_s)

    faulty.fault(story.rules)
    try:
        reply = asyncio.run(run())
        acted = faulty.acted()
    finally:
        faulty.fault({})
    exact(each, reply, reference)
    assert story.attempts[0] <= reply.last.attempts <= story.attempts[1], acted
    assert faulty.total("baton_digest_mismatches") >= before + story.mismatches
    assert not story.every or {*acts(story)} <= {*acted}, acted
    faulty.wait_empty()


def killed(live: Live, reference: Chain, story: Story, number: int, most: int) -> None:
    """Requests until one of them meets the fault; two streams go on beside them."""
    beside = [case(40 + n, 100, 10 * number + n, forever=True) for n in range(2)]
    targets = [case(8 * PAGE_TOKENS - 1, most, 10 * number + n, forever=True) for n in range(8)]
    kill = next(act for act in acts(story) if ": kill at " in act)

    async def run() -> list[Reply]:
        async with Client(live.gateway) as client:
            streaming = asyncio.create_task(together(*(client.generate(each.request) for each in beside)))
            await asyncio.sleep(0.1)
            live.fault(story.rules)
            replies: list[Reply] = []
            while kill not in live.acted() and len(replies) < len(targets):
                replies.append(await client.generate(targets[len(replies)].request))
            return [*await streaming, *replies]

    try:
        replies = asyncio.run(run())
        where = [[stage.worker for stage in reply.last.stages if stage.name == "pull"] for reply in replies]
        assert kill in live.acted(), where
        live.died(story.dies)
        for each, reply in zip([*beside, *targets], replies, strict=False):
            exact(each, reply, reference)
    finally:
        live.fault({})


def again(live: Live, *names: str) -> None:
    """Those that died are back for the next points."""
    live.restart(*(name for name in names if live.deployment.running[name].process.poll() is not None))
    live.wait_empty()


@pytest.mark.parametrize(
    "number", [n if n == 4 else pytest.param(n, marks=pytest.mark.slow) for n in range(len(SOURCES))]
)
def test_a_killed_source_and_a_killed_sink(faulty, reference, number):
    """One after the other."""
    source, sink = SOURCES[number], SINKS[number]
    try:
        killed(faulty, reference, source, 1000 + number, 20)
        killed(faulty, reference, sink, 2000 + number, 20)
    finally:
        again(faulty, source.dies, sink.dies)


@pytest.mark.parametrize(
    ("story", "number"),
    [
        pytest.param(story, n, id=f"{who}: {story}", marks=() if n in (105, 204) else pytest.mark.slow)
        for who, first, stories in (("giver", 100, GIVERS), ("taker", 200, TAKERS))
        for n, story in enumerate(stories, first)
    ],
)
def test_a_killed_end_of_a_move(moving, reference, story, number):
    try:
        until(
            lambda: all(met(moving, *pair) for pair in ((SINK, OTHER_SINK), (OTHER_SINK, SINK))), "their lanes are up"
        )
        killed(moving, reference, story, 3000 + number, 250)
    finally:
        again(moving, story.dies)


def met(live: Live, name: str, other: str) -> bool:
    """Whether a worker has measured its lane from another."""
    found = live.metrics(name)
    return any(key == "baton_lane_latency_seconds" and dict(labels)["source"] == other for key, labels in found)
