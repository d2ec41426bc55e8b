"""Split over processes, every sampling option gives what it gives in one: each token, and what is said of it."""

from __future__ import annotations

import asyncio
import random
import signal
from dataclasses import dataclass, field
from typing import Any

import pytest

from core.sampling import Logprobs, Sampling
from protos.baton.v1 import inference_pb2
from tests.live.asks import ENDS, prompt
from tests.live.cluster import Client, Live, Reference, Reply, ask, together

OPTIONS: dict[str, dict[str, Any]] = {
    "min_p": {"min_p": 0.9},
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.5},
    "bias": {"logit_bias": ((3, -100.0), (7, 2.5), (90, 100.0)), "frequency_penalty": 2.0},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": tuple(range(100, 300))},
    "logprobs": {"logprobs": 5, "prompt_logprobs": 3},
    "ends at once": {"stop_token_ids": tuple(range(2, 320)), "prompt_logprobs": 0},
    "all": {
        "top_k": 60,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": ((5, 1.5), (99, -3.0)),
        "min_tokens": 12,
        "stop_token_ids": tuple(range(200, 220)),
        "logprobs": 2,
        "prompt_logprobs": 1,
    },
}
KINDS: dict[str, dict[str, Any]] = {"greedy": {}, "seeded": {"temperature": 0.8, "seed": 2**40 + 3}}
LENGTHS = (1, 17, 64, 130, 33)


@dataclass
class Told(Reply):
    """A reply, with what was said of its tokens."""

    logprobs: list[Logprobs] = field(default_factory=list)
    prompt: list[Logprobs | None] = field(default_factory=list)

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        """Whoever asked for logprobs gets one with each token."""
        super().take(response)
        assert len(response.logprobs) in (0, len(response.token_ids))
        self.logprobs += map(known, response.logprobs)
        if response.prompt_logprobs:
            assert not self.prompt, "a prompt's logprobs came twice"
            first, *others = response.prompt_logprobs
            assert first == inference_pb2.TokenLogprobs()
            self.prompt = [None, *map(known, others)]


def known(body: inference_pb2.TokenLogprobs) -> Logprobs:
    return Logprobs(body.token_id, body.logprob, tuple(body.top_ids), tuple(body.top_logprobs))


@dataclass(frozen=True)
class Case:
    tokens: tuple[int, ...]
    sampling: Sampling
    request: inference_pb2.GenerateRequest

    def check(self, reply: Told, reference: Reference) -> None:
        assert reply.code == "OK", reply.details
        samples = reference.samples(self.tokens, self.sampling)
        kept = [sample for sample in samples if sample.finish != "stop"]
        assert reply.tokens == [sample.token for sample in kept]
        assert reply.hashes == [sample.logits_hash for sample in kept]
        assert reply.logprobs == [sample.logprobs for sample in kept if sample.logprobs is not None]
        assert reply.prompt == list(samples[0].prompt_logprobs)
        assert reply.last.finish_reason == samples[-1].finish


def case(tokens: tuple[int, ...], max_tokens: int, **options: Any) -> Case:
    sampling = Sampling(max_tokens, **{**options, "stop_token_ids": (*options.get("stop_token_ids", ()), *ENDS)})
    asked = {**options, "logit_bias": dict(options.get("logit_bias", ()))}
    return Case(tokens, sampling, ask(tokens, max_tokens, **asked))


CASES = {
    f"{name}-{kind}": case(prompt(LENGTHS[(number + shift) % 5], number), 24, **options, **KINDS[kind])
    for number, (name, options) in enumerate(OPTIONS.items())
    for shift, kind in enumerate(KINDS)
}


async def told(client: Client, request: inference_pb2.GenerateRequest) -> Told:
    reply = Told()
    async for response in client.responses(request, reply):
        reply.take(response)
    return reply


@pytest.fixture(scope="module")
def started(launch, model):
    """One prefill worker with short chunks, and two decode workers of which one may be lost."""
    live = launch(
        "sampling", model, prefill=1, decode=2, dtype="float32", exact=True, hash_logits=True, chunk_tokens=32
    )
    live.torn = True
    yield live
    live.stop()


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model, dtype="float32", exact=True)


@pytest.mark.parametrize("name", CASES)
def test_an_option_gives_what_it_gives_in_one_process(started: Live, reference: Reference, name: str):
    async def run() -> Told:
        async with Client(started.gateway) as client:
            return await told(client, CASES[name].request)

    CASES[name].check(asyncio.run(run()), reference)


def test_all_at_once_give_the_same(started: Live, reference: Reference):
    async def run() -> list[Told]:
        async with Client(started.gateway) as client:
            return list(await asyncio.gather(*(told(client, each.request) for each in CASES.values())))

    for each, reply in zip(CASES.values(), asyncio.run(run()), strict=True):
        each.check(reply, reference)


def test_each_option_changes_something(reference: Reference):
    for name, each in CASES.items():
        plain = Sampling(24, temperature=each.sampling.temperature, seed=each.sampling.seed, stop_token_ids=ENDS)
        if "logprobs" not in name and name != "min_p-greedy":
            assert reference.tokens(each.tokens, each.sampling) != reference.tokens(each.tokens, plain), name


def test_stop_strings_count_from_the_least_number_of_tokens_on(started: Live):
    """Of two letters only, so that each is one token."""

    async def run() -> list[Reply]:
        async with Client(started.gateway) as client:
            ids = (await client.stub.Tokenize(inference_pb2.TokenizeRequest(text="ab"))).token_ids
            fields = {"logit_bias": dict.fromkeys(ids[-2:], 100.0), "temperature": 2.0, "seed": 3, "ignore_eos": True}
            least = (0, 5, 12, 30)
            stopped = [ask("x", 40, stop=["ab"], min_tokens=count, **fields) for count in least]
            return await together(*(client.generate(each) for each in (ask("x", 40, **fields), *stopped)))

    plain, *stopped = asyncio.run(run())
    assert set(plain.text) == {"a", "b"}
    assert len(plain.text) == 40
    for least, reply in zip((0, 5, 12, 30), stopped, strict=True):
        at = plain.text.find("ab", max(0, least - 1))
        assert (reply.text, reply.tokens) == (plain.text[:at], plain.tokens[: at + 2])
        assert (reply.last.finish_reason, reply.last.stop_string) == ("stop", "ab")


def test_a_decode_worker_killed_in_mid_stream_changes_neither_tokens_nor_logprobs(started: Live, reference: Reference):
    options = {**OPTIONS["all"], "stop_token_ids": (), "min_tokens": 600, "temperature": 0.6, "seed": 11}
    each = case(tuple(random.Random(5).choices(range(2, 90), k=70)), 1000, **options)

    async def run() -> Told:
        async with Client(started.gateway) as client:
            reply = Told()
            stream = client.responses(each.request, reply)
            while len(reply.tokens) < 20:
                reply.take(await anext(stream))
            started.kill("decode-0", signal.SIGKILL)  # of two idle workers, the first by name is taken
            async for response in stream:
                reply.take(response)
            return reply

    reply = asyncio.run(run())
    each.check(reply, reference)
    assert len(reply.tokens) >= 600
    assert reply.last.attempts == 2
    started.wait_empty()
