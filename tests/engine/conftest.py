"""Checkpoints and engines shared by the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import TorchEngine
from engine.paced import PacedEngine
from tests.checkpoints import LLAMA3_ROPE, MODELS, make_llama, make_model

MIB = 2**20
ENGINES: dict[str, Any] = {"torch": TorchEngine, "paced": PacedEngine}
"""All that keep the contract of `engine.api`."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small models gain nothing by a second thread, and on a busy machine two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small checkpoints by name, made once: Llamas of many shapes, and `MODELS`."""
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
            folder = root / name
            made[name] = make_model(folder, MODELS[name]) if name in MODELS else make_llama(folder, **variants[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def oracle(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """transformers' model of a named checkpoint, in fp32, without a tensor too many or too few."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name], info = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint(name), dtype=torch.float32, output_loading_info=True
            )
            assert not info["missing_keys"] | info["unexpected_keys"]
        return made[name]

    return get


@pytest.fixture(scope="session")
def engine(checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """A new engine on a named checkpoint; hashes logits, small pages and arena unless told; `kind` of `ENGINES`."""

    def make(name: str = "gqa", kind: str = "torch", **options) -> Any:
        options = {"kv_memory": 2 * MIB, "page_tokens": 16, "hash_logits": True, **options}
        return ENGINES[kind](checkpoint(name), **options)

    return make
