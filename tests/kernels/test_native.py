"""The native library is built once, kept, and its absence is a sentence."""

from __future__ import annotations

import shutil

import pytest

from kernels import native


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
