"""What of a model directory is refused, and the one sentence that says so; no torch on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from core.errors import ModelError
from engine.config import ARCHITECTURES, ModelConfig, fingerprint
from engine.rotation import Linear, Llama3, Rotation, Yarn
from tests.checkpoints import GEMMA2, GEMMA3, LLAMA3_ROPE, MISTRAL, MODELS, QWEN2, QWEN3, make_llama

LLAMA3 = LLAMA3_ROPE | {"rope_theta": 500000.0}


@pytest.fixture(scope="module")
def raw(checkpoint):
    return json.loads((checkpoint("gqa") / "config.json").read_text())


REFUSED = [
    ({"surprise": 3}, "surprise: got 3, a key this engine does not know"),
    ({"sliding_window": 4096}, "sliding_window: got 4096, want None"),
    ({"attention_bias": 1}, "attention_bias: got 1, want true or false"),
    ({"mlp_bias": True}, "mlp_bias: got True, want False"),
    ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', want one of ['gelu_pytorch_tanh', 'silu', 'swish']"),
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
    ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_scaling.rope_type: got 'longrope'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor: got None"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, "rope_scaling.beta_fast: got 1"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}}, "original_max_posi"),
    ({"rope_scaling": {"type": "yarn", "factor": -1}}, "rope_scaling: factor: got -1"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}, "rope_scaling: truncate: got 1"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": "x"}}, "rope_scaling: mscale: got 'x'"),
    ({"rope_scaling": LLAMA3_ROPE, "rope_parameters": LLAMA3}, "beside rope_parameters, want one of the two"),
    ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention: got {}"),
    ({"rope_interleaved": True}, "rope_interleaved: got True, want False"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: got 50.0, want None"),
    ({"layer_types": ["full_attention"] * 2}, "layer_types: got ['full_attention', 'full_attention'], a key"),
    ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar: got 256, a key"),
    ({"num_local_experts": 8}, "num_local_experts: got 8, a key"),
    ({"architectures": ["MixtralForCausalLM"]}, "architectures: got ['MixtralForCausalLM'], want one of"),
    ({"architectures": ["Qwen3MoeForCausalLM"]}, "architectures: got ['Qwen3MoeForCausalLM'], want one of"),
    ({"architectures": ["Gemma3ForConditionalGeneration"]}, "architectures: got ['Gemma3ForConditional"),
    ({"rope_parameters": {"rope_type": "default", "odd": 1}}, "rope_parameters.odd: got 1"),
    ({"rope_parameters": 7}, "rope_parameters: got 7"),
    ({"rope_parameters": LLAMA3 | {"factor": None}}, "factor: got None"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor: got 4.0"),
    ({"rope_theta": 0}, "rope_theta: got 0"),
]


REFUSED_ELSEWHERE = [
    (MISTRAL, {"layer_types": ["full_attention"] * 2}, "layer_types: got"),
    (MISTRAL, {"sliding_window": 0}, "sliding_window: got 0"),
    (MISTRAL, {"attention_bias": True}, "attention_bias: got True, want False"),
    (QWEN2, {"attention_bias": True}, "attention_bias: got True, want False"),
    (QWEN2, {"use_mrope": True}, "use_mrope: got True, want False"),
    (QWEN2, {"use_sliding_window": "no"}, "use_sliding_window: got 'no'"),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers: got -1"),
    (QWEN2, {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window: got None, want the window"),
    (QWEN2, {"layer_types": ["full_attention"]}, "layer_types: got ['full_attention'], want"),
    (QWEN2, {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types: got"),
    (QWEN3, {"num_experts": 128}, "num_experts: got 128, a key"),
    (GEMMA2, {"hidden_act": "silu"}, "hidden_act: got 'silu', want 'gelu_pytorch_tanh'"),
    (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation: got 'gelu'"),
    (GEMMA2, {"sliding_window": None, "sliding_window_size": None}, "sliding_window: got None, want the window"),
    (GEMMA2, {"sliding_window_size": 99}, "sliding_window_size: got 99, want 24"),
    (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention: got True"),
    (GEMMA2, {"attn_logit_softcapping": -1}, "attn_logit_softcapping: got -1"),
    (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: got 50.0, want None"),
    (GEMMA3, {"model_type": "gemma3"}, "model_type: got 'gemma3', want 'gemma3_text'"),
    (GEMMA3, {"_sliding_window_pattern": 3}, "_sliding_window_pattern: got 3, want 6"),
    (GEMMA3, {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type: got"),
    (GEMMA3, {"rope_local_base_freq": 0}, "rope_local_base_freq: got 0"),
]


@pytest.mark.parametrize(
    ("base", "change", "message"), REFUSED_ELSEWHERE, ids=[message[:40] for _, _, message in REFUSED_ELSEWHERE]
)
def test_refused_of_other_architectures(base, change, message):
    ModelConfig.parse(base)
    test_refused(base, change, message)


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
    assert old.rotation == Rotation(500000.0, Llama3(8.0, 1.0, 4.0, 64))
    assert ModelConfig.parse(new | {"rope_parameters": {"rope_theta": 7.0}}).rotation == Rotation(7.0)


def test_ways_of_scaling(raw):
    def scaling(**table):
        return ModelConfig.parse(raw | {"rope_scaling": table}).rotation.scaling

    assert scaling(type="linear", factor=2) == Linear(2.0)
    assert scaling(type="dynamic", factor=2) is None  # the context ends where it would begin
    assert scaling(rope_type="yarn", factor=1, original_max_position_embeddings=9) == Yarn(1, 32, 1, 9, True, 1)
    assert scaling(type="yarn", original_max_position_embeddings=1024).factor == 4
    assert scaling(type="yarn", factor=4, attention_factor=1.5).gain == 1.5
    assert scaling(type="llama3", factor=4, low_freq_factor=1, high_freq_factor=4).original_context == 4096


def test_windows():
    def windows(base, **change):
        return ModelConfig.parse(base | change).windows

    bare = {key: value for key, value in GEMMA2.items() if "window" not in key}
    assert windows(MISTRAL, sliding_window=7) == (7, 7)
    assert windows(MISTRAL) == (4096, 4096)  # what transformers takes it for
    assert windows(MISTRAL, sliding_window=None) == (None, None)
    assert windows(QWEN2) == (None, None)
    assert windows(QWEN2, use_sliding_window=True) == (None, 24)
    assert windows(QWEN2, use_sliding_window=True, max_window_layers=0) == (24, 24)
    kinds = ["sliding_attention", "full_attention"]
    assert windows(QWEN3, use_sliding_window=True, sliding_window=9, layer_types=kinds) == (9, None)
    assert windows(bare) == (4096, None, 4096, None)
    assert windows(GEMMA2, layer_types=[*kinds, *kinds[::-1]]) == (24, None, None, 24)
    assert windows(GEMMA3) == (24, 24, 24, 24, 24, None, 24)
    assert windows(GEMMA3, sliding_window_pattern=2, num_hidden_layers=4) == (24, None, 24, None)


def test_gemma3_has_two_rotations():
    old = ModelConfig.parse(GEMMA3)
    assert (old.rotation, old.window_rotation) == (Rotation(1e6, Linear(8.0)), Rotation(1e4))
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    new = {key: value for key, value in GEMMA3.items() if not key.startswith("rope")}
    assert ModelConfig.parse(new | {"rope_parameters": kinds}) == old
    assert ModelConfig.parse(new).rotation == Rotation(1e6)


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_writes_reads_as_what_is_on_the_hub(tmp_path, name):
    """Every config, read and written again by transformers in its own spelling, says the same."""
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_parameters" in again
    assert "rope_theta" not in again
    assert ModelConfig.read(tmp_path / "again") == ModelConfig.parse(MODELS[name])


def test_defaults_are_those_of_transformers():
    """A config that leaves out all it can means what transformers takes it for."""
    import transformers

    for name, family in ARCHITECTURES.items():
        known = transformers.AutoConfig.for_model(family.model_type)
        plain = {"architectures": [name], "num_hidden_layers": 12, "num_attention_heads": 32}
        plain |= {key: getattr(known, key) for key in ("hidden_size", "intermediate_size", "vocab_size")}
        plain |= {"max_position_embeddings": known.max_position_embeddings}
        if name == "LlamaForCausalLM":
            plain |= {"num_key_value_heads": 32}
        whole = known.to_dict() | plain
        whole = {key: value for key, value in whole.items() if key not in ("layer_types", "eos_token_id")}
        left_out = ModelConfig.parse(plain)
        given = ModelConfig.parse(whole | {"bos_token_id": None, "dtype": "float32"})
        assert left_out == given, name


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
