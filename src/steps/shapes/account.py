"""What an adapter on a model comes to, by arithmetic on the shapes. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator

from steps.config.peft import Peft
from steps.errors import Problem, Setting
from steps.shapes import targets
from steps.shapes.model_config import ModelConfig


def misfits(section: Peft, model: ModelConfig) -> Iterator[Problem]:
    """What keeps an adapter from being put on a model: targets that mean nothing, a rank above the matrix, …"""
    names = targets.chosen(section, model.num_layers)
    kinds = {name.rpartition(".")[2]: targets.shape(model, name) for name in names}
    for fault in (*targets.faults(section, model.num_layers), *section.misfits(kinds)):
        yield Setting(**vars(fault))


def trainable(section: Peft, model: ModelConfig) -> int:
    """Parameters that are trained."""
    names = targets.chosen(section, model.num_layers)
    return section.shared_trainable() + sum(section.trainable(*targets.shape(model, name)) for name in names)
