"""NSGA-II over configurations of layers (Deb et al. 2002), with the operators of arXiv 2505.03802, stage 2.

A gene is a layer's pair of bits and rank: crossover takes it whole from one parent, so that what fits together stays
together, and mutation moves it by one choice only. Children over budget are brought under it by `Space.fit`, so that
an upgrade that does not fit is paid for by the least sensitive layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from steps.engine.search.pareto import Point, crowding, fronts
from steps.engine.search.space import Configuration, Floats, Space

#: Draws after which a child that exists already is given up.
_ATTEMPTS = 20


def evolve(
    space: Space,
    objectives: Callable[[Configuration], Point],
    start: Sequence[Configuration],
    generations: int,
    sensitivity: Floats,
    random: np.random.RandomState,
) -> list[Configuration]:
    """The population after `generations`, as large as `start`; within the budget if `start` is.

    It survives who is best of all that were ever evaluated: a trial is dear, and none is forgotten.

    objectives: what is to be small; asked once for each configuration.
    """
    population, seen = list(dict.fromkeys(start)), set(start)
    values = {configuration: objectives(configuration) for configuration in population}
    for _ in range(generations):
        order = _ranking([values[member] for member in population])
        for _ in start:
            child = _child(space, population, order, seen, sensitivity, random)
            if child is not None:
                seen.add(child)
                values[child] = objectives(child)
        population = survivors(list(values), list(values.values()), len(start))
    return population


def survivors(configurations: Sequence[Configuration], values: Sequence[Point], count: int) -> list[Configuration]:
    """The best `count`: front by front, of the last one those with the most room."""
    order = _ranking(values)
    best = sorted(range(len(configurations)), key=lambda index: order[index])[:count]
    return [configurations[index] for index in best]


def initial(space: Space, sensitivity: Floats, size: int, random: np.random.RandomState) -> list[Configuration]:
    """Stage 1's population: the more sensitive a layer, the more of both; at most `size`, all within the budget.

    The first is the warm start itself: least and most of the choices for the least and the most sensitive layer, the
    others in between by their place in that order. The rest ranges from what all layers have the middle of to it, with
    some chance in each wish: where few bits ruin a model, moderation has to be among the parents.
    """
    place = np.argsort(np.argsort(sensitivity, kind="stable")) / max(len(sensitivity) - 1, 1)
    warm = np.repeat(place[:, None], 2, axis=1)
    population = [space.leaning(warm, sensitivity)]
    for attempt in range(_ATTEMPTS * size):
        if len(population) >= size:
            break
        lean = (attempt % size + 1) / size
        other = space.leaning(0.5 + lean * (warm - 0.5) + random.uniform(-0.15, 0.15, size=warm.shape), sensitivity)
        if other not in population:
            population.append(other)
    return population[:size]


def _ranking(values: Sequence[Point]) -> list[tuple[int, float]]:
    """For each point its front and minus its room: the smaller, the better."""
    order: list[tuple[int, float]] = [(0, 0.0)] * len(values)
    for number, front in enumerate(fronts(values)):
        for index, room in zip(front, crowding([values[index] for index in front]), strict=True):
            order[index] = (number, -room)
    return order


def _child(
    space: Space,
    population: Sequence[Configuration],
    order: Sequence[tuple[int, float]],
    seen: set[Configuration],
    sensitivity: Floats,
    random: np.random.RandomState,
) -> Configuration | None:
    """A configuration that was not seen yet; None if chance finds none."""
    for _ in range(_ATTEMPTS):
        mother, father = (population[_tournament(order, random)] for _ in range(2))
        mixed = [pair[random.randint(2)] for pair in zip(mother, father, strict=True)]
        child = space.fit(_mutated(space, mixed, random), sensitivity)
        if child not in seen:
            return child
    return None


def _tournament(order: Sequence[tuple[int, float]], random: np.random.RandomState) -> int:
    one, other = (int(random.randint(len(order))) for _ in range(2))
    return min(one, other, key=lambda index: order[index])


def _mutated(space: Space, genes: Sequence[tuple[int, int]], random: np.random.RandomState) -> Configuration:
    """One step in at least one layer, in one more on average."""
    chosen = set(np.flatnonzero(random.uniform(size=len(genes)) < 1 / len(genes)).tolist())
    chosen.add(int(random.randint(len(genes))))
    changed = list(genes)
    for layer in sorted(chosen):
        if steps := list(space.steps(layer, changed[layer])):
            changed[layer] = steps[random.randint(len(steps))]
    return tuple(changed)
