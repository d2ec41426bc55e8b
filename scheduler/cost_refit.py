"""Follows a worker's times, one live sample after the other. Pure, and plain Python.

Recursive least squares with forgetting, as normal equations of the relative error, solved for non-negative coefficients
(`scheduler/cost_fit.py`); with a prior that keeps its shape and takes the machine's level.
"""

from __future__ import annotations

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
    margins_of,
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
    | patience | 8 | samples | that many outliers in a row on one side are a change of level |
    | drift | 0.2 | relative | so is a block of samples whose median error is beyond it |
    | block | 32 | samples | of which that median is taken, outliers left out |
    | window | 256 | samples | of which the margins are quantiles, outliers included |
    | trusted | 16 | samples | in the window, before which margins are the prior's |
    """

    forget: float = 0.995
    prior_weight: float = 1.0
    outlier: float = 3.0
    patience: int = 8
    drift: float = 0.2
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
        self._errors: list[float] = []  # the window, oldest first
        self._ordered: list[float] = []
        self._held: list[float] = []  # measured / predicted of outliers in a row, on one side
        self._block: list[float] = []  # measured / predicted of others
        self.seen = 0
        self.outliers = 0

    def observe(self, features: Vector, seconds: float) -> None:
        before_s = predicted(self.lines, features)
        if not (MEASURABLE_S[0] <= seconds <= MEASURABLE_S[1] and before_s > 0):
            return
        self.seen += 1
        ratio = seconds / before_s
        self._note(ratio - 1)
        settings = self._settings
        if 1 / settings.outlier <= ratio <= settings.outlier:
            self._held.clear()
            self._block.append(ratio)
            self._learn(features, seconds)
            if len(self._block) >= settings.block:
                middle = _median(self._block)
                self._block.clear()
                if abs(middle - 1) > settings.drift:
                    self._change(middle)
            return
        self.outliers += 1
        if self._held and (self._held[-1] > 1) != (ratio > 1):
            self._held.clear()
        self._held.append(ratio)
        if len(self._held) >= settings.patience:
            self._change(_median(self._held))

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
            self._learned[at].add(features, seconds, max(heights))
        if (prior_s := predicted(self._prior, features)) > 0:
            self._level[0] = forget * self._level[0] + seconds / prior_s
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

    def _change(self, factor: float) -> None:
        """The machine takes `factor` times as long as it did: what was learned keeps its shape."""
        for normal in self._learned:
            normal.rescale(factor)
        self._level[0] *= factor
        for kept in (self._held, self._block, self._errors, self._ordered):
            kept.clear()
        self._update()

    def _note(self, error: float) -> None:
        self._errors.append(error)
        insort(self._ordered, error)
        if len(self._errors) > self._settings.window:
            del self._ordered[bisect_left(self._ordered, self._errors.pop(0))]

    def margins(self) -> tuple[float, ...] | None:
        return margins_of(self._ordered) if len(self._errors) >= self._settings.trusted else None

    def document(self) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "learned": [asdict(normal) for normal in self._learned],
            "level": self._level,
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
        self._errors = list(document["errors"])
        self._ordered = sorted(self._errors)
        self._held = list(document["held"])
        self._block = list(document["block"])
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
