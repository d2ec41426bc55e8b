"""How many tokens of a prompt go into a step beside decode rows. Pure."""

from __future__ import annotations

from scheduler.cost import CostModel, Row
from scheduler.mixed_events import MixedConfig


class Chunks:
    """Sizes chunks by a token budget and, where a gap is given, by the cost model.

    Sarathi-Serve, section 4.3, chooses one budget as the largest whose step meets the gap; here it is chosen for each
    step, with the decode rows and the tokens behind the chunk that it really has.
    """

    def __init__(self, config: MixedConfig, cost: CostModel | None) -> None:
        self._config = config
        self._cost = cost if config.gap_s else None

    def reprice(self, cost: CostModel) -> None:
        """Steps take another time than before."""
        if self._cost is not None:
            self._cost = cost

    def take(self, want: int, behind: int, left: int, others: list[Row], beside: tuple[int, int]) -> int:
        """Of a prompt's `want` tokens behind others of its own, with `left` of the budget; 0 if it has to wait.

        `others` are the chunks that the step has, `beside` its decode rows and their context.
        """
        if self._config.order == "prefill_first":
            return want if want <= left or not others else 0
        most = min(want, left)
        return self.cut(others, behind, most, beside) if most > 0 else 0

    def cut(self, others: list[Row], behind: int, most: int, beside: tuple[int, int]) -> int:
        """The most tokens, `most` at most, with which the step stays below the gap, but enough for prompts to go on."""
        cost, gap_s = self._cost, self._config.gap_s
        if cost is None or cost.step_s([*others, (most, behind)], *beside) <= gap_s:
            return most
        low, high = 0 if others else min(most, self._config.least_tokens), most - 1
        while low < high:
            middle = (low + high + 1) // 2
            if cost.step_s([*others, (middle, behind)], *beside) <= gap_s:
                low = middle
            else:
                high = middle - 1
        return low
