"""Policies by name, as they run and are compared: each is classes of `scheduler/`, chosen and set, and nothing else.

The processes and the simulator make their machines here, so that both run the same with the same settings.

A new one is a class in one file of `scheduler/` and a line here; then it stands beside the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from core.errors import SetupError
from core.kv import KvShape
from core.pages import Pages
from core.worker import Identity
from scheduler.cost import CostModel
from scheduler.decode_migrating import MigratingPolicy
from scheduler.decode_policy import DecodeConfig, DecodePolicy
from scheduler.distserve import DistServe
from scheduler.dual_queue import DualQueue, DualQueueSettings
from scheduler.dualmap import DualMap, DualMapConfig
from scheduler.fcfs import Fcfs
from scheduler.gather import GatherSettings
from scheduler.hrrn import Hrrn
from scheduler.least_loaded import LeastLoaded
from scheduler.long_share import LongShare
from scheduler.migration import MigrationConfig
from scheduler.mixed_events import PREFILL_FIRST, SARATHI, MixedConfig
from scheduler.mixed_policy import MixedPolicy
from scheduler.order import Order
from scheduler.pins import PinConfig
from scheduler.placement import Placement
from scheduler.prefill_fetches import Fetches
from scheduler.prefill_keeps import Keeps, KeepsConfig
from scheduler.prefill_policy import PrefillConfig, PrefillPolicy
from scheduler.round_robin import RoundRobin
from scheduler.router import Router, RouterConfig
from scheduler.shortest import Shortest
from scheduler.split_map import SplitMap
from scheduler.splitwise import Splitwise

CHUNK_TOKENS = 2048
MAX_ROWS = 256
MAX_STEPS = 1000
"""Steps of a simulated engine; an order of it may be long, because nobody waits for its tokens. `Policy.sized`."""

PREFILL = PrefillConfig(chunk_tokens=CHUNK_TOKENS, max_rows=64)
DECODE = DecodeConfig(max_rows=MAX_ROWS, max_steps=MAX_STEPS)
QUEUE = RouterConfig(by_goal=False)
"""Nobody is refused because of a goal: vLLM, SGLang and Dynamo queue whoever comes."""


def fcfs(config: PrefillConfig, cost: CostModel) -> Order:
    """First come, first served, waits predicted by the cost model."""
    return Fcfs(config.chunk_tokens, config.max_rows, cost)


def dual_queue(settings: DualQueueSettings | None = None) -> Callable[[PrefillConfig, CostModel], Order]:
    """LAPS's two queues."""
    return lambda config, cost: DualQueue(config.chunk_tokens, config.max_rows, cost, settings)


@dataclass(frozen=True, slots=True)
class Policy:
    """How a deployment decides."""

    name: str
    about: str
    order: Callable[[PrefillConfig, CostModel], Order] = fcfs
    placement: Callable[[CostModel | None], Placement] = lambda cost: LeastLoaded()
    router_config: RouterConfig = field(default_factory=RouterConfig)
    prefill_config: PrefillConfig = PREFILL
    decode_config: DecodeConfig = DECODE
    keeps: KeepsConfig | None = None
    """How long prefill workers keep the KV of programs whose tools run; None: as long as nobody wants the memory."""
    migration: MigrationConfig | None = None
    """When running rows move to other decode workers; None: never."""
    gap_cap: bool = False
    """Decode batches are capped so that promised gaps are kept."""
    mixed_config: MixedConfig = SARATHI
    colocated: bool = False
    """All workers do both phases, whatever role they were given."""

    def sized(self, *, chunk_tokens: int, max_rows: int, max_steps: int, suspends: bool, host_pages: int = 0) -> Policy:
        """The same decisions for an engine of another size: of its steps, of its orders, of its host memory.

        `suspends`: it can stop a step between two operators and go on with it later.
        """
        preempt = self.prefill_config.preempt and suspends
        prefill = replace(self.prefill_config, chunk_tokens=chunk_tokens, max_rows=max_rows, preempt=preempt)
        decode = replace(self.decode_config, max_rows=max_rows, max_steps=max_steps, host_pages=host_pages)
        budget = max(max_rows, min(self.mixed_config.budget_tokens, chunk_tokens))
        mixed = replace(self.mixed_config, budget_tokens=budget, max_rows=max_rows, max_steps=max_steps)
        return replace(self, prefill_config=prefill, decode_config=decode, mixed_config=mixed)

    def weighing(self, weights: tuple[tuple[str, float], ...]) -> Policy:
        """The same with tenants of these weights."""
        return replace(
            self,
            router_config=replace(self.router_config, weights=weights),
            prefill_config=replace(self.prefill_config, weights=weights),
            decode_config=replace(self.decode_config, weights=weights),
        )

    def router(self, me: Identity, cost: CostModel | None, *, mixed_alone: bool = False) -> Router:
        """A gateway's. `cost`: of a worker that does not tell its own; `mixed_alone` as in `RouterConfig`."""
        return Router(me, replace(self.router_config, mixed_alone=mixed_alone), self.placement(cost))

    def prefill(
        self, me: Identity, shape: KvShape, ledger: Pages, cost: CostModel, *, fetch: bool = False
    ) -> PrefillPolicy:
        """A prefill worker's; `fetch`: it may pull pages of prompts from workers that have them."""
        order = self.order(self.prefill_config, cost)
        fetches = Fetches(me, shape, ledger, cost) if fetch else None
        keeps = Keeps(shape, ledger, cost, self.keeps) if self.keeps is not None else None
        return PrefillPolicy(me, shape, ledger, self.prefill_config, order, fetches, keeps)

    def decode(self, me: Identity, shape: KvShape, ledger: Pages, cost: CostModel) -> DecodePolicy:
        """A decode worker's."""
        paced = cost if self.gap_cap else None
        if self.migration is not None:
            return MigratingPolicy(me, shape, ledger, self.decode_config, self.migration, paced)
        return DecodePolicy(me, shape, ledger, self.decode_config, paced)

    def mixed(self, me: Identity, shape: KvShape, ledger: Pages, cost: CostModel) -> MixedPolicy:
        """A colocated worker's."""
        return MixedPolicy(me, shape, ledger, self.mixed_config, cost)


BATON = Policy(
    "baton",
    "ours: two queues with pre-emption, two candidates by prefix, admission by future memory, batches by gap",
    dual_queue(),
    lambda cost: DualMap(cost=cost),
    prefill_config=replace(PREFILL, preempt=True),
    decode_config=replace(DECODE, admission="past_future"),
    gap_cap=True,
    keeps=KeepsConfig(),
)

_SHIPPED = (
    Policy("fcfs", "first come, first served, at the least loaded worker"),
    Policy(
        "shortest",
        "the shortest prompt first, as SGLang offers it; least loaded worker",
        lambda config, cost: Shortest(config.chunk_tokens, config.max_rows, cost),
    ),
    Policy(
        "hrrn",
        "the highest response ratio first: short prompts, and long ones as they age; least loaded worker",
        lambda config, cost: Hrrn(config.chunk_tokens, config.max_rows, cost),
    ),
    Policy(
        "long-share",
        "long prompts take a bounded share of each step, as in vLLM; least loaded worker",
        lambda config, cost: LongShare(config.chunk_tokens, config.max_rows, cost),
    ),
)

SHIPPED = tuple(replace(policy, router_config=QUEUE) for policy in _SHIPPED)
"""What gains are reported against: least loaded, with the orders that others ship. Like those they queue everybody."""

REFUSING = tuple(
    replace(
        policy, name=f"{policy.name}-refusing", about=f"{policy.about}; refuses who cannot be in time, as ours does"
    )
    for policy in _SHIPPED
)
"""The same with our refusals, which nobody ships: what is left is the gain of the rest."""

BASELINES = (
    *SHIPPED,
    Policy(
        "round-robin",
        "first come, first served, workers in turn",
        placement=lambda cost: RoundRobin(),
        router_config=QUEUE,
    ),
    Policy("splitwise", "shortest queues on both sides", placement=lambda cost: Splitwise(), router_config=QUEUE),
    Policy(
        "distserve",
        "static pairs of prefill and decode workers",
        placement=lambda cost: DistServe(),
        router_config=QUEUE,
    ),
    Policy(
        "colocated-prefill-first",
        "every worker does both phases, whole prompts before decode steps, as vLLM did before version 1",
        router_config=QUEUE,
        mixed_config=replace(PREFILL_FIRST, max_rows=MAX_ROWS, max_steps=MAX_STEPS),
        colocated=True,
    ),
    Policy(
        "colocated-chunked",
        "every worker does both phases, chunks of prompts beside decode rows, after Sarathi-Serve",
        router_config=QUEUE,
        mixed_config=replace(SARATHI, max_rows=MAX_ROWS, max_steps=MAX_STEPS),
        colocated=True,
    ),
)

UNHINTED = replace(
    BATON,
    name="baton-without-hints",
    about="what callers say of sessions and tools is not looked at",
    decode_config=replace(BATON.decode_config, pins=PinConfig(most_s=0.0)),
    keeps=None,
)

ABLATIONS = (
    replace(BATON, name="baton-without-dual-queue", about="prompts first come, first served", order=fcfs),
    replace(
        BATON,
        name="baton-without-window",
        about="short prompts do not wait for each other",
        order=dual_queue(DualQueueSettings(gather=GatherSettings(window_least_s=0.0, window_most_s=0.0))),
    ),
    replace(
        BATON,
        name="baton-without-headroom",
        about="long prompts that fit are let in, however full the line is",
        order=dual_queue(DualQueueSettings(headroom=0.0)),
    ),
    replace(BATON, name="baton-without-refusals", about="everybody queues", router_config=QUEUE),
    replace(BATON, name="baton-without-preemption", about="steps are not suspended", prefill_config=PREFILL),
    replace(BATON, name="baton-without-dualmap", about="least loaded worker", placement=lambda cost: LeastLoaded()),
    replace(BATON, name="baton-without-forecast", about="memory for all that may come", decode_config=DECODE),
    UNHINTED,
    replace(BATON, name="baton-without-gap-cap", about="batches as large as memory allows", gap_cap=False),
    replace(
        BATON,
        name="baton-first-fit",
        about="decode workers are filled one after the other",
        placement=lambda cost: DualMap(DualMapConfig(decode="first_fit"), cost),
    ),
)

MIGRATING = replace(
    BATON,
    name="baton-migrating",
    about="running rows move from decode workers that drain or are short of memory to freer ones",
    migration=MigrationConfig(),
)

SPLIT = replace(
    BATON,
    name="baton-split",
    about="short and long prompts have prefill workers of their own, from four of these on, if divided",
    placement=lambda cost: SplitMap(cost=cost),
)

POLICIES = {policy.name: policy for policy in (BATON, *BASELINES, *REFUSING, *ABLATIONS, MIGRATING, SPLIT)}
"""By name: ours, what others ship, that with our refusals, ours without one idea at a time, with rows that move, and
with prefill workers in two pools."""


def policy(name: str) -> Policy:
    """The policy of that name; SetupError where there is none."""
    if name not in POLICIES:
        raise SetupError(f"policy: got {name!r}, want one of {', '.join(POLICIES)}")
    return POLICIES[name]


def live(name: str, others: int = 0) -> Policy:
    """The policy of that name for a deployment of processes, of which so many workers are not mixed ones.

    SetupError where there is none, or where it has every worker do both phases and not every worker is there for that.
    """
    found = policy(name)
    if found.colocated and others:
        raise SetupError(
            f"policy: {name} has every worker compute both phases in one step: got {others} prefill and decode "
            "workers, want mixed ones only"
        )
    return found
