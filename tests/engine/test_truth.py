"""The engine against transformers on small random checkpoints: the same tokens, logits close in fp32."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from core.sampling import Sampling
from engine.api import Row
from tests.engine.play import Dealer, alone, chunks, poison

VARIANTS = ["gqa", "mha", "mqa", "tied", "llama3", "sharded", "odd", "wide"]
CLOSE = 1e-4


def greedy(model, prompt, count):
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def spy(engine, monkeypatch):
    """Collects the logits of every step."""
    seen = []
    forward = engine._model.forward

    def forward_and_keep(batch):
        logits = forward(batch)
        if logits is not None:
            seen.append(logits.clone())
        return logits

    monkeypatch.setattr(engine._model, "forward", forward_and_keep)
    return seen


MODES = [
    pytest.param({"native": True}, id="native"),
    pytest.param({"native": False}, id="torch"),
    pytest.param({"exact": True}, id="exact-native"),
    pytest.param({"exact": True, "native": False}, id="exact-torch"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_and_logits_equal_transformers(oracle, engine, monkeypatch, name, mode):
    one = engine(name, **mode)
    poison(one)
    model = oracle(name)
    prompt = random.Random(1).choices(range(2, 128), k=75)
    want = greedy(model, prompt, 12)
    with torch.inference_mode():
        truth = model(torch.tensor([prompt + want])).logits[0, len(prompt) - 1 : -1]
    for sizes in ((10**9,), (13,), (1,), (64, 3)):
        with monkeypatch.context() as patch:
            seen = spy(one, patch)
            assert [sample.token for sample in alone(one, prompt, Sampling(12), sizes)] == want
        assert (torch.cat(seen) - truth).abs().max() < CLOSE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gqa", "Qwen2, sliding window", "Gemma 2", "Gemma 3"])
def test_a_mixed_batch_equals_transformers(oracle, engine, name, mode):
    """Chunks of any size beside decode rows, some sequences far past the window."""
    one = engine(name, **mode, kv_memory=8 * 2**20)
    poison(one)
    model = oracle(name)
    rng = random.Random(5)
    dealer = Dealer(one, rng)
    prompts = {f"s{n}": rng.choices(range(2, 128), k=length) for n, length in enumerate((3, 16, 17, 100, 260, 31))}
    got: dict[str, list[int]] = {name: [] for name in prompts}
    work = {name: chunks(0, len(prompt), [rng.randint(1, 60) for _ in range(300)]) for name, prompt in prompts.items()}
    for name, prompt in prompts.items():
        one.open(name, prompt, dealer.deal(len(prompt) + 10), Sampling(10), len(prompt))
    while any(work.values()):
        rows = [Row(name, *left.pop(0)) for name, left in work.items() if left]
        for sample in one.step(rows):
            got[sample.sequence].append(sample.token)
            if sample.finish is None:
                work[sample.sequence].append((sample.position, sample.position + 1))
    assert got == {name: greedy(model, prompt, 10) for name, prompt in prompts.items()}


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_checkpoints_run_in_fp32_and_bf16(oracle, engine, name):
    prompt = list(range(2, 60))
    wide = engine(name, dtype="float32")
    assert [sample.token for sample in alone(wide, prompt, Sampling(8))] == greedy(oracle(name), prompt, 8)
    assert engine(name).dtype in (("bfloat16", "float32") if name == "bf16" else ("float32",))
    narrow = engine(name, dtype="bfloat16")
    assert narrow.kv.dtype == "bfloat16"
    assert len(alone(narrow, prompt, Sampling(8))) == 8


@pytest.mark.parametrize("mode", MODES)
def test_bf16_logits_are_close_to_fp32(oracle, engine, monkeypatch, mode):
    one = engine("bf16", dtype="bfloat16", **mode)
    model = oracle("bf16")
    prompt = random.Random(2).choices(range(2, 128), k=90)
    seen = spy(one, monkeypatch)
    tokens = [sample.token for sample in alone(one, prompt, Sampling(10), (40,))]
    with torch.inference_mode():
        truth = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    error = (torch.cat(seen) - truth).abs().max()
    assert error < 0.02 * truth.abs().max()
    assert np.isfinite(float(error))


def test_greedy_text_is_not_constant(engine):
    for name in ("gqa", "tied"):
        tokens = [sample.token for sample in alone(engine(name), list(range(2, 30)), Sampling(40))]
        assert len(set(tokens)) > 10
