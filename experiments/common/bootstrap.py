"""How sure a ratio is that was found on a sample."""

import numpy as np

RESAMPLES = 10_000


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, seed: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Bootstraps the interval of the sum of the numerators over that of the denominators.

    For two methods on the same sample, differences as numerators give the paired interval of the
    difference of their ratios.

    Args:
        numerators: one a member of the sample, such as the errors in a text.
        denominators: of the same members, such as the words of the text.
        seed: the same one draws the same members.
        confidence: how likely the interval is to hold the true ratio.
    """
    count = len(numerators)
    rows = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    ratios = numerators[rows].sum(1) / denominators[rows].sum(1)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
