"""Scores of predictions as they come are those of all of them together."""

from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import questions
from captions import written
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_mm import benchmark
from hpc_mm.benchmark import Benchmark, Question
from hpc_mm.scoring import METRICS, Part, joined, running, scores

DRAW = Random(1)
WORDS = ["a red cat", "two dogs", "yes", "no", "three cats", "seven"]
ENDS = ["plan B.", "The cat", "", "one. U", "<b>", "so it is"]  # whose words depend on the caption after them
COUNT, SIZE = 30, 4
PARTS = -(-COUNT // SIZE)


def of(metric: str) -> tuple[Benchmark, list[Question], list[dict[str, Any]]]:
    """A benchmark with this metric, its questions, and a prediction of each."""
    if metric == "cider":
        one = Benchmark(name="coco", kind="caption", prompt=benchmark.CAPTION, metric=metric)
        truth = [[DRAW.choice([written(DRAW), *ENDS[:2]]) for _ in range(1 + i % 4)] for i in range(COUNT)]
        said = [DRAW.choice([DRAW.choice(truth[i]), *ENDS]) for i in range(COUNT)]
    else:
        one = Benchmark(name="toy", kind="vqa", prompt=benchmark.VQA, metric=metric)
        truth = [
            [DRAW.choice(["yes", "no"] if metric == "roc-auc" else WORDS) for _ in range(10)] for _ in range(COUNT)
        ]
        said = [DRAW.choice(WORDS) for _ in range(COUNT)]
    asked = [questions.question(i, None, *answers) for i, answers in enumerate(truth)]
    chances = [{"yes": DRAW.choice([-1.0, -2.0, DRAW.random()]), "no": -1.5} for _ in asked]
    rows = [{"id": q.id, "text": text, "scores": s} for q, text, s in zip(asked, said, chances, strict=True)]
    return one, asked, rows


BENCHMARKS = {metric: of(metric) for metric in METRICS}


def part(metric: str, number: int) -> Part:
    _, asked, rows = BENCHMARKS[metric]
    mine = slice(number * SIZE, (number + 1) * SIZE)
    return asked[mine], rows[mine]


@pytest.mark.parametrize(
    "rules", ["lmms-eval", "vlmevalkit"]
)  # OpenFlamingo's want data of NLTK to stem OK-VQA's answers
@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None, max_examples=8)
@given(order=st.permutations(range(PARTS)), looks=st.lists(st.integers(0, PARTS), max_size=4))
def test_parts_in_any_order_score_the_same_bits(metric: str, rules: str, order: list[int], looks: list[int]) -> None:
    """Some come at each look; scores of what is there are those of a look at all of it, and at the end of all."""
    one, asked, rows = BENCHMARKS[metric]
    begin = running(one, rules, asked)
    slowly, edges = begin(), sorted({0, *looks, PARTS})
    for start, end in pairwise(edges):
        slowly.add({number: part(metric, number) for number in order[start:end]})
        there = {number: part(metric, number) for number in sorted(order[:end])}
        at_once = begin()
        at_once.add(there)
        together = joined(there)
        try:
            expected = at_once.scores() if metric == "cider" else scores(one, rules, *together)
        except ValueError:  # of a curve, one class alone
            assert metric == "roc-auc"
            continue
        np.testing.assert_array_equal(slowly.scores().each, expected.each)
        assert slowly.scores().interval(COUNT) == expected.interval(COUNT)
    np.testing.assert_array_equal(slowly.scores().each, scores(one, rules, asked, rows).each)


def test_the_words_of_a_caption_may_change_with_the_next_one() -> None:
    """What the test above has to hold for captions of which some end in an initial."""
    one, (_, *others), _ = BENCHMARKS["cider"]
    asked = [questions.question(0, None, "a plan b"), *others]
    rows = [{"id": question.id, "text": "The cat" if place else "a plan B."} for place, question in enumerate(asked)]
    begin = running(one, "openflamingo", asked)
    found = begin()
    found.add({0: (asked[:1], rows[:1])})
    alone = found.scores().each[0]
    found.add({1: (asked[1:], rows[1:])})
    assert found.scores().each[0] != alone


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_scores_nothing(metric: str) -> None:
    one, asked, _ = BENCHMARKS[metric]
    with pytest.raises(ValueError, match=r"0 "):
        running(one, "openflamingo", asked)().scores().interval(COUNT)
