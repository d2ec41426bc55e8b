"""Which engine a worker runs, and what its numbers depend on. The only place outside engine/ that loads torch."""

from __future__ import annotations

from core.config import WorkerConfig
from core.worker import Numerics
from engine.api import Engine


def load(config: WorkerConfig) -> tuple[Engine, Numerics, str, int]:
    """The engine, its numerics, the model's fingerprint and its context length; raises SetupError."""
    import torch

    from engine.config import fingerprint
    from engine.engine import TorchEngine

    engine = TorchEngine(
        config.model,
        kv_memory=config.kv_memory,
        page_tokens=config.page_tokens,
        dtype=config.dtype or None,
        exact=config.exact,
        threads=config.threads,
        hash_logits=config.hash_logits,
    )
    cpu = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_amx_tile_supported():
        cpu += " AMX"
    numerics = Numerics(config.exact, engine.kv.dtype, config.threads, f"{cpu}, {engine.backend}")
    return engine, numerics, fingerprint(config.model), engine.context
