"""95 % intervals of accuracies, of their means, and of other metrics."""

import pytest

from pera_lab.intervals import bootstrap_interval, mean_interval, wilson_interval


def test_the_interval_of_a_mean_of_accuracies():
    """For one accuracy it is Wilson's interval. For two equal ones it is narrower by √2, even if both are zero."""
    assert mean_interval([(5, 20)]) == pytest.approx(wilson_interval(5, 20))
    low, high = mean_interval([(5, 20), (5, 20)])
    one_low, one_high = wilson_interval(5, 20)
    assert (0.25 - low, high - 0.25) == pytest.approx(((0.25 - one_low) / 2**0.5, (one_high - 0.25) / 2**0.5))
    assert mean_interval([(0, 4), (0, 4)]) == pytest.approx((0, wilson_interval(0, 4)[1] / 2**0.5))


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_proportion_is_wilsons(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_the_bootstrap_interval_contains_the_value_and_narrows_with_n():
    gold = [i % 2 for i in range(400)]
    predicted = [g if i % 5 else 1 - g for i, g in enumerate(gold)]

    def accuracy(a, b):
        return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)

    low, high = bootstrap_interval(accuracy, gold, predicted)
    assert (low, high) == bootstrap_interval(accuracy, gold, predicted)
    assert (low, high) == pytest.approx(wilson_interval(320, 400), abs=0.01)
    few = bootstrap_interval(accuracy, gold[:40], predicted[:40])
    assert few[1] - few[0] > 2 * (high - low)
