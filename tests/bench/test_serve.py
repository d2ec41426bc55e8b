"""What benchmarks of serving count: who was good, quantiles, rates that were sustained."""

from __future__ import annotations

import pytest

from bench.live import Asked, Load, quantile, requests
from bench.serve import PACE, SLO, Pool, Simulated, workload
from core.request import Slo


def asked(prompt=100, first=1.0, code="OK", gaps=()):
    one = Asked(prompt, 10, 0.5, code)
    one.got(first, 1)
    for gap in gaps:
        one.got(one.last + gap, 1)
    return one


@pytest.mark.parametrize(
    ("one", "good"),
    [
        (asked(), True),
        (asked(first=1.6), False),
        (asked(code="UNAVAILABLE"), False),
        (Asked(5, 5, 0.0, "OK"), False),
        (asked(gaps=[0.1] * 99 + [0.3]), True),
        (asked(gaps=[0.1] * 98 + [0.3, 0.3]), False),
    ],
    ids=["in time", "late", "failed", "without a token", "one gap in a hundred", "two gaps in a hundred"],
)
def test_good_is_served_in_time_with_99_gaps_of_100_in_time(one, good):
    assert one.good(Slo(1.0, 0.2)) is good


def test_tokens_that_come_together_have_no_gap_between_them():
    one = Asked(5, 9, 0.0)
    one.got(1.0, 1)
    one.got(1.5, 3)
    assert (one.tokens, one.gaps, one.ttft_s) == (4, [0.5, 0.0, 0.0], 1.0)


@pytest.mark.parametrize(("share", "want"), [(0.0, 1), (0.5, 5), (0.9, 9), (0.91, 10), (1.0, 10)])
def test_quantiles_are_of_the_nearest_rank(share, want):
    assert quantile(list(range(10, 0, -1)), share) == want
    assert quantile([], share) == 0.0


def test_a_pool_tells_short_from_long_and_counts_everybody_who_asked():
    loads = [Load([asked(512, 1.0), asked(513, 2.0)], 2.0, 0.0, {}), Load([asked(1, 1.2, "ABORTED")], 1.0, 0.0, {})]
    pool = Pool(loads)
    assert pool.ttft_s(1.0, short=True) == pytest.approx(0.7)
    assert pool.ttft_s(1.0, short=False) == pytest.approx(1.5)
    assert pool.good(Slo(0.6, 1.0)) == pytest.approx(1 / 3)
    assert pool.tokens_per_s == pytest.approx(1.0)


def test_clients_send_what_the_workload_says():
    load = workload(10.0, 2.0, seed=3)
    assert len(load) == 20
    sent = requests(load, 3)
    assert [len(each.token_ids.ids) for each in sent] == [each.prompt for each in load.arrivals]
    assert [each.max_tokens for each in sent] == [each.output for each in load.arrivals]
    assert len({tuple(each.token_ids.ids[:8]) for each in sent if len(each.token_ids.ids) >= 8}) > 1


def test_the_simulated_deployment_is_as_slow_as_the_paced_one():
    (end, *_) = Simulated().ran("fcfs", [workload(1.0, 2.0, seed=1)])
    assert SLO.ttft_s == pytest.approx(0.4 * PACE)
    assert end.ttft_s is not None
    assert end.ttft_s > 0.005 * PACE
