"""Whom a prefill worker refused, and when to tell them that it would accept now. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.worker import Identity

Welcome = Callable[[int, float], bool]
"""Would an offer of so many new tokens, whose first is wanted in so many seconds, be accepted?"""


@dataclass(slots=True)
class _Refused:
    least: int
    """New tokens of the smallest; once smaller ones were told, what did not fit then."""
    most: int
    """And of the largest."""
    wait_s: float
    """In which the first token of one of them was wanted."""
    until: float
    """Nobody wants them afterwards."""


class Refusals:
    """One entry a gateway, whatever it was refused; it is told of a size once, and of a smaller one not before its next
    refusal."""

    def __init__(self) -> None:
        self._of: dict[Identity, _Refused] = {}

    def __len__(self) -> int:
        return len(self._of)

    def add(self, gateway: Identity, new: int, wait_s: float, now: float, wanted_s: float | None = None) -> None:
        """An offer of `new` new tokens was refused, whose first was wanted in `wait_s`; if it may fill no more of the
        time in which it is wanted than that, `wanted_s` says in which it is."""
        known, until = self._of.get(gateway), now + (wait_s if wanted_s is None else wanted_s)
        if known is None or known.until <= now:
            self._of[gateway] = _Refused(new, new, wait_s, until)
        else:
            known.least, known.most = min(known.least, new), max(known.most, new)
            known.wait_s, known.until = max(known.wait_s, wait_s), max(known.until, until)

    def drop(self, gateway: Identity) -> None:
        """It is gone."""
        self._of.pop(gateway, None)

    def told(self, now: float, welcome: Welcome) -> list[tuple[Identity, int]]:
        """Gateways to tell now, and how many new tokens fit: the fewest it was refused, doubled while that fits.

        What is more is told when the next of these numbers fits: one token more at a time would be a message a step.
        Forgotten are those that were told of their largest, and those whose requests nobody wants any more.
        """
        told: list[tuple[Identity, int]] = []
        for gateway, refused in list(self._of.items()):
            wait_s = min(refused.wait_s, refused.until - now)
            fits, tokens = 0, refused.least
            while wait_s > 0 and fits < refused.most and welcome(tokens, wait_s):
                fits, tokens = tokens, min(2 * tokens, refused.most)
            if fits:
                told.append((gateway, fits))
            if fits == refused.most or wait_s <= 0:
                del self._of[gateway]
            refused.least = tokens
        return told
