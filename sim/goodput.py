"""Goodput: the highest rate at which enough of the requests that arrive are good.

A request is good as `sim/outcome.py` says: first token and 99th percentile of its gaps within their goals; rejected and
failed ones are misses. "By mean" is the same with the mean of the gaps, as papers count. DistServe
(section 2.2) and its successors report this figure per GPU.

Each seed is searched on its own: from a start the rate doubles while the goal is met (or halves until it is), then the
octave is bisected on a fixed grid of rates. What is found is an edge: the goal is met there and missed one step of the
grid above. Attainment need not fall with the rate: with other rates other requests meet, and a seed that is lucky above
its edge is not looked at there. That noise is left in, and shows as the spread over seeds; lengths and order should be
the same for all rates of a seed, so that rates are compared on one draw. Both ways of counting walk the same grid, so
they share runs. At most 2 x (1 + OCTAVES + steps in an octave, by halving) runs a seed: 34 at 2 %; about 10 as a rule.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.errors import SetupError
from scheduler.policies import Policy
from sim.fleet import Build
from sim.outcome import Outcome
from sim.run import Settings, simulate
from sim.scenario import CALM, Scenario
from sim.workload import Workload, bad

Make = Callable[[float, int], Workload]
"""A workload of a rate and a seed."""

LEAST = 1000
"""Requests that a share is taken of, unless a steady window is cut out."""
OCTAVES = 10
"""The search ends at 2 to this power times its start, and at its start over that."""
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t, 97.5 % of it below, for 1 to 30 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What is searched for.

    | field | default | unit | meaning |
    |---|---|---|---|
    | share | 0.9 | | of the judged requests that must be good |
    | precision | 0.02 | | the next rate of the grid is at most this share higher |
    | warm_s | 0 | s | requests that arrive this early are simulated and not judged |
    | cool_s | 0 | s | nor those that arrive this shortly before the last nominal arrival |
    | least | None | requests | judged at least; None: LEAST, or 1 where a window is cut |
    """

    share: float = 0.9
    precision: float = 0.02
    warm_s: float = 0.0
    cool_s: float = 0.0
    least: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise bad("share", self.share, "above 0, at most 1")
        if not 0 < self.precision < 1:
            raise bad("precision", self.precision, "above 0, below 1")
        for field in ("warm_s", "cool_s"):
            if not 0 <= getattr(self, field) < math.inf:
                raise bad(field, getattr(self, field), "a finite time of at least 0 s")

    @property
    def wanted(self) -> int:
        """Requests that must be judged for a share to count."""
        if self.least is not None:
            return self.least
        return 1 if self.warm_s or self.cool_s else LEAST


@dataclass(frozen=True, slots=True)
class Trial:
    """One run at one rate."""

    rate: float
    """As asked for, in what the workload counts a second: requests, or sessions."""
    seed: int
    judged: int
    attained: float
    """Share of the judged that were good."""
    attained_by_mean: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure over seeds."""

    values: tuple[float, ...]
    mean: float
    half: float | None
    """Half of the mean's 95 % confidence interval (Student's t); None for a single seed."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of at least one value."""
        if not values:
            raise bad("values", values, "at least one")
        count, mean = len(values), math.fsum(values) / len(values)
        half = None if count == 1 else student(count - 1) * statistics.stdev(values) / math.sqrt(count)
        return cls(tuple(values), mean, half)


@dataclass(frozen=True, slots=True)
class Edge:
    """Where a search ended."""

    rate: float
    """The goal is met here; 0 if it was met nowhere."""
    above: float | None
    """The goal is missed here; None if it was met wherever the search went."""


@dataclass(frozen=True, slots=True)
class Goodput:
    """What a policy sustains; rates as in `Trial`."""

    rate: Estimate
    rate_by_mean: Estimate
    edges: tuple[Edge, ...]
    """By seed."""
    edges_by_mean: tuple[Edge, ...]
    trials: tuple[Trial, ...]
    """All runs, by seed and then by rate."""
    devices: int


def student(freedom: int) -> float:
    """Student's t, 97.5 % of it below: a table, then the expansion about the normal quantile (to 0.0001)."""
    if freedom < 1:
        raise bad("freedom", freedom, "at least 1")
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def edge(holds: Callable[[float], bool], start: float, precision: float = 0.02) -> Edge:
    """A rate that holds where the next one, at most `precision` above, does not; each rate is asked for once.

    Only rates `start` * 2**(i / n) are asked for, n being a power of two, so that two searches from one start ask for
    the same ones. At most 1 + OCTAVES + log2(n) questions.
    """
    if not 0 < start < math.inf:
        raise bad("start", start, "a finite rate above 0")
    parts = 1
    while 2 ** (1 / parts) - 1 > precision:
        parts *= 2

    def rate(index: int) -> float:
        return start * math.pow(2.0, index / parts)

    low = high = 0
    if holds(start):
        while low == high:
            if high == OCTAVES * parts:
                return Edge(rate(low), None)
            high += parts
            if holds(rate(high)):
                low = high
    else:
        while low == high:
            if low == -OCTAVES * parts:
                return Edge(0.0, rate(low))
            low -= parts
            if not holds(rate(low)):
                high = low
    while high - low > 1:
        middle = (low + high) // 2
        if holds(rate(middle)):
            low = middle
        else:
            high = middle
    return Edge(rate(low), rate(high))


def trial(
    make: Make,
    rate: float,
    seed: int,
    builds: Sequence[Build],
    policy: Policy,
    settings: Settings,
    goal: Goal = Goal(),
    *,
    scenario: Scenario = CALM,
    over: Callable[[Outcome], None] | None = None,
) -> Trial:
    """Run the workload of that rate and seed, and count who is good among those that arrive inside the goal's window.

    SetupError if the window holds fewer than the goal wants. `over` gets every outcome, judged or not.
    """
    workload = make(rate, seed)
    if not workload.arrivals:
        raise SetupError(f"requests: got none at {rate:g}/s, want at least {goal.wanted}")
    since = workload.arrivals[0].at_s + goal.warm_s
    until = workload.arrivals[-1].at_s - goal.cool_s if goal.cool_s else math.inf
    judged = good = good_by_mean = 0

    def count(one: Outcome) -> None:
        nonlocal judged, good, good_by_mean
        if since <= one.at_s <= until:
            judged += 1
            good += one.good
            good_by_mean += one.good_by_mean
        if over is not None:
            over(one)

    simulate(workload, builds, policy, settings, scenario=scenario, over=count)
    if judged < goal.wanted:
        raise SetupError(
            f"requests: got {judged} to judge at {rate:g}/s, want at least {goal.wanted}, "
            "or a steady window cut out by a time at the begin or at the end"
        )
    return Trial(rate, seed, judged, good / judged, good_by_mean / judged)


def search(run: Callable[[float], Trial], start: float, goal: Goal = Goal()) -> tuple[Edge, Edge, list[Trial]]:
    """Both edges of one seed, by p99 and by mean, and all runs by rate; no rate is run twice."""
    known: dict[float, Trial] = {}

    def at(rate: float) -> Trial:
        if rate not in known:
            known[rate] = run(rate)
        return known[rate]

    ours = edge(lambda rate: at(rate).attained >= goal.share, start, goal.precision)
    by_mean = edge(lambda rate: at(rate).attained_by_mean >= goal.share, start, goal.precision)
    return ours, by_mean, [known[rate] for rate in sorted(known)]


def curve(
    make: Make,
    rates: Sequence[float],
    seeds: Sequence[int],
    builds: Sequence[Build],
    policy: Policy,
    settings: Settings,
    goal: Goal = Goal(),
    *,
    scenario: Scenario = CALM,
    each: Callable[[Trial], None] | None = None,
    over: Callable[[Outcome], None] | None = None,
) -> tuple[Trial, ...]:
    """Attainment over rate: every rate with every seed, by seed and then as the rates are given."""
    found = []
    for seed in seeds:
        for rate in rates:
            found.append(trial(make, rate, seed, builds, policy, settings, goal, scenario=scenario, over=over))
            if each is not None:
                each(found[-1])
    return tuple(found)


def goodput(
    make: Make,
    start: float,
    seeds: Sequence[int],
    builds: Sequence[Build],
    policy: Policy,
    settings: Settings,
    goal: Goal = Goal(),
    *,
    scenario: Scenario = CALM,
    each: Callable[[Trial], None] | None = None,
    over: Callable[[Outcome], None] | None = None,
) -> Goodput:
    """Search from `start` with every seed; `each` gets every run when it is over."""
    if not seeds:
        raise bad("seeds", seeds, "at least one")
    edges, edges_by_mean, trials = [], [], []
    for seed in seeds:

        def run(rate: float, seed: int = seed) -> Trial:
            found = trial(make, rate, seed, builds, policy, settings, goal, scenario=scenario, over=over)
            if each is not None:
                each(found)
            return found

        ours, by_mean, runs = search(run, start, goal)
        edges.append(ours)
        edges_by_mean.append(by_mean)
        trials += runs
    return Goodput(
        Estimate.of([found.rate for found in edges]),
        Estimate.of([found.rate for found in edges_by_mean]),
        tuple(edges),
        tuple(edges_by_mean),
        tuple(trials),
        sum(build.tp for build in builds),
    )
