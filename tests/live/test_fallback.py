"""UCX takes TCP without a word where it cannot read a peer's memory: workers, `baton status` and `doctor` say so."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from control import state
from control.client import members
from control.doctor import _lanes
from control.status import status
from core.worker import fell_back
from tests.engine.chain import Chain
from tests.live.asks import ENDS, case
from tests.live.cluster import Client, until

HERE = "127.0.0.1:4000"
WORD = "though it is on this host"


@pytest.mark.parametrize(
    ("transport", "reader", "source", "fell"),
    [
        ("ucx: tcp/lo emulated", HERE, "127.0.0.1:4001", True),
        ("ucx: cma/memory or tcp/lo emulated", HERE, "127.0.0.1:4001", True),
        ("ucx: tcp/eth0 emulated", "[fd00::1]:4000", "[fd00::1]:4001", True),
        ("ucx: tcp/eth0 emulated", "10.0.0.1:4000", "10.0.0.2:4000", False),
        ("ucx: tcp/eth0 emulated", "", "", False),
        ("ucx: cma/memory", HERE, "127.0.0.1:4001", False),
        ("ucx: rc_mlx5/mlx5_0:1", HERE, "127.0.0.1:4001", False),
        ("zeromq: tcp", HERE, "127.0.0.1:4001", False),
    ],
)
def test_what_is_a_fallback(transport, reader, source, fell):
    assert fell_back(transport, reader, source) is fell


def shown(live):
    """The lanes of a deployment with what each worker's gauge says."""
    return {
        (each.name, dict(labels)["source"], dict(labels)["transport"]): value
        for each in live.workers
        for (key, labels), value in live.metrics(each.name).items()
        if key == "baton_lane_fallback"
    }


def test_tcp_between_workers_of_one_host_is_said(launch, model, tmp_path: Path, capsys):
    live = launch(
        "fallback", model, engine="paced", pace=0.0, transport="nixl", mixed=1, how={"env": {"UCX_TLS": "tcp"}}
    )
    try:
        each = case(300, 30, forever=True)

        async def run():
            async with Client(live.gateway) as client:
                return await client.generate(each.request)

        each.check(asyncio.run(run()), Chain.of(model, 320, 8192, (0, *ENDS)))
        pairs = {("decode-0", "prefill-0"), ("decode-0", "mixed-0"), ("mixed-0", "prefill-0"), ("mixed-0", "mixed-0")}
        until(lambda: all(shown(live).values()), "all workers know where all others are")
        lanes = shown(live)
        assert {key[:2] for key in lanes} == pairs
        assert all("tcp" in transport and value == 1 for (*_, transport), value in lanes.items()), lanes
        warnings = [line for line in live.lines() if line["level"] == "warning" and WORD in line["message"]]
        assert len(warnings) == len(lanes)

        word = state.State(1, live.deployment.coordinator, live.deployment.gateways, "tiny", str(live.log))
        assert status(word, as_json=False) == 0
        assert capsys.readouterr().out.count("FALLBACK") == len(lanes)
        assert status(word, as_json=True) == 0
        told = [lane for row in json.loads(capsys.readouterr().out)["members"] for lane in row.get("lanes", [])]
        assert [lane["fallback"] for lane in told] == [True] * len(lanes)
        state.make(tmp_path)
        with state.lock(tmp_path):
            state.write(tmp_path, word)
            found = list(_lanes(tmp_path))
        assert len(found) == len(lanes)
        assert all(not one.ok and "fell back to TCP on one host" in one.advice for one in found)
    finally:
        live.stop()


def test_no_other_lane_is_called_a_fallback(live):
    lanes = shown(live)
    assert lanes
    assert all(value == ("ucx" in transport and "tcp" in transport) for (*_, transport), value in lanes.items())
    assert len([line for line in live.lines() if WORD in line["message"]]) == sum(lanes.values())
    known = members(live.deployment.coordinator)
    assert sum(len(member.lanes) for member in known) == len(lanes)
