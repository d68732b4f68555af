from __future__ import annotations

import math

import numpy as np
import pytest

from kvllm.measure.eval.stats import bootstrap_ratio, wilson


def test_the_estimate_is_a_ratio_of_sums():
    estimate = bootstrap_ratio([1.0, 6.0], [1, 2])
    assert estimate.value == pytest.approx(7 / 3)
    assert estimate.low == 1 and estimate.high == 3  # every resample is one of: both the first, both the second, mixed


def test_the_interval_contains_the_truth_as_often_as_it_claims():
    rng = np.random.default_rng(1)
    inside = 0
    for i in range(200):
        counts = rng.integers(50, 150, size=40)
        sums = counts * rng.normal(1.0, 0.5, size=40)
        estimate = bootstrap_ratio(sums, counts, seed=i)
        inside += estimate.low <= 1.0 <= estimate.high
    assert 0.88 <= inside / 200 <= 0.99


def test_a_ratio_to_zero_is_not_a_number():
    assert math.isnan(bootstrap_ratio([0.0], [0.0]).value)
    with pytest.raises(ValueError, match="one numerator and one denominator per unit"):
        bootstrap_ratio([1.0], [1.0, 2.0])


def test_wilson_against_published_values():
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    assert wilson(81, 263).low == pytest.approx(0.2553, abs=1e-4)
    assert wilson(81, 263).high == pytest.approx(0.3662, abs=1e-4)
    assert wilson(0, 20).low == 0 and wilson(0, 20).high == pytest.approx(0.1611, abs=1e-4)
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        wilson(3, 2)
