"""How far the simulator is from live deployments: percentiles predicted from a recording beside those measured in it.

    python -m bench.fidelity_live [--quick] [--engine paced|torch] [--json FILE] [--keep DIR]

Two prefill and two decode workers are recorded in three runs: steady (Poisson arrivals at 60 % of what the simulator
says that the prefill workers can do), bursty (the same requests in clumps, gaps varying three times as much), and with
a kill (a decode worker is killed in the middle and started again). Then `baton simulate --recording` is asked: with
the recorded arrivals, lengths, workers, policy, losses, and what steps, messages, orders and reads took there, what
are p50, p90 and p99 of the time to the first token and of the gaps? `--quick`: 8 s of each run in place of 60.

Lengths are those of Azure's conversations, answers cut to 100 tokens; the paced engine takes PACE times as long as an
H200 does. `--engine torch` serves a small random model, on the cores that are there: its steps vary with whatever
else they do, which no model of a step knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench import live as harness
from bench.report import Row, emit, parser, progress
from core.config import DeploymentConfig
from sim.deployment import deployment
from sim.generators import AZURE_CONV, generate
from sim.predicted import SHARES, measured, predicted
from sim.workload import Workload, scale
from tests.live.cluster import Live

PACE = 6.0
"""Of the paced engine: so that processes use a part of their cores only."""
RATE = 8.0
"""Requests a second; about 60 % of what two prefill workers at this pace can do."""
OUTPUT = 100
"""Answers are cut to so many tokens: a minute is to hold many of them."""
RUNS = {"steady": 1.0, "bursty": 3.0, "kill": 1.0}
"""Variation of the gaps between arrivals."""


def workload(cv: float, seconds: float, rate: float, seed: int, cut: float = 1.0) -> Workload:
    """Azure's lengths, times `cut`, at this rate."""
    made = scale(generate(AZURE_CONV, seed, max(2, round(rate * seconds)), cv=cv), rate)
    return replace(
        made,
        arrivals=tuple(
            replace(each, prompt=max(1, round(each.prompt * cut)), output=min(OUTPUT, each.output))
            for each in made.arrivals
        ),
    )


def settings(model: Path, engine: str, record: Path) -> DeploymentConfig:
    """Of the deployment that is recorded."""
    paced = engine == "paced"
    return DeploymentConfig(
        model=str(model),
        port=0,
        prefill=2,
        decode=2,
        page_tokens=16,
        chunk_tokens=2048 if paced else 256,
        max_rows=64,
        kv_memory="64M",
        threads=1,
        engine=engine,
        pace=PACE,
        record=str(record),
    )


async def _run(live: Live, load: Workload, seconds: float, kill: bool) -> harness.Load:
    async def hurt() -> None:
        await asyncio.sleep(seconds / 3)
        await asyncio.to_thread(live.kill, "decode-0", signal.SIGKILL)
        await asyncio.sleep(1.0)
        await asyncio.to_thread(live.revive, "decode-0")

    hurting = asyncio.create_task(hurt()) if kill else None
    done = await harness.opened(live, load, 1)
    if hurting is not None:
        await hurting
    return done


def compared(engine: str, name: str, seconds: float, scratch: Path) -> Iterator[Row]:
    """One run, recorded and predicted."""
    scratch.mkdir(parents=True, exist_ok=True)
    shape = {} if engine == "paced" else {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 4}
    folder = harness.model(scratch, **shape)
    record = scratch / "recording"
    rate, cut = (RATE, 1.0) if engine == "paced" else (2.0, 0.25)
    load = workload(RUNS[name], seconds, rate, 1, cut)
    with harness.serving(settings(folder, engine, record), folder, scratch / "log") as live:
        done = asyncio.run(_run(live, load, seconds, name == "kill"))
    busy = ", ".join(f"{who} {used:.0%}" for who, used in sorted(done.cores.items()))
    progress(f"{name}: {len(load)} requests in {done.seconds:.0f} s; loops late {1e3 * done.lag_s:.1f} ms; {busy}")
    recorded = deployment(record)
    seen, said = measured(recorded.calls), predicted(recorded)
    progress(f"  hop {1e3 * recorded.settings.hop_s:.2f} ms, read {1e3 * recorded.read_s:.2f} ms")
    for worker, terms in recorded.terms.items():
        progress(f"  {worker}: {terms}")
    yield Row(f"{engine}, {name}: loop lag p99", done.lag_s, None, "", "s", False)
    yield Row(f"{engine}, {name}: requests", len(load), None, "", "")
    for what, ours, theirs in (("TTFT", seen.ttft_s, said.ttft_s), ("gap", seen.gap_s, said.gap_s)):
        for share, was, told in zip(SHARES, ours, theirs, strict=True):
            off = f"{100 * (told / was - 1):+.1f} %" if was else ""
            progress(f"  {what} p{100 * share:g}: measured {1e3 * was:.2f} ms, predicted {1e3 * told:.2f} ms, {off}")
            yield Row(f"{engine}, {name}: {what} p{100 * share:g}, predicted", told, was, "measured live", "s", False)
    yield Row(f"{engine}, {name}: placed again, predicted", said.again, seen.again, "measured live", "requests", False)


def main() -> None:
    flags = parser("fidelity_live", "How far the simulator is from live deployments that were recorded.")
    flags.add_argument("--engine", choices=("paced", "torch"), default="paced")
    flags.add_argument("--keep", metavar="DIR", help="keep the recordings there, prompts included")
    options = flags.parse_args()
    seconds = 8.0 if options.quick else 60.0
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        scratch = Path(options.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        for name in RUNS:
            rows += compared(options.engine, name, seconds, scratch / name)
    emit("fidelity_live", rows, options.json)


if __name__ == "__main__":
    main()
