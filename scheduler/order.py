"""In which order a prefill worker computes: the part of its policy that a researcher replaces.

`PrefillPolicy` keeps the mechanics (offers, grants, memory, hand-off, cancel) and asks an `Order` what to run next. An
order in which one line of jobs is served needs only a `Line` with another `rank` (scheduler/shortest.py). All of it is
pure: no clock, and the same calls give the same answers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from core.errors import LocalError
from core.quick import quick_init
from core.ranked import Ranked
from scheduler.cost import CostModel


@quick_init
@dataclass(frozen=True, slots=True)
class Job:
    """What an order sees of a request; a new value each time something changes."""

    key: str
    new: int
    """Tokens to compute in all, behind the cached ones."""
    cached: int = 0
    """Tokens of its prompt whose KV was in the arena already."""
    accepted_at: float = 0.0
    wanted_by: float = math.inf
    """When its first token is wanted; infinite if nobody said."""
    done: int = 0
    """Of `new`, computed so far."""
    priority: int = 0
    """The caller's hint."""

    @property
    def left(self) -> int:
        """Tokens yet to compute."""
        return self.new - self.done

    @property
    def context(self) -> int:
        """Tokens of its prompt whose KV is there."""
        return self.cached + self.done

    def after(self, tokens: int) -> Job:
        """The same with so many tokens more computed."""
        done = self.done + tokens
        return Job(self.key, self.new, self.cached, self.accepted_at, self.wanted_by, done, self.priority)


Take = tuple[str, int]
"""A job in a step, and how many of its tokens."""
Start = Callable[[str], Job | None]
"""Bind a job's memory, for good. None: not now, because memory or its sink's grant is missing; else what is to be
computed of it, which may be less than was offered if more of its prefix is cached by now."""


class Order(Protocol):
    """Which jobs the next step computes. A job is expected, then ready, then in steps until nothing is left of it.

    Calls cost O(1) or O(log n) in the number of jobs, `check` and `document` apart. An order states whom a job that
    cannot start may be overtaken by, and how long a job may wait at most.
    """

    def expect(self, job: Job, now: float) -> None:
        """The job was accepted; its prompt is on the way."""
        ...

    def ready(self, key: str, now: float) -> None:
        """The prompt of an expected job is here: from now on it may run."""
        ...

    def granted(self, key: str) -> None:
        """A ready job that has not started lacks nothing but memory of this worker: its sink has promised its own."""
        ...

    def drop(self, key: str) -> None:
        """Forget a job that is not wanted any more, even if it is in a step; one that is over already is no error."""
        ...

    def wait_s(self, new: int, cached: int, now: float, wanted_s: float = math.inf, suspendable: bool = False) -> float:
        """Predicted time until a request that comes now has its first token: what is before it and itself, with margin.

        `wanted_s`: it is wanted within that time; `suspendable`: the running step could be suspended for it.
        """
        ...

    def lacks_s(self, new: int, cached: int, now: float, wanted_s: float) -> float:
        """How much time is lacking to take on a request that would have its first token as wanted; 0: none is.

        For those that were accepted, or for more important ones to come.
        """
        ...

    def work_s(self, now: float) -> float:
        """Predicted time for all that is here, the rest of the running step included. O(jobs)."""
        ...

    def next(self, now: float, start: Start) -> Sequence[Take]:
        """What to compute now, as no step is running; nothing if there is nothing, or if it is better to wait.

        Before a job's first step, `start` it. The jobs are the engine's until `ran`, or until they are dropped.
        """
        ...

    def ran(self, step: Sequence[Take], now: float) -> None:
        """A step is over: of those of its jobs that were not dropped, so many tokens more are computed."""
        ...

    def upcoming(self, now: float) -> Sequence[str]:
        """Jobs that will be the next to `start`, a few: their sinks are asked ahead."""
        ...

    def deadline(self) -> float | None:
        """If `next` had nothing because it is better to wait: until when."""
        ...

    def overtakes(self, now: float) -> str | None:
        """A ready job for whose sake the running step should be suspended."""
        ...

    def suspended(self, step: Sequence[Take], now: float) -> None:
        """The running step is suspended: `next` may give another one of other jobs."""
        ...

    def resumes(self, now: float) -> bool:
        """No step is running, and one is suspended: should it go on now, before another one?"""
        ...

    def resumed(self, step: Sequence[Take], now: float) -> None:
        """The suspended step goes on, to its end."""
        ...

    def reprice(self, cost: CostModel) -> None:
        """Predict by this model from now on; what has been promised and who has aged by another one stays."""
        ...

    def check(self) -> None:
        """Raise AssertionError if an invariant does not hold."""
        ...

    def document(self) -> dict[str, Any]:
        """The state as JSON."""
        ...

    def restore(self, document: Mapping[str, Any]) -> None:
        """Take over a state that an order of the same class and settings wrote."""
        ...


class Backlog:
    """What a set of jobs leaves to compute, in the cost model's features; whole numbers, so that nothing drifts."""

    __slots__ = ("rows", "tokens", "twice")

    def __init__(self, jobs: Iterable[Job] = ()) -> None:
        self.tokens = 0
        self.twice = 0
        """Twice the pairs of a query and a key."""
        self.rows = 0
        for job in jobs:
            self.add(job)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Backlog):
            return NotImplemented
        return (self.tokens, self.twice, self.rows) == (other.tokens, other.twice, other.rows)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Backlog) -> Backlog:
        both = Backlog()
        both.tokens, both.twice = self.tokens + other.tokens, self.twice + other.twice
        both.rows = self.rows + other.rows
        return both

    def share(self, tokens: int) -> Backlog:
        """What `tokens` of it are on average; all of it if they are more."""
        if tokens >= self.tokens:
            return self
        part = Backlog()
        part.tokens, part.rows = tokens, self.rows
        part.twice = self.twice * tokens // self.tokens
        return part

    def add(self, job: Job) -> None:
        left = job.new - job.done
        self.tokens += left
        self.twice += left * (2 * (job.cached + job.done) + left)
        self.rows += 1

    def take(self, job: Job) -> None:
        left = job.new - job.done
        self.tokens -= left
        self.twice -= left * (2 * (job.cached + job.done) + left)
        self.rows -= 1


class Pace:
    """How long work takes: by a cost model, with its margin, else by the speed of the full steps so far.

    | parameter | default | unit | meaning |
    |---|---|---|---|
    | chunk_tokens | | tokens | of a full step |
    | cost | none | | without one, times are 0 before the first full step |
    | quantile | 0.9 | share | of steps that take no longer than predicted, by the cost model's own margin |
    """

    def __init__(self, chunk_tokens: int, cost: CostModel | None = None, quantile: float = 0.9) -> None:
        self._chunk = chunk_tokens
        self.cost = cost
        self._quantile = quantile
        self._margin = 1.0 + (cost.margin("prefill", quantile) if cost else 0.0)
        self.tokens_per_s = 0.0
        """Measured; used only without a cost model."""

    def reprice(self, cost: CostModel) -> None:
        """Another model."""
        self.cost = cost
        self._margin = 1.0 + cost.margin("prefill", self._quantile)

    def seconds(self, backlog: Backlog, new: int = 0, cached: int = 0) -> float:
        """To compute a backlog, and `new` tokens behind `cached` ones, in full steps."""
        tokens = backlog.tokens + new
        if self.cost is None:
            return tokens / self.tokens_per_s if self.tokens_per_s else 0.0
        if not tokens:
            return 0.0
        pairs = (backlog.twice + new * (2 * cached + new)) / 2
        rows = backlog.rows + (1 if new else 0)
        steps = -(-tokens // self._chunk)
        longest = 0.0
        for fixed_s, token_s, pair_s, row_s in self.cost.prefill:
            seconds = fixed_s * steps + token_s * tokens + pair_s * pairs + row_s * rows
            if seconds > longest:
                longest = seconds
        return longest * self._margin

    def step_s(self, rows: Sequence[tuple[int, int]]) -> float:
        """One step of (new, cached) rows; 0 without a cost model."""
        return self.cost.prefill_s(rows) * self._margin if self.cost else 0.0

    def measured(self, tokens: int, seconds: float) -> None:
        """A step took so long. A small one is mostly fixed cost: it says nothing of a queue, whose steps are full."""
        if seconds > 0 and 2 * tokens >= self._chunk:
            speed = tokens / seconds
            self.tokens_per_s = 0.8 * self.tokens_per_s + 0.2 * speed if self.tokens_per_s else speed


class Line(ABC):
    """One line: who has started goes on first, in order of starts; then whoever `rank`s lowest starts, and so on.

    The first in line that cannot start ends the step, so nobody who is behind it starts before it. No waiting window,
    no pre-emption. Accepted if all work in line before it is done in time, which is all of it unless a subclass knows
    better (`before`).

    | parameter | default | unit | meaning |
    |---|---|---|---|
    | chunk_tokens | 512 | tokens | most in a step |
    | max_rows | 32 | jobs | most in a step |
    | cost | none | | a cost model; without one, the speed of full steps is measured |
    | quantile | 0.9 | share | of steps no longer than predicted, for the margin |
    """

    def __init__(
        self, chunk_tokens: int = 512, max_rows: int = 32, cost: CostModel | None = None, quantile: float = 0.9
    ) -> None:
        self._tokens = chunk_tokens
        self._rows = max_rows
        self._pace = Pace(chunk_tokens, cost, quantile)
        self._jobs: dict[str, Job] = {}
        self._backlog = Backlog()
        self._waiting = Ranked()
        self._started = Ranked()
        self._began_at = 0.0
        self._step_s = 0.0
        """Of the running step, as predicted; 0 if none is."""

    @abstractmethod
    def rank(self, job: Job) -> float:
        """Of a job that waits for its start: the lowest goes first, equal ones in order of their prompts."""

    def before(self, new: int) -> Backlog:
        """What is computed before a request of `new` tokens that comes now."""
        return self._backlog

    def expect(self, job: Job, now: float) -> None:
        self._jobs[job.key] = job
        self._backlog.add(job)

    def ready(self, key: str, now: float) -> None:
        self._waiting.put(key, self.rank(self._jobs[key]))

    def drop(self, key: str) -> None:
        job = self._jobs.get(key)
        if job is not None:
            self.leave(key)
            self._started.drop(key)
            self._backlog.take(job)
            del self._jobs[key]

    def wait_s(self, new: int, cached: int, now: float, wanted_s: float = math.inf, suspendable: bool = False) -> float:
        return self.less_begun(self._pace.seconds(self.before(new), new, cached), now)

    def lacks_s(self, new: int, cached: int, now: float, wanted_s: float) -> float:
        return 0.0

    def work_s(self, now: float) -> float:
        return self.less_begun(self._pace.seconds(self._backlog), now)

    def less_begun(self, seconds: float, now: float) -> float:
        """Less what the running step, which is in the backlog, has behind it."""
        return max(0.0, seconds - min(self._step_s, now - self._began_at)) if self._step_s else seconds

    def next(self, now: float, start: Start) -> Sequence[Take]:
        return self.begin(self.fill(self._tokens, self._rows, now, start), now)

    def fill(self, tokens: int, rows: int, now: float, start: Start, held: bool = False) -> list[Take]:
        """Jobs for so many tokens and rows: the started, then, unless those who wait are `held` back, the line."""
        step: list[Take] = []
        while tokens and len(step) < rows:
            key = self._started.pop()
            if key is None:
                key = None if held else self.head(now)
                job = None if key is None else start(key)
                if key is None or job is None:
                    break
                self.leave(key)
                self.put(job)
            count = min(tokens, self._jobs[key].left)
            step.append((key, count))
            tokens -= count
        return step

    def begin(self, step: list[Take], now: float) -> list[Take]:
        """A step begins now, if there is something in it."""
        if step:
            self._began_at = now
            self._step_s = self._pace.step_s([(tokens, self._jobs[key].context) for key, tokens in step])
        return step

    def head(self, now: float) -> str | None:
        """Who starts next."""
        return self._waiting.first()

    def leave(self, key: str) -> None:
        """A job starts or is dropped: it waits no more, if it did."""
        self._waiting.drop(key)

    def put(self, job: Job) -> None:
        """The facts of a job that has started, as they are now."""
        self._backlog.take(self._jobs[job.key])
        self._backlog.add(job)
        self._jobs[job.key] = job

    def back(self, key: str) -> None:
        """A job comes back from a step, and is not over."""
        self._started.put(key, 0.0)

    def ran(self, step: Sequence[Take], now: float) -> None:
        self._step_s = 0.0
        count, known = 0, False
        for key, tokens in step:
            count += tokens
            job = self._jobs.get(key)
            if job is not None:
                known = True
                if tokens == job.left:
                    self.drop(key)
                else:
                    self.put(job.after(tokens))
                    self.back(key)
        if known:
            self._pace.measured(count, now - self._began_at)

    def upcoming(self, now: float) -> Sequence[str]:
        key = self.head(now)
        return () if key is None else (key,)

    def deadline(self) -> float | None:
        return None

    def overtakes(self, now: float) -> str | None:
        return None

    def granted(self, key: str) -> None:  # noqa: B027 - it may stay as it is
        """A line is kept whatever was promised to whom: sinks are asked in its order."""

    def suspended(self, step: Sequence[Take], now: float) -> None:
        """Nothing asks for it here."""
        raise LocalError(f"{type(self).__name__} suspends no step")

    def resumes(self, now: float) -> bool:
        return True

    def resumed(self, step: Sequence[Take], now: float) -> None:
        """Nothing asks for it here."""
        raise LocalError(f"{type(self).__name__} suspends no step")

    def reprice(self, cost: CostModel) -> None:
        self._pace.reprice(cost)

    def check(self) -> None:
        assert self._backlog == Backlog(self._jobs.values())
        for line in (self._waiting, self._started):
            assert all(key in self._jobs for key, _ in line.items())
        assert all(job.left > 0 for job in self._jobs.values())

    def document(self) -> dict[str, Any]:
        return {
            "jobs": [asdict(job) for job in self._jobs.values()],
            "waiting": self._waiting.items(),
            "started": self._started.items(),
            "began_at": self._began_at,
            "step_s": self._step_s,
            "tokens_per_s": self._pace.tokens_per_s,
            "cost": self._pace.cost.document() if self._pace.cost else None,
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        self._jobs = {each["key"]: Job(**each) for each in document["jobs"]}
        self._backlog = Backlog(self._jobs.values())
        self._waiting, self._started = Ranked(document["waiting"]), Ranked(document["started"])
        self._began_at, self._step_s = document["began_at"], document["step_s"]
        self._pace.tokens_per_s = document["tokens_per_s"]
        if document["cost"] is not None:
            self.reprice(CostModel.of(document["cost"]))
