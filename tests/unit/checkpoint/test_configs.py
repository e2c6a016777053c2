"""config.json and run_config.yaml, both ways; what is not supported is refused with every reason."""

from __future__ import annotations

import pytest
from support.models import FAMILIES, hf_config

from steps.config import yaml12
from steps.errors import ArtifactError
from steps.shapes import hf_config as ours
from steps.shapes.model_config import ModelConfig
from steps.shapes.run_config import model_config, run_config


def parsed(data, dtype="float32"):
    return ours.model_config(data, "config.json", dtype)


LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_both_files_keep_every_field(name, tmp_path):
    pytest.importorskip("transformers", reason="extra parity")
    config = parsed(hf_config(name).to_dict(), "bfloat16")
    assert parsed(ours.config_json(config), "bfloat16") == config
    (tmp_path / "run_config.yaml").write_text(yaml12.dump(run_config(config)))
    assert model_config(yaml12.load(tmp_path / "run_config.yaml")[0], "run_config.yaml") == config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rebuilt_config_means_the_same_to_transformers(name):
    transformers = pytest.importorskip("transformers", reason="extra parity")
    original = hf_config(name)
    rebuilt = transformers.AutoConfig.for_model(**ours.config_json(parsed(original.to_dict())))
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
        "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rope_parameters", "hidden_act",
    )  # fmt: skip
    for key in keys:
        assert getattr(rebuilt, key) == getattr(original, key), key
    assert getattr(rebuilt, "sliding_window", None) == getattr(original, "sliding_window", None)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"}},  # the key of old releases
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"}},
    ],
)
def test_rope_is_read_as_transformers_4_and_5_write_it(rope):
    numbers = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    key = "rope_scaling" if "rope_scaling" in rope else "rope_parameters"
    config = parsed({**LLAMA, **rope, key: {**rope[key], **numbers}})
    assert config.rotary_base == 5e5
    assert config.rope_scaling == {"rope_type": "llama3", **numbers}


def test_what_config_json_leaves_out_means_the_familys_default():
    """Mistral-7B-v0.1 relies on it for nothing, but files written by hand do."""
    assert parsed(LLAMA).num_query_groups == 4
    mistral = parsed({**LLAMA, "model_type": "mistral", "num_attention_heads": 8})
    assert (mistral.num_query_groups, mistral.window_size) == (8, 4096)
    assert parsed({**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2}).kv_channels == 128
    assert parsed({**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 7}).window_size is None


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwens_sliding_window_counts_only_where_every_layer_has_it(family):
    base = {**LLAMA, "model_type": family, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 16}
    assert parsed({**base, "max_window_layers": 0}).window_size == 16
    assert parsed({**base, "max_window_layers": 2}).window_size is None
    with pytest.raises(ArtifactError, match="in some layers only is not supported"):
        parsed({**base, "max_window_layers": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, r"attention_bias: True is not supported\. Allowed: False"),
        ({"mlp_bias": True}, "mlp_bias: True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported. Allowed: 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "the type 'yarn' is not supported. Allowed: default"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor: is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: .* is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ({"num_key_value_heads": 3}, "3 does not divide 4 attention heads"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"model_type": "mixtral"}, "the architecture 'mixtral' is not supported. Allowed: llama, mistral, q"),
        ({"model_type": "qwen3_moe"}, "Did you mean qwen3"),
    ],
)  # fmt: skip
def test_what_the_decoder_does_not_compute_is_refused(change, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        parsed({**LLAMA, **change})
    assert caught.value.name == "unsupported_model"


def test_all_reasons_come_together():
    with pytest.raises(ArtifactError) as caught:
        parsed({**LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "relu", "vocab_size": None})
    assert len(caught.value.problems) == 4


# The `model` section of Megatron-Bridge 0.3's run_config.yaml for Llama-3.1-8B; most fields left out.
BRIDGE = """
model:
  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
  num_layers: 32
  hidden_size: 4096
  num_attention_heads: 32
  num_query_groups: 8
  kv_channels: null
  ffn_hidden_size: 14336
  vocab_size: 128256
  seq_length: 131072
  rotary_base: 500000.0
  rope_scaling: true
  rope_scaling_factor: 8.0
  rotary_percent: 1.0
  position_embedding_type: rope
  layernorm_epsilon: 1.0e-05
  normalization: RMSNorm
  gated_linear_unit: true
  add_bias_linear: false
  add_qkv_bias: false
  qk_layernorm: false
  window_size: null
  num_moe_experts: null
  share_embeddings_and_output_weights: false
  activation_func:
    _target_: torch.nn.functional.silu
    _call_: false
  params_dtype:
    _target_: torch.bfloat16
    _call_: false
  bf16: true
checkpoint:
  save_optim: true
"""


def bridge(tmp_path, **changes):
    (tmp_path / "run_config.yaml").write_text(BRIDGE)
    data = yaml12.load(tmp_path / "run_config.yaml")[0]
    data["model"] |= changes
    return model_config(data, "run_config.yaml")


def test_a_run_config_of_megatron_bridge_is_understood(tmp_path):
    assert bridge(tmp_path) == ModelConfig(
        family="llama",
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=128,
        ffn_hidden_size=14336,
        vocab_size=128256,
        max_position_embeddings=131072,
        rotary_base=500_000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        layernorm_epsilon=1e-5,
        params_dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"_target_": "megatron.bridge.models.qwen.qwen_provider.Qwen25ModelProvider7B"}, "qwen2"),
        ({"_target_": "megatron.bridge.models.qwen.qwen_provider.Qwen3ModelProvider", "qk_layernorm": True}, "qwen3"),
        ({"_target_": "megatron.bridge.models.mistral.mistral_provider.MistralModelProvider"}, "mistral"),
        ({"_target_": "megatron.bridge.models.llama.llama_provider.Llama32ModelProvider1B"}, "llama"),
        ({"add_qkv_bias": True}, "qwen2"),
        ({"qk_layernorm": True}, "qwen3"),
    ],
)  # fmt: skip
def test_the_family_follows_from_the_provider_or_from_what_only_it_has(tmp_path, changes, family):
    assert bridge(tmp_path, **changes).family == family


def test_megatron_bridges_window_is_config_jsons(tmp_path):
    """Megatron-Bridge copies sliding_window; what we write counts as Megatron does, one less, and says so in `hf`."""
    assert bridge(tmp_path, window_size=[4096, 0]).window_size == 4096
    config = parsed({**LLAMA, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 64})
    assert run_config(config)["model"]["window_size"] == [63, 0]
    assert model_config(run_config(config), "run_config.yaml").window_size == 64


def test_another_architecture_is_refused_with_every_reason(tmp_path):
    with pytest.raises(ArtifactError) as caught:
        bridge(
            tmp_path,
            num_moe_experts=8,
            normalization="LayerNorm",
            rotary_percent=0.5,
            activation_func={"_target_": "torch.nn.functional.gelu", "_call_": False},
            vocab_size=None,
        )
    text = str(caught.value)
    for part in (
        "num_moe_experts: 8",
        "normalization: 'LayerNorm'",
        "rotary_percent: 0.5",
        "gelu",
        "vocab_size: is missing",
    ):
        assert part in text
    with pytest.raises(ArtifactError, match="no section model"):
        model_config({}, "run_config.yaml")
