"""Small random Hugging Face models, one per family and variant, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # large enough for logits that tell a wrong model from a right one
}
# The original context is short, so that the positions of a test reach every branch of the scaling.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

#: Name to (model_type, what differs from the common shape).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_rope_scaling": ("llama", {"tie_word_embeddings": False, "rope_scaling": LLAMA3_SCALING}),
    "mistral_sliding_window": ("mistral", {"sliding_window": 8}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def hf_config(name: str, **overrides: Any) -> Any:
    """The transformers configuration of a family in FAMILIES."""
    from transformers import AutoConfig

    model_type, differs = FAMILIES[name]
    return AutoConfig.for_model(model_type, **{**_SHAPE, **differs, **overrides})


def hf_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A random model of a family, for evaluation; norm weights and biases are random too, so that none is neutral."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config(name, **overrides), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith(".bias"):
                parameter.normal_(std=0.5)
    return model.to(dtype)


def save_hf(
    directory: Path,
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Any:
    """Write such a model to `directory` as transformers does, and return it."""
    model = hf_model(name, seed, dtype, **overrides)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def save_tokenizer(directory: Path) -> Any:
    """Write a word-level tokenizer of 97 words with a chat template, as transformers does, and return it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<eos>": 1, "<user>": 2, "<assistant>": 3} | {f"w{number}": number for number in range(4, 97)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def change_tensor(iteration: Path) -> None:
    """Change one bit of a weight in an iter_NNNNNNN folder, in place: every file keeps its size."""
    from steps.engine.checkpoint import megatron

    tensor = next(iter(megatron.Checkpoint.open(iteration).tensors.values())).load().contiguous()
    wanted = tensor.view(torch.uint8).numpy().tobytes()
    for file in iteration.glob("*.distcp"):
        data = bytearray(file.read_bytes())
        at = data.find(wanted)
        if at >= 0:
            data[at] ^= 1
            file.write_bytes(data)
            return
    raise AssertionError("the weight is in no file")
