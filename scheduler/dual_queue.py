"""Two queues by new tokens: short prefills gather into batches, long ones run in chunks meanwhile. Pure.

After LAPS (the length boundary of its cost model, and algorithm 1 for the window) and FlowPrefill (S-EDF: who can be in
time by deadline, who cannot last; suspension of a running step for an urgent request).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from core.ranked import Ranked
from scheduler.cost import CostModel
from scheduler.gather import LENGTHS, Gather, GatherSettings, Grouping
from scheduler.order import Backlog, Job, Pace, Start, Take


@dataclass(frozen=True, slots=True)
class DualQueueSettings:
    """What `DualQueue` can be told, beside its step's size.

    | setting | default | unit | meaning |
    |---|---|---|---|
    | short_tokens | knee of the cost model | new tokens | up to which a job is short |
    | gather | `GatherSettings` | | window, depth and batches of the short ones |
    | fill | true | | a short step below the knee takes tokens of a long job along: its time is the weights' |
    | quantile | 0.9 | share | of steps no longer than predicted, for the cost model's margin |
    | easy_s | 10 | s | a job without a deadline is treated as if it had one so long after it was accepted |
    | stretch | 4 | | nobody ages before so many times the own time alone |
    | grace_s | 1 | s | and so long after the deadline |
    | headroom | 8 | | a long job leaves so many times its own time free in a line as long as it may wait; see below |
    | load_s | 10 | s | over which the short ones' share of the worker's time is averaged |
    | suspend_s | 0.005 | s | until a step that was asked to stop has stopped: one operator |
    | margin | 1.5 | | a step that will be in time is suspended only if it can spare so many times the waiter's time |
    | rest_share | 0.1 | share | of a step: with less than this to go, it is not suspended |
    """

    short_tokens: int | None = None
    gather: GatherSettings = field(default_factory=GatherSettings)
    fill: bool = True
    quantile: float = 0.9
    easy_s: float = 10.0
    stretch: float = 4.0
    grace_s: float = 1.0
    headroom: float = 8.0
    load_s: float = 10.0
    suspend_s: float = 0.005
    margin: float = 1.5
    rest_share: float = 0.1


def knee(cost: CostModel, cached: int = 0) -> int:
    """New tokens from which a step's time grows with them: where another line than that of one token is on top.

    LAPS's L_m. It is no more than what takes twice as long as a step without any: a line that lies on top of the others
    at all lengths that occur, as one that a busy machine taught may, still grows.
    """

    def line_s(line: tuple[float, float, float, float], new: int) -> float:
        return line[0] + line[1] * new + line[2] * new * (cached + new / 2) + line[3]

    floor = max(cost.prefill, key=lambda line: line_s(line, 1))
    fixed_s = line_s(floor, 0)

    def beyond(new: int) -> bool:
        top = cost.prefill_s([(new, cached)])
        return top > line_s(floor, new) * (1 + 1e-9) or top >= 2 * fixed_s

    low, high = 1, 1 << 20
    while low < high:
        middle = (low + high) // 2
        if beyond(middle):
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(slots=True)
class _Out:
    """A step that was begun: running, or suspended."""

    step: list[Take]
    began_at: float
    ends_at: float
    rest_s: float
    """From its suspension on."""
    short: bool


class DualQueue:
    """Short jobs first while the long ones can spare it, and everybody in the end.

    **Who is next.** Each job has a deadline. While it can still be met the job is *rescuable*; afterwards it is *late*.
    In this order:

    1. whoever has aged, the oldest age first (below);
    2. a short batch that is complete (`Gather`), unless the long jobs could not wait that long: then whichever of the
       two could not wait for the other, and if that is both, the earlier deadline;
    3. rescuable long jobs by deadline, a chunk a step. While short ones gather, a chunk ends with their window, but is
       never shorter than the knee;
    4. late jobs.

    What is left of a long step's tokens goes to other long ones as long as that saves all who wait more than it costs
    those in the step, who get no token before its end; a short step below the knee is filled up with a long
    one's. **Ages**: a job ages `grace_s` after its deadline and `stretch` times its own time after its acceptance,
    whichever is later. From then on no job that ages later is the first of a step as long as this one can start, and
    none starts at all while it lacks memory of this worker. So, once its sink has promised its own, its last chunk ends
    at the latest when everything that had aged by then is computed, and one step and one suspended one: nobody starves.
    Until then those start who have the promises of theirs: what was promised them may be what it waits for. A long job
    that cannot start is overtaken by short ones until it has aged, and by these later.

    **Accepted** is a short job if the short ones before it, the window and its own step are done in time; a long one
    if with it in line by deadline all long ones are, at the share of time that the short ones leave, and have time to
    spare: `headroom` times what it takes alone, times the square of (its wait / the wait that is allowed). So time
    that is scarce goes to those who need little of it, as trunk reservation has it in networks of calls; an idle worker
    takes whatever it can finish. (Moore's rule, which drops the longest of a line that is too long, finishes the most
    in time; here nobody is dropped who was accepted, so the longest are not let in.)

    **Suspended** is a running long step for the most urgent short job (FlowPrefill's cases): never if that one is
    late in any case or in time behind the step; if the step's own job is late, always; else if it can spare `margin`
    times what the waiter takes. It goes on as soon as no rescuable short one would be late behind it, or it has aged;
    then it runs to its end.
    """

    def __init__(
        self,
        chunk_tokens: int,
        max_rows: int,
        cost: CostModel,
        settings: DualQueueSettings | None = None,
    ) -> None:
        self._set = settings = settings or DualQueueSettings()
        self._tokens = chunk_tokens
        self._rows = max_rows
        self._pace = Pace(chunk_tokens, cost, settings.quantile)
        self._bounds(cost)
        self._jobs: dict[str, Job] = {}
        self._short: set[str] = set()
        self._begun: set[str] = set()
        """Started, and not over."""
        self._gather = Gather(settings.gather, self._pace, chunk_tokens, max_rows)
        self._long = Ranked()
        """Rescuable long jobs in line, by deadline."""
        self._late = Ranked()
        """Late jobs in line, by age."""
        self._ages = Ranked()
        """All jobs in line, by age."""
        self._going = Ranked()
        """Those in line that have begun, by age."""
        self._granted = Ranked()
        """Those in line that have not begun and lack nothing but memory here, by age."""
        self._short_backlog = Backlog()
        """Of short jobs that are not late, what is in no step."""
        self._wanted: list[tuple[float, str]] = []
        """Of long jobs that are not late, deadlines and keys in order; those on the way and in steps as well."""
        self._counted: dict[str, tuple[bool, Job]] = {}
        """Whether a job counts as a short one, and what of it is in no step."""
        self._running: _Out | None = None
        self._suspended: _Out | None = None
        self._load = 0.0
        self._load_at = 0.0

    def _bounds(self, cost: CostModel) -> None:
        self._knee = min(max(knee(cost), LENGTHS[0]), self._tokens)
        self._floor_s = self._pace.seconds(_NOTHING, self._knee)
        self.short_tokens = min(self._set.short_tokens or self._knee, self._tokens)

    def reprice(self, cost: CostModel) -> None:
        """Who is short, or has an age, stays so; `Gather` shares the pace."""
        self._pace.reprice(cost)
        self._bounds(cost)

    # What comes and goes.
    def expect(self, job: Job, now: float) -> None:
        job = self._due(job)
        self._jobs[job.key] = job
        if job.left <= self.short_tokens:
            self._short.add(job.key)
        self._count(job)

    def ready(self, key: str, now: float) -> None:
        self._line_up(self._jobs[key], now)

    def granted(self, key: str) -> None:
        if key in self._ages and key not in self._begun:
            self._granted.put(key, self._ages.rank(key))

    def drop(self, key: str) -> None:
        if key in self._jobs:
            self._unline(key)
            self._uncount(key)
            self._short.discard(key)
            self._begun.discard(key)
            del self._jobs[key]

    def ran(self, step: Sequence[Take], now: float) -> None:
        self._running = None
        for key, tokens in step:
            job = self._jobs.get(key)
            if job is not None:
                if tokens == job.left:
                    self.drop(key)
                else:
                    # Only if more of its prefix was gone than the offer said is a short job not over by now.
                    self._short.discard(key)
                    self._jobs[key] = job = job.after(tokens)
                    self._line_up(job, now)

    # Predictions.
    def wait_s(self, new: int, cached: int, now: float, wanted_s: float = math.inf, suspendable: bool = False) -> float:
        rest_s = max(0.0, self._running.ends_at - now) if self._running else 0.0
        if new > self.short_tokens:
            return self._by_deadline(now, self._due(Job("", new, cached, now, now + wanted_s)))[0]
        own_s = self._pace.seconds(self._short_backlog, new, cached)
        if suspendable and rest_s > self._set.suspend_s and self._can_spare(own_s, now):
            rest_s = self._set.suspend_s
        key = self._long.first()
        if key is not None:
            job = self._jobs[key]
            if job.wanted_by - now - self._alone_s(job) < rest_s + own_s:
                rest_s += self._chunk_s(job)
        return max(rest_s, self._gather.longest) + own_s

    def work_s(self, now: float) -> float:
        return self._rest_s(now) + self._pace.seconds(Backlog(job for _, job in self._counted.values()))

    def lacks_s(self, new: int, cached: int, now: float, wanted_s: float) -> float:
        if new <= self.short_tokens or wanted_s == math.inf:
            return 0.0
        own = self._due(Job("", new, cached, now, now + wanted_s))
        own_s, slack_s = self._by_deadline(now, own)
        alone_s = self._alone_s(own)
        filled = min(1.0, (own_s - alone_s) / wanted_s) if wanted_s > 0 else 1.0
        return max(0.0, self._set.headroom * filled**2 * alone_s - slack_s)

    # Steps.
    def next(self, now: float, start: Start) -> Sequence[Take]:
        if not self._ages:
            return ()
        self._settle(now)

        def begin(key: str) -> Job | None:
            job = start(key)
            return None if job is None else self._due(job)

        first, key = self._gather.first(), self._long.first()
        if self._suspended is not None:
            return self._short_step(first, now, begin) if first is not None else ()
        aged = self._ages.first()
        if aged is not None and self._ages.rank(aged) <= now:
            job = self._jobs[aged]
            step = self._short_step(job, now, begin) if aged in self._gather else self._long_step(job, now, begin)
            return step or self._go_on(aged, now, begin)
        long = None if key is None else self._jobs[key]
        # A chunk is no shorter than the knee: the window may as well end now if it does before half of that.
        almost = now + self._floor_s / 2 if long is not None else now
        complete = first is not None and self._gather.closed(almost)
        if first is not None and complete and (long is None or self._goes_before(first, long, now)):
            return self._short_step(first, now, begin) or self._go_on(first.key, now, begin)
        if long is not None:
            step = self._long_step(long, now, begin)
            if not step and first is not None and complete:
                step = self._short_step(first, now, begin)
            return step or self._go_on(long.key, now, begin)
        late = self._late.first()
        if late is not None:
            return self._long_step(self._jobs[late], now, begin) or self._go_on(late, now, begin)
        return ()

    def upcoming(self, now: float) -> Sequence[str]:
        if not self._ages:
            return ()
        first, key = self._gather.first(), self._long.first() or self._late.first()
        keys = [first.key] if first is not None and first.key not in self._begun else []
        return [*keys, key] if key is not None and key not in self._begun else keys

    def deadline(self) -> float | None:
        return self._gather.closes_at

    # Suspension.
    def overtakes(self, now: float) -> str | None:
        self._settle(now)
        first, running = self._gather.first(), self._running
        if first is None or running is None:
            return None
        own_s = self._gather.batch_s()
        doomed = now + self._set.suspend_s + own_s > first.wanted_by
        if doomed or running.ends_at + own_s <= first.wanted_by or not self._can_spare(own_s, now):
            return None
        return first.key

    def suspended(self, step: Sequence[Take], now: float) -> None:
        out, self._running = self._running, None
        assert out is not None
        out.rest_s = max(0.0, out.ends_at - now)
        self._suspended = out

    def resumes(self, now: float) -> bool:
        out = self._suspended
        assert out is not None
        self._settle(now)
        first = self._gather.first()
        jobs = [self._jobs[key] for key, _ in out.step if key in self._jobs]
        if first is None or not jobs or self._ages.lowest() <= now:
            return True
        own_s = self._gather.batch_s()
        if now + out.rest_s + own_s <= first.wanted_by:
            return True
        for job in jobs:
            slack_s = job.wanted_by - now - self._alone_s(job)
            if self._age(job) <= now or 0 <= slack_s < own_s:
                return True
        return False

    def resumed(self, step: Sequence[Take], now: float) -> None:
        out, self._suspended = self._suspended, None
        assert out is not None
        out.ends_at = now + out.rest_s
        self._running = out

    # Truth.
    def check(self) -> None:
        self._gather.check()
        line = [*(key for key, _ in self._long.items()), *(key for key, _ in self._late.items())]
        gathered = [key for key in self._jobs if key in self._gather]
        assert sorted([*line, *gathered]) == sorted(key for key, _ in self._ages.items())
        assert len(gathered) == len(self._gather)
        assert {key for key, _ in self._going.items()} == {key for key, _ in self._ages.items()} & self._begun
        out = {key for each in (self._running, self._suspended) if each is not None for key, _ in each.step}
        assert not out & {key for key, _ in self._ages.items()}, "in a step and in line"
        granted = {key for key, _ in self._granted.items()}
        assert granted <= {key for key, _ in self._ages.items()} - self._begun
        assert self._short <= self._jobs.keys()
        assert self._begun <= self._jobs.keys()
        assert self._counted.keys() <= self._jobs.keys()
        assert self._short_backlog == Backlog(job for short, job in self._counted.values() if short)
        assert self._wanted == sorted((job.wanted_by, job.key) for short, job in self._counted.values() if not short)

    def document(self) -> dict[str, Any]:
        return {
            "jobs": [asdict(job) for job in self._jobs.values()],
            "short": sorted(self._short),
            "begun": sorted(self._begun),
            "gather": self._gather.document(),
            "long": self._long.items(),
            "late": self._late.items(),
            "ages": self._ages.items(),
            "going": self._going.items(),
            "granted": self._granted.items(),
            "counted": [[short, asdict(job)] for short, job in self._counted.values()],
            "running": asdict(self._running) if self._running else None,
            "suspended": asdict(self._suspended) if self._suspended else None,
            "load": [self._load, self._load_at],
            "cost": self._pace.cost.document() if self._pace.cost else None,
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        if document["cost"] is not None:
            self.reprice(CostModel.of(document["cost"]))
        self._jobs = {each["key"]: Job(**each) for each in document["jobs"]}
        self._short, self._begun = set(document["short"]), set(document["begun"])
        self._gather.restore(document["gather"])
        self._long, self._late = Ranked(document["long"]), Ranked(document["late"])
        self._ages, self._going = Ranked(document["ages"]), Ranked(document["going"])
        self._granted = Ranked(document["granted"])
        self._short_backlog, self._wanted, self._counted = Backlog(), [], {}
        for short, each in document["counted"]:
            self._count_as(short, Job(**each))
        self._running, self._suspended = _out(document["running"]), _out(document["suspended"])
        self._load, self._load_at = document["load"]

    # The line.
    def _due(self, job: Job) -> Job:
        if job.wanted_by < math.inf:
            return job
        wanted_by = job.accepted_at + self._set.easy_s
        return Job(job.key, job.new, job.cached, job.accepted_at, wanted_by, job.done, job.priority)

    def _age(self, job: Job) -> float:
        """When it will have aged; the same before and after each of its chunks."""
        alone_s = self._pace.seconds(_NOTHING, job.new, job.cached)
        return max(job.wanted_by, job.accepted_at + self._set.stretch * alone_s) + self._set.grace_s

    def _alone_s(self, job: Job) -> float:
        return self._pace.seconds(_NOTHING, job.left, job.context)

    def _chunk_s(self, job: Job) -> float:
        return self._pace.seconds(_NOTHING, min(job.left, self._tokens), job.context)

    def _line_up(self, job: Job, now: float) -> None:
        age = self._age(job)
        self._ages.put(job.key, age)
        if job.key in self._begun:
            self._going.put(job.key, age)
        if job.key in self._short:
            self._gather.add(job, now)
        else:
            self._long.put(job.key, job.wanted_by)

    def _unline(self, key: str) -> None:
        if self._ages.drop(key):
            self._going.drop(key)
            self._granted.drop(key)
            self._gather.drop(key)
            self._long.drop(key)
            self._late.drop(key)

    def _settle(self, now: float) -> None:
        """Whoever cannot be in time any more goes behind all who can; once each, as nobody gets more time."""
        while (first := self._gather.first()) is not None and now + self._alone_s(first) > first.wanted_by:
            self._gather.drop(first.key)
            self._short.discard(first.key)
            self._put_off(first.key)
        while (key := self._long.first()) is not None:
            job = self._jobs[key]
            if now + self._alone_s(job) <= job.wanted_by:
                break
            self._long.drop(key)
            self._put_off(key)

    def _put_off(self, key: str) -> None:
        self._late.put(key, self._ages.rank(key))
        self._uncount(key)

    def _goes_before(self, first: Job, long: Job, now: float) -> bool:
        """Does the short batch go before the long job's next chunk?"""
        batch_s = self._gather.batch_s()
        if self._by_deadline(now)[1] >= batch_s:
            return True
        if first.wanted_by - now - batch_s >= self._chunk_s(long):
            return False
        return first.wanted_by <= long.wanted_by

    # Building a step.
    def _short_step(self, anchor: Job, now: float, start: Start) -> list[Take]:
        count, complete = len(self._gather), self._gather.closed(now + self._floor_s / 2)
        chosen, held = self._gather.batch(anchor, now, start, self._begun, self._tokens, self._rows)
        step = [self._take(job, tokens) for job, tokens in chosen]
        if not step:
            return step
        if complete:
            self._gather.dispatched(count, now)
        room = self._knee - sum(tokens for _, tokens in step)
        ragged = self._set.gather.grouping is Grouping.RAGGED
        if room > 0 and self._set.fill and ragged and not held and self._suspended is None and len(step) < self._rows:
            key = self._long.first() or self._late.first()
            job = None if key is None else self._started(self._jobs[key], start)
            if job is not None:
                step.append(self._take(job, min(room, job.left)))
        return self._begin(step, now, short=True)

    def _long_step(self, anchor: Job, now: float, start: Start) -> list[Take]:
        budget = self._tokens
        closes_at = self._gather.closes_at
        if closes_at is not None and closes_at > now:
            budget = max(self._knee, self._within(closes_at - now, anchor))
        step: list[Take] = []
        key: str | None = anchor.key
        rows: list[tuple[int, int]] = []
        while key is not None and budget and len(step) < self._rows:
            job = self._jobs[key]
            tokens = min(budget, job.left)
            if step and not self._worth_waiting(rows, tokens, job.context):
                break
            fresh = self._started(job, start)
            if fresh is None:
                break
            step.append(self._take(fresh, min(budget, fresh.left)))
            rows.append((step[-1][1], fresh.context))
            budget -= step[-1][1]
            key = self._long.first() or self._late.first()
        return self._begin(step, now, short=False)

    def _worth_waiting(self, rows: list[tuple[int, int]], tokens: int, context: int) -> bool:
        """Whether those of a step should wait for another one's tokens in it, in seconds of all who wait.

        In a step of their own those take longer by what a step costs however few its tokens are: that is saved for
        whom they belong to and for all behind it.
        """
        alone_s, step_s = self._pace.step_s([(tokens, context)]), self._pace.step_s(rows)
        longer_s = self._pace.step_s([*rows, (tokens, context)]) - step_s
        behind = len(self._long) + len(self._late)
        return behind * (alone_s - longer_s) >= len(rows) * longer_s

    def _go_on(self, head: str, now: float, start: Start) -> list[Take]:
        """Whoever should be next cannot start: those who have begun go on, so that their memory becomes free.

        If it may lack the promise of its sink, those who have theirs start as well. What they were promised could be
        what it waits for, and somebody elsewhere could hold what they wait for: nobody would ever go on.
        """
        step: list[Take] = []
        budget = self._tokens
        while budget and len(step) < self._rows and (key := self._going.first()) is not None:
            job = self._jobs[key]
            step.append(self._take(job, min(budget, job.left)))
            budget -= step[-1][1]
        while budget and len(step) < self._rows and head not in self._granted:
            key = self._granted.first()
            fresh = None if key is None else self._started(self._jobs[key], start)
            if fresh is None:
                break
            step.append(self._take(fresh, min(budget, fresh.left)))
            budget -= step[-1][1]
        return self._begin(step, now, short=False)

    def _started(self, job: Job, start: Start) -> Job | None:
        if job.key in self._begun:
            return job
        fresh = start(job.key)
        if fresh is not None:
            self._begun.add(job.key)
        return fresh

    def _take(self, job: Job, tokens: int) -> Take:
        """Out of the line, into a step; what is left of it stays in the backlog."""
        key = job.key
        late = key in self._late
        self._unline(key)
        self._uncount(key)
        self._jobs[key] = job
        if tokens < job.left and not late:
            self._count(job.after(tokens))
        return key, tokens

    def _begin(self, step: list[Take], now: float, short: bool) -> list[Take]:
        if step:
            step_s = self._pace.step_s([(tokens, self._jobs[key].context) for key, tokens in step])
            self._running = _Out(step, now, now + step_s, 0.0, short)
            if short:
                self._load = self._load_at_time(now) + step_s / self._set.load_s
                self._load_at = now
        return step

    def _within(self, seconds: float, job: Job) -> int:
        """The most tokens of a chunk that takes no longer."""
        low, high = 0, self._tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self._pace.seconds(_NOTHING, middle, job.context) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def _can_spare(self, own_s: float, now: float) -> bool:
        """May the running step be suspended for somebody who takes so long?"""
        out = self._running
        if out is None or out.short or out.ends_at - now <= self._set.rest_share * (out.ends_at - out.began_at):
            return False
        for key, tokens in out.step:
            job = self._jobs.get(key)
            if job is None:
                continue
            slack_s = job.wanted_by - out.ends_at - (self._alone_s(job.after(tokens)) if tokens < job.left else 0.0)
            if self._age(job) <= now or 0 <= slack_s < self._set.margin * (own_s + self._set.suspend_s):
                return False
        return True

    def _load_at_time(self, now: float) -> float:
        """Share of the time that short steps take, lately."""
        return self._load * math.exp(-(now - self._load_at) / self._set.load_s)

    # What is yet to compute.
    def _rest_s(self, now: float) -> float:
        """Of the running step, and of the suspended one."""
        rest_s = max(0.0, self._running.ends_at - now) if self._running else 0.0
        return rest_s if self._suspended is None else rest_s + self._suspended.rest_s

    def _by_deadline(self, now: float, own: Job | None = None) -> tuple[float, float]:
        """Seconds until `own` is computed if the long jobs go by deadline, and the least slack of any of them with it.

        They have the time that short ones leave. O(long jobs), of which there are no more than can be in time.
        """
        rest_s = self._rest_s(now)
        free = 1.0 - min(0.9, self._load_at_time(now))
        total, own_s, least_s = Backlog() + self._short_backlog, 0.0, math.inf
        wanted = self._wanted
        at = len(wanted) if own is None else bisect_right(wanted, own.wanted_by, key=lambda each: each[0])
        for wanted_by, key in wanted[:at]:
            total.add(self._counted[key][1])
            least_s = min(least_s, wanted_by - now - (rest_s + self._pace.seconds(total)) / free)
        if own is not None:
            total.add(own)
            own_s = (rest_s + self._pace.seconds(total)) / free
            least_s = min(least_s, own.wanted_by - now - own_s)
            for wanted_by, key in wanted[at:]:
                total.add(self._counted[key][1])
                least_s = min(least_s, wanted_by - now - (rest_s + self._pace.seconds(total)) / free)
        return own_s, least_s

    def _count(self, job: Job) -> None:
        self._count_as(job.key in self._short, job)

    def _count_as(self, short: bool, job: Job) -> None:
        self._counted[job.key] = short, job
        if short:
            self._short_backlog.add(job)
        else:
            insort(self._wanted, (job.wanted_by, job.key))

    def _uncount(self, key: str) -> None:
        counted = self._counted.pop(key, None)
        if counted is None:
            return
        short, job = counted
        if short:
            self._short_backlog.take(job)
        else:
            del self._wanted[bisect_left(self._wanted, (job.wanted_by, job.key))]


_NOTHING = Backlog()


def _out(document: Mapping[str, Any] | None) -> _Out | None:
    if document is None:
        return None
    return _Out(**{**document, "step": [(key, tokens) for key, tokens in document["step"]]})
