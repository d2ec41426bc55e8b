"""Deadlines as goals for the first token and the gaps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.request import Kind, Slo
from core.worker import Role
from scheduler.budgets import BudgetConfig, Budgets, gap_left, split
from scheduler.router import Router, RouterConfig
from scheduler.router_events import Arrived, WorkerUp
from tests.cast import D1, GATEWAY, P1, ask, worker

CONFIG = BudgetConfig(first=0.25, first_least=0.05, margin=0.9, least_gap_s=0.02)


@pytest.mark.parametrize(
    ("deadline_s", "tokens", "ttft_s", "gap_s"),
    [
        (10.0, 1, 2.5, 0.0),  # one token has no gaps
        (10.0, 66, 2.5, 0.1),  # (9 - 2.5) / 65
        (10.0, 326, 2.5, 0.02),  # as long as leaves a quarter for the first
        (10.0, 401, 1.0, 0.02),  # longer: the first token has less
        (10.0, 2000, 0.5, 0.02),  # too long: as well as the floors allow
    ],
)
def test_a_deadline_is_split(deadline_s, tokens, ttft_s, gap_s):
    assert split(deadline_s, tokens, CONFIG) == pytest.approx((ttft_s, gap_s))


@given(st.floats(0.1, 1000.0), st.integers(1, 5000))
def test_whoever_keeps_both_goals_keeps_the_deadline_unless_it_is_too_short_for_the_floors(deadline_s, tokens):
    ttft_s, gap_s = split(deadline_s, tokens, CONFIG)
    least_s = CONFIG.first_least * deadline_s + (tokens - 1) * CONFIG.least_gap_s
    assert 0 < ttft_s <= CONFIG.first * deadline_s
    assert ttft_s + (tokens - 1) * gap_s <= max(CONFIG.margin * deadline_s, least_s) * (1 + 1e-9)


def test_gaps_are_planned_anew_from_what_is_left():
    assert gap_left(2.0, 40, CONFIG) == 0.05
    assert gap_left(2.0, 80, CONFIG) == 0.025
    assert gap_left(-1.0, 10, CONFIG) == 0.02, "who is late anyhow does not stop all others"
    assert gap_left(1.0, 0, CONFIG) == 1.0


def test_what_is_learned_of_lengths_leaves_more_for_each_token():
    budgets, request = Budgets(CONFIG), replace(ask(6, 1000), slo=Slo(deadline_s=10.0))
    before = budgets.slo(request)
    assert (before.ttft_s, before.gap_s) == (0.5, 0.02), "it may become as long as is allowed"
    for _ in range(50):
        budgets.learn(66)
    after = budgets.slo(request)
    assert (after.ttft_s, after.gap_s) == pytest.approx((2.5, 0.1))
    assert budgets.slo(replace(request, slo=Slo(0.3, 0.05, 10.0))) == Slo(0.3, 0.05, 10.0), "given goals are tighter"


def test_a_router_gives_goals_to_who_has_a_deadline_and_the_rest_of_it_to_later_attempts():
    machine = Router(GATEWAY, RouterConfig())
    for member in (worker(P1, Role.PREFILL), worker(D1, Role.DECODE)):
        machine.on(WorkerUp(member), 0.0)
    (sent,) = machine.on(Arrived(1, replace(ask(6, 66), slo=Slo(deadline_s=10.0))), 5.0)
    assert sent.message.wait_s == pytest.approx(2.5)
    assert not sent.message.batch
    flight = machine._calls[1].flights[0]
    rest = flight.rest(7.0).slo
    assert (rest.ttft_s, rest.deadline_s) == pytest.approx((2.5, 8.0))


def test_classes_follow_from_what_is_promised():
    assert Slo().kind is Slo(0.1, 0.1).kind is Kind.LATENCY
    assert Slo(deadline_s=1.0).kind is Slo(0.1, 0.1, 1.0).kind is Kind.DEADLINE
    assert Slo(batch=True).kind is Kind.BATCH
