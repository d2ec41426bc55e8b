"""What of a model directory is refused, and the one sentence that says so; no torch on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from core.errors import ModelError
from engine.config import ModelConfig, RopeScaling, fingerprint
from tests.checkpoints import LLAMA3_ROPE, make_llama

LLAMA3 = LLAMA3_ROPE | {"rope_theta": 500000.0}


@pytest.fixture(scope="module")
def raw(checkpoint):
    return json.loads((checkpoint("gqa") / "config.json").read_text())


REFUSED = [
    ({"surprise": 3}, "surprise: got 3, a key this engine does not know"),
    ({"sliding_window": 4096}, "sliding_window: got 4096, want None"),
    ({"attention_bias": True}, "attention_bias: got True, want False"),
    ({"mlp_bias": True}, "mlp_bias: got True, want False"),
    ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', want 'silu' or 'swish'"),
    ({"pretraining_tp": 2}, "pretraining_tp: got 2, want 1"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: got"),
    ({"architectures": ["MambaForCausalLM"]}, "architectures: got"),
    ({"architectures": None}, "architectures: got None"),
    ({"model_type": "qwen2"}, "model_type: got 'qwen2', want 'llama'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: got 0"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers: got 'two'"),
    ({"vocab_size": None}, "vocab_size: got None"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, want a divisor of 4"),
    ({"head_dim": 15}, "head_dim: got 15, want an even"),
    ({"head_dim": None, "hidden_size": 66}, "hidden_size: got 66, want a multiple of 4"),
    ({"rms_norm_eps": -1}, "rms_norm_eps: got -1"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: got 'yes'"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype: got 'float8_e4m3fn'"),
    ({"dtype": "int8"}, "dtype: got 'int8'"),
    ({"eos_token_id": "</s>"}, "eos_token_id: got '</s>'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type: got 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type: got 'linear'"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type: got 'dynamic'"),
    ({"rope_parameters": {"rope_type": "default", "odd": 1}}, "rope_parameters.odd: got 1"),
    ({"rope_parameters": 7}, "rope_parameters: got 7"),
    ({"rope_parameters": LLAMA3 | {"factor": None}}, "factor: got None"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor: got 4.0"),
    ({"rope_theta": 0}, "rope_theta: got 0"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused(raw, change, message):
    with pytest.raises(ModelError) as error:
        ModelConfig.parse(raw | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 5


def test_read(checkpoint):
    config = ModelConfig.read(checkpoint("gqa"))
    assert (config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim) == (2, 64, 4, 2, 16)
    assert (config.vocab, config.context, config.group) == (128, 4096, 2)
    assert (config.eos_token_ids, config.bos_token_id, config.dtype) == ((1,), 0, "float32")
    assert config.kv(16).page_nbytes == 2 * 2 * 2 * 16 * 16 * 4


def test_both_spellings_of_rope_read_alike(raw):
    old = ModelConfig.parse(raw | {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0})
    new = {key: value for key, value in raw.items() if key not in ("rope_scaling", "rope_theta")}
    assert ModelConfig.parse(new | {"rope_parameters": LLAMA3}) == old
    assert old.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    assert ModelConfig.parse(new | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}).rope_theta == 7.0


def test_end_tokens_come_from_both_files(tmp_path):
    folder = make_llama(tmp_path, eos=[1, 5])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9], "temperature": 0.6}))
    assert ModelConfig.read(folder).eos_token_ids == (1, 5, 9)


def test_transformers_writes_configs_that_are_read(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert ModelConfig.read(tmp_path).hidden == 64


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_no_config(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.read(tmp_path)


def test_fingerprint_follows_shape_and_settings_not_spelling(tmp_path, checkpoint):
    base = checkpoint("gqa")
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    assert fingerprint(copy) == fingerprint(base)
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"transformers_version": "9", "use_cache": False}))
    assert fingerprint(copy) == fingerprint(base)
    (copy / "config.json").write_text(json.dumps(raw | {"rope_theta": 20000.0}))
    assert fingerprint(copy) != fingerprint(base)
    assert fingerprint(make_llama(tmp_path / "shards", shards=2)) == fingerprint(make_llama(tmp_path / "one"))
    assert fingerprint(make_llama(tmp_path / "half", dtype="bfloat16")) != fingerprint(tmp_path / "one")
    assert len(fingerprint(base)) == 64


def test_config_imports_no_torch(checkpoint):
    code = f"import sys; from engine.config import fingerprint; fingerprint({str(checkpoint('gqa'))!r}); "
    code += "import engine.api; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
