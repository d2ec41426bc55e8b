"""Judging requests as their clients saw them, with a bounded number of labels."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter

from core.request import Phase, Slo
from gateway.goodput import OTHERS, TENANTS, Goodput, Seen, good

GOALS = Slo(0.5, 0.1)


def seen(ttft_s: float | None = 0.4, *gaps: tuple[float, int], slo: Slo = GOALS) -> Seen:
    made = Seen(ttft_s)
    for seconds, count in gaps:
        made.gap(seconds, count, slo)
    return made


@pytest.mark.parametrize(
    ("slo", "saw", "total_s", "phase", "want"),
    [
        (GOALS, seen(0.4, (0.05, 99), (9.0, 1)), 9.0, Phase.DONE, True),
        (GOALS, seen(0.4, (0.05, 98), (0.2, 2)), 9.0, Phase.DONE, False),
        (GOALS, seen(0.6), 1.0, Phase.DONE, False),
        (GOALS, seen(0.4), 1.0, Phase.FAILED, False),
        (GOALS, seen(None), 1.0, Phase.REJECTED, False),
        (Slo(), seen(99.0, (99.0, 9), slo=Slo()), 999.0, Phase.DONE, True),
        (Slo(deadline_s=5.0), seen(0.1, slo=Slo(deadline_s=5.0)), 4.9, Phase.DONE, True),
        (Slo(deadline_s=5.0), seen(0.1, slo=Slo(deadline_s=5.0)), 5.1, Phase.DONE, False),
        (Slo(batch=True), seen(99.0, (9.0, 9), slo=Slo(batch=True)), 999.0, Phase.DONE, True),
        (Slo(batch=True), seen(None), 9.0, Phase.REJECTED, False),
    ],
)
def test_a_request_is_good_if_all_that_was_promised_was_kept(slo, saw, total_s, phase, want):
    assert good(saw, slo, total_s, phase) is want


def test_tenants_beyond_the_most_are_one_label_and_who_left_is_not_counted():
    registry = CollectorRegistry()
    counter = Counter("judged", "", ("class", "tenant", "good"), registry=registry)
    counts = Goodput(lambda *labels: counter.labels(*labels).inc())
    for number in range(3 * TENANTS):
        counts.ended(seen(), GOALS, f"t{number}", 1.0, Phase.DONE)
        counts.ended(seen(), GOALS, f"t{number}", 1.0, Phase.CANCELLED)
    samples = [each for each in next(iter(registry.collect())).samples if each.name == "judged_total"]
    assert len(samples) == TENANTS + 1
    assert sum(each.value for each in samples) == 3 * TENANTS
    (others,) = [each for each in samples if each.labels["tenant"] == OTHERS]
    assert (others.labels["class"], others.labels["good"], others.value) == ("latency", "yes", 2 * TENANTS)
