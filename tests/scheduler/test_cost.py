"""The cost model says what its lines say, never less for more work, and is the same value everywhere."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.cost import QUANTILES, CostModel, Lane, prefill_features

COEFFICIENT = st.one_of(st.just(0.0), st.floats(1e-9, 1e-1))
LINES = {
    size: st.lists(st.tuples(*[COEFFICIENT] * size), min_size=1, max_size=3).map(tuple) for size in (3, 4)
}  # of decode, of prefill
MODELS = st.builds(
    CostModel,
    st.just("any"),
    LINES[4],
    LINES[3],
    st.just((Lane("cma", 1e-3, 1e-5, 1e-9),)),
    st.just((("decode", (0.0, 0.1, 0.2, 0.3, 0.4)),)),
)
ROWS = st.lists(st.tuples(st.integers(1, 20_000), st.integers(0, 20_000)), min_size=1, max_size=5)
BATCH = st.integers(1, 512)
CONTEXT = st.integers(0, 2_000_000)

PLAIN = CostModel(
    "plain", ((1.0, 0.1, 0.01, 0.5),), ((2.0, 0.2, 0.02), (0.5, 0.3, 0.02)), (Lane("cma", 1.0, 0.1, 0.01),)
)


def test_a_line_is_what_its_features_say() -> None:
    # Two rows: 4 new after 10 (48 pairs and a half of 4 * 4), 2 new after none (a half of 2 * 2).
    assert prefill_features([(4, 10), (2, 0)]) == (1.0, 6.0, 50.0, 2.0)
    assert PLAIN.prefill_s([(4, 10), (2, 0)]) == pytest.approx(1.0 + 0.6 + 0.5 + 1.0)
    assert PLAIN.decode_s(4, 100) == pytest.approx(2.0 + 0.8 + 2.0)
    assert PLAIN.decode_s(40, 100) == pytest.approx(0.5 + 12.0 + 2.0)  # the other line is on top
    assert PLAIN.transfer_s(1000, 5, "cma") == pytest.approx(1.0 + 0.5 + 10.0)


def test_no_work_takes_no_time() -> None:
    assert PLAIN.prefill_s([]) == PLAIN.decode_s(0, 0) == PLAIN.step_s([], 0, 0) == 0.0
    assert PLAIN.transfer_s(0, 0, "cma") == PLAIN.decode_span_s(4, 10, 0) == PLAIN.decode_span_s(0, 0, 5) == 0.0


def test_a_mixed_step_pays_once_what_both_phases_share() -> None:
    both = PLAIN.step_s([(4, 10)], 4, 100)
    assert both == pytest.approx(PLAIN.prefill_s([(4, 10)]) + PLAIN.decode_s(4, 100) - 1.0)


# DistServe's published coefficients for OPT-13B on one A100 (its simulator's profile, rounded; research: section 3.2).
# The form in milliseconds is exactly ours; a batch of 95 is where its two decode fits meet.
def distserve(
    prefill: tuple[float, float, float], small: tuple[float, float, float], large: tuple[float, float, float]
):
    a, b, c = prefill
    return {
        is_large: CostModel("ms", ((a, b, 2 * c, 0.0),), ((fit[0], fit[2], fit[1]),))
        for is_large, fit in ((False, small), (True, large))
    }


OPT_13B = (18.10, 0.10191, 7.12e-6), (19.935, 6.269e-4, 0.03851), (7.166, 5.798e-4, 0.15831)


def test_distserves_published_numbers_come_out_exactly() -> None:
    models = distserve(*OPT_13B)
    (a, b, c), small, large = OPT_13B
    for lengths in ([512], [1], [2048], [17, 300, 1024]):
        published_ms = a + b * sum(lengths) + c * sum(n * n for n in lengths)
        assert models[False].prefill_s([(n, 0) for n in lengths]) == published_ms
    assert models[False].prefill_s([(512, 0)]) == pytest.approx(18.1 + 52.2 + 1.9, abs=0.06)
    for batch in (1, 32, 94, 95, 256):
        a, b, c = large if batch >= 95 else small
        assert models[batch >= 95].decode_s(batch, batch * 512) == a + c * batch + b * (batch * 512)
    assert models[False].decode_s(32, 32 * 512) == pytest.approx(19.93 + 10.27 + 1.23, abs=0.01)


@settings(max_examples=60)
@given(MODELS, ROWS, BATCH, CONTEXT, st.integers(0, 5000), st.integers(0, 5000))
def test_more_work_never_takes_less(model, rows, batch, context, more, other) -> None:
    new, cached = rows[0]
    base = model.prefill_s(rows)
    assert 0 <= base <= model.prefill_s([(new + more, cached + other), *rows[1:]])
    assert base <= model.prefill_s([*rows, (1 + more, other)])
    decode = model.decode_s(batch, context)
    assert 0 <= decode <= model.decode_s(batch + more, context + other)
    mixed = model.step_s(rows, batch, context)
    slack = 1e-12 * mixed
    assert mixed >= max(base, decode) - slack
    assert mixed <= model.step_s([*rows, (1 + more, other)], batch + more, context + other) + slack
    assert model.transfer_s(more, 1, "cma") <= model.transfer_s(more + other, 2, "cma")


@settings(max_examples=80)
@given(MODELS, BATCH, CONTEXT, st.integers(0, 300))
def test_a_span_is_the_sum_of_its_steps(model, batch, context, steps) -> None:
    one_by_one = math.fsum(model.decode_s(batch, context + i * batch) for i in range(steps))
    assert model.decode_span_s(batch, context, steps) == pytest.approx(one_by_one, rel=1e-11)


@settings(max_examples=40)
@given(MODELS, BATCH, CONTEXT, st.integers(0, 10**6))
def test_a_span_never_shrinks_with_its_steps_to_the_last_bit(model, batch, context, start) -> None:
    spans = [model.decode_span_s(batch, context, steps) for steps in range(start, start + 20)]
    assert spans == sorted(spans)


def test_a_span_crosses_from_one_line_to_the_next() -> None:
    model = replace(PLAIN, decode=((10.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.5)))
    # Context 1, 3, 5 ...: level at 10, then one second a token.
    assert [model.decode_s(2, 1 + 2 * i) for i in range(7)] == [10, 10, 10, 10, 10, 11, 13]
    assert [model.decode_span_s(2, 1, n) for n in range(8)] == [0, 10, 20, 30, 40, 50, 61, 74]


@settings(max_examples=40)
@given(MODELS, BATCH, CONTEXT, st.floats(0, 100), st.integers(0, 2000))
def test_the_steps_within_a_time_are_the_most_that_fit(model, batch, context, seconds, limit) -> None:
    steps = model.decode_steps_within(batch, context, seconds, limit)
    assert 0 <= steps <= limit
    assert steps == 0 or model.decode_span_s(batch, context, steps) <= seconds
    assert steps == limit or model.decode_span_s(batch, context, steps + 1) > seconds


def test_margins_lie_between_the_known_quantiles() -> None:
    model = replace(PLAIN, margins=(("decode", (0.0, 0.1, 0.2, 0.3, 0.5)),))
    assert [model.margin("decode", q) for q in QUANTILES] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.5])
    assert model.margin("decode", 0.85) == pytest.approx(0.15)
    assert model.margin("decode", 0.0) == 0.0
    assert model.margin("decode", 1.0) == 0.5
    assert model.margin("prefill", 0.9) == 0.0


@settings(max_examples=60)
@given(MODELS)
def test_json_keeps_every_bit(model) -> None:
    again = CostModel.of(json.loads(json.dumps(model.document())))
    assert again == model
    assert json.dumps(again.document()) == json.dumps(model.document())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format: got 2, wanted 1"),
        ({"decode": [[1.0, 0.1]]}, "decode: got 2 numbers, wanted 3"),
        ({"decode": []}, "no line"),
        ({"prefill": [[1.0, -0.1, 0.0, 0.0]]}, "prefill: got -0.1"),
        ({"prefill": [[math.nan, 0.1, 0.0, 0.0]]}, "got nan"),
        ({"prefill": [[math.inf, 0.1, 0.0, 0.0]]}, "got inf"),
        ({"lanes": {"tcp": [0.0, 0.0, "x"]}}, "lane tcp: got 'x'"),
        ({"margins": {"decode": [0.5, 0.4, 0.5, 0.6, 0.7]}}, "wanted them ascending"),
    ],
)
def test_a_document_that_is_wrong_is_refused_by_field(change, said) -> None:
    with pytest.raises(ValueError, match=said):
        CostModel.of({**PLAIN.document(), **change})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="no decode, lanes"):
        CostModel.of({"format": 1, "name": "x", "prefill": [], "margins": {}})
    with pytest.raises(ValueError, match=r"got 'rdma', wanted one of \['cma'\]"):
        PLAIN.transfer_s(1, 1, "rdma")
