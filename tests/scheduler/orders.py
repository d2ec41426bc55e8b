"""Plays an order of prefill work against a clock that the cost model moves; what happened is a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scheduler.cost import CostModel
from scheduler.dual_queue import DualQueue
from scheduler.fcfs import Fcfs
from scheduler.hrrn import Hrrn
from scheduler.long_share import LongShare
from scheduler.order import Job, Order, Take
from scheduler.shortest import Shortest

COST = CostModel("test", prefill=((0.010, 0.0, 0.0, 0.0), (0.0, 0.0001, 0.0, 0.0)), decode=((0.01, 0.0, 0.0),))
"""10 ms a step up to 100 tokens, then 0.1 ms a token."""

SLOW = CostModel("slow", prefill=((0.3, 0.0, 0.0, 0.0), (0.0, 0.1, 0.0, 0.0)), decode=((0.3, 0.0, 0.0),))
"""For steps of a few tokens: 0.3 s up to 3, then 0.1 s a token."""

Made = Callable[[int, int, CostModel], Order]
ORDERS: dict[str, Made] = {
    "measured": lambda tokens, rows, cost: Fcfs(tokens, rows),
    "fcfs": Fcfs,
    "shortest": Shortest,
    "hrrn": Hrrn,
    "long share": LongShare,
    "dual queue": DualQueue,
}
"""All orders, by name: of so many tokens and rows a step."""


@dataclass(frozen=True)
class Arrival:
    """A job that is accepted and ready at `at`."""

    at: float
    key: str
    new: int
    wanted_s: float = float("inf")
    cached: int = 0


class Play:
    """A worker with memory for everybody but those in `barred`, whose steps take as long as the cost model says."""

    def __init__(self, order: Order, arrivals: Iterable[Arrival], preempt: bool = False) -> None:
        self.order = order
        self.arrivals = sorted(arrivals, key=lambda each: each.at)
        self.preempt = preempt
        self.jobs: dict[str, Job] = {}
        self.barred: set[str] = set()
        self.now = 0.0
        self.log: list[str] = []
        self.done: dict[str, float] = {}
        self.running: tuple[list[Take], float] | None = None
        self.suspended: tuple[list[Take], float] | None = None
        self.once: list[Take] | None = None
        """The step that was suspended once."""

    def run(self, until: float = 1e9, again: Callable[[], Order] | None = None) -> Play:
        """To the end, or to `until`; `again`: after each event, go on with a fresh order of this one's state."""
        while self.step(until):
            self.order.check()
            if again is not None:
                document = json.loads(json.dumps(self.order.document()))
                self.order = again()
                self.order.restore(document)
                self.order.check()
                assert json.loads(json.dumps(self.order.document())) == document
        return self

    def step(self, until: float) -> bool:
        """The next thing that happens."""
        times = [self.arrivals[0].at] if self.arrivals else []
        if self.running is not None:
            times.append(self.running[1])
        else:
            due = self.order.deadline()
            if due is not None and due > self.now:
                times.append(due)
        if not times or min(times) > until:
            return False
        self.now = max(self.now, min(times))
        came = False
        if self.running is not None and self.running[1] <= self.now:
            self.ended(self.running[0])
        elif self.arrivals and self.arrivals[0].at <= self.now:
            came = True
            each = self.arrivals.pop(0)
            job = Job(each.key, each.new, each.cached, self.now, self.now + each.wanted_s)
            self.jobs[each.key] = job
            self.order.expect(job, self.now)
            self.order.ready(each.key, self.now)
        self.plan()
        if came and self.preempt and self.running and not self.suspended and self.running[0] is not self.once:
            waiter = self.order.overtakes(self.now)
            if waiter is not None:
                step, ends_at = self.running
                self.say(f"{names(step)} suspended for {waiter}")
                self.running, self.suspended, self.once = None, (step, ends_at - self.now), step
                self.order.suspended(step, self.now)
                self.plan()
        return True

    def plan(self) -> None:
        if self.running is not None:
            return
        if self.suspended is not None and self.order.resumes(self.now):
            self.resume()
            return
        step = list(self.order.next(self.now, self.start))
        if step:
            assert len({key for key, _ in step}) == len(step)
            out = {key for key, _ in self.suspended[0]} if self.suspended else set()
            assert not out & {key for key, _ in step}
            rows = [(tokens, self.jobs[key].context) for key, tokens in step]
            assert all(0 < tokens <= self.jobs[key].left for key, tokens in step)
            self.say(f"run {names(step)}")
            self.running = step, self.now + COST.prefill_s(rows)
        elif self.suspended is not None:
            self.resume()

    def resume(self) -> None:
        assert self.suspended is not None
        step, rest_s = self.suspended
        self.say(f"{names(step)} resumed")
        self.running, self.suspended = (step, self.now + rest_s), None
        self.order.resumed(step, self.now)

    def start(self, key: str) -> Job | None:
        return None if key in self.barred else self.jobs[key]

    def ended(self, step: list[Take]) -> None:
        self.running = None
        self.order.ran(step, self.now)
        for key, tokens in step:
            self.jobs[key] = self.jobs[key].after(tokens)
            if not self.jobs[key].left:
                self.done[key] = self.now

    def say(self, what: str) -> None:
        self.log.append(f"{1000 * self.now:g} {what}")


def names(step: Iterable[Take]) -> str:
    return " ".join(f"{key}:{tokens}" for key, tokens in step)
