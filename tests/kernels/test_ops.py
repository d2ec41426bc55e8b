"""Every backend against the plain-torch reference, operation by operation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import linear
from kernels.batch import Batch, Segment
from kernels.exact_cpu import ExactOps
from kernels.exact_native import ExactNativeOps
from kernels.fast_cpu import FastOps
from kernels.native_cpu import NativeOps
from kernels.ops import Heads
from kernels.page_attention import page_plan
from kernels.reference import ReferenceOps
from kernels.rope import TABLE_BLOCK, frequencies, rope_table

BACKENDS = [FastOps, NativeOps, ExactOps, ExactNativeOps]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.__name__)
def ops(request):
    return request.param()


@pytest.fixture(params=list(CLOSE), ids=str)
def dtype(request):
    return request.param


def close(got, want):
    limit = CLOSE[got.dtype] * max(1.0, float(want.abs().max()))
    assert got.dtype == want.dtype
    assert (got.float() - want.float()).abs().max() <= limit


def test_linear_and_logits(ops, dtype):
    x, weight = torch.randn(64, 96).to(dtype), (torch.randn(131, 96) / 10).to(dtype)
    plain = ReferenceOps()
    close(ops.linear(x, ops.pack(weight)), plain.linear(x, plain.pack(weight)))
    logits = ops.logits(x, ops.pack(weight))
    truth = x.double() @ weight.double().T
    assert logits.dtype == torch.float32
    assert (logits - truth).abs().max() < 1e-3  # 16 bits, where bf16 alone has 8


def test_linear_without_private_operations(dtype, monkeypatch):
    monkeypatch.setattr(linear, "PACKS", False)
    test_linear_and_logits(FastOps(), dtype)


def test_norms_and_silu(ops, dtype):
    plain = ReferenceOps()
    x, residual, weight = torch.randn(32, 96).to(dtype), torch.randn(32, 96).to(dtype), torch.rand(96) + 0.5
    close(ops.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5))
    want, summed = plain.add_rms_norm(x, residual, weight, 1e-5)
    got, got_sum = ops.add_rms_norm(x, residual.clone(), weight, 1e-5)
    close(got, want)
    assert torch.equal(got_sum, summed)
    wide = torch.randn(32, 2 * 50).to(dtype)
    close(ops.silu_mul(wide), plain.silu_mul(wide))


def make_batch(segments, dim):
    rows = sum(segment.count for segment in segments)
    padded = -(-rows // 32) * 32
    positions = torch.zeros(padded, dtype=torch.int64)
    for segment in segments:
        positions[segment.row : segment.row + segment.count] = torch.arange(segment.start, segment.stop)
    cos, sin = rope_table(frequencies(dim, 10000.0), 4096)
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(rows, positions, positions, none, none, segments, none, 0, cos[positions], sin[positions])


@st.composite
def layouts(draw):
    """Pages dealt in runs or shuffled, some sequences sharing their first pages, decode rows and chunks mixed."""
    page_tokens = draw(st.sampled_from([16, 64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.integers(1, 700), min_size=1, max_size=6))
    pages = np.arange(400)
    if draw(st.booleans()):
        rng.shuffle(pages)
    segments: list[Segment] = []
    row, at = 0, 0
    shared = draw(st.booleans())
    for number, length in enumerate(lengths):
        used = -(-length // page_tokens)
        table = pages[at : at + used].copy()
        at += used
        if shared and number:
            common = min(used, len(segments[0].pages)) - 1
            table[:common] = segments[0].pages[:common]
        count = 1 if draw(st.booleans()) else draw(st.integers(1, length))
        segments.append(Segment(row, count, length - count, table, newest=True))
        row += count
    return segments, page_tokens


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), group=st.sampled_from([1, 3]), backend=st.sampled_from(BACKENDS))
@pytest.mark.parametrize("kind", list(CLOSE), ids=str)
def test_attention(kind, layout, group, backend):
    segments, page_tokens = layout
    heads = Heads(2 * group, 2, 16)
    arena = torch.full((400, 2, 2, 2, page_tokens, 16), torch.nan).to(kind)
    torch.manual_seed(0)
    for segment in segments:
        for place, page in enumerate(segment.pages):
            filled = min(segment.stop - place * page_tokens, page_tokens)
            arena[page, :, :, :, :filled] = torch.randn(2, 2, 2, filled, 16).to(kind)
            arena[page, :, :, :, filled:] = 0 if segment.count == 1 else torch.nan
    batch = make_batch(segments, 16)
    q = torch.randn(len(batch.positions), heads.heads, heads.dim).to(kind)
    ops = backend()
    ops.plan(batch, arena, heads)
    want = ReferenceOps().attend(q, batch, arena[:, 1], heads)[: batch.rows]
    got = ops.attend(q, batch, arena[:, 1], heads)[: batch.rows]
    assert torch.isfinite(want.float()).all()
    close(got, want)


def test_decode_reads_every_page_once_however_rows_are_long():
    """One row of 500 pages beside 31 of one page: 531 pages of work, not 32 times 500."""
    segments = [Segment(0, 1, 31999, np.arange(500), newest=True)]
    segments += [Segment(row, 1, 9, np.array([600 + 7 * row]), newest=True) for row in range(1, 32)]
    plan = page_plan(segments, 64, torch.float32)
    assert len(plan.owner) == 531
    assert sum(piece.stop - piece.start for piece in plan.pieces) == 531
    assert [piece.first for piece in plan.pieces if piece.gathered is None] == [0]
    assert len(plan.pieces) == 2


@pytest.mark.parametrize("backend", [ReferenceOps, NativeOps])
def test_rope_store_rotates_and_stores_the_real_rows_only(backend, dtype):
    heads = Heads(4, 2, 16)
    batch = make_batch([Segment(0, 5, 30, np.array([3, 1, 2]))], 16)
    place = torch.arange(30, 35)
    batch.page, batch.slot = torch.tensor([3, 1, 2])[place // 16], place % 16
    layer = torch.full((4, 2, 2, 16, 16), 7.0).to(dtype)
    qkv = torch.randn(32, 8 * 16).to(dtype)
    parts = qkv.clone().view(32, 8, 16)
    q = backend().rope_store(qkv, batch, layer, heads)[:5]
    a, b = parts[:, :6].double().chunk(2, dim=-1)
    angle = batch.positions[:, None, None] * 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    want = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    close(q, want[:5, :4].to(dtype))
    close(layer[batch.page, 0, :, batch.slot], want[:5, 4:].to(dtype))
    assert torch.equal(layer[batch.page, 1, :, batch.slot], parts[:5, 6:])
    untouched = torch.ones(4, 16, dtype=torch.bool)
    untouched[batch.page, batch.slot] = False
    assert (layer.permute(0, 3, 1, 2, 4)[untouched] == 7).all()


def test_a_position_has_one_cosine_in_every_table():
    frequency = frequencies(64, 500000.0)
    cos, sin = rope_table(frequency, 2 * TABLE_BLOCK + 5)
    short_cos, short_sin = rope_table(frequency, TABLE_BLOCK + 3)
    assert torch.equal(cos[: TABLE_BLOCK + 3], short_cos)
    assert torch.equal(sin[: TABLE_BLOCK + 3], short_sin)
