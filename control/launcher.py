"""Starts and ends the processes of a deployment on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from control import forkserver
from control.client import report_end
from core.config import (
    CoordinatorConfig,
    DeploymentConfig,
    GatewayConfig,
    HttpConfig,
    ProcessConfig,
    WorkerConfig,
    nbytes,
    to_json,
)
from core.errors import SetupError
from core.group import Group
from core.worker import Role
from runtime import log as logs
from scheduler import policies

START_S = 120.0
"""A process that does not listen within this time has failed."""
STOP_S = 8.0
"""A process that has not ended by then is killed; a worker needs some of it to give its rows away."""
CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}
)
"""Signals by which a process ends itself; others come from an operator, its launcher, or the kernel for memory."""
NOD_S = 0.5
"""The longest sleep without looking for signals."""
TELL_S = 10.0
"""So long a coordinator that is away is waited for, to be told of an end."""
PRELOADED = {"torch": ("control.worker", "engine.engine"), "paced": ("control.worker", "engine.paced")}
"""What workers are forked with, by their engine."""
LOOPBACK = "127.0.0.1"
"""Workers trust each other with their whole arenas, and nothing authenticates them yet: they stay on this machine."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs, if not beside its launcher on loopback: in a network namespace, say."""

    host: str
    """It listens there, and the others reach it there."""
    command: tuple[str, ...] = ()
    """Runs it, and becomes it: its own command line follows, such as after ("nsenter", "-t", "4711", "-n")."""


@dataclass(slots=True)
class Running:
    """One started process."""

    config: ProcessConfig
    process: subprocess.Popen[str] | forkserver.Forked
    identity: str = ""
    address: str = ""
    metrics: str = ""
    words: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)
    relay: threading.Thread | None = None

    @property
    def name(self) -> str:
        """Its name in the deployment."""
        return self.config.name


def engine_threads(config: DeploymentConfig) -> int:
    """Threads of each engine: the cores shared out, because two spinning pools on one core cost 20 times."""
    return config.threads or max(1, (os.cpu_count() or 1) // config.workers)


def environment(threads: int) -> dict[str, str]:
    """What a child's environment must say before torch or UCX is loaded."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's, which are there as soon as it is loaded
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        # Weights and KV in huge pages where the kernel gives some to who asks: memory is read up to half as fast again.
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        "TOKENIZERS_PARALLELISM": "false",
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "GRPC_VERBOSITY": os.environ.get("GRPC_VERBOSITY", "NONE"),
        "NIXL_LOG_LEVEL": os.environ.get("NIXL_LOG_LEVEL", "ERROR"),
        "UCX_LOG_LEVEL": os.environ.get("UCX_LOG_LEVEL", "ERROR"),
        "PYTHONUNBUFFERED": "1",
    }


def pick_transport(wanted: str) -> tuple[str, str]:
    """The transport and, where it is not UCX, why. An explicit "nixl" that cannot be had is a SetupError."""
    if wanted == "zeromq":
        return "zeromq", "asked for"
    from transfer.nixl import available

    reason = available()
    if reason is None:
        return "nixl", ""
    if wanted == "nixl":
        raise SetupError(f"transport: nixl cannot be used: {reason}", exit_code=7)
    if platform.system() == "Linux":
        raise SetupError(
            f"transport: nixl cannot be used ({reason}); run `make demo` once to install it, or choose zeromq "
            "explicitly, which is slower",
            exit_code=7,
        )
    return "zeromq", reason


def crashed(code: int) -> bool:
    """Whether a process with this exit code ended by a fault of its own."""
    return code > 0 or -code in CRASHES


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM that come meanwhile are handled at its end.

    A process whose start is interrupted before its launcher has noted it would be nobody's to end, and a thread whose
    start is cannot be joined.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are handled in that one
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    kept = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    for each in came:
        signal.raise_signal(each)


class Log:
    """The log file of all processes, one JSON object a line; nothing is kept without a path."""

    def __init__(self, path: Path | None, say: Callable[[str], None] = lambda line: None) -> None:
        self._say = say
        self._failed = False
        self._file: IO[str] | None = path.open("a") if path else None
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        """Append one line; lines after `close` are dropped."""
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                try:
                    self._file.close()
                except OSError as error:
                    self._fail(error)
                self._file = None

    def _fail(self, error: OSError) -> None:
        """Say it once; children must go on being read, or their next log line would stop them."""
        if not self._failed:
            self._failed = True
            self._say(f"log: cannot be written: {error.strerror}; lines are lost from here on")


class Deployment:
    """All processes of one `DeploymentConfig`. `say` hears one line about each step; use it as a context manager.

    `env` is added to every child's environment; `places` says by name which run elsewhere than on loopback;
    `worker_entry` is the module that workers run, with the settings that `control.process` takes.
    """

    def __init__(
        self,
        config: DeploymentConfig,
        model: Path,
        served_name: str,
        *,
        log_path: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
        env: Mapping[str, str] | None = None,
        places: Mapping[str, Place] | None = None,
        worker_entry: str = "control.process",
    ) -> None:
        self.config = config
        split = sum(group.prefill + group.decode for group in config.groups)
        self._policy = policies.live(config.policy, split)
        self._model = model
        self._served_name = served_name
        self._say = say
        self._env = dict(env or {})
        self._places = dict(places or {})
        self._worker_entry = worker_entry
        self._log = Log(log_path, say)
        self.transport, self.transport_reason = pick_transport(config.transport)
        self._record = str(Path(config.record).resolve()) if config.record else ""  # children run in another directory
        self.running: dict[str, Running] = {}
        self._stopping = threading.Event()

    def __enter__(self) -> Deployment:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def coordinator(self) -> str:
        """Address of the coordinator."""
        return self.running["coordinator"].address

    @property
    def gateways(self) -> list[str]:
        """Addresses of the gateways."""
        return [each.address for each in self.running.values() if isinstance(each.config, GatewayConfig)]

    @property
    def http(self) -> str:
        """Address of the HTTP server, empty without one."""
        return next((each.address for each in self.running.values() if isinstance(each.config, HttpConfig)), "")

    def start(self) -> None:
        """Start all but HTTP and wait until each process listens; raises SetupError with the child's own sentence."""
        self._server()  # it loads what workers need while the others start
        self._spawn(self._placed(CoordinatorConfig(listen=f"{LOOPBACK}:0", record=self._record)))
        self._await_words(["coordinator"])
        configs: list[ProcessConfig] = [*self._gateways(), *self._workers()]
        for config in configs:
            self._spawn(self._placed(config))
        self._await_words([name for name in self.running if name != "coordinator"])

    def open_http(self) -> None:
        """Start the HTTP server, if one is wanted, and wait until it serves: what is behind it must be ready."""
        c = self.config
        if c.http < 0:
            return
        listen = f"{_bracketed(c.host)}:{c.http}"
        self._spawn(HttpConfig("http", ",".join(map(reached, self.gateways)), listen, c.timeout_s))
        self._await_words(["http"])

    def restart(self, name: str) -> None:
        """Start a process that has ended again, under its name, settings and address."""
        old = self.running[name]
        if old.process.poll() is None:
            raise SetupError(f"{name} is still running")
        self._spawn(replace(old.config, listen=old.address))
        self._await_words([name])

    def kill(self, name: str, number: signal.Signals) -> None:
        """Send a signal to one process."""
        self.running[name].process.send_signal(number)

    def ended(self) -> dict[str, int]:
        """Processes that ended by themselves, with their exit codes."""
        return {each.name: code for each in self.running.values() if (code := each.process.poll()) is not None}

    def stop(self) -> None:
        """End everything: HTTP and gateways first, coordinator last; who does not end in time is killed."""
        self._stopping.set()
        kinds = ("http", "gateway", "worker", "coordinator")
        order = sorted(self.running.values(), key=lambda each: kinds.index(each.config.process))
        for kind in kinds:
            group = [each for each in order if each.config.process == kind]
            for each in group:
                if each.process.poll() is None:
                    each.process.send_signal(signal.SIGCONT)
                    each.process.terminate()
            until = time.monotonic() + STOP_S
            for each in group:
                try:
                    each.process.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    self._say(f"{each.name} did not end in {STOP_S:g} s and was killed")
                    each.process.kill()
                    each.process.wait()
        for each in order:
            if each.relay is not None:
                each.relay.join(1.0)
            for pipe in (each.process.stdin, each.process.stdout, each.process.stderr):
                if pipe is not None:
                    pipe.close()
        self.running.clear()
        self._log.close()

    def _gateways(self) -> list[GatewayConfig]:
        c = self.config
        host = _bracketed(c.host)
        return [
            GatewayConfig(
                name=f"gateway-{i}",
                coordinator=self.coordinator,
                model=str(self._model),
                served_name=self._served_name,
                listen=f"{host}:{c.port + i if c.port else 0}",
                timeout_s=c.timeout_s,
                max_queue_s=c.max_queue_s,
                ttft_s=c.ttft_s,
                gap_s=c.gap_s,
                deadline_s=c.deadline_s,
                tenants=c.tenants,
                prefix_cache=c.prefix_cache,
                policy=c.policy,
                group=c.groups,
                check=c.check,
                record=self._record,
            )
            for i in range(c.gateways)
        ]

    def _workers(self) -> list[WorkerConfig]:
        c = self.config
        workers = []
        for name, group, role in _seats(c.groups):
            workers.append(
                WorkerConfig(
                    name=name,
                    role=role,
                    group=group,
                    coordinator=self.coordinator,
                    model=str(self._model),
                    served_name=self._served_name,
                    listen=f"{LOOPBACK}:0",
                    kv_memory=nbytes(c.kv_memory),
                    host_memory=nbytes(c.host_memory, "host_memory", least=0) if role.decodes else 0,
                    page_tokens=(c.prefill_page_tokens if role is Role.PREFILL else 0) or c.page_tokens,
                    dtype=c.dtype,
                    exact=c.exact,
                    threads=engine_threads(c),
                    transport=self.transport,
                    chunk_tokens=c.chunk_tokens,
                    preempt=c.preempt,
                    max_rows=c.max_rows,
                    max_steps=c.max_steps,
                    policy=c.policy,
                    profile_s=c.profile_s,
                    migrate=c.migrate or self._policy.migration is not None,
                    migrate_below_steps=c.migrate_below_steps,
                    migrate_above_steps=c.migrate_above_steps,
                    fetch=c.fetch,
                    tenants=c.tenants,
                    hash_logits=c.hash_logits,
                    engine=c.engine,
                    cost=c.cost,
                    pace=c.pace,
                    stop_rate=c.stop_rate,
                    check=c.check,
                    record=self._record,
                )
            )
        return workers

    def _placed(self, config: ProcessConfig) -> ProcessConfig:
        place = self._places.get(config.name)
        return replace(config, listen=f"{_bracketed(place.host)}:0") if place else config

    def _spawn(self, config: ProcessConfig) -> None:
        threads, entry = 1, "control.process"
        match config:
            case WorkerConfig():
                threads, entry = config.threads, self._worker_entry
            case HttpConfig():
                entry = "control.http"
            case _:
                pass
        env = {**environment(threads), **self._reach(), **self._env}
        with uninterrupted():
            process = self._forked(config, entry, env) or self._executed(config, entry, env)
            running = self.running[config.name] = Running(config, process)
            threading.Thread(target=self._attend, args=(running,), daemon=True).start()
            running.relay = threading.Thread(target=_relay, args=(running, self._log), daemon=True)
            running.relay.start()

    def _forked(self, config: ProcessConfig, entry: str, env: Mapping[str, str]) -> forkserver.Forked | None:
        """A worker that has its libraries from the start; None where that cannot be had."""
        server = self._server() if isinstance(config, WorkerConfig) else None
        if server is not None:
            try:
                return server.fork(entry, to_json(config), env)
            except OSError as error:
                self._say(f"{config.name} starts by itself, for some seconds: {error}")
        return None

    def _server(self) -> forkserver.ForkServer | None:
        """Nobody is forked into another place."""
        if self._places:
            return None
        with uninterrupted():
            return forkserver.server(PRELOADED[self.config.engine], environment(engine_threads(self.config)))

    def _executed(self, config: ProcessConfig, entry: str, env: Mapping[str, str]) -> subprocess.Popen[str]:
        place = self._places.get(config.name)
        return subprocess.Popen(
            [*(place.command if place else ()), sys.executable, "-m", entry, to_json(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",  # what C++ libraries write there need not be UTF-8
            env=env,
            cwd=forkserver.ROOT,
            start_new_session=True,
        )

    def _attend(self, running: Running) -> None:
        """Hear a child to its end, and tell the coordinator how it ended: nobody else can."""
        _listen(running)
        if not running.identity or running.config.process == "coordinator":
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = running.process.wait(STOP_S)
            until = time.monotonic() + TELL_S
            while not self._stopping.is_set() and time.monotonic() < until:
                there = self.coordinator  # empty while it is being started again
                if there and report_end(there, running.identity, crashed(code)):
                    return
                self._stopping.wait(0.2)

    def _reach(self) -> dict[str, str]:
        """UCX listens where the workers do: it would name every interface of this machine to its peers, and reads over
        one that goes away later would hang."""
        devices = os.environ.get("UCX_NET_DEVICES")
        return {} if devices or self._places else {"UCX_NET_DEVICES": "lo"}

    def _await_words(self, names: list[str]) -> None:
        """Wait for the line in which each child says where it listens, or why it cannot."""
        until = time.monotonic() + START_S
        for name in names:
            each = self.running[name]
            try:
                word = hear(each.words, until)
            except queue.Empty:
                raise SetupError(f"{name} did not start within {START_S:g} s", exit_code=8) from None
            if "error" in word:
                raise SetupError(f"{name}: {word['error']}", exit_code=int(word["exit_code"]))
            each.address, each.metrics = word["address"], word["metrics"]
            self._say(f"{name} on {each.address}")


def hear(words: queue.SimpleQueue[dict[str, Any]], until: float) -> dict[str, Any]:
    """The next word, or queue.Empty at `until` on the monotonic clock. A signal that comes meanwhile is handled soon.

    One that comes just before this thread falls asleep, or to another thread, does not wake it.
    """
    while True:
        left = until - time.monotonic()
        try:
            return words.get(timeout=max(0.0, min(NOD_S, left)))
        except queue.Empty:
            if left <= NOD_S:
                raise


def _seats(groups: Sequence[Group]) -> Iterator[tuple[str, str, Role]]:
    """Name, group and role of every worker."""
    for group in groups:
        pools = (Role.PREFILL, group.prefill), (Role.DECODE, group.decode), (Role.MIXED, group.mixed)
        for role, count in pools:
            for number in range(count):
                yield f"{group.name}{'-' if group.name else ''}{role}-{number}", group.name, role


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def reached(address: str) -> str:
    """How this machine reaches what listens on `address`: where that is all addresses, loopback is one of them."""
    host, _, port = address.rpartition(":")
    return {"0.0.0.0": LOOPBACK, "[::]": "[::1]"}.get(host, host) + f":{port}"


def _listen(running: Running) -> None:
    """Read a child's standard output to its end, so that it can never block on it."""
    assert running.process.stdout is not None
    for line in running.process.stdout:
        try:
            word = json.loads(line)
        except ValueError:
            continue
        if isinstance(word, dict) and word.get("name") == running.name:
            running.identity = word.get("identity", running.identity)
            running.words.put(word)
    running.words.put({"error": "ended without a word; see the log", "exit_code": 8})


def _relay(running: Running, log: Log) -> None:
    """Copy a child's log to ours; what C++ libraries write beside it becomes a line of the same form."""
    assert running.process.stderr is not None
    for raw in running.process.stderr:
        line = raw.rstrip("\n")
        if not line.startswith('{"time"'):
            line = logs.foreign(running.name, line)
        log.write(line)
