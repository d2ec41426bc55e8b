"""The host's memory of an arena: whole pages at an address that never changes. No torch here."""

from __future__ import annotations

import mmap

from core.errors import SetupError
from core.kv import KvShape


def page_count(kv: KvShape, nbytes: int, setting: str = "kv_memory") -> int:
    """How many pages fit into `nbytes`; `SetupError`, which names the setting, if not even one does."""
    count = nbytes // kv.page_nbytes
    if count < 1:
        raise SetupError(f"{setting}: got {nbytes} bytes, want at least one page of {kv.page_nbytes} bytes")
    return count


def anonymous_memory(nbytes: int, setting: str = "kv_memory") -> mmap.mmap:
    """Anonymous memory, zero at first, in huge pages where the system has them; `SetupError` if it cannot be had."""
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise SetupError(f"{setting}: {nbytes} bytes cannot be had: {error}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages: slower, not wrong
    return memory
