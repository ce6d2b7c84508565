"""ROC-AUC and accuracy equal their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.metrics import accuracy, accuracy_each, roc_auc, roc_auc_each

items = st.lists(st.tuples(st.integers(-3, 3).map(lambda number: number / 7), st.booleans()), min_size=2, max_size=40)


def by_definition(scores: list[float], positive: list[bool]) -> float:
    """Over all pairs of a positive and a negative item: 1 where the positive scores higher, a half for a tie."""
    pairs = [
        (p, n)
        for p, yes in zip(scores, positive, strict=True)
        if yes
        for n, other in zip(scores, positive, strict=True)
        if not other
    ]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


@given(items.filter(lambda drawn: len({yes for _, yes in drawn}) == 2))
def test_roc_auc_is_the_part_of_pairs_in_order(drawn: list[tuple[float, bool]]) -> None:
    scores, positive = [list(column) for column in zip(*drawn, strict=True)]
    assert roc_auc(scores, positive) == pytest.approx(by_definition(scores, positive), rel=0, abs=1e-12)


def test_shares_of_a_roc_auc_vary_as_the_area_does() -> None:
    """The standard error by DeLong, of one sample, beside the spread of areas over many samples."""
    generator = np.random.default_rng(0)
    areas, errors = [], []
    for _ in range(400):
        positive = generator.random(300) < 0.3
        each = roc_auc_each(generator.normal(size=300) + positive, list(positive))
        areas.append(each.mean())
        errors.append(each.std(ddof=1) / np.sqrt(300))
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.1)


def test_roc_auc_equals_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for digits in (1, 2, 9):
        scores, positive = generator.normal(size=2000).round(digits), generator.random(2000) < 0.3
        assert roc_auc(scores, positive) == pytest.approx(sklearn.roc_auc_score(positive, scores), rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "positive", "message"),
    [
        ([0.1, 0.2], [True, True], "2 positive and 0 negative"),
        ([], [], "0 positive and 0 negative"),
        ([0.1], [True, False], "1 scores for 2 items"),
        ([0.1, float("nan")], [True, False], "a finite number"),
    ],
)
def test_roc_auc_needs_both_kinds(scores: list[float], positive: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roc_auc(scores, positive)


def test_accuracy() -> None:
    assert accuracy_each(["cat", "dog", "cat"], ["cat", "cat", "cat"]).tolist() == [1, 0, 1]
    assert accuracy([1, 2, 3, 4], [1, 2, 0, 0]) == 0.5
    for predictions, truth in ([], []), ([1], [1, 2]):
        with pytest.raises(ValueError, match="each needs one"):
            accuracy(predictions, truth)
