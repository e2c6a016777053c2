"""GGUF files of llama.cpp, read as Hugging Face models. Quantized weights become float32.

llama.cpp stores the query and key weights of the arch `llama` with their rotary channel pairs interleaved; that is
undone.
Tensor names and metadata keys: the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steps.engine.checkpoint.gguf_header import StoredTensor, read_header
from steps.engine.checkpoint.hf import Source
from steps.engine.checkpoint.lazy import Array, derived
from steps.errors import ArtifactError, Problem
from steps.shapes import hf_config

#: GGUF architectures and their Hugging Face family. Mistral models are stored as arch llama.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"
# The Llama-3 scalings in use: low and high frequency factor, original context.
_LLAMA3 = ((1.0, 4.0, 8192),)


def open_gguf(path: Path) -> Source:
    """Open a .gguf file; its metadata become a config.json. Raises ArtifactError for what is not supported."""
    header = read_header(path)
    fields, stored = header.metadata, header.tensors
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        what, allowed = f"the architecture {arch!r} is not supported", ", ".join(ARCHITECTURES)
        raise ArtifactError(Problem(where=str(path), what=what, allowed=allowed, name="unsupported_model"))
    data = _config_json(path, arch, fields, stored)
    config = hf_config.model_config(data, str(path), "float32")
    tensors = {}
    for name, entry in stored.items():
        if name != _ROPE_FREQS:
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_query_groups}
            part = name.split(".")[2] if name.startswith("blk.") else ""
            interleaved = heads.get(part, 0) if arch == "llama" else 0
            tensors[_hf_name(name)] = derived(entry.shape, "float32", _loader(path, entry, interleaved))
    generation = {key: data[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in data}
    files = {"config.json": json.dumps(data, indent=2) + "\n"}
    if generation:
        files["generation_config.json"] = json.dumps(generation, indent=2) + "\n"
    return Source(path, config, tensors, files)


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`; an unknown name stays, to be refused later."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    if block == "blk" and part in _PER_LAYER:
        return f"model.layers.{layer}.{_PER_LAYER[part]}.{kind}"
    return name


def _loader(path: Path, entry: StoredTensor, heads: int) -> Any:
    def load() -> Array:
        from gguf import dequantize

        # Read, not mapped: a map's pages would count as ours until the file is closed.
        data = np.fromfile(path, dtype=np.uint8, count=entry.nbytes, offset=entry.offset)
        values = dequantize(_typed(data, entry), entry.type).reshape(entry.shape)
        if heads:
            values = _deinterleave(values, heads)
        return np.ascontiguousarray(values, dtype=np.float32)

    return load


def _typed(data: np.ndarray[Any, Any], entry: StoredTensor) -> np.ndarray[Any, Any]:
    plain = {"F32": np.float32, "F16": np.float16}.get(entry.type.name)
    return data.view(plain).reshape(entry.shape) if plain else data.reshape(entry.byte_shape)


def _deinterleave(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head from (0, D/2, 1, D/2 + 1, …), llama.cpp's order, to (0, 1, …). values: [heads * D, …]."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    turned: np.ndarray[Any, Any] = pairs.swapaxes(1, 2).reshape(values.shape)
    return turned


def _config_json(
    path: Path, arch: str, fields: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, Any]:
    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"{arch}.{key}", default)

    heads, hidden = get("attention.head_count"), get("embedding_length")
    embedding = stored.get("token_embd.weight")
    numbers = {
        "vocab_size": embedding.shape[0] if embedding else None,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
    }
    if missing := [key for key, value in numbers.items() if not isinstance(value, int)]:
        what = f"the metadata do not give {', '.join(missing)} as a number"
        raise ArtifactError(Problem(where=str(path), what=what, name="unsupported_model"))
    head_dim = get("attention.key_length", hidden // heads)
    _refuse_variants(path, arch, fields, head_dim)
    epsilon = get("attention.layer_norm_rms_epsilon", 1e-6)
    data = {
        "architectures": [hf_config.ARCHITECTURES[ARCHITECTURES[arch]]],
        "model_type": ARCHITECTURES[arch],
        **numbers,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length", 2048),
        # Metadata are float32: 1e-05, not 9.999999747378752e-06.
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "rope_theta": float(str(np.float32(get("rope.freq_base", 10_000.0)))),
        "rope_scaling": _rope_scaling(path, stored, head_dim, get("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in stored,
        "torch_dtype": "float32",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (id := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            data[f"{name}_token_id"] = int(id)
    return data


def _refuse_variants(path: Path, arch: str, fields: Mapping[str, Any], head_dim: int) -> None:
    """Metadata that would change what is computed."""
    neutral: Mapping[str, tuple[Any, ...]] = {
        "expert_count": (None, 0),
        "attention.sliding_window": (None, 0),
        "rope.dimension_count": (None, head_dim),
        "rope.scaling.type": (None, "none"),
        "attention.value_length": (None, head_dim),
        "attention.scale": (None,),
        "logit_scale": (None,),
        "residual_scale": (None,),
        "embedding_scale": (None,),
    }
    problems = [
        Problem(where=f"{path}: {arch}.{key}", what=f"{value!r} is not supported", name="unsupported_model")
        for key, allowed in neutral.items()
        if (value := fields.get(f"{arch}.{key}")) not in allowed
    ]
    if problems:
        raise ArtifactError(problems)


def _rope_scaling(path: Path, stored: Mapping[str, StoredTensor], head_dim: int, base: float) -> dict[str, Any] | None:
    """Llama-3 scaling, which GGUF keeps as the divisor of each frequency: the setting that gives those divisors."""
    if _ROPE_FREQS not in stored:
        return None
    divisors = _loader(path, stored[_ROPE_FREQS], 0)().astype(np.float64)
    frequencies = base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    factor = float(divisors.max())
    for low, high, original in _LLAMA3:
        smooth = ((original / wavelengths - low) / (high - low)).clip(0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if np.allclose(divisors, expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": round(factor, 4),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    what = "its rope_freqs.weight is no Llama-3 scaling that is known here"
    hint = "Convert the original Hugging Face directory instead."
    raise ArtifactError(Problem(where=str(path), what=what, hint=hint, name="unsupported_model"))
