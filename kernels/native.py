"""Builds and loads `native.cpp`: with a compiler at hand small operations are fused, without one nothing is lost.

The library has a plain C interface and is called through ctypes. It is built for this very CPU, once, and kept in
the user's cache under a name made of the source, the compiler's flags and the CPU's features: another machine that
shares the directory builds its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Sums = Callable[[Array, Array, Array, int, int], Array]
Weights = Callable[[Array, Array, Array, Array], Array]

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=512", "-std=c++17", "-shared", "-fPIC", "-fopenmp",
    # never -ffast-math: the order of sums is the source's (exact mode), and NaN keeps its meaning
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
BUILD_LIMIT_S = 60.0

POINTER, COUNT, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES: dict[str, tuple[type, ...]] = {
    "attend": (POINTER, COUNT, *[POINTER] * 5, *[COUNT] * 6, FLOAT, COUNT, FLOAT, POINTER, INT),
    "add_rms_norm": (*[POINTER] * 4, COUNT, COUNT, FLOAT, INT),
    "rope_store": (*[POINTER] * 5, FLOAT, *[POINTER] * 3, *[COUNT] * 6, INT),
    "silu_mul": (POINTER, POINTER, COUNT, COUNT, INT),
    "gelu_mul": (POINTER, POINTER, COUNT, COUNT, INT),
    "soft_cap": (POINTER, COUNT, COUNT, FLOAT, INT),
}
PRODUCTS: dict[str, tuple[type, ...]] = {
    "few_rows": (*[POINTER] * 4, *[COUNT] * 3, INT),
    "attend_chunk": (POINTER, COUNT, POINTER, POINTER, *[COUNT] * 7, FLOAT, COUNT, FLOAT, POINTER, INT),
}
"""In bf16 only where the CPU multiplies pairs of it."""
DTYPES = ("float32", "bfloat16")


class NativeMissing(Exception):
    """The library cannot be had here; the message says why in one sentence."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, built first if need be; `NativeMissing` where there is no working compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NativeMissing("no C++ compiler (g++ or clang++) on the path")
    source = SOURCE.read_bytes()
    name = hashlib.sha256(b"\0".join([source, " ".join((compiler, *FLAGS)).encode(), _cpu()])).hexdigest()[:24]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton"
        path = folder / f"native-{name}.so"
        if not path.exists():
            _build(compiler, path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise NativeMissing(f"native.cpp cannot be built or loaded: {error}") from None
    for operation, arguments in SIGNATURES.items():
        for dtype in DTYPES:
            function = getattr(loaded, f"{operation}_{dtype}")
            function.argtypes, function.restype = arguments, None
    for operation, arguments in PRODUCTS.items():
        for dtype in DTYPES if pairs_multiplied(loaded) else DTYPES[:1]:
            function = getattr(loaded, f"{operation}_{dtype}")
            function.argtypes, function.restype = arguments, None
    if pairs_multiplied(loaded):
        loaded.wide_product.argtypes, loaded.wide_product.restype = (*[POINTER] * 3, *[COUNT] * 3, INT), None
    loaded.page_sums.argtypes, loaded.page_sums.restype = (POINTER, *[COUNT] * 5, *[POINTER] * 3), None
    loaded.page_weights.argtypes = (POINTER, *[COUNT] * 3, *[POINTER] * 3, COUNT, POINTER)
    loaded.page_weights.restype = None
    return loaded


def pairs_multiplied(loaded: ctypes.CDLL) -> bool:
    """Whether the library has bf16 products, which it has where the CPU multiplies pairs of bf16 (AVX512-BF16)."""
    return hasattr(loaded, "wide_product")


def page_sums() -> Sums:
    """The inner loop of page digests (`transfer/digest.py`), without the interpreter's lock; or `NativeMissing`.

    Takes pages `[page, byte]` that follow each other, their lanes' keys ``[lane, 1]`` and the keys of all their tokens,
    how many tokens a page holds and of how many of them rows are summed. Rows are whole words of 8 bytes.
    """
    call = library().page_sums

    def sums(pages: Array, lanes: Array, keys: Array, page_tokens: int, tokens: int) -> Array:
        count, words = len(pages), pages.shape[1] // (8 * page_tokens * len(lanes))
        found = np.empty(count, dtype=np.uint64)
        arrays = (lanes.ctypes.data, keys.ctypes.data, found.ctypes.data)
        call(pages.ctypes.data, count, len(lanes), page_tokens, words, tokens, *arrays)
        return found

    return sums


def page_weights() -> Weights:
    """The inner loop of the paced engine's reading (`engine/paced.py`), in place; or `NativeMissing`.

    Takes an arena ``[page, lane, slot, word]``, weights ``[lane, slot, word]``, and of each page to be read its number
    and how many of its slots count; gives ``[page]`` sums mod 2**64.
    """
    call = library().page_weights

    def weigh(arena: Array, weights: Array, pages: Array, slots: Array) -> Array:
        found = np.empty(len(pages), dtype=np.uint64)
        places = (pages.ctypes.data, slots.ctypes.data, len(pages))
        call(arena.ctypes.data, *weights.shape, weights.ctypes.data, *places, found.ctypes.data)
        return found

    return weigh


def _build(compiler: str, path: Path) -> None:
    """Compile into a temporary file, then rename: processes that build at the same time do not disturb each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
        if done.returncode:
            raise RuntimeError(f"{compiler} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        made.replace(path)


def _cpu() -> bytes:
    """What the compiler's ``native`` stands for here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode()
