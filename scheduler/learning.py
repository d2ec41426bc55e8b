"""What a worker learns of its own steps, and whom it tells: its policies soon, everybody else seldom. Pure.

`Refit` follows the machine; a policy must not see its model change between two looks at it, and a gateway must not be
told of every step. So the model that was told last stays in force until one that differs is told, at a point in time
that this machine chooses. Two models differ if the time of some probe does: a lone prompt, a full step, a lone row, a
full batch, each short and long.

| setting | unit | default | meaning |
|---|---|---|---|
| eager | steps | 64 | of a phase that are all learned from |
| pause_s | s | 0.1 | after these, between two that are: 0.3 ms of learning each is then 0.3 % of a core |
| look_s | s | 1 | between two looks at what was learned |
| moved | share | 0.05 | by which a probe's time, with margin, must have changed for our own policies to be told |
| announce_s | s | 10 | between two announcements, the first apart |
| announce_moved | share | 0.2 | by which a probe's time must have changed for an announcement |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from core.quick import quick_init
from scheduler.cost import QUANTILES, CostModel, Repriced, Row
from scheduler.cost_refit import Refit, RefitSettings

PROBE_TOKENS = (64, 4096)
"""Of a prompt that is computed in a step, and of the context of each row that decodes."""
PROBE_ROWS = (1, 32)


@quick_init
@dataclass(frozen=True, slots=True)
class StepTook:
    """A step that prefilled `rows` and decoded `batch` rows over `context` tokens in all took so long."""

    rows: tuple[Row, ...]
    batch: int
    context: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell those who choose workers what a step takes here."""

    cost: CostModel


LearningCommand = Repriced | Announce


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """Settings; see the module's table."""

    eager: int = 64
    pause_s: float = 0.1
    look_s: float = 1.0
    moved: float = 0.05
    announce_s: float = 10.0
    announce_moved: float = 0.2


class Learning:
    """Learns from steps, beginning with `prior`, which everybody has been told.

    A step costs a comparison; one that is learned from 0.3 ms. There is a deadline only while something is learned
    that nobody has looked at.
    """

    def __init__(
        self,
        prior: CostModel,
        settings: LearningSettings = LearningSettings(),
        refit: RefitSettings | None = None,
    ) -> None:
        self._set = settings
        self._refit = Refit(prior, refit)
        self.cost = prior
        """What this worker's policies were told last."""
        self.announced = prior
        """What everybody else was told last."""
        self._seen: dict[Literal["prefill", "decode"], int] = {"prefill": 0, "decode": 0}
        self._learned_at: dict[Literal["prefill", "decode"], float] = {"prefill": -math.inf, "decode": -math.inf}
        self._looked_at = -math.inf
        self._told_at = -math.inf
        self._fresh = False

    @property
    def learned(self) -> int:
        """Steps that were learned from."""
        return self._refit.seen

    @property
    def outliers(self) -> int:
        """Of these, those that were so far off that they moved nothing."""
        return self._refit.outliers

    def on(self, event: StepTook | None, now: float) -> list[LearningCommand]:
        if event is not None:
            self._learn(event, now)
        if not self._fresh or now < self._looked_at + self._set.look_s:
            return []
        self._fresh, self._looked_at = False, now
        model = self._refit.model()
        commands: list[LearningCommand] = []
        if max(differ(self.cost, model), _margins_differ(self.cost, model)) > self._set.moved:
            self.cost = model
            commands.append(Repriced(model))
        if differ(self.announced, model) > self._set.announce_moved:
            if now >= self._told_at + self._set.announce_s:
                self.announced, self._told_at = model, now
                commands.append(Announce(model))
            else:
                self._fresh = True
        return commands

    def deadline(self) -> float | None:
        return self._looked_at + self._set.look_s if self._fresh else None

    def check(self) -> None:
        assert self._looked_at >= self._told_at
        assert all(seen >= 0 for seen in self._seen.values())

    def _learn(self, step: StepTook, now: float) -> None:
        phase: Literal["prefill", "decode"] = "prefill" if step.rows else "decode"
        if self._seen[phase] >= self._set.eager and now < self._learned_at[phase] + self._set.pause_s:
            return
        self._seen[phase] += 1
        self._learned_at[phase] = now
        self._refit.step(step.rows, step.batch, step.context, step.seconds)
        self._fresh = True


def differ(one: CostModel, other: CostModel) -> float:
    """The largest change of a probe's time, relative to the shorter of the two."""
    found = 0.0
    for count in PROBE_ROWS:
        for tokens in PROBE_TOKENS:
            pairs = (
                (one.prefill_s([(tokens, 0)] * count), other.prefill_s([(tokens, 0)] * count)),
                (one.decode_s(count, count * tokens), other.decode_s(count, count * tokens)),
            )
            for a, b in pairs:
                least = min(a, b)
                found = max(found, abs(a - b) / least if least > 0 else (math.inf if a != b else 0.0))
    return found


def _margins_differ(one: CostModel, other: CostModel) -> float:
    """The largest change of what margins make of a prediction."""
    found = 0.0
    for quantile in QUANTILES:
        for a, b in (
            (one.margin("prefill", quantile), other.margin("prefill", quantile)),
            (one.margin("decode", quantile), other.margin("decode", quantile)),
        ):
            found = max(found, abs(a - b) / (1.0 + min(a, b)))
    return found
