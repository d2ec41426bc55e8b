"""A fit is the non-negative optimum; a refit follows its machine, and nothing that is not its machine."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.cost import CostModel, Lane
from scheduler.cost_fit import (
    Sample,
    decode_sample,
    fit,
    fit_lines,
    margins_of,
    nnls,
    predicted,
    prefill_sample,
    transfer_sample,
)
from scheduler.cost_refit import Refit, RefitSettings

ROOT = Path(__file__).resolve().parents[2]
TRUTH = CostModel(
    "truth",
    ((6e-3, 2e-5, 2e-9, 1e-4), (2e-3, 4e-5, 2e-9, 2e-4)),
    ((5e-3, 1e-5, 3e-8), (4e-3, 3e-5, 3e-8)),
    (Lane("cma", 1e-3, 1e-5, 2e-10),),
)


def scaled(model: CostModel, factor: float) -> CostModel:
    def all_of(lines):
        return tuple(tuple(value * factor for value in line) for line in lines)

    lanes = tuple(Lane(x.name, x.setup_s * factor, x.run_s * factor, x.byte_s * factor) for x in model.lanes)
    return CostModel(model.name, all_of(model.prefill), all_of(model.decode), lanes, model.margins)


def feed(refit: Refit, truth: CostModel, count: int, rng: random.Random, noise: float = 0.03) -> None:
    """`count` steps of each phase, and reads, as `truth` would take them."""
    for _ in range(count):
        rows = [(int(2 ** rng.uniform(4, 12)), rng.choice((0, 0, 500)))] * rng.choice((1, 1, 2, 4))
        refit.step(rows, 0, 0, truth.prefill_s(rows) * rng.gauss(1, noise))
        batch = rng.randint(1, 128)
        context = int(batch * 2 ** rng.uniform(6, 12))
        refit.step((), batch, context, truth.decode_s(batch, context) * rng.gauss(1, noise))
        nbytes, runs = int(2 ** rng.uniform(16, 26)), rng.randint(1, 20)
        refit.transfer(nbytes, runs, "cma", truth.transfer_s(nbytes, runs, "cma") * rng.gauss(1, noise))


def distance(model: CostModel, truth: CostModel) -> float:
    """The largest relative difference where requests are."""
    pairs = []
    for new, cached in itertools.product((16, 64, 256, 1024, 4096), (0, 500)):
        pairs.append((model.prefill_s([(new, cached)]), truth.prefill_s([(new, cached)])))
    for batch, length in itertools.product((1, 8, 32, 128), (64, 512, 4096)):
        pairs.append((model.decode_s(batch, batch * length), truth.decode_s(batch, batch * length)))
    for nbytes, runs in itertools.product((2**16, 2**22, 2**26), (1, 20)):
        pairs.append((model.transfer_s(nbytes, runs, "cma"), truth.transfer_s(nbytes, runs, "cma")))
    return max(abs(got / wanted - 1) for got, wanted in pairs)


# --------------------------------------------------------------------------------------- non-negative least squares


def best_by_trying(gram: list[list[int]], moment: list[int]) -> Fraction:
    """The least of x'Gx / 2 - m'x over every set of columns, in exact arithmetic."""
    size, best = len(moment), Fraction(0)
    for mask in range(1, 1 << size):
        used = [j for j in range(size) if mask >> j & 1]
        rows = [[Fraction(gram[i][j]) for j in used] + [Fraction(moment[i])] for i in used]
        for at in range(len(used)):
            pivot = next((r for r in range(at, len(used)) if rows[r][at]), None)
            if pivot is None:
                break
            rows[at], rows[pivot] = rows[pivot], rows[at]
            rows[at] = [value / rows[at][at] for value in rows[at]]
            for r in range(len(used)):
                if r != at and rows[r][at]:
                    rows[r] = [a - rows[r][at] * b for a, b in zip(rows[r], rows[at], strict=True)]
        else:
            x = [row[-1] for row in rows]
            if min(x) >= 0:
                best = min(best, -sum((v * moment[j] for v, j in zip(x, used, strict=True)), Fraction(0)) / 2)
    return best


@st.composite
def problems(draw) -> tuple[list[list[int]], list[int]]:
    size = draw(st.integers(1, 5))
    row = st.lists(st.integers(-3, 9), min_size=size + 1, max_size=size + 1)
    data = draw(st.lists(row, min_size=1, max_size=8))
    gram = [[sum(r[i] * r[j] for r in data) for j in range(size)] for i in range(size)]
    return gram, [sum(r[i] * r[-1] for r in data) for i in range(size)]


@settings(max_examples=300)
@given(problems())
def test_nnls_is_as_good_as_trying_every_set_of_columns(problem) -> None:
    gram, moment = problem
    x = nnls(gram, moment)
    assert min(x) >= 0
    size = range(len(x))
    value = sum(gram[i][j] * x[i] * x[j] for i in size for j in size) / 2 - sum(moment[j] * x[j] for j in size)
    best = float(best_by_trying(gram, moment))
    assert value == pytest.approx(best, rel=1e-7, abs=1e-7)


def test_a_column_that_is_another_one_does_no_harm() -> None:
    assert nnls([[4.0, 4.0], [4.0, 4.0]], [8.0, 8.0]) == [2.0, 0.0]
    assert nnls([[0.0, 0.0], [0.0, 1.0]], [0.0, 3.0]) == [0.0, 3.0]
    assert nnls([[1.0]], [-3.0]) == [0.0]


# ------------------------------------------------------------------------------------------------------------- a fit


def profile(truth: CostModel) -> tuple[list[Sample], list[Sample]]:
    rows = [[(n, h)] * k for n in (16, 64, 128, 256, 512, 1024, 4096) for h in (0, 1024) for k in (1, 2, 4)]
    steps = [(b, b * n) for b in (1, 2, 4, 8, 16, 32, 64, 96, 128, 256) for n in (64, 512, 4096)]
    return [prefill_sample(r, truth.prefill_s(r)) for r in rows], [decode_sample(*s, truth.decode_s(*s)) for s in steps]


def test_a_fit_finds_what_made_its_samples() -> None:
    prefill, decode = profile(TRUTH)
    reads = [transfer_sample(n, r, TRUTH.transfer_s(n, r, "cma")) for n in (10**4, 10**6, 10**8) for r in (1, 5, 50)]
    model = fit("again", prefill, decode, {"cma": reads})
    assert distance(model, TRUTH) < 0.02
    assert dict(model.margins).keys() == {"prefill", "decode", "transfer"}
    assert model.margin("prefill", 0.9) < 0.01


def test_one_line_is_the_least_squares_of_the_relative_error() -> None:
    samples = [Sample((1.0, float(x)), seconds) for x, seconds in ((1, 3.0), (2, 4.5), (4, 9.5), (8, 17.0))]
    line = fit_lines(samples, 1)[0]

    def loss(a: float, b: float) -> float:
        return sum((predicted(((a, b),), s.features) / s.seconds - 1) ** 2 for s in samples)

    for a, b in itertools.product((-1e-3, 0, 1e-3), repeat=2):
        assert loss(*line) <= loss(line[0] + a, line[1] + b)


def test_two_lines_are_never_worse_than_one() -> None:
    _, decode = profile(TRUTH)

    def loss(lines) -> float:
        return sum((predicted(lines, s.features) / s.seconds - 1) ** 2 for s in decode)

    losses = [loss(fit_lines(decode, count)) for count in (1, 2, 3)]
    assert losses[0] > losses[1] >= losses[2] - 1e-12


def test_a_prior_fills_in_what_was_not_measured() -> None:
    far = prefill_sample([(8192, 0)], 2 * TRUTH.prefill_s([(8192, 0)]))
    model = fit("half", [far] * 50, prior=TRUTH)
    assert model.decode == TRUTH.decode
    assert model.prefill_s([(8192, 0)]) > 1.5 * TRUTH.prefill_s([(8192, 0)])
    assert model.prefill_s([(16, 0)]) == pytest.approx(TRUTH.prefill_s([(16, 0)]), rel=0.35)
    with pytest.raises(ValueError, match="wanted both phases or a prior"):
        fit("half", [far])
    with pytest.raises(ValueError, match="got 0 seconds"):
        fit("none", [prefill_sample([(1, 0)], 0)], prior=TRUTH)


def test_margins_cover_their_share() -> None:
    errors = [i / 100 - 0.5 for i in range(1, 101)]
    assert margins_of(errors) == pytest.approx((0.0, 0.3, 0.4, 0.45, 0.49))


# ------------------------------------------------------------------------------------------------------ live samples


def test_a_refit_finds_a_machine_that_the_prior_had_wrong() -> None:
    prior = CostModel(
        "prior",
        ((8e-3, 1e-5, 4e-9, 0.0), (1e-3, 6e-5, 4e-9, 0.0)),
        ((7e-3, 2e-5, 6e-8), (1e-3, 5e-5, 6e-8)),
        (Lane("cma", 2e-3, 0.0, 1e-10),),
    )
    refit = Refit(prior)
    before = distance(refit.model(), TRUTH)
    feed(refit, TRUTH, 600, random.Random(1))
    assert before > 0.4
    assert distance(refit.model(), TRUTH) < 0.06
    assert refit.seen == 1800
    # What it thinks of its own errors is what they are: noise of 3 %, nine in ten below 1.28 of it.
    assert 0.02 < refit.model().margin("decode", 0.9) < 0.08


@pytest.mark.parametrize("factor", [0.5, 1.4, 2.0])
def test_a_machine_that_gets_slower_or_faster_is_followed(factor) -> None:
    refit, rng, changed = Refit(TRUTH), random.Random(2), scaled(TRUTH, factor)
    feed(refit, TRUTH, 300, rng)
    assert distance(refit.model(), TRUTH) < 0.05
    feed(refit, changed, 100, rng)
    assert distance(refit.model(), changed) < 0.10
    feed(refit, changed, 900, rng)
    assert distance(refit.model(), changed) < 0.05
    assert refit.outliers == 0


def test_a_machine_that_changes_in_one_respect_is_followed() -> None:
    # Attention slows down, the rest does not: no level tells that, only forgetting does.
    slower = CostModel(
        "slow attention",
        tuple((a, b, 4 * c, d) for a, b, c, d in TRUTH.prefill),
        tuple((a, b, 2 * c) for a, b, c in TRUTH.decode),
        TRUTH.lanes,
    )
    refit, rng = Refit(TRUTH), random.Random(9)
    feed(refit, TRUTH, 1000, rng)
    assert distance(refit.model(), slower) > 0.3
    feed(refit, slower, 1000, rng)
    assert distance(refit.model(), slower) < 0.08


@pytest.mark.parametrize("factor", [0.1, 8.0])
def test_a_jump_beyond_the_outlier_bound_is_believed_after_some_patience(factor) -> None:
    refit, rng, changed = Refit(TRUTH), random.Random(3), scaled(TRUTH, factor)
    feed(refit, TRUTH, 300, rng)
    before = refit.model()
    feed(refit, changed, RefitSettings().patience - 1, rng)
    assert refit.model().decode == before.decode
    feed(refit, changed, 1, rng)
    assert distance(refit.model(), changed) < 0.10
    feed(refit, changed, 100, rng)
    assert distance(refit.model(), changed) < 0.05
    assert refit.model().margin("decode", 0.99) < 0.15  # the errors of the old machine are forgotten


def test_outliers_move_nothing_and_count_as_errors() -> None:
    calm, stormy, rng = Refit(TRUTH), Refit(TRUTH), random.Random(4)
    for i in range(800):
        batch, context = rng.randint(1, 64), rng.randint(64, 100_000)
        seconds = 1.1 * TRUTH.decode_s(batch, context) * rng.gauss(1, 0.03)
        calm.step((), batch, context, seconds)
        stormy.step((), batch, context, seconds)
        if i % 10 == 0:
            stormy.step((), batch, context, seconds * rng.choice((50, 1e6, 0.01)))
    assert stormy.model().decode == calm.model().decode
    assert stormy.outliers == 80
    assert calm.outliers == 0
    assert stormy.model().margin("decode", 0.99) > 10 > 0.2 > stormy.model().margin("decode", 0.8)


BUSY = CostModel("a busy host", ((6e-5, 2e-6, 2e-8, 0.0),), ((1e-3, 1e-5, 1e-8),))
"""Steps of a fraction of a millisecond, which others on its processors delay by dozens."""


def short_steps(refit: Refit, count: int, rng: random.Random, delays_s: Sequence[float]) -> None:
    for _ in range(count):
        rows = [(rng.randint(20, 64), 0)]
        refit.step(rows, 0, 0, BUSY.prefill_s(rows) * rng.gauss(1, 0.03) + rng.choice(delays_s))


@pytest.mark.parametrize("delays_s", [(0.010, 0.013, 0.030), (0.013,)])
def test_delayed_short_steps_say_nothing_of_long_ones(delays_s) -> None:
    refit, rng = Refit(BUSY), random.Random(8)
    long = [(3000, 0)]
    short_steps(refit, 40, rng, (0.0,))
    short_steps(refit, 100, rng, delays_s)
    model = refit.model()
    assert 0.008 < model.prefill_s([(40, 0)]) < 0.035
    assert model.prefill_s(long) * (1 + model.margin("prefill", 0.9)) < 3 * BUSY.prefill_s(long)
    short_steps(refit, 40, rng, (0.0,))
    assert refit.model().prefill_s([(40, 0)]) == pytest.approx(BUSY.prefill_s([(40, 0)]), rel=0.2)
    assert refit.model().prefill_s(long) == pytest.approx(BUSY.prefill_s(long), rel=0.2)


def test_what_seemed_a_delay_is_a_slow_machine_when_long_steps_say_so() -> None:
    refit, rng, slow = Refit(BUSY), random.Random(9), scaled(BUSY, 30.0)
    for tokens in (40, 3000, 40):
        for _ in range(40):
            rows = [(rng.randint(tokens // 2, tokens), 0)]
            refit.step(rows, 0, 0, slow.prefill_s(rows) * rng.gauss(1, 0.03))
    for tokens in (40, 3000):
        assert refit.model().prefill_s([(tokens, 0)]) == pytest.approx(slow.prefill_s([(tokens, 0)]), rel=0.3)


def test_margins_are_shares_of_the_time() -> None:
    """Half of the steps are delayed a hundred times over, and are a hundredth of what is predicted."""
    refit, rng = Refit(BUSY), random.Random(10)
    for _ in range(100):
        short_steps(refit, 1, rng, (0.02,))
        refit.step([(3000, 0)], 0, 0, BUSY.prefill_s([(3000, 0)]) * rng.gauss(1, 0.03))
    model = refit.model()
    assert model.prefill_s([(3000, 0)]) == pytest.approx(BUSY.prefill_s([(3000, 0)]), rel=0.1)
    assert model.margin("prefill", 0.9) < 0.1


def test_outliers_on_both_sides_in_turn_are_no_change() -> None:
    refit = Refit(TRUTH)
    usual = TRUTH.decode_s(8, 4000)
    for seconds in (50 * usual, usual / 50) * 20:
        refit.step((), 8, 4000, seconds)
    assert refit.model().decode == TRUTH.decode
    assert refit.outliers == 40


def test_always_the_same_step_does_not_make_the_rest_absurd() -> None:
    refit, rng = Refit(TRUTH), random.Random(5)
    for _ in range(4000):
        refit.step((), 16, 16 * 500, 1.5 * TRUTH.decode_s(16, 16 * 500) * rng.gauss(1, 0.1))
    model = refit.model()
    for batch, length in itertools.product((1, 16, 256), (64, 500, 4096)):
        ratio = model.decode_s(batch, batch * length) / TRUTH.decode_s(batch, batch * length)
        assert 1.2 < ratio < 1.8
    assert model.prefill == TRUTH.prefill


def test_prefill_is_learned_from_mixed_steps_too() -> None:
    truth = CostModel("slow prefill", scaled(TRUTH, 1.6).prefill, TRUTH.decode)
    refit, rng = Refit(TRUTH), random.Random(6)
    for _ in range(500):
        new, batch = rng.choice((256, 512, 1024)), rng.randint(1, 32)
        rows, context = [(new, rng.choice((0, 1024)))], batch * 300
        refit.step(rows, batch, context, truth.step_s(rows, batch, context))
    for new in (256, 512, 1024):
        assert refit.model().prefill_s([(new, 0)]) == pytest.approx(truth.prefill_s([(new, 0)]), rel=0.08)
    assert refit.model().decode == TRUTH.decode
    refit.step([(1, 0)], 512, 10**7, TRUTH.decode_s(512, 10**7))  # nothing of it is left for prefill
    assert refit.seen == 500


SECONDS = st.one_of(st.floats(1e-6, 1e3), st.sampled_from([0.0, -1.0, math.inf, math.nan, 1e-300, 1e300]))
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), st.integers(1, 10**5), st.integers(0, 10**5), SECONDS),
        st.tuples(st.just("decode"), st.integers(1, 1000), st.integers(0, 10**7), SECONDS),
        st.tuples(st.just("cma"), st.integers(0, 10**10), st.integers(1, 1000), SECONDS),
        st.tuples(st.just("unknown lane"), st.integers(0, 10**10), st.integers(1, 1000), SECONDS),
    ),
    max_size=60,
)


def give(refit: Refit, events) -> None:
    for kind, a, b, seconds in events:
        if kind == "prefill":
            refit.step([(a, b)], 0, 0, seconds)
        elif kind == "decode":
            refit.step((), a, b, seconds)
        else:
            refit.transfer(a, b, kind, seconds)


@settings(max_examples=40)
@given(EVENTS, EVENTS)
def test_anything_may_be_observed_and_json_goes_on_bit_for_bit(first, then) -> None:
    refit = Refit(TRUTH, RefitSettings(window=20, trusted=4, patience=3, block=3))
    give(refit, first)
    refit.model()  # refuses what is negative, infinite or not a number
    again = Refit.of(json.loads(json.dumps(refit.document())))
    give(refit, then)
    give(again, then)
    assert again.model() == refit.model()
    assert json.dumps(again.document()) == json.dumps(refit.document())


def test_a_state_put_away_in_the_midst_of_a_block_goes_on_bit_for_bit() -> None:
    refit = Refit(TRUTH)
    feed(refit, TRUTH, 320, random.Random(12))
    feed(refit, scaled(TRUTH, 1.6), 20, random.Random(10))
    again = Refit.of(json.loads(json.dumps(refit.document())))
    for one in (refit, again):
        feed(one, scaled(TRUTH, 1.6), 40, random.Random(11))
    assert json.dumps(again.document()) == json.dumps(refit.document())


def test_memory_is_bounded() -> None:
    refit, rng = Refit(TRUTH, RefitSettings(window=32)), random.Random(7)
    feed(refit, TRUTH, 64, rng)
    size = len(json.dumps(refit.document()))
    feed(refit, TRUTH, 640, rng)  # both end with a whole block
    assert len(json.dumps(refit.document())) < 1.05 * size


@pytest.mark.parametrize(
    "field", [{"forget": 0.0}, {"forget": 1.5}, {"outlier": 1.0}, {"patience": 0}, {"window": 0}, {"prior_weight": 0}]
)
def test_settings_that_make_no_sense_are_refused(field) -> None:
    with pytest.raises(ValueError, match=f"refit: {next(iter(field))}: got"):
        RefitSettings(**field)


OTHER = """
import json, random
from scheduler.cost_fit import fit
from scheduler.cost_refit import Refit
from tests.scheduler.test_cost_fit import TRUTH, feed, profile
refit = Refit(fit("again", *profile(TRUTH), prior=TRUTH))
feed(refit, TRUTH, 40, random.Random(8))
print(json.dumps(refit.document()))
"""


def test_another_process_gets_the_same_bits() -> None:
    refit = Refit(fit("again", *profile(TRUTH), prior=TRUTH))
    feed(refit, TRUTH, 40, random.Random(8))
    done = subprocess.run(
        [sys.executable, "-c", OTHER],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == json.dumps(refit.document())
