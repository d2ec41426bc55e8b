"""Sampling parameters are validated where they are built."""

from __future__ import annotations

import math

import pytest

from core.errors import RequestError
from core.sampling import MAX_BIASED, MAX_N, MAX_SEED, Sampling


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.01),
        ("presence_penalty", -2.01),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("frequency_penalty", -2.01),
        ("frequency_penalty", math.nan),
        ("logit_bias", ((3, 100.1),)),
        ("logit_bias", ((3, -math.inf),)),
        ("logit_bias", ((2, 1.0), (3, math.nan))),
        ("logit_bias", ((3, 1.0), (3, 2.0))),
        ("logit_bias", tuple((token, 1.0) for token in range(MAX_BIASED + 1))),
        ("min_tokens", -1),
        ("min_tokens", 2),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("n", 0),
        ("n", MAX_N + 1),
    ],
)
def test_a_bad_value_is_the_callers_error_and_names_the_field(field, value):
    with pytest.raises(RequestError, match=f"^{field}: got ") as error:
        Sampling(**{"max_tokens": 1, field: value})
    assert error.value.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "values",
    [
        {"top_p": 1.0},
        {"top_p": 1e-9},
        {"seed": MAX_SEED},
        {"temperature": 5.0},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e308},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"logit_bias": tuple((token, (-1.0) ** token * 100) for token in range(MAX_BIASED))},
        {"min_tokens": 1},
        {"logprobs": 0, "prompt_logprobs": 20},
        {"n": MAX_N},
    ],
)
def test_the_bounds_themselves_are_allowed(values):
    Sampling(max_tokens=1, **values)


def test_a_bad_bias_names_its_token():
    with pytest.raises(RequestError, match=r"^logit_bias: got 101.0 for token 7, want in \[-100, 100\]$"):
        Sampling(1, logit_bias=((3, 1.0), (7, 101.0)))


def test_logits_are_changed_only_if_asked_for():
    assert not Sampling(9, temperature=1.0, top_k=3, min_p=0.5, logprobs=3, prompt_logprobs=3).bends
    assert not Sampling(9, min_tokens=3).bends, "without a stop token there is nothing to bar"
    assert not Sampling(9, stop_token_ids=(1,)).bends
    for options in (
        {"repetition_penalty": 0.9},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": ((1, 0.5),)},
        {"min_tokens": 1, "stop_token_ids": (1,)},
    ):
        assert Sampling(9, **options).bends


def test_only_temperature_zero_is_greedy():
    assert Sampling(1).greedy
    assert not Sampling(1, temperature=0.1).greedy
