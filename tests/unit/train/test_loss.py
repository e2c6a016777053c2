from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from steps.engine.train.loss import cross_entropy_sum


def draw(n: int = 37, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(53, 16, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(53, (n,), generator=generator)


@pytest.mark.parametrize("rows", [1, 5, 37, 256])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_chunks_give_the_plain_loss_and_gradient(rows, dtype, tolerance):
    hidden, weight, targets = draw(dtype=dtype)
    got = cross_entropy_sum(hidden, weight, targets, rows)
    expected = functional.cross_entropy(functional.linear(hidden, weight), targets, reduction="sum")
    torch.testing.assert_close(got.to(dtype), expected, rtol=tolerance, atol=0)
    (mine,) = torch.autograd.grad(3 * got, hidden)
    (reference,) = torch.autograd.grad(3 * expected, hidden)
    torch.testing.assert_close(mine, reference, rtol=0, atol=10 * tolerance)


def test_bfloat16_is_summed_in_float32():
    hidden, weight, targets = draw(dtype=torch.bfloat16)
    logits = functional.linear(hidden, weight).float()
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    assert cross_entropy_sum(hidden, weight, targets, 8).item() == pytest.approx(expected.item(), rel=1e-6)


def test_large_logits_do_not_overflow():
    hidden, weight, targets = draw()
    assert torch.isfinite(cross_entropy_sum(hidden * 1e4, weight, targets))


def test_no_trained_token_costs_nothing():
    hidden, weight, targets = draw(0)
    loss = cross_entropy_sum(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, 16)


def test_the_logits_never_exist_whole():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, weight, targets = draw(400)
    with Watch():
        cross_entropy_sum(hidden, weight, targets, 16).backward()
    assert largest <= max(16 * 53, 400 * 16)
