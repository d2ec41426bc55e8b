"""A peer process for the conformance suite: serves an arena over one transport until it is killed.

    python -m tests.transfer.peer TRANSPORT OWNER UNIT_NBYTES UNITS SEED [POLL_S]

Prints its metadata in hex on one line. Page p holds the bytes of `pattern(seed, p)`.
"""

from __future__ import annotations

import mmap
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer.transport import Transport


def pattern(seed: int, page: int, nbytes: int) -> NDArray[np.uint8]:
    """The bytes of one page of a peer: different for every seed and page, never the same twice in a row."""
    words = np.arange(-(-nbytes // 8), dtype=np.uint64)
    words = (words + np.uint64(seed * 1_000_003 + page + 1)) * np.uint64(0x9E3779B97F4A7C15)
    return words.view(np.uint8)[:nbytes].copy()


def arena(units: int, unit_nbytes: int, seed: int | None = None) -> memoryview:
    """An anonymous mapping of `units` pages, filled with the pattern of `seed` if given."""
    memory = memoryview(mmap.mmap(-1, units * unit_nbytes))
    if seed is not None:
        view = np.frombuffer(memory, dtype=np.uint8).reshape(units, unit_nbytes)
        for page in range(units):
            view[page] = pattern(seed, page, unit_nbytes)
    return memory


def make(kind: str, owner: str, **options: Any) -> Transport:
    """A transport by name; "faultless" is one in this process that could be given faults."""
    if kind == "nixl":
        from transfer.nixl import Nixl

        return Nixl(owner, **options)
    if kind == "zeromq":
        from transfer.zeromq import ZeroMq

        return ZeroMq(owner, **options)
    from transfer.inprocess import InProcess

    if kind == "faultless":
        from tests.transfer.faults import Faulty

        return Faulty(InProcess(owner, **options))
    return InProcess(owner, **options)


def main() -> None:
    """Serve for ever."""
    kind, owner, unit_nbytes, units, seed = sys.argv[1:6]
    poll_s = float(sys.argv[6]) if len(sys.argv) > 6 else 0.001
    transport = make(kind, owner)
    transport.register(arena(int(units), int(unit_nbytes), int(seed)), int(unit_nbytes))
    print(transport.metadata().hex(), flush=True)
    while True:
        transport.poll()
        time.sleep(poll_s)


if __name__ == "__main__":
    main()
