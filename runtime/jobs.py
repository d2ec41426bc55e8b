"""A thread that does one job after another: how a worker's loop hands work to its engine."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

log = logging.getLogger("baton.jobs")


class JobThread:
    """Runs jobs in the order of `do`; a job that raises is reported to `on_bug` and the thread goes on.

    `nice` is how many levels below the process's others the thread and those it starts stand, where the system ranks
    threads (Linux). One that computes all the time should: on a shared core the others' short turns then come at once.
    """

    def __init__(self, name: str, on_bug: Callable[[BaseException], None], nice: int = 0) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._on_bug = on_bug
        self._nice = nice
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def do(self, job: Callable[[], None]) -> None:
        """Queue a job."""
        self._jobs.put(job)

    def close(self, wait_s: float = 5.0) -> None:
        """End after the jobs queued so far; gives up waiting after `wait_s`."""
        self._jobs.put(None)
        self._thread.join(wait_s)

    def _work(self) -> None:
        if self._nice and sys.platform == "linux":
            me = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, me, os.getpriority(os.PRIO_PROCESS, me) + self._nice)
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:
                log.exception("job failed on thread %s", self._thread.name)
                self._on_bug(error)
