"""Deployments that are started once and shared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_llama
from tests.system.cluster import Cluster, Reference, cluster

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "model"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "system" in item.path.parts:
            item.add_marker(pytest.mark.live)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="session")
def tiny(scratch: Path) -> Path:
    """A random Llama whose texts are long and varied; 4 ids are specials and bytes, the rest has no text."""
    return make_llama(
        scratch / "tiny", layers=3, hidden=96, heads=6, kv_heads=2, head_dim=16, vocab=512, context=2048, tokenizer=True
    )


@pytest.fixture(scope="session")
def exact(tiny: Path, scratch: Path) -> Iterator[Cluster]:
    """2 prefill, 2 decode, 2 gateways; exact float32 with logits hashes."""
    with cluster(
        tiny, scratch, prefill=2, decode=2, gateways=2, exact=True, dtype="float32", hash_logits=True, chunk_tokens=96
    ) as running:
        yield running


@pytest.fixture(scope="session")
def reference(tiny: Path) -> Reference:
    """One exact float32 engine."""
    return Reference(tiny, exact=True, dtype="float32")
