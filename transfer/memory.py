"""Puts memory behind the pages of an arena before the first read, as registering it with a NIC does.

Anonymous memory has no physical page until something touches it. Registration for RDMA pins all of it; CMA and sockets
do not, and the first hand-over into untouched pages then pays for them inside the copying call: 6.3 MB took 7 to 42 ms
(8 to 18 ms of it CPU time in the kernel), and 0.9 ms ever after (measured, CMA on a virtual machine).
"""

from __future__ import annotations

import ctypes
import mmap
import time

import numpy as np

STEP_NBYTES = 4 << 20
"""Bytes settled in one call into the kernel: no other thread of the process can map memory during it."""
_POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE (5.14), which the mmap module does not name."""


def settle(memory: memoryview, most_s: float) -> int:
    """Make `memory` resident from its start on without changing a byte; returns how many bytes it got to.

    It stops after `most_s`, and where the kernel cannot: what is left gets its memory at first use. A GiB takes 0.4 s,
    or 4 s where the host must find the memory, too. Releases the interpreter lock.
    """
    flat = np.frombuffer(memory, dtype=np.uint8)
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None or not flat.nbytes:
        return 0
    start = int(flat.ctypes.data)
    stop = start + flat.nbytes
    at = start // mmap.PAGESIZE * mmap.PAGESIZE
    until = time.monotonic() + most_s
    while at < stop and time.monotonic() < until:
        if madvise(ctypes.c_void_p(at), ctypes.c_size_t(min(STEP_NBYTES, stop - at)), _POPULATE_WRITE) != 0:
            break
        at += STEP_NBYTES
    return max(0, min(at, stop) - start)
