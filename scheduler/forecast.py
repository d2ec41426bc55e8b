"""How long an output will be, from the lengths of the last ones, given how long it is already. Pure.

Past-Future (ASPLOS'25): the lengths of recently finished requests are the distribution of those that run, conditional
on being longer than what they have generated so far. The paper draws from it; here a quantile is taken, so that the
same history gives the same forecast, and admission is as cautious as the quantile is high.

| parameter | unit | default | meaning |
|---|---|---|---|
| window | outputs | 1000 | how many are remembered, overall and for each group |
| quantile | share | 0.8 | of the remembered outputs that are longer than this one is, so many are at most as said |
| least | outputs | 50 | with fewer remembered, the most that is allowed is said |
| least_longer | outputs | 4 | with fewer longer ones, `beyond` times what is generated is said |
| beyond | ratio | 1.25 | |
| groups | groups | 256 | whose own lengths are remembered, too; the one that ended nothing for longest goes first |
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1


@dataclass(frozen=True, slots=True)
class ForecastConfig:
    """See the table above."""

    window: int = 1000
    quantile: float = 0.8
    least: int = 50
    least_longer: int = 4
    beyond: float = 1.25
    groups: int = 256

    def __post_init__(self) -> None:
        if self.window < 1 or self.least < 1 or self.least_longer < 1 or self.groups < 0:
            raise ValueError(f"forecast: got {self}, wanted whole numbers from 1 on (groups: from 0 on)")
        if not 0 < self.quantile <= 1 or not self.beyond > 1:
            raise ValueError(f"forecast: got {self}, wanted 0 < quantile <= 1 < beyond")


@dataclass(slots=True)
class _History:
    """The last lengths, by age and by size."""

    recent: deque[int] = field(default_factory=deque)
    ordered: list[int] = field(default_factory=list)

    def add(self, length: int, window: int) -> None:
        self.recent.append(length)
        insort(self.ordered, length)
        if len(self.recent) > window:
            del self.ordered[bisect_left(self.ordered, self.recent.popleft())]


class Forecast:
    """The history of output lengths. Learning and asking cost O(log window), and a move of list entries."""

    def __init__(self, config: ForecastConfig | None = None) -> None:
        self.config = config or ForecastConfig()
        self._all = _History()
        self._groups: dict[str, _History] = {}
        """In order of the last length learnt."""

    def learn(self, length: int, group: str = "") -> None:
        """An output ended by itself after `length` tokens."""
        window = self.config.window
        self._all.add(length, window)
        if group and self.config.groups:
            history = self._groups.pop(group, None) or _History()
            history.add(length, window)
            self._groups[group] = history
            if len(self._groups) > self.config.groups:
                del self._groups[next(iter(self._groups))]

    def length(self, generated: int, most: int, group: str = "") -> int:
        """Tokens in all of an output that has `generated` by now and goes on: more than those, at most `most`."""
        config = self.config
        history = self._groups.get(group, self._all)
        if len(history.ordered) < config.least:
            history = self._all
            if len(history.ordered) < config.least:
                return most
        ordered = history.ordered
        shorter = bisect_right(ordered, generated)
        longer = len(ordered) - shorter
        if longer < config.least_longer:
            return min(most, max(generated + 1, math.ceil(generated * config.beyond)))
        return min(most, ordered[shorter + math.ceil(config.quantile * longer) - 1])

    def document(self) -> dict[str, Any]:
        """All of it as JSON; `of` reads it back."""
        return {
            "format": FORMAT,
            "config": asdict(self.config),
            "all": list(self._all.recent),
            "groups": {group: list(history.recent) for group, history in self._groups.items()},
        }

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Forecast:
        """The forecast that `document` describes."""
        if document.get("format") != FORMAT:
            raise ValueError(f"forecast: format: got {document.get('format')!r}, wanted {FORMAT}")
        forecast = cls(ForecastConfig(**document["config"]))
        forecast._all = _History(deque(document["all"]), sorted(document["all"]))
        for group, recent in document["groups"].items():
            forecast._groups[group] = _History(deque(recent), sorted(recent))
        return forecast
