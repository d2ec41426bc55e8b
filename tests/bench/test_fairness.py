"""A small version of the benchmark of tenants and classes: what it promises holds for one seed of each shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import fairness
from core.request import Slo
from scheduler.policies import BATON

SPAN_S = 12.0
TOKENS = {"azure-conv": 190_000.0, "sharegpt": 160_000.0}
"""Prompt tokens a second that these workers do, about."""


@pytest.mark.parametrize("shape", [pytest.param("azure-conv", marks=pytest.mark.slow), "sharegpt"])
def test_a_flood_moves_anothers_attainment_by_at_most_two_points(shape):
    alone, beside, flooder = fairness.flood(shape, 1, TOKENS[shape], span_s=SPAN_S)
    assert beside >= alone - 0.02
    assert flooder < 0.9, "it was no flood"


def test_nor_does_it_where_decode_workers_have_few_rows():
    few = replace(BATON, decode_config=replace(BATON.decode_config, max_rows=48))
    alone, beside, flooder = fairness.flood("sharegpt", 1, 100_000.0, few, 20.0)
    assert beside >= alone - 0.02
    assert flooder < 0.8, "it was no flood"


@pytest.mark.parametrize("shape", [pytest.param("azure-conv", marks=pytest.mark.slow), "sharegpt"])
def test_the_batch_class_costs_others_at_most_two_points(shape):
    alone, beside, filled = fairness.fill(shape, 1, TOKENS[shape], span_s=SPAN_S)
    assert beside >= alone - 0.02
    assert filled > 0.4, "nothing was filled"  # answers take a good part of so short a time


def test_a_backlog_is_of_the_batch_class_and_begins_alike_in_groups():
    work = fairness.backlog("sharegpt", 64, 1)
    assert all(one.slo == Slo(batch=True) and one.tenant == "batch" for one in work.arrivals)
    firsts = [one.blocks[0] for one in work.arrivals if one.blocks]
    assert len(set(firsts)) < len(firsts)
