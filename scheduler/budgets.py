"""A deadline for a whole answer, turned into goals for the first token and for the gaps. Pure.

After JITServe (NSDI'26), as far as its abstract says: what a request needs is what is left of it over the time that is
left, with its length forecast, and forecast anew as tokens appear. Here the forecast is that of
`scheduler/forecast.py`, and what comes of it are two promises that every other machine keeps already: `Slo.ttft_s`, by
which a prefill worker accepts and orders, and `Slo.gap_s`, by which a decode worker bounds its batch. JITServe's order
by goodput a unit of bandwidth, and its sub-deadlines of compound requests, are not here.

| parameter | default | unit | meaning |
|---|---|---|---|
| first | 0.25 | share | of the deadline that the first token may take |
| first_least | 0.05 | share | and what it is left, however long the answer will be |
| margin | 0.9 | share | of the deadline that is planned with: hops, and steps that take longer than said |
| least_gap_s | 0.02 | s | no batch is kept smaller than for this, however late a request is |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from core.request import Request, Slo
from scheduler.forecast import Forecast


@dataclass(frozen=True, slots=True)
class BudgetConfig:
    """See the table above."""

    first: float = 0.25
    first_least: float = 0.05
    margin: float = 0.9
    least_gap_s: float = 0.02


def split(deadline_s: float, tokens: int, config: BudgetConfig = BudgetConfig()) -> tuple[float, float]:
    """Seconds for the first of so many tokens and for each gap; together no more than the deadline, but for the floors.

    A short answer leaves time for both. What a long one needs at the least gap is taken from the first token's time,
    down to its floor; a deadline that even so is too short is planned for as well as these two allow.
    """
    planned_s, gaps = config.margin * deadline_s, max(0, tokens - 1)
    first_s = min(config.first * deadline_s, planned_s - gaps * config.least_gap_s)
    first_s = max(first_s, config.first_least * deadline_s)
    return first_s, max(config.least_gap_s, (planned_s - first_s) / gaps) if gaps else 0.0


def gap_left(left_s: float, tokens: int, config: BudgetConfig = BudgetConfig()) -> float:
    """Seconds for each of so many gaps that are left, of the time that is left for them."""
    return max(config.least_gap_s, left_s / max(1, tokens))


class Budgets:
    """What a gateway promises for requests with a deadline; learns how long answers are from all that end."""

    def __init__(self, config: BudgetConfig = BudgetConfig(), forecast: Forecast | None = None) -> None:
        self._config = config
        self._forecast = forecast or Forecast()

    def learn(self, tokens: int) -> None:
        """An answer ended after so many."""
        self._forecast.learn(tokens)

    def slo(self, request: Request) -> Slo:
        """The same with goals for what comes first; goals that were given stay where they are tighter."""
        slo, most = request.slo, request.sampling.max_tokens
        ttft_s, gap_s = split(slo.deadline_s, self._forecast.length(0, most), self._config)
        return replace(slo, ttft_s=_tighter(slo.ttft_s, ttft_s), gap_s=_tighter(slo.gap_s, gap_s))


def _tighter(given_s: float, budget_s: float) -> float:
    """Of two goals, 0 being none."""
    return min(given_s, budget_s) if given_s and budget_s else given_s or budget_s
