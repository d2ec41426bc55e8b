"""The native library is built once, kept, and its absence is a sentence."""

from __future__ import annotations

import shutil

import pytest
import torch

from kernels import native
from kernels.linear import pairs, tiles
from kernels.native_cpu import FEW, NativeOps


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The loader without its memory, with an empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return native.library.__wrapped__, tmp_path / "baton"


def test_it_is_built_once(fresh, monkeypatch):
    load, cache = fresh
    load()
    (made,) = cache.iterdir()
    monkeypatch.setattr(native, "_build", lambda compiler, path: pytest.fail("built again"))
    load()
    assert [made] == list(cache.iterdir())


def test_another_cpu_builds_its_own(fresh, monkeypatch):
    load, cache = fresh
    load()
    monkeypatch.setattr(native, "_cpu", lambda: b"another")
    load()
    assert len(list(cache.iterdir())) == 2


def test_no_compiler(fresh, monkeypatch):
    load, _ = fresh
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(native.NativeMissing, match="no C\\+\\+ compiler"):
        load()


@pytest.mark.parametrize("compiler", ["false", "/nowhere/compiler"])
def test_a_compiler_that_fails(fresh, monkeypatch, compiler):
    load, cache = fresh
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(native.NativeMissing, match="cannot be built or loaded"):
        load()
    assert not list(cache.iterdir())


def test_logits_are_fp32_sums_and_a_row_has_its_bits_alone():
    ops, before = NativeOps(), torch.get_num_threads()
    for cols in (1, 15, 31, 32, 33, 96, 100):
        for outs in (1, 3, 4, 5, 16, 17, 131):
            x, weight = torch.randn(9, cols).bfloat16(), torch.randn(outs, cols).bfloat16()
            packed = ops.pack_head(weight)
            native = pairs() and not tiles()
            assert (not packed.data.is_mkldnn and packed.data.data_ptr() == weight.data_ptr()) or not native
            together = ops.logits(x, packed)
            assert together.dtype == torch.float32
            if not native:
                continue
            assert (together - x.double() @ weight.double().T).abs().max() < 1e-6 * (cols + 10)
            for rows in range(1, 9):
                assert torch.equal(ops.logits(x[rows:], packed), together[rows:])
            torch.set_num_threads(2)
            try:
                assert torch.equal(ops.logits(x, packed), together)
            finally:
                torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_are_multiplied_here_and_a_row_has_its_bits_alone(dtype, biased):
    ops, before = NativeOps(), torch.get_num_threads()
    torch.manual_seed(4)
    for outs, cols in ((1, 1), (7, 48), (64, 96), (131, 33)):
        x, weight = torch.randn(4, cols).to(dtype), torch.randn(outs, cols).to(dtype)
        bias = torch.randn(outs).to(dtype) if biased else None
        packed = ops.pack(weight, bias)
        if dtype == torch.float32:
            assert packed.plain is not None
            assert torch.equal(ops.logits(x[:2], packed), ops.linear(x[:2], packed))
        wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        together = ops.linear(x[:FEW], packed)
        assert together.dtype == dtype
        within = (1e-6 if dtype == torch.float32 else 2**-7) * (cols + 10)
        for rows in range(1, 5):
            assert (ops.linear(x[:rows], packed) - wanted[:rows]).abs().max() < within
        assert len(ops.linear(x[:0], packed)) == 0
        if packed.plain is None:
            continue
        for row in range(FEW):
            assert torch.equal(ops.linear(x[row : row + 1], packed)[0], together[row])
        torch.set_num_threads(2)
        try:
            assert torch.equal(ops.linear(x[:FEW], packed), together)
        finally:
            torch.set_num_threads(before)


def test_a_cpu_without_pairs_of_bf16_has_no_product_of_its_own(fresh, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-avx512bf16"))
    monkeypatch.setattr("kernels.native_cpu.library", fresh[0])
    ops, x, weight = NativeOps(), torch.randn(3, 96).bfloat16(), (torch.randn(131, 96) / 10).bfloat16()
    logits = ops.logits(x, ops.pack_head(weight))
    assert (logits - x.double() @ weight.double().T).abs().max() < 1e-3
