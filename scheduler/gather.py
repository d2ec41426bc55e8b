"""Gathers short prefills into batches: how long to wait for how many, and which go together. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from core.ranked import Ranked
from scheduler.order import Backlog, Job, Pace, Start

LENGTHS = (8, 16, 32, 64, 128, 256)
"""Buckets of new tokens, as in LAPS; the last takes all longer ones that are short, too."""
DEPTHS = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes."""


class Grouping(StrEnum):
    """Who goes into a batch: the two strategies of LAPS, and one without padding."""

    RAGGED = "ragged"
    """Anybody, nearest buckets first; for an engine that computes rows of any lengths together."""
    MEMORY_FIRST = "memory_first"
    """One bucket only: nothing is padded beyond its bucket, and there are more batches."""
    LATENCY_FIRST = "latency_first"
    """Anybody, nearest buckets first, all padded to the longest bucket, whose tokens count."""


@dataclass(frozen=True, slots=True)
class GatherSettings:
    """How short ones are gathered.

    | setting | default | unit | meaning |
    |---|---|---|---|
    | window_least_s, window_most_s | 0.001, 0.01 | s | bounds of the window; LAPS's figure 5 is best at 6 to 8 ms |
    | slack_s | 0.005 | s | a batch goes at the latest so long before its start would make it late (sigma) |
    | wait_most_s | 0.05 | s | and when the first in line has waited so long (Tmax) |
    | grouping | ragged | | see `Grouping` |
    | rate_s | 1 | s | over which the rate of arrivals is averaged |
    """

    window_least_s: float = 0.001
    window_most_s: float = 0.01
    slack_s: float = 0.005
    wait_most_s: float = 0.05
    grouping: Grouping = Grouping.RAGGED
    rate_s: float = 1.0


def bucket(tokens: int) -> int:
    """The index in LENGTHS of the smallest bucket that takes so many tokens."""
    return min(bisect_left(LENGTHS, tokens), len(LENGTHS) - 1)


_NEAREST = [sorted(range(len(LENGTHS)), key=lambda index: abs(index - home)) for home in range(len(LENGTHS))]


class Gather:
    """The short jobs in line, and LAPS's adaptive waiting (algorithm 1, in its mode with deadlines).

    A round begins with the first job in line. It ends when `depth` jobs are there, when they fill a step, when a
    deadline or the longest wait forbids more, or at the end of the window, which is the shortest of

    - `window_s`, the time that the last round of this depth took to fill;
    - the earliest deadline less the batch's own time and the slack (W_SLA);
    - the jobs missing over their rate of arrival (W_GR),

    within the settings' bounds. A round that did not fill lowers `depth` to what there was. As printed, it never rises
    again; here, a round that fills in less than half of the longest window raises it to the next batch size, if so many
    would come within the longest window at the rate of arrivals.
    """

    def __init__(self, settings: GatherSettings, pace: Pace, tokens: int, rows: int) -> None:
        self._settings = settings
        self._pace = pace
        self._tokens = tokens
        self._depths = [depth for depth in DEPTHS if depth == 1 or (depth <= rows and depth * LENGTHS[0] <= tokens)]
        self.depth = self._depths[-1]
        self.window_s = settings.window_most_s
        self.backlog = Backlog()
        """Of the jobs in line."""
        self._jobs: dict[str, Job] = {}
        self._due = Ranked()
        self._since = Ranked()
        self._buckets = [Ranked() for _ in LENGTHS]
        self._opened_at = 0.0
        self._full_at = 0.0
        self._closes_at = math.inf
        self._rate = 0.0
        self._rate_at = 0.0

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, key: str) -> bool:
        return key in self._jobs

    @property
    def closes_at(self) -> float | None:
        """When the round ends if nobody comes, minus infinity if it has; None without a round."""
        return self._closes_at if self._jobs else None

    @property
    def longest(self) -> float:
        """Seconds that somebody who comes now may have to wait for company."""
        return self.window_s if self.depth > 1 else 0.0

    def first(self) -> Job | None:
        """The most urgent."""
        key = self._due.first()
        return None if key is None else self._jobs[key]

    def add(self, job: Job, now: float) -> None:
        """A job stands in line."""
        self._decay(now)
        self._rate += 1.0 / self._settings.rate_s
        if not self._jobs:
            self._opened_at = now
        self._enter(job, now)
        if len(self._jobs) == self.depth:
            self._full_at = now
        self._close()

    def drop(self, key: str) -> None:
        """It left, for whatever reason; nothing if it is not here."""
        job = self._jobs.pop(key, None)
        if job is not None:
            self.backlog.take(job)
            self._due.drop(key)
            self._since.drop(key)
            self._buckets[bucket(job.left)].drop(key)
            self._close()

    def closed(self, now: float) -> bool:
        """The round is over: there is a batch to run."""
        return bool(self._jobs) and now >= self._closes_at

    def batch_s(self) -> float:
        """Time of a batch of those in line, as far as they fit in one."""
        return self._pace.seconds(self.backlog.share(self._tokens))

    def batch(
        self, anchor: Job, now: float, start: Start, begun: set[str], tokens: int, rows: int
    ) -> tuple[list[tuple[Job, int]], bool]:
        """The jobs of one step and their tokens, `anchor` first, then by bucket; and whether one could not start.

        They leave the line, and those that start join `begun`. Nobody comes along who would make the most urgent late,
        or who does not fit; one that cannot start ends the batch.
        """
        grouping, home = self._settings.grouping, bucket(anchor.left)
        buckets = [home] if grouping is Grouping.MEMORY_FIRST else _NEAREST[home]
        chosen: list[tuple[Job, int]] = []
        total, padded, wanted_by = Backlog(), 0, math.inf
        next_key: str | None = anchor.key
        for index in buckets:
            if not self._buckets[index]:
                continue
            while len(chosen) < rows:
                key, next_key = next_key or self._buckets[index].first(), None
                if key is None:
                    break
                job = self._jobs[key]
                longest = max(padded, LENGTHS[index], job.left)
                size = longest * (len(chosen) + 1) if grouping is Grouping.LATENCY_FIRST else total.tokens + job.left
                if chosen:
                    if size > tokens:
                        break
                    if now + self._pace.seconds(total, job.left, job.context) > min(wanted_by, job.wanted_by):
                        break
                if key not in begun:
                    fresh = start(key)
                    if fresh is None:
                        return chosen, True
                    begun.add(key)
                    job = fresh
                self.drop(key)
                # There may be more to compute than was offered, if cached pages are gone.
                chosen.append((job, min(job.left, tokens - total.tokens)))
                total.add(job)
                padded, wanted_by = longest, min(wanted_by, job.wanted_by)
                if total.tokens >= tokens:
                    return chosen, False
        return chosen, False

    def dispatched(self, count: int, now: float) -> None:
        """A round ended with `count` jobs in line: learn from it, and begin another with those who are left."""
        settings = self._settings
        if count >= self.depth:
            took_s = max(0.0, self._full_at - self._opened_at)
            up = next((depth for depth in self._depths if depth > self.depth), self.depth)
            self._decay(now)
            if (
                took_s < settings.window_most_s / 2
                and up > self.depth
                and count + self._rate * settings.window_most_s >= up
            ):
                self.depth, self.window_s = up, settings.window_most_s
            else:
                self.window_s = self._clip(took_s)
        else:
            self.depth = max([depth for depth in self._depths if depth <= max(1, count)])
        self._opened_at = self._full_at = now
        self._close()

    def check(self) -> None:
        assert self.backlog == Backlog(self._jobs.values())
        keys = sorted(self._jobs)
        assert sorted(key for key, _ in self._due.items()) == keys
        assert sorted(key for key, _ in self._since.items()) == keys
        for index, line in enumerate(self._buckets):
            assert all(bucket(self._jobs[key].left) == index for key, _ in line.items())
        assert sum(len(line) for line in self._buckets) == len(keys)
        assert self.depth in self._depths
        assert self._settings.window_least_s <= self.window_s <= self._settings.window_most_s

    def document(self) -> dict[str, Any]:
        return {
            "jobs": [asdict(self._jobs[key]) for key, _ in self._since.items()],
            "since": self._since.items(),
            "depth": self.depth,
            "window_s": self.window_s,
            "opened_at": self._opened_at,
            "full_at": self._full_at,
            "closes_at": self._closes_at,
            "rate": [self._rate, self._rate_at],
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        jobs = {each["key"]: Job(**each) for each in document["jobs"]}
        for key, since in document["since"]:
            self._enter(jobs[key], since)
        self.depth, self.window_s = document["depth"], document["window_s"]
        self._opened_at, self._full_at = document["opened_at"], document["full_at"]
        self._closes_at = document["closes_at"]
        self._rate, self._rate_at = document["rate"]

    def _enter(self, job: Job, now: float) -> None:
        self._jobs[job.key] = job
        self.backlog.add(job)
        self._due.put(job.key, job.wanted_by)
        self._since.put(job.key, now)
        self._buckets[bucket(job.left)].put(job.key, job.wanted_by)

    def _clip(self, seconds: float) -> float:
        return min(max(seconds, self._settings.window_least_s), self._settings.window_most_s)

    def _decay(self, now: float) -> None:
        self._rate *= math.exp(-(now - self._rate_at) / self._settings.rate_s)
        self._rate_at = now

    def _close(self) -> None:
        """When the round ends, as things are: computed when somebody comes or goes, not when somebody asks."""
        settings = self._settings
        first = self.first()
        if first is None:
            self._closes_at = math.inf
        elif len(self._jobs) >= self.depth or self.backlog.tokens >= self._tokens:
            self._closes_at = -math.inf
        else:
            missing = self.depth - len(self._jobs)
            filled_s = missing / self._rate if self._rate else math.inf
            latest = first.wanted_by - self.batch_s() - settings.slack_s
            window_s = self._clip(min(self.window_s, filled_s, latest - self._opened_at))
            self._closes_at = min(self._opened_at + window_s, latest, self._since.lowest() + settings.wait_most_s)
