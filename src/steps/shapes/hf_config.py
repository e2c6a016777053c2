"""config.json of Hugging Face, to and from a ModelConfig. What the decoder does not compute is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steps.errors import ArtifactError, Problem, suggest
from steps.shapes.model_config import ModelConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What a key means that config.json leaves out: transformers' default of that family.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

# Keys that change what is computed, with the values under which they change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
_ROPE_TYPES = ("default", "llama3")
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def model_config(data: Mapping[str, Any], where: str, dtype: str) -> ModelConfig:
    """The model that a config.json (of transformers 4 or 5) describes.

    where: the file, for the messages.   dtype: of the stored weights.
    Raises ArtifactError (unsupported_model) that lists everything missing or not supported.
    """
    family = str(data.get("model_type"))
    if family not in _DEFAULTS:
        raise ArtifactError(
            Problem(
                where=where,
                what=f"the architecture {family!r} is not supported",
                allowed=", ".join(_DEFAULTS),
                hint=suggest(family, _DEFAULTS),
                name="unsupported_model",
            )
        )
    problems = [_problem(where, key, "is missing") for key in _REQUIRED if data.get(key) is None]
    for key, allowed in _NEUTRAL.items():
        if key in data and data[key] not in allowed:
            problems.append(_problem(where, key, f"{_short(data[key])} is not supported", repr(allowed[0])))
    values: dict[str, Any] = {**_DEFAULTS[family], **data}
    rope, theta = _rope(values)
    problems += _rope_problems(rope, where)
    window, fault = _window(family, values)
    if fault:
        problems.append(_problem(where, "layer_types", fault, "the same attention in every layer"))
    heads: int = values.get("num_attention_heads") or 0
    groups: int = values.get("num_key_value_heads") or heads
    if not problems and heads % groups:
        problems.append(_problem(where, "num_key_value_heads", f"{groups} does not divide {heads} attention heads"))
    if problems:
        raise ArtifactError(problems)
    return ModelConfig(
        family=family,
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=values.get("head_dim") or values["hidden_size"] // heads,
        ffn_hidden_size=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        max_position_embeddings=values["max_position_embeddings"],
        rotary_base=theta,
        rope_scaling=None if rope.get("rope_type") == "default" else rope,
        layernorm_epsilon=float(values.get("rms_norm_eps", 1e-6)),
        add_qkv_bias=family == "qwen2",
        qk_layernorm=family == "qwen3",
        share_embeddings_and_output_weights=bool(values.get("tie_word_embeddings", False)),
        window_size=window,
        params_dtype=dtype,
    )


def config_json(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a model that came without one. Read by transformers 4 and 5."""
    data: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "attention_bias": False,
        "torch_dtype": config.params_dtype,
    }
    if config.family == "llama":
        data["mlp_bias"] = False
    if config.family == "mistral":
        data["sliding_window"] = config.window_size
    elif config.window_size is not None:  # the Qwen families
        data |= {"use_sliding_window": True, "sliding_window": config.window_size, "max_window_layers": 0}
    if config.family == "qwen2":
        del data["attention_bias"]  # Qwen2 always has it on query, key and value, and no key to say so
    return data


def with_dtype(data: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that says `dtype`, under the key it uses already. Unchanged where it says nothing."""
    return {key: dtype if key in ("torch_dtype", "dtype") else value for key, value in data.items()}


def stated_dtype(data: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json states ("bfloat16"), None where it states none."""
    value = data.get("dtype") or data.get("torch_dtype")
    return str(value).removeprefix("torch.") if value else None


def _rope(values: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Scaling (`rope_type` at least) and base, from transformers 5's rope_parameters or transformers 4's two keys."""
    parameters = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or values.get("rope_theta") or 10_000.0
    kind = parameters.pop("type", None)
    parameters["rope_type"] = parameters.get("rope_type") or kind or "default"
    return parameters, float(theta)


def _rope_problems(rope: Mapping[str, Any], where: str) -> list[Problem]:
    kind = rope["rope_type"]
    if kind not in _ROPE_TYPES:
        return [_problem(where, "rope_scaling", f"the type {kind!r} is not supported", ", ".join(_ROPE_TYPES))]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return [_problem(where, "rope_parameters.partial_rotary_factor", "is not supported", "1.0")]
    if kind == "llama3":
        return [_problem(where, f"rope_scaling.{key}", "is missing") for key in _LLAMA3_KEYS if key not in rope]
    return []


def _window(family: str, values: Mapping[str, Any]) -> tuple[int | None, str]:
    """The sliding window, and what is wrong when layers differ in it."""
    if family == "llama":
        return None, ""
    window = values.get("sliding_window")
    layers = values.get("num_hidden_layers") or 0
    if family == "mistral":
        kinds = values.get("layer_types") or ["sliding_attention"] * layers
    elif not values.get("use_sliding_window"):
        kinds = values.get("layer_types") or []
    else:
        window = values.get("sliding_window", 4096)
        first = values.get("max_window_layers", 28)
        kinds = values.get("layer_types") or [
            "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
        ]
    if len(set(kinds)) > 1:
        return None, "sliding-window attention in some layers only is not supported"
    sliding = bool(kinds) and kinds[0] == "sliding_attention"
    return (int(window) if sliding and window else None), ""


def _problem(where: str, key: str, what: str, allowed: str = "") -> Problem:
    return Problem(where=f"{where}: {key}", what=what, allowed=allowed, name="unsupported_model")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def faults(file: Path) -> Sequence[Problem]:
    """Why a config.json cannot be converted (no JSON, or not supported: see `model_config`); nothing when it can."""
    try:
        model_config(json.loads(file.read_text(encoding="utf-8")), str(file), "float32")
    except ArtifactError as error:
        return error.problems
    except ValueError as error:
        return [Problem(where=str(file), what=f"is no JSON: {error}", name="damaged_artifact")]
    return []
