"""Which engine a worker runs, and what its numbers depend on. The only place outside engine/ that loads torch."""

from __future__ import annotations

import logging

from core.config import WorkerConfig
from core.worker import Numerics
from engine.api import Engine
from engine.config import ModelConfig, fingerprint
from engine.grammar import GrammarMissing, Grammars

log = logging.getLogger("baton.engine")

Loaded = tuple[Engine, Numerics, str, int]
"""The engine, its numerics, the model's fingerprint and its context length."""


def load(config: WorkerConfig) -> Loaded:
    """The engine that the settings name; raises SetupError."""
    return _paced(config) if config.engine == "paced" else _torch(config)


def _torch(config: WorkerConfig) -> Loaded:
    import torch

    from engine.engine import TorchEngine
    from kernels.linear import pairs, tiles

    engine = TorchEngine(
        config.model,
        kv_memory=config.kv_memory,
        host_memory=config.host_memory,
        page_tokens=config.page_tokens,
        dtype=config.dtype or None,
        exact=config.exact,
        threads=config.threads,
        hash_logits=config.hash_logits,
        grammars=_grammars(config.model),
    )
    cpu = torch.backends.cpu.get_cpu_capability()
    cpu += " AMX" if tiles() else " BF16" if pairs() else ""
    numerics = Numerics(config.exact, engine.kv.dtype, config.threads, f"{cpu}, {engine.backend}")
    return engine, numerics, fingerprint(config.model), engine.context


def _grammars(model: str) -> Grammars | None:
    """What makes texts match schemas and grammars, where that can be had."""
    try:
        known = ModelConfig.read(model)
        return Grammars(model, known.vocab, known.eos_token_ids)
    except GrammarMissing as missing:
        log.info("no structured output: %s", missing)
        return None


def _paced(config: WorkerConfig) -> Loaded:
    """Its numerics say that it is exact, whatever the settings: no worker with another engine can join it."""
    from engine.paced import VERSION, PacedEngine
    from sim.fleet import resolve

    cost, _, _ = resolve(config.cost, None, "tcp")
    engine = PacedEngine(
        config.model,
        kv_memory=config.kv_memory,
        host_memory=config.host_memory,
        page_tokens=config.page_tokens,
        dtype=config.dtype or None,
        cost=cost,
        pace=config.pace,
        stop_rate=config.stop_rate,
        hash_logits=config.hash_logits,
    )
    kind = f"the paced engine, version {VERSION}, stop rate {config.stop_rate:g}"
    return engine, Numerics(True, engine.kv.dtype, 1, kind), fingerprint(config.model), engine.context
