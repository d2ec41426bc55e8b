"""Processes that a fork server makes for a launcher: like its own children, whoever dies first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from control import forkserver, launcher
from control.forkserver import Forked, ForkServer
from core.config import DeploymentConfig
from tests.checkpoints import make_llama
from tests.live.cluster import LATE_S, Live, session

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")

ENTRY = """
import json, os, sys, loaded
print(json.dumps([sys.argv, dict(os.environ), os.getsid(0), loaded.PID]), flush=True)
print("to the log", file=sys.stderr)
for line in sys.stdin:
    match line.split():
        case ["exit", code]:
            sys.exit(int(code))
        case ["fail"]:
            raise RuntimeError("of its own")
        case ["open"]:
            print(len(os.listdir("/proc/self/fd")), flush=True)
"""
Make = Callable[..., ForkServer]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Servers that find modules in a folder of this test's own."""
    (tmp_path / "entry_of_test.py").write_text(textwrap.dedent(ENTRY))
    (tmp_path / "loaded.py").write_text("import os\nPID = os.getpid()\n")
    (tmp_path / "threaded.py").write_text("import threading\nthreading.Timer(60, print).start()\n")
    made: list[ForkServer] = []

    def one(*modules: str) -> ForkServer:
        made.append(ForkServer(modules, {**launcher.environment(2), "PYTHONPATH": str(tmp_path)}))
        return made[-1]

    yield one
    for each in made:
        each.end()


def fork(server: ForkServer, **env: str) -> Forked:
    return server.fork("entry_of_test", '{"a": 1}', env)


def read(process: Forked) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def write(process: Forked, line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def test_it_is_what_was_asked_for_and_has_what_the_server_had_loaded(make):
    one = fork(make("loaded"), LEFT="right")
    argv, env, leader, loaded_by = read(one)
    assert (argv[1:], env, leader) == (['{"a": 1}'], {"LEFT": "right"}, one.pid)
    assert loaded_by not in (one.pid, os.getpid())
    assert one.stderr is not None
    assert one.stderr.readline() == "to the log\n"
    write(one, "exit 0")
    assert one.wait(LATE_S) == one.poll() == one.returncode == 0
    one.terminate()  # of nobody, whoever has its number now


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (lambda one: write(one, "exit 7"), 7),
        (lambda one: write(one, "fail"), 1),
        (lambda one: one.kill(), -signal.SIGKILL),
        (lambda one: one.terminate(), -signal.SIGTERM),
        (lambda one: one.send_signal(signal.SIGSEGV), -signal.SIGSEGV),
        (lambda one: one.stdin.close(), 0),
    ],
)
def test_its_end_is_told(make, how, code):
    one = fork(make())
    read(one)
    assert one.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        one.wait(0.01)
    how(one)
    with ThreadPoolExecutor(4) as everybody:
        assert set(everybody.map(one.wait, [LATE_S] * 4)) == {code}
    assert not session(one.pid)


def test_siblings_hold_nothing_of_each_other(make):
    """Or the end of one's standard input, and of the server, would be seen by nobody."""
    server = make()
    alone = fork(server)
    read(alone)
    write(alone, "open")
    held = read(alone)
    others = [fork(server) for _ in range(5)]
    for each in others:
        read(each)
    late = fork(server)
    read(late)
    write(late, "open")
    assert read(late) == held
    for each in (alone, late, *others):
        each.kill()
        each.wait(LATE_S)


def test_they_outlive_a_server_that_is_killed_and_their_end_is_still_seen(make):
    server = make()
    one, other = fork(server), fork(server)
    read(one), read(other)
    server.process.kill()
    server.process.wait()
    assert one.poll() is other.poll() is None
    write(one, "exit 0")
    assert one.wait(LATE_S) == forkserver.UNKNOWN
    other.terminate()
    assert other.wait(LATE_S) == forkserver.UNKNOWN
    with pytest.raises(BrokenPipeError):
        fork(server)


def test_a_server_ends_when_told_and_those_it_forked_with_their_input(make):
    server = make()
    one = fork(server)
    read(one)
    server.end()
    assert server.process.returncode == -signal.SIGKILL
    assert one.poll() is None
    assert one.stdin is not None
    one.stdin.close()
    assert one.wait(LATE_S) == forkserver.UNKNOWN


@pytest.mark.parametrize("engine", launcher.PRELOADED)
def test_what_workers_need_can_be_loaded_before_a_fork(make, engine):
    """It starts no threads: or workers would be executed, each for seconds, and nobody would notice."""
    one = fork(make("loaded", *launcher.PRELOADED[engine]))
    argv, *_ = read(one)
    assert argv[1:] == ['{"a": 1}']
    write(one, "exit 0")
    assert one.wait(LATE_S) == 0


@pytest.mark.parametrize("module", ["no_such_module", "threaded"])
def test_a_server_that_cannot_fork_says_so_at_once(make, module):
    server = make(module)
    with pytest.raises(OSError, match="the fork server has ended"):
        fork(server)
    assert server.process.wait(LATE_S)
    assert not server.lives


def test_there_is_one_server_for_equal_threads_and_modules_and_a_new_one_after_its_end(monkeypatch):
    monkeypatch.setattr(forkserver, "_servers", {})
    first = forkserver.server(("json",), launcher.environment(1))
    assert forkserver.server(("json",), {**launcher.environment(1), "OTHER": "1"}) is first
    more = forkserver.server(("json",), launcher.environment(2)), forkserver.server((), launcher.environment(1))
    first.process.kill()
    first.process.wait()
    second = forkserver.server(("json",), launcher.environment(1))
    assert len({id(each) for each in (first, second, *more)}) == 4
    for each in (first, second, *more):
        each.end()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert forkserver.server(("json",), launcher.environment(1)) is None


@pytest.mark.live
def test_a_worker_is_forked_and_without_a_server_it_starts_by_itself(tmp_path, monkeypatch):
    model = make_llama(tmp_path / "model", vocab=320, context=256, tokenizer=True)
    config = DeploymentConfig(model=str(model), port=0, engine="paced", kv_memory="1M")
    live = Live(config, model, tmp_path / "log")
    live.start()
    try:
        assert all(isinstance(each.process, Forked) for each in live.workers)
        for each in live.deployment.running.values():
            assert Path(f"/proc/{each.process.pid}/comm").read_text() == f"{each.name}\n"
        monkeypatch.setattr(launcher, "PRELOADED", {"paced": ("no.such.module",)})
        said: list[str] = []
        monkeypatch.setattr(live.deployment, "_say", said.append)
        live.kill("decode-0", signal.SIGKILL)
        live.restart("decode-0")
        kinds = {each.name: isinstance(each.process, Forked) for each in live.workers}
        assert kinds == {"prefill-0": True, "decode-0": False}
        assert "decode-0 starts by itself, for some seconds: the fork server has ended" in said
    finally:
        live.stop()
