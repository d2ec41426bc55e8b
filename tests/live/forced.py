"""The entry of a worker whose policies suspend and swap whenever they can: the worker itself, told to decide so.

    python -m tests.live.forced SETTINGS

A prompt that comes overtakes the step that runs, and a decode worker lets in more rows than its memory can hold. The
worker's engine, shells and everything else are those that serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from control import worker
from control.engines import load
from control.process import Service, build_version, main, make
from core.config import ProcessConfig, WorkerConfig
from core.worker import Identity
from engine.api import Engine
from scheduler.decode_policy import DecodeConfig, DecodePolicy
from scheduler.fcfs import Fcfs
from scheduler.forecast import Forecast, ForecastConfig
from scheduler.order import Take
from scheduler.prefill_policy import PrefillPolicy


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


class ForcedWorker(worker.Worker):
    """A worker with more rows than memory."""

    def _batch(self, engine: Engine, settings: DecodeConfig) -> DecodePolicy:
        policy = super()._batch(engine, replace(settings, admission="past_future"))
        policy.forecast = Short()
        return policy


def forced(config: ProcessConfig, me: Identity, bug: Callable[[BaseException], None]) -> Service:
    """A worker that is told so; of another process, what `control.process` makes."""
    if not isinstance(config, WorkerConfig):
        return make(config, me, bug)

    def policy(me: Identity, shape: Any, ledger: Any, settings: Any, *rest: Any, **more: Any) -> PrefillPolicy:
        return PrefillPolicy(me, shape, ledger, settings, Eager(settings.chunk_tokens, settings.max_rows))

    worker.__dict__["PrefillPolicy"] = policy
    return ForcedWorker(config, me, build_version(), load, bug)


if __name__ == "__main__":
    main(forced)
