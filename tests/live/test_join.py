"""Who cannot belong hears so when it joins or greets, in one sentence; those who serve do not notice."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import grpc
import pytest

from control.client import members
from control.launcher import environment
from core.config import to_json
from core.worker import PROTOCOL_VERSION, Greeting, Identity
from protos.baton.v1 import registry_pb2, registry_pb2_grpc, worker_pb2, worker_pb2_grpc
from runtime import wire
from tests.live.asks import case
from tests.live.cluster import LATE_S, Client

STRANGER = Identity("stranger", 0x5)


@pytest.fixture(autouse=True)
def undisturbed(live, reference):
    """The members are those from before, and serve."""
    before = {member.identity for member in members(live.deployment.coordinator)}
    yield
    assert {member.identity for member in members(live.deployment.coordinator)} == before

    async def run():
        each = case(40, 20, 3)
        async with Client(live.gateway) as client:
            each.check(await client.generate(each.request), reference)

    asyncio.run(run())


def member_like(live, name):
    """What a worker would say that is like the one of this name."""
    body = next(each for each in members(live.deployment.coordinator) if each.identity.startswith(f"{name}#"))
    return replace(wire.member_from(body), identity=STRANGER)


def test_a_worker_of_another_layout_ends_with_the_sentence(live):
    wrong: dict[str, dict[str, Any]] = {
        "kv.page_tokens: got 24 from stranger, want a multiple or a divisor of 16 as": {"page_tokens": 24},
        "kv.dtype: got bfloat16 from stranger, want float32 as": {"dtype": "bfloat16"},
    }
    config = live.deployment.running["decode-0"].config
    started = {
        want: subprocess.Popen(
            [sys.executable, "-m", "control.process", to_json(replace(config, name="stranger", **settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(1),
        )
        for want, settings in wrong.items()
    }
    try:
        for want, process in started.items():
            assert process.wait(3 * LATE_S) == 6
            assert process.stdout is not None
            error = json.loads(process.stdout.read().splitlines()[-1])["error"]
            assert re.match(rf"the coordinator refused: {re.escape(want)} \w+-\d has", error), error
            assert "\n" not in error
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"protocol": PROTOCOL_VERSION + 1}, f"protocol: got {PROTOCOL_VERSION + 1} from stranger"),
        ({"fingerprint": "0"}, "fingerprint: got 0 from stranger, want "),
        ({"role": "chef"}, "role: got 'chef', want "),
    ],
)
def test_the_coordinator_says_at_once_why_it_admits_nobody_like_that(live, change, want):
    body = wire.registry_member(member_like(live, "decode-0"))
    for field, value in change.items():
        setattr(body, field, value)
    with grpc.insecure_channel(live.deployment.coordinator) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Register(registry_pb2.RegisterRequest(member=body), timeout=LATE_S)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.value.details().startswith(want), refused.value.details()


@pytest.mark.parametrize(
    ("method", "like", "change", "want"),
    [
        ("Peer", "decode-0", {"protocol": 99}, f"protocol: got 99 from {STRANGER}, want {PROTOCOL_VERSION} as we have"),
        ("Peer", "decode-0", {"page_tokens": 24}, "kv.page_tokens: got 24 from stranger, want a multiple or a divisor"),
        ("Peer", "decode-0", {"transport": "mail"}, "transport: got mail from stranger, want "),
        ("Session", "gateway-0", {"protocol": 99}, f"protocol: got 99 from {STRANGER}, want "),
        ("Session", "gateway-0", {"fingerprint": "0"}, "fingerprint: got 0 from stranger, want "),
        ("Session", "decode-0", {}, "role: got decode on a gateway's stream"),
    ],
)
def test_a_greeting_that_cannot_match_is_answered_with_the_sentence(live, method, like, change, want):
    frame = wire.hello(Greeting(member_like(live, like)))
    for field, value in change.items():
        setattr(frame.hello.kv if field == "page_tokens" else frame.hello, field, value)
    request = worker_pb2.PeerRequest if method == "Peer" else worker_pb2.SessionRequest
    with grpc.insecure_channel(live.deployment.running["prefill-0"].address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        answers = getattr(stub, method)(iter([request(frames=[frame])]), timeout=LATE_S)
        said = [frame for answer in answers for frame in answer.frames]
    assert [each.WhichOneof("body") for each in said] == ["hello", "goodbye"]
    assert said[-1].goodbye.reason.startswith(want), said[-1].goodbye.reason
