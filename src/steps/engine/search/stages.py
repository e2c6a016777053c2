"""The three stages of QR-Adaptor (arXiv 2505.03802) one after the other: a start from what the layers' sensitivity
says, a genetic search for the Pareto front, and Bayesian refinement around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from steps.engine.search.bayes import Process, expected_improvement
from steps.engine.search.genetic import evolve, initial
from steps.engine.search.pareto import Point, fronts
from steps.engine.search.space import Configuration, Floats, Space

#: Expected improvement, over the range of what was seen so far, below which nothing more is tried (the authors' value).
_CONVERGED = 1e-4


@dataclass(frozen=True)
class Settings:
    """How much is tried: configurations a generation, generations after the first, configurations of the refinement.

    loss_weight: what counts of a configuration in the refinement and the choice: this times its loss plus the rest
                 times its memory, each from 0 to 1 over the Pareto front. 1: the lowest loss within the budget.
    """

    population: int
    generations: int
    refinements: int
    loss_weight: float
    seed: int

    @property
    def trials(self) -> int:
        """Configurations that are evaluated at most."""
        return self.population * (1 + self.generations) + self.refinements


@dataclass(frozen=True)
class Trial:
    """One configuration that was evaluated. stage: "uniform", "initialization", "genetic" or "refinement"."""

    configuration: Configuration
    loss: float
    bytes: int
    stage: str

    @property
    def point(self) -> Point:
        return (self.loss, self.bytes)


@dataclass(frozen=True)
class Outcome:
    """sensitivity: [layers], from 0 to 1.   trials: in order.   front: indices into them, the smallest memory first."""

    sensitivity: Floats
    trials: Sequence[Trial]
    front: Sequence[int]
    chosen: int

    @property
    def choice(self) -> Trial:
        return self.trials[self.chosen]


def search(
    space: Space,
    sensitivity: Sequence[float],
    loss: Callable[[Configuration], float],
    uniform_bits: int,
    settings: Settings,
    watch: Callable[[Trial], None] = lambda trial: None,
) -> Outcome:
    """Look for the configurations with the least loss for their memory; every one evaluated is within the budget.

    sensitivity:  of each layer, by any measure.   loss: evaluates a configuration; asked once for each.
    uniform_bits: a base with these in all layers is evaluated too, so that the choice is never worse than it.
    watch:        called with each trial once it is done.
    """
    # RandomState's stream is frozen by NumPy's policy, a Generator's may change with a release.
    random, scaled = np.random.RandomState(settings.seed % 2**32), _scaled(np.asarray(sensitivity, dtype=np.float64))
    trials: dict[Configuration, Trial] = {}

    def tried(configuration: Configuration, stage: str) -> Point:
        if configuration not in trials:
            size = space.bytes(configuration)
            assert size <= space.budget, "over budget"
            trials[configuration] = Trial(configuration, loss(configuration), size, stage)
            watch(trials[configuration])
        return trials[configuration].point

    uniform = space.fit(space.uniform(uniform_bits), scaled)
    tried(uniform, "uniform")
    start = [uniform, *(other for other in initial(space, scaled, settings.population, random) if other != uniform)]
    start = start[: settings.population]
    for configuration in start:
        tried(configuration, "initialization")
    evolve(space, lambda one: tried(one, "genetic"), start, settings.generations, scaled, random)
    for _ in range(settings.refinements):
        candidate = _next(space, list(trials.values()), scaled, settings.loss_weight)
        if candidate is None:
            break
        tried(candidate, "refinement")
    return _outcome(scaled, list(trials.values()), settings.loss_weight)


def _outcome(sensitivity: Floats, trials: Sequence[Trial], loss_weight: float) -> Outcome:
    values = utilities(trials, loss_weight)
    front = sorted(fronts([trial.point for trial in trials])[0], key=lambda index: (trials[index].bytes, index))
    return Outcome(sensitivity, trials, front, min(front, key=lambda index: (values[index], trials[index].bytes)))


def utilities(trials: Sequence[Trial], loss_weight: float) -> Floats:
    """What is to be small of each trial: loss and memory weighted, each over its range on the Pareto front."""
    points = np.array([trial.point for trial in trials], dtype=np.float64)
    front = points[fronts(points.tolist())[0]]
    low, spread = front.min(0), front.max(0) - front.min(0)
    return (points - low) / np.where(spread > 0, spread, 1) @ np.array([loss_weight, 1 - loss_weight])  # type: ignore[no-any-return]


def _next(space: Space, trials: Sequence[Trial], sensitivity: Floats, loss_weight: float) -> Configuration | None:
    """Of what is one step from the Pareto front and fits, the configuration that promises most; None if none does."""
    known = {trial.configuration for trial in trials}
    front = fronts([trial.point for trial in trials])[0]
    near = (other for index in front for other in space.neighbours(trials[index].configuration))
    candidates = [one for one in dict.fromkeys(space.fit(other, sensitivity) for other in near) if one not in known]
    if not candidates:
        return None
    values = utilities(trials, loss_weight)
    process = Process.fitted(np.array([space.features(trial.configuration, sensitivity) for trial in trials]), values)
    promise = expected_improvement(
        *process.predict(np.array([space.features(one, sensitivity) for one in candidates])), float(values.min())
    )
    best = int(promise.argmax())
    return candidates[best] if promise[best] >= _CONVERGED * max(float(np.ptp(values)), 1e-30) else None


def _scaled(values: Floats) -> Floats:
    """From 0 to 1; all alike: 1/2."""
    spread = float(np.ptp(values))
    return (values - values.min()) / spread if spread > 0 else np.full_like(values, 0.5)
