"""The Gaussian process against its definition: the conditional of a joint normal distribution, by plain inverses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steps.engine.search.bayes import Process, expected_improvement, matern52


def points(count: int, seed: int = 0, dimensions: int = 3) -> np.ndarray:
    return np.random.RandomState(seed).uniform(size=(count, dimensions))


def wave(at: np.ndarray) -> np.ndarray:
    return np.sin(3 * at[:, 0]) + at[:, 1] ** 2 - at[:, 2]


def covariance(one: np.ndarray, other: np.ndarray, length: float) -> np.ndarray:
    """The kernel written out pair by pair."""

    def pair(a: np.ndarray, b: np.ndarray) -> float:
        r = math.sqrt(5) * math.dist(a, b) / length
        return (1 + r + r * r / 3) * math.exp(-r)

    return np.array([[pair(a, b) for b in other] for a in one])


def test_the_kernel_is_materns():
    one, other = points(6), points(4, seed=1)
    assert matern52(one, other, 0.7) == pytest.approx(covariance(one, other, 0.7), abs=1e-7)
    assert np.diag(matern52(one, one, 0.7)) == pytest.approx(np.ones(6), abs=1e-7)


def test_the_posterior_is_the_conditional_normal():
    seen, new, length, noise = points(12), points(5, seed=1), 0.8, 1e-3
    values = wave(seen)
    process = Process.seen(seen, values, length, noise)
    inverse = np.linalg.inv(covariance(seen, seen, length) + noise * np.eye(12))
    centred, cross = values - values.mean(), covariance(new, seen, length)
    variance = centred @ inverse @ centred / 12
    mean, deviation = process.predict(new)
    # The root of r^2 loses half the digits near r = 0; the inverse is as good as its condition number, about 1e4.
    assert mean == pytest.approx(values.mean() + cross @ inverse @ centred, abs=1e-6)
    expected = variance * (1 - np.einsum("ij,jk,ik->i", cross, inverse, cross))
    assert deviation**2 == pytest.approx(expected, abs=1e-6)


def test_the_likelihood_is_that_of_the_joint_normal():
    seen, length, noise = points(9), 0.5, 1e-2
    values = wave(seen)
    process = Process.seen(seen, values, length, noise)
    whole = process.variance * (covariance(seen, seen, length) + noise * np.eye(9))
    centred = values - values.mean()
    logs = -0.5 * (centred @ np.linalg.inv(whole) @ centred + np.linalg.slogdet(2 * math.pi * whole)[1])
    assert process.likelihood == pytest.approx(logs)
    assert Process.fitted(seen, values).likelihood >= process.likelihood - 1


def test_a_process_knows_what_it_has_seen_and_is_unsure_far_away():
    seen = points(30)
    process = Process.fitted(seen, wave(seen))
    mean, deviation = process.predict(seen)
    assert mean == pytest.approx(wave(seen), abs=0.02)
    assert deviation.max() < 0.05 * process.predict(points(3) + 10)[1].min()
    assert process.predict(points(3) + 100)[0] == pytest.approx(np.full(3, process.mean))


def test_it_predicts_better_than_the_mean():
    seen, new = points(40), points(40, seed=2)
    mean, _ = Process.fitted(seen, wave(seen)).predict(new)
    assert np.abs(mean - wave(new)).mean() < 0.1 * np.abs(wave(new) - wave(seen).mean()).mean()


def test_values_all_alike_are_no_fault():
    mean, deviation = Process.fitted(points(5), np.full(5, 2.0)).predict(points(3, seed=1))
    assert mean == pytest.approx([2, 2, 2])
    assert (deviation < 1e-12).all()


def test_expected_improvement_is_the_mean_of_what_draws_gain():
    mean, deviation, best = np.array([0.5, -0.3, 2.0]), np.array([1.0, 0.2, 0.5]), 0.1
    draws = np.random.RandomState(0).normal(size=(400_000, 3)) * deviation + mean
    gained = np.maximum(best - draws, 0).mean(0)
    # Three standard errors of 400,000 draws.
    assert expected_improvement(mean, deviation, best) == pytest.approx(gained, abs=3 * 1 / math.sqrt(400_000))


def test_expected_improvement_of_what_is_certain():
    nothing = np.zeros(2)
    assert expected_improvement(np.array([1.0, 3.0]), nothing, 2.0).tolist() == [1, 0]
    # The better the mean and the wider the doubt, the more is promised.
    promise = expected_improvement(np.array([1.0, 1.1, 1.1]), np.array([0.2, 0.2, 0.4]), 1.0)
    assert promise[2] > promise[0] > promise[1] > 0
