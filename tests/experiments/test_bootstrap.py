"""The interval of a ratio, where it is known."""

import numpy as np
import pytest

from experiments.common.bootstrap import ratio_interval


def test_equal_members_leave_no_doubt():
    low, high = ratio_interval(np.full(7, 3), np.full(7, 12), seed=0)
    assert (low, high) == (0.25, 0.25)


def test_a_share_has_the_interval_of_the_binomial():
    """Of 400 members a quarter counts: 25 % ± 1.96 · √(0.25 · 0.75 / 400)."""
    counts = np.repeat([1, 0], [100, 300])
    low, high = ratio_interval(counts, np.ones(400, int), seed=0)
    np.testing.assert_allclose([low, high], [0.25 - 0.0424, 0.25 + 0.0424], atol=0.004)
    narrow = ratio_interval(counts, np.ones(400, int), seed=0, confidence=0.5)
    assert low < narrow[0] < 0.25 < narrow[1] < high


def test_members_count_by_their_denominators():
    """It is the ratio of sums: (1 + 0) / (1 + 9), and either member alone twice."""
    assert ratio_interval(np.array([1, 0]), np.array([1, 9]), seed=0) == (0.0, 1.0)


def test_paired_differences_are_surer_than_their_rates():
    rng = np.random.default_rng(0)
    words = rng.integers(1, 20, 100)
    exact = rng.binomial(words, 0.2)
    swapped = exact + (rng.random(100) < 0.05)
    low, high = ratio_interval(swapped, words, seed=1)
    paired = ratio_interval(swapped - exact, words, seed=1)
    assert paired[1] - paired[0] < (high - low) / 3
    assert paired[0] <= (swapped - exact).sum() / words.sum() <= paired[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_seed_decides(seed):
    counts, ones = np.arange(50), np.full(50, 49)
    assert ratio_interval(counts, ones, seed) == ratio_interval(counts, ones, seed)
    assert ratio_interval(counts, ones, seed) != ratio_interval(counts, ones, seed + 1)
