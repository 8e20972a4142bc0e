"""The intervals of shares, compared with published values."""

from __future__ import annotations

import pytest

from provider_image.models.intervals import wilson_interval


@pytest.mark.parametrize(
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
    ("correct", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_agrees_with_published_values(correct: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(count - correct, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)
