"""Intervals and paired comparisons of metric values.

Values of one sample over epochs are averaged first: the sample is what varies, so it is what is resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
from scipy.stats import binomtest, bootstrap

RESAMPLES = 2000
Z95 = 1.959963984540054


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of a mean: Wilson's where all values are 0 or 1, else a percentile bootstrap."""
    if _binary(values):
        found = binomtest(round(sum(values)), len(values)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    return _bootstrap(values)


def standard_error(values: Sequence[float]) -> float:
    """Of a mean."""
    return float(np.std(values, ddof=1) / sqrt(len(values))) if len(values) > 1 else 0.0


def paired_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the mean difference of two values of each sample.

    Where all values are 0 or 1, Agresti and Min's (2005): half a sample is added to each of the four outcomes, which
    keeps the interval honest where hardly any sample differs. Else a percentile bootstrap over samples.
    """
    if _binary(ours) and _binary(theirs):
        better = sum(a > b for a, b in zip(ours, theirs, strict=True)) + 0.5
        worse = sum(a < b for a, b in zip(ours, theirs, strict=True)) + 0.5
        count = len(ours) + 2
        middle = (better - worse) / count
        reach = Z95 * sqrt((better + worse) / count - middle**2) / sqrt(count)
        return max(-1.0, middle - reach), min(1.0, middle + reach)
    return _bootstrap([a - b for a, b in zip(ours, theirs, strict=True)])


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The exact two-sided p-value that both are right equally often; ``None`` where values are not 0 or 1."""
    if not (_binary(ours) and _binary(theirs)):
        return None
    better = sum(a > b for a, b in zip(ours, theirs, strict=True))
    differing = better + sum(a < b for a, b in zip(ours, theirs, strict=True))
    return float(binomtest(better, differing).pvalue) if differing else 1.0


def _binary(values: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in values)


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    if len(set(values)) == 1:
        return values[0], values[0]
    found = bootstrap((np.asarray(values),), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
