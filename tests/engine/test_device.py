"""The engine on a GPU: the whole way of a step, in Triton's interpreter here and on a GPU where there is one."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from core.errors import LocalError, ModelError
from core.sampling import Sampling
from engine.api import Row
from engine.engine import TorchEngine
from tests.checkpoints import make_llama

PROMPTS = {"a": list(range(5, 42)), "b": list(range(60, 63))}


def text(folder: str, device: str) -> list[tuple[str, int, int]]:
    """Two prompts, one in chunks, then both decoded, one from a copied page on: (sequence, position, token).

    The last chunk stops wherever it can for another prompt; one of the two goes to host memory and comes back.
    """
    engine = TorchEngine(folder, kv_memory=2**20, host_memory=2**16, page_tokens=16, device=device, dtype="float32")
    for page, (name, prompt) in enumerate(PROMPTS.items()):
        pages = [9, 1, 5] if name == "a" else [3, 7]
        engine.open(name, prompt, pages, Sampling(8, temperature=page * 0.7, seed=3), len(prompt))
    found = engine.step([Row("a", 0, 20), Row("b", 0, 3)])
    last, stops = engine.begin([Row("a", 20, 37)]), 0
    while (end := last.run(lambda: True)) is None:
        stops += 1
        engine.open("c", PROMPTS["b"][:stops], [2], Sampling(1), min(stops, 3))
        found += engine.step([Row("c", 0, min(stops, 3))])
        engine.close("c")
    assert stops == 4
    found += end
    at = {each.sequence: each.position for each in found}
    at = {name: at[name] for name in "ab"}
    for step in range(6):
        if step == 1:
            tokens = engine.tokens("a")
            engine.swap_out("a", [9, 1, 5])
            engine.swap_in("a", [8, 0, 10])
            engine.open("a", tokens, [8, 0, 10], Sampling(8, seed=3), 37)
        if step == 3:
            engine.copy(3, 11)
            tokens = engine.tokens("b")
            engine.close("b")
            engine.open("b", tokens, [11], Sampling(8, temperature=0.7, seed=3), 3)
        for each in engine.step([Row(name, place, place + 1) for name, place in at.items()]):
            at[each.sequence] = each.position
            found.append(each)
    return [(each.sequence, each.position, each.token) for each in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), layers=2, hidden=32, heads=4, kv_heads=2, vocab=96)


def test_steps_on_a_gpu_say_what_steps_on_a_cpu_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # read by the child, which starts now, when it imports the kernels
        pool.submit(os.getpid).result()
        monkeypatch.delenv("TRITON_INTERPRET")
        found = pool.submit(text, str(folder), "cuda").result()
    assert found == text(str(folder), "cpu")


@pytest.mark.gpu
def test_graphs_of_a_real_gpu_do_too(folder: Path) -> None:
    assert text(str(folder), "cuda") == text(str(folder), "cpu")


def test_what_a_gpu_cannot_do_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="device: got 'tpu', want one of"):
        TorchEngine(folder, kv_memory=2**20, device="tpu")
    with pytest.raises(ModelError, match="exact: got true on a GPU"):
        TorchEngine(folder, kv_memory=2**20, device="cuda", exact=True)


def test_a_gpus_arena_is_not_the_hosts(folder: Path) -> None:
    engine = TorchEngine(folder, kv_memory=2**20)
    engine._arena.memory = None
    with pytest.raises(LocalError, match="arena"):
        _ = engine.arena
