"""Beside DistServe's simulator: set up like it (tests/sim/peer.py), ours has the same figures for the same requests.

Their figures were made once by running theirs; they are read, not made, here. Equal means: no more than one request of
500 on the other side of a goal, medians within a thousandth. That is closer than what was asked for (2 points off the
knee, 0.1 requests/s and device at it), and holds at the knee as well.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from core.kv import KvShape
from core.worker import Role
from scheduler.cost import CostModel
from scheduler.decode_policy import DecodeConfig
from scheduler.policies import Policy
from scheduler.prefill_policy import PrefillConfig
from sim import traces
from sim.fleet import Build
from sim.outcome import Outcome
from sim.run import Settings, simulate
from sim.workload import Arrival
from tests.sim import peer
from tests.sim.peer import Answer, Placement

APART, TOGETHER = Placement("distserve", 2, 1, 1, 1), Placement("vllm", 2, 1)
STAGES_APART, STAGES_TOGETHER = Placement("distserve", 1, 2, 1, 1), Placement("vllm", 1, 2)
A_REQUEST = 0.2
"""Percent of 500."""


@pytest.fixture
def folder() -> Path:
    """Of the public traces; where there are none the test is skipped."""
    found = traces.folder()
    if not (found / peer.ANSWERS).is_file():
        pytest.skip("needs the public traces (BATON_TRACES)")
    return found


def theirs(folder: Path, placement: Placement, rate: float) -> Answer:
    return next(each for each in peer.answers(folder)[placement] if each.rate == rate)


def same(ours: Answer, other: Answer) -> None:
    for share in ("ttft", "tpot", "both"):
        assert abs(getattr(ours, share) - getattr(other, share)) <= A_REQUEST + 1e-9, (share, ours, other)
    assert ours.ttft_ms == pytest.approx(other.ttft_ms, rel=1e-3)
    assert ours.tpot_ms == pytest.approx(other.tpot_ms, rel=1e-3)


# Arithmetic (DistServe's published coefficients for OPT-13B on one A100).


def test_a_prompt_of_512_tokens_takes_18_1_and_52_2_and_1_9_ms(folder):
    """Through the cost model, and as the first token of a simulated request."""
    coefficients = json.loads((folder / "distserve_profiler-a100-80g.distserve.json").read_text(encoding="utf-8"))
    a, b, c = coefficients["facebook/opt-13b"]["1"]["prefill"]
    parts = [a, b * 512, c * 512**2]
    assert [round(part, 1) for part in parts] == [18.1, 52.2, 1.9]
    assert round(sum(parts), 1) == 72.1  # 72.149; the sum of the rounded parts is 72.2
    cost = plain(folder)
    assert 1e3 * cost.prefill_s([(512, 0)]) == pytest.approx(sum(parts), rel=1e-12)
    (only,) = alone(cost, [Arrival(0.0, 512, 1)])
    assert only.ttft_s == pytest.approx(sum(parts) / 1e3, rel=1e-12)


def test_32_rows_of_512_tokens_take_31_4_ms(folder):
    """19.93 + 10.27 + 1.23: through the cost model, and as a step of 32 requests that decode together."""
    coefficients = json.loads((folder / "distserve_profiler-a100-80g.distserve.json").read_text(encoding="utf-8"))
    a, b, c = coefficients["facebook/opt-13b"]["1"]["decoding_smallbs"]
    parts = [a, b * 32 * 512, c * 32]
    assert [round(part, 2) for part in parts] == [19.93, 10.27, 1.23]
    assert round(sum(parts), 1) == 31.4
    cost = plain(folder)
    assert 1e3 * cost.decode_s(32, 32 * 512) == pytest.approx(sum(parts), rel=1e-12)
    # One prompt begins before the others are there, so its row has had a step alone; then all have 512 tokens.
    cost = CostModel("no prefill", ((0.0, 0.0, 0.0, 0.0),), cost.decode, cost.lanes)
    found = alone(cost, [Arrival(0.0, 510, 3), *[Arrival(0.0, 511, 2) for _ in range(31)]])
    (first,) = [each for each in found if each.prompt == 510]
    assert 2e3 * first.gap_mean_s == pytest.approx(1e3 * cost.decode_s(1, 511) + sum(parts), rel=1e-12)
    others = {round(1e3 * each.gap_mean_s, 9) for each in found if each is not first}
    assert others == {round(2e3 * first.gap_mean_s, 9)}


def plain(folder: Path) -> CostModel:
    """Our own cost model with the published numbers, and only those of small batches."""
    pieces = peer.published(folder, "distserve", 1, overhead=False)
    return CostModel("opt-13b", pieces.prefill, pieces.decode[:1], pieces.lanes)


def alone(cost: CostModel, arrivals: list[Arrival]) -> list[Outcome]:
    shape = KvShape(1, 1, 2, 16, "bfloat16")
    builds = [Build("p", Role.PREFILL, cost, shape, 10**6), Build("d", Role.DECODE, cost, shape, 10**6)]
    policy = Policy(
        "fcfs",
        "",
        prefill_config=PrefillConfig(chunk_tokens=10**6, max_rows=64),
        decode_config=DecodeConfig(max_rows=64),
    )
    found: list[Outcome] = []
    simulate(arrivals, builds, policy, Settings(hop_s=0.0, lane="none"), over=found.append)
    return found


# Their answers.


@pytest.mark.parametrize(
    ("placement", "rate"),
    [(APART, 1.0), (STAGES_APART, 1.0), (STAGES_TOGETHER, 1.75)],
    ids=lambda each: getattr(each, "name", each),
)
def test_one_rate_of_a_placement(folder, placement, rate):
    """At or beyond the knee, where everything that they do has a say."""
    ours, _ = peer.run(folder, placement, rate)
    assert ours.turns or placement == STAGES_TOGETHER
    same(ours, theirs(folder, placement, rate))


@pytest.mark.parametrize(("placement", "rate"), [(APART, 0.75), (TOGETHER, 1.0)], ids=lambda e: getattr(e, "name", e))
def test_our_own_policies_come_to_the_same_where_nobody_takes_turns(folder, placement, rate):
    ours, outcomes = peer.run(folder, placement, rate, real=True)
    same(ours, theirs(folder, placement, rate))
    assert sum(each.tokens for each in outcomes) == sum(output + 1 for _, _, output in peer.requests(folder))


def test_taking_turns_is_what_makes_the_difference_beyond(folder):
    """Their limit of 50,000 tokens a step costs them much of what their placement could do."""
    ours, _ = peer.run(folder, APART, 1.0, real=True)
    other = theirs(folder, APART, 1.0)
    assert ours.ttft == pytest.approx(other.ttft, abs=A_REQUEST + 1e-9)
    assert ours.tpot == 100.0 > other.tpot + 40


def test_knees_are_read_between_rates():
    rates = [Answer(rate, 0, 0, both, 0, 0) for rate, both in ((1.0, 80.0), (0.5, 100.0), (1.5, 40.0))]
    assert peer.knee(rates) == pytest.approx(0.75)
    assert peer.knee(rates, 60.0) == pytest.approx(1.25)
    assert peer.knee(rates[::2]) == 0.0


def placements() -> list[Placement]:
    """Of the shared table, known without it so that tests have names without it."""
    apart = [(2, 1, 1, 1), (1, 1, 1, 1), (1, 2, 1, 1), (4, 1, 2, 1), (2, 1, 2, 1)]
    together = [(1, 1), (2, 1), (4, 1), (1, 2)]
    return [Placement("distserve", *each) for each in apart] + [Placement("vllm", *each) for each in together]


def test_no_placement_of_the_table_is_left_out(folder):
    assert set(peer.answers(folder)) == set(placements())


@pytest.mark.slow
@pytest.mark.parametrize("placement", placements(), ids=lambda each: each.name)
def test_every_rate_of_every_placement(folder, placement):
    other = peer.answers(folder)[placement]
    ours = []
    for each in other:
        answer, outcomes = peer.run(folder, placement, each.rate)
        same(answer, each)
        ours.append(answer)
        if placement.pp_p == 1 and not answer.turns:
            _, real = peer.run(folder, placement, each.rate, real=True)
            for one, two in zip(outcomes, real, strict=True):
                assert one.ttft_s == pytest.approx(two.ttft_s, abs=1e-9)
                assert one.gap_mean_s == pytest.approx(two.gap_mean_s, abs=1e-9)
    assert peer.knee(ours) == pytest.approx(peer.knee(other), abs=0.02)
    assert all(low.both >= high.both for low, high in itertools.pairwise(sorted(ours, key=lambda each: each.rate)))
