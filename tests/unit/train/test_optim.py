"""The optimizer with its state on the CPU: the same updates, the same state."""

from __future__ import annotations

import pytest
import torch
from support.adapters import adapted

from steps.config.training import Optimizer
from steps.engine.train.optim import AdamW, Gradients

CASE = {"type": "lora", "dim": 4, "lora_plus_ratio": 4.0}


def trained(offload: bool, steps: int, start: dict | None = None):
    """An optimizer after steps with made-up gradients, and the parameters it moved. start: a state to go on from."""
    adapters = adapted(CASE)
    optimizer = AdamW(adapters, Optimizer(lr=0.01, weight_decay=0.1), offload=offload)
    if start is not None:
        optimizer.load(start)
    Gradients(adapters.parameters())
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for parameter in adapters.parameters().values():
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step(0.01 / (step + 1))
    return optimizer, adapters.parameters()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) if isinstance(one[name], torch.Tensor) else same(one[name], other[name])
        for name in one
    )


def test_offloaded_updates_are_the_same_to_the_bit():
    here, mine = trained(False, 5)
    away, theirs = trained(True, 5)
    assert same(mine, theirs)
    assert same(here.state(), away.state())
    assert not same(mine, trained(False, 0)[1])


@pytest.mark.parametrize("first", [True, False], ids=["offloaded first", "offloaded later"])
def test_the_state_goes_from_one_to_the_other(first):
    state = trained(first, 3)[0].state()
    went_on, reference = trained(not first, 2, state), trained(first, 2, state)
    assert same(went_on[0].state(), reference[0].state())
    assert same(went_on[1], reference[1])
    assert {tensor.device.type for entry in went_on[0].state().values() for tensor in entry.values()} == {"cpu"}


def test_parameters_that_were_changed_elsewhere_are_updated_from_where_they_are():
    """An adapter method may change them between steps (`after_step`)."""
    moved = []
    for offload in (False, True):
        optimizer, parameters = trained(offload, 2)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(0.5)
        optimizer.step(0.01)
        moved.append(parameters)
    assert same(*moved)
