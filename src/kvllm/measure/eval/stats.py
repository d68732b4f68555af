"""Confidence intervals: bootstrap over sampling units (traces, problems), Wilson for shares."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_ratio(numerators: npt.ArrayLike, denominators: npt.ArrayLike, seed: int = 0) -> Estimate:
    """The ratio of two sums over the same units, with a bootstrap interval over units.

    With row counts as denominators, this is a mean over rows, with traces as units; with another method's sums, the
    paired ratio of two methods.

    numerators, denominators: [num_units]
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if top.shape != bottom.shape or top.ndim != 1 or not len(top):
        raise ValueError(f"expected one numerator and one denominator per unit, not {top.shape} and {bottom.shape}.")
    drawn = np.random.default_rng(seed).integers(len(top), size=(NUM_RESAMPLES, len(top)))
    ratio = _divide(top[drawn].sum(axis=1), bottom[drawn].sum(axis=1))
    low, high = np.nanquantile(ratio, (0.025, 0.975)) if not np.isnan(ratio).all() else (math.nan, math.nan)
    return Estimate(float(_divide(top.sum(), bottom.sum())), float(low), float(high))


def bootstrap_mean(values: npt.ArrayLike, seed: int = 0) -> Estimate:
    """The mean over units, with a bootstrap interval; for paired differences, the mean difference."""
    array = np.asarray(values, np.float64)
    return bootstrap_ratio(array, np.ones(len(array)), seed)


def wilson(successes: int, trials: int) -> Estimate:
    """The share of successes in independent trials, with a Wilson interval."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials.")
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return Estimate(successes / trials, float(interval.low), float(interval.high))


def _divide(top: npt.NDArray[np.float64], bottom: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom == 0, np.nan, top / bottom)
