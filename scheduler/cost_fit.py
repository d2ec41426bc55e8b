"""Learns a cost model from profiles. Pure, and plain Python.

Everything is least squares of the *relative* error (a line divided by the time it shall give is 1), solved under the
constraint that no coefficient is negative: an unconstrained fit may buy accuracy where it was measured with a negative
coefficient, and extrapolates to nonsense (one of the published fits of DistServe's baseline does).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scheduler.cost import QUANTILES, CostModel, Lane, Phase, Row, decode_features, prefill_features

Vector = Sequence[float]
Matrix = list[list[float]]


@dataclass(frozen=True, slots=True)
class Sample:
    """Something took `seconds`; it counts as `weight` samples."""

    features: tuple[float, ...]
    seconds: float
    weight: float = 1.0


def prefill_sample(rows: Iterable[Row], seconds: float) -> Sample:
    """A step that prefilled `rows`."""
    return Sample(prefill_features(rows), seconds)


def decode_sample(batch: int, context: int, seconds: float) -> Sample:
    """A step that decoded `batch` rows of `context` tokens in all."""
    return Sample(decode_features(batch, context), seconds)


def transfer_sample(nbytes: int, runs: int, seconds: float) -> Sample:
    """A read of `nbytes` in `runs` runs."""
    return Sample((1.0, float(runs), float(nbytes)), seconds)


# --------------------------------------------------------------------------------------- non-negative least squares


def nnls(gram: Sequence[Vector], moment: Vector) -> list[float]:
    """The x >= 0 that minimises x'Gx / 2 - m'x for a positive semidefinite G: least squares from its normal equations.

    Lawson and Hanson's active set method (Solving Least Squares Problems, chapter 23), on columns scaled to length 1.
    A column that depends on those in use stays out.
    """
    size = len(moment)
    scale = [1 / math.sqrt(gram[j][j]) if gram[j][j] > 0 else 0.0 for j in range(size)]
    matrix = [[gram[i][j] * scale[i] * scale[j] for j in range(size)] for i in range(size)]
    target = [moment[j] * scale[j] for j in range(size)]
    tolerance = 1e-12 * max([abs(value) for value in target], default=0.0)
    x = [0.0] * size
    used: list[int] = []
    barred: set[int] = set()  # joining would not have helped, until another column has
    for _ in range(3 * size * size + 1):
        slack = [target[i] - sum([matrix[i][j] * x[j] for j in used]) for i in range(size)]
        able = [j for j in range(size) if scale[j] and j not in used and j not in barred and slack[j] > tolerance]
        if not able:
            break
        joining = max(able, key=lambda j: (slack[j], -j))
        used.append(joining)
        solved = _solve(matrix, target, used)
        if solved is None or solved[-1] <= 0:
            used.pop()
            barred.add(joining)
            continue
        barred.clear()
        while solved is not None and min(solved) <= 0:
            # As far towards the solution as all stay at or above zero; who gets there first leaves.
            step, leaving = min((x[j] / (x[j] - value), j) for j, value in zip(used, solved, strict=True) if value <= 0)
            for j, value in zip(used, solved, strict=True):
                x[j] += step * (value - x[j])
            x[leaving] = 0.0
            used = [j for j in used if j != leaving and (x[j] > 0 or j == joining)]
            for j in range(size):
                if j not in used:
                    x[j] = 0.0
            solved = _solve(matrix, target, used) if used else []
            if not solved:
                break
        if solved:
            for j, value in zip(used, solved, strict=True):
                x[j] = value
    return [value * factor for value, factor in zip(x, scale, strict=True)]


def _solve(matrix: Matrix, target: Vector, used: Sequence[int]) -> list[float] | None:
    """The solution of the rows and columns in `used`, by Cholesky; None where they depend on each other."""
    size = len(used)
    lower: Matrix = []
    for i in range(size):
        row: list[float] = []
        for j in range(i):
            other = lower[j]
            value = matrix[used[i]][used[j]] - sum([row[k] * other[k] for k in range(j)])
            row.append(value / other[j])
        pivot = matrix[used[i]][used[i]] - sum([value * value for value in row])
        if pivot <= 1e-11:
            return None
        row.append(math.sqrt(pivot))
        lower.append(row)
    solution = [0.0] * size
    for i in range(size):
        solution[i] = (target[used[i]] - sum([lower[i][k] * solution[k] for k in range(i)])) / lower[i][i]
    for i in reversed(range(size)):
        below = sum([lower[k][i] * solution[k] for k in range(i + 1, size)])
        solution[i] = (solution[i] - below) / lower[i][i]
    return solution


@dataclass(slots=True)
class Normal:
    """Normal equations of a weighted least squares problem."""

    gram: Matrix
    moment: list[float]

    @classmethod
    def zero(cls, size: int) -> Normal:
        return cls([[0.0] * size for _ in range(size)], [0.0] * size)

    def add(self, features: Vector, seconds: float, unit_s: float, weight: float = 1.0) -> None:
        """One more equation: features * x = seconds, with errors counted in `unit_s`."""
        scaled = [x / unit_s for x in features]
        goal = weight * (seconds / unit_s)
        for i, x in enumerate(scaled):
            if x:
                row, factor = self.gram[i], weight * x
                for j, other in enumerate(scaled):
                    row[j] += factor * other
                self.moment[i] += goal * x

    def fade(self, factor: float) -> None:
        """Every equation counts `factor` of what it did."""
        self._multiply(factor, factor)

    def rescale(self, factor: float) -> None:
        """As if everything had taken `factor` times as long."""
        self._multiply(1 / (factor * factor), 1 / factor)

    def _multiply(self, gram: float, moment: float) -> None:
        self.gram = [[value * gram for value in row] for row in self.gram]
        self.moment = [value * moment for value in self.moment]


# ------------------------------------------------------------------------------------------------------------- a fit


def predicted(lines: Iterable[Vector], features: Vector) -> float:
    """The highest of the lines."""
    return max([sum([a * b for a, b in zip(line, features, strict=True)]) for line in lines])


def fit_lines(samples: Sequence[Sample], count: int, kept: Sequence[bool] = ()) -> tuple[tuple[float, ...], ...]:
    """Up to `count` lines whose maximum has the least squared relative error found; `kept` names features to use.

    For one line the least there is. For more, samples are split by their second feature (tokens, rows) at eighths in
    every way, and each line is fitted anew to the samples where it is on top while that helps (as max-affine regression
    does: Magnani and Boyd, Convex piecewise-linear fitting).
    """
    if not samples:
        raise ValueError("samples: got none, wanted at least one")
    for sample in samples:
        if not (sample.seconds > 0 and math.isfinite(sample.seconds)):
            raise ValueError(f"samples: got {sample.seconds} seconds, wanted a positive number")
    ordered = sorted(samples, key=lambda s: (s.features[1], s.features, s.seconds))
    eighths = sorted({len(ordered) * part // 8 for part in range(1, 8)} - {0})
    best: tuple[float, tuple[tuple[float, ...], ...]] | None = None
    for cuts in itertools.combinations(eighths, min(count, len(eighths) + 1) - 1):
        edges = [0, *cuts, len(ordered)]
        groups = [ordered[start:end] for start, end in itertools.pairwise(edges)]
        last = math.inf
        for _ in range(16):
            lines = tuple(_line(group, kept) for group in groups if group)
            loss = _loss(lines, ordered)
            if best is None or loss < best[0]:
                best = loss, lines
            if loss >= last * (1 - 1e-6):
                break
            last = loss
            groups = [[] for _ in lines]
            for sample in ordered:
                heights = [predicted((line,), sample.features) for line in lines]
                groups[heights.index(max(heights))].append(sample)
    assert best is not None
    return best[1]


def _line(samples: Iterable[Sample], kept: Sequence[bool]) -> tuple[float, ...]:
    total: Normal | None = None
    for sample in samples:
        total = total or Normal.zero(len(sample.features))
        features = [x if not kept or kept[j] else 0.0 for j, x in enumerate(sample.features)]
        total.add(features, sample.seconds, sample.seconds, sample.weight)
    assert total is not None
    return tuple(nnls(total.gram, total.moment))


def _loss(lines: Sequence[Vector], samples: Iterable[Sample]) -> float:
    return sum([s.weight * (predicted(lines, s.features) / s.seconds - 1) ** 2 for s in samples])


def margins_of(errors: Iterable[float]) -> tuple[float, ...]:
    """Relative errors (measured / predicted - 1) at QUANTILES, at least 0: the smallest that covers such a share."""
    return margins_by_time([(error, 1.0) for error in sorted(errors)])


def margins_by_time(ordered: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """The same of (error, seconds predicted), ascending: the smallest that covers such a share of the seconds."""
    seconds = list(itertools.accumulate(seconds for _, seconds in ordered))
    return tuple(max(0.0, ordered[bisect_left(seconds, q * seconds[-1] * (1 - 1e-12))][0]) for q in QUANTILES)


def fit(
    name: str,
    prefill: Sequence[Sample] = (),
    decode: Sequence[Sample] = (),
    lanes: Mapping[str, Sequence[Sample]] | None = None,
    *,
    prior: CostModel | None = None,
    prior_weight: float = 8.0,
    lines: int = 2,
) -> CostModel:
    """The model of `lines` lines a phase that comes closest to the samples; its margins are its own errors on them.

    A prior, if given, counts as `prior_weight` further samples spread over a fixed grid; a phase or lane without
    samples is the prior's. Without either: ValueError.
    """
    if prior is None and not (prefill and decode):
        raise ValueError(f"fit {name}: got samples of one phase at most and no prior, wanted both phases or a prior")
    margins: dict[Phase, tuple[float, ...]] = dict(prior.margins) if prior is not None else {}

    def phase(which: Phase, own: Sequence[Sample], before: Sequence[Vector], grid: Sequence[Vector]) -> Any:
        if not own:
            return before
        weight = prior_weight / len(grid)
        extra = [Sample(tuple(x), predicted(before, x), weight) for x in grid] if before else []
        found = fit_lines([*own, *(sample for sample in extra if sample.seconds > 0)], lines)
        margins[which] = margins_of(s.seconds / predicted(found, s.features) - 1 for s in own)
        return found

    new_prefill = phase("prefill", prefill, prior.prefill if prior else (), PREFILL_GRID)
    new_decode = phase("decode", decode, prior.decode if prior else (), DECODE_GRID)
    known = {lane.name: lane for lane in prior.lanes} if prior is not None else {}
    errors: list[float] = []
    for lane, samples in (lanes or {}).items():
        line = fit_lines(samples, 1)[0]
        known[lane] = Lane(lane, *line)
        errors.extend(s.seconds / predicted((line,), s.features) - 1 for s in samples)
    if errors:
        margins["transfer"] = margins_of(errors)
    return CostModel(name, new_prefill, new_decode, tuple(known.values()), tuple(sorted(margins.items())))


# Where a prior is asked for its opinion: single requests and batches, short and long, fresh and continued.
PREFILL_GRID = tuple(
    prefill_features([(new, cached)] * count)
    for new, cached, count in itertools.product((16, 64, 256, 1024, 4096), (0, 2048), (1, 4))
)
DECODE_GRID = tuple(
    decode_features(batch, batch * length)
    for batch, length in itertools.product((1, 4, 16, 64, 256), (64, 512, 2048, 8192))
)
TRANSFER_GRID = tuple(
    (1.0, float(runs), float(nbytes)) for runs, nbytes in itertools.product((1, 8, 64), (2**16, 2**20, 2**24, 2**28))
)
