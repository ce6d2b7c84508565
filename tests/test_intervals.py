"""Intervals hold what they say as often as they say; the bootstrap agrees with the formulas where there are some."""

import math

import numpy as np
import pytest
from scipy import stats

from hpc_mm.intervals import mean_interval, paired_bootstrap

GENERATOR = np.random.default_rng(7)


def test_the_interval_of_a_mean_is_students() -> None:
    scores = GENERATOR.random(30)
    low, high = stats.t.interval(0.95, 29, loc=scores.mean(), scale=stats.sem(scores))
    assert mean_interval(scores) == pytest.approx((scores.mean(), low, high), rel=1e-12)


@pytest.mark.parametrize("count", [50, 200, 450])
def test_the_running_interval_holds_the_final_score_19_times_in_20(count: int) -> None:
    benchmark = GENERATOR.beta(0.5, 0.7, 500)  # scores as VQA accuracies lie: mostly near 0 and near 1
    held = 0
    for _ in range(2000):
        found = mean_interval(GENERATOR.permutation(benchmark)[:count], total=500)
        held += found.low <= benchmark.mean() <= found.high
    assert 0.93 < held / 2000 < 0.97


def test_the_running_interval_closes() -> None:
    scores = [0.0, 1.0, 0.5, 1.0]
    assert mean_interval(scores, total=4) == (0.625, 0.625, 0.625)
    widths = [found.high - found.low for found in (mean_interval(scores, total=n) for n in (5, 50, 5000))]
    assert widths == sorted(widths)
    assert widths[-1] < mean_interval(scores).high - mean_interval(scores).low


def test_one_score_says_nothing_of_others() -> None:
    assert mean_interval([0.5]) == (0.5, -math.inf, math.inf)
    assert mean_interval([0.5], total=9) == (0.5, -math.inf, math.inf)
    assert mean_interval([0.5], total=1) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("kinds", [4, 10_000])  # drawn by value, drawn by place
def test_the_bootstrap_agrees_with_the_formulas(kinds: int) -> None:
    first = GENERATOR.integers(0, kinds, 3000) / kinds
    second = first + GENERATOR.choice([-1, 0, 0, 1, 1], 3000) * GENERATOR.integers(1, kinds, 3000) / (10 * kinds)
    found, differences = paired_bootstrap(first, second, seed=1), second - first
    low, high = stats.norm.interval(0.95, loc=differences.mean(), scale=stats.sem(differences))
    assert found.mean == differences.mean()
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    swapped = paired_bootstrap(second, first, seed=1)
    assert swapped.mean == -found.mean
    assert swapped.p == pytest.approx(found.p, abs=0.02)


def test_p_is_uniform_without_a_difference() -> None:
    values = [paired_bootstrap(*GENERATOR.normal(size=(2, 60)), seed=trial, resamples=400).p for trial in range(400)]
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.10
    assert 0.4 < np.mean(values) < 0.6


def test_p_of_a_difference_and_of_none() -> None:
    scores = GENERATOR.random(200)
    assert paired_bootstrap(scores, scores).p == 1
    assert paired_bootstrap(scores, scores)[:3] == (0, 0, 0)
    assert paired_bootstrap(scores, scores + 0.1 + GENERATOR.normal(size=200) / 10).p < 0.001


def test_same_seed_same_numbers() -> None:
    first, second = GENERATOR.random((2, 500))
    assert paired_bootstrap(first, second, seed=3) == paired_bootstrap(first, second, seed=3)
    assert paired_bootstrap(first, second, seed=3) != paired_bootstrap(first, second, seed=4)


def test_scores_that_cannot_be_used() -> None:
    for scores in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="at least one and all finite"):
            mean_interval(scores)
    with pytest.raises(ValueError, match="2 scores of a benchmark of 1 items"):
        mean_interval([1, 2], total=1)
    with pytest.raises(ValueError, match="1 scores beside 2"):
        paired_bootstrap([1], [1, 2])
