"""The table: what it expects, what it refuses."""

from __future__ import annotations

import pytest
import torch
from support.packed import SHAPE

from steps.engine.checkpoint import mapping
from steps.engine.checkpoint.lazy import derived, lazy
from steps.errors import ArtifactError
from steps.shapes.model_config import ModelConfig

CONFIG = ModelConfig(
    family="qwen2",
    num_layers=2,
    hidden_size=12,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    ffn_hidden_size=8,
    vocab_size=10,
    max_position_embeddings=32,
    add_qkv_bias=True,
)


def hf_tensors():
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": (10, 12),
        "model.norm.weight": (12,),
        "lm_head.weight": (10, 12),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": (12,),
            prefix + "self_attn.q_proj.weight": (12, 12),
            prefix + "self_attn.k_proj.weight": (6, 12),
            prefix + "self_attn.v_proj.weight": (6, 12),
            prefix + "self_attn.q_proj.bias": (12,),
            prefix + "self_attn.k_proj.bias": (6,),
            prefix + "self_attn.v_proj.bias": (6,),
            prefix + "self_attn.o_proj.weight": (12, 12),
            prefix + "post_attention_layernorm.weight": (12,),
            prefix + "mlp.gate_proj.weight": (8, 12),
            prefix + "mlp.up_proj.weight": (8, 12),
            prefix + "mlp.down_proj.weight": (12, 8),
        }
    return {name: torch.randn(shape) for name, shape in tensors.items()}


def as_lazy(tensors):
    return {name: lazy(tensor) for name, tensor in tensors.items()}


def test_linear_qkv_holds_per_group_its_queries_then_its_key_then_its_value():
    """Megatron's order, spelled out row by row."""
    tensors = hf_tensors()
    fused = mapping.to_megatron(CONFIG, as_lazy(tensors))["decoder.layers.1.self_attention.linear_qkv.weight"].load()
    q, k, v = (tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    expected = torch.cat([q[0:6], k[0:3], v[0:3], q[6:12], k[3:6], v[3:6]])  # two heads of three channels a group
    assert torch.equal(fused, expected)
    bias = mapping.to_megatron(CONFIG, as_lazy(tensors))["decoder.layers.0.self_attention.linear_qkv.bias"].load()
    q, k, v = (tensors[f"model.layers.0.self_attn.{part}_proj.bias"] for part in "qkv")
    assert torch.equal(bias, torch.cat([q[0:6], k[0:3], v[0:3], q[6:12], k[3:6], v[3:6]]))


def test_linear_fc1_holds_gate_then_up():
    tensors = hf_tensors()
    fused = mapping.to_megatron(CONFIG, as_lazy(tensors))["decoder.layers.0.mlp.linear_fc1.weight"].load()
    prefix = "model.layers.0.mlp."
    assert torch.equal(fused, torch.cat([tensors[prefix + "gate_proj.weight"], tensors[prefix + "up_proj.weight"]]))


@pytest.mark.parametrize("backwards", [False, True])
def test_parts_of_a_fused_tensor_come_in_any_order_and_as_often_as_asked(backwards):
    tensors = hf_tensors()
    back = mapping.to_hf(CONFIG, mapping.to_megatron(CONFIG, as_lazy(tensors)))
    assert set(back) == set(tensors)
    for name in sorted(back, reverse=backwards) * 2:
        assert torch.equal(back[name].load(), tensors[name]), name


def test_a_fused_tensor_is_read_once_for_its_parts():
    tensors = hf_tensors()
    megatron = mapping.to_megatron(CONFIG, as_lazy(tensors))
    reads = []
    for name, tensor in megatron.items():
        array = tensor.array
        megatron[name] = derived(
            tensor.shape, tensor.dtype, lambda name=name, array=array: reads.append(name) or array()
        )
    for tensor in mapping.to_hf(CONFIG, megatron).values():
        tensor.load()
    assert sorted(reads) == sorted(megatron)


def test_the_padding_of_megatrons_vocabulary_is_left_out():
    tensors = hf_tensors()
    megatron = dict(mapping.to_megatron(CONFIG, as_lazy(tensors)))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        megatron[name] = lazy(torch.cat([megatron[name].load(), torch.zeros(6, 12)]))
    back = mapping.to_hf(CONFIG, megatron)
    assert torch.equal(back["lm_head.weight"].load(), tensors["lm_head.weight"])
    assert back["model.embed_tokens.weight"].shape == (10, 12)


def test_everything_wrong_is_told_at_once():
    tensors = hf_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(12)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(12, 9)
    with pytest.raises(ArtifactError) as caught:
        mapping.to_megatron(CONFIG, as_lazy(tensors), "some/model")
    text = str(caught.value)
    assert "some/model: model.norm.weight is missing" in text
    assert "model.layers.0.self_attn.o_proj.bias is not part of a supported model" in text
    assert "model.layers.1.mlp.down_proj.weight has the shape [12, 9], the configuration says [12, 8]" in text
    assert caught.value.name == "unsupported_model"


def test_parts_of_different_dtypes_are_refused():
    tensors = hf_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].bfloat16()
    with pytest.raises(ArtifactError, match="differ in dtype"):
        mapping.to_megatron(CONFIG, as_lazy(tensors))


def test_the_parts_of_nothing_are_nothing():
    """A factor of rank 0, as of a linear that AdaLoRA has pruned altogether."""
    for part, heads in (("linear_q", 2), ("linear_k", 1)):
        assert mapping.part_view(SHAPE, part, torch.empty(0, SHAPE.qkv_size)).shape == (0, 2, heads, 8)
