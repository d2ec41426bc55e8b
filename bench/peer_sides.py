"""The two deployments under comparison: ours, and vLLM's two servers behind a proxy; one prefill and one decode worker,
a core each.

Both are started, pinned, killed, stopped, started again and asked what KV they hold in the same words. The engines of
one side share no core; its front door (our gateway and coordinator, the peer's proxy) and the client go where the
kernel puts them. Whatever else is in a worker runs on the worker's core: at the peer an HTTP server, the scheduler's
process and the model's process, at ours the loop, the engine's thread and the transfer thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from bench import peer_env
from bench.peer_http import Broken, Pool
from bench.peer_load import TIMEOUT_S, Ask, Lost
from control.launcher import environment
from control.up import wait_ready
from core.config import DeploymentConfig, WorkerConfig
from protos.baton.v1 import inference_pb2, inference_pb2_grpc
from tests.live.cluster import MODEL, Live, session

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 2048
MAX_ROWS = 32
KV_GIB = 1
LEASE_S = 30
"""The peer's prefill server frees KV that nobody fetched after this long; its own default."""
START_S = 600.0
"""A server of the peer compiles at its first start."""
ROLES = ("prefill", "decode")


def cores() -> dict[str, int]:
    """The core of each worker."""
    own = sorted(os.sched_getaffinity(0))
    return {"prefill": own[0], "decode": own[-1]}


def pin(pids: list[int], core: int) -> None:
    """Every thread that these processes have by now."""
    for pid in pids:
        with contextlib.suppress(OSError):  # it, or a thread of it, has just ended
            for task in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(task), {core})


def seconds(pids: list[int]) -> float:
    """Processor time that these processes have used."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Ours:
    """Baton: a gateway, a prefill and a decode worker, asked over gRPC. `spare` adds a worker of both phases."""

    name = "Baton"

    def __init__(self, model: Path, scratch: Path, dtype: str, spare: bool = False) -> None:
        config = DeploymentConfig(
            model=str(model), port=0, kv_memory=f"{KV_GIB}G", threads=1, max_rows=MAX_ROWS, dtype=dtype,
            prefix_cache=False, mixed=int(spare), transport="nixl", max_queue_s=600.0,
        )  # fmt: skip
        log = scratch / f"ours-{model.name}-{'spare' if spare else 'alone'}.log"
        # What an earlier start has learned of this machine's steps, busy or not, must not matter here.
        self._live = Live(config, model, log, env={"BATON_CACHE": str(scratch / "cache")})
        self._channel: grpc.aio.Channel | None = None

    def start(self) -> None:
        """Until every worker serves."""
        self._live.deployment.start()
        wait_ready(self._live.deployment, START_S)
        self._live.wait_ready()
        self.pin()

    def pin(self) -> None:
        """Prefill and decode worker share no core; a spare one goes where it can."""
        for running in self._live.workers:
            role = str(running.config.role) if isinstance(running.config, WorkerConfig) else ""
            if role in ROLES:
                pin([running.process.pid], cores()[role])

    def pids(self) -> list[int]:
        """All of its processes."""
        return [each.process.pid for each in self._live.deployment.running.values()]

    async def open(self) -> None:
        """A channel for this event loop."""
        self._channel = grpc.aio.insecure_channel(self._live.gateway)

    async def close(self) -> None:
        """The end of it."""
        if self._channel is not None:
            await self._channel.close()

    async def stream(self, ask: Ask) -> AsyncIterator[list[int]]:
        """The tokens as they come; raises Lost."""
        assert self._channel is not None
        request = inference_pb2.GenerateRequest(max_tokens=ask.max_tokens, ignore_eos=True, temperature=0.0)
        request.token_ids.ids.extend(ask.prompt)
        call = inference_pb2_grpc.InferenceServiceStub(self._channel).Generate(request, timeout=TIMEOUT_S)
        try:
            async for response in call:
                if response.token_ids:
                    yield list(response.token_ids)
        except grpc.aio.AioRpcError as error:
            raise Lost(f"{error.code().name}: {error.details()}") from None
        finally:
            call.cancel()

    def signal(self, role: str, number: signal.Signals) -> None:
        """To the one worker of this role."""
        self._live.kill(f"{role}-0", number)

    def restart(self, role: str) -> None:
        """Start a killed worker again, and wait until it serves."""
        self._live.revive(f"{role}-0")
        wait_ready(self._live.deployment, START_S)
        self.pin()

    def held(self) -> float:
        """Pages that are neither free nor scratch, of all workers."""
        return sum(float(line.split()[-1]) for line in self._live.held() if "baton_pages " in line)

    def lapsed(self) -> float:
        """None: KV waits for no lease."""
        return 0.0

    def take_times(self) -> list[tuple[float, float]]:
        """Nothing: our first token comes from the prefill worker, so the client itself sees the hand-over."""
        return []

    def stop(self) -> None:
        """End all processes."""
        self._live.deployment.stop()


@dataclass(slots=True)
class Server:
    """One of the peer's two servers: an HTTP process, a scheduler's and a model's, all on one core."""

    env: Path
    model: Path
    role: str
    dtype: str
    eager: bool
    log: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to start it, on a port of its own that it keeps."""
        core = cores()[self.role]
        self.port = self.port or free_port()
        self.starts += 1
        transfer = {
            "kv_connector": "NixlConnector",
            "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[self.role],
            "kv_buffer_device": "cpu",
            "kv_load_failure_policy": "recompute",
            "engine_id": f"{self.role}-{os.getpid()}-{self.starts}",
            "kv_connector_extra_config": {"kv_lease_duration": LEASE_S, "num_threads": 0},
        }
        words = [
            "taskset", "-c", str(core), str(peer_env.python(self.env)), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self.model), "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", self.dtype, "--max-model-len", str(CONTEXT), "--max-num-batched-tokens", str(CONTEXT),
            "--max-num-seqs", str(MAX_ROWS), "--block-size", "128", "--no-enable-prefix-caching",
            "--distributed-executor-backend", "mp", "--kv-transfer-config", json.dumps(transfer),
            *(["--enforce-eager"] if self.eager else []),
        ]  # fmt: skip
        more = {
            **environment(1),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "HF_HUB_OFFLINE": "1",
            "UCX_TLS": "posix,cma,tcp",
            "UCX_NET_DEVICES": "lo",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(words, env=more, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        """Until it serves; raises RuntimeError with the end of its log."""
        assert self.process is not None
        until = time.monotonic() + START_S
        while not answers(f"http://{self.address}/health"):
            if self.process.poll() is not None or time.monotonic() > until:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
                raise RuntimeError(f"the peer's {self.role} server did not start; its log ends with\n{tail}")
            time.sleep(0.25)
        self.pin()

    def pin(self) -> None:
        """Once more: NIXL's start moves the model's main thread to the machine's last core."""
        pin(self.pids(), cores()[self.role])

    def pids(self) -> list[int]:
        """Its processes that live."""
        return session(self.process.pid) if self.process else []

    def signal(self, number: signal.Signals) -> None:
        """To all of them."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def gone(self) -> None:
        """Wait until they are."""
        until = time.monotonic() + 20
        while self.pids() and time.monotonic() < until:
            if self.process is not None:
                self.process.poll()
            time.sleep(0.05)

    def metrics(self) -> dict[str, float]:
        """Its samples by name and labels as they are written."""
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] not in ("#", "")}

    def held(self) -> float:
        """Blocks of KV in use."""
        found = self.metrics()
        usage = sum(value for name, value in found.items() if name.startswith("vllm:kv_cache_usage_perc"))
        blocks = next(re.search(r'num_gpu_blocks="(\d+)"', name) for name in found if "cache_config_info" in name)
        assert blocks is not None
        return round(usage * int(blocks[1]))


class Theirs:
    """vLLM: a prefill and a decode server over NIXL, and our plain proxy before them, asked over HTTP."""

    name = peer_env.NAME

    def __init__(self, env: Path, model: Path, scratch: Path, dtype: str, eager: bool) -> None:
        self.servers = {
            role: Server(env, model, role, dtype, eager, scratch / f"peer-{model.name}-{role}.log") for role in ROLES
        }
        self._proxy: subprocess.Popen[str] | None = None
        self._pool: Pool | None = None

    def start(self) -> None:
        """Both servers beside each other, then the proxy."""
        for server in self.servers.values():
            server.start()
        for server in self.servers.values():
            server.wait()
        self._proxy = subprocess.Popen(
            [sys.executable, "-m", "bench.peer_proxy", *(self.servers[role].address for role in ROLES)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._proxy.stdout is not None
        self._pool = Pool(self._proxy.stdout.readline().strip())

    def pin(self) -> None:
        """Both servers share no core."""
        for server in self.servers.values():
            server.pin()

    def pids(self) -> list[int]:
        """All of its processes."""
        proxy = [self._proxy.pid] if self._proxy else []
        return [pid for server in self.servers.values() for pid in server.pids()] + proxy

    async def open(self) -> None:
        """Nothing to open: connections are made when they are needed."""

    async def close(self) -> None:
        """Those that are kept belong to this event loop."""
        if self._pool is not None:
            self._pool.close()

    async def stream(self, ask: Ask) -> AsyncIterator[list[int]]:
        """The tokens as they come; raises Lost."""
        assert self._pool is not None
        async for tokens in completion(self._pool, ask):
            yield tokens

    def signal(self, role: str, number: signal.Signals) -> None:
        """To all processes of the server of this role."""
        self.servers[role].signal(number)
        if number == signal.SIGKILL:
            self.servers[role].gone()

    def restart(self, role: str) -> None:
        """Start a killed server again, and wait until it serves."""
        self.servers[role].start()
        self.servers[role].wait()

    def held(self) -> float:
        """Blocks of KV in use, of both servers."""
        return sum(server.held() for server in self.servers.values() if server.pids())

    def lapsed(self) -> float:
        """Requests so far whose KV the prefill server kept until its lease ended."""
        found = self.servers["prefill"].metrics()
        return sum(value for name, value in found.items() if name.startswith("vllm:nixl_num_kv_expired_reqs_total"))

    def take_times(self) -> list[tuple[float, float]]:
        """What the proxy measured of each request since last time: (prefill_s, hand_over_s)."""
        assert self._pool is not None
        with urllib.request.urlopen(f"http://{self._pool.address}/times", timeout=10) as answer:
            return [(prefill_s, hand_over_s) for prefill_s, hand_over_s in json.load(answer)]

    def stop(self) -> None:
        """End all processes."""
        for server in self.servers.values():
            server.signal(signal.SIGCONT)
            server.signal(signal.SIGKILL)
            server.gone()
        if self._proxy is not None:
            self._proxy.kill()
            self._proxy.wait()
            if self._proxy.stdout is not None:
                self._proxy.stdout.close()


async def completion(pool: Pool, ask: Ask) -> AsyncIterator[list[int]]:
    """The tokens of one completion over HTTP as they come; raises Lost."""
    request = {
        "model": MODEL, "prompt": ask.prompt, "max_tokens": ask.max_tokens, "min_tokens": ask.max_tokens,
        "temperature": 0.0, "ignore_eos": True, "stream": True, "return_token_ids": True,
    }  # fmt: skip
    rest = b""
    try:
        async with pool.call("/v1/completions", json.dumps(request).encode()) as answer:
            if answer.status != 200:
                raise Lost(f"{answer.status}: {(await answer.body())[:200].decode(errors='replace')}")
            async for data in answer.parts():
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    if tokens := event_tokens(event):
                        yield tokens
    except Broken as error:
        raise Lost(str(error)) from None


def event_tokens(event: bytes) -> list[int]:
    """The token ids of one event of a stream; raises Lost where it brings an error in place of them."""
    text = event.removeprefix(b"data: ")
    if text == b"[DONE]":
        return []
    found: dict[str, Any] = json.loads(text)
    if "error" in found:
        raise Lost(f"in mid-stream: {found['error']}")
    return [token for choice in found["choices"] for token in choice.get("token_ids") or ()]


def answers(url: str) -> bool:
    """Whether somebody answers there, well."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
