"""Scores of model output: pure functions on lists. Captions', answers' and classes', with their intervals.

``*_each`` gives a score per item; the function without it the benchmark's score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
    "Difference",
    "Interval",
    "Rules",
    "Scored",
    "accuracy",
    "accuracy_each",
    "bleu",
    "bleu_each",
    "caption_scores",
    "cider",
    "cider_each",
    "mean_interval",
    "paired_bootstrap",
    "roc_auc",
    "rouge_l",
    "rouge_l_each",
    "rules_of",
    "vqa_accuracy",
    "vqa_accuracy_each",
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
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if len(values) != len(truth) or not np.isfinite(values).all():
        raise ValueError(f"{len(values)} scores for {len(truth)} items; each needs one, a finite number")
    if not positives or not negatives:
        raise ValueError(f"{positives} positive and {negatives} negative items; a ROC curve needs both")
    _, place, ties = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]  # of equal scores, the mean of their ranks
    return float(ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives)
