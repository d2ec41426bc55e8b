"""Which requests were good, by class and tenant, as a gateway's clients saw them.

As the simulator judges (`sim/outcome.py`): served, the first token in time, 99 % of the gaps in time, and the whole
answer where it has a deadline; of the batch class all that were served. Who was refused or failed is not good; who left
by itself is not counted. Names of tenants come from clients, so only the first `TENANTS` get a label of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from core.request import Phase, Slo

TENANTS = 64
"""With labels of their own; all others together are one."""
OTHERS = "other tenants"
GAP_SHARE = 0.99
"""Of a request's gaps that must be in time."""


@dataclass(slots=True)
class Seen:
    """What a client saw of its request."""

    ttft_s: float | None = None
    gaps: int = 0
    late: int = 0
    """Of these, longer than was promised."""

    def gap(self, seconds: float, count: int, slo: Slo) -> None:
        """So many gaps of equal length."""
        self.gaps += count
        if slo.gap_s and seconds > slo.gap_s:
            self.late += count


def good(seen: Seen, slo: Slo, total_s: float, phase: Phase) -> bool:
    """Whether all that was promised was kept."""
    if phase is not Phase.DONE or seen.ttft_s is None:
        return False
    if slo.batch:
        return True
    in_time = not slo.ttft_s or seen.ttft_s <= slo.ttft_s
    in_time = in_time and (not slo.deadline_s or total_s <= slo.deadline_s)
    return in_time and seen.late <= seen.gaps - math.ceil(GAP_SHARE * seen.gaps)


class Goodput:
    """Counts of good requests and others, with a bounded number of labels."""

    def __init__(self, count: Callable[[str, str, str], None]) -> None:
        """`count` hears of each request: its class, its tenant's label, and whether it was good, "yes" or "no"."""
        self._count = count
        self._tenants: set[str] = set()

    def ended(self, seen: Seen, slo: Slo, tenant: str, total_s: float, phase: Phase) -> None:
        """A request is over."""
        if phase is Phase.CANCELLED:
            return
        if tenant not in self._tenants:
            if len(self._tenants) < TENANTS:
                self._tenants.add(tenant)
            else:
                tenant = OTHERS
        judged = "yes" if good(seen, slo, total_s, phase) else "no"
        self._count(slo.kind, tenant, judged)
