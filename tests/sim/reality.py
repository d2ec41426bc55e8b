"""Measured timelines of vLLM, replayed by the simulator, and the fit of what a step costs there.

Each timeline is one burst of 300 requests of a ShareGPT conversation's lengths in 29 s, served by vLLM 0.19
(LLMServingSim, bench/examples). What is known of an engine is set: its scheduler's limits, its number of replicas,
the memory where it cannot run out. What is not known is fitted, on requests 0 to 149 alone: four numbers of a step's
time, one overhead before the first token, and the memory where it does run out.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from core.kv import KvShape
from core.messages import Prompt
from core.pages import Pages
from core.request import Phase
from core.worker import Identity, Role
from scheduler.cost import CostModel, Lane
from scheduler.least_loaded import LeastLoaded
from scheduler.mixed_events import Ended, MixedCommand, MixedConfig, MixedEvent, Step, Stepped
from scheduler.mixed_policy import MixedPolicy
from scheduler.placement import Need, Post, Workers
from scheduler.policies import Policy
from scheduler.router import RouterConfig
from sim.fleet import Build
from sim.loop import Kind
from sim.outcome import Outcome
from sim.run import Settings, Simulation, simulate
from sim.shells import MixedShell
from sim.worker import Worker
from sim.workload import Arrival
from tests.sim.simplex import Point, least

FITTED = Path(__file__).parent / "data" / "vllm_fitted.json"
FITTED_ON = 150
"""The first so many requests are what is fitted to; the rest is what is checked."""
PAGE_TOKENS = 16
CALLS = 80
"""Simulations of a fit: enough that more change nothing of note."""
MEASURES = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine that was measured, as far as its configuration says.

    `rows` and `tokens`: vLLM's max_num_seqs and max_num_batched_tokens, as the source states them. `pairs`: what a
    pair of query and key costs beside a token of a prompt, by the operations of the model: 2 * heads * head size *
    layers / active weights. `kv_tokens`: room, measured elsewhere or by arithmetic; `tight` if it runs out, and is
    fitted. `start`: first guess of the fit.
    """

    name: str
    rows: int
    pairs: float
    kv_tokens: int
    start: Fitted
    tight: bool = False
    replicas: int = 1
    tokens: int = 2048

    @property
    def file(self) -> str:
        """Of the measurements."""
        return f"measured_vllm_{self.name}_requests.jsonl.gz"


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a step costs, in seconds: fixed, for a token of a prompt, for a decode row, for a token of its context."""

    fixed_s: float
    token_s: float
    row_s: float
    context_s: float
    overhead_s: float
    """Before the first token, of every request."""
    kv_tokens: int = 0
    """0: that of the setup."""

    def names(self) -> list[str]:
        """Of the numbers that are fitted here."""
        return [name for name, value in asdict(self).items() if value]


SETUPS = (
    Setup("rtx4090_llama31_8b_tp1", 256, 3.5e-5, 45_000, Fitted(0.016, 1e-4, 5e-5, 1.4e-7, 0.01, 45_000), tight=True),
    Setup("rtxpro6000_llama31_8b_tp1", 128, 3.5e-5, 580_000, Fitted(0.010, 4.4e-5, 6e-5, 7e-8, 0.005)),
    Setup("rtxpro6000_qwen3_32b_tp2", 128, 3.4e-5, 450_000, Fitted(0.042, 1.5e-4, 5e-5, 9e-8, 0.01)),
    Setup("rtxpro6000_qwen3_30b_a3b_dp2ep2", 128, 1.2e-4, 600_000, Fitted(0.026, 4e-5, 1e-4, 5e-8, 0.005), replicas=2),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client sees of one request, in seconds."""

    ttft: float
    tpot: float
    e2e: float


def timeline(path: Path) -> tuple[list[Arrival], list[Seen]]:
    """What arrived and what came of it. Arrivals are stamped by another clock than tokens: the request that entered
    the engine soonest after its arrival is taken to have entered at once."""
    with gzip.open(path, "rt", encoding="utf-8") as text:
        rows = [json.loads(line) for line in text]
    ahead_s = min(row["queued_ts"] - row["arrival_time"] for row in rows)
    arrivals, seen = [], []
    for row in rows:
        at_s = row["arrival_time"] + ahead_s
        first_s, last_s, count = row["first_token_ts"], row["last_token_ts"], row["output_toks"]
        arrivals.append(Arrival(row["arrival_time"] - rows[0]["arrival_time"], row["input_toks"], count))
        seen.append(Seen(first_s - at_s, (last_s - first_s) / (count - 1), last_s - at_s))
    return arrivals, seen


class Counting(LeastLoaded):
    """vLLM's balance of its data-parallel engines: those that wait count four times."""

    def sources(self, need: Need, workers: Workers) -> Iterable[Post]:
        return sorted(workers.prefills, key=lambda post: (3 * post.queue + post.rows, post.order))


class Ahead(MixedPolicy):
    """vLLM's asynchronous scheduling: a step is decided upon when the one before it begins.

    So who comes during a step is not in the next one, but in the one after it. Orders are single steps.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._coming: list[Prompt] = []
        """Came during the step under way."""
        self._here: list[Prompt] = []
        """Came during the one before."""

    def on(self, event: MixedEvent | None, now: float) -> list[MixedCommand]:
        if isinstance(event, Prompt) and self._step is not None:
            self._coming.append(event)
            return []
        commands: list[MixedCommand] = []
        if isinstance(event, Stepped):
            here, self._here, self._coming = self._here, self._coming, []
            for each in here:
                commands += super().on(each, now)
        commands += super().on(event, now)
        while self._step is None and self._here:
            commands += super().on(self._here.pop(0), now)
        return commands


class Together:
    """Replicas that share experts: no step begins before the last of all is over, and all take as long as the longest.

    The layers' exchanges make them wait for each other (vLLM's data-parallel ranks with expert parallelism).
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers
        self._orders: dict[int, Step] = {}
        self._busy = self._due = False
        for rank, worker in enumerate(workers):
            shell = worker.mixed
            assert shell is not None
            shell.seat.perform = partial(self._perform, rank, shell)

    def _perform(self, rank: int, shell: MixedShell, command: MixedCommand) -> None:
        if not isinstance(command, Step):
            shell._perform(command)
            return
        self._orders[rank] = command
        self._gather()

    def _gather(self) -> None:
        """Once everybody has heard what has happened at this time."""
        if self._orders and not (self._busy or self._due):
            self._due = True
            loop = self._workers[0].loop
            loop.at(loop.now, Kind.TIMER, 0, self._begin)

    def _begin(self, _: None) -> None:
        seconds = 0.0
        for rank, order in self._orders.items():
            worker = self._workers[rank]
            assert worker.mixed is not None
            batch, spans = worker.mixed.batch, [(span.stop - span.start, span.start) for span in order.spans]
            seconds = max(seconds, worker.build.cost.step_s(spans, len(batch), batch.context))
        loop, orders = self._workers[0].loop, self._orders
        self._orders, self._due, self._busy = {}, False, True
        loop.at(loop.now + seconds, Kind.STEP, 0, self._end, orders)

    def _end(self, orders: dict[int, Step]) -> None:
        self._busy = False
        for rank, order in orders.items():
            worker = self._workers[rank]
            shell = worker.mixed
            assert shell is not None
            ended = []
            for key, row in shell.batch.advance_once(worker.loop.now) if len(shell.batch) else ():
                shell.batch.say(row)
                ended.append(Ended(key, "length", row.generated))
            begun = tuple(began for span in order.spans if (began := shell._spanned(span)) is not None)
            worker.post(shell.seat, Stepped(order.step_id, 1, begun, tuple(ended)))
        self._gather()


@dataclass(frozen=True, slots=True)
class Engine(Policy):
    """Colocated workers, with steps decided upon one before or not."""

    ahead: bool = True

    def mixed(self, me: Identity, shape: KvShape, ledger: Pages, cost: CostModel) -> MixedPolicy:
        """A colocated worker's."""
        return (Ahead if self.ahead else MixedPolicy)(me, shape, ledger, self.mixed_config)


def replay(setup: Setup, fitted: Fitted, arrivals: Sequence[Arrival], *, ahead: bool = True) -> list[Seen]:
    """The whole burst through our policies and the simulator; `ahead`: with steps decided upon one before."""
    fixed_s, token_s = fitted.fixed_s, fitted.token_s
    cost = CostModel(
        setup.name,
        ((fixed_s, token_s, token_s * setup.pairs, 0.0),),
        ((fixed_s, fitted.row_s, fitted.context_s),),
        (Lane("none", 0.0, 0.0, 0.0),),
    )
    # vLLM 0.19 starts a sequence only where all of its prompt fits, and keeps nothing back.
    steps = 1 if ahead else 1000
    config = MixedConfig("chunked", setup.tokens, setup.rows, admission="prompt", max_steps=steps, offer_s=1e5)
    policy = Engine(
        "vllm",
        "version 1 of vLLM's scheduler",
        placement=lambda cost: Counting(),
        router_config=RouterConfig(max_queue_s=math.inf),
        mixed_config=config,
        colocated=True,
        ahead=ahead,
    )
    pages = (fitted.kv_tokens or setup.kv_tokens) // PAGE_TOKENS
    shape = KvShape(1, 1, 2, PAGE_TOKENS, "bfloat16")
    builds = [Build(f"vllm-{i}", Role.MIXED, cost, shape, pages) for i in range(setup.replicas)]
    outcomes: list[Outcome] = []
    settings = Settings(hop_s=0.0, lane="none", timeout_s=1e5, check_every=10**6)

    def watch(simulation: Simulation) -> None:
        if setup.replicas > 1:
            Together(list(simulation.workers.values()))

    simulate(arrivals, builds, policy, settings, over=outcomes.append, watch=watch if ahead else None)
    assert all(each.phase is Phase.DONE for each in outcomes)
    outcomes.sort(key=lambda each: each.at_s)
    return [
        Seen((each.ttft_s or 0.0) + fitted.overhead_s, each.gap_mean_s, each.e2e_s + fitted.overhead_s)
        for each in outcomes
    ]


def column(seen: Sequence[Seen], measure: str) -> list[float]:
    """One measure of all."""
    return [getattr(each, measure) for each in seen]


def mean(values: Sequence[float]) -> float:
    """The arithmetic one."""
    return sum(values) / len(values)


def quantile(values: Sequence[float], share: float) -> float:
    """Between ranks linear, as most tools have it."""
    ordered, at = sorted(values), share * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": mean,
    "median": lambda values: quantile(values, 0.5),
    "p90": lambda values: quantile(values, 0.9),
}


def loss(ours: Sequence[Seen], theirs: Sequence[Seen]) -> float:
    """What is fitted: the mean absolute errors, each measure's beside its mean, and those of medians and means."""
    total = 0.0
    for measure in MEASURES:
        a, b = column(ours, measure), column(theirs, measure)
        total += mean([abs(x - y) for x, y in zip(a, b, strict=True)]) / mean(b)
        total += sum(abs(of(a) / of(b) - 1) for of in (STATISTICS["mean"], STATISTICS["median"])) / 2
    return total


def fit(setup: Setup, arrivals: Sequence[Arrival], seen: Sequence[Seen], calls: int = CALLS) -> Fitted:
    """The numbers with which the simulator comes closest to requests 0 to 149, after so many simulations."""

    names = setup.start.names()

    def of(point: Point) -> Fitted:
        values = {name: math.exp(each) for name, each in zip(names, point, strict=True)}
        return Fitted(**{**values, "kv_tokens": round(values.get("kv_tokens", 0))})  # type: ignore[arg-type]

    def value(point: Point) -> float:
        found = of(point)
        if setup.tight and found.kv_tokens < 2 * max(each.prompt + each.output for each in arrivals):
            return math.inf
        return loss(replay(setup, found, arrivals)[:FITTED_ON], seen[:FITTED_ON])

    first = asdict(setup.start)
    point = tuple(math.log(first[name]) for name in names)
    for spread in (0.25, 0.1):
        steps = [spread * (-0.3 if name == "kv_tokens" else 1.0) for name in names]
        point, _ = least(value, point, steps, calls // 2)
    return of(point)


def document(fitted: dict[str, Fitted]) -> dict[str, Any]:
    """As it is kept beside the tests."""
    return {name: {key: float(f"{value:.6g}") for key, value in asdict(one).items()} for name, one in fitted.items()}


def read(found: dict[str, Any]) -> dict[str, Fitted]:
    """What `document` made."""
    return {name: Fitted(**{**one, "kv_tokens": int(one["kv_tokens"])}) for name, one in found.items()}


def kept() -> dict[str, Fitted]:
    """What was fitted last."""
    return read(json.loads(FITTED.read_text(encoding="utf-8")))
