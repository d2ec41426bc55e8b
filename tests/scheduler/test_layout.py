"""What cells there are, what fits into them, what stages do to a step, and what no schedule can pass."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.request import Slo
from scheduler.cost import CostModel, Lane
from scheduler.fluid import Load, decode_bound, mixed_bound, prefill_bound
from scheduler.layout import Cell, Cluster, Layout, Pool, cells, memory, misfit, rest_s, staged
from scheduler.roofline import A100, H200, LLAMA_3_1_8B, LLAMA_3_1_70B, OPT_13B, OPT_66B
from tests.cast import QUICK

LANES = (Lane("nvlink", 0.0, 0.0, 1e-12), Lane("rdma-400g", 0.0, 0.0, 1e-11))
COST = CostModel("c", ((0.010, 1e-4, 1e-8, 1e-3), (0.0, 2e-4, 0.0, 0.0)), ((0.005, 1e-4, 1e-7),), LANES)


@pytest.mark.parametrize(
    ("devices", "per_node", "stages", "names"),
    [
        (1, 8, None, "tp1"),
        (4, 8, None, "tp1, tp2, tp4, tp1 pp2, tp2 pp2, tp1 pp4"),
        (4, 2, None, "tp1, tp2, tp1 pp2, tp2 pp2, tp1 pp4"),
        (6, 8, 2, "tp1, tp2, tp4, tp1 pp2, tp2 pp2"),
        (5, 8, None, "tp1, tp2, tp4, tp1 pp2, tp2 pp2, tp1 pp4, tp1 pp5"),
    ],
)
def test_ranks_divide_heads_and_a_node_and_stages_divide_layers(devices, per_node, stages, names) -> None:
    found = cells(Cluster(devices, per_node, stages), OPT_13B)  # 40 heads, 40 layers
    assert ", ".join(each.name for each in found) == names
    assert [each.name for each in cells(Cluster(3, 8), LLAMA_3_1_8B)] == ["tp1", "tp2", "tp1 pp2"]  # 32 layers


def test_memory_is_weights_working_memory_and_kv() -> None:
    found = memory(OPT_13B, A100, Cell(1, 1), 2048)
    assert found.usable == 72e9
    assert found.weights == pytest.approx(2 * 13.1e9, rel=0.02)
    assert found.working == pytest.approx(0.3e9 + 2048 * 5120 * 20)
    assert found.tokens == int((found.usable - found.weights - found.working) / (2 * 40 * 40 * 128 * 2))
    four = memory(OPT_13B, A100, Cell(2, 2), 2048)
    assert four.weights == found.weights
    assert (four.usable, four.working) == (4 * found.usable, 4 * found.working)


def test_what_does_not_fit_is_said_in_a_sentence() -> None:
    one = Cell(1, 1)
    assert misfit(memory(LLAMA_3_1_70B, H200, one, 2048), one, 100, apart=False) == (
        "weights of 141.1 GB and 0.6 GB of activations and graphs do not fit into 126.9 GB of 1 device"
    )
    two = Cell(1, 2)
    found = memory(OPT_66B, A100, two, 2048)
    assert misfit(found, two, found.tokens, apart=False) == ""
    assert misfit(found, two, found.tokens + 1, apart=True).startswith(
        f"KV of the longest request, {found.tokens + 1:,} tokens, does not fit into the {found.tokens:,} that weights"
    )
    staged_cell = Cell(2, 2)
    more = memory(OPT_66B, A100, staged_cell, 2048)
    assert misfit(more, staged_cell, more.tokens, apart=False) == ""
    assert misfit(more, staged_cell, more.tokens, apart=True).endswith("in each stage's batch")
    assert misfit(more, staged_cell, more.tokens // 2, apart=True) == ""


def test_stages_add_hops_and_nothing_else() -> None:
    cluster = Cluster(16, 4)
    assert staged(COST, OPT_13B, Cell(1, 4), cluster) is COST
    found = staged(COST, OPT_13B, Cell(4, 2), cluster)  # on two nodes: two near hops, one far
    token_s = 2 * 5120 * (2 * 1e-12 + 1e-11)
    hops_s = 2 * 12e-6 + 50e-6
    assert found.prefill[0] == pytest.approx((0.010 + hops_s + 4e-3, 1e-4 + token_s, 1e-8, 1e-3))
    assert found.decode[0] == pytest.approx((0.005 + hops_s, 1e-4 + token_s, 1e-7))


@pytest.mark.parametrize(
    ("stages", "new", "cached", "last"),
    [(2, 100, 0, (100, 0)), (4, 100, 50, (100, 50)), (2, 2500, 0, (452, 2048)), (2, 2048, 7, (2048, 7))],
)
def test_the_rest_of_a_prompt_is_its_last_step_in_later_stages(stages, new, cached, last) -> None:
    assert rest_s(COST, stages, new, cached, 2048) == pytest.approx(COST.prefill_s([last]) * (stages - 1) / stages)
    assert rest_s(COST, 1, new, cached, 2048) == 0.0


def test_layouts_count_their_devices_and_say_their_names() -> None:
    pair = Layout(Pool(Cell(1, 2), 3), Pool(Cell(2, 1), 1))
    assert (pair.devices, pair.family, pair.name) == (8, "apart", "3 prefill tp2, 1 decode tp1 pp2")
    near = Layout(Pool(Cell(1, 2), 1), Pool(Cell(1, 1), 1), near=True, times=3)
    assert (near.devices, near.family, near.name) == (9, "segments", "3 x (1 prefill tp2, 1 decode tp1)")
    mixed, cluster = Layout(mixed=Pool(Cell(1, 4), 2)), Cluster(32)
    assert (mixed.devices, mixed.family, mixed.name) == (8, "mixed", "2 mixed tp4")
    assert Layout(prefill=Pool(Cell(1, 1), 20)).family == "prefill"
    large = Layout(Pool(Cell(1, 8), 1), Pool(Cell(1, 1), 1))
    asked = (pair, near, large, Layout(decode=Pool(Cell(1, 1), 20)))
    assert [cluster.lane(each) for each in asked] == ["nvlink", "nvlink", "rdma-400g", "nvlink"]
    assert (Cluster(9).nodes, Cluster(8).nodes) == (2, 1)


# Bounds: by hand.

FIXED = CostModel("f", ((0.0, 1e-3, 0.0, 0.0),), ((0.010, 0.001, 0.0),), LANES)
TEN = Load(tuple((100 * n, 0, 11) for n in range(1, 11)), 10)
NONE = Slo()


def test_the_prefill_bound_drops_the_dearest() -> None:
    assert prefill_bound(FIXED, 1, TEN, NONE, 1.0, 2048).rate == pytest.approx(10 / 5.5)
    assert prefill_bound(FIXED, 1, TEN, NONE, 0.9, 2048).rate == pytest.approx(10 / 4.5)
    assert prefill_bound(FIXED, 2, TEN, NONE, 0.9, 2048).rate == pytest.approx(20 / 4.5)


@pytest.mark.parametrize(("ttft", "late"), [(0.95, 0), (0.85, 20), (0.05, 100)])
def test_prompts_that_are_late_even_alone_rule_a_cell_out(ttft, late) -> None:
    found = prefill_bound(FIXED, 1, TEN, Slo(ttft_s=ttft), 0.9, 2048)
    assert (found.rate == 0) == bool(late)
    assert found.why == (f"{late} % of prompts take longer than {ttft:g} s even alone" if late else "")


def test_the_decode_bound_is_full_batches() -> None:
    # Ten steps each, 10 ms shared by the batch and 1 ms of one's own.
    assert decode_bound(FIXED, 1, TEN, NONE, 1.0, 5, 10**6).rate == pytest.approx(1 / (10 * (0.002 + 0.001)))
    assert decode_bound(FIXED, 2, TEN, NONE, 1.0, 5, 10**6).rate == pytest.approx(2 / (10 * (0.002 + 0.001)))
    # The gap's goal allows four rows, memory three of 555 tokens.
    assert decode_bound(FIXED, 1, TEN, Slo(gap_s=0.0145), 1.0, 5, 10**6).rate == pytest.approx(1 / (10 * 0.0035))
    assert decode_bound(FIXED, 1, TEN, NONE, 1.0, 5, 1700).rate == pytest.approx(1 / (10 * (0.01 / 3 + 0.001)))
    assert "longer than the gap's goal" in decode_bound(FIXED, 1, TEN, Slo(gap_s=0.0105), 1.0, 5, 10**6).why
    assert "does not fit into 500" in decode_bound(FIXED, 1, TEN, NONE, 1.0, 5, 500).why


def test_both_phases_cost_what_each_costs() -> None:
    found = mixed_bound(FIXED, 1, TEN, NONE, 1.0, 2048, 5, 10**6)
    assert found.rate == pytest.approx(10 / (5.5 + 10 * 0.03))
    assert not mixed_bound(FIXED, 1, TEN, Slo(ttft_s=0.05), 0.9, 2048, 5, 10**6).rate


@settings(QUICK, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 500), st.integers(1, 400)), min_size=1, max_size=30),
    st.floats(0.5, 1.0),
)
def test_more_of_anything_is_never_less(rows: list[tuple[int, int, int]], share: float) -> None:
    load = Load(tuple(rows), len(rows))
    slo = Slo(100.0, 1.0)

    def rates(of: Load, stages: int = 1, kept: float = share) -> list[float]:
        return [
            prefill_bound(COST, stages, of, slo, kept, 2048).rate,
            decode_bound(COST, stages, of, slo, kept, 64, 10**5).rate,
            mixed_bound(COST, stages, of, slo, kept, 2048, 64, 10**5).rate,
        ]

    once = rates(load)
    assert all(low <= high for low, high in zip(once, rates(load, 2), strict=True))
    assert all(low <= high * (1 + 1e-9) for low, high in zip(rates(load, 1, 1.0), once, strict=True))
    longer = rates(load.scaled(1.5, 1.0))
    assert longer[0] <= once[0] * (1 + 1e-9)
    assert once[2] <= once[0] * (1 + 1e-9)
