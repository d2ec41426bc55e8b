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
from kernels.rope import TABLE_BLOCK, Rope, frequencies, rope_table

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


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def bias(request, dtype):
    return torch.randn(131).to(dtype) if request.param else None


def test_linear_and_logits(ops, dtype, bias):
    x, weight = torch.randn(64, 96).to(dtype), (torch.randn(131, 96) / 10).to(dtype)
    plain = ReferenceOps()
    close(ops.linear(x, ops.pack(weight, bias)), plain.linear(x, plain.pack(weight, bias)))
    logits = ops.logits(x, ops.pack(weight, bias))
    truth = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    close(plain.logits(x, plain.pack(weight, bias)), truth.float())
    assert logits.dtype == torch.float32
    assert (logits - truth).abs().max() < 1e-3  # 16 bits, where bf16 alone has 8
    if bias is None:
        head = ops.logits(x, ops.pack_head(weight))
        assert head.dtype == torch.float32
        assert (head - truth).abs().max() < 1e-3


def test_linear_without_private_operations(dtype, bias, monkeypatch):
    monkeypatch.setattr(linear, "packs", lambda dtype: False)
    test_linear_and_logits(FastOps(), dtype, bias)


def test_the_reference_is_its_formulas():
    gate, up = 4 * torch.randn(3, 8).double(), torch.randn(3, 8).double()
    plain, both = ReferenceOps(), torch.cat([gate, up], -1).float()
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    close(plain.gelu_mul(both), (gate * (1 + tanh) / 2 * up).float())
    close(plain.silu_mul(both), (gate / (1 + (-gate).exp()) * up).float())
    close(plain.soft_cap(gate.float(), 3.0), (3 * (gate / 3).tanh()).float())


def test_norms_gates_and_caps(ops, dtype):
    plain = ReferenceOps()
    x, residual, weight = torch.randn(32, 96).to(dtype), torch.randn(32, 96).to(dtype), torch.rand(96) + 0.5
    close(ops.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5))
    want, summed = plain.add_rms_norm(x, residual, weight, 1e-5)
    got, got_sum = ops.add_rms_norm(x, residual.clone(), weight, 1e-5)
    close(got, want)
    assert torch.equal(got_sum, summed)
    for gain in (1, 30, 1e-3):
        wide = (gain * torch.randn(32, 2 * 50)).to(dtype)
        close(ops.silu_mul(wide), plain.silu_mul(wide))
        close(ops.gelu_mul(wide), plain.gelu_mul(wide))
        logits = wide.float()
        close(ops.soft_cap(logits.clone(), 5.0), plain.soft_cap(logits, 5.0))


def make_batch(segments):
    rows = sum(segment.count for segment in segments)
    padded = -(-rows // 32) * 32
    positions = torch.zeros(padded, dtype=torch.int64)
    for segment in segments:
        positions[segment.row : segment.row + segment.count] = torch.arange(segment.start, segment.stop)
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(rows, positions, positions, none, none, segments, none, 0)


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
@given(
    layout=layouts(),
    group=st.sampled_from([1, 3]),
    window=st.one_of(st.none(), st.sampled_from([1, 16, 17, 64, 256, 300]), st.integers(1, 800)),
    cap=st.sampled_from([None, None, 0.7]),
    backend=st.sampled_from(BACKENDS),
)
@pytest.mark.parametrize("kind", list(CLOSE), ids=str)
def test_attention(kind, layout, group, window, cap, backend):
    """What no row sees is NaN: slots behind a chunk, and pages that lie wholly before its windows."""
    segments, page_tokens = layout
    heads = Heads(2 * group, 2, 16, 0.3, window, cap)
    arena = torch.full((400, 2, 2, 2, page_tokens, 16), torch.nan).to(kind)
    torch.manual_seed(0)
    for segment in segments:
        for place, page in enumerate(segment.pages):
            filled = min(segment.stop - place * page_tokens, page_tokens)
            if (place + 1) * page_tokens <= heads.first(segment.start):
                continue
            arena[page, :, :, :, :filled] = torch.randn(2, 2, 2, filled, 16).to(kind)
            arena[page, :, :, :, filled:] = 0 if segment.count == 1 else torch.nan
    batch = make_batch(segments)
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


def test_the_reference_sees_what_a_row_sees():
    """Row by row in fp64, key by key."""
    heads = Heads(2, 1, 16, 0.4, 5, 2.0)
    torch.manual_seed(0)
    layer, q = torch.randn(3, 2, 1, 16, 16), torch.randn(9, 2, 16)
    segment = Segment(0, 9, 12, np.array([2, 0]))
    got = ReferenceOps().attend(q, make_batch([segment]), layer, heads).view(9, 2, 16)
    keys, values = torch.cat([layer[2], layer[0]], dim=2)[:, 0].double()
    for row, position in enumerate(range(12, 21)):
        seen = slice(position - 4, position + 1)
        scores = 2 * torch.tanh(q[row].double() @ keys[seen].T * 0.4 / 2)
        close(got[row], (scores.softmax(-1) @ values[seen]).float())


def test_decode_does_not_meet_pages_before_its_window():
    segments = [Segment(row, 1, 999, np.arange(64 * row, 64 * row + 63), newest=True) for row in range(4)]
    assert len(page_plan(segments, 16, torch.float32, 100).owner) == 4 * 7


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("dim", [16, 24])
@pytest.mark.parametrize("backend", [ReferenceOps, NativeOps, ExactOps])
def test_rope_store_rotates_and_stores_the_real_rows_only(backend, dim, normed, dtype):
    heads = Heads(4, 2, dim, 1.0)
    batch = make_batch([Segment(0, 5, 30, np.array([3, 1, 2]))])
    cos, sin = rope_table(frequencies(dim, 10000.0), 64)
    rope = Rope(cos[batch.positions], sin[batch.positions])
    norms = (torch.rand(dim) + 0.5, torch.rand(dim) + 0.5) if normed else None
    place = torch.arange(30, 35)
    batch.page, batch.slot = torch.tensor([3, 1, 2])[place // 16], place % 16
    layer = torch.full((4, 2, 2, 16, dim), 7.0).to(dtype)
    qkv = torch.randn(32, 8 * dim).to(dtype)
    parts = qkv.clone().view(32, 8, dim)
    q = backend().rope_store(qkv, batch, layer, heads, rope, norms, 1e-3)[:5]
    turned = parts[:, :6].double()
    if norms is not None:
        turned /= (turned.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        turned[:, :4] *= norms[0]
        turned[:, 4:] *= norms[1]
    a, b = turned.chunk(2, dim=-1)
    angle = batch.positions[:, None, None] * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
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
