"""Means and 95 % intervals of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence


def mean(values: Iterable[float]) -> float:
    """The mean. Unlike ``statistics.fmean``, it takes infinite values."""
    listed = list(values)
    return sum(listed) / len(listed)


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(
    metric: Callable[[Sequence[float], Sequence[float]], float], gold: Sequence[float], predicted: Sequence[float]
) -> tuple[float, float]:
    """95 % interval of a metric over examples: percentiles of 1,000 resamples of the pairs, with a fixed seed.

    Args:
        metric: a function of labels and predictions.
        gold: the labels.
        predicted: the prediction for each label.
    """
    import numpy as np

    pairs, generator = np.array([gold, predicted]), np.random.default_rng(0)
    drawn = (pairs[:, generator.integers(len(gold), size=len(gold))] for _ in range(1000))
    values = [metric(sample[0].tolist(), sample[1].tolist()) for sample in drawn]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """95 % interval of the unweighted mean of independent accuracies, given as pairs (correct, n).

    Combines Wilson's intervals of the accuracies (MOVER; Zou and Donner 2008, doi 10.1002/sim.3095). For one accuracy
    it is Wilson's interval.
    """
    accuracies = [correct / n for correct, n in counts]
    intervals = [wilson_interval(correct, n) for correct, n in counts]
    below, above = (
        math.hypot(*(accuracy - ends[i] for accuracy, ends in zip(accuracies, intervals, strict=True))) / len(counts)
        for i in (0, 1)
    )
    center = mean(accuracies)
    return center - below, center + above
