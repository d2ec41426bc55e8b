"""Every architecture keeps what docs/models.md says, and each of its parameters would be missed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from core.errors import ModelError
from core.sampling import Sampling
from engine import config as configs
from engine.config import ARCHITECTURES, ModelConfig
from engine.rotation import Llama3, Rotation, Yarn
from kernels.exact_cpu import ExactOps
from tests.checkpoints import MODELS
from tests.engine import conformance
from tests.engine.play import alone, poison


@pytest.fixture(scope="module")
def line(checkpoint, oracle):
    """What is measured of a model, measured once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = conformance.measure(name, checkpoint(name), oracle(name))
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_conforms(line, name):
    assert line(name).conforms, line(name)


def test_the_committed_table_says_what_is_measured(line):
    lines = [line(name) for name in MODELS]
    assert {one.architecture for one in lines} == set(ARCHITECTURES)
    want = conformance.without_errors(conformance.table(lines))
    assert conformance.without_errors(conformance.committed()) == want


def flags():
    """A model, what its config reads like with something forgotten, and what the loader then finds left over."""
    yarn = ModelConfig.parse(MODELS["Llama, yarn with mscale"]).rotation
    gemma3 = ModelConfig.parse(MODELS["Gemma 3"])
    plain = Rotation(1e4)
    yield "Llama 3", {"rotation": Rotation(500000.0)}, None
    yield "Llama 3", {"rotation": Rotation(1e4, Llama3(8.0, 1.0, 4.0, 32))}, None
    yield "Llama 3", {"rotation": Rotation(500000.0, Llama3(8.0, 1.0, 4.0, 64))}, None
    yield "Llama, linear rope", {"rotation": plain}, None
    for change in ({"gain": 1.0}, {"truncate": True}, {"beta_fast": 32.0}, {"beta_slow": 1.0}):
        assert isinstance(yarn.scaling, Yarn)
        yield "Llama, yarn with mscale", {"rotation": Rotation(5e3, dataclasses.replace(yarn.scaling, **change))}, None
    yield "Llama, attention bias", {"qkv_bias": False}, "[kqv]_proj.bias' is unexpected"
    yield "Llama, attention bias", {"out_bias": False}, "o_proj.bias' is unexpected"
    yield "Mistral", {"windows": (None, None)}, None
    yield "Mistral", {"windows": (23, 24)}, None
    yield "Mistral", {"windows": (24, 25)}, None
    yield "Qwen2", {"qkv_bias": False}, "[kqv]_proj.bias' is unexpected"
    yield "Qwen2.5, yarn", {"rotation": Rotation(1e6), "window_rotation": Rotation(1e6)}, None
    yield "Qwen2, sliding window", {"windows": (24, 24)}, None
    yield "Qwen3", {"qk_norm": False}, "[kq]_norm.weight' is unexpected"
    yield "Gemma 2", {"post_norms": False}, "feedforward_layernorm.weight' is unexpected"
    yield "Gemma 2", {"norm_offset": 0.0}, None
    yield "Gemma 2", {"activation": "silu"}, None
    yield "Gemma 2", {"embedding_scale": 1.0}, None
    yield "Gemma 2", {"score_scale": 32**-0.5}, None
    yield "Gemma 2", {"score_cap": None}, None
    yield "Gemma 2", {"logit_cap": None}, None
    yield "Gemma 2", {"windows": (None, 24, None, 24)}, None
    yield "Gemma 3", {"window_rotation": gemma3.rotation}, None
    yield "Gemma 3", {"rotation": Rotation(1e6)}, None
    yield "Gemma 3", {"windows": (24,) * 7}, None


@pytest.mark.parametrize(("name", "forgotten", "left_over"), [*flags()], ids=lambda value: str(value)[:60])
def test_a_forgotten_parameter_shows(engine, checkpoint, monkeypatch, name, forgotten, left_over):
    """At least a hundred times as far off as a conforming model may be, or tensors are left over."""
    right = engine(name, dtype="float32")
    wrong = dataclasses.replace(ModelConfig.read(checkpoint(name)), **forgotten)
    monkeypatch.setattr(configs.ModelConfig, "read", lambda folder: wrong)
    if left_over:
        with pytest.raises(ModelError, match=left_over):
            engine(name)
        return
    logits = [conformance._run(one, (40,))[1] for one in (right, engine(name, dtype="float32"))]
    assert (logits[0][0] - logits[1][0]).abs().max() > 100 * conformance.CLOSE


def test_norms_of_q_and_k_are_not_each_others(engine):
    one = engine("Qwen3", dtype="float32")
    right = conformance._run(one, (40,))[1]
    layers = one._model.weights.layers
    swapped = [dataclasses.replace(layer, qk_norms=layer.qk_norms[::-1]) for layer in layers]
    one._model.weights = dataclasses.replace(one._model.weights, layers=tuple(swapped))
    assert (conformance._run(one, (40,))[1][0] - right[0]).abs().max() > 100 * conformance.CLOSE


@pytest.mark.parametrize("options", conformance.BACKENDS.values(), ids=conformance.BACKENDS)
def test_keys_behind_every_window_are_not_read(engine, options):
    """Once past a window of all layers, the first pages may be lost."""
    one = engine("Mistral", dtype="float32", **options)
    want = [sample.logits_hash for sample in alone(one, conformance.PROMPT, Sampling(8), (70,))]
    poison(one)
    forward = one._model.forward

    def lose(batch):
        (segment,) = batch.segments
        seen = max(segment.start - 24 + 1, 0) // one.kv.page_tokens
        one._arena.pages[torch.from_numpy(segment.pages[:seen])] = torch.nan
        return forward(batch)

    one._model.forward = lose
    assert [sample.logits_hash for sample in alone(one, conformance.PROMPT, Sampling(8), (70,))] == want


def test_exact_masks_do_not_grow_with_the_context(engine):
    one = engine("gqa", exact=True, native=False, kv_memory=2**23)
    alone(one, [2] * 2000, Sampling(2))
    assert isinstance(one._model.ops, ExactOps)
    (attention,) = one._model.ops._attention.values()
    assert len(attention._masks) == 32
