"""The decoder gives the logits of transformers for every family, through a conversion on disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import FAMILIES, save_hf

from steps.engine.checkpoint.convert import hf_to_megatron
from steps.engine.checkpoint.hf import open_source
from steps.engine.checkpoint.megatron import RUN_CONFIG, Checkpoint
from steps.engine.model.decoder import Decoder, load_weights
from steps.shapes.run_config import model_config

pytest.importorskip("transformers", reason="extra parity")

TOLERANCE = 1e-4  # float32, summed in another order; logits are of the size 1
LENGTHS = (1, 40, 7, 64, 2)


def converted(model_name, tmp_path, **changes):
    """The transformers model and our decoder with its weights; `changes` falsify the decoder's configuration."""
    model = save_hf(tmp_path / "hf", model_name)
    hf_to_megatron(open_source(str(tmp_path / "hf")), tmp_path / "megatron")
    checkpoint = Checkpoint.open(tmp_path / "megatron")
    config = model_config(checkpoint.run_config, str(checkpoint.folder / RUN_CONFIG))
    decoder = Decoder(replace(config, **changes))
    load_weights(decoder, ((name, tensor.load()) for name, tensor in checkpoint.tensors.items()))
    return model, decoder


def documents(vocab_size):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_of_packed_documents_are_those_of_transformers_for_each_alone(name, tmp_path):
    model, decoder = converted(name, tmp_path)
    rows = documents(model.config.vocab_size)
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    packed = decoder(torch.cat(rows), bounds)
    for start, end, row in zip(bounds, bounds[1:], rows, strict=False):
        reference = model(row[None]).logits[0]
        torch.testing.assert_close(packed[start:end], reference, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(decoder(row, [0, len(row)]), packed[start:end], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama_rope_scaling", {"rope_scaling": None}),
        ("mistral_sliding_window", {"window_size": None}),
        ("mistral_sliding_window", {"window_size": 9}),
        ("llama", {"rotary_base": 20_000.0}),
        ("llama", {"layernorm_epsilon": 1e-3}),
    ],
)
@torch.no_grad()
def test_a_setting_that_were_ignored_would_show(name, changes, tmp_path):
    model, decoder = converted(name, tmp_path, **changes)
    row = documents(model.config.vocab_size)[3]
    difference = decoder(row, [0, len(row)]) - model(row[None]).logits[0]
    assert difference.abs().max() > 10 * TOLERANCE
