"""What the processes say of themselves, and what clients see when one of them dies.

On the paced engine, whose tokens say of every page that it was right; `test_sampling.py` and `test_continuations.py`
have a decode worker killed under the model.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from runtime.streams import SILENCE_S
from tests.engine.chain import Chain
from tests.live.asks import ENDS, case
from tests.live.cluster import SECRET, Client, Reply, ask, session, together, until

SERVICE = "baton.v1.InferenceService"
PREFILLS, DECODES = ("prefill-0", "prefill-1"), ("decode-0", "decode-1")
LONG = case(3700, 40, 1, forever=True)
STREAM = case(90, 1200, 3, forever=True, temperature=0.9, seed=4)


@pytest.fixture(scope="module")
def reference(model):
    """What `pairs` must generate, to the bit."""
    return Chain.of(model, 320, 8192, (0, *ENDS))


@pytest.fixture(scope="module")
def started(launch, model):
    """Two prefill and two decode workers: whoever dies, another can take it."""
    live = launch("pairs", model, prefill=2, decode=2, engine="paced", pace=0.5, hash_logits=True, chunk_tokens=32)
    live.torn = True
    yield live
    live.stop()


@pytest.fixture
def pairs(started):
    """All of `started`; who was killed in the last test has been started again."""
    started.restart(*started.deployment.ended())
    return started


def check(channel, service):
    """One service's health on a channel."""
    request = health_pb2.HealthCheckRequest(service=service)
    response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=20)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


def generate(live, request):
    """The reply to one request."""

    async def run():
        async with Client(live.gateway) as client:
            return await client.generate(request)

    return asyncio.run(run())


def exact(each, reply, reference):
    """Token by token and bit by bit what one engine says."""
    each.check(reply, reference)
    assert reply.hashes == reference.hashes(each.prompt, each.sampling)


def test_a_gateway_serves_once_its_workers_do(pairs):
    for name in (*DECODES, "gateway-0"):
        pairs.kill(name, signal.SIGKILL)
    pairs.revive("gateway-0")
    services = ("", SERVICE, "readiness", "liveness")
    with grpc.insecure_channel(pairs.gateway) as channel:
        seen = [check(channel, service) for service in services]
    assert seen == ["NOT_SERVING", "NOT_SERVING", "NOT_SERVING", "SERVING"]
    pairs.restart(*DECODES)
    assert [pairs.health(pairs.gateway, service) for service in services] == ["SERVING"] * 4
    for each in pairs.deployment.running.values():
        assert pairs.health(each.address) == "SERVING"


def test_a_prefill_worker_killed_in_mid_prefill_is_replaced_unseen(pairs, reference):
    def computing(name):
        return pairs.metric(name, "baton_requests", phase="prefill", state="running") > 0

    async def run():
        async with Client(pairs.gateway) as client:
            going = asyncio.create_task(client.generate(LONG.request))
            await asyncio.to_thread(until, lambda: computing("prefill-0"), "its prompt is being computed")
            pairs.kill("prefill-0", signal.SIGKILL)  # of two idle workers, the first by name is taken
            return going.done(), await going

    done, reply = asyncio.run(run())
    assert not done
    exact(LONG, reply, reference)
    assert reply.last.attempts == 2
    pairs.wait_empty()


def test_a_decode_worker_killed_in_mid_stream_is_replaced_unseen(pairs, reference):
    each = STREAM

    async def run():
        async with Client(pairs.gateway) as client:
            reply = Reply()
            stream = client.responses(each.request, reply)
            while len(reply.tokens) < 20:
                reply.take(await anext(stream))
            pairs.kill("decode-0", signal.SIGKILL)  # of two idle workers, the first by name is taken
            async for response in stream:
                reply.take(response)
            return reply

    reply = asyncio.run(run())
    exact(each, reply, reference)
    assert reply.last.attempts == 2
    pairs.wait_empty()


def test_requests_in_every_phase_survive_the_loss_of_a_worker_of_each_kind(pairs, reference):
    cases = [case(20 + 70 * n, 60 + 30 * n, n, forever=True) for n in range(14)]

    async def run():
        async with Client(pairs.gateway) as client:
            first = Reply()
            stream = client.responses(cases[0].request, first)
            others = asyncio.create_task(together(*(client.generate(each.request) for each in cases[1:])))
            first.take(await anext(stream))
            pairs.kill("prefill-1", signal.SIGKILL)
            pairs.kill("decode-0", signal.SIGKILL)
            async for response in stream:
                first.take(response)
            return [first, *await others]

    replies = asyncio.run(run())
    for each, reply in zip(cases, replies, strict=True):
        exact(each, reply, reference)
    assert max(reply.last.attempts for reply in replies) > 1
    pairs.wait_empty()


def test_the_loss_of_every_prefill_worker_leaves_running_streams_alone(pairs, reference):
    each = STREAM

    async def run():
        async with Client(pairs.gateway) as client:
            reply = Reply()
            stream = client.responses(each.request, reply)
            while len(reply.tokens) < 20:
                reply.take(await anext(stream))
            for name in ("prefill-0", "prefill-1"):
                pairs.kill(name, signal.SIGKILL)
            await asyncio.to_thread(until, lambda: pairs.health(pairs.gateway) == "NOT_SERVING", "it takes nothing new")
            async for response in stream:
                reply.take(response)
            return reply

    reply = asyncio.run(run())
    exact(each, reply, reference)
    assert reply.last.attempts == 1
    assert generate(pairs, each.request).code == "UNAVAILABLE"
    pairs.wait_empty()


def test_a_decode_worker_that_stood_still_does_not_leave_its_streams_hanging(pairs, reference):
    each = STREAM

    async def run():
        async with Client(pairs.gateway) as client:
            reply = Reply()
            stream = client.responses(each.request, reply)
            while len(reply.tokens) < 20:
                reply.take(await anext(stream))
            pairs.kill("decode-0", signal.SIGSTOP)  # of two idle workers, the first by name is taken
            await asyncio.sleep(4.5)
            pairs.kill("decode-0", signal.SIGCONT)
            async for response in stream:
                reply.take(response)
            return reply

    exact(each, asyncio.run(run()), reference)
    pairs.wait_empty()
    pairs.restart()


def test_who_has_no_time_to_wait_for_a_worker_that_stands_still_goes_on_elsewhere(pairs, reference):
    """Its deadline is before anybody is given up for silence."""
    each = case(90, 150, 5, forever=True)

    async def run():
        async with Client(pairs.gateway) as client:
            reply = Reply()
            stream = client.responses(each.request, reply, SILENCE_S - 0.1)
            while len(reply.tokens) < 20:
                reply.take(await anext(stream))
            pairs.kill("decode-0", signal.SIGSTOP)
            async for response in stream:
                reply.take(response)
            return reply

    reply = asyncio.run(run())
    pairs.kill("decode-0", signal.SIGCONT)
    exact(each, reply, reference)
    assert reply.last.attempts == 2
    pairs.wait_empty()


def test_without_a_decode_worker_a_gateway_says_so_soon(pairs, reference):
    each = STREAM
    for name in DECODES:
        pairs.kill(name, signal.SIGKILL)
    until(lambda: pairs.health(pairs.gateway) == "NOT_SERVING", "the gateway is not ready")
    assert pairs.health(pairs.gateway, SERVICE) == "NOT_SERVING"
    assert pairs.health(pairs.gateway, "liveness") == "SERVING"
    started = time.monotonic()
    reply = generate(pairs, each.request)
    assert reply.code == "UNAVAILABLE"
    assert "no decode worker is ready" in reply.details
    assert time.monotonic() - started < 10, "after a moment in which one might have come back, not at a deadline"
    pairs.restart(*DECODES)
    assert pairs.health(pairs.gateway) == "SERVING"
    exact(each, generate(pairs, each.request), reference)


def test_reflection_lists_the_services(pairs):
    with grpc.insecure_channel(pairs.gateway) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = stub.ServerReflectionInfo(iter([request]), timeout=20)
        wanted = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        (described,) = stub.ServerReflectionInfo(iter([wanted]), timeout=20)
    names = {service.name for service in response.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert any(b"GenerateRequest" in file for file in described.file_descriptor_response.file_descriptor_proto)


def test_every_process_shows_its_metrics(pairs):
    generate(pairs, ask(f"{SECRET} for metrics", 5))
    shown = {
        name: {
            sample.name for family in text_string_to_metric_families(pairs.scrape(name)) for sample in family.samples
        }
        for name in pairs.deployment.running
    }
    assert all(name.startswith("baton_") for names in shown.values() for name in names)
    gateway = {"baton_request_ttft_seconds_bucket", "baton_inter_token_latency_seconds_bucket"}
    gateway |= {"baton_request_e2e_seconds_count", "baton_stage_latency_seconds_bucket", "baton_requests_total"}
    worker = {"baton_requests", "baton_pages", "baton_pages_promised", "baton_pulled_bytes", "baton_loop_lag_seconds"}
    assert gateway <= shown["gateway-0"]
    for name in (*PREFILLS, *DECODES):
        assert worker <= shown[name]
    for name in DECODES:
        assert {"baton_lane_gbytes_per_second", "baton_decode_step_seconds_bucket"} <= shown[name]
        lanes = [dict(labels)["source"] for key, labels in pairs.metrics(name) if key == "baton_lane_gbytes_per_second"]
        assert sorted(lanes) == [*PREFILLS]
    assert "baton_members" in shown["coordinator"]


def test_logs_are_json_lines_that_name_who_and_what_but_no_prompt(pairs):
    name = "req-for-the-log"
    reply = generate(pairs, ask(f"{SECRET} is not for the log", 4, request_id=name))
    assert reply.code == "OK"
    until(lambda: any(line["request"] == name for line in pairs.lines()), "the request is logged")
    lines = pairs.lines()
    for line in lines:
        assert {"time", "level", "worker", "incarnation", "request", "message"} <= line.keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("info", "warning")
        assert re.fullmatch(r"[0-9a-f]{12}|", line["incarnation"])
    assert {line["worker"] for line in lines} == pairs.deployment.running.keys()
    logged = next(line for line in lines if line["request"] == name)
    assert logged["worker"] == "gateway-0"
    assert SECRET not in pairs.log.read_text()
    assert reply.text.strip() == "" or reply.text not in logged["message"]


def test_processes_end_with_their_launcher(launch, model):
    """A launcher that was killed closes their standard input; nothing else tells them."""
    live = launch("orphans", model, mixed=1, prefill=0, decode=0, engine="paced")
    lives = list(live.deployment.running.values())
    for each in lives:
        assert each.process.stdin is not None
        each.process.stdin.close()
    until(lambda: all(each.process.poll() is not None for each in lives), "all have ended")
    assert [each.process.returncode for each in lives] == [0] * len(lives)
    assert not [pid for each in lives for pid in session(each.process.pid)]
    live.deployment.stop()
