"""Two groups of paced workers and the one of requests that name none: each request is served where it says.

That a group's pages are read by nobody else shows at every end: in the lanes that were made, the streams that were
opened, the tokens (each is drawn from the bytes of its pages) and the pages that came to whom.
"""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest

from control.client import members
from control.state import State
from control.status import get_workers
from core.group import Group
from protos.baton.v1 import registry_pb2, registry_pb2_grpc
from tests.engine.chain import Chain
from tests.live.asks import ENDS, case
from tests.live.cluster import Client, until

CHAT, CODE = Group("chat", prefill=1, decode=2, ttft_s=30.0), Group("code", prefill=1, decode=1)


@pytest.fixture(scope="module")
def grouped(launch, model):
    live = launch("groups", model, prefill=1, decode=1, group=(CHAT, CODE), engine="paced", stop_rate=0.01)
    yield live
    live.stop()


@pytest.fixture(scope="module")
def reference(model):
    return Chain.of(model, 320, 8192, (0, *ENDS), 0.01)


def group_of(name):
    return next((group.name for group in (CHAT, CODE) if name.startswith(group.name)), "")


def test_lanes_are_within_groups_and_complete_there(grouped):
    lanes = {
        (member.identity.split("#")[0], lane.source.split("#")[0])
        for member in members(grouped.deployment.coordinator)
        for lane in member.lanes
    }
    assert lanes == {
        ("decode-0", "prefill-0"),
        ("chat-decode-0", "chat-prefill-0"),
        ("chat-decode-1", "chat-prefill-0"),
        ("code-decode-0", "code-prefill-0"),
    }
    assert grouped.metric("coordinator", "baton_transfer_map_version") > 0
    for each in grouped.workers:
        assert grouped.metric(each.name, "baton_transfer_map_version") > 0
        assert grouped.metric(each.name, "baton_ways") == (2 if each.name == "chat-prefill-0" else 1)


def test_a_request_is_served_where_it_says(grouped, reference):
    before = {each.name: grouped.metric(each.name, "baton_prefill_tokens") for each in grouped.workers}
    cases = [case(40 + 9 * n, 12, n) for n in range(12)]
    groups = [("", "chat", "code")[n % 3] for n in range(12)]
    for each, group in zip(cases, groups, strict=True):
        each.request.hints.group = group

    async def run():
        async with Client(grouped.gateway) as client:
            return await asyncio.gather(*(client.generate(each.request) for each in cases))

    replies = asyncio.run(run())
    for each, group, reply in zip(cases, groups, replies, strict=True):
        each.check(reply, reference)
        workers = {stage.worker for stage in reply.last.stages} - {"gateway-0"}
        assert workers
        assert {group_of(worker) for worker in workers} == {group}
    for name in ("prefill-0", "chat-prefill-0", "code-prefill-0"):
        own = sum(len(each.prompt) for each, group in zip(cases, groups, strict=True) if group == group_of(name))
        assert grouped.metric(name, "baton_prefill_tokens") - before[name] == own
    grouped.wait_empty()


def test_a_group_that_is_not_there_is_refused_with_the_names_of_those_that_are(grouped):
    each = case(20, 5, 1)
    each.request.hints.group = "cats"

    async def run():
        async with Client(grouped.gateway) as client:
            return await client.generate(each.request)

    reply = asyncio.run(run())
    assert (reply.code, reply.tokens) == ("NOT_FOUND", [])
    assert reply.details == "hints.group: got 'cats', want one of '', 'chat', 'code'"


def test_one_groups_workers_may_go_and_the_others_serve_on(grouped, reference):
    """What waits for a group is not given to another; the workers come back, and so does the group."""
    grouped.kill("code-decode-0", 9)
    lone, other = case(60, 8, 3), case(61, 8, 4)
    lone.request.hints.group, other.request.hints.group = "code", "chat"

    async def run():
        async with Client(grouped.gateway) as client:
            return await asyncio.gather(client.generate(lone.request), client.generate(other.request))

    refused, served = asyncio.run(run())
    assert refused.code == "UNAVAILABLE"
    assert refused.details == "no prefill and no decode worker is ready", "one that cannot hand over takes nothing"
    other.check(served, reference)
    grouped.restart("code-decode-0")
    again, _ = asyncio.run(run())
    lone.check(again, reference)
    grouped.wait_empty()


def test_a_worker_that_the_map_takes_elsewhere_is_parted_with_and_met_again(grouped, reference):
    """Somebody registers decode-0 for another group, and for its own again: streams and lanes follow the map."""
    coordinator = grouped.deployment.coordinator
    (own,) = [each for each in members(coordinator) if each.identity.startswith("decode-0#")]
    other = type(own)()
    other.CopyFrom(own)
    other.group = "elsewhere"
    version = grouped.metric("coordinator", "baton_transfer_map_version")

    def register(member):
        with grpc.insecure_channel(coordinator) as channel:
            registry_pb2_grpc.RegistryServiceStub(channel).Register(registry_pb2.RegisterRequest(member=member))

    def ways():
        return [grouped.metric(name, "baton_ways") for name in ("prefill-0", "decode-0", "chat-prefill-0")]

    async def ask():
        async with Client(grouped.gateway) as client:
            return await client.generate(case(50, 8, 5).request)

    register(other)
    until(lambda: ways() == [0, 0, 2], "they have parted", more=ways)
    assert grouped.metric("coordinator", "baton_transfer_map_version") > version
    assert grouped.metric("decode-0", "baton_transfer_map_version") > version
    refused = asyncio.run(ask())
    assert (refused.code, refused.details) == ("UNAVAILABLE", "no prefill and no decode worker is ready")
    register(own)
    until(lambda: ways() == [1, 1, 2], "they have met again", more=ways)
    grouped.wait_ready()
    case(50, 8, 5).check(asyncio.run(ask()), reference)
    grouped.wait_empty()


def test_workers_are_shown_by_group(grouped, capsys):
    until(lambda: all(m.ready for m in members(grouped.deployment.coordinator)), "all are ready")
    where = State(0, grouped.deployment.coordinator, [], "tiny", "")
    assert get_workers(where, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)["workers"]
    assert [(each["group"], each["name"]) for each in found] == [
        ("", "decode-0"),
        ("", "prefill-0"),
        ("chat", "chat-decode-0"),
        ("chat", "chat-decode-1"),
        ("chat", "chat-prefill-0"),
        ("code", "code-decode-0"),
        ("code", "code-prefill-0"),
    ]
    assert all(group_of(source) == each["group"] for each in found for source in each["reads_from"])
