"""Sampling parameters are validated where they are built."""

from __future__ import annotations

import math

import pytest

from core.errors import RequestError
from core.sampling import MAX_SEED, Sampling


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
    ],
)
def test_a_bad_value_is_the_callers_error_and_names_the_field(field, value):
    with pytest.raises(RequestError, match=f"^{field}: got ") as error:
        Sampling(**{"max_tokens": 1, field: value})
    assert error.value.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize("values", [{"top_p": 1.0}, {"top_p": 1e-9}, {"seed": MAX_SEED}, {"temperature": 5.0}])
def test_the_bounds_themselves_are_allowed(values):
    Sampling(max_tokens=1, **values)


def test_only_temperature_zero_is_greedy():
    assert Sampling(1).greedy
    assert not Sampling(1, temperature=0.1).greedy
