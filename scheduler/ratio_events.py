"""What the ratio controller hears, asks for and decides, and every decision in words. Pure.

A command that takes time (`Simulate`, `Flip`, `Add`, `Remove`) carries a number and ends in exactly one event of the
same number: `Simulated`, or `Changed`. So whoever performs them may be a simulator, or a coordinator that tells
workers and a launcher.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from core.errors import LocalError
from core.worker import Identity, Role


class Ratio(NamedTuple):
    """How many workers prefill, and how many decode."""

    prefill: int
    decode: int

    def __str__(self) -> str:
        return f"{self.prefill}+{self.decode}"


class Act(StrEnum):
    """What may be done about the ratio; one worker at a time."""

    KEEP = "keep"
    TO_PREFILL = "to prefill"
    TO_DECODE = "to decode"
    ADD_PREFILL = "add prefill"
    ADD_DECODE = "add decode"
    REMOVE_PREFILL = "remove prefill"
    REMOVE_DECODE = "remove decode"

    @property
    def flips(self) -> bool:
        """True if a worker changes its role."""
        return self in (Act.TO_PREFILL, Act.TO_DECODE)

    @property
    def adds(self) -> bool:
        """True if there is one more worker afterwards."""
        return self in (Act.ADD_PREFILL, Act.ADD_DECODE)

    @property
    def removes(self) -> bool:
        """True if there is one less."""
        return self in (Act.REMOVE_PREFILL, Act.REMOVE_DECODE)


STEPS = (1, 2, 4)
"""Flips that ratios are away that are looked at, beside the farthest: where a phase has far too little, one worker more
may not show."""
STEP: dict[Act, tuple[int, int]] = {
    Act.KEEP: (0, 0),
    Act.TO_PREFILL: (1, -1),
    Act.TO_DECODE: (-1, 1),
    Act.ADD_PREFILL: (1, 0),
    Act.ADD_DECODE: (0, 1),
    Act.REMOVE_PREFILL: (-1, 0),
    Act.REMOVE_DECODE: (0, -1),
}
"""By how many workers each act moves the ratio."""
BACK = {Act.TO_PREFILL: Act.TO_DECODE, Act.TO_DECODE: Act.TO_PREFILL}


class Why(StrEnum):
    """Reasons of a decision, and against a candidate."""

    PINNED = "an operator asked for this ratio"
    UNDER_WAY = "a change is under way"
    UNANSWERED = "the last simulation has not ended"
    RECENT = "a change has just ended"
    BLIND = "no prefill worker or no decode worker is ready"
    FEW = "too few requests came to judge by"
    CALM = "nobody waits, nobody was refused, and workers have time to spare"
    RESTING = "traffic is what it was when no change was found to help"
    OTHERS = "workers came, went or changed while it was simulated"
    UNKNOWN = "nothing could be simulated"
    BETTER = "more of the last requests would have been good"
    SPARE = "as many would be good with one worker less and a reserve"
    SHORT = "no ratio of so many workers serves enough, and there may be no more of them"
    INFEASIBLE = "the goals cannot be met even by idle workers"
    NO_GAIN = "no change gains enough"
    TURN = "it would turn back while the traffic is what it was"
    BOUND = "outside of the bounds"
    NOBODY = "no worker there can change its role"
    PATIENCE = "it has not been so for long enough"
    BUSIER = "who would give is busier than who would take"
    NOT_NEEDED = "enough are good without it"
    SECOND = "another one gains more"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Between what the ratio may move; the planner's.

    | field | default | unit | meaning |
    |---|---|---|---|
    | least_prefill, least_decode | 1 | workers | of each phase at least |
    | most_prefill, most_decode | None | workers | of each phase at most; None: no bound |
    | least_workers, most_workers | None | workers | in all; None: as many as there are, so none is added or removed |
    """

    least_prefill: int = 1
    least_decode: int = 1
    most_prefill: int | None = None
    most_decode: int | None = None
    least_workers: int | None = None
    most_workers: int | None = None

    def __post_init__(self) -> None:
        for least, most in (
            (self.least_prefill, self.most_prefill),
            (self.least_decode, self.most_decode),
            (self.least_workers, self.most_workers),
        ):
            if (least is not None and least < 1) or (most is not None and most < (least or 1)):
                raise LocalError(f"bounds: got {self}, want at least 1 worker, and the most not below the least")

    def allow(self, ratio: Ratio, now: Ratio) -> bool:
        """May one go from `now` to `ratio`? A step towards the bounds is allowed also outside of them."""
        total, before = sum(ratio), sum(now)
        least = before if self.least_workers is None else self.least_workers
        most = before if self.most_workers is None else self.most_workers
        return (
            _within(ratio.prefill, now.prefill, self.least_prefill, self.most_prefill)
            and _within(ratio.decode, now.decode, self.least_decode, self.most_decode)
            and (total == before or _within(total, before, least, most))
        )


ANY = Bounds()
"""As many workers as there are, and at least one of each phase."""


def _within(count: int, before: int, least: int, most: int | None) -> bool:
    return count >= 1 and (count >= least or count >= before) and (most is None or count <= most or count <= before)


# Events.
@dataclass(frozen=True, slots=True)
class Seen:
    """A worker is ready, in this role; said again whenever that changes."""

    worker: Identity
    role: Role
    flips: bool = True
    """It can take the other role: model, tensor and pipeline parallelism are those of the others."""


@dataclass(frozen=True, slots=True)
class Gone:
    """A worker is not there any more, or does not take requests."""

    worker: Identity


@dataclass(frozen=True, slots=True)
class Offered:
    """What came to a gateway since its last word, whatever became of it: demand, not what was achieved."""

    seconds: float
    requests: int
    new_tokens: int
    """Of prompts, as far as they were in no cache."""
    cached_tokens: int
    output_tokens: int
    """Expected."""
    refused: int
    """Turned away, or not begun in time."""


@dataclass(frozen=True, slots=True)
class Pressed:
    """How a worker does."""

    worker: Identity
    load: float
    """Share of what it can do that is taken: of time where it prefills; of memory or of rows where it decodes."""
    waiting: int
    """Requests that wait there, with KV that nobody has taken or without."""
    oldest_s: float
    """How long the first of those has that it has not begun."""


@dataclass(frozen=True, slots=True)
class Bounded:
    """The planner has other bounds."""

    bounds: Bounds


@dataclass(frozen=True, slots=True)
class Pinned:
    """An operator wants this ratio, whatever the traffic; None: not any more."""

    ratio: Ratio | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing that could be done."""

    act: Act
    ratio: Ratio
    """Afterwards."""
    worker: Identity | None = None
    """Whom it is done to; the first of them, if there are several."""
    stress: float = 1.0
    """Times the traffic for which it is to be good enough."""
    steps: int = 1
    """Workers that it is done to; one after the other, so that only the first follows from a decision."""

    def __str__(self) -> str:
        if self.act is Act.KEEP:
            return f"{self.ratio} (as it is)"
        many = f"{self.steps} workers, first " if self.steps > 1 else ""
        return f"{self.ratio} ({self.act}: {many}{self.worker.name if self.worker is not None else 'a new one'})"


@dataclass(frozen=True, slots=True)
class Score:
    """What a simulation of the last traffic said of a candidate."""

    good: float
    """Share of the requests that were good."""
    requests: int


@dataclass(frozen=True, slots=True)
class Simulated:
    """The end of `Simulate`: a score for each candidate, in their order, or none and why not."""

    number: int
    scores: tuple[Score, ...]
    feasible: float = 1.0
    """Share of the requests that would be good if each were alone at idle workers."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Changed:
    """The end of `Flip`, `Add` or `Remove`."""

    number: int
    done: bool
    reason: str = ""


RatioEvent = Seen | Gone | Offered | Pressed | Bounded | Pinned | Simulated | Changed


# Commands.
@dataclass(frozen=True, slots=True)
class Simulate:
    """Say how many of the last requests would be good with each candidate; the first is what there is now."""

    number: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Flip:
    """Have a worker take nothing new, end or move what it has, keep its cache, and take the other role."""

    number: int
    worker: Identity
    role: Role


@dataclass(frozen=True, slots=True)
class Add:
    """Have the launcher start a worker."""

    number: int
    role: Role


@dataclass(frozen=True, slots=True)
class Remove:
    """Have a worker end what it has, and then itself."""

    number: int
    worker: Identity


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a decision was made from."""

    ratio: Ratio
    seconds: float
    """Of traffic that was looked at."""
    requests: int
    requests_per_s: float
    new_tokens_per_s: float
    cached_tokens_per_s: float
    output_tokens_per_s: float
    refused: float
    """Share of the requests."""
    prefill_load: float
    decode_load: float
    """Means over the workers of a phase."""
    prefill_oldest_s: float
    decode_oldest_s: float
    """The longest wait anywhere."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision, with all that it was made from."""

    number: int
    at_s: float
    inputs: Inputs
    chosen: Candidate
    why: Why
    candidates: tuple[Candidate, ...] = ()
    scores: tuple[Score, ...] = ()
    """Of the candidates, in their order; empty if nothing was simulated."""
    against: tuple[tuple[Candidate, Why], ...] = ()
    """Every candidate that was not chosen, and every act that was none, with the reason."""
    feasible: float | None = None
    note: str = ""

    @property
    def infeasible(self) -> bool:
        """True if it was found that the goals cannot be met by any number of workers."""
        return self.why is Why.INFEASIBLE


@dataclass(frozen=True, slots=True)
class Decided:
    """Keep this on record."""

    decision: Decision


RatioCommand = Simulate | Flip | Add | Remove | Decided


def explain(decision: Decision) -> str:
    """A decision in words: what was done and why, what was seen, what each candidate scored, why not the others."""
    inputs, chosen = decision.inputs, decision.chosen
    way = "on the way to" if chosen.steps > 1 else "->"
    done = "no change" if chosen.act is Act.KEEP else f"{_deed(chosen)}, {inputs.ratio} {way} {chosen.ratio}"
    head = f"infeasible goals, {done}" if decision.infeasible else done
    lines = [
        f"decision {decision.number} at {decision.at_s:.1f} s: {head}: {decision.why}"
        + (f" ({decision.note})" if decision.note else ""),
        f"  seen: {inputs.ratio} workers, {inputs.requests_per_s:.3g} requests/s over {inputs.seconds:.0f} s, "
        f"{inputs.new_tokens_per_s:.0f} new, {inputs.cached_tokens_per_s:.0f} cached and "
        f"{inputs.output_tokens_per_s:.0f} output tokens/s, {100 * inputs.refused:.1f} % refused",
        f"  load: prefill {100 * inputs.prefill_load:.0f} %, oldest {inputs.prefill_oldest_s:.2f} s; "
        f"decode {100 * inputs.decode_load:.0f} %, oldest {inputs.decode_oldest_s:.2f} s",
    ]
    if decision.feasible is not None:
        lines.append(f"  alone at idle workers {100 * decision.feasible:.1f} % would be good")
    reasons = dict(decision.against)
    scores = dict(zip(decision.candidates, decision.scores, strict=False))
    for candidate in (*decision.candidates, *(each for each in reasons if each not in decision.candidates)):
        score = scores.get(candidate)
        said = "not simulated" if score is None else f"{100 * score.good:.1f} % of {score.requests} good"
        if candidate.stress != 1.0:
            said += f" at {candidate.stress:g} times the traffic"
        why = "chosen" if candidate == chosen else f"no: {reasons.get(candidate, Why.NO_GAIN)}"
        lines.append(f"  {candidate}: {said}; {why}")
    return "\n".join(lines)


def _deed(candidate: Candidate) -> str:
    who = candidate.worker.name if candidate.worker is not None else "a worker"
    match candidate.act:
        case Act.TO_PREFILL | Act.TO_DECODE:
            return f"flip {who} {candidate.act}"
        case Act.ADD_PREFILL | Act.ADD_DECODE:
            return f"ask for one more worker ({candidate.act})"
        case _:
            return f"give up {who} ({candidate.act})"
