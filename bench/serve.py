"""Serving under load: our policy, first come first served, the best shipped baseline and colocated workers, live.

    python -m bench.serve [--quick] [--json FILE] [--part paced|torch] [--rate R] [--rounds N]

Over gRPC, open loop (Poisson arrivals) and closed loop, prompts short and long in one stream: lengths are those of
Azure's conversations (half of the prompts below 1,020 tokens, one in a hundred above 4,142), answers cut to OUTPUT
tokens. Fixed before anything was measured.

- **paced**: four workers that are asleep for as long as an H200 would take for Llama 3.1 8B, times PACE, so that what
  is compared is who waits for whom, and this machine's two cores are no bound (what processes use is printed). Goals
  are an H200's, times PACE. The best shipped baseline, and the rate at which 90 % of its requests are good, are what
  the simulator says of this deployment (`--rate R`: R and shortest first); each round runs each policy at that rate
  and at one other, and with clients that always have one request.
- **torch**: a small random model, which computes, with a prefill and a decode worker on one shared core: that it
  works and what it costs here, not what scheduling gains (an idle role's core flows to the other role).

A deployment is started anew for each policy in each round. Rounds are interleaved; a run in which a loop was late
(p99 above 20 ms) is made again once, and told. Good: first token and p99 of the gaps within their goals, of all that
were asked. Goodput: the highest rate that was tried with 90 % good and no worse one below.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import live as harness
from bench.live import Asked, Load, quantile
from bench.report import Row, emit, parser, progress
from core.config import DEFAULT_COST, DeploymentConfig
from core.request import Slo
from scheduler.policies import SHIPPED, Policy, policy
from sim.fleet import workers
from sim.generators import AZURE_CONV, generate
from sim.outcome import Outcome
from sim.run import Settings, simulate
from sim.workload import Workload, scale
from tests.live.cluster import Live

PACE = 8.0
SLO = Slo(0.4 * PACE, 0.05 * PACE)
OUTPUT = 64
"""So that a run holds many requests, and messages of tokens take a part of the gateway's core only."""
CHUNK_TOKENS, MAX_ROWS, PAGE_TOKENS = 2048, 64, 16
KV_TOKENS = 262_144
"""Of a paced worker: plenty."""
OTHERS = (0.8, 1.15, 0.9, 1.3, 1.5)
"""Of the baseline's rate, one a round."""
SECONDS = 10.0
"""Of a run, which begins at rest."""
SEEDS = 8
"""Runs that are simulated for a point of a baseline's curve."""
QUICK_BEST, QUICK_RATE = "shortest", 10.0
"""With `--quick` nothing is searched."""
COLOCATED = "colocated-chunked"
CLIENTS = 12
"""Of the closed loop."""
SHARE = 0.9
TORCH = {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 4}
TORCH_RATE, TORCH_CUT = 2.0, 0.25
"""Requests a second, and what the lengths of prompts are multiplied by."""


@dataclass(slots=True)
class Pool:
    """All runs of one policy at one rate."""

    loads: list[Load] = field(default_factory=list)

    @property
    def asked(self) -> list[Asked]:
        """Of all runs."""
        return [one for load in self.loads for one in load.asked]

    def ttft_s(self, share: float, *, short: bool | None = None) -> float:
        """Of those who got a first token."""
        return quantile(
            [
                one.ttft_s
                for one in self.asked
                if one.first is not None and (short is None or (one.prompt <= harness.SHORT) is short)
            ],
            share,
        )

    def gaps(self) -> list[float]:
        """Of all answers."""
        return [gap for one in self.asked for gap in one.gaps]

    def good(self, slo: Slo) -> float:
        """Share of those who asked."""
        asked = self.asked
        return sum(one.good(slo) for one in asked) / max(1, len(asked))

    @property
    def tokens_per_s(self) -> float:
        """Mean of the runs."""
        return sum(load.tokens_per_s for load in self.loads) / max(1, len(self.loads))


def workload(rate: float, seconds: float, seed: int, cut: float = 1.0) -> Workload:
    """So many seconds of the scenario."""
    made = scale(generate(AZURE_CONV, seed, max(2, round(rate * seconds)), cv=1.0), rate)
    return replace(
        made,
        arrivals=tuple(
            replace(each, prompt=max(1, round(each.prompt * cut)), output=min(OUTPUT, each.output))
            for each in made.arrivals
        ),
    )


def settings(model: Path, name: str, engine: str) -> DeploymentConfig:
    """Of a deployment; colocated policies have as many workers, all of them mixed."""
    colocated = policy(name).colocated
    each = 2 if engine == "paced" else 1
    paced = engine == "paced"
    slo = SLO if paced else TORCH_SLO
    return DeploymentConfig(
        model=str(model),
        port=0,
        prefill=0 if colocated else each,
        decode=0 if colocated else each,
        mixed=2 * each if colocated else 0,
        page_tokens=PAGE_TOKENS,
        chunk_tokens=CHUNK_TOKENS if paced else 256,
        max_rows=MAX_ROWS,
        kv_memory="64M",
        threads=1,
        policy=name,
        preempt=True,
        engine=engine,
        pace=PACE,
        ttft_s=slo.ttft_s,
        gap_s=slo.gap_s,
    )


TORCH_SLO = Slo(2.0, 0.25)


class Simulated:
    """What the simulator says of the paced deployment."""

    def __init__(self) -> None:
        self._settings = Settings(slo=SLO, timeout_s=120.0)
        self._builds = [
            replace(build, cost=build.cost.at(PACE, PACE))
            for build in workers("2 prefill, 2 decode", DEFAULT_COST, page_tokens=PAGE_TOKENS, kv=KV_TOKENS)
        ]

    def policy(self, name: str) -> Policy:
        """As the processes have it."""
        return policy(name).sized(chunk_tokens=CHUNK_TOKENS, max_rows=MAX_ROWS, max_steps=16, suspends=True)

    def sustained(self, name: str, seconds: float) -> float:
        """Requests a second of which 90 % are good, in runs of this length that begin at rest, as the live ones do."""
        low, high = 4.0, 48.0
        while high / low > 1.03:
            rate = (low * high) ** 0.5
            ends = self.ran(name, [workload(rate, seconds, seed) for seed in range(SEEDS)])
            if sum(end.good for end in ends) >= SHARE * len(ends):
                low = rate
            else:
                high = rate
        return low

    def ran(self, name: str, loads: Sequence[Workload]) -> list[Outcome]:
        """Outcomes of these runs, each from rest."""
        ends: list[Outcome] = []
        for each in loads:
            simulate(each, self._builds, self.policy(name), self._settings, over=ends.append)
        return ends


def served(
    config: DeploymentConfig, model: Path, scratch: Path, runs: Sequence[Callable[[Live], Load]], *, again: bool
) -> Iterator[Load]:
    """One deployment, started anew; each run again if a loop was late."""
    with harness.serving(config, model, scratch / "log") as live:
        for run in runs:
            load = run(live)
            if again and load.lag_s > harness.LAG_S:
                progress(f"    a loop was {1e3 * load.lag_s:.0f} ms late: again")
                load = run(live)
            if load.lag_s > harness.LAG_S:
                progress(f"    a loop was {1e3 * load.lag_s:.0f} ms late: this machine is too busy for this figure")
            yield load


def told(name: str, what: str, load: Load, slo: Slo) -> None:
    """One line on stderr."""
    pool = Pool([load])
    short_ms, long_ms = 1e3 * pool.ttft_s(0.9, short=True), 1e3 * pool.ttft_s(0.99, short=False)
    gap_ms, late_ms = 1e3 * quantile(pool.gaps(), 0.99), 1e3 * load.lag_s
    busy = sorted(load.cores.items(), key=lambda each: -each[1])[:3]
    progress(
        f"  {name:<18} {what:<9} {len(load.asked):4} asked, {100 * pool.good(slo):5.1f} % good, TTFT p90 short "
        f"{short_ms:6.0f} ms, p99 long {long_ms:6.0f} ms, gap p99 {gap_ms:5.0f} ms, {load.tokens_per_s:5.0f} tokens/s; "
        f"late {late_ms:4.1f} ms; "
        + ", ".join(f"{who} {100 * used:.0f} %" for who, used in busy)
        + f"; load {os.getloadavg()[0]:.1f}"
    )


def paced(quick: bool, rate: float | None, rounds: int, scratch: Path) -> Iterator[Row]:
    """All policies on the paced engine, in turn."""
    simulated = Simulated()
    sustained = {QUICK_BEST: rate or QUICK_RATE}
    if not quick and rate is None:
        sustained = {each.name: simulated.sustained(each.name, SECONDS) for each in SHIPPED}
    best = max(sustained, key=lambda name: sustained[name])
    names = ["baton", best] if quick else list(dict.fromkeys(("baton", "fcfs", best, COLOCATED)))
    at = sustained[best]
    progress(
        f"simulated goodput: {', '.join(f'{name} {found:.2f}/s' for name, found in sustained.items())}; at {at:.2f}/s"
    )
    model = harness.model(scratch)
    rounds, seconds, closed_s = (1, 5.0, 0.0) if quick else (rounds, SECONDS, 4.0)
    pools: dict[str, dict[float, Pool]] = {name: {} for name in names}
    closed: dict[str, Pool] = {name: Pool() for name in names}
    same = [workload(at, seconds, 100 + number) for number in range(rounds)]
    rejected = 0
    for number in range(rounds):
        factors = (1.0,) if quick else (1.0, OTHERS[number % len(OTHERS)])
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order:
            loads = [same[number], *(workload(at * each, seconds, 200 + number) for each in factors[1:])]
            runs = [_open(each, number) for each in loads]
            if closed_s:
                runs.append(_closed(workload(at, 20 * closed_s, 300 + number), number, closed_s))
            done = list(served(settings(model, name, "paced"), model, scratch, runs, again=not quick))
            for factor, load in zip(factors, done, strict=False):
                if quick or load.lag_s <= harness.LAG_S:
                    pools[name].setdefault(factor, Pool()).loads.append(load)
                else:
                    rejected += 1
                told(name, f"{at * factor:.2f}/s", load, SLO)
            for load in done[len(factors) :]:
                if load.lag_s <= harness.LAG_S:
                    closed[name].loads.append(load)
                else:
                    rejected += 1
                told(name, f"{CLIENTS} closed", load, SLO)
    yield Row("paced: runs rejected because a loop was late", rejected, None, "", "", False)
    for name in names:
        if 1.0 not in pools[name] or 1.0 not in pools[best]:
            progress(f"  {name}: no run was left to be compared")
            continue
        yield from _rows(name, pools[name], closed[name], at, best, pools[best][1.0], simulated.ran(name, same))


def _open(load: Workload, seed: int) -> Callable[[Live], Load]:
    return lambda live: asyncio.run(harness.opened(live, load, seed))


def _closed(load: Workload, seed: int, seconds: float) -> Callable[[Live], Load]:
    return lambda live: asyncio.run(harness.closed(live, load, seed, CLIENTS, seconds))


def _rows(
    name: str, pools: dict[float, Pool], closed: Pool, at: float, best: str, base: Pool, ends: Sequence[Outcome]
) -> Iterator[Row]:
    """One policy beside the best shipped baseline, and beside what the simulator says of the same requests."""
    here = pools[1.0]

    def row(what: str, ours: float, peer: float | None, unit: str, better: bool = False, whose: str = "") -> Row:
        beside = None if name == best and not whose else peer
        return Row(f"paced, {name}: {what}", ours, beside, whose or (best if beside is not None else ""), unit, better)

    yield row("good", 100 * here.good(SLO), 100 * base.good(SLO), "%", True)
    for label, share, short in (("short TTFT p90", 0.9, True), ("long TTFT p99", 0.99, False), ("TTFT p50", 0.5, None)):
        yield row(label, here.ttft_s(share, short=short), base.ttft_s(share, short=short), "s")
        told_s = [
            end.ttft_s
            for end in ends
            if end.ttft_s is not None and (short is None or (end.prompt <= harness.SHORT) is short)
        ]
        yield row(
            f"{label}, live and simulated",
            here.ttft_s(share, short=short),
            quantile(told_s, share),
            "s",
            whose="simulator",
        )
    good = 100 * sum(end.good for end in ends) / max(1, len(ends))
    yield row("good, live and simulated", 100 * here.good(SLO), good, "%", True, "simulator")
    gaps, others = here.gaps(), base.gaps()
    for label, share in (("gap p50", 0.5), ("gap p99", 0.99), ("gap max", 1.0)):
        yield row(label, quantile(gaps, share), quantile(others, share), "s")
    yield row("tokens/s", here.tokens_per_s, base.tokens_per_s, "tokens/s", True)
    sustained = 0.0
    for factor in sorted(pools):
        good = pools[factor].good(SLO)
        progress(f"  {name}: {100 * good:.1f} % good at {at * factor:.2f}/s")
        yield Row(f"paced, {name}: good at {factor:g} times the rate", 100 * good, None, "", "%")
        if good < SHARE:
            break
        sustained = at * factor
    yield Row(f"paced, {name}: highest rate tried with 90 % good", sustained, None, "", "requests/s")
    if closed.loads:
        yield Row(f"paced, {name}: closed loop of {CLIENTS}, tokens/s", closed.tokens_per_s, None, "", "tokens/s")
        yield Row(f"paced, {name}: closed loop of {CLIENTS}, TTFT p50", closed.ttft_s(0.5), None, "", "s", False)
        yield Row(f"paced, {name}: closed loop of {CLIENTS}, TTFT p99", closed.ttft_s(0.99), None, "", "s", False)
        gap_s = quantile(closed.gaps(), 0.99)
        yield Row(f"paced, {name}: closed loop of {CLIENTS}, gap p99", gap_s, None, "", "s", False)


def torch(quick: bool, scratch: Path) -> Iterator[Row]:
    """A model that computes, in each way."""
    model = harness.model(scratch, **TORCH)
    seconds = 4.0 if quick else 10.0
    for name in ("baton",) if quick else ("baton", "fcfs", COLOCATED):
        runs = [_open(workload(TORCH_RATE, seconds, 1, TORCH_CUT), 1)]
        if not quick:
            runs.append(_closed(workload(TORCH_RATE, 100.0, 2, TORCH_CUT), 2, 5.0))
        done = served(settings(model, name, "torch"), model, scratch, runs, again=not quick)
        for what, load in zip(("open", "closed"), done, strict=False):
            told(name, what, load, TORCH_SLO)
            pool, label = Pool([load]), f"torch, {name}, {what} loop"
            yield Row(f"{label}: TTFT p50", pool.ttft_s(0.5), None, "", "s", False)
            yield Row(f"{label}: TTFT p99", pool.ttft_s(0.99), None, "", "s", False)
            for share, word in ((0.5, "p50"), (0.99, "p99"), (1.0, "max")):
                yield Row(f"{label}: gap {word}", quantile(pool.gaps(), share), None, "", "s", False)
            yield Row(f"{label}: tokens/s", load.tokens_per_s, None, "", "tokens/s")


def main() -> None:
    flags = parser("serve", "Serving under load: our policy, baselines and colocated workers, live.")
    flags.add_argument("--part", choices=("paced", "torch"), help="only this engine")
    flags.add_argument("--rate", type=float, help="requests a second, without a search for the best baseline's")
    flags.add_argument("--rounds", type=int, default=5, help="of the paced part (default %(default)s)")
    options = flags.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.part != "torch":
            rows += paced(options.quick, options.rate, options.rounds, _fresh(Path(folder), "paced"))
        if options.part != "paced":
            rows += torch(options.quick, _fresh(Path(folder), "torch"))
    emit("serve", rows, options.json)


def _fresh(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    return path


if __name__ == "__main__":
    main()
