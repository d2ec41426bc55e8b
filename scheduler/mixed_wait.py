"""How long a request would wait at a colocated worker for its first token. Pure.

Two lower bounds, of which the larger counts: the time to compute what is ahead of it, and the time until so many
sequences have ended as must for it to find a free row and memory, at the rate at which they ended of late.
"""

from __future__ import annotations

import math

from core.kv import KvShape
from scheduler.cost import CostModel
from scheduler.mixed_batch import Row
from scheduler.mixed_chunk import Chunks
from scheduler.mixed_events import MixedConfig, Step


class Waits:
    """Sums over everybody in line, kept as they come and go, and the speeds of late."""

    def __init__(self, shape: KvShape, config: MixedConfig, cost: CostModel | None, room: int) -> None:
        self._shape = shape
        self._config = config
        self._cost = cost
        self._chunks = Chunks(config, cost)
        self._tokens = 0
        """To compute, by all in line and by those that prefill."""
        self._pairs = 0
        """Twice their pairs of query and key."""
        self._pages = 0
        """To bind, by those that have not started."""
        self._count = 0
        """How many have not started."""
        self._seen = (0, 0, room, config.max_rows)
        """Decode rows, their context, room and free rows at the last decision."""
        self._tokens_per_s = 0.0
        self._ends = (0.0, 0.0, 0.0, 0.0)
        """Decayed counts of ended rows and of their pages, as of when, and since when."""

    def reprice(self, cost: CostModel) -> None:
        """Steps take another time than before; who was told to go by measured speeds goes on to."""
        if self._cost is not None:
            self._cost = cost
            self._chunks.reprice(cost)

    def owe(self, row: Row, left: int) -> None:
        """The row counts for so many tokens to compute from now on, the last ones of its goal."""
        goal, before = row.goal, row.left
        self._tokens += left - before
        self._pairs += left * (2 * goal - left) - before * (2 * goal - before)
        row.left = left

    def starts(self, row: Row, sign: int) -> None:
        """The row came into the line (1), or left it (-1)."""
        self._pages += sign * self._shape.pages_for(row.goal)
        self._count += sign

    def decided(self, rows: int, context: int, room: int, free: int) -> None:
        """The state as of a decision: what is predicted until the next one goes by it."""
        self._seen = rows, context, room, free

    def stepped(self, step: Step, seconds: float) -> None:
        """A step with spans took so long."""
        tokens = sum(span.stop - span.start for span in step.spans)
        # A small step is mostly fixed cost: its speed says nothing about a line, whose steps are full.
        if seconds > 0 and 2 * (tokens + step.rows) >= self._config.budget_tokens:
            speed = tokens / seconds
            self._tokens_per_s = 0.8 * self._tokens_per_s + 0.2 * speed if self._tokens_per_s else speed

    def ended(self, pages: int, now: float) -> None:
        """A row whose KV took so many pages ended."""
        count, freed, at, since = self._ends
        decay = math.exp((at - now) / self._config.memory_s)
        self._ends = count * decay + 1, freed * decay + pages, now, since if count else now

    def predicted_s(self, now: float, tokens: int, cached: int, pages: int, busy: bool) -> float:
        """Until `tokens` more behind `cached` ones are computed, in `pages`; 0 if nothing is known yet.

        `busy`: decode rows have an order, which has to end first.
        """
        computed_s = self._computed_s(tokens, cached, busy)
        _, _, room, free = self._seen
        count, freed, at, since = self._ends
        ends = float(max(0, self._count + 1 - free))
        short = self._pages + pages - room
        if short > 0 and freed:
            ends = max(ends, short * count / freed)
        if not ends:
            return computed_s
        memory_s = self._config.memory_s
        recent = count * math.exp((at - now) / memory_s)
        seconds = memory_s * -math.expm1((since - now) / memory_s)
        return max(computed_s, ends * seconds / recent) if recent else computed_s

    def check(self, rows: list[Row], waiting: list[Row]) -> None:
        """Invariants, given everybody on the worker and those who have not started."""
        assert self._tokens == sum(row.left for row in rows)
        assert self._pairs == sum(row.left * (2 * (row.goal - row.left) + row.left) for row in rows)
        assert self._pages == sum(self._shape.pages_for(row.goal) for row in waiting)
        assert self._count == len(waiting)

    def _computed_s(self, tokens: int, cached: int, busy: bool) -> float:
        total = self._tokens + tokens
        if self._cost is None:
            return total / self._tokens_per_s if self._tokens_per_s else 0.0
        if not total:
            return 0.0
        rows, context, _, _ = self._seen
        beside = (rows, context) if self._config.order == "chunked" else (0, 0)
        most = min(total, max(1, self._config.budget_tokens - beside[0]))
        # All steps as one average step, as many times over.
        behind = max(0, (self._pairs + tokens * (2 * cached + tokens)) // (2 * total) - most // 2)
        most = self._chunks.cut([], behind, most, beside)
        seconds = -(-total // most) * self._cost.step_s([(most, behind)], *beside)
        return seconds + self._cost.decode_s(rows, context) if busy else seconds
