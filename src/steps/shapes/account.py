"""What an adapter on a model comes to, by arithmetic on the shapes. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator

from steps.config.peft import Layer, Peft
from steps.errors import Problem
from steps.shapes import targets
from steps.shapes.model_config import ModelConfig


def misfits(section: Peft, model: ModelConfig) -> Iterator[Problem]:
    """What keeps an adapter from being put on a model: targets that mean nothing, a rank above the matrix, …"""
    faults = list(targets.faults(section, model.num_layers))
    yield from faults
    if not faults:
        kinds = {
            name.rpartition(".")[2]: targets.shape(model, name) for name in targets.chosen(section, model.num_layers)
        }
        yield from section.misfits(kinds)
        yield from section.layer_misfits(layers(section, model))


def trainable(section: Peft, model: ModelConfig) -> int:
    """Parameters that are trained."""
    names = targets.chosen(section, model.num_layers)
    return section.shared_trainable() + sum(
        section.trainable_at(targets.layer(name), *targets.shape(model, name)) for name in names
    )


def layers(section: Peft, model: ModelConfig) -> list[Layer]:
    """The linears of each layer, and what of them the section adapts."""
    linears = [targets.shape(model, name) for name in targets.linear_names(1)]
    adapted: list[list[tuple[int, int]]] = [[] for _ in range(model.num_layers)]
    for name in targets.chosen(section, model.num_layers):
        adapted[targets.layer(name)].append(targets.shape(model, name))
    return [Layer(linears, shapes) for shapes in adapted]
