"""What is simulated of a layout: stages as DistServe's queue has them, one phase alone, parts of what is too large."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest

from core.errors import SetupError
from core.request import Slo
from scheduler.cost import CostModel
from scheduler.fluid import Load
from scheduler.layout import Cell, Cluster, Layout, Pool
from scheduler.plan import ASKED, Ask, Change, Evaluate, Fit, Plan
from scheduler.planner import Planner, plan
from scheduler.policies import Policy, policy
from scheduler.prefill_policy import PrefillConfig
from scheduler.roofline import A100, H200, LANES, LLAMA_3_1_8B, OPT_13B
from scheduler.router import RouterConfig
from sim import traces
from sim.generators import AZURE_CONV, generate
from sim.outcome import Outcome
from sim.planning import Costs, Site, Trials, _resized, load
from sim.workload import Arrival, Workload, scale
from tests.sim import peer

SLO = Slo(0.4, 0.05)
COSTS = Costs("h200-llama-3.1-8b", LLAMA_3_1_8B, H200)
ONE, TWO, PIPE = Cell(1, 1), Cell(1, 2), Cell(2, 1)


SMALL = Site(Cluster(8), COSTS, least=200, most=300)


def make(rate: float, count: int) -> Workload:
    return scale(generate(AZURE_CONV, 1, count), rate)


SAMPLE = load(make(1.0, 300))


def trials(slo: Slo = SLO, site: Site | None = None, over: list[Outcome] | None = None) -> Trials:
    add = None if over is None else over.append
    return Trials(site or SMALL, Ask(1.0, slo), make, SAMPLE, add)


def attained(layout: Layout, rate: float, change: Change = ASKED, **more: object) -> float:
    return trials(**more).attained(Evaluate(1, layout, rate, change, exact=True))  # type: ignore[arg-type]


# Stages.

TOKEN_S = 1e-3
D_S = 1.0


class Linear(Costs):
    """A prompt of 1,000 tokens takes a second; hops and decoding take nothing."""

    def of(self, ranks: int) -> CostModel:
        return CostModel("linear", ((0.0, TOKEN_S, 0.0, 0.0),), ((0.0, 0.0, 0.0),), LANES)


FIFO = Policy(
    "one by one",
    "a queue with one server",
    router_config=RouterConfig(max_queue_s=math.inf),
    prefill_config=PrefillConfig(chunk_tokens=10**5, max_rows=1),
)


def times(rate: float, count: int, stages: int, seed: int) -> tuple[list[float], list[float], float]:
    """Of each request, simulated: until its first token, with what is taken off the goal for it; its begin; and D."""
    rng, found = random.Random(seed), list[Outcome]()
    begins = list(accumulate(rng.expovariate(rate) for _ in range(count)))
    made = Workload("poisson", tuple(Arrival(at_s, 1000, 1) for at_s in begins))
    site = Site(Cluster(8), Linear("linear", OPT_13B, A100), FIFO)
    rests = Trials(site, Ask(rate, Slo(1e5)), lambda rate, count: made, load(made), found.append)
    assert rests.attained(Evaluate(1, Layout(prefill=Pool(Cell(stages, 1), 1)), rate)) == 1.0
    found.sort(key=lambda each: each.at_s)
    whole_s = rests._cost(Cell(stages, 1)).prefill_s([(1000, 0)])
    return [(each.ttft_s or 0.0) + whole_s * (stages - 1) / stages for each in found], begins, whole_s


def recursion(begins: list[float], service_s: float, rest_s: float) -> Iterator[float]:
    """Lindley's."""
    free = 0.0
    for at_s in begins:
        free = max(free, at_s) + service_s
        yield free - at_s + rest_s


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_prompt_waits_for_one_stage_and_passes_through_all(stages: int) -> None:
    """DistServe's equations 1 and 2: service D / stages, then the rest of D, here with the stages' own cost."""
    ours, begins, whole_s = times(0.8 * stages / D_S, 300, stages, 3)
    assert whole_s == pytest.approx(D_S, rel=0.01)
    theirs = list(recursion(begins, whole_s / stages, whole_s - whole_s / stages))
    assert ours == pytest.approx(theirs, abs=0.002)  # a few messages
    assert max(theirs) > 1.3 * whole_s, "hardly anybody waited"


@pytest.mark.parametrize(("stages", "load_share"), [(1, 0.6), (2, 0.3), (2, 0.6)])
def test_the_recursion_is_distserves_formula(stages: int, load_share: float) -> None:
    """TTFT = D + R D^2 / (2 (1 - R D)) for one stage, D + R D^2 / (4 (2 - R D)) for two."""
    rate, rng = load_share * stages / D_S, random.Random(11)
    gaps = [rng.expovariate(rate) for _ in range(60_000)]
    total_s = rate * D_S**2
    formula = D_S + (total_s / (2 * (1 - rate * D_S)) if stages == 1 else total_s / (4 * (2 - rate * D_S)))
    found = list(recursion(list(accumulate(gaps)), D_S / stages, D_S - D_S / stages))
    assert math.fsum(found) / len(found) == pytest.approx(formula, rel=0.03)


def test_rows_of_a_staged_worker_are_in_as_many_batches() -> None:
    """Two stages hold twice as many rows at the same gap, if memory allows; and take as many devices."""
    slo = Slo(gap_s=0.02)
    rate = 150.0
    assert attained(Layout(decode=Pool(ONE, 1)), rate, slo=slo) < 0.9
    assert attained(Layout(decode=Pool(PIPE, 1)), rate, slo=slo) >= 0.9
    both = list(trials(slo)._builds(Layout(decode=Pool(PIPE, 1))))
    decodes = [build for build in both if build.name.startswith("decode")]
    alone = [b for b in trials(slo)._builds(Layout(decode=Pool(ONE, 1))) if b.name.startswith("decode")]
    assert [build.tp for build in decodes] == [1, 1]
    # Two devices hold the weights once.
    assert sum(build.pages for build in decodes) > 2 * alone[0].pages


# Phases, and parts.


def test_a_phase_alone_is_never_worse_than_with_the_other() -> None:
    pair = attained(Layout(Pool(ONE, 1), Pool(ONE, 1)), 66.0)
    assert attained(Layout(prefill=Pool(ONE, 1)), 66.0) >= pair - 0.01
    assert attained(Layout(decode=Pool(ONE, 1)), 66.0) >= pair - 0.01


def test_more_workers_attain_more() -> None:
    for pool, rate in (("prefill", 150.0), ("decode", 200.0), ("mixed", 90.0)):
        few, more = (attained(Layout(**{pool: Pool(ONE, count)}), rate) for count in (1, 3))  # type: ignore[arg-type]
        assert few < 0.9 <= more


def test_what_no_schedule_can_pass_is_not_simulated() -> None:
    made = trials()
    bound = next(fit.bound for fit in made.fits()["mixed"] if fit.cell == ONE)
    assert made.attained(Evaluate(1, Layout(mixed=Pool(ONE, 1)), 1.01 * bound)) == 0.0
    assert made.attained(Evaluate(1, Layout(Pool(ONE, 1), Pool(ONE, 1), near=True, times=9), 10_000.0)) == 0.0
    assert made.requests == 0


NEAR = Layout(Pool(ONE, 1), Pool(ONE, 1), near=True)


@pytest.mark.parametrize(
    ("layout", "rate", "part", "part_rate"),
    [
        (Layout(mixed=Pool(ONE, 12)), 120.0, Layout(mixed=Pool(ONE, 6)), 60.0),
        (Layout(prefill=Pool(PIPE, 9)), 90.0, Layout(prefill=Pool(PIPE, 3)), 30.0),
        (Layout(decode=Pool(ONE, 6)), 90.0, Layout(decode=Pool(ONE, 6)), 90.0),
        (replace(NEAR, times=5), 50.0, NEAR, 10.0),
        (Layout(Pool(ONE, 4), Pool(ONE, 2)), 10.0, Layout(Pool(ONE, 4), Pool(ONE, 2)), 10.0),
        (Layout(Pool(ONE, 4), Pool(ONE, 2)), 5000.0, Layout(Pool(ONE, 2), Pool(ONE, 1)), 2500.0),
    ],
)  # fmt: skip
def test_of_what_is_large_a_part_is_simulated_at_its_part_of_the_rate(layout, rate, part, part_rate) -> None:
    found, its_rate = trials()._part(layout, rate, 2.0)
    assert found == part
    assert its_rate == pytest.approx(part_rate)


def test_a_run_that_can_no_longer_succeed_is_cut_short_and_says_so() -> None:
    layout, rate = Layout(mixed=Pool(ONE, 1)), 52.0
    seen: list[Outcome] = []
    short = trials(over=seen).attained(Evaluate(1, layout, rate))
    exact = attained(layout, rate)
    assert exact <= short < 0.9
    assert len(seen) < 200


def test_a_change_is_a_workload_or_goals_of_another_size() -> None:
    layout = Layout(Pool(ONE, 1), Pool(ONE, 1))
    base = attained(layout, 55.0)
    for change in (Change(prompt=1.5), Change(ttft=0.2), Change(gap=0.12)):
        assert attained(layout, 55.0, change) < base - 0.02
    assert attained(layout, 55.0, Change(output=0.5)) >= base - 0.02
    assert attained(layout, 40.0, Change(prompt=0.5)) >= 0.99


@pytest.mark.parametrize(("factor", "blocks"), [(1.0, (7, 8)), (0.5, (7,)), (2.0, (7, 8, -300_001, -300_002))])
def test_prompts_of_another_size_share_what_they_shared(factor: float, blocks: tuple[int, ...]) -> None:
    found = _resized(Arrival(1.0, 128, 9, blocks=(7, 8), block_tokens=64, history=100), factor, 3)
    assert (found.prompt, found.blocks, found.history) == (128 * factor, blocks, min(100, 128 * factor))
    assert _resized(Arrival(1.0, 3, 9), 0.1, 3).prompt == 1


def test_the_same_question_has_the_same_answer() -> None:
    asked = Evaluate(1, Layout(Pool(ONE, 2), Pool(TWO, 1)), 75.0, exact=True)
    assert trials().attained(asked) == trials().attained(asked)


def test_a_long_wait_for_a_decode_worker_is_a_miss() -> None:
    """It is one gap, which no 99th percentile of a long answer shows."""
    one = replace(SMALL, apart=replace(policy("fcfs"), decode_config=replace(policy("fcfs").decode_config, max_rows=2)))
    found: list[Outcome] = []
    tight = Slo(gap_s=0.006)
    bound = next(fit.bound for fit in trials(tight, one).fits()["decode"] if fit.cell == ONE)
    share = attained(Layout(decode=Pool(ONE, 1)), 0.8 * bound, site=one, slo=tight, over=found)
    late = [each for each in found if each.good and not each.good_by_mean]
    assert late
    assert share < sum(each.good for each in found) / len(found)


def test_other_ranks_than_the_tables_are_scaled_to_the_nearest_table() -> None:
    table, guess = COSTS.of(1), COSTS.of(2)
    plain = Costs("nobody-knows", LLAMA_3_1_8B, H200)
    for ranks in (1, 2, 4):
        ratios = {
            phase: getattr(COSTS.of(ranks), phase)(*what) / getattr(plain.of(ranks), phase)(*what)
            for phase, what in (("prefill_s", ([(2048, 0)],)), ("decode_s", (64, 64 * 1024)))
        }
        first = {
            phase: getattr(table, phase)(*what) / getattr(plain.of(1), phase)(*what)
            for phase, what in (("prefill_s", ([(2048, 0)],)), ("decode_s", (64, 64 * 1024)))
        }
        assert ratios == pytest.approx(first)
    assert guess.prefill_s([(2048, 0)]) < table.prefill_s([(2048, 0)])
    with pytest.raises(ValueError, match="tp: got 3"):
        COSTS.of(3)


def test_a_load_counts_what_earlier_prompts_had_and_sessions() -> None:
    made = Workload(
        "w",
        (
            Arrival(0.0, 100, 5, blocks=(1, 2), block_tokens=64, session="a"),
            Arrival(1.0, 130, 6, blocks=(1, 3, 4), block_tokens=64, session="a", turn=1),
            Arrival(2.0, 50, 7),
        ),
    )
    found = load(made)
    assert found == Load(((100, 0, 5), (66, 64, 6), (50, 0, 7)), 2)
    assert (found.longest, found.longest_prompt) == (136, 130)
    assert (found.prompt_tokens, found.output_tokens) == (140.0, 9.0)
    with pytest.raises(SetupError, match="requests"):
        load(Workload("w", ()))


# Beside an exhaustive search, and beside DistServe's.


@pytest.mark.slow
def test_four_devices_beside_every_layout_that_there_is() -> None:
    """The plan is the fewest devices that any layout needs, all of them simulated."""
    cluster, rate = Cluster(4), 120.0
    made = Trials(Site(cluster, COSTS), Ask(rate, SLO), make, SAMPLE)
    found = plan(Planner(Ask(rate, SLO), cluster, SAMPLE, made.fits()), made.attained)
    cells = [fit.cell for fit in made.fits()["mixed"] if fit.bound]
    layouts = [Layout(mixed=Pool(cell, count)) for cell in cells for count in range(1, 4 // cell.devices + 1)]
    for one in cells:
        for other in cells:
            for count in range(1, 4 // one.devices + 1):
                for beside in range(1, (4 - count * one.devices) // other.devices + 1):
                    layouts.append(Layout(Pool(one, count), Pool(other, beside)))
    fewest = min(layout.devices for layout in layouts if made.attained(Evaluate(1, layout, rate)) >= 0.9)
    assert found.layout is not None
    assert found.layout.devices == fewest


@pytest.fixture
def folder() -> Path:
    """Of the public traces; where there are none the test is skipped."""
    found = traces.folder()
    if not (found / peer.PLAN).is_file():
        pytest.skip("needs the public traces (BATON_TRACES)")
    return found


def theirs(folder: Path, rate: float) -> tuple[Plan, peer.Placement | None]:
    """The planner, told what their simulator says of each placement; and the best of their table."""
    table = {where: best for where, best in peer.planned(folder).items() if best}
    fits: dict[str, list[Fit]] = {"prefill": [], "decode": [], "mixed": []}
    for stages in (1, 2, 4):
        for ranks in (1, 2, 4):
            cell = Cell(stages, ranks)
            together = peer.Placement("vllm", ranks, stages)
            apart = [where for where in table if where.tp_d]
            for use, known in (
                ("prefill", any((where.tp_p, where.pp_p) == (ranks, stages) for where in apart)),
                ("decode", any((where.tp_d, where.pp_d) == (ranks, stages) for where in apart)),
                ("mixed", together in table),
            ):
                fits[use].append(Fit(cell, 100.0 if known else 0.0, "none" if known else "slo", "" if known else "0"))

    def evaluate(command: Evaluate) -> float:
        layout = command.layout
        if layout.mixed is not None:
            sets, where = layout.mixed.count, peer.Placement("vllm", layout.mixed.cell.ranks, layout.mixed.cell.stages)
        elif layout.prefill is not None and layout.decode is not None:
            one, other = layout.prefill, layout.decode
            sets = math.gcd(one.count, other.count) if one.count == other.count else 0
            where = peer.Placement("distserve", one.cell.ranks, one.cell.stages, other.cell.ranks, other.cell.stages)
        else:
            return 1.0  # their table has no phase alone
        return float(command.rate <= sets * where.devices * table.get(where, 0.0))

    found = plan(Planner(Ask(rate, SLO), Cluster(4), SAMPLE, fits), evaluate)
    fewest = [(math.ceil(rate / (where.devices * best) - 1e-9) * where.devices, where) for where, best in table.items()]
    devices, where = min(fewest, key=lambda each: each[0])
    return found, where if devices <= 4 else None


@pytest.mark.parametrize("rate", [1.0, 2.0, 3.0, 3.1, 5.0, 6.0, 6.5, 9.0, 9.2])
def test_it_chooses_what_distserves_table_says_is_best(folder: Path, rate: float) -> None:
    found, best = theirs(folder, rate)
    assert best is not None
    assert found.rate == rate
    assert found.layout is not None
    assert found.layout.devices == -(-rate // (peer.planned(folder)[best] * best.devices)) * best.devices
    if rate > 6.6:  # only one placement of four devices sustains that: the one their search chose
        assert found.layout.name == "1 prefill tp2, 1 decode tp1 pp2"


@pytest.mark.slow
def test_every_placement_of_their_search(folder: Path) -> None:
    """13 of 15 to the last digit; the others, with two stages on every worker, within four of their search's steps."""
    table = peer.planned(folder)
    ours = {placement: peer.sustained(folder, placement) for placement in table}
    equal = [placement for placement in table if ours[placement] == table[placement]]
    assert len(equal) >= 13
    assert all(abs(ours[each] - table[each]) <= 4 * 5 / 128 + 1e-9 for each in table)
    assert max(ours, key=lambda each: ours[each]) == max(table, key=lambda each: table[each])
