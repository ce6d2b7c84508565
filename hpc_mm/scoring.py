"""What predictions score: a benchmark's metric under a set of rules, per question, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_mm import ok_vqa
from hpc_mm.benchmark import Benchmark, Question
from hpc_mm.config import unknown
from hpc_mm.intervals import Interval, mean_interval
from hpc_mm.metrics import accuracy_each, caption_scores, roc_auc_each, vqa_accuracy_each
from hpc_mm.rules import Rules, rules_of

PERCENT = 100  # papers print scores times 100, CIDEr too
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Scores:
    """Of each question, in parts of 1 (CIDEr: up to 10). Their mean is the score."""

    each: NDArray[np.float64]
    others: dict[str, float] = field(default_factory=dict)  # further metrics of all questions together

    def interval(self, total: int | None = None) -> Interval:
        """Times 100; ``total`` as ``mean_interval`` has it."""
        return Interval(*(PERCENT * value for value in mean_interval(self.each, total)))


Metric = Callable[[Sequence[Question], Sequence[Row], Rules, Sequence[Question]], Scores]


def scores(
    benchmark: Benchmark,
    rules: str,
    questions: Sequence[Question],
    rows: Sequence[Row],
    of: Sequence[Question] = (),
) -> Scores:
    """What rows of predictions score for their questions. ``of``: the whole benchmark, where these are a part of it.

    ValueError where nothing can be scored: no rows, or, for an area under a curve, rows of one class.
    """
    return metric_of(benchmark.metric)(questions, rows, rules_of(rules, benchmark.name), of)


def metric_of(name: str) -> Metric:
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def _cider(questions: Sequence[Question], rows: Sequence[Row], rules: Rules, of: Sequence[Question]) -> Scores:
    """CIDEr-D, whose word weights are those of the whole benchmark, with BLEU and ROUGE-L beside it."""
    found = caption_scores(
        [row["text"] for row in rows],
        [question.references for question in questions],
        rules,
        [question.references for question in of] or None,
    )
    others = {name: scored.score for name, scored in found.items() if name != "cider"}
    return Scores(found["cider"].each, others)


def _vqa(questions: Sequence[Question], rows: Sequence[Row], rules: Rules, of: Sequence[Question]) -> Scores:
    return Scores(vqa_accuracy_each(*answered(questions, rows), rules))


def _ok_vqa(questions: Sequence[Question], rows: Sequence[Row], rules: Rules, of: Sequence[Question]) -> Scores:
    """Under the rules of OpenFlamingo predictions are stemmed, as OK-VQA's own answers are."""
    stem = ok_vqa.stem if rules.stems else None
    return Scores(vqa_accuracy_each(*answered(questions, rows), rules, stem))


def answered(questions: Sequence[Question], rows: Sequence[Row]) -> tuple[list[str], list[tuple[str, ...]]]:
    return [row["text"] for row in rows], [question.references for question in questions]


def _accuracy(questions: Sequence[Question], rows: Sequence[Row], rules: Rules, of: Sequence[Question]) -> Scores:
    return Scores(accuracy_each([row["text"] for row in rows], [question.references[0] for question in questions]))


def _roc_auc(questions: Sequence[Question], rows: Sequence[Row], rules: Rules, of: Sequence[Question]) -> Scores:
    """Of the probability that the model gives to "yes" and not to "no"."""
    chances = [row["scores"]["yes"] - row["scores"]["no"] for row in rows]  # grows with it
    return Scores(roc_auc_each(chances, [question.references[0] == "yes" for question in questions]))


METRICS: Mapping[str, Metric] = {
    "cider": _cider,
    "vqa-accuracy": _vqa,
    "okvqa-accuracy": _ok_vqa,
    "accuracy": _accuracy,
    "roc-auc": _roc_auc,
}
