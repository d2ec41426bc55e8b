"""Which steps a worker times before it serves, and the cost model that it makes of them. Pure.

A profile has seconds, not minutes, and an engine may be a thousand times slower than another. So steps of both phases
take turns, a short and a long one first, what lies between after them. Each is done once to warm up and then until it
was timed `repeats` times, or has had its share of the time; one that is predicted to take too long is skipped. What was
not timed is filled in by the prior, at the level that was measured: its shape counts, its speed does not. Margins are
never wider than the prior's: at a start other processes start as well, and of so few samples a tail is one of them.

| parameter | unit | default | meaning |
|---|---|---|---|
| budget_s | s | | time that the profile may take; a step that was begun is finished |
| repeats | steps | 3 | timed of each shape, after one that is not |
| prior_weight | samples | 1 | that the prior's shape counts for |
| slowest | share | 0.4 | of what is left of the time that one shape may be predicted to take |
| turn | share | 0.1 | of the whole time, after which a shape that was timed once is not repeated |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from scheduler.cost import CostModel, Phase, Row, decode_features, prefill_features
from scheduler.cost_fit import Sample, fit, margins_of

PREFILL_NEW = (16, 512, 128, 2048, 256, 1024, 32, 4096, 8192)
"""New tokens of a lone prompt, in the order in which they say most, after 64 and a full step."""
CACHED = (2048, 512, 8192)
"""Tokens that are there already, before the chunk."""
TOGETHER = (4, 8)
"""Prompts that share a step."""
DECODE = (
    *((1, 64), (16, 512), (1, 2048), (4, 256), (64, 256), (32, 64), (8, 1024), (16, 2048), (64, 1024)),
    *((2, 512), (128, 512), (1, 512), (32, 512), (8, 64), (4, 2048), (256, 256), (1, 8192)),
)
"""Rows, and the tokens that each attends to."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A step: prompts of (new, cached) tokens; or `decodes`, rows of one new token each behind so many cached ones."""

    rows: tuple[Row, ...]
    decodes: bool = False

    @property
    def batch(self) -> int:
        """Rows that decode."""
        return len(self.rows) if self.decodes else 0

    @property
    def context(self) -> int:
        """Tokens that these attend to, their own included."""
        return sum(new + cached for new, cached in self.rows) if self.decodes else 0

    def seconds(self, cost: CostModel) -> float:
        """As predicted."""
        return cost.decode_s(self.batch, self.context) if self.decodes else cost.prefill_s(self.rows)


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine can do in one step.

    | field | unit | meaning |
    |---|---|---|
    | pages, page_tokens | , tokens | of its arena |
    | context | tokens | of the longest sequence |
    | chunk_tokens | tokens | in a step that prefills |
    | max_rows | rows | in any step |
    """

    pages: int
    page_tokens: int
    context: int
    chunk_tokens: int
    max_rows: int

    def holds(self, shape: Shape, repeats: int) -> bool:
        """Whether a step of this shape can be taken so often, each decode row a token longer than the time before."""
        more = repeats + 1 if shape.decodes else 1
        pages = sum(-(-(new + cached + more) // self.page_tokens) for new, cached in shape.rows)
        return (
            pages <= self.pages
            and len(shape.rows) <= self.max_rows
            and all(new + cached + more <= self.context for new, cached in shape.rows)
            and (shape.decodes or sum(new for new, _ in shape.rows) <= self.chunk_tokens)
        )


def shapes(room: Room, repeats: int = 3) -> tuple[Shape, ...]:
    """The steps worth timing in an engine of this room, those that say most first, the phases in turn."""
    chunk = min(room.chunk_tokens, room.context - 2)
    prefills = [Shape(((min(chunk, 64), 0),)), Shape(((chunk, 0),))]
    prefills += [Shape(((new, 0),)) for new in PREFILL_NEW[:3]]
    prefills += [Shape(((min(chunk, 512), cached),)) for cached in CACHED[:1]]
    prefills += [Shape(((chunk // count, 0),) * count) for count in TOGETHER]
    prefills += [Shape(((new, 0),)) for new in PREFILL_NEW[3:]]
    prefills += [Shape(((64, cached),)) for cached in CACHED]
    prefills += [Shape(((min(chunk, 512), cached),)) for cached in CACHED[1:]]
    decodes = [Shape(((1, length),) * batch, True) for batch, length in DECODE]
    found: list[Shape] = []
    for pair in _in_turn(prefills, decodes):
        if pair not in found and all(new > 0 for new, _ in pair.rows) and room.holds(pair, repeats):
            found.append(pair)
    return tuple(found)


def _in_turn(one: list[Shape], other: list[Shape]) -> Iterator[Shape]:
    for at in range(max(len(one), len(other))):
        yield from one[at : at + 1]
        yield from other[at : at + 1]


class Profile:
    """A profile under way: `next` names a step, `took` is told its seconds, `model` is what came of it."""

    def __init__(
        self,
        room: Room,
        prior: CostModel,
        budget_s: float,
        *,
        repeats: int = 3,
        prior_weight: float = 1.0,
        slowest: float = 0.4,
        turn: float = 0.1,
    ) -> None:
        self.shapes = shapes(room, repeats)
        """All that there are to time."""
        self.repeats = repeats
        self._prior = prior
        self._budget_s = budget_s
        self._prior_weight = prior_weight
        self._slowest = slowest
        self._turn_s = turn * budget_s
        self._ahead = list(reversed(self.shapes))
        self._shape: Shape | None = None
        self._seconds: list[float] = []
        """Of the present shape, the first of them to warm up."""
        self._timed: list[tuple[Shape, tuple[float, ...]]] = []
        self.spent_s = 0.0
        self.skipped = 0

    @property
    def done(self) -> int:
        """Shapes that were timed or skipped."""
        return len(self._timed) + self.skipped

    def next(self) -> Shape | None:
        """The step to take now; None: enough is known, or the time is over."""
        if self._shape is not None:
            times = len(self._seconds)
            if self.spent_s < self._budget_s and (
                times < 2 or (times <= self.repeats and sum(self._seconds) < self._turn_s)
            ):
                return self._shape
            self._note(self._shape)
        while self._ahead and self.spent_s < self._budget_s:
            shape = self._ahead.pop()
            left_s = self._budget_s - self.spent_s
            # The first shape of each phase is taken whatever the prior says of its time.
            level = self._level(shape.decodes)
            if level is None or shape.seconds(self._prior) * level * (self.repeats + 1) <= self._slowest * left_s:
                self._shape = shape
                return shape
            self.skipped += 1
        return None

    def took(self, seconds: float) -> None:
        """The step that `next` named took so long."""
        self._seconds.append(seconds)
        self.spent_s += seconds

    def model(self, name: str) -> CostModel:
        """What was timed, and the prior's shape where nothing was; margins are its own errors, the prior's at most."""
        samples: dict[bool, list[Sample]] = {True: [], False: []}
        for shape, seconds in self._timed:
            samples[shape.decodes].append(Sample(_features(shape), _middle(seconds)))
        # A phase that was not timed is as much slower as the other one.
        known = [level for level in (self._level(False), self._level(True)) if level is not None]
        fallback = known[0] if known else 1.0
        fill, step = (fallback if (level := self._level(which)) is None else level for which in (False, True))
        at_level = self._prior.at(fill, step)
        model = fit(name, samples[False], samples[True], prior=at_level, prior_weight=self._prior_weight)
        margins, most = dict(model.margins), dict(self._prior.margins)
        for decodes in (False, True):
            errors = [
                each / shape.seconds(model) - 1
                for shape, seconds in self._timed
                if shape.decodes == decodes
                for each in seconds
            ]
            if errors:
                phase: Phase = "decode" if decodes else "prefill"
                own = margins_of(errors)
                margins[phase] = tuple(map(min, own, most[phase])) if phase in most else own
        return replace(model, margins=tuple(sorted(margins.items())))

    def _note(self, shape: Shape) -> None:
        """One that was interrupted by the end of the time counts with what it has, its warm-up if that is all."""
        seconds = tuple(self._seconds[1:] or self._seconds)
        if seconds:
            self._timed.append((shape, seconds))
        self._shape, self._seconds = None, []

    def _level(self, decodes: bool) -> float | None:
        """How many times as long as the prior says the steps of a phase took, the middle one of its shapes."""
        ratios = [
            _middle(seconds) / shape.seconds(self._prior) for shape, seconds in self._timed if shape.decodes == decodes
        ]
        return _middle(ratios) if ratios else None


def _features(shape: Shape) -> tuple[float, ...]:
    return decode_features(shape.batch, shape.context) if shape.decodes else prefill_features(shape.rows)


def _middle(values: tuple[float, ...] | list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
