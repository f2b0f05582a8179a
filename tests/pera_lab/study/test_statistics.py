"""Statistics against scipy on known data; planted differences are found, and no others."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import matthews_corrcoef

from pera_lab.study.statistics import (
    Mean,
    adjusted,
    average,
    compare,
    describe,
    equivalent_rank,
    mcnemar,
    over_seeds,
    pareto,
    pearson,
)

GAUSS = np.random.default_rng(0).normal(size=(3, 50))


def simulated(rng, gain=0.0, seeds=3, examples=800, between=0.006):
    """Right and wrong answers of two methods, with examples of varying difficulty and runs that vary with the seed.

    The first method is better by ``gain``.
    """
    difficulty = rng.beta(4, 1, size=examples)

    def answers(shift):
        chance = np.clip(difficulty + shift + rng.normal(scale=between, size=(seeds, 1)), 0, 1)
        return (rng.random((seeds, examples)) < chance).astype(float)

    return answers(gain), answers(0.0)


def test_describe_is_mean_and_standard_deviation():
    values = [0.81, 0.84, 0.80]
    assert describe(values) == Mean(3, pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert describe([0.5, 0.5]) == Mean(2, 0.5, 0.0)
    assert math.isnan(describe([0.5]).deviation)


def test_without_variance_over_examples_it_equals_the_paired_t_test_over_seeds():
    a, b = np.tile([[0.6], [0.9], [0.7]], 40), np.tile([[0.5], [0.6], [0.75]], 40)
    found = compare(a, b)
    expected = stats.ttest_rel(a[:, 0], b[:, 0])
    interval = expected.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, interval.low, interval.high))


def test_without_variance_over_seeds_it_equals_the_paired_t_test_over_examples():
    a, b = np.tile(GAUSS[0], (3, 1)), np.tile(GAUSS[1], (3, 1))
    found = compare(a, b)
    expected = stats.ttest_rel(GAUSS[0], GAUSS[1])
    interval = expected.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, interval.low, interval.high))


def test_the_error_combines_seeds_and_examples():
    a, b = simulated(np.random.default_rng(1))
    found = compare(a, b)
    by_seed, by_example = stats.sem((a - b).mean(1)), stats.sem((a - b).mean(0))
    assert found.error == pytest.approx(math.hypot(by_seed, by_example))
    assert found.low == pytest.approx(found.mean - stats.t.ppf(0.975, found.freedom) * found.error)


def test_the_bootstrap_of_a_mean_agrees_with_its_formula():
    a, b = simulated(np.random.default_rng(2))
    by_metric = compare(a, b, np.zeros(800), lambda expected, scores, axis: scores.mean(axis))
    assert by_metric.mean == pytest.approx(compare(a, b).mean)
    assert by_metric.error == pytest.approx(compare(a, b).error, rel=0.05)


def test_a_correlation_is_compared_by_resampled_examples():
    rng = np.random.default_rng(3)
    expected = rng.uniform(0, 5, size=600)
    a, b = expected + rng.normal(scale=1.0, size=(3, 600)), expected + rng.normal(scale=1.5, size=(3, 600))
    found = compare(a, b, expected, pearson)
    assert found.mean == pytest.approx(np.mean([stats.pearsonr(expected, x)[0] for x in a])
                                       - np.mean([stats.pearsonr(expected, x)[0] for x in b]))  # fmt: skip
    assert found.verdict() == "better"
    assert compare(a, a[::-1], expected, pearson).verdict() == "no difference shown"


def test_correlations_equal_scipy_and_scikit_learn():
    assert pearson(GAUSS[0], GAUSS[1]) == pytest.approx(stats.pearsonr(GAUSS[0], GAUSS[1])[0])
    labels = (GAUSS[:2] > 0.2).astype(float)
    assert pearson(*labels) == pytest.approx(matthews_corrcoef(*labels))
    assert pearson(np.ones(4), np.arange(4.0)) == 0


@pytest.mark.parametrize("between", [0.006, 0.02])
def test_methods_that_differ_only_in_their_seeds_are_rarely_told_apart(between):
    """At most about 5 % of studies find a difference."""
    rng = np.random.default_rng(4)
    found = [compare(*simulated(rng, between=between)).verdict() for _ in range(400)]
    assert found.count("no difference shown") >= 0.93 * 400


def test_mcnemar_alone_would_find_differences_between_seeds():
    """Seeds are part of the error because McNemar's test is right about two models and wrong about two methods."""
    rng = np.random.default_rng(5)
    pairs = [simulated(rng, between=0.04, seeds=3, examples=3000) for _ in range(200)]
    by_example = sum(mcnemar(a[0], b[0])[2] < 0.05 for a, b in pairs)
    assert by_example > 0.5 * 200
    assert sum(compare(a, b).p < 0.05 for a, b in pairs) < 0.1 * 200


def test_a_planted_difference_is_found():
    rng = np.random.default_rng(6)
    found = [compare(*simulated(rng, gain=0.08)).verdict() for _ in range(100)]
    assert found.count("better") > 90
    assert compare(*reversed(simulated(rng, gain=0.15))).verdict() == "worse"


@pytest.mark.parametrize("seeds", [1, 2])
def test_two_seeds_decide_nothing(seeds):
    a, b = simulated(np.random.default_rng(7), gain=0.3, seeds=seeds)
    assert compare(a, b).verdict() == "not decided"
    assert average([compare(a, b)] * 2).verdict() == "not decided"
    assert math.isnan(compare(a, b).low)
    assert math.isnan(compare(a, a).high)


def test_equal_runs_do_not_differ():
    a, _ = simulated(np.random.default_rng(8))
    assert (compare(a, a).p, compare(a, a).mean) == (1.0, 0.0)


def test_the_average_over_tasks_has_a_smaller_error():
    rng = np.random.default_rng(9)
    single = [compare(*simulated(rng, gain=0.03, examples=400)) for _ in range(6)]
    together = average(single)
    assert together.mean == pytest.approx(np.mean([d.mean for d in single]))
    assert together.error == pytest.approx(math.sqrt(sum(d.error**2 for d in single)) / 6)
    assert together.p < min(d.p for d in single)
    assert (together.tasks, together.examples) == (6, 2400)


def test_mcnemar_equals_the_binomial_test_of_discordant_pairs():
    a, b = np.array([1, 1, 1, 1, 1, 0, 0, 1.0]), np.array([0, 0, 0, 0, 0, 1, 0, 1.0])
    assert mcnemar(a, b) == (5, 1, pytest.approx(stats.binomtest(5, 6).pvalue))
    assert mcnemar(a, a) == (0, 0, 1.0)


def test_p_values_are_adjusted_for_their_number():
    p = [0.01, math.nan, 0.04, 0.03]
    found = adjusted(p)
    assert [found[i] for i in (0, 2, 3)] == pytest.approx(list(stats.false_discovery_control([0.01, 0.04, 0.03])))
    assert math.isnan(found[1])
    assert adjusted([]) == []


def test_pareto_returns_the_front():
    points = [(1, 0.8), (2, 0.9), (3, 0.85), (1, 0.7), (4, math.nan), (2, 0.9)]
    assert pareto(points) == [0, 1, 5]


def test_gains_on_facts_of_their_own_have_the_interval_of_a_t_test_over_seeds():
    gains = [0.31, 0.28, 0.40, 0.22]
    found, expected = over_seeds(gains, 100), stats.ttest_1samp(gains, 0)
    interval = expected.confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(gains), interval.low, interval.high))
    assert (found.p, found.seeds, found.examples) == (pytest.approx(expected.pvalue), 4, 100)
    assert math.isnan(over_seeds(gains[:2], 100).low)
    assert math.isnan(over_seeds(gains[:1], 100).p)


@pytest.mark.parametrize(
    ("bits", "rank"),
    [
        (100, 1),
        (150, 1.5),
        (300, 3),
        (400, 4),
        (99, -math.inf),
        (401, math.inf),
    ],
)
def test_equivalent_rank_lies_on_the_lines_between_the_measured_ranks(bits, rank):
    assert equivalent_rank([(4, 400.0), (1, 100.0), (2, 200.0)], bits) == pytest.approx(rank)


def test_equivalent_rank_is_where_a_curve_that_falls_again_first_reaches_the_bits():
    assert equivalent_rank([(1, 100.0), (2, 300.0), (3, 200.0), (4, 400.0)], 250) == pytest.approx(1.75)
    assert equivalent_rank([(1, 100.0), (2, 100.0)], 100) == 1
