"""The rate that a cell cannot pass, however well it is scheduled: work that arrives against time that passes. Pure.

Of all requests a `share` must be good, so the dearest others may be dropped, and what is left must be computed. A step
takes at least what each line of the cost model says, so all steps together at least what each line says of all tokens,
with as few steps as full ones would be. Batches are as large as memory, rows and the gap's goal let them be. Nothing
waits, and nothing is ever idle. A finite run may seem to pass it, because what is left at its end is not counted.

A search starts here: what the bound rules out is never simulated (as APEX prunes plans by its cost model), and no plan
is said to sustain more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from core.request import Slo
from scheduler.cost import CostModel
from scheduler.layout import rest_s


@dataclass(frozen=True, slots=True)
class Load:
    """Requests to plan for, as (new, cached, output) tokens; `units` of them begin at a rate: requests, or sessions."""

    rows: tuple[tuple[int, int, int], ...]
    units: int

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(new + cached for new, cached, _ in self.rows)

    @property
    def longest(self) -> int:
        """Prompt and output."""
        return max(new + cached + output for new, cached, output in self.rows)

    @property
    def prompt_tokens(self) -> float:
        """A unit, on average."""
        return sum(new + cached for new, cached, _ in self.rows) / self.units

    @property
    def output_tokens(self) -> float:
        """A unit, on average."""
        return sum(output for *_, output in self.rows) / self.units

    def scaled(self, prompt: float, output: float) -> Load:
        """Longer or shorter; what is cached grows with the prompt."""
        rows = [(max(1, round(n * prompt)), round(c * prompt), max(1, round(o * output))) for n, c, o in self.rows]
        return Load(tuple(rows), self.units)


@dataclass(frozen=True, slots=True)
class Bound:
    """Units a second, and why there are none if it is 0."""

    rate: float
    why: str = ""


def prefill_bound(cost: CostModel, stages: int, load: Load, slo: Slo, share: float, step_tokens: int) -> Bound:
    """Of one worker that only prefills, `cost` being that of a whole step over all its stages."""
    late = 0
    if slo.ttft_s:
        for new, cached, _ in load.rows:
            late += _alone_s(cost, stages, new, cached, step_tokens) > slo.ttft_s
    if late > (1 - share) * len(load.rows) + 1e-9:
        return Bound(
            0.0, f"{100 * late / len(load.rows):.0f} % of prompts take longer than {slo.ttft_s:g} s even alone"
        )
    parts = [_prompt(cost, new, cached, step_tokens) for new, cached, _ in load.rows]
    return Bound(load.units * stages / _work_s(parts, share))


def decode_bound(cost: CostModel, stages: int, load: Load, slo: Slo, share: float, rows: int, tokens: int) -> Bound:
    """Of one worker that only decodes: its stages have batches of their own, of `rows` and `tokens` of KV at most."""
    most, why = _batch(cost, load, slo, rows, tokens)
    if not most:
        return Bound(0.0, why)
    parts = [_answer(cost, most, *row) for row in load.rows]
    return Bound(load.units * stages / _work_s(parts, share))


def mixed_bound(
    cost: CostModel, stages: int, load: Load, slo: Slo, share: float, step_tokens: int, rows: int, tokens: int
) -> Bound:
    """Of one worker that does both in the same steps.

    A step takes at least what its prompts take alone; and it takes what its rows take, and more for its prompts by each
    line whose fixed part is not less than what both share.
    """
    alone = prefill_bound(cost, stages, load, slo, share, step_tokens)
    if not alone.rate:
        return alone
    most, why = _batch(cost, load, slo, rows, tokens)
    if not most:
        return Bound(0.0, why)
    shared_s = cost.shared_s()
    more = [line for line in cost.prefill if line[0] >= shared_s]
    parts = []
    for new, cached, output in load.rows:
        prompt_s = max(b * new + c * new * (cached + new / 2) + d for _, b, c, d in more)
        parts.append(tuple(prompt_s + value for value in _answer(cost, most, new, cached, output)))
    return Bound(min(alone.rate, load.units * stages / _work_s(parts, share)))


def _alone_s(cost: CostModel, stages: int, new: int, cached: int, step_tokens: int) -> float:
    total_s, done = rest_s(cost, stages, new, cached, step_tokens), 0
    while done < new:
        step = min(step_tokens, new - done)
        total_s += cost.prefill_s([(step, cached + done)]) / stages
        done += step
    return total_s


def _prompt(cost: CostModel, new: int, cached: int, step_tokens: int) -> tuple[float, ...]:
    """Seconds by each line, with its part of full steps' fixed costs."""
    pairs = new * (cached + new / 2)
    return tuple(a * new / step_tokens + b * new + c * pairs + d for a, b, c, d in cost.prefill)


def _answer(cost: CostModel, most: int, new: int, cached: int, output: int) -> tuple[float, ...]:
    steps = output - 1
    return tuple(steps * (f / most + r + t * (new + cached + output / 2)) for f, r, t in cost.decode)


def _batch(cost: CostModel, load: Load, slo: Slo, rows: int, tokens: int) -> tuple[int, str]:
    """Rows of a full batch, and why there are none."""
    steps = sum(output for *_, output in load.rows)
    context = sum(output * (new + cached + output / 2) for new, cached, output in load.rows) / steps
    most = min(rows, int(tokens / context))
    if not most:
        return 0, f"KV of one request of average length, {context:,.0f} tokens, does not fit into {tokens:,}"
    if not slo.gap_s:
        return most, ""
    if cost.decode_s(1, round(context)) > slo.gap_s:
        return 0, f"a step of one row takes {1e3 * cost.decode_s(1, round(context)):.1f} ms, longer than the gap's goal"
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if cost.decode_s(middle, round(middle * context)) <= slo.gap_s:
            low = middle
        else:
            high = middle - 1
    return low, ""


def _work_s(parts: Sequence[tuple[float, ...]], share: float) -> float:
    """Seconds of the cheapest share of them, by the line that says most."""
    count = math.ceil(share * len(parts))
    return max(1e-12, *(math.fsum(sorted(column)[:count]) for column in zip(*parts, strict=True)))
