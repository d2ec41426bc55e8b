"""How fast the simulator is: requests a second of CPU time on one core, through all the classes that run live.

    python -m bench.simulator [--quick] [--json FILE] [--search] [--peer DIR --peer-python PYTHON] [--compiled DIR]

4 prefill and 4 decode workers under "baton" (two queues, admission by future memory), prompts of the Azure conversation
trace (its shipped shape where there is no trace: BATON_TRACES), 200 tokens of output each, Poisson arrivals at 70 % and
at 20 % of what these workers sustain. Once with all the memory that the devices have, and once with decode workers so
small that the test "all forecast lengths fit at once" mostly fails and the peak is computed: in under half of the
admissions at 70 %. At 20 % there are too few requests at once for that: the size with the smallest share was taken, and
it is too small to serve most of them in time ("good"). Only whole runs are measured, generation of arrivals, invariants
every 1,000 events and the tally of outcomes included; no profiler runs meanwhile.

Beside the seconds, which other work on the machine disturbs: calls a request, of Python and of built-in functions.
`--peer` is a checkout of DistServe's repository, `--peer-python` an interpreter with what its simulator needs: it is
run in turn with ours, on the same lengths (cut to the 2,048 tokens of its models), and only its event loop is timed.
`--compiled` is a folder that `python -m deploy.compiled` made: the cases are run in turn there and here, each time in a
process of its own, and have the same outcomes or there is no figure. `--search` finds the goodput again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from bench.report import Row, emit, median, parser, progress
from core.errors import SetupError
from core.request import Slo
from scheduler.past_future import PastFuture
from scheduler.policies import BATON, Policy
from sim import traces
from sim.fleet import Build, workers
from sim.generators import AZURE_CONV, generate
from sim.goodput import Goal, search, trial
from sim.outcome import Outcome
from sim.run import Result, Settings, Simulation, simulate
from sim.workload import Arrival, Workload

WORKERS = "4 prefill, 4 decode"
COST = "h200-llama-3.1-8b"
PAGE_TOKENS = 16
OUTPUT = 200
SETTINGS = Settings(slo=Slo(0.4, 0.05))
CAPACITY = 195.0
"""Requests a second at which 90 % are good: found by `--search`, seed 1, 3,000 requests."""
TIGHT = {0.7: 60_000, 0.2: 13_500}
"""Tokens of KV of a decode worker where memory is tight, by the load's share of the capacity."""
STEPPED = replace(BATON, name="stepped", decode_config=replace(BATON.decode_config, max_steps=1))
"""A decode order is one step."""
PEER = """
import json, sys, time
import simpy
from simdistserve.benchmarks import simulate_dist
run, spent = simpy.Environment.run, []
def timed(self, *args, **kwargs):
    began = time.process_time()
    try:
        return run(self, *args, **kwargs)
    finally:
        spent.append(time.process_time() - began)
simpy.Environment.run = timed
simulate_dist.main(simulate_dist.parse_args(sys.argv[1:]))
print(json.dumps(sum(spent)))
"""
ROOT = Path(__file__).resolve().parent.parent
PEER_RATE = 2.0
"""Requests a second: about 70 % of what its table says two devices sustain."""
PEER_CONTEXT = 2048


def prompts() -> Sequence[int]:
    """Prompt lengths to draw from."""
    try:
        read = traces.read(traces.find("azure_llm_2023_conv.csv.gz"))
    except SetupError:
        progress("no trace (BATON_TRACES): the shipped shape of it is used")
        read = generate(AZURE_CONV, 1, 20_000)
    return [arrival.prompt for arrival in read.arrivals]


def stream(lengths: Sequence[int], rate: float, seed: int, count: int) -> Iterator[Arrival]:
    """Poisson arrivals, one after the other: nobody keeps them."""
    dice, at_s = random.Random(seed), 0.0
    for _ in range(count):
        at_s += dice.expovariate(rate)
        yield Arrival(at_s, dice.choice(lengths), OUTPUT)


def fleet(kv: int | None) -> tuple[Build, ...]:
    """The workers; `kv` tokens at each decode worker in place of what fits."""
    ample = workers(WORKERS, COST, page_tokens=PAGE_TOKENS)
    if kv is None:
        return ample
    return tuple([replace(build, pages=kv // PAGE_TOKENS) if build.role.decodes else build for build in ample])


def run(
    lengths: Sequence[int], share: float, kv: int | None, count: int, policy: Policy = BATON
) -> tuple[Result, float, float]:
    """What came of it, CPU seconds, and the share of admissions by the quick test."""
    found: list[Simulation] = []
    builds = fleet(kv)
    began = time.process_time()
    result = simulate(stream(lengths, share * CAPACITY, 1, count), builds, policy, SETTINGS, watch=found.append)
    took_s = time.process_time() - began
    shells = [worker.decode for worker in found[0].workers.values() if worker.decode is not None]
    rules = [shell.policy.admission for shell in shells if isinstance(shell.policy.admission, PastFuture)]
    quick, peaks = sum(rule.quick for rule in rules), sum(rule.peaks for rule in rules)
    return result, took_s, quick / max(1, quick + peaks)


def calls(lengths: Sequence[int], share: float, kv: int | None, count: int) -> float:
    """Calls a request, of Python and of built-in functions: the same on every machine."""
    counted = 0

    def count_it(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count_it)
    try:
        run(lengths, share, kv, count)
    finally:
        sys.setprofile(None)
    return counted / count


def case(lengths: Sequence[int], share: float, kv: int | None, count: int, repeats: int) -> Iterator[Row]:
    """One load with one memory."""
    name = f"{share:.0%} of the goodput, {'ample' if kv is None else 'tight'} KV"
    run(lengths, share, kv, min(count, 300))  # warm
    runs = [run(lengths, share, kv, count) for _ in range(repeats)]
    result, _, quick = runs[0]
    speeds = sorted(count / took_s for _, took_s, _ in runs)
    progress(f"{name}: {', '.join(f'{speed:.0f}' for speed in speeds)} requests/s")
    yield Row(f"{name}: best of {repeats}", speeds[-1], None, "", "requests/CPU s")
    yield Row(f"{name}: median of {repeats}", median(speeds), None, "", "requests/CPU s")
    yield Row(f"{name}: calls", calls(lengths, share, kv, min(count, 500)), None, "", "a request", False)
    yield Row(f"{name}: events", result.events / count, None, "", "a request", False)
    yield Row(f"{name}: decode orders", result.runs / count, None, "", "a request", False)
    yield Row(
        f"{name}: batch", (OUTPUT - 1) * result.tally.phases.total() / max(1, result.steps), None, "", "rows a step"
    )
    yield Row(f"{name}: admitted by the quick test", quick, None, "", "share")
    yield Row(f"{name}: good", result.tally.attainment, None, "", "share")


def orders(lengths: Sequence[int], count: int, repeats: int) -> Iterator[Row]:
    """What standing orders gain over an order for every step."""
    for share in (0.7, 0.2):
        jumped = min(run(lengths, share, None, count)[1] for _ in range(repeats))
        stepped = min(run(lengths, share, None, count, STEPPED)[1] for _ in range(repeats))
        progress(f"standing orders at {share:.0%}: {stepped / jumped:.2f} times")
        yield Row(
            f"{share:.0%} of the goodput: standing orders",
            count / jumped,
            count / stepped,
            "an order a step",
            "requests/CPU s",
        )


def resident(counts: Sequence[int]) -> list[float]:
    """MiB of resident memory of a process of its own, after so many requests of one run."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.simulator", "--resident", ",".join(map(str, counts))],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        out, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"bench.simulator: the run for memory ended with {child.returncode}")
    found: list[float] = json.loads(out)
    return found


def watch_memory(counts: Sequence[int]) -> None:
    """Print the resident memory of this process at those numbers of ended requests."""
    found: list[float] = []
    ended = 0

    def over(outcome: Outcome) -> None:
        nonlocal ended
        ended += 1
        if ended in counts:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    simulate(stream(prompts(), 0.7 * CAPACITY, 1, counts[-1]), fleet(None), BATON, SETTINGS, over=over)
    print(json.dumps(found))


def peer(folder: str, python: str, lengths: Sequence[int], count: int) -> float:
    """Requests a CPU second of DistServe's simulator, one prefill and one decode device."""
    arrivals = stream([min(length, PEER_CONTEXT - OUTPUT) for length in lengths], PEER_RATE, 1, count)
    asked = [{"start_time": each.at_s, "prompt_len": each.prompt, "output_len": each.output} for each in arrivals]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asked, file)
        file.flush()
        flags = ["--workload", file.name, "--arrival", "custom", "--N", str(count), "--rate", str(PEER_RATE)]
        done = subprocess.run(
            [python, "-c", PEER, *flags],
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"bench.simulator: the peer ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    seconds: float = json.loads(done.stdout.splitlines()[-1])
    return count / seconds


def one(lengths: Sequence[int], share: float, kv: int | None, count: int) -> tuple[float, str]:
    """Requests a CPU second, and a digest of the outcomes of the first 2,000 requests to the last digit."""
    run(lengths, share, kv, min(count, 300))  # warm
    speed = count / run(lengths, share, kv, count)[1]
    seen = hashlib.sha256()
    arrivals = stream(lengths, share * CAPACITY, 1, min(count, 2000))
    result = simulate(arrivals, fleet(kv), BATON, SETTINGS, over=lambda outcome: seen.update(repr(outcome).encode()))
    return speed, f"{seen.hexdigest()} {result.events} {result.steps} {result.seconds!r}"


def child(folder: Path, share: float, kv: int | None, count: int) -> tuple[float, str]:
    """`one`, by the code in `folder`, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.simulator", "--one", json.dumps([share, kv, count])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), traces.VARIABLE: str(traces.folder())},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    speed, digest = json.loads(done.stdout)
    return speed, digest


def compiled(folder: Path, count: int, repeats: int) -> Iterator[Row]:
    """What mypyc gains, in turn."""
    for share, tight in TIGHT.items():
        for kv in (None, tight):
            name = f"{share:.0%} of the goodput, {'ample' if kv is None else 'tight'} KV: compiled, best of {repeats}"
            pairs = [(child(folder, share, kv, count), child(ROOT, share, kv, count)) for _ in range(repeats)]
            if len({digest for pair in pairs for _, digest in pair}) > 1:
                raise SystemExit(f"bench.simulator: {folder}: got other outcomes than here")
            ours, theirs = (max(speed for speed, _ in side) for side in zip(*pairs, strict=True))
            progress(f"{name}: {ours:.0f}, in Python {theirs:.0f} requests/s")
            yield Row(name, ours, theirs, "in Python", "requests/CPU s")


def find(lengths: Sequence[int], count: int) -> float:
    """The goodput, as CAPACITY was found."""
    builds, goal = fleet(None), Goal(share=0.9, least=1)

    def make(rate: float, seed: int) -> Workload:
        return Workload("azure prompts", tuple(stream(lengths, rate, seed, count)))

    return search(lambda rate: trial(make, rate, 1, builds, BATON, SETTINGS, goal), 100.0, goal)[0].rate


def main() -> None:
    flags = parser("simulator", "How many requests a second the simulator simulates, on one core.")
    flags.add_argument("--search", action="store_true", help="find the goodput that the loads are shares of")
    flags.add_argument("--peer", metavar="DIR", help="a checkout of DistServe's repository, to run its simulator, too")
    flags.add_argument("--peer-python", metavar="PYTHON", default=sys.executable, help="with simpy and pandas")
    flags.add_argument("--resident", metavar="COUNTS", help="only print resident memory after so many requests")
    flags.add_argument("--compiled", metavar="DIR", type=Path, help="where deploy.compiled was told to build")
    flags.add_argument("--one", metavar="JSON", help="only print the speed and a digest of [load, KV tokens, requests]")
    options = flags.parse_args()
    if options.one:
        print(json.dumps(one(prompts(), *json.loads(options.one))))
        return
    if options.resident:
        watch_memory([int(count) for count in options.resident.split(",")])
        return
    lengths = prompts()
    count, repeats = (1000, 1) if options.quick else (20_000, 3)
    rows: list[Row] = []
    if options.search:
        rows.append(Row("goodput", find(lengths, 3000), None, "", "requests/s"))
    for share, kv in TIGHT.items():
        rows += case(lengths, share, None, count, repeats)
        rows += case(lengths, share, kv, count, repeats)
    rows += orders(lengths, min(count, 2000), repeats)
    if options.compiled:
        rows += compiled(options.compiled.resolve(), min(count, 5000), repeats)
    if options.peer:
        pairs = []
        for _ in range(repeats):
            ours_s = run(lengths, 0.7, None, min(count, 2000))[1]
            pairs.append(
                (min(count, 2000) / ours_s, peer(options.peer, options.peer_python, lengths, min(count, 1000)))
            )
            progress(f"ours {pairs[-1][0]:.0f}, simdistserve {pairs[-1][1]:.0f} requests/s")
        ours, theirs = (median(side) for side in zip(*pairs, strict=True))
        rows.append(
            Row("70% of the goodput, ample KV, in turn with a peer", ours, theirs, "simdistserve", "requests/CPU s")
        )
    if not options.quick:
        least, most = resident((20_000, 150_000))
        rows.append(Row("resident memory after 150,000 requests", most, least, "after 20,000", "MiB", False))
    emit("simulator", rows, options.json)


if __name__ == "__main__":
    main()
