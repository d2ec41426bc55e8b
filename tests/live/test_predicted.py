"""`baton simulate --recording`: what clients of a recorded deployment got, beside what the simulator says."""

from __future__ import annotations

import asyncio
import json

import pytest

from control import cli
from tests.live.asks import case
from tests.live.cluster import Client


@pytest.fixture(scope="module")
def recorded(launch, model, tmp_path_factory):
    """The recording of sixteen requests, a few at a time, and their replies."""
    folder = tmp_path_factory.mktemp("recorded")
    live = launch("predicted", model, record=str(folder), engine="paced", pace=1.0, chunk_tokens=512, max_steps=4)
    cases = [case(40 + 53 * n, 4 + n, n, forever=True) for n in range(16)]

    async def one(client, number):
        await asyncio.sleep(0.1 * number)
        return await client.generate(cases[number].request)

    async def run():
        async with Client(live.gateway) as client:
            return await asyncio.gather(*(one(client, number) for number in range(len(cases))))

    replies = asyncio.run(run())
    live.stop()
    return folder, replies


def said(words, capsys):
    """Exit code, stdout and stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", *words])
    return ended.value.code, *capsys.readouterr()


def test_percentiles_stand_side_by_side(recorded, capsys):
    folder, replies = recorded
    code, out, _ = said(["--recording", str(folder), "-o", "json"], capsys)
    assert code == 0
    document = json.loads(out)
    assert document["assumed"]["workers"] == {"decode-0": "decode", "prefill-0": "prefill"}
    assert document["assumed"]["policy"] == "baton"
    assert 0 < document["assumed"]["hop_s"] < document["assumed"]["read_s"] + 1.0
    seen, told = document["measured"], document["predicted"]["baton"]
    assert (seen["requests"], seen["served"], seen["failed"], seen["again"]) == (16, 16, 0, 0)
    assert seen["tokens"] == told["tokens"] == sum(len(reply.tokens) for reply in replies)
    assert told["served"] == 16
    for which in (seen, told):
        for what in ("ttft_s", "gap_s"):
            assert 0 < which[what]["p50"] <= which[what]["p90"] <= which[what]["p99"]


def test_a_table_for_people_with_other_policies_beside(recorded, capsys):
    folder, _ = recorded
    code, out, _ = said(["--recording", str(folder), "--compare", "fcfs"], capsys)
    assert code == 0
    lines = out.splitlines()
    assert "16 requests" in lines[0]
    assert [line.split()[0] for line in lines if "MEASURED" in line] == ["BATON", "FCFS"]
    for what in ("TTFT p50", "TTFT p99", "gap p90"):
        assert sum(line.startswith(what) and line.count(" ms") == 2 for line in lines) == 2


def test_what_the_recording_says_cannot_be_said_beside_it(recorded, capsys):
    folder, _ = recorded
    code, out, err = said(["--recording", str(folder), "--workers", "9 prefill, 1 decode"], capsys)
    assert (code, out) == (2, "")
    assert err.startswith("baton: workers: got '9 prefill, 1 decode' with a recording")
