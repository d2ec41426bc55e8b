"""Prefill attention, native and in torch's blocks, against its formula in double precision."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from kernels import native, native_cpu
from kernels.batch import Batch, Segment
from kernels.chunk_attention import chunk_attention
from kernels.linear import pairs, tiles
from kernels.native_cpu import NativeOps
from kernels.ops import Heads

PAGE = 16
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
PLACES = [(0, 2), (0, 65), (1, 64), (63, 64), (100, 129), (300, 212)]
HEADS = [
    Heads(6, 2, 32, 0.2),
    Heads(4, 4, 64, 0.125),
    Heads(16, 1, 80, 0.1),
    Heads(3, 1, 6, 0.5),
    Heads(2, 2, 256, 0.06),
    Heads(4, 2, 16, 0.3, cap=1.5),
    Heads(6, 3, 16, 0.3, window=70),
    Heads(4, 1, 32, 0.3, window=7, cap=2.0),
]


def drawn(start: int, count: int, heads: Heads, dtype: torch.dtype) -> tuple[torch.Tensor, Segment, torch.Tensor]:
    """q among k and v, where it lies, and KV whose pages are in any order and whose unused slots are not numbers."""
    rng, stop = np.random.default_rng(start + count), start + count
    torch.manual_seed(stop)
    used = -(-stop // PAGE)
    layer = torch.randn(used + 2, 2, heads.kv_heads, PAGE, heads.dim).to(dtype)
    pages = rng.permutation(used + 2)[:used]
    if stop % PAGE:
        layer[pages[-1], :, :, stop % PAGE :] = torch.nan
    rows = torch.randn(count, heads.heads + 2 * heads.kv_heads, heads.dim).to(dtype)
    return rows[:, : heads.heads], Segment(0, count, start, pages), layer


def formula(q: torch.Tensor, segment: Segment, layer: torch.Tensor, heads: Heads) -> torch.Tensor:
    held = layer[torch.from_numpy(segment.pages)].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : segment.stop]
    keys, values = held.repeat_interleave(heads.group, dim=1)
    scores = torch.einsum("rhd,hkd->hrk", q.double(), keys) * heads.scale
    if heads.cap is not None:
        scores = heads.cap * (scores / heads.cap).tanh()
    own = torch.arange(segment.start, segment.stop)[:, None]
    there = torch.arange(segment.stop)
    scores.masked_fill_((there > own) | (there <= own - (heads.window or sys.maxsize)), -torch.inf)
    return torch.einsum("hrk,hkd->rhd", scores.softmax(-1), values)


def natively(ops: NativeOps, q: torch.Tensor, segment: Segment, layer: torch.Tensor, heads: Heads) -> torch.Tensor:
    out = torch.full((segment.count, heads.heads, heads.dim), torch.nan, dtype=q.dtype)
    ops._chunk(q, segment, layer, heads, out)
    return out


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """The operations as they are built for a CPU without AVX-512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(native, "FLAGS", (*native.FLAGS, *(["-mno-avx512f"] if pairs() else [])))
        patch.setattr(native_cpu, "library", native.library.__wrapped__)
        return NativeOps()


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize(("start", "count"), PLACES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_chunk_sees_what_lies_before_it_and_its_own(start, count, heads, dtype, narrow):
    q, segment, layer = drawn(start, count, heads, dtype)
    before, want = q.clone(), formula(q, segment, layer, heads)
    ways = {"torch": chunk_attention(q, segment, layer, heads)}
    for name, ops in (("native", NativeOps()), ("narrow", narrow)):
        if dtype in ops._attend_chunk:
            ways[name] = natively(ops, q, segment, layer, heads)
    for name, found in ways.items():
        assert found.dtype == dtype, name
        assert (found.double().view(want.shape) - want).abs().max() < CLOSE[dtype], name
    assert torch.equal(q, before)


def test_a_chunk_has_the_same_bits_on_any_number_of_threads():
    heads, threads = Heads(4, 2, 64, 0.125), torch.get_num_threads()
    asked, ops = drawn(70, 200, heads, torch.float32), NativeOps()
    alone = natively(ops, *asked, heads)
    torch.set_num_threads(3)
    try:
        assert torch.equal(natively(ops, *asked, heads), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_a_step_attends_natively_where_that_is_quicker(dtype, monkeypatch):
    monkeypatch.setitem(native_cpu.CHUNK_KEYS, dtype, 64)
    ops, heads, asked = NativeOps(), Heads(4, 2, 16, 0.25), list[int]()

    def counted(q, segment, layer, heads):
        asked.append(segment.stop)
        return chunk_attention(q, segment, layer, heads)

    monkeypatch.setattr(native_cpu, "chunk_attention", counted)
    for start, count in ((0, 64), (44, 20), (0, 65)):
        q, segment, layer = drawn(start, count, heads, dtype)
        none = torch.empty(0, dtype=torch.int64)
        batch = Batch(count, none, none, none, none, [segment], none, 0)
        ops.plan(batch, layer[None], heads)
        found = ops.attend(q, batch, layer, heads).view(q.shape)
        assert (found.double() - formula(q, segment, layer, heads)).abs().max() < CLOSE[dtype]
    here = dtype == torch.float32 or (pairs() and not tiles())
    assert asked == ([65] if here else [64, 64, 65])


def test_few_rows_are_multiplied_without_wide_registers_too(narrow):
    for cols in (7, 8, 100, 131):
        x, weight, bias = torch.randn(3, cols), torch.randn(19, cols), torch.randn(19)
        want = x.double() @ weight.double().T + bias
        for rows in (1, 2, 3):
            found = narrow.linear(x[:rows], narrow.pack(weight, bias))
            assert (found - want[:rows]).abs().max() < 1e-5
