"""An arena is resident before anything is read into it, and no byte of it has changed."""

from __future__ import annotations

import contextlib
import mmap
import resource
import threading

import numpy as np
import pytest

from tests.transfer.peer import arena
from transfer.inprocess import InProcess
from transfer.memory import STEP_NBYTES, settle
from transfer.thread import TransferThread
from transfer.thread_events import Opened

NBYTES = 3 * STEP_NBYTES + 5 * mmap.PAGESIZE


def faults(touch):
    """Page faults of this process while `touch` runs."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture
def memory():
    made = mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        made.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page is one fault for 512
    return made


def write(memory):
    np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE] = 1


def test_settled_memory_has_its_pages(memory):
    assert settle(memoryview(memory), 60.0) == NBYTES
    assert faults(lambda: write(memory)) < 100


def test_untouched_memory_has_none(memory):
    """What the test above would see if nothing was done."""
    assert faults(lambda: write(memory)) > NBYTES // mmap.PAGESIZE // 2


def test_settling_changes_no_byte(memory):
    bytes_ = np.frombuffer(memory, dtype=np.uint8)
    bytes_[100:200] = 7
    settle(memoryview(memory), 60.0)
    assert bytes_.sum() == 700


def test_memory_that_starts_within_a_page(memory):
    part = memoryview(memory)[100 : NBYTES - 100]
    assert settle(part, 60.0) == len(part)
    assert faults(lambda: write(memory)) < 100


def test_time_is_bounded(memory):
    assert settle(memoryview(memory), 0.0) == 0
    assert faults(lambda: write(memory)) > NBYTES // mmap.PAGESIZE // 2


def test_the_transfer_thread_settles_before_it_says_opened():
    memory = arena(NBYTES // mmap.PAGESIZE, mmap.PAGESIZE)
    opened = threading.Event()
    thread = TransferThread(
        lambda: InProcess("one#01"),
        memory,
        mmap.PAGESIZE,
        lambda event: opened.set() if isinstance(event, Opened) else None,
    )
    thread.start()
    assert opened.wait(30)
    assert faults(lambda: write(memory)) < 100
    assert thread.close()
