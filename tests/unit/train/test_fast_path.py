"""Fifty steps by what the engine has instead of plain PyTorch, against plain PyTorch in float32, from one seed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.packed import SHAPE, random_rows, write_base, write_packed
from torch.nn import functional as F
from unit.train.test_loop import train

from steps.engine.adapters import lora
from steps.engine.model import decoder, layers
from steps.engine.train import loss
from steps.shapes.model_config import ModelConfig

MODEL = ModelConfig(
    **{**SHAPE.to_dict(), "num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 256, "kv_channels": 32,
       "vocab_size": 509}
)  # fmt: skip
STEPS, PACK_SIZE = 50, 224


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fast")
    write_base(root / "base", MODEL)
    rows = (random_rows(count, seed, PACK_SIZE, MODEL.vocab_size) for count, seed in ((40, 0), (6, 9)))
    write_packed(root / "packed", *rows, pack_size=PACK_SIZE)
    return root


def curve(root: Path, name: str, **options: object) -> list[float]:
    return train(
        root,
        recipe={"seq_length": PACK_SIZE},
        train={"train_iters": STEPS, **options},
        optimizer={"lr": 0.003},
        checkpoint={"save": str(root / name)},
    ).losses()


@pytest.fixture(scope="module")
def plain(root) -> list[float]:
    """The loss curve with autograd's own backward passes, a mask of tokens x tokens, and all logits at once."""

    def attend(query, key, value, lengths, window=None):
        tokens, _, heads, channels = query.shape
        q = query.flatten(1, 2).transpose(0, 1)
        k, v = (x.transpose(0, 1).repeat_interleave(heads, dim=0) for x in (key, value))
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        seen = (document[:, None] == document) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
        scores = (q @ k.transpose(1, 2) * channels**-0.5).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def rms_norm(x, weight, epsilon):
        return F.rms_norm(x, weight.shape, weight, epsilon)

    def swiglu(x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rotate(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def low_rank(base, x, a, b, scale, slot=None):
        assert slot is None
        return base + scale * (x @ a.T @ b.T)

    def cross_entropy_sum(hidden, weight, targets):
        called.append(len(targets))
        return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")

    called: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (layers, decoder):
            patch.setattr(module, "rms_norm", rms_norm)
        for function in (attend, swiglu, rotate):
            patch.setattr(layers, function.__name__, function)
        patch.setattr(lora, "low_rank", low_rank)
        patch.setattr(loss, "cross_entropy_sum", cross_entropy_sum)
        losses = curve(root, "plain", precision="float32", compile="never")
    assert called
    assert losses[-1] < 0.8 * losses[0]
    return losses


def test_float32_within_1e_4(root, plain):
    assert curve(root, "float32", precision="float32", compile="never") == pytest.approx(plain, rel=1e-4)


def test_bfloat16_within_one_percent(root, plain):
    assert curve(root, "bfloat16", precision="bfloat16", compile="never") == pytest.approx(plain, rel=0.01)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_bfloat16_compiled_within_one_percent(root, plain):
    assert curve(root, "compiled", precision="bfloat16", compile="always") == pytest.approx(plain, rel=0.01)
