"""Uncertainty of a difference between methods, from seeds and from examples together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RESAMPLES = 999
LEVEL = 0.95
LEAST_SEEDS = 3
"""The fewest pairs of seeds that decide anything. Two pairs estimate the variance over seeds too poorly."""


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation of n values."""

    n: int
    mean: float
    deviation: float
    """NaN if n is 1."""


@dataclass(frozen=True)
class Difference:
    """The gain of one method over another on one task, or the mean gain over several tasks.

    The 95 % interval refers to other seeds and other examples of the same kind. Its ends are NaN with fewer than three
    pairs of seeds.
    """

    mean: float
    low: float
    high: float
    p: float
    """Two-sided probability of a difference at least this large by chance alone. NaN if the interval is NaN."""
    seeds: int
    examples: int
    tasks: int = 1
    error: float = math.nan
    """Standard error."""
    freedom: float = math.nan
    """Degrees of freedom of Student's t."""

    def verdict(self, p: float | None = None, alpha: float = 1 - LEVEL) -> str:
        """ "better", "worse", "no difference shown", or "not decided" if there are too few seeds.

        Args:
            p: replaces the difference's own p, for example by an adjusted one.
            alpha: the largest p that shows a difference.
        """
        p = self.p if p is None else p
        if math.isnan(p):
            return "not decided"
        return ("better" if self.mean > 0 else "worse") if p < alpha else "no difference shown"


def describe(values: Sequence[float]) -> Mean:
    """Number, mean and standard deviation (n − 1) of the values."""
    n = len(values)
    mean = float(np.mean(values)) if n else math.nan
    return Mean(n, mean, float(np.std(values, ddof=1)) if n > 1 else math.nan)


def compare(
    a: Array, b: Array, expected: Array | None = None, metric: Callable[..., Any] | None = None, *, seed: int = 0
) -> Difference:
    r"""The gain of ``a`` over ``b``: D, the mean over S seeds of d_s = metric(a_s) − metric(b_s).

    The variance of D is V₁ + V₂. Over seeds, V₁ = var(d_s) / S. Over examples, V₂ = var / E for a mean over E examples;
    for other metrics it comes from resampled examples (bootstrap). The sum is slightly too large, because both parts
    contain the remaining noise. The degrees of freedom follow Welch and Satterthwaite. They are slightly too many if
    three seeds agree by chance.

    Args:
        a: ``(S, E)``, one row per seed: the score of each example, or with a ``metric`` the predictions.
        b: the same for the other method, paired with ``a`` by row.
        expected: ``(E,)``, the correct values. Only with a ``metric``.
        metric: is called as ``metric(expected, predicted, axis=-1)``. None is the mean of the scores.
        seed: seed of the resampling.
    """
    seeds, examples = a.shape
    if metric is None:
        by_seed = (a - b).mean(1)
        over_examples = float(stats.sem((a - b).mean(0)) ** 2) if examples > 1 else math.nan
    else:
        by_seed = metric(expected, a, axis=-1) - metric(expected, b, axis=-1)

        def gain(*columns: Any, axis: int = -1) -> Any:
            right, runs = columns[0], columns[1:]
            gains = [
                metric(right, x, axis=axis) - metric(right, y, axis=axis)
                for x, y in zip(runs[:seeds], runs[seeds:], strict=True)
            ]
            return np.mean(gains, axis=0)

        over_examples = math.nan
        if examples > 1:
            resampled = stats.bootstrap(
                (expected, *a, *b), gain, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=100,
                method="percentile", rng=np.random.default_rng(seed),
            )  # fmt: skip
            over_examples = float(resampled.standard_error) ** 2
    mean = float(np.mean(by_seed))
    if seeds < 2:
        return Difference(mean, math.nan, math.nan, math.nan, seeds, examples)
    over_seeds = float(stats.sem(by_seed)) ** 2
    return _difference(mean, [(over_seeds, seeds - 1), (over_examples, examples - 1)], seeds, examples)


def over_seeds(values: Sequence[float], examples: int) -> Difference:
    """The mean of one value per seed, such as the gain on facts that each seed draws for itself.

    Such seeds differ in their examples too, so the variance over the seeds is the whole variance.

    Args:
        values: one value per seed.
        examples: number of examples of each seed.
    """
    mean, seeds = float(np.mean(values)), len(values)
    if seeds < 2:
        return Difference(mean, math.nan, math.nan, math.nan, seeds, examples)
    return _difference(mean, [(float(stats.sem(values)) ** 2, seeds - 1)], seeds, examples)


def equivalent_rank(curve: Sequence[tuple[int, float]], value: float) -> float:
    """The rank at which a curve of bits over the rank, linear between the measured ranks, first reaches ``value``.

    Args:
        curve: pairs of rank and bits, at least one.
        value: the bits to reach.

    Returns:
        The rank. It is infinite if no measured rank reaches ``value``, and −∞ if the smallest one exceeds it.
    """
    points = sorted(curve)
    if points[0][1] > value:
        return -math.inf
    for (left, low), (right, high) in pairwise(points):
        if low <= value <= high:
            return left + (right - left) * (value - low) / (high - low) if high > low else float(left)
    return float(points[-1][0]) if points[-1][1] == value else math.inf


def average(differences: Sequence[Difference]) -> Difference:
    """The mean difference over these tasks."""
    tasks = len(differences)
    parts = [(d.error**2 / tasks**2, d.freedom) for d in differences]
    mean = float(np.mean([d.mean for d in differences]))
    seeds, examples = min(d.seeds for d in differences), sum(d.examples for d in differences)
    return _difference(mean, parts, seeds, examples, tasks)


def mcnemar(a: Array, b: Array) -> tuple[int, int, float]:
    """McNemar's exact test for two runs, from right (1) and wrong (0) answers.

    The test asks whether these two trained models differ. Two trainings with different seeds differ as well.

    Returns:
        The examples that only ``a`` has right, those that only ``b`` has right, and p.
    """
    only_a, only_b = int(((a > 0.5) & (b <= 0.5)).sum()), int(((b > 0.5) & (a <= 0.5)).sum())
    return only_a, only_b, float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def adjusted(p: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, adjusted for their number (Benjamini and Hochberg).

    At most the share alpha of the differences found is false. NaN stays NaN and is not counted.
    """
    known = [x for x in p if not math.isnan(x)]
    found = iter(stats.false_discovery_control(known) if known else [])
    return [math.nan if math.isnan(x) else float(next(found)) for x in p]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, gain) on the Pareto front.

    No other point is better in one value without being worse in the other.
    """

    def beaten(i: int) -> bool:
        cost, gain = points[i]
        return any(c <= cost and g >= gain and (c < cost or g > gain) for c, g in points)

    return [i for i, point in enumerate(points) if not any(map(math.isnan, point)) and not beaten(i)]


def pearson(expected: Array, predicted: Array, axis: int = -1) -> Any:
    """Pearson's correlation along ``axis``; 0 if one side is constant."""
    x = expected - expected.mean(axis, keepdims=True)
    y = predicted - predicted.mean(axis, keepdims=True)
    scale = np.sqrt((x * x).sum(axis) * (y * y).sum(axis))
    return np.divide((x * y).sum(axis), scale, out=np.zeros_like(scale), where=scale > 0)


def _difference(mean: float, parts: list[tuple[float, float]], seeds: int, examples: int, tasks: int = 1) -> Difference:
    """A difference whose variance is the sum of independent ``parts``, each with its degrees of freedom."""
    variance = sum(part for part, _ in parts)
    if math.isnan(variance):
        return Difference(mean, math.nan, math.nan, math.nan, seeds, examples, tasks)
    if variance == 0:
        freedom, error, half, p = math.inf, 0.0, 0.0, float(mean == 0)
    else:
        freedom = variance**2 / sum(part**2 / f for part, f in parts if part)
        error = math.sqrt(variance)
        half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
        p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    if seeds < LEAST_SEEDS:
        half = p = math.nan
    return Difference(mean, mean - half, mean + half, p, seeds, examples, tasks, error, freedom)
