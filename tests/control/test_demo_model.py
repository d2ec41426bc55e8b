"""The committed demo model: small, on record, and it says what the demo shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from core.sampling import Sampling
from engine.api import Row
from engine.config import ModelConfig
from engine.engine import TorchEngine
from gateway.chat import ChatTemplate
from gateway.text import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
MODEL = DEMO / "model"


def test_it_is_small_and_its_training_is_on_record():
    record = json.loads((DEMO / "training.json").read_text())
    assert (MODEL / "model.safetensors").stat().st_size < 4_000_000
    assert 1_000_000 <= record["parameters"] <= 2_000_000
    for fact in ("seed", "corpus_sha256", "python", "threads"):
        assert record[fact] not in (None, ""), fact
    losses = [point["loss"] for point in record["loss"]]
    assert losses[-1] < 0.01 < losses[0]
    assert "Python Software Foundation" in (DEMO / "NOTICE").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_answers_the_demos_prompts_and_ends_by_itself(dtype: str):
    model = ModelConfig.read(MODEL)
    tokenizer, chat = Tokenizer(MODEL), ChatTemplate.read(MODEL)
    assert chat is not None
    engine = TorchEngine(MODEL, kv_memory=16 * 2**20, dtype=dtype, threads=1)
    prompts = json.loads((DEMO / "prompts.json").read_text())
    assert any(prompt["prompt_tokens"] > 1000 for prompt in prompts)
    assert any(prompt["prompt_tokens"] < 20 for prompt in prompts)
    for number, prompt in enumerate(prompts):
        ids = tokenizer.encode(chat.render(prompt["messages"]), special=False)
        name, pages = str(number), range(40)
        engine.open(name, ids, pages, Sampling(200, stop_token_ids=model.eos_token_ids), len(ids))
        said: list[int] = []
        sampled = engine.step([Row(name, 0, len(ids))])[0]
        while sampled.finish is None:
            said.append(sampled.token)
            sampled = engine.step([Row(name, sampled.position, sampled.position + 1)])[0]
        assert sampled.finish == "stop"
        assert tokenizer.decode(said) == prompt["answer"]
        engine.close(name)


def test_weights_and_record_belong_together():
    """The recitation on record was measured on these very weights."""
    record = json.loads((DEMO / "training.json").read_text())
    assert record["weights_sha256"] == hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
