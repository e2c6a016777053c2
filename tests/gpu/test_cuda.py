"""What only a GPU can show: `make test-gpu`. Elsewhere these are left out by their mark."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support import adapters
from support.adapters import CASES, told, train
from support.packed import SHAPE, random_decoder, random_rows, write_base, write_packed

from steps.engine.checkpoint.megatron import Checkpoint
from steps.engine.data.batches import MicroBatch
from steps.engine.model import fusion
from steps.engine.model.attention import BLOCK_ROWS, attend
from steps.engine.train.loss import batch_loss

pytestmark = pytest.mark.gpu


def _parts(dtype, lengths, groups, heads, channels):
    tokens, generator = sum(lengths), torch.Generator().manual_seed(0)
    shapes = ((tokens, groups, heads, channels), (tokens, groups, channels), (tokens, groups, channels))
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return parts, torch.randn(tokens, groups * heads * channels, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("window", [None, 9, 400])
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 2e-6)])
@pytest.mark.parametrize("channels", [64, 128])
def test_attention_is_that_of_the_plain_blocks(dtype, error, window, channels):
    """Against float64 on the CPU, by the norm of the difference: the output and all three gradients."""
    lengths = [5, 3 * BLOCK_ROWS + 3, 1, 200]
    parts, upstream = _parts(dtype, lengths, 3, 3, channels)
    wide = [part.double().requires_grad_() for part in parts]
    expected = attend(*wide, lengths, window)
    wanted = [expected, *torch.autograd.grad(expected, wide, upstream.double())]
    ours = [part.cuda().requires_grad_() for part in parts]
    got = attend(*ours, lengths, window)
    assert got.dtype == dtype
    for mine, reference in zip([got, *torch.autograd.grad(got, ours, upstream.cuda())], wanted, strict=True):
        assert (mine.cpu().double() - reference).norm() < error * reference.norm()


def test_compiled_pieces_give_the_same_loss_and_gradient():
    decoder = random_decoder(replace(SHAPE, kv_channels=16), device="cuda")
    decoder.requires_grad_(True)
    ids = torch.arange(40, device="cuda") % SHAPE.vocab_size
    batch = MicroBatch(ids, [0, 13, 40], torch.arange(20, 39, device="cuda"), ids[21:40])
    found = []
    for compiled in (False, True):
        if compiled:
            assert not fusion.start(torch.device("cuda"))
        loss = batch_loss(decoder, batch)
        found.append((loss.item(), torch.autograd.grad(loss, list(decoder.parameters()))))
    assert fusion.spent()[0] >= 5
    fusion.stop()
    (plain, plain_gradients), (fast, fast_gradients) = found
    assert fast == pytest.approx(plain, rel=1e-6)
    for one, other in zip(plain_gradients, fast_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu")
    write_base(path / "base")
    write_packed(path / "packed", random_rows(20), random_rows(6, seed=9))
    return path


class _Interrupted(Exception):
    pass


def _interrupted(progress, values):
    if values["iteration"] == 8:
        raise _Interrupted


@pytest.mark.parametrize("case", CASES, ids=told)
def test_a_run_repeats_to_the_bit_also_when_resumed_and_is_that_of_the_cpu(case, root, tmp_path, monkeypatch):
    def run(name):
        train(root, peft=case, checkpoint={"save": str(tmp_path / name)})
        return Checkpoint.open(tmp_path / name), json.loads((tmp_path / name / "artifact.json").read_text())["facts"]

    whole, facts = run("whole")
    with monkeypatch.context() as patch, pytest.raises(_Interrupted):
        patch.setattr(adapters.Rows, "metrics", _interrupted)
        run("resumed")
    resumed, _ = run("resumed")
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor.load(), resumed.tensors[name].load()), name
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        _, on_cpu = run("cpu")
    assert facts["valid_loss_first"] == pytest.approx(on_cpu["valid_loss_first"], rel=1e-5)
    # Dropout draws other numbers on a GPU.
    assert facts["valid_loss_last"] == pytest.approx(
        on_cpu["valid_loss_last"], rel=0.05 if case.get("dropout") else 1e-3
    )
    assert facts["valid_loss_last"] < facts["valid_loss_first"]


@pytest.mark.parametrize("case", CASES, ids=told)
def test_a_run_in_bfloat16_is_near_that_of_the_cpu(case, root, tmp_path, monkeypatch):
    """Kernels exist by dtype: what float32 can, bfloat16 may lack."""

    def run(name):
        train(root, peft=case, train={"precision": "bfloat16"}, checkpoint={"save": str(tmp_path / name)})
        return json.loads((tmp_path / name / "artifact.json").read_text())["facts"]

    here = run("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert here["valid_loss_last"] == pytest.approx(run("cpu")["valid_loss_last"], rel=0.05)
    assert here["valid_loss_last"] < here["valid_loss_first"]
