"""Malformed and absurd requests get the right status and disturb nobody."""

from __future__ import annotations

import math
import threading

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos.baton.v1 import inference_pb2
from tests.system.cluster import Cluster, Reference, request, said

GENERATE = "/baton.v1.InferenceService/Generate"
BAD = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module", autouse=True)
def bystander(exact: Cluster, reference: Reference):
    """Streams that run beside all refusals, and must not notice."""
    asked = request([77, 78, 79], max_tokens=200, ignore_eos=True)
    wanted = said(reference.play(asked))
    stop = threading.Event()
    wrong: list[object] = []

    def run() -> None:
        while not stop.is_set():
            reply = exact.ask(asked)
            if reply.tokens != wanted:
                wrong.append(reply.error or reply.tokens)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        (inference_pb2.GenerateRequest(), BAD, "prompt: got none"),
        (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds()), BAD, "prompt: got 0 tokens"),
        (request(""), BAD, "prompt: got 0 tokens"),
        (request([3] * 2048), BAD, "got 2048 tokens, want at most 2047"),
        (request([3] * 5000), BAD, "got 5000 tokens, want at most 2047"),
        (request([3], max_tokens=0), BAD, "max_tokens: got 0"),
        (request([3], max_tokens=-5), BAD, "max_tokens: got -5"),
        (request([3], max_tokens=2**31 - 1), BAD, "max_tokens: got 2147483647, want at most 2047"),
        (request([3], temperature=-1.0), BAD, "temperature: got -1.0"),
        (request([3], temperature=math.nan), BAD, "temperature: got nan"),
        (request([3], temperature=math.inf), BAD, "temperature: got inf"),
        (request([3], top_p=0.0), BAD, "top_p: got 0.0"),
        (request([3], top_p=1.5), BAD, "top_p: got 1.5"),
        (request([3], top_k=-1), BAD, "top_k: got -1"),
        (request([3], seed=2**64 - 1), BAD, "seed: got"),
        (request([3, 512]), BAD, "token_ids: got 512"),
        (request([-1]), BAD, "token_ids: got -1"),
        (request([3], stop=[""]), BAD, "stop: got an empty string"),
        (request([3], stop=["x"] * 65), BAD, "stop: got 65 strings"),
        (request([3], stop_token_ids=[10**9], max_tokens=1), grpc.StatusCode.OK, ""),
        (request([3], model="other"), grpc.StatusCode.NOT_FOUND, "model: got 'other', want 'tiny'"),
    ],
)
def test_a_bad_request_is_refused_with_field_got_and_wanted(exact: Cluster, asked, code, words):
    reply = exact.ask(asked)
    assert reply.code is code
    if words:
        assert words in reply.error.details()
        assert reply.messages == []


def test_a_chat_without_a_template_is_refused(exact: Cluster):
    asked = inference_pb2.GenerateRequest()
    asked.chat.messages.append(inference_pb2.ChatMessage(role="user", content="hello"))
    reply = exact.ask(asked)
    assert reply.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "no chat template" in reply.error.details()


@pytest.mark.parametrize("payload", [b"\x1a\x02\xc3\x28", b"\xff\xff\xff\xff", b"\x22\xff\x01"])
def test_bytes_that_are_no_request_are_refused(exact: Cluster, payload: bytes):
    """Invalid UTF-8 in the text field, and garbage."""
    call = exact.channel().unary_stream(GENERATE)
    with pytest.raises(grpc.RpcError) as refused:
        list(call(payload, timeout=10))
    assert refused.value.code() is BAD
    assert "not a message" in str(refused.value.details())


def test_a_100_megabyte_message_is_refused(exact: Cluster):
    with (
        grpc.insecure_channel(exact.deployment.gateways[0], options=[("grpc.max_send_message_length", -1)]) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        list(channel.unary_stream(GENERATE)(b"\x1a" + b"x" * 100_000_000, timeout=30))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_deadline_ends_the_request_everywhere(exact: Cluster):
    reply = exact.ask(request([3], max_tokens=2000, ignore_eos=True), timeout_s=0.3)
    assert reply.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < len(reply.tokens) < 2000


def test_a_goal_that_cannot_be_met_is_refused_early_with_the_time_to_wait(exact: Cluster):
    """The prefill workers know their speed by now; a queue of long prompts makes the wait long."""
    made = [request([5] * 1900, max_tokens=1) for _ in range(24)]
    hurried = request([6] * 1900, max_tokens=1)
    hurried.slo.ttft_s = 0.02
    threads = [threading.Thread(target=exact.ask, args=(asked,)) for asked in made]
    for thread in threads:
        thread.start()
    reply = exact.ask(hurried)
    for thread in threads:
        thread.join()
    assert reply.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "refused" in reply.error.details()
    status = rpc_status.from_call(reply.error)
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToTimedelta().total_seconds() > 0


def test_a_prompt_that_fits_no_worker_is_refused_with_both_numbers(tiny, scratch):
    from tests.system.cluster import cluster

    with cluster(tiny, scratch, prefill=1, decode=1, kv_memory="800K", page_tokens=32) as small:
        room = int(small.metrics("prefill-0")["baton_pages"][("free",)]) * 32
        assert room < 2000
        reply = small.ask(request([3] * (room + 1), max_tokens=1))
        assert reply.code is BAD
        assert f"got {room + 1} tokens" in reply.error.details()
        assert f"more than {room}" in reply.error.details()
        reply = small.ask(request([3] * 100, max_tokens=room))
        assert reply.code is BAD
        assert f"got {room + 100} tokens" in reply.error.details()
        assert small.ask(request([3] * 100, max_tokens=room - 100)).code is grpc.StatusCode.OK
