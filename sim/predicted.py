"""What a recorded deployment was seen to do, and what the simulator says that it does: percentiles side by side.

Both count the time to the first token at the gateway, from arrival on, of all requests that got one, and the gaps
between the tokens of one answer, of all answers together. The simulated gaps are counted at the workers, in
buckets a percent wide; from there to the gateway a token takes a hop, whose recorded times vary, and what it takes
longer than the token before is added.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from core.request import Phase
from scheduler.policies import Policy
from sim.deployment import Deployment
from sim.outcome import Outcome
from sim.recordings import Call
from sim.run import Simulation

SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Seen:
    """What clients got. Times in seconds."""

    requests: int
    served: int
    rejected: int
    failed: int
    again: int
    """Placed more than once."""
    tokens: int
    ttft_s: tuple[float, ...]
    """At SHARES, as the next."""
    gap_s: tuple[float, ...]


def measured(calls: Sequence[Call]) -> Seen:
    """What the recorded gateways saw."""
    ttfts = sorted(call.first_at - call.at for call in calls if call.first_at is not None)
    gaps = sorted(gap for call in calls for gap in call.gaps)
    phases = [call.phase for call in calls]
    return Seen(
        len(calls),
        phases.count(Phase.DONE),
        phases.count(Phase.REJECTED),
        phases.count(Phase.FAILED),
        sum(call.attempts > 1 for call in calls),
        sum(sum(call.tokens.values()) for call in calls),
        tuple(_nearest(ttfts, share) for share in SHARES),
        tuple(_nearest(gaps, share) for share in SHARES),
    )


def predicted(recorded: Deployment, policy: Policy | None = None) -> Seen:
    """What the simulator says, with the deployment's own policy or another one."""
    ttfts: list[float] = []

    def over(one: Outcome) -> None:
        if one.ttft_s is not None:
            ttfts.append(one.ttft_s)

    simulation = Simulation(
        recorded.workload, recorded.builds, policy or recorded.policy, recorded.settings, recorded.scenario, over
    )
    upper = simulation.world.upper
    simulation.gaps = [0] * (len(upper) + 1)
    tally = simulation.run().tally
    counts = simulation.gaps
    ttfts.sort()
    return Seen(
        tally.arrived,
        tally.phases[Phase.DONE],
        tally.phases[Phase.REJECTED],
        tally.phases[Phase.FAILED],
        tally.retried,
        tally.tokens,
        tuple(_nearest(ttfts, share) for share in SHARES),
        _jittered(counts, upper, recorded.hops_s),
    )


def _nearest(ordered: Sequence[float], share: float) -> float:
    """Of the nearest rank; 0 of nothing."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else 0.0


def _jittered(counts: Sequence[int], upper: Sequence[float], hops_s: Sequence[float]) -> tuple[float, ...]:
    """At SHARES, of the buckets' middles and the difference of two hops, each with each; zeros without any gap."""
    few = _evenly(hops_s, 100) or [0.0]
    later_s = _evenly(sorted([one - other for one in few for other in few]), 200)
    found = sorted([(max(0.0, _middle(at, upper) + each), n) for at, n in enumerate(counts) if n for each in later_s])
    sums = list(accumulate([n for _, n in found]))
    return tuple(found[bisect_left(sums, share * sums[-1])][0] if sums else 0.0 for share in SHARES)


def _evenly(ordered: Sequence[float], count: int) -> list[float]:
    """So many of them, or all: the middles of as many shares."""
    if len(ordered) <= count:
        return list(ordered)
    return [ordered[(2 * at + 1) * len(ordered) // (2 * count)] for at in range(count)]


def _middle(bucket: int, upper: Sequence[float]) -> float:
    if bucket == 0:
        return upper[0] / 2
    return math.sqrt(upper[bucket - 1] * upper[min(bucket, len(upper) - 1)])
