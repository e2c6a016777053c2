"""A real model held in 4 bits: what it takes, and how well it trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from steps.config.peft import Quantization
from steps.engine.checkpoint import mapping
from steps.engine.checkpoint.convert import megatron_source
from steps.engine.model.decoder import Decoder, load_weights


@pytest.mark.slow
def test_four_bits_take_less_than_a_third_and_train_as_well(demo):
    source = megatron_source(demo.directory / "output/tiny/base")
    decoder = Decoder(source.config, quantize=lambda name: Quantization())
    tensors = mapping.to_megatron(source.config, source.tensors)
    load_weights(decoder, ((name, tensor.load()) for name, tensor in tensors.items()))
    apart = "embedding.word_embeddings.weight"
    held = sum(value.nbytes for name, value in decoder.weights().items() if name != apart)
    bf16 = sum(2 * tensor.numel for name, tensor in tensors.items() if name != apart)
    assert held / bf16 < 0.30

    arguments = ["-c", "tiny", "peft.quantization.type=nf4", "checkpoint.save=output/tiny/qlora"]
    done = subprocess.run(
        [sys.executable, "-m", "steps", "run", "peft/megatron_bridge", *arguments],
        cwd=demo.directory, env=dict(os.environ), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"base held in nf4: [\d.]+ MB, 0.26 of its bf16 size", done.stdout)
    plain, quantized = (
        json.loads((demo.directory / f"output/tiny/{name}/artifact.json").read_text())["facts"]
        for name in ("lora", "qlora")
    )
    for loss in ("loss_last", "valid_loss_last"):
        assert quantized[loss] == pytest.approx(plain[loss], rel=0.02)
    assert quantized["valid_loss_last"] < quantized["valid_loss_first"] - 0.1
