"""Bad requests get the right status and a sentence; a stream beside them never notices."""

from __future__ import annotations

import asyncio
import re
import threading
import time

import grpc
import pytest
from google.protobuf import empty_pb2

from protos.baton.v1 import common_pb2, inference_pb2
from tests.live.asks import case, prompt
from tests.live.cluster import SECRET, Client, ask, together

CONTEXT = 8192
GENERATE = "/baton.v1.InferenceService/Generate"
BESIDE = [case(30 + n, 120, n, forever=True) for n in range(4)]


@pytest.fixture(scope="module", autouse=True)
def beside(live, reference):
    """One stream after another, all the time, while bad requests are sent; all of them must be right."""
    over, replies = threading.Event(), []

    async def stream():
        async with Client(live.gateway) as client:
            while not over.is_set():
                each = BESIDE[len(replies) % len(BESIDE)]
                replies.append(await client.generate(each.request))

    thread = threading.Thread(target=lambda: asyncio.run(stream()))
    thread.start()
    yield
    over.set()
    thread.join()
    assert len(replies) > 3
    for number, reply in enumerate(replies):
        BESIDE[number % len(BESIDE)].check(reply, reference)
        assert reply.last.attempts == 1


def send(live, request):
    """The reply to one request."""

    async def run():
        async with Client(live.gateway) as client:
            return await client.generate(request)

    return asyncio.run(run())


BAD = {
    "no prompt": (inference_pb2.GenerateRequest(max_tokens=3), "prompt: got none"),
    "an empty text": (ask("", 3), "prompt: got 0 tokens"),
    "an empty list of tokens": (
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(), max_tokens=3),
        "prompt: got 0 tokens",
    ),
    "an empty chat": (inference_pb2.GenerateRequest(chat=inference_pb2.Chat(), max_tokens=0), "got 0"),
    "a prompt as long as the context": (ask(prompt(CONTEXT)), f"got {CONTEXT} tokens, want at most {CONTEXT - 1}"),
    "a prompt longer than the context": (ask("y" * 9000, 3), f"got 9000 tokens.*context holds {CONTEXT}"),
    "more tokens than the context": (
        ask(prompt(100), CONTEXT),
        f"max_tokens: got {CONTEXT}, want at most {CONTEXT - 100}",
    ),
    "a prompt that no worker's memory holds": (ask(prompt(5000), 3), "got 5000 tokens, no worker holds more than 3904"),
    "a length that no worker's memory holds": (ask(prompt(50), 4000), "got 4050 tokens, no decode worker.* 3904"),
    "a negative temperature": (ask("x", 3, temperature=-0.1), "temperature: got -0.1"),
    "a temperature of NaN": (ask("x", 3, temperature=float("nan")), "temperature: got nan"),
    "an infinite temperature": (ask("x", 3, temperature=float("inf")), "temperature: got inf"),
    "a top_p of 0": (ask("x", 3, top_p=0.0), "top_p: got 0.0"),
    "a top_p above 1": (ask("x", 3, top_p=1.5), "top_p: got 1.5"),
    "a top_p of NaN": (ask("x", 3, top_p=float("nan")), "top_p: got nan"),
    "a negative top_k": (ask("x", 3, top_k=-1), "top_k: got -1"),
    "a seed beyond 63 bits": (ask("x", 3, seed=2**63), f"seed: got {2**63}"),
    "a token outside the vocabulary": (ask([5, 320], 3), "token_ids: got 320, want 0..319"),
    "a negative token": (ask([-1], 3), "token_ids: got -1"),
    "a stop token outside the vocabulary": (ask("x", 3, stop_token_ids=[320]), "stop_token_ids: got 320"),
    "an empty stop string": (ask("x", 3, stop=["ok", ""]), "stop: got an empty string"),
    "too many stop strings": (ask("x", 3, stop=[str(n) for n in range(65)]), "stop: got 65 strings, want at most 64"),
    "no tokens wanted": (ask("x", 0), "max_tokens: got 0"),
    "a negative number of tokens": (ask("x", -5), "max_tokens: got -5"),
    "absurdly many tokens": (ask("x", 2**31 - 1), f"max_tokens: got {2**31 - 1}"),
    "a negative goal": (ask("x", 3, slo=common_pb2.Slo(ttft_s=-1)), "slo.ttft_s: got -1"),
    "a goal of NaN": (ask("x", 3, slo=common_pb2.Slo(gap_s=float("nan"))), "slo.gap_s: got nan"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_told_what_is_wrong_with_it(live, what):
    request, message = BAD[what]
    reply = send(live, request)
    assert reply.code == "INVALID_ARGUMENT"
    assert not reply.tokens
    assert reply.retry_s is None
    assert re.search(message, reply.details), reply.details


def test_another_models_name_is_not_found(live):
    reply = send(live, ask("x", 3, model="gpt-5"))
    assert reply.code == "NOT_FOUND"
    assert "'gpt-5', want 'tiny'" in reply.details
    assert send(live, ask("x", 3, model="tiny", ignore_eos=True)).last.completion_tokens == 3


def raw(live, path, body):
    """The status that a message of these bytes gets."""
    with grpc.insecure_channel(live.gateway) as channel:
        call = channel.unary_stream(path, request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(grpc.RpcError) as refused:
            list(call(body, timeout=20))
    return refused.value.code().name, refused.value.details()


@pytest.mark.parametrize(
    "body",
    [b"\x1a\x04\xff\xfe\x80x", b"\x1a\x03\xed\xa0\x80", b"\x1a\x7fx", b"\xff\xff\xff\xff", b"\x1a"],
    ids=["not UTF-8", "a lone surrogate", "cut short", "not a message", "a bare tag"],
)
def test_bytes_that_are_no_message_are_refused(live, body):
    code, details = raw(live, GENERATE, body)
    assert code == "INVALID_ARGUMENT"
    assert "GenerateRequest" in details


def test_a_message_of_100_mb_is_refused_unread(live):
    code, details = raw(live, GENERATE, ask("x" * 100_000_000, 3).SerializeToString())
    assert code == "RESOURCE_EXHAUSTED"
    assert "larger than max" in details


def test_a_prompt_of_megabytes_is_refused_before_its_tokens_are_counted(live):
    """The longest token has 5 characters."""
    started = time.monotonic()
    reply = send(live, ask("x" * 20_000_000, 3))
    assert reply.code == "INVALID_ARGUMENT"
    assert f"got at least 4000000 tokens, want at most {CONTEXT - 1}" in reply.details
    assert time.monotonic() - started < 20


def test_a_long_prompt_is_counted_exactly(live):
    reply = send(live, ask("x" * 40_000, 3))
    assert reply.code == "INVALID_ARGUMENT"
    assert f"got 40000 tokens, want at most {CONTEXT - 1}" in reply.details


def test_an_unknown_method_is_unimplemented(live):
    assert raw(live, "/baton.v1.InferenceService/Nothing", empty_pb2.Empty().SerializeToString())[0] == "UNIMPLEMENTED"


def test_a_goal_that_cannot_be_met_is_refused_early_with_the_time_to_wait(live, reference):
    """Once every prefill worker's speed was measured, a second's worth of prompts stands before the impatient one."""
    crowd = [case(3000, 1, n, forever=True) for n in range(20)]
    hurried = ask(prompt(3000, 99), 5)
    hurried.slo.ttft_s = 0.02

    async def run():
        async with Client(live.gateway) as client:
            await together(*(client.generate(each.request) for each in crowd[:4]))
            waiting = [asyncio.create_task(client.generate(each.request)) for each in crowd]
            await asyncio.sleep(0.1)
            refused = await client.generate(hurried)
            return refused, await asyncio.gather(*waiting)

    refused, replies = asyncio.run(run())
    assert refused.code == "RESOURCE_EXHAUSTED"
    assert "all 2 prefill workers refused" in refused.details
    assert "wanted in 0.0" in refused.details
    assert refused.retry_s is not None
    assert 0.1 <= refused.retry_s < 60
    for each, reply in zip(crowd, replies, strict=True):
        each.check(reply, reference)
    hurried.slo.ttft_s = 60
    assert send(live, hurried).code == "OK"


def test_a_call_past_its_deadline_is_ended_and_freed(live):
    live.torn = True

    async def run():
        async with Client(live.gateway) as client:
            return await client.generate(ask(f"{SECRET} too slow", 3000, ignore_eos=True), timeout_s=0.4)

    reply = asyncio.run(run())
    assert reply.code == "DEADLINE_EXCEEDED"
    assert reply.tokens


def test_tokenize_without_a_prompt_is_refused(live):
    with grpc.insecure_channel(live.gateway) as channel:
        call = channel.unary_unary(
            "/baton.v1.InferenceService/Tokenize",
            request_serializer=inference_pb2.TokenizeRequest.SerializeToString,
            response_deserializer=inference_pb2.TokenizeResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as refused:
            call(inference_pb2.TokenizeRequest(), timeout=20)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
