"""VQA accuracy: how many annotators gave the model's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hpc_mm.rules import OPENFLAMINGO, Change, Rules

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
T = TypeVar("T")

ENOUGH = 3  # annotators with the model's answer make it right


def vqa_accuracy(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    rules: Rules = OPENFLAMINGO,
    stem: Change | None = None,
) -> float:
    """Mean VQA accuracy of all questions, 0 to 1; papers and our tables show it times 100."""
    return float(vqa_accuracy_each(predictions, answers, rules, stem).mean())


def vqa_accuracy_each(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    rules: Rules = OPENFLAMINGO,
    stem: Change | None = None,
) -> Floats:
    """VQA accuracy per question (Antol et al., arXiv 1505.00468): the mean over its annotators of min(1, others of them
    who gave the model's answer / 3). ``answers`` are each question's answers, one per annotator.

    ``predictions`` is what the model wrote; ``rules`` clean it and bring both sides into the form that is compared.
    ``stem`` is put between the two, on the prediction alone (ok_vqa.stem where the answers are stemmed).
    No question, or one without an answer, is a ValueError.
    """
    counts = np.array([len(given) for given in answers])
    if not len(predictions) or len(answers) != len(predictions) or not counts.all():
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} questions; each needs one, and an answer")
    predicted = list(map(_known(rules.answer, predictions).__getitem__, predictions))
    if stem:
        predicted = list(map(_known(stem, predicted).__getitem__, predicted))
    numbers: dict[str, int] = {}

    def numbered(texts: Sequence[str]) -> Integers:
        known = _known(lambda text: numbers.setdefault(rules.compared(text), len(numbers)), texts)
        return np.fromiter(map(known.__getitem__, texts), np.int64, len(texts))

    given, questions = numbered(list(chain.from_iterable(answers))), np.repeat(np.arange(len(counts)), counts)
    matches = np.bincount(questions, given == numbered(predicted)[questions], len(counts))
    # Of k annotators m agree with the model: each of those sees m - 1 others that do, each of the rest m.
    right = matches * np.minimum(ENOUGH, matches - 1) + (counts - matches) * np.minimum(ENOUGH, matches)
    return np.asarray(right / (ENOUGH * counts))


def _known(change: Callable[[str], T], texts: Iterable[str]) -> dict[str, T]:
    """Each different text's change: most answers occur many times."""
    return {text: change(text) for text in dict.fromkeys(texts)}
