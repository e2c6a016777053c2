"""Every weight's gradient, against autograd on the transformers model."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from parity.test_families import LENGTHS, converted, documents
from support.models import FAMILIES

from steps.engine.checkpoint import mapping
from steps.engine.checkpoint.lazy import lazy
from steps.engine.train.loss import cross_entropy_sum
from steps.engine.train.trained import WholeModel

pytest.importorskip("transformers", reason="extra parity")


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_all_weights_are_those_of_transformers(name, tmp_path):
    model, decoder = converted(name, tmp_path)
    rows = [row for row in documents(model.config.vocab_size) if len(row) > 1]
    bounds = [0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()]
    trained = WholeModel.of(decoder)
    trained_at = torch.cat([torch.arange(start, end - 1) for start, end in pairwise(bounds)])
    hidden = decoder.hidden_states(torch.cat(rows), bounds)[trained_at]
    # Rows of 32, so that the output layer collects from several chunks; halved, as a mean would scale it.
    loss = cross_entropy_sum(hidden, decoder.output_weight, torch.cat([row[1:] for row in rows]), rows=32)
    (loss / 2).backward()
    for row in rows:
        logits = model(row[None]).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum") / 2).backward()
    gradients = {name: lazy(parameter.grad) for name, parameter in trained.parameters().items()}
    ours = mapping.to_hf(decoder.config, gradients)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for weight, expected in theirs.items():
        scale = expected.abs().max().item()
        assert scale > 0, weight
        torch.testing.assert_close(ours[weight].load(), expected, rtol=0, atol=1e-4 * scale, msg=weight)
    assert len(LENGTHS) > len(rows)  # the document of one token trains nothing
