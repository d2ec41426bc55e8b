"""When pages are pulled and when they are computed: by hand, by Mooncake's published figures, and whatever may come."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LocalError
from core.kv import KvShape
from scheduler.cost import CostModel, Lane
from scheduler.fetching import FetchConfig, Fetching, Holder
from tests.cast import D1, D2, P1, P2, QUICK, SHAPE

PAGE_S = 0.4
"""A page of four tokens is computed in this time, and pulled in a tenth of it; a pull takes a second more."""
COST = CostModel(
    "test",
    ((0.0, PAGE_S / 4, 0.0, 0.0),),
    ((0.1, 0.0, 0.0),),
    (Lane("fast", 1.0, 0.0, PAGE_S / 10 / SHAPE.page_nbytes), Lane("slow", 1.0, 0.0, PAGE_S * 2 / SHAPE.page_nbytes)),
)
PLAIN = FetchConfig(gain=1.0, digest_byte_s=0.0)
RULE = Fetching(SHAPE, COST, PLAIN)


@pytest.mark.parametrize(
    ("prompt", "cached", "room", "wait_s", "holders", "worker", "pages"),
    [
        (41, 0, 99, 0.0, [], None, 0),
        (41, 0, 99, 0.0, [Holder(D1, 10, "fast")], D1, 10),
        (41, 0, 99, 0.0, [Holder(D1, 99, "fast")], D1, 10),
        (40, 0, 99, 0.0, [Holder(D1, 10, "fast")], D1, 9),  # the last page is computed anyhow
        (41, 10, 99, 0.0, [Holder(D1, 10, "fast")], None, 0),  # all of it is here
        (41, 9, 99, 0.0, [Holder(D1, 8, "fast")], None, 0),
        (41, 8, 99, 0.0, [Holder(D1, 10, "fast")], None, 0),  # 0.8 s of computing against 1.08 s
        (41, 7, 99, 0.0, [Holder(D1, 10, "fast")], D1, 10),  # 1.2 s against 1.12 s
        (41, 8, 99, 0.5, [Holder(D1, 10, "fast")], D1, 10),  # it waits for half a second in any case
        (41, 0, 2, 0.0, [Holder(D1, 10, "fast")], None, 0),  # no room for more than two pages
        (41, 0, 3, 0.0, [Holder(D1, 10, "fast")], D1, 3),
        (41, 7, 0, 9.0, [Holder(D1, 10, "fast")], None, 0),
        (41, 0, 99, 0.0, [Holder(D1, 10, "slow")], None, 0),
        (41, 0, 99, 0.0, [Holder(D1, 10, "fast", busy_s=2.5)], D1, 10),
        (41, 0, 99, 0.0, [Holder(D1, 10, "fast", busy_s=2.7)], None, 0),
        (41, 0, 99, 0.0, [Holder(D1, 9, "fast"), Holder(D2, 10, "fast")], D2, 10),
        (41, 0, 99, 0.0, [Holder(D1, 10, "fast", 0.5), Holder(D2, 9, "fast")], D2, 9),
        (41, 0, 99, 0.0, [Holder(P2, 10, "fast"), Holder(P1, 10, "fast")], P1, 10),  # of equals the first by name
        (1, 0, 99, 0.0, [Holder(D1, 10, "fast")], None, 0),
    ],
)
def test_pages_are_pulled_where_that_is_sooner(prompt, cached, room, wait_s, holders, worker, pages):
    plan = RULE.plan(prompt, cached, room, wait_s, holders)
    assert (worker, pages) == (None, 0) if plan is None else (plan.worker, plan.pages) == (worker, pages)
    assert RULE.plan(prompt, cached, room, wait_s, holders[::-1]) == plan


def test_a_plan_says_what_it_costs_and_until_when_it_is_of_use():
    plan = RULE.plan(41, 2, 99, 0.5, [Holder(D1, 10, "fast", 0.25)])
    assert plan is not None
    assert (plan.worker, plan.pages) == (D1, 10)
    assert (plan.pull_s, plan.saved_s, plan.within_s) == pytest.approx((1.25 + 8 * PAGE_S / 10, 8 * PAGE_S, 3.7))


@pytest.mark.parametrize(
    ("config", "margin", "run_s"),
    [
        (FetchConfig(gain=2.0, digest_byte_s=0.0), 0.0, 0.0),
        (FetchConfig(gain=1.0, digest_byte_s=1.0 / SHAPE.page_nbytes), 0.0, 0.0),
        (PLAIN, 1.0, 0.0),
        (replace(PLAIN, run_pages=1), 0.0, 0.2),
    ],
)
def test_each_doubt_speaks_for_computing(config, margin, run_s):
    """Five pages: 2 s of computing against 1.2 s."""
    holders = [Holder(D1, 5, "fast")]
    lanes = (replace(COST.lanes[0], run_s=run_s),)
    cost = replace(COST, lanes=lanes, margins=(("transfer", (margin,) * 5),))
    assert RULE.plan(41, 0, 99, 0.0, holders) is not None
    assert Fetching(SHAPE, cost, config).plan(41, 0, 99, 0.0, holders) is None


@pytest.mark.parametrize(("flops", "gbytes_per_s"), [(8 * 312e12, 6), (8 * 989e12, 19)], ids=["A800", "H800"])
def test_mooncakes_bandwidth_for_reuse_to_pay_comes_out(flops, gbytes_per_s):
    """Llama 3 70B, 8,192 tokens: 6 GB/s for eight A800 and 19 for eight H800, as its operations are counted there:
    layers * (4 n^2 d + 22 n d^2)."""
    layers, d, tokens = 80, 8192, 8192
    shape = KvShape(layers, 8, 128, 16, "bfloat16")
    line = (0.0, layers * 22 * d * d / flops, layers * 2 * 4 * d / flops, 0.0)

    def pays(rate: float) -> bool:
        cost = CostModel("70b", (line,), ((0.1, 0.0, 0.0),), (Lane("wire", 0.0, 0.0, 1 / rate),))
        return Fetching(shape, cost, PLAIN).plan(tokens + 1, 0, 999, 0.0, [Holder(D1, 512, "wire")]) is not None

    assert not pays((gbytes_per_s - 0.5) * 1e9)
    assert pays((gbytes_per_s + 0.5) * 1e9)


holders = st.lists(
    st.builds(
        Holder,
        st.sampled_from([D1, D2, P1, P2]),
        st.integers(0, 30),
        st.sampled_from(["fast", "slow"]),
        st.sampled_from([0.0, 0.5, 9.0]),
    ),
    max_size=4,
    unique_by=lambda holder: holder.worker,
)


@QUICK
@given(st.integers(1, 99), st.integers(0, 20), st.integers(0, 30), st.floats(0, 5), holders)
def test_a_plan_keeps_its_bounds_and_is_the_best(prompt, cached, room, wait_s, holders):
    cached = min(cached, prompt // SHAPE.page_tokens)
    rule = Fetching(SHAPE, COST)
    plan = rule.plan(prompt, cached, room, wait_s, holders)
    alone = [found for holder in holders if (found := rule.plan(prompt, cached, room, wait_s, [holder])) is not None]
    if plan is None:
        assert not alone
        return
    assert cached < plan.pages <= cached + room
    assert plan.pages * SHAPE.page_tokens < prompt
    assert plan.pages <= next(holder.pages for holder in holders if holder.worker == plan.worker)
    assert plan.pull_s < plan.within_s == wait_s + plan.saved_s
    gains = [found.saved_s - max(0.0, found.pull_s - wait_s) for found in alone]
    assert plan in alone
    assert plan.saved_s - max(0.0, plan.pull_s - wait_s) == max(gains)
    assert rule.plan(prompt, cached, room, wait_s + 1.0, holders) is not None, "who waits longer has more time"


@pytest.mark.parametrize("wrong", [{"gain": 0.9}, {"run_pages": 0}, {"digest_byte_s": -1.0}, {"quantile": 1.1}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(LocalError, match="fetch: got"):
        FetchConfig(**wrong)
