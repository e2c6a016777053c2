"""The search against problems small enough to try every configuration."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steps.engine.search.genetic import evolve, initial
from steps.engine.search.pareto import fronts
from steps.engine.search.space import Configuration, Space
from steps.engine.search.stages import Settings, search

BITS, RANKS = (2, 4, 8), (4, 8, 16)
#: How much a layer's quantization costs, and what its rank gains: two layers matter more than the rest.
HARM, GAIN = (1.0, 0.1, 3.0, 0.2), (0.2, 0.3, 0.1, 0.4)


def size(layer: int, bits: int, rank: int) -> int:
    return (100 + 10 * layer) * bits + 12 * rank


def space(budget: int = 2200, layers: int = 4) -> Space:
    return Space([BITS] * layers, [RANKS] * layers, size, budget)


def loss(configuration: Configuration) -> float:
    """Quantization noise falls by four with each bit; rank gains less with each doubling, and more where it is lost."""
    return sum(
        harm * 4.0 ** (2 - bits) + (gain + 0.1 * harm / bits) / rank
        for (bits, rank), harm, gain in zip(configuration, HARM, GAIN, strict=True)
    )


def everything(of: Space) -> list[Configuration]:
    genes = [list(product(bits, ranks)) for bits, ranks in zip(of.bits, of.ranks, strict=True)]
    return [one for one in product(*genes) if of.bytes(one) <= of.budget]


def test_memory_is_the_sum_of_the_layers():
    one = ((2, 4), (4, 8), (8, 16), (2, 16))
    assert space().bytes(one) == 2 * 100 + 48 + 4 * 110 + 96 + 8 * 120 + 192 + 2 * 130 + 192


def test_neighbours_are_one_choice_of_one_layer_away():
    of, one = space(), ((2, 4), (4, 8), (8, 16), (2, 16))
    expected = []
    for layer, (bits, rank) in enumerate(one):
        near = [(b, rank) for b in BITS if abs(BITS.index(b) - BITS.index(bits)) == 1]
        near += [(bits, r) for r in RANKS if abs(RANKS.index(r) - RANKS.index(rank)) == 1]
        expected += [(*one[:layer], gene, *one[layer + 1 :]) for gene in near]
    assert sorted(of.neighbours(one)) == sorted(expected)
    assert not list(Space([(4,)], [(8,)], size, 0).neighbours(((4, 8),)))


@given(
    st.lists(st.tuples(st.sampled_from(BITS), st.sampled_from(RANKS)), min_size=4, max_size=4),
    st.integers(1112, 5000),  # what the least of everything takes, and more
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_what_is_made_to_fit_fits_and_loses_only(genes, budget, sensitivity):
    of, before = space(budget), tuple(genes)
    fitted = of.fit(before, np.array(sensitivity))
    assert of.bytes(fitted) <= budget
    assert fitted == before or of.bytes(before) > budget
    assert all(b <= old_b and r <= old_r for (b, r), (old_b, old_r) in zip(fitted, before, strict=True))
    assert of.fit(fitted, np.array(sensitivity)) == fitted


def test_what_is_least_sensitive_gives_first():
    of = space(budget=space().bytes(((8, 16), (8, 16), (8, 16), (8, 16))) - 1)
    bits = [gene[0] for gene in of.fit(((8, 16),) * 4, np.array([1.0, 1.0, 0.0, 1.0]))]
    assert bits == [8, 8, 4, 8]


def test_the_warm_start_gives_sensitive_layers_more_of_both():
    sensitivity = np.array([0.9, 0.0, 0.3, 0.2])
    first, *rest = initial(space(budget=10**6), sensitivity, 8, np.random.RandomState(0))
    assert first == ((8, 16), (2, 4), (4, 8), (4, 8))
    assert len({first, *rest}) == 8
    # And so does, on average, what is around it.
    mean = np.mean(rest, axis=0)
    assert (mean[0] > mean[2]).all()
    assert (mean[2] > mean[1]).all()


def test_nsga_finds_the_front_of_a_problem_whose_front_is_known():
    of, sensitivity = space(budget=10**6), np.array(HARM) / max(HARM)
    known = everything(of)
    points = [(loss(one), of.bytes(one)) for one in known]
    front = {known[index] for index in fronts(points)[0]}
    asked: list[Configuration] = []

    def objectives(one: Configuration) -> tuple[float, int]:
        asked.append(one)
        return loss(one), of.bytes(one)

    random = np.random.RandomState(0)
    found = evolve(of, objectives, initial(of, sensitivity, 40, random), 25, sensitivity, random)
    assert len(asked) == len(set(asked)) <= 40 * 26 < len(known) / 6
    assert len(front) > 40
    # Most that survive are on the true front, and they are spread over it: they take the area that the front does.
    assert sum(one in front for one in found) >= 0.8 * len(found)
    assert area([points[known.index(one)] for one in found], points) > 0.99 * area(points, points)


def area(points: list[tuple[float, int]], scale: list[tuple[float, int]]) -> float:
    """What the points dominate of the box around `scale` (the hypervolume), a sum over the staircase."""
    low, high = np.min(scale, axis=0), np.max(scale, axis=0)
    ends = sorted(((np.array(point) - low) / (high - low)).tolist() for point in points)
    total, lowest = 0.0, 1.0
    for x, y in ends:
        if y < lowest:
            total += (1 - x) * (lowest - y)
            lowest = y
    return total


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_within_the_budget(seed):
    of = space()
    best = min(everything(of), key=loss)
    outcome = search(of, HARM, loss, 4, Settings(10, 6, 20, 1.0, seed))
    assert len(outcome.trials) <= 90
    values = sorted(loss(one) for one in everything(of))
    # Among the best four of 1,726, of which it has tried 90, and not worse than the uniform one.
    assert len(values) > 1700
    assert outcome.choice.loss <= values[3]
    assert outcome.choice.loss <= outcome.trials[0].loss
    assert [gene[0] for gene in outcome.choice.configuration] == [gene[0] for gene in best]


@given(st.integers(1200, 4000), st.integers(0, 2**40), st.floats(0.1, 1))
@settings(max_examples=25, deadline=None)
def test_no_configuration_over_budget_is_ever_evaluated(budget, seed, weight):
    of, asked = space(budget), []

    def watched(one: Configuration) -> float:
        asked.append(one)
        return loss(one)

    outcome = search(of, HARM, watched, 4, Settings(4, 2, 3, weight, seed))
    assert asked == [trial.configuration for trial in outcome.trials]
    assert len(set(asked)) == len(asked) <= 4 * 3 + 3
    assert max(map(of.bytes, asked)) <= budget
    points = [trial.point for trial in outcome.trials]
    assert sorted(outcome.front) == fronts(points)[0]
    assert outcome.chosen in outcome.front


def test_the_same_seed_searches_the_same_and_another_one_otherwise():
    one, same, other = (search(space(), HARM, loss, 4, Settings(6, 3, 4, 1.0, seed)) for seed in (3, 3, 4))
    assert [trial.configuration for trial in one.trials] == [trial.configuration for trial in same.trials]
    assert one.chosen == same.chosen
    assert [trial.configuration for trial in one.trials] != [trial.configuration for trial in other.trials]


def test_the_refinement_improves_on_what_it_starts_from():
    few = Settings(6, 1, 0, 1.0, 0)
    more = Settings(6, 1, 30, 1.0, 0)
    before, after = (search(space(), HARM, loss, 4, settings) for settings in (few, more))
    refined = [trial for trial in after.trials if trial.stage == "refinement"]
    assert after.trials[: len(before.trials)] == before.trials
    assert refined
    assert after.choice.loss < before.choice.loss


def test_memory_counts_as_asked():
    cheap, dear = (search(space(), HARM, loss, 4, Settings(10, 6, 10, weight, 0)) for weight in (0.5, 1.0))
    assert cheap.choice.bytes < dear.choice.bytes
    assert dear.choice.loss == min(trial.loss for trial in dear.trials)


def test_nothing_to_choose_is_one_trial():
    of = Space([(4,)] * 3, [(8,)] * 3, size, 10**6)
    outcome = search(of, [1.0, 1.0, 1.0], lambda one: 1.0, 4, Settings(5, 2, 4, 1.0, 0))
    assert [trial.configuration for trial in outcome.trials] == [((4, 8),) * 3]
    assert (list(outcome.front), outcome.chosen) == ([0], 0)
