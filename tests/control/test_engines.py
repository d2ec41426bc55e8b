"""Which engine a worker gets from its settings, and that workers with different ones never exchange KV."""

from __future__ import annotations

from dataclasses import replace

import pytest

from control.engines import load
from core.config import WorkerConfig
from core.errors import SetupError
from core.worker import Role
from engine.engine import TorchEngine
from engine.paced import PacedEngine
from scheduler.alike import mismatch
from tests.cast import D1, P1, worker
from tests.checkpoints import make_llama


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> WorkerConfig:
    """Settings of a worker of a tiny model."""
    model = make_llama(tmp_path_factory.mktemp("model"))
    return WorkerConfig("w", Role.PREFILL, "h:1", str(model), "m", kv_memory=2**20, page_tokens=16)


@pytest.mark.parametrize("exact", [True, False])
def test_a_paced_worker_and_one_with_the_model_are_refused_to_each_other(config, exact):
    paced, numbers, print_, context = load(replace(config, engine="paced", exact=exact))
    torch, others, same_print, same_context = load(replace(config, exact=exact))
    assert isinstance(paced, PacedEngine)
    assert isinstance(torch, TorchEngine)
    assert (paced.kv, print_, context) == (torch.kv, same_print, same_context)
    why = mismatch(
        replace(worker(P1, Role.PREFILL), numerics=others), replace(worker(D1, Role.DECODE), numerics=numbers)
    )
    assert why is not None
    what = "numerics.cpu: got the paced engine, version " if exact else "numerics.exact: got True from decode-1"
    assert why.startswith(what)
    assert mismatch(
        replace(worker(P1, Role.PREFILL), numerics=numbers), replace(worker(D1, Role.DECODE), numerics=others)
    )


def test_paced_workers_agree_if_they_draw_alike(config):
    """Neither threads nor pace change a token."""
    mine, same, other = (
        replace(worker(name, Role.DECODE), numerics=load(replace(config, engine="paced", **settings))[1])
        for name, settings in ((P1, {}), (D1, {"threads": 3, "pace": 0.0, "exact": True}), (D1, {"stop_rate": 0.5}))
    )
    assert mismatch(mine, same) is None
    assert "stop rate 0.5" in (mismatch(mine, other) or "")


def test_the_cost_model_is_the_one_that_was_named(config):
    slow, quick = (
        load(replace(config, engine="paced", cost=cost))[0]._cost.step_s([(512, 0)], 0, 0)  # type: ignore[attr-defined]
        for cost in ("a100-llama-2-70b-tp4", "h200-llama-3.1-8b")
    )
    assert slow > 2 * quick > 0
    with pytest.raises(SetupError, match="cost: got 'abacus', want DEVICE-MODEL"):
        load(replace(config, engine="paced", cost="abacus"))
