"""What several processes say of one request becomes one entry, and times on the command line are read."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from control import requests
from control.cli import _duration
from control.client import waterfall
from control.requests import gathered
from core.request import Phase, Stage
from core.worker import Role
from gateway.replies import Replies
from gateway.traces import Traces
from protos.baton.v1 import inference_pb2, inspect_pb2
from scheduler.groups import Groups
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, End, WorkerUp
from tests.cast import D1, GATEWAY, P1, ask, worker


def word(machine: str, key: str = "k", request: str = "", age_s: float = 1.0, **more) -> inspect_pb2.Standing:
    return inspect_pb2.Standing(key=key, request_id=request, machine=machine, age_s=age_s, **more)


def test_the_words_about_one_request_come_together_and_its_owner_is_named():
    found = gathered(
        [
            ("decode-0", word("sink", age_s=1.0, left_s=9.0)),
            ("prefill-0", word("source", age_s=2.0, left_s=8.0)),
            ("prefill-0", word("prefill", request="r", age_s=2.5, left_s=7.0)),
            ("gateway-0", word("router", request="r", age_s=3.0, left_s=30.0, owner="prefill-0")),
            ("gateway-0", word("client", "", "r", age_s=3.0)),
        ]
    )
    (asked,) = found
    assert (asked.request_id, asked.age_s, asked.left_s, asked.owner) == ("r", 3.0, 30.0, "prefill-0/prefill")
    assert [each.machine for _, each in asked.at] == ["router", "prefill", "source", "sink", "client"]
    lines = requests._table(found)
    assert [line.split()[0] for line in lines[2:]] == [
        "*prefill-0/prefill",
        "prefill-0/source",
        "decode-0/sink",
        "gateway-0/client",
    ]
    assert lines[1].startswith("r ")


def test_what_no_gateway_owns_is_listed_all_the_same_and_the_oldest_is_first():
    young, old = (word("decode", key, key, age_s) for key, age_s in (("young", 1.0), ("old", 5.0)))
    found = gathered([("decode-0", young), ("decode-0", old)])
    assert [(each.request_id, each.owner, each.left_s) for each in found] == [
        ("old", "decode-0/decode", None),
        ("young", "decode-0/decode", None),
    ]
    (ended,) = gathered([("gateway-0", word("client", "", "r", 3.0))])
    assert (ended.request_id, ended.key, ended.owner) == ("r", "", "gateway-0/client")


def test_two_continuations_of_one_request_are_two_entries():
    words = [("gateway-0", word("router", key, "r", owner="gateway-0")) for key in ("a", "b")]
    assert [each.key for each in gathered([*words, ("gateway-0", word("client", "", "r"))])] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("10s", 10.0), ("500ms", 0.5), ("2m", 120.0), ("1h", 3600.0), ("7", 7.0), ("0.5", 0.5)]
)
def test_a_time_has_units(text, seconds):
    assert _duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "10d", "1ss", "nan", "inf", "1e999s", "ten"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="want a time such as"):
        _duration(text)


def test_a_waterfall_names_attempts_from_the_second_on():
    stages = [
        inference_pb2.End().stages.add(name="queued", worker="g", seconds=1),
        inference_pb2.End().stages.add(name="decode", worker="d", seconds=2, detail={"steps": "3", "attempt": "2"}),
    ]
    one, two = waterfall(inference_pb2.End(stages=stages))
    assert "attempt" not in one
    assert two.endswith("3 steps, attempt 2")


def test_a_waterfall_says_who_gave_pages_and_who_did_not():
    came = {"from": "decode-0", "nbytes": "8192", "gbytes_per_s": "2.5", "transport": "ucx: cma"}
    stages = [
        inference_pb2.End().stages.add(name="fetch", worker="p", seconds=1, detail=came),
        inference_pb2.End().stages.add(
            name="fetch", worker="p", seconds=1, detail={"from": "d", "failed": "d was lost"}
        ),
    ]
    one, two = waterfall(inference_pb2.End(stages=stages))
    assert one.endswith("8 kB from decode-0, 2.5 GB/s, ucx: cma")
    assert two.endswith("from d: d was lost")


def router() -> Groups:
    machine = Groups(Router(GATEWAY, RouterConfig()))
    for member in (worker(P1, Role.PREFILL), worker(D1, Role.DECODE)):
        machine.on(WorkerUp(member), 0.0)
    return machine


def test_the_last_ends_are_kept_and_no_more():
    machine = router()
    traces = Traces(machine, lambda: 9.0, kept=2)
    replies = Replies([])
    for name in ("a", "b", "c", "b"):
        end = End(1, Phase.DONE, "stop", cached_tokens=4, stages=(Stage("queued", "g", 0.5),))
        traces.ended(replace(ask(), id=name), end, 2.0, replies)
    assert len(traces) == 2
    assert traces.past("a") is None
    said = traces.past("c")
    assert said is not None
    assert (said.running, said.phase, said.code, said.end.cached_tokens, said.total_s) == (False, "done", "OK", 4, 2.0)
    assert [each.name for each in said.end.stages] == ["queued", "total"]


def test_a_live_request_is_traced_as_far_as_it_has_come():
    machine = router()
    traces = Traces(machine, lambda: 12.0)
    machine.on(Arrived(1, ask()), 10.0)
    said = traces.live(1, ask(), 10.0)
    assert said is not None
    assert (said.running, said.phase, said.total_s) == (True, "offered", 2.0)
    assert traces.live(2, ask(), 10.0) is None
