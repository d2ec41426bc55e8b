"""What a hand-off does when its lane or its peer fails: the right tokens or a typed end, and nothing is left behind.

The workers are the unmodified ones on the paced engine, between a transport and peers that obey rules
(tests/live/faulty.py): every wrong byte that a worker would use is a wrong token at once and ever after.
"""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from tests.engine.chain import Chain
from tests.live.asks import ENDS, Case, case
from tests.live.cluster import Client, Live, Reply, together, until
from tests.transfer.faults import Rule


@pytest.fixture(scope="module")
def reference(model):
    """What every client must receive."""
    return Chain.of(model, 320, 8192, (0, *ENDS))


@pytest.fixture
def live(faulty):
    """Begins and ends each test with empty arenas and without faults."""
    faulty.fault({})
    yield faulty
    faulty.fault({})
    faulty.wait_empty()


def answers(live: Live, cases: list[Case], timeout_s: float = 60.0) -> list[Reply]:
    """All at once."""

    async def run():
        async with Client(live.gateway) as client:
            return await together(*(client.generate(each.request, timeout_s) for each in cases))

    return asyncio.run(run())


def exact(each: Case, reply: Reply, reference: Chain) -> None:
    """Token by token what the definition says, and drawn from what it says."""
    each.check(reply, reference)
    assert reply.hashes == reference.hashes(each.prompt, each.sampling)


def sinks(*rules: Rule) -> dict[str, tuple[Rule, ...]]:
    """The same rules for both decode workers."""
    return {"decode-0": rules, "decode-1": rules}


def test_a_lane_that_breaks_is_made_anew_while_both_its_workers_serve(live, reference):
    """One of each decode worker's, in the middle of a crowd; nobody is lost, and both lanes are there afterwards."""
    before, remade = len(live.lines()), live.total("baton_lanes_remade")
    live.fault(sinks(Rule("read", "break", nth=2)))
    cases = crowd(16, 8)
    for each, reply in zip(cases, answers(live, cases), strict=True):
        exact(each, reply, reference)
    assert len(live.acted()) == 2
    until(lambda: live.total("baton_lanes_remade") == remade + 2, "both are made anew")
    said = [line["message"] for line in live.lines()[before:]]
    assert not [line for line in said if line.startswith("lost ")]
    assert sum("broke: the lane was broken" in line for line in said) == 2
    live.fault({})
    live.wait_ready()
    each = case(300, 30, 8, forever=True)
    (reply,) = answers(live, [each])
    exact(each, reply, reference)
    assert reply.last.attempts == 1


def crowd(count: int, number: int) -> list[Case]:
    """More than all arenas hold: whatever is given back is taken at once."""
    return [case(30 + 13 * n % 120, 40, 100 * number + n, forever=True) for n in range(count)]


def behind(live: Live, reference: Chain, first: Case, others: list[Case], acts: int = 1) -> Reply:
    """The reply to `first`, when `others` came as soon as `acts` faults had acted; all are right."""

    async def run():
        async with Client(live.gateway) as client:
            going = asyncio.create_task(client.generate(first.request))
            await asyncio.to_thread(until, lambda: len(live.acted()) >= acts, "faults acted", more=live.acted)
            return [await going, *await together(*(client.generate(each.request) for each in others))]

    replies = asyncio.run(run())
    for each, reply in zip([first, *others], replies, strict=True):
        exact(each, reply, reference)
    return replies[0]


def test_a_read_in_doubt_lands_late_and_no_page_that_is_used_again_is_hit(live, reference):
    """Two pages are few enough to wait for; the noise comes when five rows have most of the others, and all run."""
    live.fault({"decode-0": [Rule("read", "doubt", seconds=0.6)]})
    others = [case(100, 60, 100 + n, forever=True) for n in range(10)]
    reply = behind(live, reference, case(36, 40, 10, forever=True), others)
    assert reply.last.attempts > 1
    assert live.acted() == ["decode-0: doubt at read", "decode-0: land at late"]


def test_many_pages_in_doubt_are_fenced_at_once(live, reference):
    live.fault({"decode-0": [Rule("read", "doubt", nth=3)]})
    reply = behind(live, reference, case(150, 40, 11, forever=True), crowd(16, 2))
    assert reply.last.attempts > 1
    assert live.acted() == ["decode-0: doubt at read"]


def test_few_pages_in_doubt_are_fenced_when_somebody_needs_them(live, reference):
    """Nothing ends their doubt but that: they would stay for ever."""
    live.fault({"decode-0": [Rule("read", "doubt")]})
    behind(live, reference, case(36, 40, 12, forever=True), crowd(8, 3))
    whole = [case(930, 40, 13 + n, forever=True) for n in range(2)]  # each takes a worker's every page
    for each, reply in zip(whole, answers(live, whole), strict=True):
        exact(each, reply, reference)


def test_a_source_uses_pages_again_while_a_read_of_them_is_pending(live, reference):
    """The client leaves, the sink is not told, and what it reads then is somebody else's: it is refused by digest."""
    before = live.total("baton_digest_mismatches")
    stall = Rule("read", "stall", times=4, seconds=0.7)
    live.fault({"decode-0": [stall, Rule("hear Release", "drop"), Rule("hear Cancel", "drop")]})
    gone = case(200, 40, 14, forever=True)

    async def run():
        async with Client(live.gateway) as client:
            call = client.stub.Generate(gone.request, timeout=5.0)
            await asyncio.to_thread(until, lambda: len(live.acted()) == 4, "its pages are being read")
            call.cancel()
            cases = crowd(16, 4)
            return cases, await together(*(client.generate(each.request) for each in cases))

    for each, reply in zip(*asyncio.run(run()), strict=True):
        exact(each, reply, reference)
    assert {"decode-0: drop at hear Release", "decode-0: drop at hear Cancel"} <= {*live.acted()}
    assert live.total("baton_digest_mismatches") > before


def test_what_is_late_and_slow_arrives(live, reference):
    live.fault(sinks(Rule("read", "delay", seconds=0.2), Rule("read", "stall", nth=3, times=4, seconds=0.1)))
    behind(live, reference, case(150, 40, 15, forever=True), crowd(12, 5))
    assert len(live.acted()) > 5


def test_reads_that_always_fail_end_the_request_with_an_error_that_says_so(live, reference):
    """Its attempts are bounded; another request is served as soon as lanes are well."""
    live.fault(sinks(Rule("read", "fail", times=1000)))
    started = time.monotonic()
    (reply,) = answers(live, [case(100, 30, 16, forever=True)], 30.0)
    assert (reply.code, reply.end) == ("UNAVAILABLE", None)
    assert "a fault was injected" in reply.details
    assert time.monotonic() - started < 20.0
    live.fault({})
    each = case(100, 30, 17, forever=True)
    (reply,) = answers(live, [each])
    exact(each, reply, reference)


def test_reads_that_never_end_end_the_request_at_its_deadline(live, reference):
    live.fault(sinks(Rule("read", "stall", times=1000, seconds=1000.0)))
    (reply,) = answers(live, [case(200, 30, 18, forever=True)], 2.0)
    assert (reply.code, reply.end) == ("DEADLINE_EXCEEDED", None)
    live.wait_empty()
    live.fault({})
    each = case(200, 30, 19, forever=True)
    (reply,) = answers(live, [each])
    exact(each, reply, reference)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("prefill-0", "decode-0"), id="both"),
        pytest.param(("prefill-0",), id="source", marks=pytest.mark.slow),
        pytest.param(("decode-0",), id="sink", marks=pytest.mark.slow),
    ],
)
def test_workers_that_stand_still_for_5_s_in_the_middle_of_hand_offs(live, reference, names):
    """Their requests go on elsewhere; when they are back they hold nothing, and serve."""
    cases, before = crowd(8, 6), len(live.lines())
    live.fault({"decode-0": [Rule("read", "delay", nth=3, times=50, seconds=0.5)]})

    async def run():
        async with Client(live.gateway) as client:
            going = asyncio.create_task(together(*(client.generate(each.request) for each in cases)))
            await asyncio.to_thread(until, lambda: len(live.acted()) > 0, "a read is pending")
            for name in names:
                live.kill(name, signal.SIGSTOP)
            await asyncio.sleep(5.0)
            for name in names:
                live.kill(name, signal.SIGCONT)
            return await going

    replies = asyncio.run(run())
    for each, reply in zip(cases, replies, strict=True):
        exact(each, reply, reference)
    said = [line["message"] for line in live.lines()[before:]]
    assert all(any(line.startswith(f"lost {name}#") for line in said) for name in names), said
    live.wait_ready()
    live.fault({})
    for each, reply in zip(crowd(12, 7), answers(live, crowd(12, 7)), strict=True):
        exact(each, reply, reference)
