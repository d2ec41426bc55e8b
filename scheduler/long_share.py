"""Long prompts get a share of each step, short ones the rest. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from core.ranked import Ranked
from scheduler.cost import CostModel
from scheduler.order import Backlog, Job, Line, Start, Take


class LongShare(Line):
    """Two lines, each first come, first served: a few long prompts at once, a few tokens of each in a step.

    What vLLM ships as `long_prefill_token_threshold` and `max_long_partial_prefills`: short prompts go past a long one
    that is under way, which still goes on in every step, so nobody starves. The first of either line that cannot start
    ends the step, so memory is not taken away from who waits for it. A short request is predicted to wait for the
    short ones and for what the long ones compute meanwhile, a long one for all.

    | parameter | default | unit | meaning |
    |---|---|---|---|
    | chunk_tokens, max_rows, cost, quantile | | | those of `Line` |
    | long_tokens | chunk_tokens / 2 | new tokens | above it a prompt is long; also the most of a long one in a step |
    | max_long | 1 | jobs | long ones under way at once |
    | adaptive | true | | long ones get more than their share where no short one wants it |
    """

    def __init__(
        self,
        chunk_tokens: int = 512,
        max_rows: int = 32,
        cost: CostModel | None = None,
        quantile: float = 0.9,
        long_tokens: int | None = None,
        max_long: int = 1,
        adaptive: bool = True,
    ) -> None:
        super().__init__(chunk_tokens, max_rows, cost, quantile)
        self._long_tokens = long_tokens or max(1, chunk_tokens // 2)
        self._max_long = max_long
        self._adaptive = adaptive
        self._long: set[str] = set()
        self._long_backlog = Backlog()
        self._long_waiting = Ranked()
        self._long_started = Ranked()

    def rank(self, job: Job) -> float:
        return 0.0

    def expect(self, job: Job, now: float) -> None:
        super().expect(job, now)
        if job.left > self._long_tokens:
            self._long.add(job.key)
            self._long_backlog.add(job)

    def ready(self, key: str, now: float) -> None:
        if key in self._long:
            self._long_waiting.put(key, 0.0)
        else:
            super().ready(key, now)

    def put(self, job: Job) -> None:
        if job.key in self._long:
            self._long_backlog.take(self._jobs[job.key])
            self._long_backlog.add(job)
        super().put(job)

    def drop(self, key: str) -> None:
        if key in self._long:
            self._long_backlog.take(self._jobs[key])
            self._long_started.drop(key)
        super().drop(key)
        self._long.discard(key)

    def leave(self, key: str) -> None:
        super().leave(key)
        self._long_waiting.drop(key)

    def back(self, key: str) -> None:
        if key in self._long:
            self._long_started.put(key, 0.0)
        else:
            super().back(key)

    def wait_s(self, new: int, cached: int, now: float, wanted_s: float = math.inf, suspendable: bool = False) -> float:
        if new > self._long_tokens or not self._long_backlog.tokens:
            return super().wait_s(new, cached, now)
        short = self._backlog.tokens - self._long_backlog.tokens + new
        share = min(self._tokens - 1, self._max_long * self._long_tokens)
        meanwhile = self._long_backlog.share(short * share // (self._tokens - share))
        others = Backlog()
        others.tokens = self._backlog.tokens - self._long_backlog.tokens
        others.twice = self._backlog.twice - self._long_backlog.twice
        others.rows = self._backlog.rows - self._long_backlog.rows
        return self.less_begun(self._pace.seconds(others + meanwhile, new, cached), now)

    def next(self, now: float, start: Start) -> Sequence[Take]:
        step: dict[str, int] = {}
        budget, held = self._tokens, False
        while budget and len(step) < min(self._max_long, self._rows):
            key = self._long_started.pop()
            if key is None:
                key = self._long_waiting.first()
                if key is None:
                    break
                job = start(key)
                if job is None:
                    held = True
                    break
                self.leave(key)
                self.put(job)
            step[key] = min(budget, self._long_tokens, self._jobs[key].left)
            budget -= step[key]
        long = list(step)
        for key, tokens in self.fill(budget, self._rows - len(step), now, start, held):
            step[key] = tokens
            budget -= tokens
        if self._adaptive:
            for key in long:
                more = min(budget, self._jobs[key].left - step[key])
                step[key] += more
                budget -= more
        return self.begin(list(step.items()), now)

    def upcoming(self, now: float) -> Sequence[str]:
        keys = self._long_waiting.first(), self._waiting.first()
        return [key for key in keys if key is not None]

    def check(self) -> None:
        super().check()
        assert self._long_backlog == Backlog(self._jobs[key] for key in self._long)
        for line in (self._long_waiting, self._long_started):
            assert all(key in self._long for key, _ in line.items())

    def document(self) -> dict[str, Any]:
        return {
            **super().document(),
            "long": sorted(self._long),
            "long_waiting": self._long_waiting.items(),
            "long_started": self._long_started.items(),
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        super().restore(document)
        self._long = set(document["long"])
        self._long_backlog = Backlog(self._jobs[key] for key in sorted(self._long))
        self._long_waiting = Ranked(document["long_waiting"])
        self._long_started = Ranked(document["long_started"])
