"""What a layout of a plan attains, by simulation: the `goodput` that scheduler/planner.py is given.

| of a layout | here |
|---|---|
| a prefill worker with stages | steps take one stage's part; the other stages' is taken off each request's TTFT goal |
| a decode or mixed worker with stages | as many workers as stages, which share its memory |
| prefill alone | every request ends with its first token |
| decode alone | prompts take no time, and the goal for the first token is none |
| segments side by side | one of them, at its part of the rate |
| more than `POOL` workers or stages of one phase, or mixed | so many, at their part of the rate |
| pools with a common divisor, where it would take too many requests | one part, at its part of the rate |

A request counts if its first token, the 99th percentile of its gaps and their mean are within the goals: a long wait
for a decode worker is a single gap, which no percentile of a long answer shows and the mean does. Requests of the first
`WARM` of the time are simulated and not judged; there are enough of them, within the site's limits, for answers of
average length to end several times over. The same layout, rate and change always give the same share. A run that can no
longer reach the share that was asked for is stopped, unless the exact share is wanted: what is given then is the share
that would be left if all others were good.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from core.errors import SetupError
from core.kv import KvShape
from core.request import Slo
from core.worker import Role
from scheduler import roofline
from scheduler.cost import CostModel
from scheduler.fluid import Bound, Load, decode_bound, mixed_bound, prefill_bound
from scheduler.layout import Cell, Cluster, Layout, Memory, Pool, cells, memory, misfit, rest_s, staged
from scheduler.plan import ASKED, Ask, Change, Evaluate, Fit
from scheduler.policies import BATON, Policy, policy
from scheduler.roofline import LANES, Hardware, Sizes, over
from sim.fleet import SHIPPED, Build
from sim.outcome import Outcome
from sim.run import Settings, Simulation, simulate
from sim.workload import Arrival, Workload, blocks_of

COLOCATED = policy("colocated-chunked")
POOL = 6
WARM = 0.2
SPANS = 4.0
"""Times that an answer of average length takes, in a run."""
MORE = 10**5
"""More blocks than any prompt has."""
ROOM = 10**6
"""Pages of a worker whose memory is not looked at."""
REFERENCE = ([(2048, 0)], 64, 64 * 1024)
"""Prompts, rows and context at which a table and the roofline are compared."""

Make = Callable[[float, int], Workload]
"""A workload of a rate and at least so many requests, or all that there are."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What steps cost on cells of one model and device: tables where they are shipped, else the roofline.

    A roofline beside tables is scaled to them, by phase, so that numbers of ranks are compared by one measure: at the
    nearest number of ranks that has a table.
    """

    name: str
    """As in "h200-llama-3.1-8b"."""
    sizes: Sizes
    hardware: Hardware

    def of(self, ranks: int) -> CostModel:
        """Of a number of ranks; ValueError where nothing is known of so many."""
        table = self._table(ranks)
        if table is not None:
            return table
        found = self._roofline(ranks)
        near = [(abs(math.log2(each / ranks)), each) for each in (1, 2, 4, 8) if self._table(each) is not None]
        if not near:
            return found
        beside = min(near)[1]
        known, guess = self._table(beside), self._roofline(beside)
        assert known is not None
        prompts, rows, context = REFERENCE
        return found.at(
            known.prefill_s(prompts) / guess.prefill_s(prompts),
            known.decode_s(rows, context) / guess.decode_s(rows, context),
        )

    def _roofline(self, ranks: int) -> CostModel:
        return _guess(self.name, self.sizes, ranks, self.hardware)

    def _table(self, ranks: int) -> CostModel | None:
        for name in (f"{self.name}-tp{ranks}", *((self.name,) if ranks == 1 else ())):
            path = SHIPPED / f"{name}.json"
            if path.exists():
                model = CostModel.of(json.loads(path.read_text(encoding="utf-8")))
                known = {lane.name: lane for lane in (*LANES, *model.lanes)}
                return replace(model, lanes=tuple(known.values()))
        return None


@dataclass(frozen=True, slots=True)
class Site:
    """A model on a cluster, and how it is served.

    | field | default | meaning |
    |---|---|---|
    | costs | | what steps take, by ranks |
    | apart | baton | policy of prefill and decode workers |
    | mixed | colocated-chunked | of mixed workers; chunks are cut to the gap's goal |
    | page_tokens | 64 | in a page of KV |
    | least, most | 800, 6000 | requests of a simulation |
    """

    cluster: Cluster
    costs: Costs
    apart: Policy = BATON
    mixed: Policy = COLOCATED
    page_tokens: int = 64
    least: int = 800
    most: int = 6000

    @property
    def step_tokens(self) -> int:
        """The most of a step."""
        return self.apart.prefill_config.chunk_tokens


class Trials:
    """Evaluates layouts of one site with one workload; remembers what cells cost."""

    def __init__(
        self, site: Site, ask: Ask, make: Make, load: Load, over: Callable[[Outcome], None] | None = None
    ) -> None:
        self._site, self._ask, self._make, self._load, self._over = site, ask, make, load, over
        self._costs: dict[int, CostModel] = {}
        self._staged: dict[Cell, CostModel] = {}
        self._bounds: dict[tuple[str, Cell, Change], Bound] = {}
        self.requests = 0
        """Simulated so far."""

    # What is known without simulating.

    def fits(self) -> dict[str, list[Fit]]:
        """Every cell for every use, with its bound or why it cannot be used."""
        found: dict[str, list[Fit]] = {"mixed": [], "prefill": [], "decode": []}
        site = self._site
        for cell in cells(site.cluster, site.costs.sizes):
            for use, fits in found.items():
                room = self._memory(cell)
                longest = self._load.longest_prompt if use == "prefill" else self._load.longest
                wrong = misfit(room, cell, longest, apart=use != "prefill")
                if wrong:
                    fits.append(Fit(cell, 0.0, "memory", wrong))
                    continue
                try:
                    bound = self._bound(use, cell, ASKED)
                except ValueError as error:
                    fits.append(Fit(cell, 0.0, "cluster", str(error)))
                    continue
                fits.append(Fit(cell, bound.rate, "none" if bound.rate else "slo", bound.why))
        return found

    def _cost(self, cell: Cell) -> CostModel:
        """Of a whole step over the cell's ranks and stages."""
        if cell not in self._staged:
            site = self._site
            if cell.ranks not in self._costs:
                self._costs[cell.ranks] = site.costs.of(cell.ranks)
            self._staged[cell] = staged(self._costs[cell.ranks], site.costs.sizes, cell, site.cluster)
        return self._staged[cell]

    def _memory(self, cell: Cell) -> Memory:
        return memory(self._site.costs.sizes, self._site.costs.hardware, cell, self._site.step_tokens)

    def _bound(self, use: str, cell: Cell, change: Change) -> Bound:
        key = use, cell, change
        if key not in self._bounds:
            site, share, cost = self._site, self._ask.share, self._cost(cell)
            load, slo = self._load.scaled(change.prompt, change.output), _goals(self._ask.slo, change)
            tokens = self._memory(cell).tokens // cell.stages
            rows, steps = site.apart.decode_config.max_rows, site.step_tokens
            if use == "prefill":
                found = prefill_bound(cost, cell.stages, load, slo, share, steps)
            elif use == "decode":
                found = decode_bound(cost, cell.stages, load, slo, share, rows, tokens)
            else:
                rows = site.mixed.mixed_config.max_rows
                found = mixed_bound(cost, cell.stages, load, slo, share, steps, rows, tokens)
            self._bounds[key] = found
        return self._bounds[key]

    # Simulating.

    def attained(self, evaluate: Evaluate) -> float:
        """The share of requests that are good."""
        layout, rate, change = evaluate.layout, evaluate.rate, evaluate.change
        if any(
            pool.count * self._bound(use, pool.cell, change).rate * layout.times < rate for use, pool in _pools(layout)
        ):
            return 0.0
        answer_s = self._answer_s(layout)
        layout, rate = self._part(layout, rate, answer_s)
        count = min(
            self._site.most,
            max(self._site.least, math.ceil(SPANS * answer_s * rate * len(self._load.rows) / self._load.units)),
        )
        made = self._changed(self._make(rate, count), layout, change)
        span_s = made.arrivals[-1].at_s - made.arrivals[0].at_s
        since = made.arrivals[0].at_s + WARM * span_s
        judged = good = 0
        allowed = math.inf
        total = sum(each.at_s >= since for each in made.arrivals)
        if not evaluate.exact and all(each.gap_s is None for each in made.arrivals):
            allowed = (1 - self._ask.share) * total + 1e-6
        running: list[Simulation] = []

        def count_in(one: Outcome) -> None:
            nonlocal judged, good
            if one.at_s >= since:
                judged += 1
                good += one.good and one.good_by_mean
                if judged - good > allowed:
                    running[0].loop.stopped = True  # whatever becomes of the others
            if self._over is not None:
                self._over(one)

        self.requests += len(made)
        chosen = self._policy(layout, change)
        settings = Settings(slo=_judged(layout, _goals(self._ask.slo, change)), lane=self._site.cluster.lane(layout))
        simulate(made, list(self._builds(layout)), chosen, settings, over=count_in, watch=running.append)
        if judged - good > allowed:
            return 1 - (judged - good) / total
        return good / judged if judged else 0.0

    def _part(self, layout: Layout, rate: float, answer_s: float) -> tuple[Layout, float]:
        """What of a layout is simulated."""
        layout, rate = replace(layout, times=1), rate / layout.times
        prefill, decode = layout.prefill, layout.decode
        alone = [pool for pool in (prefill, decode, layout.mixed) if pool is not None]
        most = max(2, POOL // alone[0].cell.stages)
        if len(alone) == 1 and alone[0].count > most:
            few = Pool(alone[0].cell, most)
            smaller = Layout(prefill and few, decode and few, layout.mixed and few)
            return smaller, rate * most / alone[0].count
        if prefill is not None and decode is not None and SPANS * answer_s * rate > self._site.most:
            common = math.gcd(prefill.count, decode.count)
            one, other = Pool(prefill.cell, prefill.count // common), Pool(decode.cell, decode.count // common)
            return replace(layout, prefill=one, decode=other), rate / common
        return layout, rate

    def _answer_s(self, layout: Layout) -> float:
        """About how long an answer of average length takes from a full batch; a second where there are none."""
        pool = layout.decode or layout.mixed
        if pool is None:
            return 1.0
        cost, rows = self._cost(pool.cell), self._load.rows
        output = sum(each for *_, each in rows) / len(rows)
        context = sum(new + cached + each / 2 for new, cached, each in rows) / len(rows)
        batch = min(64, max(1, int(self._memory(pool.cell).tokens / pool.cell.stages / context)))
        return output * cost.decode_s(batch, round(batch * context))

    def _changed(self, made: Workload, layout: Layout, change: Change) -> Workload:
        """The workload as this layout meets it."""
        goals = _judged(layout, _goals(self._ask.slo, change))
        stages = layout.prefill.cell.stages if layout.prefill is not None else 1
        cost = self._cost(layout.prefill.cell) if layout.prefill is not None else None
        alone = layout.family == "prefill"
        if not alone and stages == 1 and change.prompt == change.output == 1:
            return made
        arrivals = []
        for number, each in enumerate(made.arrivals):
            arrival = each if change.prompt == 1 else _resized(each, change.prompt, number)
            output = 1 if alone else max(1, round(each.output * change.output))
            slo = arrival.slo
            if stages > 1 and goals.ttft_s and cost is not None:
                rest = rest_s(cost, stages, arrival.prompt, 0, self._site.step_tokens)
                slo = Slo(max(1e-6, goals.ttft_s - rest), goals.gap_s)
            arrivals.append(replace(arrival, output=output, slo=slo))
        return Workload(made.name, tuple(arrivals), made.source)

    def _policy(self, layout: Layout, change: Change) -> Policy:
        if layout.mixed is None:
            return self._site.apart
        gap_s = _goals(self._ask.slo, change).gap_s
        config = self._site.mixed.mixed_config
        if not gap_s or config.order != "chunked":
            return self._site.mixed
        # As Sarathi-Serve's section 4.3 has it: the budget is what the gap's goal leaves room for.
        return replace(
            self._site.mixed, mixed_config=replace(config, budget_tokens=self._site.step_tokens, gap_s=gap_s)
        )

    def _builds(self, layout: Layout) -> Iterator[Build]:
        sizes = self._site.costs.sizes
        shape = KvShape(sizes.layers, sizes.kv_heads, sizes.head_dim, self._site.page_tokens, "bfloat16")
        if layout.family == "decode":
            assert layout.decode is not None
            # Enough of them that no link is what rows wait for.
            free = replace(self._cost(layout.decode.cell), prefill=((0.0, 0.0, 0.0, 0.0),))
            for number in range(4 * layout.decode.count):
                yield Build(f"prefill-{number}", Role.PREFILL, free, shape, ROOM, 0)
        if layout.family == "prefill":
            assert layout.prefill is not None
            # Nobody decodes; but a router places nothing where nobody could.
            yield Build("decode-0", Role.DECODE, self._cost(layout.prefill.cell), shape, ROOM, 0)
        for use, pool in _pools(layout):
            role, cell, cost = Role(use), pool.cell, self._cost(pool.cell)
            tokens = self._memory(cell).tokens
            together = role is Role.PREFILL
            cost = cost.at(prefill=1 / cell.stages) if together else cost
            parts, devices = (1, cell.devices) if together else (cell.stages, cell.ranks)
            pages = max(1, tokens // parts // self._site.page_tokens)
            for number in range(pool.count * parts):
                yield Build(f"{use}-{number}", role, cost, shape, pages, devices)


@lru_cache(maxsize=32)
def _guess(name: str, sizes: Sizes, ranks: int, hardware: Hardware) -> CostModel:
    return roofline.roofline(f"{name}-tp{ranks}", over(sizes, ranks), hardware)


def load(made: Workload) -> Load:
    """Requests of a workload as a plan sees them; what an earlier prompt had counts as cached."""
    seen: set[int] = set()
    rows = []
    for each in made.arrivals:
        known = 0
        for block in each.blocks:
            if block not in seen:
                break
            known += 1
        seen.update(each.blocks)
        new = max(1, each.prompt - known * each.block_tokens)
        rows.append((new, each.prompt - new, each.output))
    if not rows:
        raise SetupError("requests: got none, want at least one to plan for")
    return Load(tuple(rows), len({each.session or str(number) for number, each in enumerate(made.arrivals)}))


def _resized(arrival: Arrival, factor: float, number: int) -> Arrival:
    """With a longer or shorter prompt; nobody else has the blocks that come to it."""
    prompt = max(1, round(arrival.prompt * factor))
    count = blocks_of(prompt, arrival.block_tokens)
    more = (-1 - number * MORE - at for at in range(count - len(arrival.blocks)))
    blocks = (*arrival.blocks[:count], *more)
    return replace(arrival, prompt=prompt, blocks=blocks, history=min(arrival.history, prompt))


def _pools(layout: Layout) -> Iterator[tuple[str, Pool]]:
    for use, pool in (("prefill", layout.prefill), ("decode", layout.decode), ("mixed", layout.mixed)):
        if pool is not None:
            yield use, pool


def _goals(slo: Slo, change: Change) -> Slo:
    return Slo(slo.ttft_s * change.ttft, slo.gap_s * change.gap)


def _judged(layout: Layout, slo: Slo) -> Slo:
    """What of the goals a phase alone can meet or miss."""
    match layout.family:
        case "prefill":
            return Slo(slo.ttft_s, 0.0)
        case "decode":
            return Slo(0.0, slo.gap_s)
        case _:
            return slo
