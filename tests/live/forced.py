"""The entry of a worker whose policies suspend and swap whenever they can: the worker itself, told to decide so.

    python -m tests.live.forced SETTINGS

A prompt that comes overtakes the step that runs, and a decode worker lets in more rows than its memory can hold. The
worker's engine, shells and everything else are those that serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from control.engines import load
from control.process import Service, build_version, main, make
from control.worker import Worker
from core.config import ProcessConfig, WorkerConfig
from core.kv import KvShape
from core.pages import Pages
from core.worker import Identity
from scheduler.cost import CostModel
from scheduler.decode_policy import DecodePolicy
from scheduler.fcfs import Fcfs
from scheduler.forecast import Forecast, ForecastConfig
from scheduler.order import Take
from scheduler.policies import DECODE, PREFILL, Policy


class Eager(Fcfs):
    """Whoever waits overtakes the step that runs, and the step that was suspended."""

    def overtakes(self, now: float) -> str | None:
        return self.head(now)

    def suspended(self, step: Sequence[Take], now: float) -> None:
        pass

    def resumes(self, now: float) -> bool:
        return self.head(now) is None

    def resumed(self, step: Sequence[Take], now: float) -> None:
        pass


class Short(Forecast):
    """Takes every answer to be short."""

    def __init__(self) -> None:
        super().__init__(ForecastConfig(window=4, least=1, least_longer=1))
        super().learn(8)

    def learn(self, length: int, group: str = "") -> None:
        pass


class Forced(Policy):
    """Lets in more rows than memory holds."""

    def decode(self, me: Identity, shape: KvShape, ledger: Pages, cost: CostModel) -> DecodePolicy:
        policy = super().decode(me, shape, ledger, cost)
        policy.forecast = Short()
        return policy


FORCED = Forced(
    "forced",
    "suspends and swaps whenever it can",
    lambda config, cost: Eager(config.chunk_tokens, config.max_rows),
    prefill_config=replace(PREFILL, preempt=True),
    decode_config=replace(DECODE, admission="past_future"),
)


class ForcedWorker(Worker):
    """A worker with that policy."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._policy = FORCED


def forced(config: ProcessConfig, me: Identity, bug: Callable[[BaseException], None]) -> Service:
    """A worker that is told so; of another process, what `control.process` makes."""
    if not isinstance(config, WorkerConfig):
        return make(config, me, bug)
    return ForcedWorker(config, me, build_version(), load, bug)


if __name__ == "__main__":
    main(forced)
