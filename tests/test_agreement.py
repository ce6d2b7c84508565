"""Agreement with people equals its definitions, whatever ties and rounding there are."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hpc_mm.agreement import (
    choice_each,
    kendall,
    kendall_each,
    matching_each,
    pairwise_accuracy_each,
    pearson,
    pearson_each,
    tie_calibration,
)

# Few values, so that there are ties, some of which differ by rounding alone: 0.1 + 0.2 is not 0.3.
scores = st.one_of(
    st.sampled_from([0.1, 0.2, 0.3, 0.1 + 0.2, 0.7, 0.8 - 0.1, 1e-300, 0.0, -0.0, -5.0]), st.floats(-9, 9, width=16)
)
ratings = st.integers(3, 9).map(lambda total: total / 3)
items = st.lists(st.tuples(scores, ratings), min_size=2, max_size=14)
tables = st.tuples(st.integers(1, 6), st.integers(2, 5)).flatmap(
    lambda shape: st.lists(
        st.lists(st.tuples(scores, ratings), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
)


def right(row: list[tuple[float, float]], eps: float) -> int:
    """Pairs of a row that are ordered, or tied, as people order them."""
    count = 0
    for (ours, theirs), (other, wanted) in combinations(row, 2):
        tied = abs(ours - other) <= eps
        count += tied if theirs == wanted else not tied and (ours > other) == (theirs > wanted)
    return count


def by_definition(rows: list[list[tuple[float, float]]]) -> tuple[float, float]:
    """Every eps tried, one by one; the least of the best."""
    tried = {0.0} | {abs(first[0] - second[0]) for row in rows for first, second in combinations(row, 2)}
    best = max(sorted(tried), key=lambda eps: sum(right(row, eps) for row in rows))  # max keeps the first of equals
    pairs = len(rows) * math.comb(len(rows[0]), 2)
    return sum(right(row, best) for row in rows) / pairs, best


@given(items)
def test_calibration_is_the_definitions(drawn: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*drawn, strict=True)
    found = tie_calibration(ours, theirs)
    assert found == by_definition([drawn])
    assert pairwise_accuracy_each(ours, theirs, found.eps).mean() == pytest.approx(found.accuracy, rel=0, abs=1e-12)


@given(tables)
def test_rows_are_calibrated_together(drawn: list[list[tuple[float, float]]]) -> None:
    table = np.array(drawn)
    found = tie_calibration(table[..., 0], table[..., 1])
    assert found == by_definition(drawn)
    each = pairwise_accuracy_each(table[..., 0], table[..., 1], found.eps)
    pairs = math.comb(len(drawn[0]), 2)
    assert each == pytest.approx([right(row, found.eps) / pairs for row in drawn], rel=0, abs=1e-12)


def test_calibration_of_five_thousand_rows_is_its_definition() -> None:
    """Whole scores, of which few differences are distinct, so that all of them can be tried on all rows."""
    generator = np.random.default_rng(0)
    human = generator.integers(1, 4, (5000, 8))
    ours = (20 * human + 25 * generator.normal(size=human.shape)).round()
    first, second = np.triu_indices(8, 1)
    apart, wanted = ours[:, first] - ours[:, second], human[:, first] - human[:, second]
    counts = []
    for eps in range(int(np.abs(apart).max()) + 1):
        tied = np.abs(apart) <= eps
        counts.append(
            int((tied & (wanted == 0)).sum() + (~tied & (np.sign(apart) == np.sign(wanted)) & (wanted != 0)).sum())
        )
    found = tie_calibration(ours, human)
    assert found == (max(counts) / apart.size, counts.index(max(counts)))
    assert found.eps > 0
    each = pairwise_accuracy_each(ours, human, found.eps)
    assert len(each) == 5000
    assert each.mean() == pytest.approx(found.accuracy, rel=0, abs=1e-12)


def test_ties_of_people_reward_a_tie_and_not_chance() -> None:
    assert tie_calibration([0.5, 0.51, 0.9], [2, 2, 5]) == (1.0, pytest.approx(0.01))
    assert tie_calibration([0.5, 0.5, 0.9], [2, 2, 5]) == (1.0, 0.0)
    assert tie_calibration([0.9, 0.8], [1, 2]) == (0.0, 0.0)


@given(items.filter(lambda drawn: all(np.ptp(column) > 0 for column in zip(*drawn, strict=True))))
def test_correlations_are_scipys(drawn: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*drawn, strict=True)
    assert kendall(ours, theirs) == pytest.approx(stats.kendalltau(ours, theirs).statistic, rel=0, abs=1e-12)
    assert -1 - 1e-9 < pearson(ours, theirs) < 1 + 1e-9
    if np.ptp(ours) > 1e-6:
        assert pearson(ours, theirs) == pytest.approx(stats.pearsonr(ours, theirs).statistic, rel=0, abs=1e-9)


def test_correlations_of_nearly_equal_scores() -> None:
    assert pearson([1e-200, 2e-200, 3e-200], [1, 2, 3]) == pytest.approx(1)
    assert kendall([1e-200, 2e-200, 3e-200], [1, 2, 3]) == 1


@pytest.mark.parametrize("each", [kendall_each, pearson_each, pairwise_accuracy_each])
def test_shares_vary_as_their_statistic_does(each: Callable[..., Any]) -> None:
    """The standard error that shares give, of one sample, beside the spread of the statistic over many samples."""
    generator = np.random.default_rng(1)
    found, errors = [], []
    for _ in range(300):
        human = generator.integers(1, 6, 80)
        shares = each(human + generator.normal(size=80) * 2, human)
        found.append(shares.mean())
        errors.append(shares.std(ddof=1) / np.sqrt(80))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.15)


def test_matching_wants_strict_order() -> None:
    right_both = [[0.9, 0.1], [0.2, 0.8]]
    text_alone = [[0.9, 0.5], [0.95, 0.96]]
    image_alone = [[0.9, 0.95], [0.2, 0.96]]
    tied = [[0.5, 0.5], [0.5, 0.5]]
    tied_in_one = [[0.9, 0.1], [0.9, 0.95]]
    found = matching_each([right_both, text_alone, image_alone, tied, tied_in_one])
    assert found.text.tolist() == [1, 1, 0, 0, 1]
    assert found.image.tolist() == [1, 0, 1, 0, 0]
    assert found.group.tolist() == [1, 0, 0, 0, 0]


def test_choice_takes_the_first_of_equals() -> None:
    pairs, first = [[0.2, 0.1], [0.2, 0.1], [0.3, 0.3], [0.3, 0.3], [0, 1]], [True, False, True, False, False]
    assert choice_each(pairs, first).tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("function", [tie_calibration, pairwise_accuracy_each, pearson, kendall])
@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([0.1, 0.2], [1, 2, 3], r"scores of shape \(2,\) for ratings of shape \(3,\)"),
        ([0.1], [1], "needs two items or more"),
        ([], [], "needs two items or more"),
        ([0.1, math.nan, math.inf], [1, 2, math.nan], "2 scores and 1 ratings are not finite"),
    ],
)
def test_ratings_that_cannot_be_used(
    function: Callable[..., Any], ours: list[float], theirs: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(ours, theirs)


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match=r"all 2 scores are 0\.5: they correlate with nothing"):
        kendall([0.5, 0.5], [1, 2])
    with pytest.raises(ValueError, match="all 2 ratings are 3"):
        pearson([0.5, 0.6], [3, 3])
    with pytest.raises(ValueError, match="a correlation is of one list"):
        pearson([[0.5, 0.6]], [[3, 3]])
    for eps in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"eps={eps}"):
            pairwise_accuracy_each([0.5, 0.6], [3, 3], eps)
    with pytest.raises(ValueError, match=r"must be \(items, 2, 2\), finite"):
        matching_each([[0.1, 0.2]])
    with pytest.raises(ValueError, match=r"must be \(items, 2\), finite"):
        choice_each([[0.1, math.nan]], [True])
    with pytest.raises(ValueError, match="1 pairs of scores for 2 items"):
        choice_each([[0.1, 0.2]], [True, False])
