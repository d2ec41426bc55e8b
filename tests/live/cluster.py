"""A real deployment under test, its clients, and the one engine in this process that says what they must receive."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from control.client import members
from control.launcher import Deployment, Running
from core.config import DeploymentConfig, GatewayConfig, WorkerConfig
from core.sampling import Sampling
from engine.api import Row, Sampled
from engine.engine import TorchEngine
from protos.baton.v1 import inference_pb2, inference_pb2_grpc
from tests.engine.play import alone, side_by_side
from tests.transfer.faults import FAULTS, Rule, acted, write

MODEL = "tiny"
"""The name that every deployment serves its model by."""
SECRET = "xyzzy plugh"
"""Begins the text prompts here: no log may ever show it."""
LEASE_S = 3.0
"""Workers wait this long for a gateway to come back."""
MARGIN_S = 3.0
"""And are done this much later, on a busy machine."""
LATE_S = 20.0
"""Nothing that a test waits for takes this long on a busy machine."""

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(slots=True)
class Reply:
    """What a client received."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Tokens in each message that had any."""
    end: inference_pb2.End | None = None
    code: str = "OK"
    details: str = ""
    retry_s: float | None = None

    @property
    def hashes(self) -> list[int]:
        """One hash of the logits a token."""
        return list(self.end.logits_hashes) if self.end else []

    @property
    def last(self) -> inference_pb2.End:
        """The last message's `end`; fails the test if the call failed."""
        assert self.end is not None, f"{self.code}: {self.details}"
        return self.end

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        """Add one message."""
        assert self.end is None, "a message came after the last"
        self.text += response.text
        self.tokens += response.token_ids
        if response.token_ids:
            self.sizes.append(len(response.token_ids))
        if response.HasField("end"):
            self.end = response.end

    def fail(self, error: grpc.aio.AioRpcError) -> None:
        """Add the status that the call ended with."""
        self.code, self.details = error.code().name, error.details() or ""
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():
            wait = error_details_pb2.RetryInfo()
            if detail.Unpack(wait):
                self.retry_s = wait.retry_delay.ToTimedelta().total_seconds()


def ask(prompt: str | Sequence[int], max_tokens: int | None = None, **fields: Any) -> inference_pb2.GenerateRequest:
    """A request with a text or token prompt; `fields` are others of GenerateRequest."""
    request = inference_pb2.GenerateRequest(max_tokens=max_tokens, **fields)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


class Client:
    """A grpc.aio client of one gateway, for use as an async context manager."""

    def __init__(self, address: str, options: Sequence[tuple[str, int]] = ()) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1), *options])
        self.stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close()

    async def generate(self, request: inference_pb2.GenerateRequest, timeout_s: float = 100.0) -> Reply:
        """The whole reply, or how the call failed; never raises for a status."""
        reply = Reply()
        with contextlib.suppress(grpc.RpcError):
            async for response in self.responses(request, reply, timeout_s):
                reply.take(response)
        return reply

    async def responses(
        self, request: inference_pb2.GenerateRequest, reply: Reply, timeout_s: float = 100.0
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Message by message; a failure is noted in `reply` and raised."""
        try:
            async for response in self.stub.Generate(request, timeout=timeout_s):
                yield response
        except grpc.aio.AioRpcError as error:
            reply.fail(error)
            raise


class Live:
    """One running deployment. `stop` fails if it left anything behind."""

    def __init__(
        self,
        config: DeploymentConfig,
        model: Path,
        log: Path,
        say: Callable[[str], None] = lambda line: None,
        faults: Path | None = None,
        **how: Any,
    ) -> None:
        self.config = config
        self.model = model
        self.log = log
        self.expected: list[str] = []
        """Patterns of the error lines that its tests provoke."""
        self.torn = False
        """True once requests were cancelled: their pages may be freed and written again while they are still pulled."""
        self.faults = faults
        """Where its workers find the faults that they are to have; None: they have none."""
        if faults:
            how = {"env": {FAULTS: str(faults)}, "worker_entry": "tests.live.faulty", **how}
        self.deployment = Deployment(config, model, MODEL, log_path=log, say=say, **how)
        self._lives: list[Running] = []
        self._killed: set[int] = set()
        self._told: set[int] = set()
        """Who was told to end, and is to do so orderly."""

    def start(self) -> None:
        """Start all processes and wait until requests are served by every worker."""
        try:
            self.deployment.start()
            self._note()
            self.wait_ready()
            self.deployment.open_http()
            self._note()
        except BaseException:
            self.deployment.stop()
            raise

    @property
    def gateway(self) -> str:
        """Address of the first gateway."""
        return self.deployment.gateways[0]

    @property
    def workers(self) -> list[Running]:
        """The worker processes."""
        return [each for each in self.deployment.running.values() if isinstance(each.config, WorkerConfig)]

    def wait_ready(self) -> None:
        """Until every worker's lanes are measured and every gateway serves."""
        count = self.config.workers + self.config.gateways

        def ready() -> bool:
            known = members(self.deployment.coordinator)
            workers = {name for name, each in self.deployment.running.items() if isinstance(each.config, WorkerConfig)}
            return (
                len(known) == count
                and all(member.ready for member in known)
                and all(self.health(address) == "SERVING" for address in self.deployment.gateways)
                and all(self.usable(address) >= workers for address in self.deployment.gateways)
            )

        until(ready, "the deployment is ready")

    def usable(self, gateway: str) -> set[str]:
        """Names of the workers that a gateway calls ready."""
        name = next(each.name for each in self.deployment.running.values() if each.address == gateway)
        found = self.metrics(name)
        return {
            dict(labels)["worker"] for (key, labels), value in found.items() if key == "baton_worker_ready" and value
        }

    def health(self, address: str, service: str = "") -> str:
        """What grpc.health.v1 says of a process."""
        with grpc.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=LATE_S)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    def metrics(self, name: str) -> Samples:
        """What a process shows on /metrics, by name and labels."""
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(self.scrape(name))
            for sample in family.samples
        }

    def scrape(self, name: str) -> str:
        """The text of a process's /metrics."""
        url = f"http://{self.deployment.running[name].metrics}/metrics"
        with urllib.request.urlopen(url, timeout=LATE_S) as response:
            return str(response.read().decode())

    def metric(self, name: str, key: str, **labels: str) -> float:
        """One sample of a process; 0 if it is not there."""
        return self.metrics(name).get((key, tuple(sorted(labels.items()))), 0.0)

    def total(self, key: str, **labels: str) -> float:
        """One sample added up over all workers that live."""
        return sum(self.metric(each.name, key, **labels) for each in self.workers if each.process.poll() is None)

    def phases(self) -> dict[str, float]:
        """Live requests of all gateways by phase."""
        found: dict[str, float] = {}
        for name, each in self.deployment.running.items():
            if isinstance(each.config, GatewayConfig) and each.process.poll() is None:
                for (key, labels), value in self.metrics(name).items():
                    if key == "baton_requests_live" and value:
                        phase = dict(labels)["phase"]
                        found[phase] = found.get(phase, 0) + value
        return found

    def kill(self, name: str, number: int) -> None:
        """Send a signal; SIGKILL is waited for."""
        process = self.deployment.running[name].process
        if number == signal.SIGTERM:
            self._told.add(process.pid)
        self.deployment.kill(name, signal.Signals(number))
        if number == signal.SIGKILL:
            self._killed.add(process.pid)
            process.wait(LATE_S)

    def died(self, *names: str, by: int = signal.SIGKILL) -> None:
        """Wait until processes have killed themselves."""
        for name in names:
            process = self.deployment.running[name].process
            assert process.wait(LATE_S) == -by
            self._killed.add(process.pid)

    def fault(self, rules: Mapping[str, Sequence[Rule]]) -> None:
        """Give workers new faults, by their names, from their next event on."""
        assert self.faults is not None
        write(self.faults, rules)

    def acted(self) -> list[str]:
        """What the workers' faults did since they were written."""
        assert self.faults is not None
        return acted(self.faults).read_text().splitlines()

    def restart(self, *names: str) -> None:
        """Start killed processes again and wait until all serve."""
        self.revive(*names)
        self.wait_ready()

    def revive(self, *names: str) -> None:
        """Start ended processes again, under their addresses."""
        with ThreadPoolExecutor(max(1, len(names))) as together:
            list(together.map(self.deployment.restart, names))
        self._note()

    def wait_empty(self, within_s: float = LATE_S) -> float:
        """Until no worker holds or promised a page; the seconds that took."""
        started = time.monotonic()
        until(lambda: not self.held(), "all arenas are empty", within_s, self.held)
        return time.monotonic() - started

    def held(self) -> list[str]:
        """What workers hold, also in host memory, beside free and scratch pages and those kept for their prefix."""
        found = []
        for each in self.workers:
            if each.process.poll() is not None:
                continue
            for (key, labels), value in self.metrics(each.name).items():
                state = dict(labels).get("state", "")
                kept = key == "baton_pages" and state not in ("free", "scratch", "cached")
                kept |= key == "baton_host_pages" and dict(labels)["what"] == "used"
                if value and (kept or key == "baton_pages_promised"):
                    found.append(f"{each.name} {key} {state} {value:g}")
        return found

    def lines(self) -> list[dict[str, str]]:
        """The log of all processes."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self) -> None:
        """End all processes; fails if pages, processes, mismatches or unexpected errors were left behind."""
        wrong = []
        try:
            if self.deployment.running:
                alive = [each for each in self.workers if each.process.poll() is None]
                self.wait_empty()
                wrong += [f"{name} ended by itself" for name in self._ended()]
                if self.total("baton_digest_mismatches") and not self.torn:
                    wrong.append("a page differed from its digest")
                wrong += [
                    f"{each.name} has a lane over {dict(labels)['transport']}"
                    for each in alive
                    for key, labels in self.metrics(each.name)
                    if key == "baton_lane_latency_seconds" and not self._right_lane(dict(labels)["transport"])
                ]
        finally:
            self.deployment.stop()
        wrong += [f"process {pid} is left" for each in self._lives for pid in session(each.process.pid)]
        codes = {each.name: each.process.returncode for each in self._lives if each.process.pid not in self._killed}
        wrong += [f"{name} left with {code}" for name, code in codes.items() if code]
        for line in self.lines():
            text = line["message"] + line.get("exception", "")
            if line["level"] in ("error", "critical") and not any(re.search(each, text) for each in self.expected):
                wrong.append(f"{line['worker']} logged: {text}")
        if SECRET in self.log.read_text():
            wrong.append("a prompt was logged")
        assert not wrong, "\n".join(wrong)

    def tail(self, count: int = 25) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text().splitlines()[-count:]) if self.log.exists() else ""

    def _right_lane(self, transport: str) -> bool:
        return transport.startswith("ucx" if self.deployment.transport == "nixl" else "zeromq")

    def _ended(self) -> list[str]:
        processes = self.deployment.running
        return [
            name for name in self.deployment.ended() if processes[name].process.pid not in self._killed | self._told
        ]

    def _note(self) -> None:
        self._lives += [each for each in self.deployment.running.values() if each not in self._lives]


class Reference:
    """What one engine in this process, without any of the system around it, generates; kept for the next question."""

    def __init__(self, model: Path, **options: Any) -> None:
        self.engine = TorchEngine(model, **{"kv_memory": 16 * 2**20, "page_tokens": 16, "hash_logits": True, **options})
        self._known: dict[tuple[tuple[int, ...], Sampling], list[Sampled]] = {}

    def samples(self, prompt: Sequence[int], sampling: Sampling) -> list[Sampled]:
        """All samples, a stop token included."""
        key = tuple(prompt), sampling
        if key not in self._known:
            with one_thread():
                self._known[key] = alone(self.engine, prompt, sampling)
        return self._known[key]

    def learn(self, asked: Iterable[tuple[Sequence[int], Sampling]], rows: int) -> None:
        """Know all of these, so many side by side: in exact mode that changes no bit, and takes a tenth of the time."""
        every = dict.fromkeys((tuple(prompt), sampling) for prompt, sampling in asked)
        new = [key for key in every if key not in self._known]
        with one_thread():
            for first in range(0, len(new), rows):
                some = new[first : first + rows]
                self._known.update(zip(some, side_by_side(self.engine, some), strict=True))

    def tokens(self, prompt: Sequence[int], sampling: Sampling) -> list[int]:
        """The tokens that a client receives."""
        return [sample.token for sample in self.samples(prompt, sampling) if sample.finish != "stop"]

    def hashes(self, prompt: Sequence[int], sampling: Sampling) -> list[int]:
        """The logits' hashes of those."""
        return [sample.logits_hash for sample in self.samples(prompt, sampling) if sample.finish != "stop"]

    def finish(self, prompt: Sequence[int], sampling: Sampling) -> str:
        """Why it ended."""
        return self.samples(prompt, sampling)[-1].finish or ""

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
        """Logits ``[tokens, vocab]`` from which each of `tokens` was chosen, when all before it are given."""
        lines: list[torch.Tensor] = []
        forward = self.engine._model.forward

        def keep(batch: Any) -> torch.Tensor | None:
            logits = forward(batch)
            if logits is not None:
                lines.append(logits.clone())
            return logits

        pages = range(self.engine.kv.pages_for(len(prompt) + len(tokens)))
        self.engine._model.forward = keep  # type: ignore[method-assign]
        try:
            with one_thread():
                done = 0
                for stop in range(len(prompt), len(prompt) + len(tokens)):
                    known = [*prompt, *tokens[: stop - len(prompt)]]
                    self.engine.open("forced", known, pages, Sampling(1), len(known))
                    self.engine.step([Row("forced", done, stop)])
                    self.engine.close("forced")
                    done = stop
        finally:
            self.engine._model.forward = forward  # type: ignore[method-assign]
        found = torch.cat(lines) if lines else torch.empty(0, self.engine.config.vocab)
        return found.double().numpy()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute here as the workers do: exact mode's bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def until(
    true: Callable[[], bool], what: str, within_s: float = LATE_S, more: Callable[[], object] = lambda: ""
) -> None:
    """Wait until `true()`; fails, naming `what`, if that takes longer than `within_s`."""
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"not within {within_s:g} s: {what} {more()}"
        time.sleep(0.02)


def session(leader: int) -> list[int]:
    """Processes of a session that are alive."""
    found = []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] != "Z":
                    found.append(int(entry))
    return found


def several(
    live: Live, request: inference_pb2.GenerateRequest, seen: Callable[[list[Reply]], None] = lambda replies: None
) -> list[Reply]:
    """One reply a continuation; `seen` is told whenever something came."""

    async def run() -> list[Reply]:
        replies = [Reply() for _ in range(request.n)]
        async with Client(live.gateway) as client:
            async for response in client.responses(request, Reply()):
                replies[response.index].take(response)
                seen(replies)
        return replies

    return asyncio.run(run())


async def together(*replies: Awaitable[Reply]) -> list[Reply]:
    """All at once."""
    return list(await asyncio.gather(*replies))
