"""vLLM with one prefill and one decode server over NIXL, and Baton with one of each, on the same two cores.

    python -m bench.peer_vllm --setup [--env DIR]        makes the peer's own environment, once: 3.7 GB
    python -m bench.peer_vllm [--json FILE] [--only SECTION,...] [--model 100m,20m] [--repeats 3]
    python -m bench.peer_vllm --quick                    the small model, few requests, nothing compiled, no faults

The same random models, the same request lists (bench/peer_load.py), the same client; docs/peers.md says what is
compared and what is not. Both sides compute in bf16 where this CPU multiplies it, else in fp32: without AVX-512 either
takes several times as long in bf16.

Sections are c1, c4, c16 (so many clients that always have a request each), open (Poisson, at 60 % of the requests that
the peer did in c16) and the faults of bench/peer_faults.py. Both deployments stay up while a model is measured, and
take turns, so that what the machine does meanwhile meets both; who is not asked idles, and what everybody else took of
the cores is reported. With ``--only`` and ``--json`` the new rows replace those of the same name in the file.

The peer has its own environment, patched so that its polling does not take half of each core: the comparison flatters
it (bench/peer_env.py). ``--quick`` cannot take less than a minute for the start of the two servers alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bench import peer_env
from bench.peer_faults import FAULTS, Outcome, disturb, table, told
from bench.peer_load import Ask, Sample, asks, closed, joined, opened, quantile
from bench.peer_sides import CONTEXT, Ours, Theirs, seconds
from bench.report import Row, emit, machine, median, parser, progress
from engine.backend import default_dtype
from tests.checkpoints import make_llama

VOCABULARY = 32000
MODELS: dict[str, dict[str, Any]] = {
    "100m": {"layers": 12, "hidden": 768, "intermediate": 2048, "heads": 12, "kv_heads": 4},
    "20m": {"layers": 6, "hidden": 256, "intermediate": 768, "heads": 4, "kv_heads": 2},
}
CLIENTS = {"c1": 1, "c4": 4, "c16": 16}
COUNTS = {
    "100m": {"c1": 8, "c4": 16, "c16": 32, "open": 24},
    "20m": {"c1": 16, "c4": 48, "c16": 96, "open": 96},
}
"""Requests of each load: so many that three repeats of everything take 25 minutes on two cores without AVX-512."""
QUICK = {"c1": 4, "c4": 8, "c16": 16, "open": 8}
LOADS = ("c1", "c4", "c16", "open")
SHARE = 0.6
WARM = 12
MOST_FOREIGN = 0.1
"""Cores that nobody under measurement may take."""
SETTLE_S = 1.5
"""Before each run: the peer's model process looks for work for a second after its last."""
FAULTY = "20m"
"""The model that the faults are shown with."""
Deployed = TypeVar("Deployed", Ours, Theirs)


@dataclass(slots=True)
class Run:
    """One load at one side: a sample each repeat."""

    samples: list[Sample] = field(default_factory=list)
    hand_overs_s: list[float] = field(default_factory=list)
    """As the peer's proxy sees them; ours are seen by the client."""
    foreign: float = 0.0
    """Cores that went to nobody under measurement, in the worst of the repeats."""

    def figures(self) -> dict[str, tuple[float, str, bool]]:
        """What is reported: a name, the figure, its unit, and whether more is better."""
        seen = joined(self.samples).good
        gaps = [gap for each in seen for gap in each.gaps_s]
        overs = self.hand_overs_s or [each.second_s for each in seen]
        found = {}
        for name, values, qs in (
            ("TTFT", [each.ttft_s for each in seen], (0.5, 0.99)),
            ("gap", gaps, (0.5, 0.99)),
            ("prefill's answer to decode's first token", overs, (0.5, 0.99)),
            ("first to second token", [each.second_s for each in seen], (0.5, 0.99)),
            ("request", [each.times[-1] - each.asked for each in seen], (0.5,)),
        ):
            for q in qs:
                found[f"{name} p{q * 100:g}"] = (quantile(values, q) * 1e3, "ms", False)
        found["tokens/s"] = (median([each.tokens_per_s for each in self.samples]), "tokens/s", True)
        found["requests/s"] = (median([each.requests_per_s for each in self.samples]), "requests/s", True)
        lost = sum(len(each.seen) - len(each.good) for each in self.samples)
        found["lost"] = (float(lost), "requests", False)
        found["cores that others took, worst repeat"] = (self.foreign, "cores", False)
        return found


class Found:
    """The rows by their cases; those of a file to begin with, if parts of it are measured again."""

    def __init__(self, path: Path | None, keep: bool, peer_name: str = peer_env.NAME) -> None:
        self._path = path
        self._peer_name = peer_name
        self.rows: dict[str, Row] = {}
        if keep and path is not None and path.exists():
            for row in json.loads(path.read_text())["rows"]:
                row.pop("ratio")
                self.rows[row["case"]] = Row(**row)

    def add(self, case: str, ours: float, theirs: float | None, unit: str, higher: bool = False) -> None:
        """A figure of both sides; where ours could not be had there is no row, where theirs could not, no ratio."""
        self.rows.pop(case, None)
        if not math.isnan(ours):
            peer = None if theirs is None or math.isnan(theirs) else theirs
            self.rows[case] = Row(case, ours, peer, self._peer_name, unit, higher)

    def load(self, case: str, ours: Run, theirs: Run) -> None:
        """All figures of a load."""
        peer = theirs.figures()
        for name, (value, unit, higher) in ours.figures().items():
            self.add(f"{case}: {name}", value, peer[name][0], unit, higher)

    def fault(self, case: str, fault: str, ours: Outcome, theirs: Outcome) -> None:
        """All figures of a fault."""
        for what, value, peer, unit in table(fault, ours, theirs):
            self.add(f"{case}: {what}", value, peer, unit)

    def save(self) -> None:
        """Write what there is so far: the rest takes long, and may fail."""
        if self._path is not None:
            rows = [row.document() for row in self.rows.values()]
            self._path.write_text(
                json.dumps({"bench": "peer_vllm", "machine": machine(), "rows": rows}, indent=1) + "\n"
            )

    def emit(self) -> None:
        """Print the report, and write it."""
        emit("peer_vllm", self.rows.values(), self._path)


def busy_s() -> float:
    """Processor time that this machine has used, what its host took of it included."""
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


async def measure(
    side: Ours | Theirs, requests: Sequence[Ask], clients: int, pids: Callable[[], list[int]], run: Run
) -> None:
    """One repeat of a load; `clients` 0: each request at its own time. `pids` are all that may use the machine."""
    await asyncio.sleep(SETTLE_S)
    side.take_times()
    before = busy_s() - seconds(pids())
    sample = await (closed(side, requests, clients) if clients else opened(side, requests))
    run.foreign = max(run.foreign, (busy_s() - seconds(pids()) - before) / sample.wall_s)
    run.samples.append(sample)
    run.hand_overs_s += [hand_over_s for _, hand_over_s in side.take_times()]


async def loads(
    name: str, ours: Ours, theirs: Theirs, sections: Sequence[str], counts: dict[str, int], repeats: int, found: Found
) -> None:
    """All loads of a model, the sides in turn."""
    runs = {section: (Run(), Run()) for section in sections}
    rate = 0.0

    def pids() -> list[int]:
        return [os.getpid(), *ours.pids(), *theirs.pids()]

    for side in (ours, theirs):
        await closed(side, asks(f"{name} warm", WARM, VOCABULARY), 4)
    for repeat in range(repeats):
        for section, both in runs.items():
            if section == "open":
                rate = rate or SHARE * offered(name, runs.get("c16"), found)
            requests = asks(f"{name} {section}", counts[section], VOCABULARY, rate if section == "open" else 0.0)
            turn: list[tuple[Ours | Theirs, Run]] = [(ours, both[0]), (theirs, both[1])]
            for side, run in turn if repeat % 2 == 0 else turn[::-1]:
                side.pin()
                await measure(side, requests, CLIENTS.get(section, 0), pids, run)
            progress(f"  {name} {section}: " + " | ".join(said(side.name, run) for side, run in turn))
    for section, both in runs.items():
        found.load(f"{name} {section}", *both)
    if rate:
        found.add(f"{name} open: requests/s that were asked", rate, rate, "requests/s")
    found.save()


def offered(name: str, c16: tuple[Run, Run] | None, found: Found) -> float:
    """Requests a second that the peer did with sixteen clients: now, or as the file says."""
    if c16 and c16[1].samples:
        return c16[1].samples[0].requests_per_s
    row = found.rows.get(f"{name} c16: requests/s")
    if row is None or row.peer is None:
        raise SystemExit("open: its rate is a share of what the peer did in c16: measure that, too, or name its --json")
    return row.peer


def said(name: str, run: Run) -> str:
    """The latest repeat, for people."""
    sample = run.samples[-1]
    good = sample.good
    first, gaps = [each.ttft_s for each in good], [gap for each in good for gap in each.gaps_s]
    whys = {each.why for each in sample.seen if each.why}
    return (
        f"{name.split(',')[0]}: {len(good)} of {len(sample.seen)}, TTFT {quantile(first, 0.5) * 1e3:.1f}, "
        f"gap {quantile(gaps, 0.5) * 1e3:.1f} ms, {sample.tokens_per_s:.0f} tokens/s"
        + "".join(f" ({why})" for why in whys)
    )


async def faults(name: str, ours: Ours, theirs: Theirs, wanted: Sequence[str], found: Found) -> dict[str, Outcome]:
    """All faults of a model; returns the peer's outcomes."""
    peer = {}
    for fault in wanted:
        one, other = await disturb(ours, fault, VOCABULARY), await disturb(theirs, fault, VOCABULARY)
        peer[fault] = other
        found.fault(f"{name} {fault}", fault, one, other)
        progress(told(fault, ((ours.name, one), (theirs.name, other))))
        found.save()
        for side in (ours, theirs):
            await closed(side, asks(f"{name} warm", WARM, VOCABULARY), 4)
    return peer


@contextlib.asynccontextmanager
async def up(side: Deployed) -> AsyncIterator[Deployed]:
    """A deployment while it is needed."""
    began = time.monotonic()
    try:
        side.start()
        progress(f"  {side.name} serves after {time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f}")
        await side.open()
        yield side
    finally:
        await side.close()
        side.stop()


async def compare(args: argparse.Namespace, env: Path, scratch: Path, found: Found) -> None:
    """All that was asked for."""
    for name in args.model:
        model = make_llama(
            scratch / f"llama-{name}", **MODELS[name], vocab=VOCABULARY, context=CONTEXT, dtype="bfloat16",
            tokenizer=True,
        )  # fmt: skip
        progress(f"random {name} model, stored in bf16, computed in {args.dtype} at both sides")
        sections = [section for section in LOADS if section in args.only]
        breaks = [fault for fault in FAULTS if fault in args.only] if name == args.faults_of else []
        if not sections and not breaks:
            continue
        theirs = Theirs(env, model, scratch, args.dtype, args.eager)
        peer: dict[str, Outcome] = {}
        async with up(theirs):
            async with up(Ours(model, scratch, args.dtype)) as ours:
                await loads(name, ours, theirs, sections, QUICK if args.quick else COUNTS[name], args.repeats, found)
                peer = await faults(name, ours, theirs, breaks, found)
        for fault in [each for each in breaks if each.startswith("kill")]:
            async with up(Ours(model, scratch, args.dtype, spare=True)) as ours:
                outcome = await disturb(ours, fault, VOCABULARY)
                found.fault(f"{name} {fault}, ours with a worker of both phases beside", fault, outcome, peer[fault])
                progress(told(f"{fault} with a spare", ((ours.name, outcome),)))


def main() -> None:
    """What the module's first lines say."""
    flags = parser("peer_vllm", "vLLM's prefill and decode servers over NIXL beside ours, on the same cores")
    flags.add_argument("--setup", action="store_true", help="make the peer's own environment first, 3.7 GB")
    flags.add_argument("--env", metavar="DIR", help="where that is; else under $BATON_CACHE or the user's cache")
    flags.add_argument("--only", metavar="SECTION,...", type=words, help=", ".join((*LOADS, *FAULTS)))
    flags.add_argument("--model", metavar="MODEL,...", type=words, help=", ".join(MODELS))
    flags.add_argument("--faults-of", metavar="MODEL", default=FAULTY, help=f"the faults' model ({FAULTY})")
    flags.add_argument("--repeats", type=int, default=3, help="of each load (3)")
    flags.add_argument("--dtype", choices=("bfloat16", "float32"), help="what both sides compute in")
    flags.add_argument("--eager", action="store_true", help="the peer compiles nothing: a quick start, slower steps")
    flags.add_argument("--logs", metavar="DIR", help="keep the models and all logs there")
    args = flags.parse_args()
    keep = bool(args.only or args.model)
    args.only = args.only or (LOADS if args.quick else (*LOADS, *FAULTS))
    args.model = args.model or (["20m"] if args.quick else list(MODELS))
    args.eager |= args.quick
    args.dtype = args.dtype or default_dtype("bfloat16", "cpu")
    args.repeats = 1 if args.quick else args.repeats
    for name, known in ((args.only, (*LOADS, *FAULTS)), (args.model, tuple(MODELS))):
        if unknown := set(name) - set(known):
            flags.error(f"got {', '.join(sorted(unknown))}, want some of {', '.join(known)}")
    env = peer_env.directory(args.env)
    if args.setup:
        peer_env.setup(env, progress)
    if why := peer_env.missing(env):
        progress(why)
        Found(None, keep=False).emit()
        sys.exit(0 if args.quick else 3)
    peer_name = f"{peer_env.NAME}{', nothing compiled' if args.eager else ''}; both sides in {args.dtype}"
    found = Found(Path(args.json) if args.json else None, keep, peer_name)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who ends this ends all that it started
    with contextlib.ExitStack() as stack:
        scratch = Path(args.logs or stack.enter_context(tempfile.TemporaryDirectory()))
        scratch.mkdir(parents=True, exist_ok=True)
        asyncio.run(compare(args, env, scratch, found))
    found.emit()
    if busy := [case for case, row in found.rows.items() if "others took" in case and disturbed(row)]:
        progress(f"rejected: others took more than {MOST_FOREIGN} cores in {'; '.join(busy)}")
        sys.exit(1)


def words(text: str) -> list[str]:
    """The words of a list with commas."""
    return text.split(",")


def disturbed(row: Row) -> bool:
    """Whether others used the machine meanwhile."""
    return max(row.ours, row.peer or 0.0) > MOST_FOREIGN


if __name__ == "__main__":
    main()
