"""What a hand-off does when its lane or its peer fails: the right tokens or a typed end, and nothing is left behind.

The workers are the unmodified ones on the paced engine, between a transport and peers that obey rules
(tests/live/faulty.py): every wrong byte that a worker would use is a wrong token at once and ever after.
"""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.engine.chain import Chain
from tests.live.asks import ENDS, Case, case
from tests.live.cluster import Client, Live, Reply, together, until
from tests.transfer.faults import Rule, write


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """The file with the rules of the workers in this module."""
    return tmp_path_factory.mktemp("faults") / "rules"


@pytest.fixture(scope="module")
def live(launch, model, faults):
    """Two prefill and two decode workers with small arenas; every step takes twice an H200's time."""
    settings = {"prefill": 2, "decode": 2, "engine": "paced", "hash_logits": True, "chunk_tokens": 32, "pace": 2.0}
    started = launch("faults", model, faults=faults, kv_memory="1M", **settings)
    started.torn = True  # digests must differ here
    yield started
    write(faults, {})
    started.stop()


@pytest.fixture(scope="module")
def reference(model):
    """What every client must receive."""
    return Chain.of(model, 320, 8192, (0, *ENDS))


@pytest.fixture(autouse=True)
def clean(live, faults):
    """Each test begins and ends with empty arenas and without faults."""
    write(faults, {})
    yield
    write(faults, {})
    live.wait_empty()


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


def test_a_page_with_a_flipped_bit_is_read_once_more(live, faults, reference):
    before = live.total("baton_digest_mismatches")
    each = case(100, 30, 1, forever=True)
    write(faults, sinks(Rule("read", "flip")))
    (reply,) = answers(live, [each])
    exact(each, reply, reference)
    assert len(live.acted()) == 1
    assert reply.last.attempts == 1
    assert live.total("baton_digest_mismatches") == before + 1


def test_a_page_that_is_wrong_twice_is_computed_anew(live, faults, reference):
    before = live.total("baton_digest_mismatches")
    each = case(100, 30, 2, forever=True)
    write(faults, {"decode-0": [Rule("read", "flip", times=2)], "decode-1": [Rule("read", "flip", times=2)]})
    (reply,) = answers(live, [each])
    exact(each, reply, reference)
    assert reply.last.attempts > 1
    assert live.total("baton_digest_mismatches") >= before + 2


@pytest.mark.parametrize("nth", [1, 3])
def test_a_read_that_fails_costs_an_attempt(live, faults, reference, nth):
    each = case(100, 30, 2 + nth, forever=True)
    write(faults, sinks(Rule("read", "fail", nth=nth)))
    (reply,) = answers(live, [each])
    exact(each, reply, reference)
    assert live.acted()
    assert reply.last.attempts == 1 + len(live.acted())
