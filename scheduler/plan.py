"""A plan and why it is this one: frozen records, JSON one way. Pure.

Whatever was considered and not chosen stands beside what was, with the reason: it does not fit, it misses its goals, it
needs more devices (dominated), or it does not exist here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from core.request import Slo
from scheduler.layout import Cell, Layout
from scheduler.ratio_events import Bounds

Why = Literal["chosen", "dominated", "memory", "slo", "cluster", "none"]


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be planned.

    | field | default | unit | meaning |
    |---|---|---|---|
    | rate | | requests or sessions a second | to be sustained |
    | slo | | s | goals of every request |
    | share | 0.9 | | of requests that must meet them |
    | gpu_hour | None | money | an hour of one device |
    | off | 0.2 | | by how much rate, lengths and goals are off, where that is asked |
    | precision | 0.03 | | to which the highest rate of the plan is known |
    | segments | true | | look at segments (low node affinity), too |
    """

    rate: float
    slo: Slo
    share: float = 0.9
    gpu_hour: float | None = None
    off: float = 0.2
    precision: float = 0.03
    segments: bool = True


@dataclass(frozen=True, slots=True)
class Change:
    """What is different from what was asked, as factors."""

    name: str = "as asked"
    rate: float = 1.0
    prompt: float = 1.0
    output: float = 1.0
    ttft: float = 1.0
    gap: float = 1.0


ASKED = Change()


@dataclass(frozen=True, slots=True)
class Evaluate:
    """A command: what share of requests is good with this layout at this rate? Ends in one `Evaluated`.

    Unless it is to be `exact`, a share below the one that was asked for may be given as any number between: it is
    enough to know that it is missed.
    """

    number: int
    layout: Layout
    rate: float
    change: Change = ASKED
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An event: the share."""

    number: int
    attained: float


@dataclass(frozen=True, slots=True)
class Option:
    """One of those that a choice was made of."""

    name: str
    why: Why
    devices: int
    """That it needs, or needs at least where it was not chosen; 0: no number would do."""
    exact: bool
    reason: str
    attained: float | None = None
    """At the rate asked for, where that was simulated."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A question, the answer, and all the other answers."""

    question: str
    answer: str
    reason: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """The plan, if something is other than was thought."""

    name: str
    rate: float
    attained: float
    holds: bool


@dataclass(frozen=True, slots=True)
class Cost:
    """Money for a million tokens at a rate."""

    rate: float
    output: float
    """For a million tokens of output, prompts included in the price."""
    all: float
    """For a million tokens, prompt or output."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A command, the last one: the plan."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class Plan:
    """What to deploy."""

    ask: Ask
    rate: float
    """That is planned for: what was asked, or the most that was found where that is too much."""
    layout: Layout | None
    verdict: str
    disaggregate: bool | None
    attained: float | None
    next_rate: float | None
    """From here on one more device is needed; the plan holds up to here, to the precision asked for."""
    next_device: str
    """What then is needed more."""
    equal: Option
    """The best with workers that can change their role: equal ranks and stages in both phases."""
    equal_layout: Layout | None
    choices: tuple[Choice, ...]
    cases: tuple[Case, ...]
    costs: tuple[Cost, ...]
    evaluations: int
    bounds: Bounds | None
    """Within which the ratio of the best with workers that can change their role may be adapted."""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        for name in ("layout", "equal_layout"):
            found[name] = described(found[name])
        for name in ("ask", "equal"):
            found[name] = asdict(found[name])
        found["bounds"] = None if self.bounds is None else asdict(self.bounds)
        for name in ("choices", "cases", "costs"):
            found[name] = [asdict(each) for each in found[name]]
        return found


def bounds(layout: Layout | None, devices: int) -> Bounds | None:
    """Of a ratio, from one worker of each phase to as many as fill the devices; None where none can change its role."""
    if layout is None or layout.prefill is None or layout.decode is None or layout.prefill.cell != layout.decode.cell:
        return None
    return Bounds(least_workers=2, most_workers=devices // layout.prefill.cell.devices)


def described(layout: Layout | None) -> dict[str, Any] | None:
    """A layout as JSON."""
    if layout is None:
        return None
    pools = {"prefill": layout.prefill, "decode": layout.decode, "mixed": layout.mixed}
    return {
        "name": layout.name,
        "family": layout.family,
        "devices": layout.devices,
        "times": layout.times,
        **{
            role: {"workers": pool.count, "tp": pool.cell.ranks, "pp": pool.cell.stages}
            for role, pool in pools.items()
            if pool is not None
        },
    }


@dataclass(frozen=True, slots=True)
class Fit:
    """What is known of a cell for one use without simulating: the most a worker sustains, or why none."""

    cell: Cell
    bound: float
    why: Why = "none"
    reason: str = ""
