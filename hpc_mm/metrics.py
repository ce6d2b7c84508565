"""Scores of model output: pure functions on lists. Captions', answers', classes' and ratings', with their intervals.

``*_each`` gives a score per item; the function without it the benchmark's score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpc_mm.agreement import (
    Calibration,
    Matching,
    choice_each,
    kendall,
    kendall_each,
    matching_each,
    pairwise_accuracy_each,
    pearson,
    pearson_each,
    tie_calibration,
)
from hpc_mm.caption_metrics import (
    Scored,
    bleu,
    bleu_each,
    caption_scores,
    cider,
    cider_each,
    rouge_l,
    rouge_l_each,
)
from hpc_mm.intervals import Difference, Interval, mean_interval, paired_bootstrap
from hpc_mm.rules import RULES, Rules, rules_of
from hpc_mm.vqa_metrics import vqa_accuracy, vqa_accuracy_each

__all__ = [
    "RULES",
    "Calibration",
    "Difference",
    "Interval",
    "Matching",
    "Rules",
    "Scored",
    "accuracy",
    "accuracy_each",
    "bleu",
    "bleu_each",
    "caption_scores",
    "choice_each",
    "cider",
    "cider_each",
    "kendall",
    "kendall_each",
    "matching_each",
    "mean_interval",
    "paired_bootstrap",
    "pairwise_accuracy_each",
    "pearson",
    "pearson_each",
    "roc_auc",
    "roc_auc_each",
    "rouge_l",
    "rouge_l_each",
    "rules_of",
    "tie_calibration",
    "vqa_accuracy",
    "vqa_accuracy_each",
    "vqascore",
]


def accuracy(predictions: Sequence[object], truth: Sequence[object]) -> float:
    """Part of the predictions that equal the truth, 0 to 1."""
    return float(accuracy_each(predictions, truth).mean())


def accuracy_each(predictions: Sequence[object], truth: Sequence[object]) -> NDArray[np.float64]:
    """1 where a prediction equals the truth, else 0. None at all, or lists of unequal length, are a ValueError."""
    if not len(predictions) or len(predictions) != len(truth):
        raise ValueError(f"{len(predictions)} predictions for {len(truth)} items; each needs one")
    return np.array([float(ours == right) for ours, right in zip(predictions, truth, strict=True)])


def roc_auc(scores: ArrayLike, positive: Sequence[bool]) -> float:
    """Area under the ROC curve, 0 to 1: the probability that a positive item scores higher than a negative one, ties
    counted half (Mann and Whitney). ValueError without both kinds of items, or where a score is not finite."""
    return float(roc_auc_each(scores, positive).mean())


def roc_auc_each(scores: ArrayLike, positive: Sequence[bool]) -> NDArray[np.float64]:
    """A share for each item whose mean is the area under the ROC curve, and whose variance is the area's times the
    number of items (DeLong et al. 1988), so that intervals and paired tests take it as they take a mean's items."""
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if len(values) != len(truth) or not np.isfinite(values).all():
        raise ValueError(f"{len(values)} scores for {len(truth)} items; each needs one, a finite number")
    if not positives or not negatives:
        raise ValueError(f"{positives} positive and {negatives} negative items; a ROC curve needs both")
    won = np.empty(len(values))  # the part of the other kind that an item stands on the right side of, ties half
    for kind, side in ((truth, 1), (~truth, -1)):
        others = np.sort(side * values[~kind])
        own = side * values[kind]
        won[kind] = (np.searchsorted(others, own, "left") + np.searchsorted(others, own, "right")) / (2 * len(others))
    area = won[truth].mean()
    size = np.where(truth, positives, negatives)
    return np.asarray(area + (won - area) * len(values) / size)


def vqascore(log_probabilities: ArrayLike, mode: Literal["vqascore", "p_yes"] = "vqascore") -> NDArray[np.float64]:
    """Scores from 0 to 1 of (..., tokens) log-probabilities of an answer's tokens, of which the last is its end.

    As arXiv 2404.01291 computes it, exp(-mean cross-entropy), so the end counts too; ``p_yes`` is the probability of
    the answer without its end.
    """
    values = np.asarray(log_probabilities, dtype=np.float64)
    return np.asarray(np.exp(values.mean(axis=-1) if mode == "vqascore" else values[..., :-1].sum(axis=-1)))
