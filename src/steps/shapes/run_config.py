"""run_config.yaml of a Megatron-Bridge checkpoint, from and to a ModelConfig.

Its `model` section holds a Megatron-Bridge model provider: `_target_` and TransformerConfig's fields. What Hugging
Face's config.json says and TransformerConfig has no field for stands beside it in a section `hf`, which Megatron-Bridge
ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steps.errors import ArtifactError, Problem
from steps.shapes.model_config import ModelConfig

PROVIDERS = {
    "llama": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider",
    "mistral": "megatron.bridge.models.mistral.mistral_provider.MistralModelProvider",
    "qwen2": "megatron.bridge.models.qwen.qwen_provider.Qwen2ModelProvider",
    "qwen3": "megatron.bridge.models.qwen.qwen_provider.Qwen3ModelProvider",
}

# ModelConfig fields that TransformerConfig (or its GPT provider) has under the same name.
_SAME = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "vocab_size", "layernorm_epsilon", "add_qkv_bias", "qk_layernorm", "share_embeddings_and_output_weights",
)  # fmt: skip

# The one architecture that the decoder computes. Another value in a run_config.yaml is another model.
_FIXED: Mapping[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
}
# The same for fields that are only ever written by others.
_ABSENT: Mapping[str, tuple[Any, ...]] = {
    "num_moe_experts": (None, 0),
    "multi_latent_attention": (None, False),
    "rotary_interleaved": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "experimental_attention_variant": (None,),
    "seq_len_interpolation_factor": (None,),
    "mtp_num_layers": (None, 0),
    "is_hybrid_model": (None, False),
    "attention_output_gate": (None, False),
    "softmax_type": (None, "vanilla"),
    "no_rope_freq": (None,),
    "softmax_scale": (None,),
}

#: Megatron-Core knows Llama-3 scaling by its factor only; these three are constants in its code.
MEGATRON_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def run_config(config: ModelConfig) -> dict[str, Any]:
    """The sections `model`, `checkpoint` and `hf`; a trainer adds its own."""
    dtype = {"_target_": f"torch.{config.params_dtype}", "_call_": False}
    base = config.rotary_base
    model = {
        "_target_": PROVIDERS[config.family],
        **{name: getattr(config, name) for name in _SAME},
        **_FIXED,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "seq_length": config.max_position_embeddings,
        "rotary_base": int(base) if base == int(base) else base,
        "rope_scaling": config.rope_scaling is not None,
        "rope_scaling_factor": float((config.rope_scaling or {}).get("factor", 1.0)),
        # Megatron counts the tokens before the present one, transformers counts the present one too.
        "window_size": None if config.window_size is None else [config.window_size - 1, 0],
        "make_vocab_size_divisible_by": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "bf16": config.params_dtype == "bfloat16",
        "fp16": config.params_dtype == "float16",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    return {
        "model": model,
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False},
        "hf": {
            "model_type": config.family,
            "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
            "sliding_window": config.window_size,
        },
    }


def model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a run_config.yaml (ours or Megatron-Bridge's) describes.

    where: the file, for the messages. Raises ArtifactError that names everything missing or not supported.
    """
    model = config.get("model")
    if not isinstance(model, Mapping):
        hint = "Megatron-Bridge writes one into run_config.yaml; without it the model's shape is not known."
        raise ArtifactError(f"{where} has no section model", hint=hint, name="unsupported_model")
    problems = [
        Problem(where=f"{where}: model.{name}", what="is missing", name="unsupported_model")
        for name in (*_SAME[:4], "ffn_hidden_size", "vocab_size", "seq_length", "rotary_base")
        if model.get(name) is None and name != "num_query_groups"
    ]
    for name, value in _FIXED.items():
        if model.get(name, value) != value:
            problems.append(_unsupported(where, name, model[name], repr(value)))
    for name, allowed in _ABSENT.items():
        if model.get(name) not in allowed:
            problems.append(_unsupported(where, name, model[name], "unset"))
    activation = _target(model.get("activation_func"), "silu")
    if activation.rpartition(".")[2] not in ("silu", "swish"):
        problems.append(_unsupported(where, "activation_func", activation, "torch.nn.functional.silu"))
    if problems:
        raise ArtifactError(problems)
    hf = config.get("hf") or {}
    values = {name: model[name] for name in _SAME if model.get(name) is not None}
    values.setdefault("num_query_groups", values["num_attention_heads"])
    values.setdefault("kv_channels", values["hidden_size"] // values["num_attention_heads"])
    # Providers of Megatron-Bridge tie the two unless told otherwise; ours always tell.
    values.setdefault("share_embeddings_and_output_weights", True)
    return ModelConfig(
        family=_family(model, hf),
        max_position_embeddings=model["seq_length"],
        rotary_base=float(model["rotary_base"]),
        rope_scaling=_rope_scaling(model, hf),
        window_size=_window(model, hf),
        params_dtype=_dtype(model),
        **values,
    )


def _unsupported(where: str, name: str, value: Any, allowed: str) -> Problem:
    what = f"{value!r} is not supported"
    return Problem(where=f"{where}: model.{name}", what=what, allowed=allowed, name="unsupported_model")


def _family(model: Mapping[str, Any], hf: Mapping[str, Any]) -> str:
    """The Hugging Face family: as recorded, else by the provider's name, else by what only that family has."""
    if hf.get("model_type") in PROVIDERS:
        return str(hf["model_type"])
    provider = str(model.get("_target_", "")).lower().replace("qwen25", "qwen2")
    for family in PROVIDERS:
        if family in provider.rpartition(".")[2]:
            return family
    if model.get("qk_layernorm"):
        return "qwen3"
    if model.get("add_qkv_bias"):
        return "qwen2"
    return "mistral" if model.get("window_size") else "llama"


def _rope_scaling(model: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any] | None:
    if hf.get("rope_scaling"):
        return dict(hf["rope_scaling"])
    if not model.get("rope_scaling"):
        return None
    return {"rope_type": "llama3", "factor": float(model["rope_scaling_factor"]), **MEGATRON_ROPE}


def _window(model: Mapping[str, Any], hf: Mapping[str, Any]) -> int | None:
    # Megatron-Bridge copies config.json's sliding_window as it is, one more than Megatron's way of counting.
    if "sliding_window" in hf:
        return None if hf["sliding_window"] is None else int(hf["sliding_window"])
    return int(model["window_size"][0]) if model.get("window_size") else None


def _dtype(model: Mapping[str, Any]) -> str:
    named = _target(model.get("params_dtype"), "").rpartition(".")[2]
    return named or ("bfloat16" if model.get("bf16") else "float16" if model.get("fp16") else "float32")


def _target(value: Any, default: str) -> str:
    """The name in `{_target_: torch.bfloat16, _call_: false}`, Megatron-Bridge's way to write a Python object."""
    if isinstance(value, Mapping):
        return str(value.get("_target_", default))
    return default if value is None else str(value)
