"""Source or sink killed at twenty points of the hand-off: every stream goes on with the tokens that it would have had.

A worker kills itself at an event of the protocol, by rule (tests/live/faulty.py): nothing that happens after it in the
worker's own order is done. The prompt has four chunks, so the points between the first announcement and the last are
in the middle of its computation, with pages announced, read and verified.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from tests.engine.chain import Chain
from tests.live.asks import ENDS, case
from tests.live.cluster import Client, Live, Reply, together
from tests.transfer.faults import Rule

SOURCE, SINK = "prefill-0", "decode-0"
"""Of two idle workers, the first by name is taken."""
SLOW = Rule("read", "delay", times=100, seconds=0.1)


@dataclass(frozen=True)
class Point:
    """Where one side is killed, and what else makes sure that it is there when it is."""

    name: str
    kill: Rule
    other: tuple[Rule, ...] = ()
    own: tuple[Rule, ...] = ()


def at(event: str, nth: int = 1, after_s: float = 0.0) -> Rule:
    """Killed at that event."""
    return Rule(event, "kill", nth, seconds=after_s)


SOURCES = (
    Point("before Reserve", at("send Reserve")),
    Point(
        "after Reserve, before anybody answers",
        at("sent Reserve", after_s=0.01),
        (Rule("hear Reserve", "delay", seconds=0.2),),
    ),
    Point("at Grant", at("hear Grant")),
    Point("before the first Ready", at("send Ready")),
    Point("during the first read", at("sent Ready", after_s=0.03), (SLOW,)),
    Point("before the third Ready", at("send Ready", 3)),
    Point("before the last Ready", at("send last Ready")),
    Point("during the last read", at("sent last Ready", after_s=0.03), (SLOW,)),
    Point("before it knows of Taken", at("hear Taken")),
    Point("after Taken", at("heard Taken")),
)
SINKS = (
    Point("before it knows of Reserve", at("hear Reserve")),
    Point("before Grant", at("send Grant")),
    Point("after Grant", at("sent Grant", after_s=0.005)),
    Point("at the first Ready", at("hear Ready")),
    Point("when the first read is posted", at("read")),
    Point("during the second read", at("read", 2, 0.03), own=(SLOW,)),
    Point("when the third read has come, before its digests", at("done", 3)),
    Point("at the last Ready", at("hear last Ready")),
    Point("before Taken", at("send Taken")),
    Point("after Taken", at("sent Taken", after_s=0.01)),
)


@pytest.fixture(scope="module")
def reference(model):
    """What every client must receive."""
    return Chain.of(model, 320, 8192, (0, *ENDS))


def killed(live: Live, reference: Chain, victim: str, point: Point, number: int) -> None:
    """Requests of four chunks, until one of them meets the fault; two streams go on beside them."""
    beside = [case(40 + n, 100, 10 * number + n, forever=True) for n in range(2)]
    targets = [case(120, 20, 10 * number + n, forever=True) for n in range(8)]
    kill = f"{victim}: kill at {point.kill.at}"

    async def run() -> list[Reply]:
        async with Client(live.gateway) as client:
            streaming = asyncio.create_task(together(*(client.generate(each.request) for each in beside)))
            await asyncio.sleep(0.1)
            names = ("decode-0", "decode-1") if victim == SOURCE else ("prefill-0", "prefill-1")
            live.fault({victim: (point.kill, *point.own), **dict.fromkeys(names, point.other)})
            replies = []
            while kill not in live.acted() and len(replies) < len(targets):
                replies.append(await client.generate(targets[len(replies)].request))
            return [*await streaming, *replies]

    replies = asyncio.run(run())
    where = [[stage.worker for stage in reply.last.stages if stage.name == "pull"] for reply in replies]
    assert kill in live.acted(), where
    live.died(victim)
    for each, reply in zip([*beside, *targets], replies, strict=False):
        each.check(reply, reference)
        assert reply.hashes == reference.hashes(each.prompt, each.sampling)


@pytest.mark.parametrize(
    "number", [n if n in (4, 8) else pytest.param(n, marks=pytest.mark.slow) for n in range(len(SOURCES))]
)
def test_a_killed_source_and_a_killed_sink(faulty, reference, number):
    """One after the other; both are back for the next points."""
    try:
        killed(faulty, reference, SOURCE, SOURCES[number], 1000 + number)
        killed(faulty, reference, SINK, SINKS[number], 2000 + number)
    finally:
        faulty.fault({})
        faulty.restart(*(name for name in (SOURCE, SINK) if faulty.deployment.running[name].process.poll() is not None))
    faulty.wait_empty()
