"""What predictions score: a benchmark's metric under a set of rules, per question, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpc_mm import ok_vqa
from hpc_mm.benchmark import Benchmark, Question
from hpc_mm.caption_metrics import Cider
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
        return percent(mean_interval(self.each, total))


def percent(found: Interval) -> Interval:
    return Interval(*(PERCENT * value for value in found))


Metric = Callable[[Sequence[Question], Sequence[Row], Rules], Scores]


def scores(benchmark: Benchmark, rules: str, questions: Sequence[Question], rows: Sequence[Row]) -> Scores:
    """What rows of predictions score for their questions.

    ValueError where nothing can be scored: no rows, or, for an area under a curve, rows of one class.
    """
    return metric_of(benchmark.metric)(questions, rows, rules_of(rules, benchmark.name))


def metric_of(name: str) -> Metric:
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def _cider(questions: Sequence[Question], rows: Sequence[Row], rules: Rules) -> Scores:
    """CIDEr-D, with BLEU and ROUGE-L beside it."""
    found = caption_scores(*answered(questions, rows), rules)
    others = {name: scored.score for name, scored in found.items() if name != "cider"}
    return Scores(found["cider"].each, others)


def _vqa(questions: Sequence[Question], rows: Sequence[Row], rules: Rules) -> Scores:
    return Scores(vqa_accuracy_each(*answered(questions, rows), rules))


def _ok_vqa(questions: Sequence[Question], rows: Sequence[Row], rules: Rules) -> Scores:
    """Under the rules of OpenFlamingo predictions are stemmed, as OK-VQA's own answers are."""
    stem = ok_vqa.stem if rules.stems else None
    return Scores(vqa_accuracy_each(*answered(questions, rows), rules, stem))


def answered(questions: Sequence[Question], rows: Sequence[Row]) -> tuple[list[str], list[tuple[str, ...]]]:
    return [row["text"] for row in rows], [question.references for question in questions]


def _accuracy(questions: Sequence[Question], rows: Sequence[Row], rules: Rules) -> Scores:
    return Scores(accuracy_each([row["text"] for row in rows], [question.references[0] for question in questions]))


def _roc_auc(questions: Sequence[Question], rows: Sequence[Row], rules: Rules) -> Scores:
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
ALONE = ("vqa-accuracy", "okvqa-accuracy", "accuracy")  # metrics that score each question by itself


# ---------------------------------------------------------------- while predictions come

Part = tuple[Sequence[Question], Sequence[Row]]  # questions with their predictions


class Running(Protocol):
    """Scores of predictions that come in parts, in any order. When all are there, to the bit those of ``scores``."""

    def add(self, parts: Mapping[int, Part]) -> None:
        """Take parts that have not come before, by number."""
        ...

    def scores(self) -> Scores:
        """Of what has come, in the order of parts. ValueError as ``scores`` has it."""
        ...


def running(benchmark: Benchmark, rules: str, questions: Sequence[Question]) -> Callable[[], Running]:
    """What begins a trial of a benchmark's questions, all of which are given."""
    if benchmark.metric == "cider":
        cider = Cider([question.references for question in questions], rules_of(rules, benchmark.name))
        places = {question.id: place for place, question in enumerate(questions)}
        return lambda: RunningCider(cider, places)
    if benchmark.metric in ALONE:
        return lambda: RunningMean(benchmark, rules)
    return lambda: RunningCurve(benchmark, rules)


class RunningMean:
    """A question's score does not depend on others, so that each is scored once."""

    def __init__(self, benchmark: Benchmark, rules: str) -> None:
        self.benchmark, self.rules = benchmark, rules
        self.each: dict[int, NDArray[np.float64]] = {}

    def add(self, parts: Mapping[int, Part]) -> None:
        questions, rows = joined(parts)
        ends = np.cumsum([len(rows) for _, rows in parts.values()])
        found = scores(self.benchmark, self.rules, questions, rows).each
        self.each.update(zip(parts, np.split(found, ends[:-1]), strict=True))

    def scores(self) -> Scores:
        return Scores(np.concatenate([self.each[part] for part in sorted(self.each)] or [np.empty(0)]))


class RunningCurve:
    """A question's share of the area depends on all that there is, and is quickly computed."""

    def __init__(self, benchmark: Benchmark, rules: str) -> None:
        self.benchmark, self.rules = benchmark, rules
        self.parts: dict[int, Part] = {}

    def add(self, parts: Mapping[int, Part]) -> None:
        self.parts = dict(sorted({**self.parts, **parts}.items()))

    def scores(self) -> Scores:
        return scores(self.benchmark, self.rules, *joined(self.parts))


class RunningCider:
    """A caption's score depends on no other but by its words (``Cider.words``), so that it is scored where those are
    new. Word weights are those of the whole benchmark from the start."""

    def __init__(self, cider: Cider, places: Mapping[str, int]) -> None:
        """``places``: of each question among the references, by its id."""
        self.cider, self.places = cider, places
        self.parts: dict[int, Part] = {}
        self.known: dict[int, tuple[list[str], float]] = {}  # by place: words, and their score

    def add(self, parts: Mapping[int, Part]) -> None:
        self.parts = dict(sorted({**self.parts, **parts}.items()))

    def scores(self) -> Scores:
        questions, rows = joined(self.parts)
        places = [self.places[question.id] for question in questions]
        words = dict(zip(places, self.cider.words([row["text"] for row in rows]), strict=True))
        new = [place for place in places if place not in self.known or self.known[place][0] != words[place]]
        if new:
            found = self.cider.each([words[place] for place in new], new).tolist()
            self.known.update((place, (words[place], score)) for place, score in zip(new, found, strict=True))
        return Scores(np.array([self.known[place][1] for place in places]))


def joined(parts: Mapping[int, Part]) -> tuple[list[Question], list[Row]]:
    """Questions and rows of parts, one after the other."""
    asked = [question for questions, _ in parts.values() for question in questions]
    return asked, [row for _, rows in parts.values() for row in rows]
