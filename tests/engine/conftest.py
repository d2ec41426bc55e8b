"""Checkpoints and engines shared by the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.engine import TorchEngine
from tests.checkpoints import LLAMA3_ROPE, make_llama

MIB = 2**20


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small checkpoints by name, made once."""
    root = tmp_path_factory.mktemp("checkpoints")
    variants: dict[str, dict[str, Any]] = {
        "gqa": {},
        "mha": {"kv_heads": 4, "seed": 1},
        "mqa": {"kv_heads": 1, "seed": 2, "layers": 3},
        "tied": {"tied": True, "seed": 3},
        "llama3": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "seed": 4},
        "sharded": {"shards": 3, "seed": 5, "layers": 3},
        "odd": {"vocab": 131, "hidden": 48, "heads": 6, "kv_heads": 2, "intermediate": 76, "seed": 6},
        "wide": {"head_dim": 32, "seed": 7},
        "bf16": {"dtype": "bfloat16", "seed": 8},
        "fp16": {"dtype": "float16", "seed": 9},
    }
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_llama(root / name, **variants[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def engine(checkpoint: Callable[[str], Path]) -> Callable[..., TorchEngine]:
    """A new engine on a named checkpoint; hashes logits, small pages and arena unless told."""

    def make(name: str = "gqa", **options) -> TorchEngine:
        options = {"kv_memory": 2 * MIB, "page_tokens": 16, "hash_logits": True, **options}
        return TorchEngine(checkpoint(name), **options)

    return make
