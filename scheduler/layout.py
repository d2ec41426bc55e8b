"""What a plan is made of: cells of ranks and stages, pools of them, and the memory and time that they take. Pure.

A *cell* is what one worker of a plan runs on: `ranks` devices that share every layer (tensor parallelism) times
`stages` that share the layers out (pipeline parallelism). A *layout* is pools of equal cells: prefill and decode apart,
or mixed ones that do both.

DistServe (OSDI'24), appendix A and its simulator's estimator, say what stages do to a step's time T: a step still takes
T, plus the hops between stages, but a new one may begin every T / stages. For a prompt that is a queue whose service
takes T / stages, after which the rest of T passes without anybody waiting for it (its equation for inter-operator
parallelism). Rows that decode are as many disjoint batches as there are stages, each of which takes T a step: as many
workers as stages, which share memory. Stages of unequal load, where one batch waits for a longer one ahead of it, are
not in this: what waits there is at most a stage's step.

| parameter | unit | default | meaning |
|---|---|---|---|
| SHARE | | 0.9 | of a device's memory that weights, activations, graphs and KV may take together |
| GRAPH_BYTES | B a device | 0.3e9 | captured graphs and the library's own |
| ROW_BYTES | B a token and hidden unit | 20 | activations of a step |
| STAGE_S | s a stage | 0.001 | a prefill step's fixed cost of each stage beyond a single one (DistServe's) |
| NEAR_HOP_S, FAR_HOP_S | s | 12e-6, 50e-6 | from stage to stage: in a node (APEX), between nodes (guess) |
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from scheduler.cost import CostModel, DecodeLine, PrefillLine
from scheduler.roofline import Hardware, Sizes

SHARE = 0.9
GRAPH_BYTES = 0.3e9
ROW_BYTES = 20.0
STAGE_S = 1e-3
NEAR_HOP_S, FAR_HOP_S = 12e-6, 50e-6
FAMILIES = ("mixed", "apart", "segments")


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """Ranks times stages; in order of simplicity."""

    stages: int
    ranks: int

    @property
    def devices(self) -> int:
        """That one such worker takes."""
        return self.ranks * self.stages

    @property
    def name(self) -> str:
        """As in "tp2 pp4"."""
        return f"tp{self.ranks}" + (f" pp{self.stages}" if self.stages > 1 else "")


@dataclass(frozen=True, slots=True)
class Pool:
    """So many workers on equal cells."""

    cell: Cell
    count: int

    @property
    def devices(self) -> int:
        """All of theirs."""
        return self.cell.devices * self.count


@dataclass(frozen=True, slots=True)
class Layout:
    """Pools by what they do; `times` such sets side by side.

    With `near`, stages of both phases share nodes, so that KV stays within a node (DistServe's low node affinity):
    each of the `times` sets is a segment that hands over within itself.
    """

    prefill: Pool | None = None
    decode: Pool | None = None
    mixed: Pool | None = None
    near: bool = False
    times: int = 1

    @property
    def devices(self) -> int:
        """That it takes."""
        return self.times * sum(pool.devices for pool in (self.prefill, self.decode, self.mixed) if pool)

    @property
    def family(self) -> str:
        """Which way of serving it is: mixed, apart, segments, or one phase alone."""
        if self.mixed is not None:
            return "mixed"
        if self.prefill is not None and self.decode is not None:
            return "segments" if self.near else "apart"
        return "prefill" if self.prefill is not None else "decode"

    @property
    def name(self) -> str:
        """As in "3 prefill tp2, 1 decode tp4"."""
        pools = (("prefill", self.prefill), ("decode", self.decode), ("mixed", self.mixed))
        said = ", ".join(f"{pool.count} {role} {pool.cell.name}" for role, pool in pools if pool is not None)
        return f"{self.times} x ({said})" if self.near else said


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal devices in equal nodes.

    | field | unit | meaning |
    |---|---|---|
    | devices | | in all |
    | per_node | | in one node |
    | most_stages | | pipelines are no longer; None: as long as layers and devices let them be |
    | near, far | | lanes of KV within a node and between nodes, by the cost model's names |
    """

    devices: int
    per_node: int = 8
    most_stages: int | None = None
    near: str = "nvlink"
    far: str = "rdma-400g"

    @property
    def nodes(self) -> int:
        """Full ones and the rest."""
        return math.ceil(self.devices / self.per_node)

    def lane(self, layout: Layout) -> str:
        """That its KV takes: between nodes, unless all of it is on one, segments see to it, or one phase is alone."""
        alone = layout.family in ("prefill", "decode")
        return self.near if alone or layout.near or layout.devices <= self.per_node else self.far


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a cell's devices, all together."""

    usable: float
    weights: float
    working: float
    """Activations and graphs."""
    tokens: int
    """Of KV, in what is left."""


def cells(cluster: Cluster, sizes: Sizes, ranks: tuple[int, ...] = (1, 2, 4, 8)) -> Iterator[Cell]:
    """All that the cluster can hold: ranks divide heads and stay in a node, stages divide layers (DistServe 4.1)."""
    for stages in range(1, min(cluster.devices, cluster.most_stages or cluster.devices) + 1):
        for each in ranks:
            fits = each <= cluster.per_node and each * stages <= cluster.devices
            if fits and not sizes.heads % each and not sizes.layers % stages:
                yield Cell(stages, each)


def memory(sizes: Sizes, hardware: Hardware, cell: Cell, step_tokens: int) -> Memory:
    """What is where, if a step has at most so many tokens."""
    usable = SHARE * hardware.memory_bytes * cell.devices
    weights = float((sizes.layer_parameters + 2 * sizes.head_parameters) * sizes.value_bytes)
    working = cell.devices * (GRAPH_BYTES + step_tokens * sizes.hidden * ROW_BYTES)
    return Memory(usable, weights, working, max(0, int((usable - weights - working) / sizes.kv_bytes)))


def misfit(found: Memory, cell: Cell, longest: int, *, apart: bool) -> str:
    """Why the longest request does not fit, as a sentence; empty if it does.

    `apart`: stages have batches of their own, and each has its part of the memory for KV.
    """
    gb = 1e-9
    if not found.tokens:
        return (
            f"weights of {found.weights * gb:.1f} GB and {found.working * gb:.1f} GB of activations and graphs do not "
            f"fit into {found.usable * gb:.1f} GB of {cell.devices} device{'s' * (cell.devices > 1)}"
        )
    room = found.tokens // cell.stages if apart else found.tokens
    if room < longest:
        return (
            f"KV of the longest request, {longest:,} tokens, does not fit into the {room:,} that weights of "
            f"{found.weights * gb:.1f} GB leave room for"
            + (" in each stage's batch" if apart and cell.stages > 1 else "")
        )
    return ""


def staged(cost: CostModel, sizes: Sizes, cell: Cell, cluster: Cluster) -> CostModel:
    """What a whole step costs over the cell's stages, `cost` being that of its ranks: the same, and the hops."""
    if cell.stages == 1:
        return cost
    far = math.ceil(cell.devices / cluster.per_node) - 1
    near = cell.stages - 1 - far
    lanes = {lane.name: lane for lane in cost.lanes}
    token_s = 2 * sizes.hidden * (near * lanes[cluster.near].byte_s + far * lanes[cluster.far].byte_s)
    fixed_s = near * NEAR_HOP_S + far * FAR_HOP_S
    prefill: list[PrefillLine] = [
        (a + fixed_s + cell.stages * STAGE_S, b + token_s, c, d) for a, b, c, d in cost.prefill
    ]
    decode: list[DecodeLine] = [(a + fixed_s, b + token_s, c) for a, b, c in cost.decode]
    return replace(cost, name=f"{cost.name} pp{cell.stages}", prefill=tuple(prefill), decode=tuple(decode))


def rest_s(cost: CostModel, stages: int, new: int, cached: int, step_tokens: int) -> float:
    """How long a prompt's last step goes on in later stages, when the first is free again; of a `staged` cost."""
    if stages == 1:
        return 0.0
    last = (new - 1) % step_tokens + 1
    return cost.prefill_s([(last, cached + new - last)]) * (stages - 1) / stages
