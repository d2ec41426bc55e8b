"""Replay: the same events give the same decisions, also in another process; the first that differs is named."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from control import replay
from core.errors import SetupError, StateError
from core.messages import Accept, First, Grant, Prompt, Taken, Tokens
from core.pages import Pages
from runtime.driver import Driver
from runtime.recorder import Recorder, head
from scheduler.prefill_events import AskForSink, Began, ChunkDone, Granted, HandOffOver, RunChunk, SealPages
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, WorkerUp
from sim import recordings, traces
from tests.cast import GATEWAY, P1, SHAPE, ask, ticket
from tests.runtime.test_driver import nothing
from tests.scheduler.test_prefill_policy import offer
from tests.scheduler.test_router import UP, finished
from transfer.source import AskSink, Digest, Digested, HandOffEnded, Sealed, SendToSink, Source

ROOT = Path(__file__).parents[2]
FIRST = First(77)


def record(folder: Path, name: str, play) -> Path:
    """A recording of what `play` lets a driver's machines take."""

    async def main() -> Path:
        driver, recorder = Driver(), Recorder(folder, head(f"{name}#01", "b", "{}"))
        driver.record(recorder)
        play(driver)
        driver.close()
        recorder.close("the process ended")
        return recorder.path

    return asyncio.run(main())


def prefill(driver: Driver) -> None:
    """Two prompts at a prefill worker, which share its ledger with the source that hands them over."""
    ledger = Pages(40)

    def compute(command) -> None:
        match command:
            case RunChunk(run_id, spans):
                done = [Began(span.key, FIRST) for span in spans if span.stop == 12]
                driver.post("prefill", ChunkDone(run_id, tuple(done)))
            case AskForSink(placed, request, deadline):
                driver.post("source", AskSink(placed, request, deadline))
                driver.post("source", Grant(placed))
                driver.post("prefill", Granted(placed.key))
            case SealPages(key, pages, tokens, firsts):
                driver.post("source", Sealed(key, pages, tokens, firsts))

    def give(command) -> None:
        match command:
            case Digest(key, first, pages, _):
                driver.post("source", Digested(key, first, tuple(range(len(pages)))))
            case SendToSink(message) if getattr(message, "firsts", ()):
                driver.post("source", Taken(message.ticket))
            case HandOffEnded(key, taken, reason, taken_s):
                driver.post("prefill", HandOffOver(key, taken, reason, taken_s))

    driver.seat("prefill", PrefillPolicy(P1, SHAPE, ledger, PrefillConfig(chunk_tokens=8)), compute)
    driver.seat("source", Source(SHAPE, ledger), give)
    for counter in (1, 2):
        driver.post("prefill", offer(counter, 12))
        driver.post("prefill", Prompt(ticket(counter), ask(12)))
    driver.post("prefill", None)


def gateway(driver: Driver, me=GATEWAY, requests: int = 3) -> None:
    """Some requests at a gateway: one is served in full, one in part, one waits."""
    driver.seat("router", Router(me, RouterConfig()), nothing)
    for member in UP:
        driver.post("router", WorkerUp(member))
    for counter in range(1, requests + 1):
        driver.post("router", Arrived(counter, ask(6 + counter, 9)))
    driver.post("router", Accept(ticket(1)))
    driver.post("router", Tokens(ticket(1), 0, (100,)))
    driver.post("router", Tokens(ticket(1), 0, (100, 101, 102)))
    driver.post("router", finished(ticket(1), "stop", 3, 2))


@pytest.fixture
def recordings_made(tmp_path) -> Path:
    record(tmp_path, "prefill-0", prefill)
    record(tmp_path, "gateway-0", gateway)
    return tmp_path


def test_machines_that_share_a_ledger_decide_the_same_again(recordings_made, capsys):
    assert replay.replay([str(recordings_made)], as_json=False) == 0
    one, other = capsys.readouterr().out.splitlines()
    assert "gateway-0-01.jsonl: the same, 11 events (router 11)" in one
    assert "prefill-0-01.jsonl: the same" in other
    done = replay.replayed(recordings_made / "prefill-0-01.jsonl")
    assert done.events["prefill"] > 8
    assert done.events["source"] > 8
    assert done.commands > 15


def test_other_hashes_in_another_process_change_nothing(recordings_made):
    for seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        words = [sys.executable, "-m", "control.cli", "replay", str(recordings_made), "-o", "json"]
        ran = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
        assert ran.returncode == 0, ran.stderr
        assert [each["same"] for each in json.loads(ran.stdout)["replays"]] == [True, True]


def test_a_policy_that_decides_otherwise_is_found_at_its_first_event(recordings_made, monkeypatch, capsys):
    policy = PrefillPolicy._stages
    monkeypatch.setattr(PrefillPolicy, "_stages", lambda *args: policy(*args)[:2])
    assert replay.replay([str(recordings_made)], as_json=False) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("commands")
    assert lines[1].endswith("prefill-0-01.jsonl: differs")
    assert "prefill at " in lines[2]
    assert "HandOffOver" in lines[2]
    assert "handing_off" in lines[3]
    assert "recorded" in lines[3]
    assert "handing_off" not in lines[4]
    assert "replayed" in lines[4]
    assert replay.replay([str(recordings_made / "prefill-0-01.jsonl")], as_json=True) == 1
    (said,) = json.loads(capsys.readouterr().out)["replays"]
    different = said["difference"]
    entries = (recordings_made / "prefill-0-01.jsonl").read_text().splitlines()
    assert json.loads(entries[different["line"] - 1])[2] == different["event"]
    assert different["event_number"] == different["line"] - 2
    assert different["recorded"]["message"]["stages"][2]["name"] == "handing_off"


@pytest.mark.parametrize(
    ("change", "recorded", "replayed"),
    [
        (lambda commands: [*commands, {"@": "x"}], "{", "nothing"),
        (lambda commands: [], "nothing", "ToOne"),
        (lambda commands: "LocalError: no", "LocalError: no", "ToOne"),
    ],
)
def test_a_command_more_or_less_or_an_error_differs(recordings_made, change, recorded, replayed, capsys):
    path = recordings_made / "gateway-0-01.jsonl"
    lines = path.read_text().splitlines()
    at = next(at for at, line in enumerate(lines) if "router_events:Arrived" in line)
    entry = json.loads(lines[at])
    entry[3] = change(entry[3])
    lines[at] = json.dumps(entry)
    path.write_text("\n".join(lines) + "\n")
    assert replay.replay([str(path)], as_json=False) == 1
    _, event, before, now = capsys.readouterr().out.splitlines()
    assert event.startswith(f"  event {at - 1} (line {at + 1}), router at ")
    assert recorded in before
    assert replayed in now


def test_what_cannot_be_replayed_is_one_sentence(recordings_made, tmp_path):
    path = recordings_made / "gateway-0-01.jsonl"
    lines = path.read_text().splitlines()
    other = tmp_path / "other.jsonl"
    for text, sentence in (
        ("", "got an empty file"),
        ("\n".join([lines[0], *lines[2:]]) + "\n", "line of a recording"),
        ("\n".join([lines[0], lines[1].replace('"_looks"', '"_bells"'), *lines[2:]]), "another version of the code"),
        ("\n".join([*lines[:2], lines[2].replace('"router"', '"rooter"')]) + "\n", "which was not written"),
        ("\n".join([*lines[:2], lines[2].replace(":WorkerUp", ":WorkerSideways")]) + "\n", "value's class"),
    ):
        other.write_text(text)
        with pytest.raises((StateError, SetupError), match=sentence):
            replay.replayed(other)
        with pytest.raises(SetupError, match=sentence):
            replay.replay([str(other)], as_json=False)
    with pytest.raises(SetupError, match="No such file"):
        replay.replay([str(tmp_path / "none")], as_json=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SetupError, match="directory without"):
        replay.replay([str(tmp_path / "empty")], as_json=False)


def test_a_recording_of_nothing_does_not_say_the_same(tmp_path, capsys):
    path = record(tmp_path, "idle", lambda driver: None)
    assert replay.replay([str(path)], as_json=False) == 0
    assert "holds no event" in capsys.readouterr().out


# A recording is a workload, too.
def test_a_gateways_recording_is_a_workload(recordings_made):
    workload = traces.read(recordings_made / "gateway-0-01.jsonl")
    assert [(each.prompt, each.output) for each in workload.arrivals] == [(7, 3), (8, 9), (9, 9)]
    assert workload.arrivals[0].at_s == 0
    assert {each.block_tokens for each in workload.arrivals} == {0}
    assert traces.read(recordings_made).arrivals == workload.arrivals, "other processes' have none"


def test_prompts_that_begin_alike_share_their_first_blocks(tmp_path):
    def play(driver: Driver) -> None:
        driver.seat("router", Router(GATEWAY, RouterConfig()), nothing)
        for member in UP:
            driver.post("router", WorkerUp(member))
        for counter, prefix in enumerate([(11, 12), (11, 13), ()], 1):
            driver.post("router", Arrived(counter, replace(ask(10, 9), prefix=prefix)))

    one, two, three = recordings.recorded(record(tmp_path, "gateway-0", play)).arrivals
    assert (one.block_tokens, two.block_tokens, three.block_tokens) == (4, 4, 0)
    assert one.blocks[0] == two.blocks[0]
    assert one.blocks[1] != two.blocks[1]
    assert one.blocks[2] != two.blocks[2], "what fills no page is nobody else's"
    assert len(one.blocks) == 3


def test_the_recordings_of_several_gateways_are_one_workload(tmp_path):
    record(tmp_path, "gateway-0", gateway)
    record(tmp_path, "gateway-1", lambda driver: gateway(driver, requests=2))
    arrivals = traces.read(tmp_path).arrivals
    assert len(arrivals) == 5
    assert [each.at_s for each in arrivals] == sorted(each.at_s for each in arrivals)


def test_a_recording_without_requests_is_no_workload(tmp_path):
    path = record(tmp_path, "prefill-0", prefill)
    with pytest.raises(SetupError, match="requests: got none, want at least one, as in the recording of a gateway"):
        traces.read(path)


def test_the_simulator_runs_it(recordings_made):
    words = ["simulate", "--trace", str(recordings_made), "--slo", "", "--workers", "1 prefill, 1 decode", "-o", "json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-m", "control.cli", *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)
