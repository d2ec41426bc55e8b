"""What became of each request, and of all of them: attainment and quantiles, without keeping one of them.

A request is good if it was served, its first token came within its goal, and so did the 99th percentile of the gaps
between its tokens. Rejected and failed ones are misses: who refuses cannot look better than who serves.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add

from core.quick import quick_init
from core.request import Kind, Phase, Slo
from sim.gaps import beyond, quantile
from sim.workload import Arrival

GAP_SHARE = 0.99
"""The share of a request's gaps that must be within the goal."""


@dataclass(slots=True, eq=False)
class Record:
    """A request while it is served: what only the world knows, and what a client would have seen so far."""

    arrival: Arrival
    arrived_s: float
    """When it came, which for a later turn of a session depends on the turn before."""
    ttft_s: float | None = None
    sent_s: float | None = None
    """When the worker had its newest token."""
    first_sent_s: float = 0.0
    tokens: int = 0
    """Delivered to the client."""
    gaps: list[int] | None = None
    """By bucket; None before the first stretch."""
    single: list[int] = field(default_factory=list)
    """Buckets of gaps that are not in `gaps` yet."""
    source: str = ""
    sink: str = ""
    answered: tuple[int, ...] = ()
    """Hashes of the full pages of prompt and answer, where the next turn tells them."""

    def token(self, now: float, upper: Sequence[float]) -> None:
        """A single token was made at `now`."""
        if self.sent_s is None:
            self.first_sent_s = now
        else:
            self.single.append(bisect_left(upper, now - self.sent_s))
        self.sent_s = now

    def stretch(self, counts: list[int], last_s: float) -> None:
        """Many tokens were made, the last at `last_s`; `counts` is ours from now on."""
        if self.gaps is None:
            self.gaps = counts
        else:
            self.gaps = list(map(add, self.gaps, counts))
        for bucket in self.single:
            self.gaps[bucket] += 1
        self.single.clear()
        self.sent_s = last_s


@quick_init
@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, when it is over. Times in seconds."""

    at_s: float
    prompt: int
    output: int
    """Wanted."""
    tokens: int
    """Delivered."""
    cached: int
    phase: Phase
    code: str
    ttft_s: float | None
    gap_p99_s: float
    """Upper edge of its bucket, a tenth wide."""
    gap_mean_s: float
    e2e_s: float
    attempts: int
    source: str
    sink: str
    tenant: str
    session: str
    turn: int
    good: bool
    good_by_mean: bool
    """As papers count: the mean of the gaps in place of their 99th percentile."""
    kind: Kind = Kind.LATENCY
    """Its class."""


def outcome(
    record: Record, phase: Phase, code: str, cached: int, attempts: int, now: float, slo: Slo, upper: Sequence[float]
) -> Outcome:
    """Judge a request that is over. A goal of 0 is none; one of the batch class is good if it was served."""
    arrival = record.arrival
    if record.single:
        record.stretch([0] * (len(upper) + 1), record.sent_s or 0.0)
    gaps = record.gaps or ()
    count = sum(gaps)
    mean_s = (record.sent_s - record.first_sent_s) / count if count and record.sent_s is not None else 0.0
    served = phase is Phase.DONE and record.ttft_s is not None
    in_time = served and (not slo.ttft_s or (record.ttft_s or 0.0) <= slo.ttft_s)
    if slo.deadline_s:
        in_time = in_time and now - record.arrived_s <= slo.deadline_s
    allowed = count - math.ceil(GAP_SHARE * count)
    smooth = not slo.gap_s or not count or beyond(gaps, upper, slo.gap_s) <= allowed
    return Outcome(
        at_s=record.arrived_s,
        prompt=arrival.prompt,
        output=arrival.output,
        tokens=record.tokens,
        cached=cached,
        phase=phase,
        code=code,
        ttft_s=record.ttft_s,
        # Beyond the last edge the whole request bounds it.
        gap_p99_s=min(quantile(gaps, upper, GAP_SHARE, count), now - record.arrived_s),
        gap_mean_s=mean_s,
        e2e_s=now - record.arrived_s,
        attempts=attempts,
        source=record.source,
        sink=record.sink,
        tenant=arrival.tenant,
        session=arrival.session,
        turn=arrival.turn,
        good=in_time and smooth,
        good_by_mean=in_time and (not slo.gap_s or mean_s <= slo.gap_s),
        kind=slo.kind,
    )


class Spread:
    """Quantiles of a stream of positive values to 1 %, in memory that does not grow with it."""

    RATIO = math.log(1.01)

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.count = 0
        self.total = 0.0
        self.most = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self.count += 1
        self.total += value
        if value > self.most:
            self.most = value
        self._counts[math.ceil(math.log(value) / self.RATIO) if value > 1e-9 else -2100] += 1

    @property
    def mean(self) -> float:
        """Exact; 0 without any value."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """At most 1 % above the value of the nearest rank; 0 without any value."""
        rank, seen = math.ceil(share * self.count), 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= rank:
                return min(self.most, math.exp(bucket * self.RATIO))
        return 0.0

    def cdf(self) -> list[tuple[float, float]]:
        """(value, share that is not above it), rising."""
        points, seen = [], 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            points.append((min(self.most, math.exp(bucket * self.RATIO)), seen / self.count))
        return points


@dataclass(slots=True)
class Part:
    """What a tenant sent of a class, and what became of it."""

    arrived: int = 0
    done: int = 0
    good: int = 0
    prompt_tokens: int = 0
    """Of those that were served, as the next."""
    tokens: int = 0

    @property
    def attainment(self) -> float:
        """Share of arrived requests that were good; 1 if none came."""
        return self.good / self.arrived if self.arrived else 1.0


@dataclass(slots=True)
class Tally:
    """All outcomes in numbers; `add` each of them."""

    arrived: int = 0
    good: int = 0
    good_by_mean: int = 0
    phases: Counter[Phase] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    retried: int = 0
    ttft: Spread = field(default_factory=Spread)
    gap_p99: Spread = field(default_factory=Spread)
    gap_mean: Spread = field(default_factory=Spread)
    e2e: Spread = field(default_factory=Spread)
    parts: dict[tuple[Kind, str], Part] = field(default_factory=dict)
    """By class and tenant."""

    def add(self, one: Outcome) -> None:
        """One more."""
        self.arrived += 1
        self.good += one.good
        self.good_by_mean += one.good_by_mean
        self.phases[one.phase] += 1
        self.codes[one.code] += 1
        self.tokens += one.tokens
        self.prompt_tokens += one.prompt
        self.cached_tokens += one.cached
        self.retried += one.attempts > 1
        part = self.parts.get((one.kind, one.tenant))
        if part is None:
            part = self.parts[one.kind, one.tenant] = Part()
        part.arrived += 1
        part.good += one.good
        if one.ttft_s is not None:
            self.ttft.add(one.ttft_s)
        if one.phase is Phase.DONE:
            part.done += 1
            part.prompt_tokens += one.prompt
            part.tokens += one.tokens
            self.e2e.add(one.e2e_s)
            if one.tokens > 1:
                self.gap_p99.add(one.gap_p99_s)
                self.gap_mean.add(one.gap_mean_s)

    @property
    def attainment(self) -> float:
        """Share of arrived requests that were good; 1 if none came."""
        return self.good / self.arrived if self.arrived else 1.0

    @property
    def attainment_by_mean(self) -> float:
        """The same with the mean of the gaps in place of their 99th percentile."""
        return self.good_by_mean / self.arrived if self.arrived else 1.0
