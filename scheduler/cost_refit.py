"""Follows a worker's times, one live sample after the other. Pure, and plain Python.

Recursive least squares with forgetting, as normal equations of the relative error, solved for non-negative coefficients
(`scheduler/cost_fit.py`); with a prior that keeps its shape and takes the machine's level.

A machine may take longer in two ways: everything takes so many times as long, or every step is delayed, because others
want its processors. Steps of 0.2 ms that take 13 say nothing about what a step of a second takes. So the level and a
delay are told apart, by which of them explains better what was seen; and margins are shares of the time, not of the
steps, for what a long prompt takes is not in doubt because most short steps are.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scheduler.cost import CostModel, Lane, Row, decode_features, prefill_features
from scheduler.cost_fit import (
    DECODE_GRID,
    PREFILL_GRID,
    TRANSFER_GRID,
    Normal,
    Vector,
    margins_by_time,
    nnls,
    predicted,
)


@dataclass(frozen=True, slots=True)
class RefitSettings:
    """How a model follows its machine.

    | setting | default | unit | meaning |
    |---|---|---|---|
    | forget | 0.995 | a sample | weight of all earlier ones: a memory of 1 / (1 - forget) = 200 samples |
    | prior_weight | 1 | samples | weight of the prior's shape, which never fades: nothing is left undetermined |
    | outlier | 3 | ratio | measured / predicted beyond it, or below its inverse, moves no coefficient |
    | patience | 8 | samples | that many outliers in a row on one side are a change, of level or of delay |
    | drift | 0.2 | relative | so is a block of samples whose median error is beyond it |
    | sudden | 9 | ratio | no level changes so much at once: it is a delay, unless a level explains it far better |
    | block | 32 | samples | of which that median is taken, outliers left out |
    | window | 256 | samples | of whose time the margins are quantiles, outliers included |
    | trusted | 16 | samples | in the window, before which margins are the prior's |
    """

    forget: float = 0.995
    prior_weight: float = 1.0
    outlier: float = 3.0
    patience: int = 8
    drift: float = 0.2
    sudden: float = 9.0
    block: int = 32
    window: int = 256
    trusted: int = 16

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("forget", 0 < self.forget <= 1, "above 0, at most 1"),
            ("prior_weight", self.prior_weight > 0, "above 0"),
            ("outlier", self.outlier > 1, "above 1"),
            ("patience", self.patience >= 1, "at least 1"),
            ("drift", self.drift > 0, "above 0"),
            ("sudden", self.sudden > 1, "above 1"),
            ("block", self.block >= 1, "at least 1"),
            ("window", self.window >= 1, "at least 1"),
            ("trusted", self.trusted >= 1, "at least 1"),
        ):
            if not good:
                raise ValueError(f"refit: {name}: got {getattr(self, name)}, wanted {wanted}")


# Anything else was not a step and its clock: it is neither learned from nor counted.
MEASURABLE_S = (1e-7, 1e5)


class _Learner:
    """The lines of one phase, or of one lane, and what they were learned from. Every call takes the same time."""

    def __init__(self, prior: Sequence[Vector], grid: Iterable[Vector], settings: RefitSettings) -> None:
        self._settings = settings
        self._prior = [list(line) for line in prior]
        self.lines = [list(line) for line in prior]
        size = len(prior[0])
        # Every line has an opinion at every point, on top there or not.
        self._shape = [Normal.zero(size) for _ in prior]
        points = list(grid)
        for features in points:
            for line, normal in zip(prior, self._shape, strict=True):
                if (at := predicted((line,), features)) > 0:
                    normal.add(features, at, at, settings.prior_weight / len(points))
        self._learned = [Normal.zero(size) for _ in prior]
        self._level = [1.0, 1.0]  # sum of measured / prior, and of ones, both fading
        self._delay_s = 0.0  # of every step, in `lines`, not in what was learned
        self._errors: list[tuple[float, float]] = []  # the window, oldest first: relative, and seconds predicted
        self._ordered: list[tuple[float, float]] = []
        self._held: list[tuple[float, float]] = []  # measured and predicted of outliers in a row, on one side
        self._block: list[tuple[float, float]] = []  # and of others
        self.seen = 0
        self.outliers = 0

    def observe(self, features: Vector, seconds: float) -> None:
        before_s = predicted(self.lines, features)
        if not (MEASURABLE_S[0] <= seconds <= MEASURABLE_S[1] and before_s > 0):
            return
        self.seen += 1
        ratio = seconds / before_s
        self._note(ratio - 1, before_s)
        settings = self._settings
        if 1 / settings.outlier <= ratio <= settings.outlier:
            self._held.clear()
            self._block.append((seconds, before_s))
            self._learn(features, seconds)
            if len(self._block) >= settings.block:
                block, self._block = self._block, []
                if abs(_median([took / thought for took, thought in block]) - 1) > settings.drift:
                    self._change(block)
            return
        self.outliers += 1
        if self._held and (self._held[-1][0] > self._held[-1][1]) != (ratio > 1):
            self._held.clear()
        self._held.append((seconds, before_s))
        if len(self._held) >= settings.patience:
            self._change(self._held)

    def _learn(self, features: Vector, seconds: float) -> None:
        forget = self._settings.forget
        # All lines forget: one that nothing teaches goes back to its prior's shape.
        for normal in self._learned:
            normal.fade(forget)
        # A sample teaches the line that the prior has on top there, and the one that is, if that is too high. The
        # latter alone would be a trap: a line that covers what belongs to another one goes on to be taught there.
        heights = [predicted((line,), features) for line in self.lines]
        before = [predicted((line,), features) for line in self._prior]
        taught = {before.index(max(before))}
        if max(heights) > seconds:
            taught.add(heights.index(max(heights)))
        for at in sorted(taught):
            # In units of the prediction: in units of the measurement, lucky samples would count more than others.
            self._learned[at].add(features, seconds - self._delay_s, max(heights))
        # A step that is mostly delayed says nothing of the level.
        if (prior_s := predicted(self._prior, features)) > 0 and self._delay_s <= max(heights) / 2:
            self._level[0] = forget * self._level[0] + (seconds - self._delay_s) / prior_s
            self._level[1] = forget * self._level[1] + 1
        self._update()

    def _update(self) -> None:
        level = self._level[0] / self._level[1]
        for at, (shape, learned) in enumerate(zip(self._shape, self._learned, strict=True)):
            # The prior's shape at the machine's level: its equations with both sides multiplied by `level`.
            gram = [
                [a + b / (level * level) for a, b in zip(*rows, strict=True)]
                for rows in zip(learned.gram, shape.gram, strict=True)
            ]
            moment = [a + b / level for a, b in zip(learned.moment, shape.moment, strict=True)]
            self.lines[at] = nnls(gram, moment)
            self.lines[at][0] += self._delay_s

    def _change(self, samples: Sequence[tuple[float, float]]) -> None:
        """The machine takes longer, or less long, than it did: what was learned keeps its shape."""
        factor = _median([took / thought for took, thought in samples])
        more_s = max(-self._delay_s, _median([took - thought for took, thought in samples]))
        if self._is_delay(samples, factor, more_s):
            self._delay_s += more_s
        else:
            for normal in self._learned:
                normal.rescale(factor)
            self._level[0] *= factor
            self._delay_s *= factor
        for kept in (self._held, self._block, self._errors, self._ordered):
            kept.clear()
        self._update()

    def _is_delay(self, samples: Sequence[tuple[float, float]], factor: float, more_s: float) -> bool:
        """Whether `samples` are explained by so much more delay, rather than by a machine `factor` times as slow.

        Steps of about one length fit either. Then it is a delay that has ended, if there was one, or a first one, if
        the factor is beyond what machines do.
        """
        if more_s == 0:
            return False
        level = _median([abs(math.log(took / (thought * factor))) for took, thought in samples])
        delay = _median([abs(math.log(took / max(thought + more_s, MEASURABLE_S[0]))) for took, thought in samples])
        likely = self._delay_s > 0 if factor < 1 else self._delay_s == 0 and factor > self._settings.sudden
        return delay <= 2 * level if likely else delay < level / 2

    def _note(self, error: float, before_s: float) -> None:
        self._errors.append((error, before_s))
        insort(self._ordered, (error, before_s))
        if len(self._errors) > self._settings.window:
            del self._ordered[bisect_left(self._ordered, self._errors.pop(0))]

    def margins(self) -> tuple[float, ...] | None:
        return margins_by_time(self._ordered) if len(self._errors) >= self._settings.trusted else None

    def document(self) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "learned": [asdict(normal) for normal in self._learned],
            "level": self._level,
            "delay_s": self._delay_s,
            "errors": self._errors,
            "held": self._held,
            "block": self._block,
            "seen": self.seen,
            "outliers": self.outliers,
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        self.lines = [list(line) for line in document["lines"]]
        self._learned = [Normal([list(r) for r in n["gram"]], list(n["moment"])) for n in document["learned"]]
        self._level = list(document["level"])
        self._delay_s = document["delay_s"]
        self._errors, self._held, self._block = (
            [(first, second) for first, second in document[name]] for name in ("errors", "held", "block")
        )
        self._ordered = sorted(self._errors)
        self.seen = document["seen"]
        self.outliers = document["outliers"]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


class Refit:
    """Follows one worker: takes what each step and transfer took, gives the model of now.

    Recursive least squares with forgetting, in the form of normal equations: what is asked for is always the exact
    non-negative optimum of all samples, older ones counting less, beside the prior's shape at the machine's present
    level. One observation costs the same however many
    came before (some 100 us); memory is bounded by the window.

    `model()` is a value: whoever decides takes it at a point of decision, and never sees it change in between.
    """

    def __init__(self, prior: CostModel, settings: RefitSettings | None = None) -> None:
        self._prior = prior
        self._settings = settings or RefitSettings()
        self._prefill = _Learner(prior.prefill, PREFILL_GRID, self._settings)
        self._decode = _Learner(prior.decode, DECODE_GRID, self._settings)
        self._lanes = {
            lane.name: _Learner([(lane.setup_s, lane.run_s, lane.byte_s)], TRANSFER_GRID, self._settings)
            for lane in prior.lanes
        }

    @property
    def seen(self) -> int:
        """Samples taken, outliers included."""
        return sum(learner.seen for _, learner in self._learners())

    @property
    def outliers(self) -> int:
        """Samples beyond the outlier bound."""
        return sum(learner.outliers for _, learner in self._learners())

    def step(self, rows: Sequence[Row], batch: int, context: int, seconds: float) -> None:
        """A step took `seconds`. Of a mixed one, decode's predicted part is taken away and prefill learns the rest,
        unless less than a quarter is left: then it says too little."""
        if not rows:
            if batch > 0:
                self._decode.observe(decode_features(batch, context), seconds)
            return
        features = prefill_features(rows)
        if batch > 0:
            fixed = min(max(line[0] for line in self._prefill.lines), max(line[0] for line in self._decode.lines))
            left = seconds - (predicted(self._decode.lines, decode_features(batch, context)) - fixed)
            if left < seconds / 4:
                return
            seconds = left
        self._prefill.observe(features, seconds)

    def transfer(self, nbytes: int, runs: int, lane: str, seconds: float) -> None:
        """A read took `seconds`; a lane that the prior does not know is ignored."""
        if nbytes > 0 and (learner := self._lanes.get(lane)) is not None:
            learner.observe((1.0, float(runs), float(nbytes)), seconds)

    def model(self) -> CostModel:
        """What was learned so far."""
        margins = dict(self._prior.margins)
        for phase, learner in (("prefill", self._prefill), ("decode", self._decode)):
            if (own := learner.margins()) is not None:
                margins[phase] = own  # type: ignore[index]  # a loop variable of two literals is a str to mypy
        per_lane = [own for learner in self._lanes.values() if (own := learner.margins()) is not None]
        if per_lane:
            margins["transfer"] = tuple(max(values) for values in zip(*per_lane, strict=True))
        return replace(
            self._prior,
            prefill=tuple((a, b, c, d) for a, b, c, d in self._prefill.lines),
            decode=tuple((a, b, c) for a, b, c in self._decode.lines),
            lanes=tuple(Lane(name, *learner.lines[0]) for name, learner in self._lanes.items()),
            margins=tuple(sorted(margins.items())),
        )

    def document(self) -> dict[str, Any]:
        """The whole state as JSON; what `of` makes of it goes on bit for bit as this one would."""
        learners = {name: learner.document() for name, learner in self._learners()}
        return {"prior": self._prior.document(), "settings": asdict(self._settings), "learners": learners}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Refit:
        """The state that `document` describes."""
        refit = cls(CostModel.of(document["prior"]), RefitSettings(**document["settings"]))
        for name, learner in refit._learners():
            learner.restore(document["learners"][name])
        return refit

    def _learners(self) -> list[tuple[str, _Learner]]:
        lanes = [(f"lane {name}", learner) for name, learner in self._lanes.items()]
        return [("prefill", self._prefill), ("decode", self._decode), *lanes]
