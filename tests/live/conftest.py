"""Deployments shared by the live tests: started once, checked when they end; their logs are shown on failure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from core.config import DeploymentConfig
from tests.checkpoints import make_llama
from tests.live.cluster import Live, Reference
from tests.transfer.faults import write

HERE = Path(__file__).parent
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
TINY: dict[str, Any] = {"page_tokens": 16, "chunk_tokens": 64, "max_rows": 24, "kv_memory": "2M", "threads": 1}
"""Small pages, chunks and arenas, so that short prompts cross many of them and memory binds."""
TINY["profile_s"] = 0.0
"""Starts are not to take longer for it: cost models begin with a guess, and learn."""

_started: list[Live] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.live)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        for live in (live for live in _started if live.deployment.running):
            report.sections.append((f"log of {live.log.name}", live.tail()))
    return report


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte tokenizer, a chat template and several end tokens."""
    folder = make_llama(
        tmp_path_factory.mktemp("model") / "tiny",
        vocab=320,
        context=8192,
        dtype="bfloat16",
        tokenizer=True,
        eos=[1, *range(310, 314)],
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<eos>"}))
    return folder


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Live]:
    """Starts a deployment; whoever calls it also stops it. `how` goes to its launcher."""

    def start(
        name: str,
        model: Path,
        say: Callable[[str], None] = lambda line: None,
        faults: Path | None = None,
        how: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Live:
        config = DeploymentConfig(model=str(model), port=0, **{"check": True, **TINY, **settings})
        live = Live(config, model, tmp_path_factory.mktemp("logs") / f"{name}.log", say, faults, **(how or {}))
        _started.append(live)
        live.start()
        return live

    return start


@pytest.fixture(scope="session")
def live(launch: Callable[..., Live], model: Path) -> Iterator[Live]:
    """Two gateways, two prefill workers, one decode worker, fp32 in fast mode; most tests share it."""
    started = launch("live", model, prefill=2, decode=1, gateways=2, dtype="float32")
    yield started
    started.stop()


@pytest.fixture(scope="session")
def faulty(launch: Callable[..., Live], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Two prefill and two decode paced workers, whose lanes and messages obey the rules in `faults`.

    64 pages each, and no prefix that they are kept for: what is freed is soon used again.
    """
    settings = {"prefill": 2, "decode": 2, "engine": "paced", "hash_logits": True, "chunk_tokens": 32, "pace": 2.0}
    rules = tmp_path_factory.mktemp("faults") / "rules"
    started = launch("faulty", model, faults=rules, kv_memory="256K", prefix_cache=False, **settings)
    started.torn = True  # digests must differ here
    yield started
    write(rules, {})
    started.stop()


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    """What `live` must generate."""
    return Reference(model, dtype="float32")


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Tokenizer:
    """The model's tokenizer, without our code around it."""
    return Tokenizer.from_file(str(model / "tokenizer.json"))
