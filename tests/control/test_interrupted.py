"""`baton up` interrupted or killed at any time: no process, no word of it and no lock is left."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from control import forkserver, state
from control import up as upping
from control.launcher import Deployment, hear
from core.config import DeploymentConfig
from core.errors import RpcFailure
from tests.live.cluster import until

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "deploy" / "demo" / "model"


class Up:
    """`baton up`, and the processes that came of it: all inherit the name of its directory."""

    def __init__(self, where: Path, *words: str) -> None:
        self.where = where
        command = ["up", "--model", str(DEMO), "--port", "0", "--kv-memory", "16M", *words]
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "control.cli", *command],
            cwd=ROOT,
            env={**os.environ, "BATON_STATE": str(where)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def all(self, containing: str = "") -> list[int]:
        """Its live processes whose command line or name has `containing` in it."""
        found = []
        mark = f"BATON_STATE={self.where}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    ours = mark in (entry / "environ").read_bytes().split(b"\0")
                    said = (entry / "cmdline").read_text() + (entry / "comm").read_text()  # a forked one has its name
                    if ours and containing in said:
                        found.append(int(entry.name))
        return found

    def await_process(self, containing: str) -> int:
        """Its process with that in its command line, once it is there."""
        until(lambda: bool(self.all(containing)), f"{containing} is there", 60)
        return self.all(containing)[0]

    def read_to(self, text: str) -> None:
        """Read what it says up to the line with `text`."""
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"it ended before {text!r}")

    def ended(self) -> tuple[int, str]:
        """Its exit code and the rest of what it said, once it has ended and everybody with it."""
        code = self.process.wait(60)
        until(lambda: not self.all(), "all processes have ended", 60, self.all)
        return code, self.process.stdout.read()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """Starts an `Up` with those words."""
    started: list[Up] = []

    def begin(*words: str) -> Up:
        started.append(Up(tmp_path, *words))
        return started[-1]

    yield begin
    for each in started:
        for pid in each.all():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        each.process.wait(20)
        each.process.stdout.close()


def spawned(up: Up) -> None:
    """Its first child has only just been started."""
    up.await_process("control.process")


def loading(up: Up) -> None:
    """One worker stands still before it listens; all others do."""
    os.kill(up.await_process("decode-0"), signal.SIGSTOP)
    up.read_to("prefill-0 on")


def joining(up: Up) -> None:
    """All listen, and the coordinator does not answer them."""
    up.read_to("coordinator on")
    os.kill(up.await_process('"process": "coordinator"'), signal.SIGSTOP)
    up.read_to("decode-0 on")


@pytest.mark.live
@pytest.mark.parametrize(
    ("number", "stage"),
    [(signal.SIGINT, spawned), (signal.SIGTERM, loading), pytest.param(signal.SIGINT, joining, marks=pytest.mark.slow)],
)
def test_an_interrupted_start_leaves_nothing(tmp_path, start, number, stage):
    state.write(tmp_path, state.State(2**22 + 1, "", [], "", ""))  # a dead one's word
    up = start()
    stage(up)
    up.process.send_signal(number)
    code, said = up.ended()
    assert code == 130, said
    assert "Traceback" not in said
    assert "was killed" not in said
    assert not [*tmp_path.glob("deployment.json*")]
    assert not state.taken(tmp_path)


@pytest.mark.live
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_so_does_an_interrupted_start_behind(tmp_path, start, number):
    """The process behind is in a session of its own: it hears of this from the one in front only."""
    up = start("--detach")
    os.kill(up.await_process("decode-0"), signal.SIGSTOP)
    up.process.send_signal(number)
    code, said = up.ended()
    assert code == 130, said
    assert "Traceback" not in said
    assert not [*tmp_path.glob("deployment.json*")]
    assert not state.taken(tmp_path)


@pytest.mark.live
def test_a_killed_launcher_takes_its_processes_along(tmp_path, start):
    """Nobody could take its word back, so nobody believes it."""
    up = start()
    up.read_to("ready")
    assert state.taken(tmp_path)
    assert len(up.all()) >= 5
    up.process.kill()
    assert up.ended()[0] == -signal.SIGKILL
    assert (tmp_path / "deployment.json").exists()
    assert not state.taken(tmp_path)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Signals do again what they did before."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


class Empty(contextlib.nullcontext[None]):
    """A deployment without processes."""

    transport_reason = coordinator = http = ""
    gateways = ("",)

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def open_http(self) -> None:
        pass


def test_an_interrupt_in_the_moment_of_becoming_ready_leaves_no_word(tmp_path, monkeypatch, handlers):
    write = state.write

    def interrupted(*arguments):
        write(*arguments)
        assert (tmp_path / "deployment.json").exists()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(upping, "Deployment", Empty)
    monkeypatch.setattr(upping, "wait_ready", lambda deployment: None)
    monkeypatch.setattr(state, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upping.up(DeploymentConfig(model=str(DEMO)), tmp_path, as_json=False, detach=False, argv=[])
    assert not [*tmp_path.glob("deployment.json*")]
    assert not state.taken(tmp_path)


@pytest.mark.parametrize("came", [True, False])
def test_an_interrupt_that_is_swallowed_is_one_all_the_same(tmp_path, monkeypatch, handlers, came):
    """What gRPC calls back may be where it is raised; the call then fails in its own way."""

    def asked(deployment):
        if came:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        raise RpcFailure("DEADLINE_EXCEEDED")

    monkeypatch.setattr(upping, "Deployment", Empty)
    monkeypatch.setattr(upping, "wait_ready", asked)
    with pytest.raises(KeyboardInterrupt if came else RpcFailure):
        upping.up(DeploymentConfig(model=str(DEMO)), tmp_path, as_json=False, detach=False, argv=[])
    assert not state.taken(tmp_path)


def test_a_signal_that_wakes_nobody_is_handled_all_the_same(handlers):
    """It comes to another thread, as if it came just before this one fell asleep."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    words: queue.SimpleQueue[dict[str, object]] = queue.SimpleQueue()
    other = threading.Timer(0.5, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
    late = threading.Timer(20.0, words.put, [{}])
    late.start()
    other.start()
    with pytest.raises(KeyboardInterrupt):
        hear(words, time.monotonic() + 60.0)
    assert late.is_alive(), "it was handled when something else came"
    late.cancel()
    other.join()


def test_who_says_nothing_in_time_is_not_waited_for_longer():
    words: queue.SimpleQueue[dict[str, object]] = queue.SimpleQueue()
    with pytest.raises(queue.Empty):
        hear(words, time.monotonic() + 0.01)
    words.put({"name": "x"})
    assert hear(words, time.monotonic()) == {"name": "x"}


@pytest.mark.parametrize("first", ["a fork server", "a child"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_interrupted_while_a_process_is_being_made_ends_that_one_too(monkeypatch, handlers, number, first):
    """It would be nobody's: its launcher has no name for it yet."""

    servers: dict[tuple[str, ...], forkserver.ForkServer] = {}
    monkeypatch.setattr(forkserver, "_servers", servers)
    if first == "a child":
        monkeypatch.setattr(forkserver, "server", lambda modules, env: None)
    made: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *words, **settings):
            super().__init__(*words, **settings)
            made.append(self)
            os.kill(self.pid, signal.SIGSTOP)  # it would end by itself as it sees its launcher gone
            signal.raise_signal(number)

    def interrupted(number, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    signal.signal(number, interrupted)
    deployment = Deployment(DeploymentConfig(model=str(DEMO)), DEMO, "demo")
    with pytest.raises(KeyboardInterrupt), deployment:
        pass
    if first == "a fork server":  # other deployments of this process may have it
        assert [each.process.pid for each in servers.values()] == [each.pid for each in made]
        for each in servers.values():
            each.end()
    assert [process.returncode for process in made] == [-signal.SIGTERM if first == "a child" else -signal.SIGKILL]


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_interrupted_while_a_thread_is_being_made_ends_in_order(monkeypatch, handlers, number, which):
    """A thread whose start was interrupted cannot be joined."""

    made: list[threading.Thread] = []

    class Interrupted(threading.Thread):
        def start(self):
            made.append(self)
            if len(made) == which:
                signal.raise_signal(number)
            super().start()

    def interrupted(number, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(forkserver, "server", lambda modules, env: None)
    monkeypatch.setattr(threading, "Thread", Interrupted)
    signal.signal(number, interrupted)
    deployment = Deployment(DeploymentConfig(model=str(DEMO)), DEMO, "demo")
    with pytest.raises(KeyboardInterrupt), deployment:
        pass
    assert not deployment.running
