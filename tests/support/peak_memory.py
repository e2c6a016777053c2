"""Convert a model, merge an adapter into it, and print the peak of resident memory: one process, one answer.

python -m support.peak_memory LAYERS FOLDER     prints {"model_mb": …, "tensor_mb": …, "start_mb": …, "peak_mb": …}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from steps.engine.checkpoint import mapping, megatron
from steps.engine.checkpoint.convert import hf_to_megatron, megatron_source
from steps.engine.checkpoint.hf import open_source, write_directory
from steps.engine.checkpoint.lazy import computed
from steps.engine.checkpoint.merge import merge, open_adapter
from steps.shapes import hf_config
from steps.shapes.model_config import ModelConfig
from steps.shapes.run_config import run_config


def model(layers: int) -> ModelConfig:
    """Llama-shaped, 53 MB a layer in float32; the largest tensor (linear_fc1) has 24 MB."""
    return ModelConfig(
        family="llama",
        num_layers=layers,
        hidden_size=1024,
        num_attention_heads=16,
        num_query_groups=16,
        kv_channels=64,
        ffn_hidden_size=2880,
        vocab_size=1000,
        max_position_embeddings=2048,
    )


def peak_mb() -> float:
    """The process's high-water mark, mapped files included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main(layers: int, folder: Path) -> None:
    config = model(layers)
    tensors = {
        name: computed(shape, "float32", lambda shape=shape: torch.rand(shape))
        for name, shape in mapping.hf_shapes(config).items()
    }
    files = {"config.json": json.dumps(hf_config.config_json(config))}
    write_directory(folder / "hf", tensors, files, shard_bytes=200_000_000)
    before = peak_mb()
    hf_to_megatron(open_source(str(folder / "hf")), folder / "base")
    adapter = {}
    for layer in range(layers):
        name = f"decoder.layers.{layer}.mlp.linear_fc1.adapter"
        adapter[f"{name}.linear_in.weight"] = torch.rand(4, 1024)
        adapter[f"{name}.linear_out.weight"] = torch.rand(5760, 4)
    section = {"type": "lora", "dim": 4, "alpha": 4}
    megatron.write(folder / "lora", adapter, num_layers=layers, run_config={**run_config(config), "peft": section})
    merge(
        megatron_source(folder / "base"),
        open_adapter(folder / "lora"),
        lambda name, weight, tensors, shared: torch.addmm(
            weight, tensors["linear_out.weight"], tensors["linear_in.weight"]
        ),
        folder / "merged",
        base_fingerprint=None,
    )
    after = peak_mb()
    total = sum(tensor.nbytes for tensor in tensors.values())
    largest = 4 * 2 * config.ffn_hidden_size * config.hidden_size
    print(json.dumps({"model_mb": total / 2**20, "tensor_mb": largest / 2**20, "start_mb": before, "peak_mb": after}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
