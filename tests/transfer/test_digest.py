"""Digests against the formula written out slowly, and the properties the hand-over rests on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import LocalError
from core.kv import KvShape
from kernels import native
from transfer.digest import MASK, digests, lane_key, mix64, page_digest, token_key


@st.composite
def shapes(draw: st.DrawFn) -> KvShape:
    return KvShape(
        layers=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.integers(1, 11)),
        page_tokens=draw(st.integers(1, 6)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )


SEEDS = st.integers(0, 2**32 - 1)
SHAPE = KvShape(layers=2, kv_heads=4, head_dim=8, page_tokens=4, dtype="float32")


def fill(shape: KvShape, pages: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, pages * shape.page_nbytes, dtype=np.uint8)


def by_coordinates(shape: KvShape, page: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return page.reshape(shape.layers, 2, shape.kv_heads, shape.page_tokens, shape.row_nbytes)


def slow(shape: KvShape, page: NDArray[np.uint8], first_token: int, tokens: int, first_head: int = 0) -> int:
    """The docstring's formula, row by row."""
    rows = by_coordinates(shape, page)
    total = 0
    for layer in range(shape.layers):
        for kv in (0, 1):
            for head in range(shape.kv_heads):
                for token in range(tokens):
                    row = rows[layer, kv, head, token].tobytes()
                    words = sum(int.from_bytes(row[i : i + 8], "little") for i in range(0, len(row), 8))
                    total += mix64(words + lane_key(layer, kv, first_head + head) + token_key(first_token + token))
    return total & MASK


@given(shapes(), SEEDS, st.integers(0, 10**6), st.data())
@settings(max_examples=60, deadline=None)
def test_equals_the_formula(shape, seed, first_token, data):
    tokens = data.draw(st.integers(0, shape.page_tokens))
    page = fill(shape, 1, seed)
    assert page_digest(page, shape, first_token, tokens) == slow(shape, page, first_token, tokens)
    assert page_digest(memoryview(page.tobytes()), shape, first_token, tokens, first_head=5) == slow(
        shape, page, first_token, tokens, first_head=5
    )


@given(shapes(), SEEDS, st.integers(0, 100), st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_runs_equal_page_by_page(shape, seed, first_page, count, data):
    arena = fill(shape, 6, seed)
    pages = data.draw(st.permutations(range(6)))[:count]
    tokens = data.draw(st.integers(0, count * shape.page_tokens))
    want = [
        page_digest(
            arena[page * shape.page_nbytes :][: shape.page_nbytes],
            shape,
            (first_page + i) * shape.page_tokens,
            min(max(tokens - i * shape.page_tokens, 0), shape.page_tokens),
        )
        for i, page in enumerate(pages)
    ]
    assert digests(memoryview(arena.data), pages, shape, first_page, tokens) == want
    assert digests(memoryview(arena.data), pages, shape, first_page, tokens, sums=native.page_sums()) == want


@given(SEEDS, st.integers(0, 50), st.integers(0, 16))
@settings(max_examples=30, deadline=None)
def test_adds_up_over_heads_layers_and_page_sizes(seed, first_page, tokens):
    """Any tensor parallelism, pipeline split or page size gives the same sum."""
    shape = KvShape(layers=4, kv_heads=4, head_dim=8, page_tokens=16, dtype="bfloat16")
    page = fill(shape, 1, seed)
    rows = by_coordinates(shape, page)
    first = first_page * 16
    whole = page_digest(page, shape, first, tokens)
    half = KvShape(4, 2, 8, 16, "bfloat16")
    heads = [page_digest(rows[:, :, h : h + 2].copy(), half, first, tokens, first_head=h) for h in (0, 2)]
    assert sum(heads) & MASK == whole
    stage = KvShape(1, 4, 8, 16, "bfloat16")
    layers = [page_digest(rows[n : n + 1].copy(), stage, first, tokens, first_layer=n) for n in range(4)]
    assert sum(layers) & MASK == whole
    small = KvShape(4, 4, 8, 4, "bfloat16")
    quarters = np.concatenate([rows[:, :, :, t : t + 4].reshape(-1) for t in range(0, 16, 4)])
    assert sum(digests(quarters, range(4), small, first_page * 4, tokens)) & MASK == whole


@given(SEEDS, st.integers(0, SHAPE.page_nbytes - 1), st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_any_changed_byte_changes_it(seed, at, flip):
    page = fill(SHAPE, 1, seed)
    before = page_digest(page, SHAPE, 64, 4)
    page[at] ^= flip
    assert page_digest(page, SHAPE, 64, 4) != before


def test_bytes_behind_the_last_token_do_not_count():
    page = fill(SHAPE, 1, 1)
    before = page_digest(page, SHAPE, 0, 3)
    by_coordinates(SHAPE, page)[:, :, :, 3] ^= 0xFF
    assert page_digest(page, SHAPE, 0, 3) == before
    by_coordinates(SHAPE, page)[0, 0, 0, 2, 0] ^= 1
    assert page_digest(page, SHAPE, 0, 3) != before


@pytest.mark.parametrize("axis", range(4), ids=["layers", "K and V", "heads", "tokens"])
def test_swapped_rows_change_it(axis):
    page = fill(SHAPE, 1, 7)
    before = page_digest(page, SHAPE, 0, 4)
    rows = by_coordinates(SHAPE, page)
    page[:] = np.flip(rows, axis).reshape(-1)
    assert page_digest(page, SHAPE, 0, 4) != before


def test_swapped_and_stale_pages_change_it():
    arena = fill(SHAPE, 2, 3)
    one, two = digests(arena, [0, 1], SHAPE, 0, 8)
    other_one, other_two = digests(arena, [1, 0], SHAPE, 0, 8)
    assert len({one, two, other_one, other_two}) == 4
    assert (one + two) & MASK != (other_one + other_two) & MASK
    arena[:] = 0
    assert digests(arena, [0, 1], SHAPE, 0, 8) != [one, two]
    assert len(set(digests(arena, [0, 1], SHAPE, 0, 8))) == 2, "empty pages differ by their place"


def test_rows_that_trade_words_are_not_told_apart():
    """Known and accepted: within one row only the sum of the words counts (see the module's docstring)."""
    page = fill(SHAPE, 1, 5)
    before = page_digest(page, SHAPE, 0, 4)
    row = by_coordinates(SHAPE, page)[0, 0, 0, 0].view(np.uint64)
    row[:2] = row[1::-1].copy()
    assert page_digest(page, SHAPE, 0, 4) == before


def test_impossible_jobs_are_refused():
    arena = fill(SHAPE, 2, 1)
    for call in (
        lambda: page_digest(arena, SHAPE, 0, 4),
        lambda: page_digest(arena[: SHAPE.page_nbytes], SHAPE, 0, 5),
        lambda: page_digest(arena[: SHAPE.page_nbytes], SHAPE, 0, -1),
        lambda: digests(arena, [2], SHAPE, 0, 4),
        lambda: digests(arena, [-1], SHAPE, 0, 4),
        lambda: digests(arena, [0], SHAPE, 0, 5),
        lambda: digests(arena[:-1], [0], SHAPE, 0, 4),
    ):
        with pytest.raises(LocalError, match="digest"):
            call()
