"""Prefill workers pull what others have of a prompt: a next turn, or what dead workers leave, is not computed again.

The paced engine draws each token from all bytes of its pages, so that a page which was fetched and is not what its name
says would give wrong tokens ever after. It is slow enough that to pull pages pays, whatever this machine does.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from core.sampling import Sampling
from tests.engine.chain import Chain
from tests.live.asks import ENDS, Case, prompt
from tests.live.cluster import Client, Live, Reply, ask, until
from tests.transfer.faults import Rule

PAGE = 16
PAGE_NBYTES = 4096
PREFILLS, DECODES = ("prefill-0", "prefill-1"), ("decode-0", "decode-1")


@pytest.fixture(scope="module")
def fetching(launch, model, tmp_path_factory) -> Iterator[Live]:
    """Two prefill and two decode workers, whose lanes and messages obey rules."""
    rules = tmp_path_factory.mktemp("fetch") / "rules"
    settings = {
        "engine": "paced",
        "pace": 8.0,
        "kv_memory": "4M",
        "hash_logits": True,
        "chunk_tokens": 512,
        "fetch": True,
    }
    live = launch("fetch", model, faults=rules, prefill=2, decode=2, **settings)
    live.torn = True  # digests must differ here
    live.expected = ["^lane from .*: no answer"]  # workers come back here, and may be slow to
    yield live
    live.fault({})
    live.stop()


@pytest.fixture
def live(fetching) -> Iterator[Live]:
    """Without faults, with all workers and all lanes, and with empty arenas in the end."""
    fetching.fault({})
    renew(fetching, *(each.name for each in fetching.workers if each.process.poll() is not None))
    yield fetching
    fetching.fault({})
    fetching.wait_empty()


@pytest.fixture(scope="module")
def reference(model) -> Chain:
    """What every client must receive."""
    return Chain.of(model, 320, 8192, (0, *ENDS))


def lanes(live: Live, name: str) -> set[str]:
    """From whom a worker can read."""
    return {dict(labels)["source"] for key, labels in live.metrics(name) if key == "baton_lane_latency_seconds"}


def case(tokens: tuple[int, ...], count: int) -> Case:
    return Case(tokens, Sampling(count, ignore_eos=True), ask(tokens, count, ignore_eos=True))


def computed(live: Live) -> dict[str, float]:
    """Prompt tokens that each prefill worker has computed."""
    alive = [each for each in live.workers if each.process.poll() is None and each.name in PREFILLS]
    return {each.name: live.metric(each.name, "baton_prefill_tokens") for each in alive}


def since(live: Live, before: dict[str, float]) -> float:
    """Those of all that live, since then."""
    return sum(count - before.get(name, 0.0) for name, count in computed(live).items())


def whole(tokens: int) -> int:
    return tokens // PAGE * PAGE


def run(live: Live, play: Callable[[Client], Coroutine[Any, Any, Reply]]) -> Reply:
    async def go() -> Reply:
        async with Client(live.gateway) as client:
            return await play(client)

    return asyncio.run(go())


def exact(each: Case, reply: Reply, reference: Chain) -> Reply:
    """Token by token what the definition says, and drawn from what it says."""
    each.check(reply, reference)
    assert reply.hashes == reference.hashes(each.prompt, each.sampling)
    return reply


def one(live: Live, each: Case, reference: Chain) -> Reply:
    return exact(each, run(live, lambda client: client.generate(each.request)), reference)


def at(reply: Reply, name: str) -> str:
    """The worker of the last stage of that name."""
    return [stage.worker for stage in reply.last.stages if stage.name == name][-1]


def fetched(reply: Reply) -> tuple[str, int]:
    """(from whom, bytes) of the last fetch that it needed."""
    stage = [stage for stage in reply.last.stages if stage.name == "fetch"][-1]
    assert stage.worker in PREFILLS
    return stage.detail["from"], int(stage.detail.get("nbytes", 0))


def turns(live: Live, reference: Chain, number: int) -> tuple[Case, int, str]:
    """A first turn that was answered, by workers of which the prefill worker is another life by now: the second turn,
    how many of its tokens have KV, and the decode worker that alone has it."""
    first = case(prompt(3000, number), 30)
    said = one(live, first, reference)
    renew(live, at(said, "prefill"))
    text = (*first.prompt, *said.tokens)
    return case((*text, *prompt(100, number + 1)), 20), whole(len(text) - 1), at(said, "decode")


def renew(live: Live, *names: str) -> None:
    """Workers that have nothing any more, and all lanes."""
    for name in names:
        if live.deployment.running[name].process.poll() is None:
            live.kill(name, signal.SIGKILL)
    if names:
        live.restart(*names)
    until(lambda: all(lanes(live, name) == {*PREFILLS, *DECODES} - {name} for name in PREFILLS), "all lanes are up")


def test_the_next_turn_computes_nothing_that_was_generated(live, reference):
    """Its prefill worker has nothing of it; the decode worker has the prompt, and what it said."""
    second, known, kept = turns(live, reference, 1)
    before = computed(live)
    reply = one(live, second, reference)
    assert fetched(reply) == (kept, known // PAGE * PAGE_NBYTES)
    assert reply.last.cached_tokens == known
    assert since(live, before) == len(second.prompt) - known
    assert sum(live.metric(name, "baton_fetches", outcome="fetched") for name in PREFILLS) == 1
    assert sum(live.metric(name, "baton_fetched_bytes") for name in PREFILLS) == known // PAGE * PAGE_NBYTES


def test_a_turn_that_is_all_there_waits_for_no_fetch(live, reference):
    second, _, _ = turns(live, reference, 3)
    one(live, second, reference)
    reply = one(live, second, reference)
    assert "fetch" not in [stage.name for stage in reply.last.stages]
    assert reply.last.cached_tokens == whole(len(second.prompt) - 1)


@pytest.mark.slow
def test_what_two_dead_workers_leave_is_computed_no_further_than_no_one_has_it(live, reference):
    """A turn that runs at one pair of workers loses both: a decode worker has the turn before it."""
    second, known, kept = turns(live, reference, 5)
    (other,) = {*DECODES} - {kept}
    busy, long = case(prompt(40, 7), 300), case(second.prompt, 150)
    before: dict[str, float] = {}

    async def play(client: Client) -> Reply:
        background = client.responses(busy.request, Reply())
        await anext(background)
        begun, reply = computed(live), Reply()
        stream = client.responses(long.request, reply)
        while len(reply.tokens) < 30:
            reply.take(await anext(stream))
        assert live.metric(other, "baton_requests", phase="decode", state="running"), "it runs beside what is busy"
        (first,) = (name for name, count in computed(live).items() if count > begun[name])
        live.kill(first, signal.SIGKILL)
        before.update(computed(live))
        live.kill(other, signal.SIGKILL)
        async for response in stream:
            reply.take(response)
        await background.aclose()
        return reply

    reply = exact(long, run(live, play), reference)
    assert reply.last.attempts == 2
    assert fetched(reply) == (kept, known // PAGE * PAGE_NBYTES)
    assert reply.last.cached_tokens == known
    rest = since(live, before) - (len(long.prompt) - known)
    assert 30 <= rest < 150


def test_a_prefix_comes_from_another_prefill_worker(live, reference):
    """Who has it is busy, and both decode workers are new."""
    first = case(prompt(1200, 9), 4)
    had = at(one(live, first, reference), "prefill")
    renew(live, *DECODES)
    long, short = (case((*first.prompt, *prompt(count, 10)), 2) for count in (6000, 50))

    async def play(client: Client) -> Reply:
        crowd = asyncio.create_task(client.generate(long.request))
        running = {"phase": "prefill", "state": "running"}
        await asyncio.to_thread(until, lambda: live.metric(had, "baton_requests", **running), "it is busy")
        reply = await client.generate(short.request)
        exact(long, await crowd, reference)
        return reply

    reply = exact(short, run(live, play), reference)
    assert at(reply, "prefill") != had
    assert fetched(reply) == (had, whole(1200) // PAGE * PAGE_NBYTES)
    assert reply.last.cached_tokens == whole(1200)


@pytest.mark.parametrize(
    ("number", "event"),
    [pytest.param(30, "hear Fetch", marks=pytest.mark.slow, id="asked"), pytest.param(40, "sent Ready", id="read")],
)
def test_a_source_that_dies_in_the_middle_costs_no_token(live, reference, number, event):
    second, _, kept = turns(live, reference, number)
    rules = [Rule(event, "kill")]
    stall = [Rule("read", "stall", seconds=1.0)]
    live.fault({kept: rules, **dict.fromkeys(PREFILLS, stall)})
    reply = one(live, second, reference)
    live.died(kept)
    source, nbytes = fetched(reply)
    assert (source, nbytes) == (kept, 0)


def test_a_flipped_bit_is_noticed_and_the_pages_are_computed(live, reference):
    second, known, kept = turns(live, reference, 60)
    wrong = live.total("baton_digest_mismatches")
    live.fault({name: [Rule("read", "flip", times=2)] for name in PREFILLS})
    reply = one(live, second, reference)
    assert fetched(reply) == (kept, 0)
    assert reply.last.cached_tokens < known
    assert live.total("baton_digest_mismatches") > wrong
