"""Real tokens by the order of samples, as benchmarks/padding.py measures them, without its times."""

import runpy

import pytest
from checkout import ROOT

padding = runpy.run_path(str(ROOT / "benchmarks" / "padding.py"))


@pytest.mark.parametrize("corpus", ["texts", "questions and answers", "with images"])
def test_ours_hardly_pads(corpus: str) -> None:
    found = padding["corpora"](24_000)[corpus]
    real, longest = padding["shares"](found, "length")
    assert real >= 0.95 and longest < 1.05


@pytest.mark.parametrize("corpus", ["texts", "questions and answers", "with images"])
def test_packed_rows_hardly_pad_in_any_order(corpus: str) -> None:
    real, _ = padding["packed_shares"](padding["corpora"](4_800)[corpus])
    assert real >= 0.95


def test_the_sampler_of_llava_pads_more_than_chance_on_texts() -> None:
    """0.42 beside 0.47, as the description of it says."""
    found = padding["corpora"](24_000)["texts"]
    assert padding["shares"](found, "modality_length")[0] == pytest.approx(0.42, abs=0.015)
    assert padding["shares"](found, "random")[0] == pytest.approx(0.47, abs=0.015)


def test_all_orders_have_the_same_samples() -> None:
    """Texts only, so that each order is through with an epoch after as many steps."""
    found = padding["corpora"](4_800)["texts"]
    batches = [padding["micro_batches"](found, order) for order in padding["ORDERS"].values()]
    assert [sorted(numbers.flatten()) for numbers in batches] == [list(range(4_800))] * 3
