"""A group: workers of one deployment that serve one kind of requests, with pools, goals and bounds of their own."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from core.errors import SetupError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)
_POOL = re.compile(r"(\d+)\s+(prefill|decode|mixed)")
_GOAL = re.compile(r"(ttft_s|gap_s)\s*=\s*(\S+)")
_WANT = "NAME: COUNT prefill, COUNT decode, with mixed, ttft_s=S and gap_s=S where wanted"


@dataclass(frozen=True, slots=True)
class Group:
    """What a group has (P/D-Serve, fine-grained organisation: one per service and scenario).

    Requests name their group; those that name none go to the group without a name. Workers of two groups never
    exchange KV, so a group is a domain of trust as well.
    """

    name: str = ""
    """As requests give it; empty: of those that name none."""
    prefill: int = 0
    """Prefill workers."""
    decode: int = 0
    """Decode workers."""
    mixed: int = 0
    """Workers that do both."""
    ttft_s: float = 0.0
    """TTFT goal of its requests that bring none; 0: the deployment's."""
    gap_s: float = 0.0
    """Token gap goal of its requests that bring none; 0: the deployment's."""
    least_prefill: int = 0
    """Of its prefill and decode workers, the fewest that may prefill; 0: as few as one."""
    most_prefill: int = 0
    """Of its prefill and decode workers, the most that may prefill; 0: all but one."""

    def __post_init__(self) -> None:
        if self.name and not NAME.fullmatch(self.name):
            raise self._bad("name", "up to 63 letters, digits, '-', '_' and '.', of which the first is no sign")
        for field in ("prefill", "decode", "mixed", "least_prefill", "most_prefill"):
            if getattr(self, field) < 0:
                raise self._bad(field, "at least 0")
        for field in ("ttft_s", "gap_s"):
            if not 0 <= getattr(self, field) < math.inf:
                raise self._bad(field, "a finite time of at least 0")
        if not self.mixed and not (self.prefill and self.decode):
            raise SetupError(
                f"group {self.name!r}: got {self.prefill} prefill, {self.decode} decode, {self.mixed} mixed; "
                "want a prefill and a decode worker, or a mixed one"
            )
        least, most = self.prefills
        if self.prefill and not least <= self.prefill <= most:
            raise self._bad("prefill", f"{least} to {most}, its own bounds")

    @property
    def workers(self) -> int:
        """Engine processes."""
        return self.prefill + self.decode + self.mixed

    @property
    def prefills(self) -> tuple[int, int]:
        """The fewest and the most prefill workers that a change of the ratio may leave it with."""
        both = self.prefill + self.decode
        return max(1, self.least_prefill), min(self.most_prefill or both, both - 1)

    @classmethod
    def parse(cls, text: str) -> Group:
        """A group as a flag says it, "chat: 2 prefill, 1 decode, ttft_s=0.4"; SetupError on anything else."""
        name, mark, rest = text.partition(":")
        values: dict[str, float] = {}
        for part in rest.split(",") if mark else ():
            pool, goal = _POOL.fullmatch(part.strip()), _GOAL.fullmatch(part.strip())
            field = pool[2] if pool else goal[1] if goal else ""
            if not field or field in values:
                raise SetupError(f"group: got {part.strip()!r} in {text!r}, want {_WANT}")
            try:
                values[field] = int(pool[1]) if pool else float(goal[2]) if goal else 0
            except ValueError:
                raise SetupError(f"group: got {part.strip()!r} in {text!r}, want {_WANT}") from None
        if not values or not name.strip():
            raise SetupError(f"group: got {text!r}, want {_WANT}")
        return cls(name.strip(), **values)  # type: ignore[arg-type]

    def _bad(self, field: str, want: str) -> SetupError:
        return SetupError(f"group {self.name!r}: {field}: got {getattr(self, field)!r}, want {want}")
