"""Page shapes and runs."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LocalError
from core.kv import KvShape, PageRun, page_runs, pages_of
from tests.cast import QUICK


def test_sizes_follow_from_the_shape():
    shape = KvShape(layers=3, kv_heads=2, head_dim=8, page_tokens=16, dtype="bfloat16")
    assert shape.row_nbytes == 16
    assert shape.rows == 3 * 2 * 2 * 16
    assert shape.page_nbytes == 3 * 2 * 2 * 16 * 16
    assert shape.token_nbytes * 16 == shape.page_nbytes


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_a_started_page_counts_whole(tokens, pages):
    assert KvShape(1, 1, 1, 16, "float32").pages_for(tokens) == pages


@pytest.mark.parametrize("field", ["layers", "kv_heads", "head_dim", "page_tokens"])
def test_a_shape_without_extent_is_refused_by_name(field):
    sizes = {"layers": 1, "kv_heads": 1, "head_dim": 1, "page_tokens": 1, field: 0}
    with pytest.raises(LocalError, match=f"kv {field}: got 0"):
        KvShape(**sizes, dtype="float32")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(LocalError, match="kv dtype: got 'int8'"):
        KvShape(1, 1, 1, 1, "int8")


def test_neighbours_are_joined_in_the_given_order_only():
    assert page_runs([4, 5, 6, 2, 3, 9, 8]) == (PageRun(4, 3), PageRun(2, 2), PageRun(9, 1), PageRun(8, 1))
    assert page_runs([]) == ()


@QUICK
@given(st.lists(st.integers(0, 30)))
def test_runs_hold_exactly_their_pages(pages):
    runs = page_runs(pages)
    assert pages_of(runs) == tuple(pages)
    assert all(one.stop != two.start for one, two in pairwise(runs))
