"""Our simulator set up like DistServe's (simdistserve), to see whether it comes to the same figures.

What both have is ours: arrivals, gateway, router, prefill policy, hand-over, clock, and what a client sees. What that
simulator does and no engine should is here, and nowhere else:

| theirs | here |
|---|---|
| decode times are two fits that jump at a batch of 95 | `Pieces` |
| a step of the first stage takes 2 ms and 0.1 microseconds a token more | in the coefficients |
| moving KV takes no time, and there is no end to memory | a lane without cost, an arena without end |
| a prefill step takes the whole queue | a chunk of as many tokens as their table has for the placement |
| one decode step attends to 50,000 tokens at most; the rows behind wait for the next, all in turn | `Turns` |
| a request takes a step more than it has tokens, and its time a token is a mean over those steps | one token more |
| a stage of a pipeline takes its share of a step, prefill 1 ms each more, and what is in line | `Turns`, `Ahead` |

Where no decode step ever reaches 50,000 tokens, and without pipelines, our own decode and mixed policies take the place
of `Turns`, and must come to the same.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from core.kv import KvShape
from core.pages import Pages
from core.request import Phase
from core.worker import Identity, Role
from scheduler.cost import CostModel, DecodeLine, Lane
from scheduler.decode_policy import DecodeConfig, DecodePolicy
from scheduler.mixed_events import MixedConfig
from scheduler.mixed_policy import MixedPolicy
from scheduler.policies import Policy
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy
from scheduler.router import RouterConfig
from sim.fleet import Build
from sim.outcome import Outcome
from sim.run import Settings, Simulation, simulate
from sim.workload import Arrival
from tests.sim.turns import Ahead, AheadEngine, Turns, TurnsEngine

REQUESTS = "reference_simdistserve_requests_seed0.csv"
ANSWERS = "reference_simdistserve_opt13b_seed0.csv"
PLAN = "reference_simdistserve_plan_opt13b_4gpu.csv"
CAPACITY = "distserve_max_num_tokens.csv"
TTFT_S, TPOT_S = 0.2, 0.1
ENDLESS = 10**7
"""Pages, rows."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Ranks and stages of both phases; without those of decode, both phases on the same workers."""

    backend: str
    tp_p: int
    pp_p: int
    tp_d: int = 0
    pp_d: int = 0

    @property
    def devices(self) -> int:
        """All that it takes."""
        return self.tp_p * self.pp_p + self.tp_d * self.pp_d

    @property
    def name(self) -> str:
        """Ranks by stages of prefill, and of decode."""
        decode = f" + {self.tp_d}x{self.pp_d}" if self.tp_d else ""
        return f"{'apart' if decode else 'together'} {self.tp_p}x{self.pp_p}{decode}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one rate: shares of all requests in percent, medians in milliseconds."""

    rate: float
    """Requests a second and device."""
    ttft: float
    tpot: float
    both: float
    ttft_ms: float
    tpot_ms: float
    turns: bool = False
    """Rows waited for their turn."""


# ------------------------------------------------------------------------------------------------------------ tables


def answers(folder: Path) -> dict[Placement, list[Answer]]:
    """Theirs, by placement."""
    found: dict[Placement, list[Answer]] = {}
    with (folder / ANSWERS).open(encoding="utf-8", newline="") as text:
        for row in csv.DictReader(text):
            sizes = [int(row[key]) for key in ("tp_p", "pp_p", "tp_d", "pp_d")]
            ttft, tpot, both, *medians = [
                float(row[key]) for key in ("att_ttft", "att_tpot", "att_both", "ttft_p50", "tpot_p50")
            ]
            placement = Placement(row["backend"], *sizes)
            found.setdefault(placement, []).append(
                Answer(float(row["rate"]) / placement.devices, ttft, tpot, both, medians[0], medians[1])
            )
    return found


@cache
def requests(folder: Path) -> list[tuple[float, int, int]]:
    """Time at one request a second, tokens of prompt and output."""
    with (folder / REQUESTS).open(encoding="utf-8", newline="") as text:
        rows = csv.DictReader(text)
        return [(float(row["unit_rate_arrival_s"]), int(row["prompt_len"]), int(row["output_len"])) for row in rows]


@cache
def capacity(folder: Path, tp: int, pp: int) -> int:
    """Tokens of KV that OPT-13B leaves room for, which bound a prefill step there."""
    with (folder / CAPACITY).open(encoding="utf-8", newline="") as text:
        for row in csv.DictReader(text):
            if "13b" in row["model"] and (int(row["tp"]), int(row["pp"])) == (tp, pp):
                return int(row["max_num_tokens"])
    raise AssertionError(f"no capacity for {tp}x{pp}")


@dataclass(frozen=True, slots=True)
class Pieces(CostModel):
    """A cost model with two decode fits, for batches below `split` and from there on; not the higher of them."""

    split: int = 95

    def _piece(self, batch: int) -> DecodeLine:
        return self.decode[batch >= self.split]

    def decode_s(self, batch: int, context: int) -> float:
        """Seconds of one step."""
        fixed, row, token = self._piece(batch)
        return fixed + row * batch + token * context if batch > 0 else 0.0

    def decode_span_s(self, batch: int, context: int, steps: int) -> float:
        """Seconds of so many steps."""
        token = self._piece(batch)[2]
        return steps * self.decode_s(batch, context) + token * batch * (steps * (steps - 1) // 2)


def published(folder: Path, engine: str, tp: int, *, pp: int = 1, first: bool = True, overhead: bool = True) -> Pieces:
    """OPT-13B on A100 in seconds, from the published coefficients in milliseconds; of one of `pp` stages.

    `overhead`: what the simulator adds to them, more in the `first` stage.
    """
    file = folder / f"distserve_profiler-a100-80g.{engine}.json"
    found = json.loads(file.read_text(encoding="utf-8"))["facebook/opt-13b"][str(tp)]
    step_ms, token_ms = (2.0, 1e-4) if first and overhead else (0.0, 0.0)
    a, b, c = found["prefill"]
    # They count squares, we count pairs of query and key: half as many.
    stage_ms = pp if overhead else 0.0
    prefill = (a / pp + stage_ms + step_ms, b / pp + token_ms, 2 * c / pp, 0.0)
    # Their overhead counts a row's tokens without the one that is being decoded.
    decode = [
        (a / pp + step_ms, c / pp - token_ms, b / pp + token_ms)
        for a, b, c in (found["decoding_smallbs"], found["decoding_largebs"])
    ]
    return Pieces(
        f"{engine} tp{tp} pp{pp}",
        (tuple(value / 1e3 for value in prefill),),  # type: ignore[arg-type]
        tuple(tuple(value / 1e3 for value in line) for line in decode),
        (Lane("none", 0.0, 0.0, 0.0),),
        (),
        found["decoding_large_small_bs_threshold"],
    )


# --------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True, slots=True)
class Theirs(Policy):
    """The policies of a placement; `real`: our own decode and mixed policies."""

    stages: int = 1
    prompt_tokens: int = ENDLESS
    real: bool = False
    decode_stages: int = 1

    def prefill(
        self, me: Identity, shape: KvShape, ledger: Pages, cost: CostModel, *, fetch: bool = False
    ) -> PrefillPolicy:
        """Ours, unless there are stages."""
        kind = PrefillPolicy if self.stages == 1 else Ahead
        return kind(me, shape, ledger, self.prefill_config)

    def decode(self, me: Identity, shape: KvShape, ledger: Pages, cost: CostModel) -> DecodePolicy:
        """Of a decode worker."""
        if self.real:
            return DecodePolicy(me, shape, ledger, self.decode_config)
        return Turns(self.decode_stages, 0, shape, ledger)  # type: ignore[return-value]

    def mixed(self, me: Identity, shape: KvShape, ledger: Pages, cost: CostModel) -> MixedPolicy:
        """Of a colocated worker."""
        if self.real:
            return MixedPolicy(me, shape, ledger, self.mixed_config)
        return Turns(self.stages, self.prompt_tokens, shape, ledger)  # type: ignore[return-value]


def run(
    folder: Path, placement: Placement, rate: float, *, real: bool = False, count: int | None = None
) -> tuple[Answer, list[Outcome]]:
    """Their requests, or the first `count`, at so many a second and device.

    `real`: without taking turns, which only some rates allow.
    """
    arrivals = [
        Arrival(at_s / rate / placement.devices, prompt, output + 1)
        for at_s, prompt, output in requests(folder)[:count]
    ]
    stages, tokens = placement.pp_p, capacity(folder, placement.tp_p, placement.pp_p)
    policy = Theirs(
        "simdistserve",
        "DistServe's simulator",
        router_config=RouterConfig(max_queue_s=math.inf),
        prefill_config=PrefillConfig(chunk_tokens=tokens, max_rows=ENDLESS),
        decode_config=DecodeConfig(max_rows=ENDLESS, max_steps=1000),
        mixed_config=MixedConfig("prefill_first", tokens, ENDLESS, admission="prompt", max_steps=1000),
        colocated=placement.tp_d == 0,
        stages=stages,
        prompt_tokens=tokens,
        real=real,
        decode_stages=placement.pp_d,
    )
    shape = KvShape(1, 1, 2, 16, "bfloat16")
    prompts = [
        published(folder, placement.backend, placement.tp_p, pp=stages, first=stage == 0) for stage in range(stages)
    ]
    rows = [
        published(folder, placement.backend, placement.tp_d, pp=placement.pp_d, first=stage == 0)
        for stage in range(placement.pp_d)
    ]
    if rows:
        builds = [
            Build("p", Role.PREFILL, prompts[0], shape, ENDLESS),
            Build("d", Role.DECODE, rows[0], shape, ENDLESS),
        ]
    else:
        builds = [Build("m", Role.MIXED, prompts[0], shape, ENDLESS)]
    outcomes: list[Outcome] = []
    machines: list[Any] = []

    def watch(simulation: Simulation) -> None:
        for worker in simulation.workers.values():
            if worker.prefill is not None and stages > 1:
                AheadEngine(worker, prompts)
            if (worker.decode or worker.mixed) and not real:
                TurnsEngine(worker, rows if worker.decode else prompts)
                machines.append((worker.decode or worker.mixed).policy)

    settings = Settings(hop_s=0.0, lane="none", timeout_s=1e7, check_every=10**9)
    simulate(arrivals, builds, policy, settings, over=outcomes.append, watch=watch)
    assert all(each.phase is Phase.DONE and each.tokens == each.output for each in outcomes)
    outcomes.sort(key=lambda each: each.at_s)
    return _answer(rate, outcomes, any(each.left_out for each in machines)), outcomes


def _answer(rate: float, outcomes: Sequence[Outcome], turns: bool) -> Answer:
    first = [(each.ttft_s or 0.0) <= TTFT_S for each in outcomes]
    rest = [each.gap_mean_s <= TPOT_S for each in outcomes]
    both = [one and other for one, other in zip(first, rest, strict=True)]
    met = [100 * sum(each) / len(outcomes) for each in (first, rest, both)]
    ttft, tpot = (sorted(values) for values in zip(*[(o.ttft_s or 0.0, o.gap_mean_s) for o in outcomes], strict=True))
    half = len(outcomes) // 2
    medians = [1e3 * (values[half - 1] + values[half]) / 2 for values in (ttft, tpot)]
    return Answer(rate, met[0], met[1], met[2], medians[0], medians[1], turns)


def planned(folder: Path) -> dict[Placement, float]:
    """What their placement search found a device to sustain, by placement."""
    with (folder / PLAN).open(encoding="utf-8", newline="") as text:
        found = {}
        for row in csv.DictReader(text):
            sizes = [int(row[key]) for key in ("tp_prefill", "pp_prefill", "tp_decode", "pp_decode")]
            found[Placement(row["backend"], *sizes)] = float(row["best_per_gpu_rate"])
        return found


def sustained(folder: Path, placement: Placement) -> float:
    """The same by their rules: 300 requests, 90 % within each goal by itself, halved from 5/s until 0.0625 is left."""
    low, high = 0.0, 5.0
    while high - low >= 0.0625:
        middle = (low + high) / 2
        answer, _ = run(folder, placement, middle, count=300)
        if min(answer.ttft, answer.tpot) >= 90:
            low = middle
        else:
            high = middle
    return low


def knee(found: Sequence[Answer], share: float = 90.0) -> float:
    """The highest rate a device at which so many requests are served in time, between rates linear; 0 if nowhere."""
    best = 0.0
    ordered = sorted(found, key=lambda each: each.rate)
    for low, high in itertools.pairwise(ordered):
        if low.both >= share > high.both:
            best = low.rate + (high.rate - low.rate) * (low.both - share) / (low.both - high.both)
    return best
