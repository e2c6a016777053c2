"""Scores of documents against plain PyTorch, and intervals that hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.packed import random_decoder, random_rows, write_packed

from steps.engine.data.shards import PackedSplit
from steps.engine.evaluation.perplexity import estimate, figures, score
from steps.engine.progress import SILENT


@pytest.fixture
def split(tmp_path):
    write_packed(tmp_path / "packed", random_rows(9), random_rows(6, seed=9))
    return PackedSplit(tmp_path / "packed", "valid")


@torch.no_grad()
def by_hand(decoder, split):
    """(row, tokens, loss, right) of each document with a trained token, each computed alone."""
    for row in range(len(split)):
        pack = split[row]
        for start, end in zip(pack.starts, [*pack.starts[1:], len(pack.input_ids)], strict=True):
            ids = torch.from_numpy(pack.input_ids[start:end].astype("int64"))
            trained = torch.from_numpy(pack.loss_mask[start : end - 1].astype(bool))
            if trained.any():
                logits = decoder(ids, [0, len(ids)])[:-1][trained]
                target = ids[1:][trained]
                loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
                yield row, len(target), loss, (logits.argmax(-1) == target).sum().item()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 6])
def test_documents_score_as_if_each_were_alone(split, micro_batch_size):
    decoder = random_decoder()
    expected = list(by_hand(decoder, split))
    found = score(decoder, split, len(split), micro_batch_size, SILENT)
    assert list(zip(found.row, found.tokens, strict=True)) == [(row, tokens) for row, tokens, *_ in expected]
    assert found.loss == pytest.approx([loss for *_, loss, _ in expected], rel=1e-5)
    assert found.right.tolist() == [right for *_, right in expected]
    assert found.right.sum() > 0


def test_figures(split):
    found = score(random_decoder(), split, 4, 2, SILENT)
    told = figures(found, 0.95)
    assert told["loss"] == pytest.approx(found.loss.sum() / found.tokens.sum())
    assert told["perplexity"] == pytest.approx(math.exp(told["loss"]))
    assert told["perplexity_high"] == pytest.approx(math.exp(told["loss_high"]))
    assert told["loss_low"] < told["loss"] < told["loss_high"]
    assert told["accuracy"] == pytest.approx(found.right.sum() / found.tokens.sum())
    assert told["documents"] == len(found.tokens)
    wider = figures(found, 0.99)
    assert wider["loss_low"] < told["loss_low"]


def test_one_document_tells_no_interval():
    only = estimate(np.array([6.0]), np.array([3]), 0.95)
    assert (only.value, only.low, only.high) == (2.0, None, None)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_holds_the_truth_as_often_as_it_promises(confidence):
    """Documents of 1 to 60 tokens whose losses share a level of their own: mean loss 2 over all tokens."""
    generator, held, runs = np.random.default_rng(0), 0, 2000
    for _ in range(runs):
        tokens = generator.integers(1, 61, 200)
        level = generator.normal(2, 0.5, 200)
        sums = level * tokens + generator.normal(0, 1, 200) * np.sqrt(tokens)
        found = estimate(sums, tokens, confidence)
        held += found.low <= 2 <= found.high
    # Four standard errors of the share, and a percent for 200 documents being no infinite sample.
    assert held / runs == pytest.approx(confidence, abs=4 * math.sqrt(confidence * (1 - confidence) / runs) + 0.01)
