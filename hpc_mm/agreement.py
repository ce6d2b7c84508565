"""How well scores agree with people: rank agreement of ratings, and matching of images and texts.

Pairwise accuracy counts pairs of items whose order, or tie, is the human one. A metric's floats hardly ever tie where
people's ratings do, so a tie is a difference of at most eps, and eps the one that serves the metric best (Deutsch,
Foster and Freitag 2023, "Ties Matter", arXiv 2305.14324). eps is chosen on the ratings that are then scored.
As in ``metrics.roc_auc_each``, the mean over what ``*_each`` gives is the statistic, and its variance the statistic's
times the number of items, so that intervals and paired tests take it as they take a mean's items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class Calibration(NamedTuple):
    """Pairwise accuracy, 0 to 1, and the largest difference of scores that is a tie."""

    accuracy: float
    eps: float


class Matching(NamedTuple):
    """For each item 1 or 0: is the right text found for both images, the right image for both texts, and all of it."""

    text: Floats
    image: Floats
    group: Floats


# ---------------------------------------------------------------- ratings


def tie_calibration(scores: ArrayLike, human: ArrayLike) -> Calibration:
    """The highest pairwise accuracy over eps in {0} and all differences of two scores, and the least such eps.

    ``scores`` and ``human``: (items,), where all pairs count, or (rows, items), where the pairs of a row count and the
    result is the mean of the rows' at one eps for all. A pair is right where the ratings tie and the scores differ by
    at most eps, and where the scores differ by more and in the direction of the ratings. ValueError as ``pearson``.
    """
    ours, theirs = _checked(scores, human)
    tied, in_order = [], []  # |difference of scores| of pairs whose ratings tie, and of pairs in the ratings' order
    pairs = 0
    for _, apart, wanted in _pairs(ours, theirs):
        tied.append(np.abs(apart[wanted == 0]))
        in_order.append(np.abs(apart[apart * wanted > 0]))
        pairs += apart.size
    ties, ordered = np.sort(np.concatenate(tied)), np.sort(np.concatenate(in_order))
    # More pairs can be right only where eps reaches one more pair whose ratings tie, so no other eps has to be tried.
    tried = np.concatenate([[0.0], ties])
    right = np.searchsorted(ties, tried, "right") + len(ordered) - np.searchsorted(ordered, tried, "right")
    best = int(right.argmax())
    return Calibration(float(right[best] / pairs), float(tried[best]))


def pairwise_accuracy_each(scores: ArrayLike, human: ArrayLike, eps: float = 0.0) -> Floats:
    """Pairwise accuracy at a given eps: of (rows, items) each row's; of (items,) each item's share, of U statistics
    (Hoeffding 1948). ValueError as ``pearson``, and where eps is not a finite number of at least 0."""
    if not 0 <= eps < np.inf:
        raise ValueError(f"eps={eps}: the largest difference that is a tie is a finite number of at least 0")
    ours, theirs = _checked(scores, human)
    right = np.zeros(ours.shape)
    for lag, apart, wanted in _pairs(ours, theirs):
        is_right = np.where(wanted == 0, np.abs(apart) <= eps, (np.abs(apart) > eps) & (apart * wanted > 0))
        right[..., lag:] += is_right
        right[..., :-lag] += is_right
    right /= ours.shape[-1] - 1
    return np.asarray(right.mean(axis=1) if ours.ndim == 2 else 2 * right - right.mean())


def pearson(scores: ArrayLike, human: ArrayLike) -> float:
    """Pearson's correlation, -1 to 1. ValueError for lists of unequal length, for fewer than two items, for a value
    that is not finite, and where all scores or all ratings are equal."""
    return float(pearson_each(scores, human).mean())


def pearson_each(scores: ArrayLike, human: ArrayLike) -> Floats:
    """A share for each item of Pearson's correlation: itself and the item's influence on it."""
    ours, theirs = (_standardised(values) for values in _varied(scores, human))
    products = ours * theirs
    r = products.mean()
    return np.asarray(products + r * (1 - (ours**2 + theirs**2) / 2))


def kendall(scores: ArrayLike, human: ArrayLike) -> float:
    """Kendall's tau-b, -1 to 1: pairs in order less pairs in disorder, over the geometric mean of the pairs that do not
    tie in the scores and of those that do not tie in the ratings. ValueError as ``pearson``."""
    return float(kendall_each(scores, human).mean())


def kendall_each(scores: ArrayLike, human: ArrayLike) -> Floats:
    """A share for each item of Kendall's tau-b: itself and the item's influence on it."""
    ours, theirs = _varied(scores, human)
    order, differ, wanted_differ = np.zeros((3, len(ours)))  # sums over the other items
    for lag, apart, wanted in _pairs(ours, theirs):
        a, b = np.sign(apart), np.sign(wanted)
        for sums, values in ((order, a * b), (differ, np.abs(a)), (wanted_differ, np.abs(b))):
            sums[lag:] += values
            sums[:-lag] += values
    tau = order.mean() / np.sqrt(differ.mean() * wanted_differ.mean())
    ties = differ / differ.mean() + wanted_differ / wanted_differ.mean()
    return np.asarray(tau + 2 * order / np.sqrt(differ.mean() * wanted_differ.mean()) - tau * ties)


def _pairs(ours: Floats, theirs: Floats) -> Iterator[tuple[int, Floats, Floats]]:
    """All pairs of the last axis once: how far apart in the list, how far in score, and the sign of the ratings'."""
    for lag in range(1, ours.shape[-1]):
        yield lag, ours[..., lag:] - ours[..., :-lag], np.sign(theirs[..., lag:] - theirs[..., :-lag])


def _checked(scores: ArrayLike, human: ArrayLike) -> tuple[Floats, Floats]:
    ours, theirs = np.asarray(scores, dtype=np.float64), np.asarray(human, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim not in (1, 2):
        raise ValueError(f"scores of shape {ours.shape} for ratings of shape {theirs.shape}; each item needs both")
    if not ours.size or ours.shape[-1] < 2:
        raise ValueError(f"scores of shape {ours.shape}: agreement needs two items or more")
    if not np.isfinite(ours).all() or not np.isfinite(theirs).all():
        bad = int((~np.isfinite(ours)).sum()), int((~np.isfinite(theirs)).sum())
        raise ValueError(f"{bad[0]} scores and {bad[1]} ratings are not finite numbers")
    return ours, theirs


def _varied(scores: ArrayLike, human: ArrayLike) -> tuple[Floats, Floats]:
    ours, theirs = _checked(scores, human)
    if ours.ndim != 1:
        raise ValueError(f"scores of shape {ours.shape}: a correlation is of one list")
    for name, values in (("scores", ours), ("ratings", theirs)):
        if (values == values[0]).all():
            raise ValueError(f"all {len(values)} {name} are {values[0]:g}: they correlate with nothing")
    return ours, theirs


def _standardised(values: Floats) -> Floats:
    centred = values - values.mean()
    centred /= np.abs(centred).max()  # so that squares of small differences stay above 0
    return np.asarray(centred / np.sqrt((centred**2).mean()))


# ---------------------------------------------------------------- choices


def matching_each(scores: ArrayLike) -> Matching:
    """Winoground's text, image and group score (Thrush et al. 2022) of (items, 2 images, 2 texts), text i being of
    image i. Only a higher score counts: a tie fails. ValueError for another shape or a score that is not finite."""
    found = _finite(scores, (2, 2))
    text = (found[:, 0, 0] > found[:, 0, 1]) & (found[:, 1, 1] > found[:, 1, 0])
    image = (found[:, 0, 0] > found[:, 1, 0]) & (found[:, 1, 1] > found[:, 0, 1])
    return Matching(*(flags.astype(np.float64) for flags in (text, image, text & image)))


def choice_each(scores: ArrayLike, first: Sequence[bool]) -> Floats:
    """Pick-a-Pic's accuracy (Kirstain et al. 2023) of (items, 2 images): 1 where the image that scores higher is the
    one that people prefer, ``first`` saying whether that is the first. At equal scores the first is chosen."""
    found, truth = _finite(scores, (2,)), np.asarray(first, dtype=bool)
    if len(truth) != len(found):
        raise ValueError(f"{len(found)} pairs of scores for {len(truth)} items; each needs one")
    return np.asarray((found[:, 0] >= found[:, 1]) == truth, dtype=np.float64)


def _finite(scores: ArrayLike, shape: tuple[int, ...]) -> Floats:
    found = np.asarray(scores, dtype=np.float64)
    if found.shape[1:] != shape or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"scores of shape {found.shape}, which must be (items, {', '.join(map(str, shape))}), finite")
    return found
