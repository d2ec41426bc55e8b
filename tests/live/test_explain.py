"""What an operator learns of a running deployment, and its recording: replayed alike, found out where a policy differs,
and simulated."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path

import grpc
import pytest

from control import replay, requests
from control.state import State
from protos.baton.v1 import inspect_pb2, inspect_pb2_grpc
from runtime.inspection import here
from scheduler.decode_policy import DecodePolicy
from sim import traces
from tests.live.asks import case
from tests.live.cluster import LATE_S, MODEL, Client, Live, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def slow(launch, model, folder):
    """Recorded; two prefill and two decode workers that take 20 times as long, and memory for one long request each."""
    settings = {"engine": "paced", "pace": 20.0, "kv_memory": "256K", "prefill": 2, "decode": 2, "migrate": True}
    live = launch("slow", model, record=str(folder), **settings)
    live.torn = True
    yield live
    if live.deployment.running:
        live.stop()


def state(live: Live) -> State:
    return State(0, live.deployment.coordinator, live.deployment.gateways, MODEL, str(live.log))


def listed(live: Live, capsys, older_s: float = 0.0) -> dict[str, dict]:
    """What `get requests` prints, by the requests' names."""
    capsys.readouterr()
    assert requests.get_requests(state(live), older_s=older_s, as_json=True) == 0
    return {each["request_id"]: each for each in json.loads(capsys.readouterr().out)["requests"]}


def traced(live: Live, name: str, capsys) -> dict:
    capsys.readouterr()
    assert requests.trace(state(live), name, as_json=True) == 0
    return json.loads(capsys.readouterr().out)


def words(found: dict) -> str:
    return "; ".join(
        f"{each['process']}/{each['machine']} {each['state']}: {each['waits_for']}" for each in found["at"]
    )


def test_a_held_request_names_what_holds_it_and_all_are_traced(slow, capsys):
    long = {f"long-{n}": case(20, 700, n, forever=True, request_id=f"long-{n}") for n in range(2)}
    held = case(20, 700, 7, forever=True, request_id="held")

    async def run():
        async with Client(slow.gateway) as client:
            first = [asyncio.create_task(client.generate(each.request)) for each in long.values()]
            running = asyncio.to_thread(
                until, lambda: slow.phases().get("decoding") == 2, "both decode", LATE_S, slow.phases
            )
            await running
            last = asyncio.create_task(client.generate(held.request))
            names = {*long, "held"}
            await asyncio.to_thread(until, lambda: names <= listed(slow, capsys).keys(), "all three are listed")

            def waits() -> bool:
                return "memory" in words(listed(slow, capsys)["held"])

            await asyncio.to_thread(until, waits, "it waits for memory", LATE_S, lambda: listed(slow, capsys))
            found = await asyncio.to_thread(listed, slow, capsys)
            told = found["held"]
            assert re.search(r"decode-\d/decode waiting: memory: .*pages", words(told)), words(told)
            assert told["owner"].split("/")[0].startswith("prefill"), told
            assert 0 < told["left_s"] < 102
            assert told["age_s"] < found["long-0"]["age_s"]
            assert found["long-0"]["owner"].startswith("decode-"), found["long-0"]
            assert found["long-0"]["tokens"] > 0
            old = await asyncio.to_thread(listed, slow, capsys, (told["age_s"] + found["long-1"]["age_s"]) / 2)
            assert "long-0" in old

            now = await asyncio.to_thread(traced, slow, "long-0", capsys)
            assert now["running"]
            assert (now["phase"], now["end"]["attempts"]) == ("decoding", 1)
            assert [each["name"] for each in now["end"]["stages"]][:2] == ["queued", "offered"]
            assert [each["request_id"] for each in now["requests"]] == ["long-0"]

            for number in range(2):
                slow.kill(f"decode-{number}", signal.SIGUSR1)
            for task in (*first, last):
                task.cancel()
            await asyncio.gather(*first, last, return_exceptions=True)

    asyncio.run(run())
    slow.wait_empty()

    def gone() -> bool:
        return not listed(slow, capsys)

    until(gone, "nobody is in flight")
    end = traced(slow, "long-0", capsys)
    assert (end["running"], end["phase"], end["code"]) == (False, "cancelled", "CANCELLED")
    with pytest.raises(Exception, match="no gateway has 'nobody'"):
        requests.trace(state(slow), "nobody", as_json=True)

    # Both workers wrote their stacks and states at the signal, and served on.
    def dumped() -> bool:
        said = {line["worker"] for line in slow.lines() if line["message"].startswith("pages: ")}
        return {"decode-0", "decode-1"} <= said

    until(dumped, "both wrote what is inside")
    log = slow.log.read_text()
    for number in range(2):
        lines = [line for line in slow.lines() if line["worker"] == f"decode-{number}"]
        assert any(line["logger"] == "foreign" and "most recent call first" in line["message"] for line in lines)
        parts = {line["message"].partition(":")[0]: line for line in lines if line["logger"] == "baton.inspection"}
        assert parts.keys() == {"threads", "tasks", "machines", "pages"}
        pages = json.loads(parts["pages"]["message"].partition(": ")[2])
        assert sum(pages["owners"].values()) == pages["total"]
        assert "engine" in parts["threads"]["message"]
    assert str(list(held.prompt))[1:-1] not in log, "a prompt was logged"


def test_debug_says_what_is_inside_without_prompts(slow, capsys):
    for name in ("decode-0", "prefill-1", "gateway-0", "coordinator"):
        capsys.readouterr()
        assert requests.debug(state(slow), name, as_json=True) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["machines"]["unwritten"] == {}
        assert any(thread.startswith("MainThread") for thread in document["threads"])
        assert document["tasks"]
        assert (document["pages"] is None) == (name in ("gateway-0", "coordinator"))
        assert requests.debug(state(slow), name, as_json=False) == 0
        assert "machine " in capsys.readouterr().out


def test_who_stands_still_is_named(slow, capsys, monkeypatch):
    monkeypatch.setattr(requests, "ANSWER_S", 1.0)
    slow.kill("prefill-1", signal.SIGSTOP)
    try:
        assert requests.get_requests(state(slow), older_s=0.0, as_json=True) == 1
        said = json.loads(capsys.readouterr().out)
        assert [each.partition(" ")[0] for each in said["silent"]] == ["prefill-1"]
    finally:
        slow.kill("prefill-1", signal.SIGCONT)
    slow.wait_ready()


def test_a_gateway_answers_only_this_machine():
    assert all(here(each) for each in ("ipv4:127.0.0.1:80", "ipv6:%5B::1%5D:80", "ipv6:[::1]:9", "unix:/tmp/x"))
    assert not any(here(each) for each in ("ipv4:10.0.0.1:80", "ipv6:%5Bfe80::1%5D:80", "ipv4:1127.0.0.1:1", ""))


def test_a_recording_decides_the_same_again_and_a_changed_policy_is_found(slow, folder, capsys, monkeypatch):
    """Crowds, cancels, a worker that is killed and one that stands still: every decision is made again."""
    cases = [case(1 + 7 * n % 91, 5 + 3 * n % 23, n, request_id=f"crowd-{n}") for n in range(24)]

    async def run():
        async with Client(slow.gateway) as client:
            tasks = [asyncio.create_task(client.generate(each.request)) for each in cases]
            await asyncio.sleep(0.3)
            tasks[3].cancel()
            slow.kill("decode-1", signal.SIGKILL)
            return await asyncio.gather(*tasks, return_exceptions=True)

    replies = asyncio.run(run())
    lengths = {len(reply.tokens) for reply in replies if not isinstance(reply, BaseException)}
    with grpc.insecure_channel(slow.gateway) as channel:
        stub = inspect_pb2_grpc.InspectServiceStub(channel)
        attempts = {
            stub.Trace(inspect_pb2.TraceRequest(request_id=f"crowd-{n}")).end.attempts for n in range(24) if n != 3
        }
    assert max(attempts) > 1, "nobody was placed again"
    slow.stop()

    paths = sorted(folder.glob("*.jsonl"))
    assert len(paths) == 6
    done = [replay.replayed(path) for path in paths]
    assert [each.difference for each in done] == [None] * 6
    by = {each.process.partition("#")[0]: each for each in done}
    assert by["decode-1"].ended is None, "it was killed"
    assert {each.ended for name, each in by.items() if name != "decode-1"} == {"the process ended"}
    assert min(by["decode-0"].events[seat] for seat in ("decode", "sink", "lanes")) > 0
    assert by["gateway-0"].events["router"] > 100

    workload = traces.read(folder)
    assert len(workload.arrivals) in (24, 24 + 3), "the crowd, and those held before if that test ran"
    assert {each.prompt for each in workload.arrivals} >= {len(each.prompt) for each in cases}
    assert lengths <= {each.output for each in workload.arrivals}
    assert {each.block_tokens for each in workload.arrivals} <= {0, 16}

    # A policy that looks at one row fewer decides otherwise, and the event is named.
    room = DecodePolicy._may_join
    monkeypatch.setattr(DecodePolicy, "_may_join", lambda self: len(self._batch) < 1 and room(self))
    (path,) = folder.glob("decode-0-*.jsonl")
    capsys.readouterr()
    assert replay.replay([str(path)], as_json=True) == 1
    (said,) = json.loads(capsys.readouterr().out)["replays"]
    assert not said["same"]
    different = said["difference"]
    assert different["machine"] == "decode"
    assert different["recorded"] != different["replayed"]
    line = path.read_text().splitlines()[different["line"] - 1]
    assert json.loads(line)[1:3] == ["decode", different["event"]]
