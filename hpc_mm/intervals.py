"""How sure a score is: the interval of a mean, and whether two models differ."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
AT_ONCE = 1_000_000  # numbers drawn at once: 8 MB


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much higher the second score is, its 95 % interval, and the two-sided p value of no difference."""

    mean: float
    low: float
    high: float
    p: float


def mean_interval(each: ArrayLike, total: int | None = None) -> Interval:
    """The mean of items' scores with Student's 95 % interval. No item is a ValueError; of one item it is infinite.

    With ``total``, the items are the part scored so far of a benchmark of that many, in random order, and the interval
    is where the mean of all will be (finite population correction): it closes when all are scored. Without, it says
    how far another benchmark of this kind and size would be from this one. A formula and not a bootstrap: it is the
    same at each call, costs nothing while a benchmark runs, and a resample does not know of a finite population.
    """
    from scipy.special import stdtrit  # 0.4 s of the start of a rank that trains, which computes none

    scores = _finite(each)
    count = len(scores)
    if total is not None and total < count:
        raise ValueError(f"{count} scores of a benchmark of {total} items")
    left = 1.0 if total is None else (total - count) / max(total - 1, 1)
    mean = float(scores.mean())
    if count == 1:
        reach = math.inf if left else 0.0
    else:
        error = float(scores.std(ddof=1)) / math.sqrt(count) * math.sqrt(left)
        reach = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * error
    return Interval(mean, mean - reach, mean + reach)


def paired_bootstrap(first: ArrayLike, second: ArrayLike, seed: int = 0, resamples: int = 10_000) -> Difference:
    """Is the second list of scores higher than the first, item by item? Percentile interval of the mean difference over
    resamples of the items, and p: how often a resample is as far from the mean as the mean is from 0 (Efron and
    Tibshirani 1993, chapter 16). Same seed, same numbers. Lists of unequal length are a ValueError.
    """
    before, after = _finite(first), _finite(second)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores beside {len(after)}; each item needs two")
    differences = after - before
    mean = float(differences.mean())
    means = _resampled(differences, np.random.default_rng(seed), resamples)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    as_far = int((np.abs(means - mean) >= abs(mean)).sum())
    return Difference(mean, float(low), float(high), (1 + as_far) / (1 + resamples))


def _finite(each: ArrayLike) -> Floats:
    scores = np.asarray(each, dtype=np.float64)
    if not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{len(scores)} scores, which must be at least one and all finite")
    return scores


def _resampled(values: Floats, generator: np.random.Generator, resamples: int) -> Floats:
    """Means of resamples of the values, with replacement."""
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) * 10 < len(values):  # VQA accuracies: drawing how often each value occurs is the same, and faster
        drawn = generator.multinomial(len(values), counts / len(values), resamples)
        return np.asarray(drawn @ kinds / len(values))
    means: list[Floats] = []
    size = max(1, AT_ONCE // len(values))
    for start in range(0, resamples, size):
        places = generator.integers(len(values), size=(min(size, resamples - start), len(values)))
        means.append(values[places].mean(axis=1))
    return np.concatenate(means)
