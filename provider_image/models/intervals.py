"""How sure a share is that was counted on some items, such as that of right answers. Used by all that judges models."""

from __future__ import annotations

import math

#: The normal distribution's 97.5th percentile: both ends of a 95 % interval.
_Z = 1.959963984540054


def wilson_interval(correct: int, count: int) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % interval of a share by Wilson (1927), which also holds near 0 and 1. (None, None) without items.

    https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval#Wilson_score_interval
    """
    if not count:
        return None, None
    share = correct / count
    denominator = 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / denominator
    half = _Z / denominator * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
