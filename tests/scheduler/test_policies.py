"""Policies by name, and what of them is the engine's business and not theirs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.errors import SetupError
from core.pages import Pages
from scheduler.cost import CostModel
from scheduler.decode_migrating import MigratingPolicy
from scheduler.dual_queue import DualQueue
from scheduler.dualmap import DualMap
from scheduler.past_future import PastFuture, WorstCase
from scheduler.policies import POLICIES, live, policy
from tests.cast import D1, GATEWAY, P1, SHAPE

COST = CostModel("made", ((0.01, 1e-4, 0.0, 0.0),), ((0.01, 0.001, 1e-5),))
SIZES = {"chunk_tokens": 100, "max_rows": 7, "max_steps": 3}


def test_the_size_of_steps_is_the_engines_and_all_else_the_policys():
    for each in POLICIES.values():
        found = each.sized(**SIZES, suspends=True)
        assert (found.prefill_config.chunk_tokens, found.prefill_config.max_rows) == (100, 7)
        assert (found.decode_config.max_rows, found.decode_config.max_steps) == (7, 3)
        restored = replace(
            found,
            prefill_config=each.prefill_config,
            decode_config=each.decode_config,
            mixed_config=each.mixed_config,
        )
        assert restored == each
        assert found.prefill_config.preempt == each.prefill_config.preempt
        assert not each.sized(**SIZES, suspends=False).prefill_config.preempt
        assert found.prefill_config == replace(each.prefill_config, chunk_tokens=100, max_rows=7)
        assert found.decode_config == replace(each.decode_config, max_rows=7, max_steps=3, host_pages=0)
        assert found.mixed_config == replace(each.mixed_config, budget_tokens=100, max_rows=7, max_steps=3)
    wide = policy("colocated-chunked").sized(chunk_tokens=5, max_rows=7, max_steps=3, suspends=True)
    assert wide.mixed_config.budget_tokens == 7, "a token for each row at least"


def test_ours_is_two_queues_forecast_memory_capped_gaps_and_two_candidates():
    ours = live("baton").sized(**SIZES, suspends=False)
    prefill = ours.prefill(P1, SHAPE, Pages(20), COST)
    assert isinstance(prefill._order, DualQueue)
    decode = ours.decode(D1, SHAPE, Pages(20), COST)
    assert isinstance(decode.admission, PastFuture)
    assert decode._cost is COST
    router = ours.router(GATEWAY, None)
    assert isinstance(router._placement, DualMap)
    assert not router._config.mixed_alone
    assert router._config.by_goal


def test_a_baseline_has_none_of_it():
    theirs = live("fcfs")
    assert isinstance(theirs.decode(D1, SHAPE, Pages(20), COST).admission, WorstCase)
    assert theirs.decode(D1, SHAPE, Pages(20), COST)._cost is None
    assert not theirs.router(GATEWAY, None)._config.by_goal
    assert isinstance(live("baton-migrating").decode(D1, SHAPE, Pages(20), COST), MigratingPolicy)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_runs_live_where_the_workers_are_for_it(name):
    assert live(name) is policy(name)
    if policy(name).colocated:
        with pytest.raises(SetupError, match=f"policy: {name} has every worker compute both phases in one step: got 3"):
            live(name, 3)
    else:
        assert live(name, 3) is policy(name)
