"""Damaged and foreign checkpoints are refused by name; whole ones load with progress and without leftovers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ModelError, SetupError
from engine.config import ModelConfig
from engine.engine import TorchEngine
from engine.weights import load
from kernels.reference import ReferenceOps
from tests.checkpoints import make_llama

NORM = "model.layers.1.input_layernorm.weight"


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_tensor(name, value):
    return lambda folder: rewrite(folder, lambda tensors: tensors.__setitem__(name, value))


def drop_tensor(name):
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def edit_header(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"F32"', b'"F64"', 1))


SINGLE = [
    (drop_tensor(NORM), f"tensor '{NORM}' is missing"),
    (set_tensor(NORM, torch.zeros(63)), f"tensor '{NORM}': got shape [63], want [64]"),
    (set_tensor(NORM, torch.zeros(64, dtype=torch.int8)), f"tensor '{NORM}': got dtype I8"),
    (set_tensor("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)), "q_proj.bias' is unexpected"),
    (set_tensor("model.layers.2.input_layernorm.weight", torch.zeros(64)), "layers.2.input_layernorm.weight' is unex"),
    (cut, "model.safetensors: truncated: tensor"),
    (write("model.safetensors", b""), "truncated: 0 bytes"),
    (write("model.safetensors", b"\xff" * 64), "truncated: 64 bytes cannot hold the header"),
    (write("model.safetensors", (4).to_bytes(8, "little") + b"nope"), "not a safetensors header"),
    (write("model.safetensors", (9).to_bytes(8, "little") + b'{"a": {}}'), "not a safetensors header"),
    (edit_header, "got dtype F64"),
    (lambda folder: (folder / "model.safetensors").unlink(), "got no model.safetensors"),
]


@pytest.mark.parametrize(("damage", "message"), SINGLE, ids=[message[:40] for _, message in SINGLE])
def test_refused(tmp_path, checkpoint, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("gqa"), folder)
    damage(folder)
    with pytest.raises(ModelError) as error:
        TorchEngine(folder, kv_memory=2**20)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def drop_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def edit_map(change):
    def edit(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


SHARDED = [
    (drop_shard, "shard 'model-00002-of-00003.safetensors' is not in the directory"),
    (edit_map(lambda names: names.__setitem__("ghost", names[NORM])), "tensor 'ghost' is missing"),
    (edit_map(lambda names: names.pop(NORM)), f"tensor '{NORM}' is not listed"),
    (edit_map(lambda names: names.__setitem__(NORM, "../elsewhere")), "cannot be read as an index"),
    (write("model.safetensors.index.json", b"{"), "cannot be read as an index"),
    (write("model.safetensors.index.json", b"[]"), "cannot be read as an index"),
]


@pytest.mark.parametrize(("damage", "message"), SHARDED, ids=[message[:40] for _, message in SHARDED])
def test_refused_shards(tmp_path, checkpoint, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("sharded"), folder)
    damage(folder)
    with pytest.raises(ModelError) as error:
        TorchEngine(folder, kv_memory=2**20)
    assert message in str(error.value)


def test_q_k_v_and_gate_up_are_stacked_and_progress_is_told(checkpoint):
    folder = checkpoint("gqa")
    config = ModelConfig.read(folder)
    told = []
    weights = load(folder, config, ReferenceOps(), "float32", lambda done, total: told.append((done, total)))
    tensors = load_file(folder / "model.safetensors")
    parts = [tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(weights.layers[1].qkv.data, torch.cat(parts))
    parts = [tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(weights.layers[0].gate_up.data, torch.cat(parts))
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in tensors.values())
    assert told == sorted(told)


def test_leftovers_that_say_nothing_are_left_out(tmp_path):
    folder = make_llama(tmp_path, tied=True)
    extra = {"lm_head.weight": torch.zeros(128, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    rewrite(folder, lambda tensors: tensors.update(extra))
    TorchEngine(folder, kv_memory=2**20)


def test_options_are_checked(checkpoint):
    folder = checkpoint("gqa")
    with pytest.raises(SetupError, match="kv_memory: got 100 bytes, want at least one page of"):
        TorchEngine(folder, kv_memory=100)
    with pytest.raises(ModelError, match="dtype: got 'float16'"):
        TorchEngine(folder, kv_memory=2**20, dtype="float16")
    with pytest.raises(ModelError, match="page_tokens: got 48, want a divisor of 256"):
        TorchEngine(folder, kv_memory=2**20, page_tokens=48, exact=True)
