"""A recording: all that machines took, in order, whatever becomes of the process; without one it is not there."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
import time
from pathlib import Path

import pytest

from core.errors import SetupError, StateError
from core.pages import Pages
from runtime import recorder as recorders
from runtime.driver import Driver
from runtime.recorder import Ended, Head, Machines, Recorded, Recorder, Took, head, read
from scheduler.decode_policy import DecodeConfig, DecodePolicy
from scheduler.liveness import Connected, Disconnected, Liveness
from scheduler.prefill_events import ChunkDone
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy
from tests.cast import D1, P1, P2, SHAPE
from tests.runtime.test_driver import Echo, nothing


def begun(folder: Path, name: str = "decode-0#01") -> Recorder:
    return Recorder(folder, head(name, "b", '{"process": "worker"}'))


def recorded(folder: Path, events, machine=None) -> list:
    """What is in the file after a machine in a driver has taken these."""

    async def main() -> Recorder:
        driver, recorder = Driver(), begun(folder)
        driver.seat("peers", machine or Liveness(silence_s=9.0, grace_s=0.0), nothing)
        driver.record(recorder)
        for event in events:
            driver.post("peers", event)
        driver.close()
        recorder.close("the process ended")
        return recorder

    return list(read(asyncio.run(main()).path))


def test_a_recording_begins_with_head_and_state_and_ends_with_its_reason(tmp_path):
    first, machines, one, two, end = recorded(tmp_path, [Connected(P1), Disconnected(P1, True)])
    assert isinstance(first, Head)
    assert (first.process, first.build, first.config) == ("decode-0#01", "b", {"process": "worker"})
    assert abs(first.started_at - time.time()) < 600
    assert isinstance(machines, Machines)
    assert isinstance(one, Took)
    assert (one.number, one.machine, one.commands) == (1, "peers", [])
    assert one.event["@"] == "scheduler.liveness:Connected"
    assert two.commands[0]["reason"] == {"enum": ["scheduler.liveness:How", "said goodbye"]}
    assert two.at >= one.at
    assert end == Ended(5, "the process ended")
    (path,) = tmp_path.iterdir()
    assert path.name == "decode-0-01.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, "it holds prompts"


def test_machines_that_come_later_are_written_before_the_next_event(tmp_path):
    async def main():
        driver, recorder = Driver(), begun(tmp_path)
        driver.record(recorder)
        driver.seat("peers", Liveness(silence_s=9.0, grace_s=0.0), nothing)
        driver.post("peers", Connected(P1))
        driver.seat("gateways", Liveness(silence_s=9.0, grace_s=0.0), nothing)
        driver.post("gateways", Connected(P2))
        recorder.close("x")
        return recorder.path

    entries = list(read(asyncio.run(main())))
    assert [type(each) for each in entries] == [Head, Machines, Took, Machines, Took, Ended]
    _, before, _, after, *_ = entries
    names = [[pair[0] for pair in each.document["objects"][0][1]] for each in (before, after)]
    assert names == [["peers"], ["gateways"]]


def test_a_machine_that_comes_later_and_has_the_ledger_brings_all_along(tmp_path):
    async def main():
        driver, recorder, ledger = Driver(), begun(tmp_path), Pages(8)
        driver.record(recorder)
        driver.seat("decode", DecodePolicy(D1, SHAPE, ledger, DecodeConfig()), nothing)
        driver.post("decode", None)
        driver.seat("prefill", PrefillPolicy(P1, SHAPE, ledger, PrefillConfig()), nothing)
        driver.post("prefill", None)
        recorder.close("x")
        return recorder.path

    one, two = [each.document for each in read(asyncio.run(main())) if isinstance(each, Machines)]
    assert [pair[0] for pair in one["objects"][0][1]] == ["decode"]
    assert [pair[0] for pair in two["objects"][0][1]] == ["decode", "prefill"]


def test_machines_share_in_the_file_what_they_share(tmp_path):
    async def main():
        driver, recorder, ledger = Driver(), begun(tmp_path), Pages(8)
        driver.seat("prefill", PrefillPolicy(P1, SHAPE, ledger, PrefillConfig()), nothing)
        driver.seat("decode", DecodePolicy(D1, SHAPE, ledger, DecodeConfig()), nothing)
        driver.record(recorder)
        driver.post("prefill", None)
        recorder.close("x")
        return recorder.path

    machines = next(each for each in read(asyncio.run(main())) if isinstance(each, Machines))
    assert [each[0] for each in machines.document["objects"]].count("core.pages:Pages") == 1


def test_what_a_machine_raises_is_recorded_and_raised(tmp_path, caplog):
    machine = PrefillPolicy(P1, SHAPE, Pages(8), PrefillConfig())
    with caplog.at_level(logging.CRITICAL):
        entries = recorded(tmp_path, [ChunkDone(3, ())], machine)
    assert entries[2].commands == "LocalError: chunk done: got run 3, want none"


def test_without_a_recording_a_machine_is_asked_by_nobody_else(tmp_path):
    async def main():
        driver, echo = Driver(), Echo([])
        driver.seat("a", echo, nothing)
        assert driver._seats["a"].machine is echo
        recorder = begun(tmp_path)
        driver.record(recorder)
        assert isinstance(driver._seats["a"].machine, Recorded)
        assert driver.machines == {"a": echo}
        recorder.close("x")

    asyncio.run(main())


def test_a_machine_that_cannot_be_written_ends_the_recording_and_nothing_else(tmp_path, caplog):
    heard: list = []
    entries = recorded(tmp_path, [Connected(P1)], Echo(heard))
    assert [type(each) for each in entries] == [Head, Ended]
    assert entries[-1].reason.startswith("a machine cannot be written: state: got")
    assert "recording ends" in caplog.text
    assert heard == [Connected(P1)]


def test_an_event_that_cannot_be_written_ends_the_recording_and_nothing_else(tmp_path, caplog, monkeypatch):
    taken: list = []

    def on(self, event, now):
        taken.append(event)
        return []

    monkeypatch.setattr(Liveness, "on", on)
    strange = object()
    entries = recorded(tmp_path, [Connected(P1), strange, Connected(P2)])
    assert [type(each) for each in entries] == [Head, Machines, Took, Ended]
    assert entries[-1].reason.startswith("LocalError: words: got")
    assert "recording ends" in caplog.text
    assert taken == [Connected(P1), strange, Connected(P2)]


def test_a_writer_that_falls_behind_ends_the_recording_and_not_the_process(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recorders, "MOST_EVENTS", 3)
    monkeypatch.setattr(recorders, "FLUSH_S", 60.0)
    entries = recorded(tmp_path, [Connected(P1)] * 50)
    assert entries[-1] == Ended(entries[-1].line, "3 events wait to be written")
    assert sum(isinstance(each, Took) for each in entries) < 10
    assert caplog.text.count("recording ends") == 1


def test_a_killed_process_leaves_what_it_wrote(tmp_path):
    recorded(tmp_path, [Connected(P1), Connected(P2)])
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    for cut in (len(whole) - 30, len(whole) - 60):
        path.write_text(whole[:cut])
        entries = list(read(path))
        assert not isinstance(entries[-1], Ended)
        assert isinstance(entries[2], Took)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nonsense\n", ":1: got 'nonsense', want JSON"),
        ('{"format": "other"}\n', ":1: got '.*', want baton.recording version 1"),
        ('{"format": "baton.recording", "version": 2}\n', "want baton.recording version 1"),
        ('{"format": "baton.recording", "version": 1}\n', "want what `Head` has"),
        ("[1, 2]\n", ":1: got '\\[1, 2\\]', want a line of a recording"),
    ],
)
def test_what_is_no_recording_is_refused_with_its_place(tmp_path, text, sentence):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(StateError, match=sentence):
        list(read(path))


def test_a_line_in_the_middle_that_is_none_is_refused(tmp_path):
    recorded(tmp_path, [Connected(P1)])
    (path,) = tmp_path.iterdir()
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], json.dumps([1, "peers"]), *lines[2:]]) + "\n")
    with pytest.raises(StateError, match=r":3: got .* want a line of a recording"):
        list(read(path))


def test_a_folder_that_cannot_be_had_is_said_at_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"record: .* cannot be written"):
        begun(tmp_path / "file")
    begun(tmp_path).close("x")
    with pytest.raises(SetupError, match="File exists"):
        begun(tmp_path)
