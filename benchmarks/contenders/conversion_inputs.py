"""Make what the conversions are measured on: python -m benchmarks.contenders.conversion_inputs DIRECTORY.

DIRECTORY/hf      a random Llama of 852,559,872 parameters in bf16: 1.7 GB in shards of at most 500 MB
DIRECTORY/base    the same as checkpoint_megatron
DIRECTORY/lora    an adapter of rank 16 on every linear, as checkpoint_lora
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from steps.engine.checkpoint import mapping, megatron
from steps.engine.checkpoint.convert import hf_to_megatron
from steps.engine.checkpoint.hf import open_source, write_directory
from steps.engine.checkpoint.lazy import computed
from steps.shapes import hf_config
from steps.shapes.model_config import ModelConfig
from steps.shapes.run_config import run_config

RANK = 16
CONFIG = ModelConfig(
    family="llama",
    num_layers=16,
    hidden_size=2048,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=64,
    ffn_hidden_size=5632,
    vocab_size=32_000,
    max_position_embeddings=2048,
    params_dtype="bfloat16",
)
#: Linear to (out, in) of what canonical LoRA adapts of it.
ADAPTED = {
    "self_attention.linear_qkv.adapter.adapter_q": (2048, 2048),
    "self_attention.linear_qkv.adapter.adapter_k": (512, 2048),
    "self_attention.linear_qkv.adapter.adapter_v": (512, 2048),
    "self_attention.linear_proj.adapter": (2048, 2048),
    "mlp.linear_fc1.adapter.adapter_gate": (5632, 2048),
    "mlp.linear_fc1.adapter.adapter_up": (5632, 2048),
    "mlp.linear_fc2.adapter": (2048, 5632),
}
SECTION = {
    "type": "canonical_lora",
    "dim": RANK,
    "alpha": 2 * RANK,
    "target_modules": [
        "linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_up", "linear_fc1_gate", "linear_fc2",
    ],
}  # fmt: skip


def main(directory: Path) -> None:
    """Write the three."""
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...], size: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * size

    weights = {
        name: computed(shape, "bfloat16", lambda shape=shape: random(shape, 0.02).bfloat16())
        for name, shape in mapping.hf_shapes(CONFIG).items()
    }
    files = {"config.json": json.dumps(hf_config.config_json(CONFIG), indent=2)}
    write_directory(directory / "hf", weights, files, shard_bytes=500_000_000)
    hf_to_megatron(open_source(str(directory / "hf")), directory / "base")
    adapter = {}
    for layer in range(CONFIG.num_layers):
        for linear, (rows, columns) in ADAPTED.items():
            name = f"decoder.layers.{layer}.{linear}"
            adapter[f"{name}.linear_in.weight"] = random((RANK, columns), 0.03)
            adapter[f"{name}.linear_out.weight"] = random((rows, RANK), 0.03)
    settings = {**run_config(CONFIG), "adapter": SECTION}
    megatron.write(directory / "lora", adapter, num_layers=CONFIG.num_layers, run_config=settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
