"""A real deployment under load, as seen by its clients: what benchmarks of serving share.

The load generator and the front door (gateway, coordinator) have one core, the workers another. An open loop asks at
the times that were drawn, whatever became of the requests before, and a first token is counted from when its request
was due, so a generator that falls behind does not flatter anybody. A closed loop has so many clients, each with a
request all the time. A run in which a loop woke late (p99 above 20 ms) is rejected: it measured this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from core.config import DeploymentConfig, WorkerConfig
from core.request import Slo
from protos.baton.v1 import inference_pb2
from sim.workload import Workload
from tests.checkpoints import make_llama
from tests.live.cluster import Client, Live

VOCAB, CONTEXT = 320, 16384
LAG_S = 0.02
"""The p99 of how late loops may wake."""
TICK_S = 0.01
"""Between two looks at the load generator's own loop."""
LOOK_S = 2.0
"""Between two looks at the processes' loops: a look costs them some milliseconds."""
ENDS = [1, 310]
SHORT = 512
"""Prompts of at most so many tokens are short."""


@dataclass(slots=True)
class Asked:
    """One request, and what its client saw. Times in seconds, on this process's clock."""

    prompt: int
    output: int
    due: float
    code: str = ""
    tokens: int = 0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    last: float = 0.0

    @property
    def ttft_s(self) -> float:
        """From when it was due."""
        return float("inf") if self.first is None else self.first - self.due

    def got(self, now: float, count: int) -> None:
        """A message with so many tokens."""
        self.tokens += count
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.gaps += [0.0] * (count - 1)
        self.last = now

    def good(self, slo: Slo) -> bool:
        """Served, the first token and the p99 of the gaps in time."""
        if self.code != "OK" or self.ttft_s > slo.ttft_s:
            return False
        return quantile(self.gaps, 0.99) <= slo.gap_s


@dataclass(slots=True)
class Load:
    """One run."""

    asked: list[Asked]
    seconds: float
    lag_s: float
    """The worst of the loops' p99."""
    cores: dict[str, float]
    """What each process used."""

    @property
    def tokens_per_s(self) -> float:
        """Delivered."""
        return sum(each.tokens for each in self.asked) / self.seconds


def quantile(values: Sequence[float], share: float) -> float:
    """By the nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def model(folder: Path, **shape: Any) -> Path:
    """A small random model; a paced engine reads its sizes only."""
    sizes = {"vocab": VOCAB, "context": CONTEXT, "dtype": "bfloat16", "tokenizer": True, "eos": ENDS}
    return make_llama(folder / "model", **{**sizes, **shape})


@contextlib.contextmanager
def serving(config: DeploymentConfig, folder: Path, log: Path, say: Any = lambda line: None) -> Iterator[Live]:
    """A deployment that is ready, its workers on another core than everything else."""
    live = Live(config, folder, log, say)
    live.torn, live.expected = True, [".*"]
    cores = sorted(os.sched_getaffinity(0))
    try:
        live.start()
        if len(cores) > 1:
            for each in live.deployment.running.values():
                pin(each.process.pid, {cores[-1]} if isinstance(each.config, WorkerConfig) else {cores[0]})
            pin(os.getpid(), {cores[0]})
        yield live
    finally:
        pin(os.getpid(), set(cores))
        live.deployment.stop()


def pin(pid: int, cores: set[int]) -> None:
    """All threads of a process, and so those that they will start."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


def requests(workload: Workload, seed: int) -> list[inference_pb2.GenerateRequest]:
    """What the workload's clients send: random tokens, so that no two begin alike, and no end before the last."""
    draw = random.Random(seed)
    made = []
    for arrival in workload.arrivals:
        request = inference_pb2.GenerateRequest(max_tokens=arrival.output, ignore_eos=True)
        request.token_ids.ids.extend(draw.choices(range(2, 300), k=arrival.prompt))
        made.append(request)
    return made


async def opened(live: Live, workload: Workload, seed: int, timeout_s: float = 120.0) -> Load:
    """Each request at its time; returns when all have ended."""
    asked = [Asked(each.prompt, each.output, 0.0) for each in workload.arrivals]
    made = requests(workload, seed)
    async with Client(live.gateway) as client, _watched(live) as watch:
        begin = time.monotonic() + 0.1
        tasks = []
        for arrival, one, request in zip(workload.arrivals, asked, made, strict=True):
            one.due = begin + arrival.at_s - workload.arrivals[0].at_s
            await asyncio.sleep(max(0.0, one.due - time.monotonic()))
            tasks.append(asyncio.create_task(_go(client, request, one, timeout_s)))
        await asyncio.gather(*tasks)
        seconds = time.monotonic() - begin
    return Load(asked, seconds, watch.lag_s, watch.cores)


async def closed(live: Live, workload: Workload, seed: int, clients: int, seconds: float) -> Load:
    """So many clients, each with a request all the time; what is under way at the end is not waited for."""
    made = requests(workload, seed)
    asked: list[Asked] = []
    until = time.monotonic() + seconds

    async def always(client: Client) -> None:
        while len(asked) < len(made):
            now = time.monotonic()
            arrival = workload.arrivals[len(asked)]
            one = Asked(arrival.prompt, arrival.output, now)
            asked.append(one)
            await _go(client, made[len(asked) - 1], one, seconds)

    async with Client(live.gateway) as client, _watched(live) as watch:
        begin = time.monotonic()
        tasks = [asyncio.create_task(always(client)) for _ in range(clients)]
        await asyncio.sleep(until - time.monotonic())
        took_s = time.monotonic() - begin
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Load([one for one in asked if one.code == "OK"], took_s, watch.lag_s, watch.cores)


async def _go(client: Client, request: inference_pb2.GenerateRequest, one: Asked, timeout_s: float) -> None:
    try:
        async for response in client.stub.Generate(request, timeout=timeout_s):
            if response.token_ids:
                one.got(time.monotonic(), len(response.token_ids))
        one.code = "OK"
    except grpc.aio.AioRpcError as error:
        one.code = error.code().name


class _Watch:
    """How late loops wake, and what processes use."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._own: list[float] = []
        self._others: list[float] = []
        self.lag_s = 0.0
        self.cores: dict[str, float] = {}

    async def tick(self) -> None:
        """This process's loop."""
        while True:
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self._own.append(time.monotonic() - due)

    async def look(self) -> None:
        """The others'."""
        while True:
            await asyncio.sleep(LOOK_S)
            for name, each in list(self._live.deployment.running.items()):
                if each.config.process in ("gateway", "worker") and each.process.poll() is None:
                    with contextlib.suppress(OSError):
                        self._others.append(await asyncio.to_thread(self._live.metric, name, "baton_loop_lag_seconds"))

    def used(self) -> dict[str, float]:
        """CPU seconds by process, this one's under "load"."""
        pids = {name: each.process.pid for name, each in self._live.deployment.running.items()}
        return {name: spent_s(pid) for name, pid in {**pids, "load": os.getpid()}.items()}

    def end(self, before: dict[str, float], seconds: float) -> None:
        """What it comes to."""
        self.lag_s = max(quantile(self._own, 0.99), quantile(self._others, 0.99))
        after = self.used()
        self.cores = {name: max(0.0, after[name] - before.get(name, 0.0)) / seconds for name in after}


@contextlib.asynccontextmanager
async def _watched(live: Live) -> AsyncIterator[_Watch]:
    watch = _Watch(live)
    before, began = watch.used(), time.monotonic()
    tasks = [asyncio.create_task(watch.tick()), asyncio.create_task(watch.look())]
    try:
        yield watch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        watch.end(before, time.monotonic() - began)


def spent_s(pid: int) -> float:
    """CPU seconds of a process; 0 of one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
