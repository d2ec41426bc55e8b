"""A thread that does one job after another: how a worker's loop hands work to its engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

log = logging.getLogger("baton.jobs")


class JobThread:
    """Runs jobs in the order of `do`; a job that raises is reported to `on_bug` and the thread goes on."""

    def __init__(self, name: str, on_bug: Callable[[BaseException], None]) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._on_bug = on_bug
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def do(self, job: Callable[[], None]) -> None:
        """Queue a job."""
        self._jobs.put(job)

    def close(self, wait_s: float = 5.0) -> None:
        """End after the jobs queued so far; gives up waiting after `wait_s`."""
        self._jobs.put(None)
        self._thread.join(wait_s)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:
                log.exception("job failed on thread %s", self._thread.name)
                self._on_bug(error)
