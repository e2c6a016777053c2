"""A Gaussian process over points and the expected improvement under it: what to try next when a trial is dear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steps.engine.search.space import Floats


def matern52(one: Floats, other: Floats, length: float) -> Floats:
    """Matérn-5/2 covariances [n, m] of unit variance between points [n, d] and [m, d] (Rasmussen & Williams, 4.17)."""
    squares = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
    scaled = np.sqrt(5 * np.maximum(squares, 0)) / length
    kernel: Floats = (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
    return kernel


@dataclass(frozen=True)
class Process:
    """A Gaussian process that has seen values at points.

    points: [n, d].   length: of the kernel.   noise: variance of the noise over that of the signal.
    mean, variance: of the values; the process models their distance from the mean.
    """

    points: Floats
    length: float
    noise: float
    mean: float
    variance: float
    root: Floats
    weights: Floats

    #: What `fitted` chooses from. Lengths in units of the root of the dimension, the diameter of the unit cube.
    LENGTHS: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
    NOISES: ClassVar[tuple[float, ...]] = (1e-6, 1e-4, 1e-2, 1e-1)

    @classmethod
    def seen(cls, points: Floats, values: Floats, length: float, noise: float) -> Process:
        """The process with these two settings. The variance is the likeliest one, in closed form."""
        mean = float(values.mean())
        covariance = matern52(points, points, length) + noise * np.eye(len(points))
        root: Floats = np.linalg.cholesky(covariance).astype(np.float64, copy=False)
        weights = np.linalg.solve(root.T, np.linalg.solve(root, values - mean))
        variance = float((values - mean) @ weights) / len(values)
        return cls(points, length, noise, mean, max(variance, 1e-30), root, weights)

    @classmethod
    def fitted(cls, points: Floats, values: Floats) -> Process:
        """The likeliest of a grid of settings."""
        scale = math.sqrt(points.shape[1])
        tried = [cls.seen(points, values, length * scale, noise) for length in cls.LENGTHS for noise in cls.NOISES]
        return max(tried, key=lambda process: process.likelihood)

    @property
    def likelihood(self) -> float:
        """Log of the marginal likelihood, variance at its best value (Rasmussen & Williams, 2.30)."""
        count = len(self.points)
        logs = float(np.log(np.diag(self.root)).sum())
        return -0.5 * count * (math.log(2 * math.pi * self.variance) + 1) - logs

    def predict(self, points: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation, each [m], of the noiseless function at points [m, d] (equations 2.25, 2.26)."""
        cross = matern52(points, self.points, self.length)
        explained = np.linalg.solve(self.root, cross.T)
        left = np.maximum(1 - (explained**2).sum(0), 0)
        return self.mean + cross @ self.weights, np.sqrt(self.variance * left)


def expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    """By how much a draw is expected to come out below `best`: E[max(best - y, 0)], y ~ N(mean, deviation^2). [m]."""
    gain = best - mean
    z = np.divide(gain, deviation, out=np.zeros_like(gain), where=deviation > 0)
    below = 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2)))
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return np.where(deviation > 0, gain * below + deviation * density, np.maximum(gain, 0))
