"""The cast of the pure machines' tests: identities, requests, tickets, workers, and how hard hypothesis tries."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings

from core.kv import KvShape
from core.request import Request, Ticket
from core.sampling import Sampling
from core.worker import Identity, Member, Role

GATEWAY = Identity("gateway-1", 0x61)
OTHER_GATEWAY = Identity("gateway-2", 0x62)
P1 = Identity("prefill-1", 0x11)
P2 = Identity("prefill-2", 0x12)
D1 = Identity("decode-1", 0x21)
D2 = Identity("decode-2", 0x22)
MIXED = Identity("mixed-1", 0x31)
SHAPE = KvShape(layers=1, kv_heads=1, head_dim=2, page_tokens=4, dtype="float32")
"""Four tokens a page."""

_STEADY = settings(
    derandomize=True,
    deadline=None,
    print_blob=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
QUICK = settings(_STEADY, max_examples=100, stateful_step_count=50)
LONG = settings(_STEADY, max_examples=500, stateful_step_count=80)

efforts = pytest.mark.parametrize(
    "effort", [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
)
"""Runs a test of a state machine twice: a little in every run, for minutes among the slow ones."""


def ask(prompt: int = 6, max_tokens: int = 8, *, timeout_s: float = 100.0, start: int = 0) -> Request:
    """A greedy request whose prompt counts up from `start`."""
    return Request("r", tuple(range(start, start + prompt)), Sampling(max_tokens), timeout_s)


def ticket(
    counter: int = 1, *, attempt: int = 1, source: Identity = P1, sink: Identity = D1, minter: Identity = GATEWAY
) -> Ticket:
    """A ticket from P1 to D1 unless told otherwise."""
    return Ticket(minter, counter, attempt, source, sink)


def worker(identity: Identity, role: Role, *, pages: int = 100) -> Member:
    """A ready worker with so many pages of `SHAPE`."""
    return Member(identity, role, "", "", "b", model="m", fingerprint="f", kv=SHAPE, pages=pages, ready=True)
