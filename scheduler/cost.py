"""How long a step or a transfer takes, as few numbers as do. Pure: fitted elsewhere, given as a value.

The times of a phase are the maximum of a few lines, and a line has only non-negative coefficients: what more work
costs is never less, whatever was fitted. A memory-bound line (weights are read once, however few the rows) and a
compute-bound one are what the roofline says; DistServe, too, splits decode by batch (appendix A, its simulator's
`time_estimator`). A maximum of lines joins them without a jump, and has a closed sum over the steps of a decode run.

| line | seconds = |
|---|---|
| prefill | p0 + p1 * sum(new) + p2 * sum(new * (cached + new / 2)) + p3 * rows |
| decode | d0 + d1 * batch + d2 * context |
| lane | setup + run * runs + byte * bytes |

The prefill's third feature counts pairs of a query and a key; with cached = 0 it is half of DistServe's sum of squares,
and it is half of LAPS's L * (L + 2 * H).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Row = tuple[int, int]  # (new, cached) tokens of one request in a step; new > 0
PrefillLine = tuple[float, float, float, float]
DecodeLine = tuple[float, float, float]
Phase = Literal["prefill", "decode", "transfer"]

QUANTILES = (0.5, 0.8, 0.9, 0.95, 0.99)
FORMAT = 1


def prefill_features(rows: Iterable[Row]) -> tuple[float, float, float, float]:
    """What a prefill line multiplies: (1, new tokens, pairs of query and key, rows)."""
    count, tokens, twice = 0, 0, 0
    for new, cached in rows:
        count += 1
        tokens += new
        twice += new * (2 * cached + new)
    return 1.0, float(tokens), twice / 2, float(count)


def decode_features(batch: int, context: int) -> tuple[float, float, float]:
    """What a decode line multiplies: (1, rows, tokens attended to by all rows together)."""
    return 1.0, float(batch), float(context)


@dataclass(frozen=True, slots=True)
class Lane:
    """What moving bytes costs over one kind of path: `setup_s` once, `run_s` a contiguous run, `byte_s` a byte."""

    name: str
    setup_s: float
    run_s: float
    byte_s: float

    def __post_init__(self) -> None:
        _coefficients(f"lane {self.name}", (self.setup_s, self.run_s, self.byte_s), 3)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of steps and transfers for one model on one kind of worker; a value, JSON both ways, bit for bit.

    | field | unit | meaning |
    |---|---|---|
    | name | | which model on what |
    | prefill, decode | seconds a unit of each feature | lines, of which the highest counts |
    | lanes | seconds | by name |
    | margins | relative, at QUANTILES | by phase: measured / predicted - 1, at least 0, of what this was learned from |
    """

    name: str
    prefill: tuple[PrefillLine, ...]
    decode: tuple[DecodeLine, ...]
    lanes: tuple[Lane, ...] = ()
    margins: tuple[tuple[Phase, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        if not self.prefill or not self.decode:
            raise ValueError(f"cost model {self.name}: got no line for prefill or decode, wanted one of each at least")
        for line in self.prefill:
            _coefficients(f"cost model {self.name}: prefill", line, 4)
        for short in self.decode:
            _coefficients(f"cost model {self.name}: decode", short, 3)
        for phase, margins in self.margins:
            _coefficients(f"cost model {self.name}: margins of {phase}", margins, len(QUANTILES))
            if any(low > high for low, high in itertools.pairwise(margins)):
                raise ValueError(f"cost model {self.name}: margins of {phase}: got {margins}, wanted them ascending")

    def prefill_s(self, rows: Sequence[Row]) -> float:
        """Seconds of one step that prefills `rows`; 0 without any."""
        if not rows:
            return 0.0
        _, tokens, pairs, count = prefill_features(rows)
        return max([line[0] + line[1] * tokens + line[2] * pairs + line[3] * count for line in self.prefill])

    def decode_s(self, batch: int, context: int) -> float:
        """Seconds of one step that decodes `batch` rows which attend to `context` tokens in all; 0 without rows."""
        if batch <= 0:
            return 0.0
        longest_s = 0.0
        for fixed_s, row_s, token_s in self.decode:
            seconds = fixed_s + row_s * batch + token_s * context
            if seconds > longest_s:
                longest_s = seconds
        return longest_s

    def step_s(self, rows: Sequence[Row], batch: int, context: int) -> float:
        """Seconds of one step with both: the sum of the two, less what they share (weights are read once).

        Shared is the smaller of the two fixed parts, so that the result is at least either phase's own time, and
        prefill added to a decode step costs what Sarathi-Serve's mixed batches cost: its marginal time.
        """
        if not rows:
            return self.decode_s(batch, context)
        if batch <= 0:
            return self.prefill_s(rows)
        return self.prefill_s(rows) + (self.decode_s(batch, context) - self.shared_s())

    def shared_s(self) -> float:
        """Seconds that a step with both phases pays once, and steps of either pay each."""
        return min(max(line[0] for line in self.prefill), max(line[0] for line in self.decode))

    def decode_span_s(self, batch: int, context: int, steps: int) -> float:
        """Seconds of `steps` decode steps in a row, the first at `context`, each later one `batch` tokens longer.

        The sum of `decode_s` in time independent of `steps`, and non-decreasing in it to the last bit, so that the
        end of each step may be computed from where the run began.
        """
        if batch <= 0:
            return 0.0
        if steps == 1:
            return self.decode_s(batch, context)
        # Each line is an arithmetic series; walk from each one that is on top to the next, mostly none.
        total_s, at = 0.0, 0
        while at < steps:
            top = slope = -1.0
            for fixed_s, row_s, token_s in self.decode:
                growth = token_s * batch
                height = fixed_s + row_s * batch + token_s * context + growth * at
                if height > top or (height == top and growth > slope):
                    top, slope = height, growth
            until = steps
            for fixed_s, row_s, token_s in self.decode:
                growth = token_s * batch
                if growth > slope:
                    first = fixed_s + row_s * batch + token_s * context
                    ahead = (top - (first + growth * at)) / (growth - slope)
                    if ahead < until - at:
                        until = at + max(1, math.ceil(ahead))
            count = until - at
            total_s += count * top + slope * (count * (count - 1) // 2)
            at = until
        return total_s

    def decode_steps_within(self, batch: int, context: int, seconds: float, limit: int) -> int:
        """The most steps, `limit` at most, whose `decode_span_s` is no longer than `seconds`."""
        low, high = 0, max(0, limit)
        # No step is shorter than the first, so they are no more than that many; none is longer than the last of these.
        first_s = self.decode_s(batch, context)
        if seconds < first_s * high:
            high = min(high, int(seconds / first_s) + 1) if seconds > 0 else 0
            low = max(0, int(seconds / self.decode_s(batch, context + batch * high)) - 1)
        while low < high:
            middle = (low + high + 1) // 2
            if self.decode_span_s(batch, context, middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def transfer_s(self, nbytes: int, runs: int, lane: str) -> float:
        """Seconds to move `nbytes` in `runs` contiguous runs over the lane of that name; 0 for no bytes."""
        if nbytes <= 0:
            return 0.0
        cost = self.lane(lane)
        return cost.setup_s + cost.run_s * runs + cost.byte_s * nbytes

    def lane(self, name: str) -> Lane:
        """The lane of that name; ValueError where there is none."""
        for lane in self.lanes:
            if lane.name == name:
                return lane
        raise ValueError(f"lane: got {name!r}, wanted one of {[lane.name for lane in self.lanes]} of {self.name}")

    def at(self, prefill: float = 1.0, decode: float = 1.0) -> CostModel:
        """The same on a machine whose prefill and decode steps take so many times as long; lanes are as they are."""
        fills = tuple((a * prefill, b * prefill, c * prefill, d * prefill) for a, b, c, d in self.prefill)
        steps = tuple((a * decode, b * decode, c * decode) for a, b, c in self.decode)
        return replace(self, prefill=fills, decode=steps)

    def margin(self, phase: Phase, q: float) -> float:
        """What to add, relative, so that a share `q` of times of this phase are no longer than predicted.

        `seconds * (1 + margin)` is what a deadline is tested with. Between QUANTILES linear, beyond them the outermost;
        0 where the model does not know its own errors.
        """
        margins = next((margins for known, margins in self.margins if known == phase), None)
        if margins is None:
            return 0.0
        for at in range(1, len(QUANTILES)):
            low, high = QUANTILES[at - 1], QUANTILES[at]
            if q <= high:
                share = max(0.0, (q - low) / (high - low))
                return margins[at - 1] + share * (margins[at] - margins[at - 1])
        return margins[-1]

    def document(self) -> dict[str, Any]:
        """The model as JSON; `of` reads it back bit for bit."""
        return {
            "format": FORMAT,
            "name": self.name,
            "prefill": [list(line) for line in self.prefill],
            "decode": [list(line) for line in self.decode],
            "lanes": {lane.name: [lane.setup_s, lane.run_s, lane.byte_s] for lane in self.lanes},
            "margins": {phase: list(margins) for phase, margins in self.margins},
        }

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> CostModel:
        """The model that `document` describes (other keys, such as where it comes from, are left alone)."""
        if document.get("format") != FORMAT:
            raise ValueError(f"cost model: format: got {document.get('format')!r}, wanted {FORMAT}")
        missing = [key for key in ("name", "prefill", "decode", "lanes", "margins") if key not in document]
        if missing:
            raise ValueError(f"cost model: got no {', '.join(missing)}, wanted all of a cost model's fields")
        return cls(
            document["name"],
            tuple(tuple(line) for line in document["prefill"]),
            tuple(tuple(line) for line in document["decode"]),
            tuple(Lane(name, *costs) for name, costs in document["lanes"].items()),
            tuple((phase, tuple(margins)) for phase, margins in document["margins"].items()),
        )


@dataclass(frozen=True, slots=True)
class Repriced:
    """An event of policies that predict: steps take as long as this model says, from now on."""

    cost: CostModel


def _coefficients(what: str, values: Sequence[float], count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{what}: got {len(values)} numbers, wanted {count}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{what}: got {value!r}, wanted numbers from 0 on")
