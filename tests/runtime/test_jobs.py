"""The job thread: one job after another, and its rank among the process's threads."""

from __future__ import annotations

import os
import queue
import sys
import threading

import pytest

from runtime.jobs import JobThread


def rank():
    """The calling thread's nice level."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_jobs_run_in_order_and_a_failing_one_is_reported():
    bugs: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    thread = JobThread("engine", bugs.put)
    done: list[int] = []
    error = ValueError("no")

    def fail() -> None:
        raise error

    for job in (lambda: done.append(1), fail, lambda: done.append(2)):
        thread.do(job)
    thread.close()
    assert done == [1, 2]
    assert bugs.get_nowait() is error


@pytest.mark.parametrize("nice", [0, 3])
def test_only_the_thread_and_those_it_starts_stand_lower(nice):
    ranks: queue.SimpleQueue[int] = queue.SimpleQueue()
    thread = JobThread("engine", lambda error: None, nice)

    def job() -> None:
        ranks.put(rank())
        child = threading.Thread(target=lambda: ranks.put(rank()))
        child.start()
        child.join()

    mine = rank()
    thread.do(job)
    thread.close()
    assert [ranks.get_nowait(), ranks.get_nowait()] == [min(mine + nice, 19) if sys.platform == "linux" else mine] * 2
    assert rank() == mine
