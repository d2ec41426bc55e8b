"""`baton doctor`: what this machine can do, what is missing, and how much fits."""

from __future__ import annotations

import json
import mmap
import os
import platform
import queue
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from control import state
from control.hub import resolve_model
from core.config import nbytes
from core.errors import RpcFailure, SetupError
from core.kv import PageRun
from core.worker import Identity

PACKAGES = ("baton", "torch", "numpy", "grpcio", "protobuf", "pyzmq", "tokenizers", "prometheus-client", "nixl-cu13")
WANTED_FILES = 4096
"""Open files a process may need: sockets, and ten of UCX for each peer."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    topic: str
    name: str
    value: str
    ok: bool = True
    advice: str = ""


def doctor(model: str | None, kv_memory: str, port: int, where: Path, *, as_json: bool) -> int:
    """Print the findings; exit code 0 if nothing is wrong, else 1."""
    findings = [*_versions(), *_machine(), *_transports(), *_lanes(where), *_port(port)]
    if model:
        findings += _memory(model, nbytes(kv_memory))
    healthy = all(finding.ok for finding in findings)
    if as_json:
        print(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}))
        return 0 if healthy else 1
    for finding in findings:
        mark = "ok  " if finding.ok else "WARN"
        print(f"{mark} {finding.topic:<10} {finding.name:<22} {finding.value}")
        if finding.advice:
            print(f"     {'':<10} {'':<22} -> {finding.advice}")
    return 0 if healthy else 1


def _versions() -> Iterator[Finding]:
    yield Finding("version", "python", sys.version.split()[0])
    for package in PACKAGES:
        try:
            yield Finding("version", package, version(package))
        except PackageNotFoundError:
            missing = package != "baton" and not (package.startswith("nixl") and platform.system() != "Linux")
            yield Finding(
                "version", package, "not installed", ok=not missing, advice="run `make demo`" if missing else ""
            )


def _machine() -> Iterator[Finding]:
    yield Finding("machine", "cores", str(os.cpu_count()))
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    yield Finding("machine", "memory", f"{pages * size / 2**30:.1f} GiB")
    gpus = [str(path) for path in Path("/dev").glob("nvidia[0-9]*")]
    yield Finding("machine", "gpus", ", ".join(gpus) or "none: engines run on the CPU")
    compiler = shutil.which("c++") or shutil.which("g++")
    yield Finding("machine", "compiler", compiler or "none: engines run in plain torch, slower")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files < WANTED_FILES
    yield Finding("limit", "open files", str(files), not few, f"ulimit -n {WANTED_FILES} or more" if few else "")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    rdma = Path("/dev/infiniband").is_dir()
    tight = rdma and locked != resource.RLIM_INFINITY
    text = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / 2**20:.0f} MiB"
    yield Finding(
        "limit", "locked memory", text, not tight, "RDMA registers the arena: ulimit -l unlimited" if tight else ""
    )
    if platform.system() == "Linux":
        shm = shutil.disk_usage("/dev/shm")
        small = shm.free < 64 * 2**20
        yield Finding(
            "limit",
            "/dev/shm free",
            f"{shm.free / 2**20:.0f} MiB",
            not small,
            "UCX wants 64 MiB or more" if small else "",
        )


def _transports() -> Iterator[Finding]:
    from transfer.nixl import available

    reason = available()
    linux = platform.system() == "Linux"
    yield Finding(
        "transport",
        "nixl (UCX)",
        "usable" if reason is None else f"not usable: {reason}",
        ok=reason is None or not linux,
        advice=""
        if reason is None
        else "`make demo` installs it"
        if linux
        else "KV goes over ZeroMQ instead, which is slower",
    )
    yield Finding("transport", "zeromq", "usable; only used where nixl has no wheel, or when asked for")
    devices = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    yield Finding(
        "transport", "RDMA devices", ", ".join(devices) or "none: lanes on one host use shared memory, others TCP"
    )


def _lanes(where: Path) -> Iterator[Finding]:
    from control.client import members
    from control.status import fallback

    try:
        running = state.read(where)
        known = members(running.coordinator)
    except (SetupError, RpcFailure):
        yield _own_lane()
        return
    for member in known:
        for lane in member.lanes:
            pair = f"{lane.source.split('#')[0]} -> {member.identity.split('#')[0]}"
            slow = "tcp" in lane.transport
            yield Finding(
                "lane",
                pair,
                f"{lane.gbytes_per_s:.1f} GB/s, {lane.latency_us:.0f} us, {lane.transport}",
                ok=not slow,
                advice=""
                if not slow
                else "UCX fell back to TCP on one host: no ptrace, an IPC namespace of its own, or a forgotten UCX_TLS?"
                if fallback(lane, member, known)
                else "TCP: no RDMA and no shared memory between these two",
            )


def _own_lane() -> Finding:
    """What the best transport reaches between two arenas of this process: no deployment runs that has real lanes."""
    from control.launcher import pick_transport
    from control.worker import make_transport
    from transfer.thread import TransferThread
    from transfer.thread_events import Event, LaneProbed, Opened

    kind, _ = pick_transport("auto")
    unit, count = 64 * 2**10, 64
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    ends = [Identity("doctor-source", 1), Identity("doctor-sink", 1)]
    threads = [
        TransferThread(partial(make_transport, kind, end), memoryview(mmap.mmap(-1, unit * count)), unit, events.put)
        for end in ends
    ]
    try:
        for thread in threads:
            thread.start()
        source = next((card for card in (_event(events), _event(events)) if _owner(card) == str(ends[0])), None)
        if not isinstance(source, Opened):
            return Finding("lane", f"{kind}, this process", "did not open", ok=False)
        threads[0].boost(3.0)
        threads[1].connect(str(ends[0]), source.metadata)
        threads[1].probe(str(ends[0]), PageRun(0, count), PageRun(0, count))
        while (event := _event(events)) is not None:
            if isinstance(event, LaneProbed):
                text = f"{event.gbytes_per_s:.1f} GB/s, {event.latency_us:.0f} us, {event.transports}"
                return Finding("lane", f"{kind}, this process", text)
        return Finding("lane", f"{kind}, this process", "no answer within 5 s", ok=False)
    finally:
        for thread in threads:
            thread.close()


def _owner(event: object) -> str:
    from transfer.thread_events import Opened
    from transfer.transport import Card

    return Card.decode(event.metadata).owner if isinstance(event, Opened) else ""


def _event(events: queue.SimpleQueue[Any]) -> Any:
    try:
        return events.get(timeout=5.0)
    except queue.Empty:
        return None


def _port(port: int) -> Iterator[Finding]:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            yield Finding("port", str(port), "in use", advice="`baton up --port` takes another")
        else:
            yield Finding("port", str(port), "free")


def _memory(spec: str, kv_memory: int) -> Iterator[Finding]:
    from engine.checkpoint import tensor_index
    from engine.config import ModelConfig

    folder = resolve_model(spec, download=False)
    model = ModelConfig.read(folder)
    weights = sum(slot.nbytes for slot in tensor_index(folder).values())
    kv = model.kv(64)
    tokens = kv_memory // kv.page_nbytes * kv.page_tokens
    yield Finding(
        "memory", "model", f"{folder.name}: {weights / 2**20:.1f} MiB of weights, context {model.context:,} tokens"
    )
    yield Finding("memory", "KV per token", f"{kv.token_nbytes:,} bytes in {kv.dtype}")
    fits = tokens // min(model.context, 1024)
    whole = tokens // model.context
    yield Finding(
        "memory",
        f"{kv_memory / 2**20:.0f} MiB of KV hold",
        f"{tokens:,} tokens: {fits:,} requests of {min(model.context, 1024):,} tokens, {whole:,} of a full context",
        ok=whole > 0,
        advice="" if whole else "a prompt as long as the context does not fit: raise --kv-memory",
    )
