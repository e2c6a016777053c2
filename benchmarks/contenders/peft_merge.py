"""Merge an adapter as peft's users do: python -m benchmarks.contenders.peft_merge BASE ADAPTER OUTPUT."""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, adapter: str, output: str) -> None:
    """Load the base in bf16, put the adapter on it, merge, save."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output, max_shard_size="500MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
