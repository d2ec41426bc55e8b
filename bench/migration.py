"""How long a row stands still that moves between decode workers, beside decode steps, at several context lengths.

One prefill and two decode workers; five requests of one length decode, so that one worker has three of them and the
other two. The bounds of freeness lie between the two, so that rows go to and fro all the while. The prompts were
computed before, so that all streams begin nearly at once. The pause is taken at the client: the gap between the last
token of the worker before and the first of the next, which the stages of the last message tell apart. It is held
against three decode steps, a step being the median gap of all streams, once all of them run.
"""

from __future__ import annotations

import math
import os
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.handover import MAX_LAG_S, ask, lag, quantile
from bench.report import Row, emit, parser, progress
from control.client import generate, members
from control.launcher import Deployment
from control.up import wait_ready
from core.config import DeploymentConfig
from core.errors import RpcFailure
from tests.checkpoints import make_llama

STREAMS = 5
STEPS = 3
"""Decode steps that a row may stand still."""
VOCABULARY = 32000
KV_MEMORY = "1G"
ARENA_TOKENS = 2**30 // (12 * 2 * 4 * 64 * 2)
MOST_TOKENS = 500
"""That any request generates."""


@dataclass(slots=True)
class Sample:
    """What was measured at one context length, in seconds and bytes."""

    since: float = math.inf
    """When the last of the streams had begun: what was before is not counted."""
    gaps: list[float] = field(default_factory=list)
    """Between tokens that the same worker made."""
    pauses: list[float] = field(default_factory=list)
    told: list[float] = field(default_factory=list)
    """Of each pause what the workers' own stages say."""
    nbytes: list[int] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)


def stream(gateway: str, prompt: list[int], tokens: int, sample: Sample, begun: threading.Event) -> None:
    """One request from its first token to its last."""
    times: list[float] = []
    end = None
    for response in generate(gateway, ask(prompt, tokens)):
        times += [time.perf_counter()] * len(response.token_ids)
        begun.set()
        if response.HasField("end"):
            end = response.end
    if end is None or end.attempts != 1:
        raise RpcFailure(f"a request was disturbed: {end}")
    parts = [int(stage.detail["steps"]) for stage in end.stages if stage.name == "decode"]
    edges, made = set(), 1
    for steps in parts[:-1]:
        made += steps
        edges.add(made)
    if not parts or made + parts[-1] != len(times):
        raise RpcFailure(f"stages tell of {made} tokens and more, {len(times)} came")
    for at in range(2, len(times)):
        if times[at - 1] < sample.since:
            continue
        (sample.pauses if at in edges else sample.gaps).append(times[at] - times[at - 1])
    moves = [stage for stage in end.stages if stage.name == "move"]
    sample.told += [stage.seconds for stage in moves]
    sample.nbytes += [int(stage.detail["nbytes"]) for stage in moves]


def measure(cluster: Deployment, context: int, tokens: int, draw: random.Random) -> Sample:
    """Five streams of so many tokens whose contexts grow from `context`."""
    sample = Sample()
    failed: list[BaseException] = []
    gateway = cluster.gateways[0]

    def one(prompt: list[int], begun: threading.Event) -> None:
        try:
            stream(gateway, prompt, tokens, sample, begun)
        except BaseException as error:
            failed.append(error)
        begun.set()

    prompts = [[draw.randrange(10, VOCABULARY) for _ in range(context)] for _ in range(STREAMS)]
    for prompt in prompts:
        list(generate(gateway, ask(prompt, 1)))
    threads = []
    for prompt in prompts:
        begun = threading.Event()
        threads.append(threading.Thread(target=one, args=(prompt, begun), daemon=True))
        threads[-1].start()
        begun.wait()
    sample.since = time.perf_counter()
    decodes = [member for member in members(cluster.coordinator) if member.role == "decode"]
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        sample.lags += [lag(member.metrics_address) for member in decodes]
    if failed:
        raise failed[0]
    return sample


def pin(cluster: Deployment) -> None:
    """The decode workers' engines never share a core."""
    cores = sorted(os.sched_getaffinity(0))
    for name, running in cluster.running.items():
        if name.startswith("decode"):
            core = cores[-1 - int(name.rpartition("-")[2]) % len(cores)]
            for task in os.listdir(f"/proc/{running.process.pid}/task"):
                os.sched_setaffinity(int(task), {core})


def rows(context: int, sample: Sample) -> list[Row]:
    """The sample beside its bound; a ratio above 1 is below the bound."""
    step_s = quantile(sample.gaps, 0.5)
    case = f"context {context}"
    return [
        Row(f"{case}: pause, p50", quantile(sample.pauses, 0.5) * 1e3, STEPS * step_s * 1e3,
            f"{STEPS} decode steps", "ms", False),
        Row(f"{case}: pause, p90", quantile(sample.pauses, 0.9) * 1e3, None, "", "ms", False),
        Row(f"{case}: pause as the workers tell it, p50", quantile(sample.told, 0.5) * 1e3, None, "", "ms", False),
        Row(f"{case}: decode step, p50", step_s * 1e3, None, "", "ms", False),
        Row(f"{case}: moves", len(sample.pauses), None, "", ""),
        Row(f"{case}: bytes a move, p50", quantile([float(n) for n in sample.nbytes], 0.5) / 1e6, None, "", "MB"),
    ]  # fmt: skip


def main() -> None:
    """A random 100 M-parameter model, bf16."""
    args = parser("migration", "how long a row stands still that moves, beside decode steps").parse_args()
    contexts, tokens = ((256, 1024), 60) if args.quick else ((256, 1024, 4096, 8192), MOST_TOKENS)
    found: list[Row] = []
    lags: list[float] = []
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        model = make_llama(
            Path(scratch) / "llama-100m", layers=12, hidden=768, intermediate=2048, heads=12, kv_heads=4,
            vocab=VOCABULARY, context=16384, dtype="bfloat16", tokenizer=True,
        )  # fmt: skip
        config = DeploymentConfig(
            model=str(model), port=0, decode=2, kv_memory=KV_MEMORY, threads=1, migrate=True, max_queue_s=600.0,
            migrate_below_steps=edge(contexts), migrate_above_steps=edge(contexts),
        )  # fmt: skip
        with Deployment(config, model, "bench", log_path=Path(scratch) / "log") as cluster:
            wait_ready(cluster)
            pin(cluster)
            measure(cluster, 64, 10, draw)
            for context in contexts:
                sample = measure(cluster, context, tokens, draw)
                progress(f"  context {context}: {len(sample.pauses)} moves, load {os.getloadavg()[0]:.1f}")
                if not sample.pauses:
                    raise RpcFailure(f"no row moved at a context of {context}")
                found += rows(context, sample)
                lags += sample.lags
    found.append(Row("loop lag of the decode workers, p99", quantile(lags, 0.99) * 1e3, None, "", "ms", False))
    emit("migration", found, args.json)
    if quantile(lags, 0.99) > MAX_LAG_S:
        progress("rejected: the loops' lag says that the machine was too busy to measure")
        sys.exit(1)


def edge(contexts: tuple[int, ...]) -> int:
    """Steps of freeness below which a worker with three rows is, and above which one with two."""
    short, ample = ARENA_TOKENS // 3 - contexts[0], ARENA_TOKENS * 19 // 40 - contexts[-1] - MOST_TOKENS
    if short >= ample:
        raise ValueError(f"contexts up to {contexts[-1]} do not fit: got {short} to {ample} steps")
    return (short + ample) // 2


if __name__ == "__main__":
    main()
