"""The word that `baton up` leaves: believed while its deployment lives, and nobody else's process is touched for it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from control import state
from control.cli import main
from control.up import down
from core.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "deploy" / "demo" / "model"
HOLD = """
import pathlib, sys
from control import state
held = state.lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


class Stranger:
    """A process that repeats what it is told: any signal would end it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid

    def lives(self) -> bool:
        self.process.stdin.write("still here\n")
        self.process.stdin.flush()
        return self.process.stdout.readline() == "still here\n"


@pytest.fixture
def stranger():
    one = Stranger()
    with one.process:
        yield one
        one.process.kill()


def leave(where: Path, pid: int) -> None:
    """Word of a deployment that runs under `pid`."""
    state.write(where, state.State(pid, "127.0.0.1:1", ["127.0.0.1:1"], "m", str(where / "baton.log")))


def baton(where: Path, *words: str) -> int:
    """The exit code of a verb."""
    with pytest.raises(SystemExit) as end:
        main(["--state", str(where), *words])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize("words", [("status",), ("down",), ("generate", "hello")], ids=lambda words: words[0])
@pytest.mark.parametrize("locked", [True, False], ids=["lock left", "no lock left"])
def test_the_word_of_a_dead_deployment_is_not_believed(tmp_path, stranger, capsys, words, locked):
    """Its process number is somebody else's by now."""
    leave(tmp_path, stranger.pid)
    if locked:
        (tmp_path / "deployment.lock").touch()
    assert baton(tmp_path, *words) == 3
    assert "has ended" in capsys.readouterr().err
    assert stranger.lives()


@pytest.mark.parametrize("words", [("status",), ("down",), ("generate", "hello")], ids=lambda words: words[0])
def test_nor_is_it_while_another_deployment_starts(tmp_path, stranger, capsys, words):
    leave(tmp_path, stranger.pid)
    with state.lock(tmp_path):
        assert baton(tmp_path, *words) == 3
    assert "no deployment is running" in capsys.readouterr().err
    assert stranger.lives()


def test_one_directory_holds_one_deployment_and_a_dead_one_lets_go(tmp_path, capsys):
    hold = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(hold, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            leave(tmp_path, holder.pid)
            with pytest.raises(SetupError, match="running already") as refused:
                state.lock(tmp_path)
            assert refused.value.exit_code == 2
            assert baton(tmp_path, "up", "--model", str(DEMO)) == 2
            assert "running already" in capsys.readouterr().err
            assert state.read(tmp_path).pid == holder.pid, "who is refused changes nothing"
        finally:
            holder.kill()
    with pytest.raises(SetupError, match="has ended"):
        state.read(tmp_path)
    state.lock(tmp_path).close()


def test_down_of_one_that_ends_by_itself_meanwhile_is_done(tmp_path, monkeypatch):
    held = state.lock(tmp_path)
    leave(tmp_path, os.getpid())

    def ended(pid: int, number: int) -> None:
        held.close()
        raise ProcessLookupError

    monkeypatch.setattr("os.kill", ended)
    assert down(tmp_path) == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": 1}', '"word"'])
def test_a_damaged_word_is_none(tmp_path, text):
    with state.lock(tmp_path):
        (tmp_path / "deployment.json").write_text(text)
        assert baton(tmp_path, "down") == 3


def test_a_word_that_does_not_fit_on_the_disk_is_one_sentence(tmp_path):
    (tmp_path / "deployment.json.new").symlink_to("/dev/full")
    with pytest.raises(SetupError, match="No space left on device") as failed:
        leave(tmp_path, os.getpid())
    assert failed.value.exit_code == 1
    assert not (tmp_path / "deployment.json").exists()


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"state: .*file/state cannot be written"):
        state.make(tmp_path / "file" / "state")


def test_who_only_asks_does_not_refuse_a_deployment(tmp_path):
    """`status` holds the lock for a moment."""
    state.make(tmp_path)
    asking = (tmp_path / "deployment.lock").open("r")
    fcntl.flock(asking, fcntl.LOCK_SH)
    threading.Timer(0.05, asking.close).start()
    state.lock(tmp_path).close()
