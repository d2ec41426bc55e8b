"""Forecasts of output lengths: conditional quantiles of a window, groups, and the whole of it as JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.forecast import Forecast, ForecastConfig


def of(*lengths: int, group: str = "", **settings) -> Forecast:
    forecast = Forecast(ForecastConfig(**{"least": 1, "least_longer": 1, "quantile": 0.5, **settings}))
    for length in lengths:
        forecast.learn(length, group)
    return forecast


@pytest.mark.parametrize(
    ("generated", "most", "want"),
    [
        (1, 100, 20),  # of 10, 20, 30, 40
        (9, 100, 20),
        (10, 100, 30),  # longer than 10: 20, 30, 40
        (25, 100, 30),
        (39, 100, 40),
        (40, 100, 50),  # none was longer: a quarter more
        (79, 100, 99),
        (96, 100, 100),
        (1, 15, 15),
    ],
)
def test_a_length_is_a_quantile_of_those_that_were_longer(generated, most, want):
    assert of(40, 10, 30, 20).length(generated, most) == want


def test_a_higher_quantile_is_more_cautious():
    lengths = range(1, 101)
    assert [of(*lengths, quantile=q).length(1, 1000) for q in (0.1, 0.5, 0.9, 1.0)] == [11, 51, 91, 100]


def test_too_little_history_says_the_most_that_is_allowed():
    forecast = of(5, 6, 7, least=4)
    assert forecast.length(1, 500) == 500
    forecast.learn(8)
    assert forecast.length(1, 500) == 6


def test_only_the_last_lengths_count():
    forecast = of(900, 900, 900, 5, 6, 7, window=3)
    assert forecast.length(1, 1000) == 6
    assert forecast.length(7, 1000) == 9


def test_a_group_has_its_own_history_once_it_is_long_enough():
    forecast = of(10, 10, 10, least=3)
    for _ in range(2):
        forecast.learn(80, "essays")
    assert forecast.length(1, 100, "essays") == 10
    forecast.learn(80, "essays")
    assert forecast.length(1, 100, "essays") == 80
    assert forecast.length(1, 100, "other") == 10


def test_the_group_that_ended_nothing_for_longest_is_forgotten():
    forecast = of(1, 1, 1, groups=2)
    for group, length in (("a", 30), ("b", 40), ("a", 30), ("c", 50)):
        forecast.learn(length, group)
    known = {group: forecast.length(2, 1000, group) for group in "abc"}
    assert (known["a"], known["c"]) == (30, 50)
    assert forecast.document()["groups"].keys() == {"a", "c"}


@pytest.mark.parametrize("bad", [{"window": 0}, {"quantile": 0.0}, {"quantile": 1.1}, {"beyond": 1.0}, {"least": 0}])
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="forecast"):
        ForecastConfig(**bad)


def test_another_format_is_refused():
    with pytest.raises(ValueError, match="format"):
        Forecast.of({**of(1).document(), "format": 2})


@given(
    st.lists(st.tuples(st.integers(1, 300), st.sampled_from(["", "a", "b"])), max_size=60),
    st.integers(1, 20),
    st.floats(0.05, 1.0),
)
def test_it_is_the_quantile_of_a_plain_list_and_survives_json(learnt, window, quantile):
    forecast = of(window=window, quantile=quantile, least=3, least_longer=2)
    for length, group in learnt:
        forecast.learn(length, group)
    again = Forecast.of(json.loads(json.dumps(forecast.document())))
    for each in (forecast, again):
        each.learn(17, "a")
    lengths = [*(length for length, _ in learnt), 17][-window:]
    for generated in range(1, 310, 7):
        longer = sorted(length for length in lengths if length > generated)
        if len(lengths) < 3:
            want = 400
        elif len(longer) < 2:
            want = min(400, max(generated + 1, math.ceil(generated * 1.25)))
        else:
            want = longer[math.ceil(quantile * len(longer)) - 1]
        assert forecast.length(generated, 400) == want
        for group in ("", "a", "b"):
            assert again.length(generated, 400, group) == forecast.length(generated, 400, group)
            assert generated < forecast.length(generated, 400, group) <= 400
    assert again.document() == forecast.document()
