"""The log on a disk that is full, for which /dev/full stands: lines are lost, children are not."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import pytest

from control import launcher
from control.launcher import Log, Running
from control.up import say
from core.config import CoordinatorConfig

FULL = Path("/dev/full")


def gone() -> IO[str]:
    """A pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def test_a_full_disk_is_said_once(tmp_path):
    said: list[str] = []
    log = Log(FULL, said.append)
    for number in range(2000):
        log.write(f"{number} is lost")
    log.close()
    log.write("nor is this kept")
    assert said == ["log: cannot be written: No space left on device; lines are lost from here on"]


def test_a_log_with_room_keeps_every_line(tmp_path):
    said: list[str] = []
    log = Log(tmp_path / "log", said.append)
    for number in range(10):
        log.write(f"line {number}")
    log.close()
    assert (tmp_path / "log").read_text().splitlines() == [f"line {number}" for number in range(10)]
    assert said == []


@pytest.mark.parametrize(
    "terminal", [lambda: io.StringIO(), lambda: FULL.open("w"), gone], ids=["there", "full", "gone"]
)
def test_a_child_is_read_to_its_end_whatever_the_disk(terminal, monkeypatch):
    """It logs many times what a pipe holds, so it ends only if it is read; who is told may be out of reach, too."""
    stream = terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    code = "import sys\nfor number in range(20_000): print('{\"time\"', number, file=sys.stderr)"
    log = Log(FULL, say)
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as child:
        relay = threading.Thread(target=launcher._relay, args=(Running(CoordinatorConfig(), child), log))
        relay.start()
        try:
            assert child.wait(20) == 0
        finally:
            child.kill()
            relay.join(20)
    log.close()
    with contextlib.suppress(OSError):
        stream.close()
