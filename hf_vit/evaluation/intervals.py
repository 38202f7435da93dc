"""Intervals of shares."""

import math
from statistics import NormalDist

CONFIDENCE = 0.95


def wilson(share: float, count: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval of a share of `count` independent images.

    Example:
        >>> low, high = wilson(0.9, 100, 1.96)
        >>> round(low, 3), round(high, 3)
        (0.826, 0.945)
    """
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


def interval_of(share: float, count: int, choices: int = 1) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `count` images, widened for the choice of one of `choices`."""
    return wilson(share, count, NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / max(1, choices)))
