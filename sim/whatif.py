"""What if traffic went on as it just was, at another ratio: a share of good requests, by simulation.

The same simulator, the same policies and the same cost model as the deployment that asks. The last requests are
repeated lap by lap, so that a deployment that begins empty is as full as it would become; who arrives in one lap, after
`warm_s`, is judged, while those behind it still come. Memory of decode workers fills for as long as an output takes:
judged before, a ratio with too few of them looks good. Those that began together end together, too, so requests are
taken in and refused in waves at first: looked at for too short a time, any ratio may look good. Requests whose output
is not known yet have one drawn from those that ended (see `Recent`); so a decision knows no more than a gateway would.

Blocks of prompts have other names in each lap: a lap finds in caches what it has itself computed, and nothing of what
came before. So sessions that began before the window look somewhat dearer to prefill than they are.

| parameter | unit | default | meaning |
|---|---|---|---|
| most | requests | 1000 | that are judged; of more, the last |
| warm_steps | outputs | 2 | mean outputs, each token as slow as its goal allows, that pass before anybody is judged |
| warm_least_s, warm_most_s | s | 8, 120 | bounds of that time |
| tail | share | 0.5 | of that time in which others still come after the judged |
| gap_s | s | 0.03 | a token takes, where there is no goal for gaps |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from core.request import Slo
from scheduler.policies import Policy
from scheduler.ratio_events import Score
from sim.fleet import Build
from sim.outcome import Outcome
from sim.run import MASK, SALT, Settings, Simulation, simulate
from sim.workload import Arrival

NEVER = 2**60
"""Events after which invariants are looked at: whoever asks looks at its own."""


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Settings; see the module's table."""

    most: int = 1000
    warm_steps: float = 2.0
    warm_least_s: float = 8.0
    warm_most_s: float = 120.0
    tail: float = 0.5
    gap_s: float = 0.03


def judge(
    arrivals: Sequence[Arrival],
    span_s: float,
    builds: Sequence[Build],
    policy: Policy,
    settings: Settings,
    config: WhatIf = WhatIf(),
    stress: float = 1.0,
) -> Score:
    """How many would be good if these requests, which came within `span_s`, came again and again.

    `stress`: times as densely.
    """
    arrivals, span_s = _last(arrivals, span_s, config.most)
    warm_s = warm(arrivals, settings.slo, config)
    # A window as long as a lap has everybody once, wherever it begins.
    since_s, until_s = warm_s, warm_s + span_s / stress
    seen: list[Simulation] = []
    good = judged = 0

    def over(one: Outcome) -> None:
        nonlocal good, judged
        if since_s <= one.at_s < until_s:
            judged += 1
            good += one.good
            if judged == len(arrivals):
                seen[0].loop.stopped = True

    coming = laps(arrivals, span_s, stress, until_s + config.tail * warm_s)
    simulate(coming, builds, policy, replace(settings, check_every=NEVER), over=over, watch=seen.append)
    return Score(good / max(1, len(arrivals)), len(arrivals))


def warm(arrivals: Sequence[Arrival], slo: Slo, config: WhatIf) -> float:
    """Seconds until a deployment that begins empty is as full as it becomes."""
    mean = math.fsum(each.output for each in arrivals) / max(1, len(arrivals))
    return min(config.warm_most_s, max(config.warm_least_s, config.warm_steps * mean * (slo.gap_s or config.gap_s)))


def laps(arrivals: Sequence[Arrival], span_s: float, stress: float, until_s: float) -> Iterator[Arrival]:
    """The same requests again and again, `stress` times as densely, each by itself."""
    for lap in itertools.count():
        for each in arrivals:
            at_s = (lap * span_s + each.at_s) / stress
            if at_s >= until_s:
                return
            blocks = tuple([(block * SALT + lap * 2 + 1) & MASK for block in each.blocks])
            yield replace(each, at_s=at_s, session="", turn=0, gap_s=None, history=0, blocks=blocks)


def _last(arrivals: Sequence[Arrival], span_s: float, most: int) -> tuple[Sequence[Arrival], float]:
    """The last `most`, and the time they came in; the first of them begins it."""
    if len(arrivals) <= most:
        return arrivals, span_s
    begin = arrivals[-most].at_s
    return [replace(each, at_s=each.at_s - begin) for each in arrivals[-most:]], span_s - begin


def feasible(arrivals: Sequence[Arrival], builds: Sequence[Build], settings: Settings) -> float:
    """Share of the requests that would be good if each were alone at an idle pair of workers.

    What its session has sent, and what begins like an earlier one's prompt, is taken to be cached.
    """
    prefill = next(build.cost for build in builds if build.role.prefills)
    decode = next(build.cost for build in builds if build.role.decodes)
    good, known = 0, set[int]()
    for each in arrivals:
        slo = settings.slo if each.slo is None else each.slo
        begins = sum(1 for _ in itertools.takewhile(known.__contains__, each.blocks))
        known.update(each.blocks)
        cached = min(each.prompt - 1, max(each.history, begins * each.block_tokens))
        first_s = prefill.prefill_s([(each.prompt - cached, cached)]) + 4 * settings.hop_s
        gap_s = decode.decode_s(1, each.prompt + each.output)
        good += (not slo.ttft_s or first_s <= slo.ttft_s) and (not slo.gap_s or gap_s <= slo.gap_s)
    return good / max(1, len(arrivals))
