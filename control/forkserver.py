"""Workers forked from a process that has loaded what they need: most of a start is the import of libraries.

A launcher starts one server for each set of modules and number of threads, and asks it for a process by a message that
carries the new process's three standard streams, a pipe with its settings, and a socket on which the server says what
became of it. The server runs one thread and nothing but that: it forks while there is no lock that anybody could hold.
It ends with its launcher, as those do that it has forked. Linux only: elsewhere a fork of loaded libraries is not safe.

Run as ``python -m control.forkserver MODULE...`` with the launcher's socket as standard input.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
BEGINS_S = 60.0
"""A server that has not loaded its modules by then is not waited for."""
HANDED = 5
"""Descriptors of a request: the settings, standard input, output and error, and where its end is said."""
UNKNOWN = -int(signal.SIGKILL)
"""The exit code of a process whose server was killed before it: nobody can know it."""


class Forked:
    """A process that a server has forked for us, with what `subprocess.Popen` has of our own children."""

    def __init__(self, channel: socket.socket, stdin: IO[str], stdout: IO[str], stderr: IO[str]) -> None:
        """Raises OSError where the server has ended, or does not answer."""
        channel.settimeout(BEGINS_S)
        word, handed, _, _ = socket.recv_fds(channel, 64, 1)
        channel.settimeout(None)
        if not handed:
            raise OSError("the fork server has ended")
        self.pid = int(word)
        self.stdin: IO[str] | None = stdin
        self.stdout: IO[str] | None = stdout
        self.stderr: IO[str] | None = stderr
        self.returncode: int | None = None
        self._channel = channel
        self._itself = handed[0]
        self._orphan = False
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended; raises subprocess.TimeoutExpired."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not _readable(self._itself if self._orphan else self._channel.fileno(), left):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            with self._lock:
                if self.returncode is None:
                    self._hear()
        return self.returncode

    def _hear(self) -> None:
        if self._orphan:
            self.returncode = UNKNOWN
            return
        try:
            word = self._channel.recv(64, socket.MSG_DONTWAIT)
        except BlockingIOError:  # another thread was first
            return
        if word:
            self.returncode = int(word)
        self._orphan = not word

    def send_signal(self, number: int) -> None:
        """Nothing if it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._itself, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it never began
            os.close(self._itself)
            self._channel.close()


class ForkServer:
    """The launcher's end of a server."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "control.forkserver", *modules],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a worker that is started without it says the same to more purpose
                env=dict(env),
                cwd=ROOT,
                start_new_session=True,
            )
        self._control = ours

    @property
    def lives(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def end(self) -> None:
        """End it at once; those that it has forked go on."""
        self.process.kill()  # it may be loading for seconds yet
        self._control.close()
        self.process.wait()

    def fork(self, entry: str, argument: str, env: Mapping[str, str]) -> Forked:
        """A process that runs module `entry` as ``python -m`` does with this argument; raises OSError where the server
        cannot, such as for a module that could not be loaded."""
        handed: list[int] = []
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:

            def pipe(mode: str) -> IO[str]:
                read, write = os.pipe()
                kept, given = (read, write) if mode == "r" else (write, read)
                theirs.callback(os.close, given)
                handed.append(given)
                return ours.enter_context(open(kept, mode, errors="backslashreplace"))

            settings, streams = pipe("w"), (pipe("w"), pipe("r"), pipe("r"))
            channel, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.enter_context(channel)
            theirs.enter_context(far)
            socket.send_fds(self._control, [b"f"], [*handed, far.fileno()])
            theirs.close()
            with settings:
                json.dump({"entry": entry, "argument": argument, "env": dict(env)}, settings)
            forked = Forked(channel, *streams)
            ours.pop_all()
            return forked


_servers: dict[tuple[str, ...], ForkServer] = {}
_lock = threading.Lock()


@atexit.register
def _end() -> None:
    for each in _servers.values():
        each.end()


def server(modules: Sequence[str], env: Mapping[str, str]) -> ForkServer | None:
    """This process's server with these modules in an environment with these threads, started if it is not there; None
    where there can be none. It serves all deployments of this process, and ends with it."""
    if sys.platform != "linux":
        return None
    key = (env["OMP_NUM_THREADS"], *modules)
    with _lock:
        if key not in _servers or not _servers[key].lives:
            _servers[key] = ForkServer(modules, env)
        return _servers[key]


def _readable(descriptor: int, timeout: float | None) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1e3))


# ---------------------------------------------------------------- the server's own process


def main() -> None:
    """Load the modules, then fork whenever asked, until the launcher is gone."""
    control = socket.socket(fileno=os.dup(0))
    for name in sys.argv[1:]:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        os._exit(1)  # a fork would lack them, and may find their locks held; they are not waited for
    gc.collect()
    gc.freeze()  # or each child's first collection would copy it all
    _serve(control)


def _serve(control: socket.socket) -> None:
    children: dict[int, tuple[int, socket.socket]] = {}
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    while True:
        for ready, _ in waiting.poll():
            if ready == control.fileno():
                _, handed, _, _ = socket.recv_fds(control, 1, HANDED)
                if not handed:
                    return
                pid = os.fork()
                if not pid:
                    control.close()
                    for itself, (_, channel) in children.items():  # its end must be seen when the server itself ends
                        os.close(itself)
                        channel.close()
                    _become(handed)
                itself, channel = os.pidfd_open(pid), socket.socket(fileno=handed[-1])
                for descriptor in handed[:-1]:
                    os.close(descriptor)
                children[itself] = pid, channel
                waiting.register(itself, select.POLLIN)
                with contextlib.suppress(OSError):
                    socket.send_fds(channel, [str(pid).encode()], [itself])
            else:
                pid, channel = children.pop(ready)
                waiting.unregister(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with channel, contextlib.suppress(OSError):
                    channel.send(str(code).encode())
                os.close(ready)


def _become(handed: Sequence[int]) -> NoReturn:
    """What was asked for, in the new process."""
    code = 1
    try:
        os.setsid()
        settings, *streams, channel = handed
        os.close(channel)
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
            os.close(descriptor)
        with open(settings) as file:
            asked: dict[str, Any] = json.load(file)
        os.environ.clear()
        os.environ.update(asked["env"])
        sys.argv[:] = [asked["entry"], asked["argument"]]
        runpy.run_module(asked["entry"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    main()
