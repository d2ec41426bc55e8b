"""KV of prompts that begin alike is computed once and crosses once: bit-equal tokens, and nobody sees another's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from queue import Queue
from typing import Any

import grpc
import pytest

from control.client import members
from core.messages import Fetch, Ready
from core.prefix import page_hashes
from core.request import Ticket
from core.sampling import Sampling
from core.worker import Greeting, Identity
from protos.baton.v1 import worker_pb2, worker_pb2_grpc
from protos.baton.v1.worker_pb2 import Frame
from runtime import wire
from tests.live.asks import Case, prompt
from tests.live.cluster import LATE_S, Client, Live, Reference, Reply, ask, several, together

PAGE = 16


def case(tokens: tuple[int, ...], count: int = 12, tenant: str = "", **options) -> Case:
    """A request for so many tokens after these."""
    sampling = Sampling(count, ignore_eos=True, **options)
    request = ask(tokens, count, ignore_eos=True, **options)
    request.hints.tenant = tenant
    return Case(tokens, sampling, request)


@pytest.fixture(scope="module")
def exact(launch, model) -> Iterator[tuple[Live, Reference]]:
    live = launch("prefix", model, prefill=1, exact=True, hash_logits=True)
    yield live, Reference(model, exact=True)
    live.stop()


def one(live: Live, asked: Case) -> Reply:
    async def run() -> Reply:
        async with Client(live.gateway) as client:
            return await client.generate(asked.request)

    return asyncio.run(run())


def pulled(reference: Reference, reply: Reply) -> tuple[int, int]:
    """(pages that were read, tokens that were at the decode worker already)."""
    (pull,) = (stage for stage in reply.last.stages if stage.name == "pull")
    return int(pull.detail["nbytes"]) // reference.engine.kv.page_nbytes, int(pull.detail["cached"])


def check(exact: tuple[Live, Reference], asked: Case, cached: int, read: int, there: int) -> Reply:
    """The reply is bit for bit what one engine says; `cached` tokens of the prompt were not computed, `read` pages
    crossed, and the KV of `there` tokens was at the decode worker."""
    live, reference = exact
    reply = one(live, asked)
    asked.check(reply, reference)
    assert reply.hashes == reference.hashes(asked.prompt, asked.sampling)
    assert reply.last.cached_tokens == cached
    assert pulled(reference, reply) == (read, there)
    return reply


def test_the_next_turn_computes_and_moves_only_what_is_new(exact):
    first = case(prompt(100))
    said = check(exact, first, 0, 7, 0)
    check(exact, case((*first.prompt, *said.tokens, *prompt(30, 1))), 96, 3, 96)


def test_the_decode_worker_has_what_it_said(exact):
    """Prompt and answer are 140 tokens, of which the newest has no KV: eight full pages, the ninth crosses again."""
    first = case(prompt(100, 20), 40)
    said = check(exact, first, 0, 7, 0)
    check(exact, case((*first.prompt, *said.tokens, *prompt(30, 21))), 96, 3, 128)


def test_an_answer_that_a_stop_string_ended_is_there_as_well(exact, tokenizer):
    """The worker hears of the end from the gateway, with the names of the pages that it has written."""
    live, reference = exact
    first = case(prompt(100, 22), 200)
    tokens = reference.tokens(first.prompt, first.sampling)
    text = [tokenizer.decode(tokens[:upto]) for upto in range(len(tokens) + 1)]
    stop, upto = next(
        (text[-1][at], next(n for n, each in enumerate(text) if text[-1][at] in each))
        for at in range(20, len(text[-1]))
        if text[-1][at].isascii() and text[-1].index(text[-1][at]) == at and len(text[-1][:at].encode()) > 60
    )
    said = one(live, replace(first, request=ask(first.prompt, 200, ignore_eos=True, stop=[stop])))
    assert (said.last.finish_reason, said.tokens) == ("stop", tokens[: len(said.tokens)])
    assert upto <= len(said.tokens) < 200
    there = (100 + len(said.tokens) - 1) // PAGE * PAGE
    whole = (*first.prompt, *said.tokens, *prompt(30, 23))
    check(exact, case(whole), 96, -(-len(whole) // PAGE) - there // PAGE, there)


def test_a_prompt_that_is_all_there_moves_no_byte(exact):
    """The prefill worker computes its last page for the first token's sake; the decode worker has that one as well."""
    asked = case(prompt(96, 2))
    check(exact, asked, 0, 6, 0)
    check(exact, asked, 80, 0, 96)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33])
def test_only_whole_pages_are_kept(exact, length):
    asked = case(prompt(length, 3))
    whole, pages = length // PAGE * PAGE, -(-length // PAGE)
    check(exact, asked, 0, pages, 0)
    check(exact, asked, (length - 1) // PAGE * PAGE, pages - whole // PAGE, whole)


def test_tenants_share_nothing(exact):
    mine, others = (case(prompt(64, 4), tenant=name) for name in ("mine", "other"))
    check(exact, mine, 0, 4, 0)
    check(exact, others, 0, 4, 0)
    check(exact, mine, 48, 0, 64)


def test_a_prompt_whose_logprobs_are_wanted_is_computed_in_full(exact):
    live, reference = exact
    plain = case(prompt(64, 5))
    check(exact, plain, 0, 4, 0)
    asked = case(prompt(64, 5), prompt_logprobs=1)
    reply = one(live, asked)
    asked.check(reply, reference)
    assert reply.last.cached_tokens == 0


def test_continuations_share_what_is_there(exact):
    live, reference = exact
    options: dict[str, Any] = {"temperature": 0.9, "seed": 5}
    whole = prompt(72, 6)
    check(exact, case(whole), 0, 5, 0)

    replies = several(live, case(whole, n=3, **options).request)
    for branch, reply in enumerate(replies):
        assert reply.tokens == reference.tokens(whole, Sampling(12, ignore_eos=True, n=3, **options).branch(branch))
    (last,) = (reply for reply in replies if reply.last.stages)
    assert pulled(reference, last) == (1, 64)


def test_many_that_begin_alike_at_once(exact):
    live, reference = exact
    head = prompt(50, 7)
    cases = [case(head + prompt(1 + 7 * number, 8 + number)) for number in range(12)]

    async def run() -> list[Reply]:
        async with Client(live.gateway) as client:
            return await together(*(client.generate(each.request) for each in cases))

    for asked, reply in zip(cases, asyncio.run(run()), strict=True):
        asked.check(reply, reference)
        assert reply.hashes == reference.hashes(asked.prompt, asked.sampling)


def fetched(live: Live, name: str, names: tuple[int, ...], cached: int) -> tuple[Ready, list[str]]:
    """What a worker announces to somebody who wants these pages, and who then goes; and what it held meanwhile."""
    known = {each.identity.name: each for each in map(wire.member_from, members(live.deployment.coordinator))}
    like = replace(known["decode-0"], identity=Identity("stranger", 0x5), fetches=True)
    holder = known[name].identity
    fetch = Fetch(Ticket(like.identity, 1, 1, holder, like.identity), names, cached, LATE_S)
    said: Queue[list[Frame] | None] = Queue()
    said.put([wire.hello(Greeting(like)), *wire.frames(fetch)])
    with grpc.insecure_channel(live.deployment.running[name].address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        requests = (worker_pb2.PeerRequest(frames=frames) for frames in iter(said.get, None))
        for answer in stub.Peer(requests, timeout=LATE_S):
            for frame in answer.frames:
                if frame.WhichOneof("body") == "ready":
                    ready = wire.Reader().message(frame)
                    assert isinstance(ready, Ready)
                    held = live.held()
                    said.put(None)
                    return ready, held
    raise AssertionError("no answer")


def test_workers_announce_what_somebody_fetches(exact):
    """Both have the prompt's pages, byte for byte; the decode worker has those of the answer beside them."""
    live, _ = exact
    first = case(prompt(100, 30), 40)
    said = check(exact, first, 0, 7, 0)
    names = page_hashes((*first.prompt, *said.tokens), PAGE)
    assert len(names) == 8
    (there, held), (here, _) = fetched(live, "prefill-0", names, 0), fetched(live, "decode-0", names, 0)
    assert (len(there.digests), len(here.digests)) == (6, 8)
    assert here.digests[:6] == there.digests
    assert len(set(here.digests)) == sum(run.count for run in here.runs) == 8
    assert held == ["prefill-0 baton_pages shared 6"]
    assert fetched(live, "decode-0", names, 7)[0].digests == here.digests[7:]
    assert fetched(live, "decode-0", page_hashes(prompt(32, 31), PAGE), 0)[0].digests == ()
    live.wait_empty()


def test_full_arenas_give_up_what_nobody_uses(exact):
    """Prompts of two arenas' worth, also where KV in bfloat16 makes them larger: every one is served, and the oldest is
    forgotten."""
    live, _ = exact
    cases = [case(prompt(400, 50 + number), 4) for number in range(40)]
    for asked in cases:
        check(exact, asked, 0, 25, 0)
    check(exact, cases[-1], 384, 0, 400)
    check(exact, cases[0], 0, 25, 0)
    assert live.metric("prefill-0", "baton_prefix_pages", what="reclaimed") > 0
    assert live.metric("decode-0", "baton_prefix_pages", what="reclaimed") > 0


def test_without_the_cache_everything_is_computed_and_moved(launch, model):
    live = launch("no-prefix", model, prefill=1, exact=True, hash_logits=True, prefix_cache=False)
    reference = Reference(model, exact=True)
    asked = case(prompt(96, 2))
    for _ in range(2):
        check((live, reference), asked, 0, 6, 0)
    live.stop()
