"""The probe of one lane: which reads it takes to bring a lane up and to measure it, pure.

A lane is built by its first reads. Small ones repeat until 3 in a row end in their first poll, where the lane can do
that at all, or until 1 s has passed: it is measured as it is then. 3 reads of all the scratch pages follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.kv import PageRun
from transfer.transport import ReadDone

SETTLED_S = 1.0
"""A lane that does not settle within this is measured as it is."""
READS = 3
SMALL_NBYTES = 4096


@dataclass(slots=True)
class Probe:
    """Reads `nbytes` of `remote` pages of `peer` into `scratch` pages of ours, one read at a time."""

    peer: str
    scratch: PageRun
    remote: PageRun
    page_nbytes: int
    """Of the peer's."""
    nbytes: int
    started: float
    read_id: int = 0
    """Of the read in flight, 0 between two."""
    posted: float = 0.0
    answered: bool = False
    """A read has landed."""
    first_poll: bool = True
    """The read in flight has not been looked after since it was posted."""
    _streak: int = 0
    _samples_s: list[float] = field(default_factory=list)
    """Of the streak's small reads."""
    _whole: list[ReadDone] = field(default_factory=list)
    _all_pages: bool = False
    """The read in flight is one of all the scratch pages."""

    def next_nbytes(self, now: float) -> int | None:
        """Bytes of the next read, None if the lane is measured."""
        self._all_pages = self._streak >= READS or now - self.started > SETTLED_S
        if not self._all_pages:
            return min(SMALL_NBYTES, self.nbytes)
        return self.nbytes if len(self._whole) < READS else None

    def posts(self, read_id: int, now: float) -> None:
        """A read of `next_nbytes` was posted."""
        self.read_id, self.posted, self.first_poll = read_id, now, True

    def took(self, done: ReadDone, immediate: bool) -> None:
        """The read in flight is done; `immediate` if reads over this lane can end in their first poll."""
        self.read_id, self.answered = 0, True
        if self._all_pages:
            self._whole.append(done)
            return
        if self.first_poll or not immediate:
            self._streak += 1
        else:
            self._streak, self._samples_s = 0, []
        self._samples_s = [*self._samples_s[-8:], done.seconds]

    def measured(self) -> tuple[float, float]:
        """The best speed over all the scratch pages in 1e9 bytes a second, and the small reads' median in us."""
        best = max(done.nbytes / done.seconds for done in self._whole)
        samples = sorted(self._samples_s) or [min(done.seconds for done in self._whole)]
        return best / 1e9, samples[len(samples) // 2] * 1e6
