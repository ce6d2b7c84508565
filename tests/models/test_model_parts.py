"""Images among tokens, against a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_mm.config import IMAGE_PLACE
from hpc_mm.models.parts import projector, seeded, splice

PLACES = st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(PLACES, st.integers(1, 5), st.integers(0, 3))
def test_splice_equals_a_loop(rows: list[list[bool]], patches: int, padding: int) -> None:
    length = max(len(row) for row in rows) + padding
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor([IMAGE_PLACE if image else 7 for image in row], dtype=torch.int64)
        mask[place, : len(row)] = 1
    counts = torch.tensor([sum(row) for row in rows])
    embedded = torch.randn(len(rows), length, 3, requires_grad=True)
    features = torch.randn(max(1, int(counts.sum())), patches, 3, requires_grad=True)
    if not length:
        return
    found, token = splice(embedded, ids, features, counts, mask)
    images = iter(features)
    expected = [
        torch.cat(
            [
                embedded.new_zeros(0, 3),
                *(next(images) if image else embedded[place, i][None] for i, image in enumerate(row)),
            ]
        )
        for place, row in enumerate(rows)
    ]
    assert found.shape[1] == max(1, *(len(row) for row in expected))
    for place, row in enumerate(expected):
        assert torch.equal(found[place, : len(row)], row)
        assert not found[place, len(row) :].any()
        owners = [i for i, image in enumerate(rows[place]) for _ in range(patches if image else 1)]
        assert token[place].tolist() == owners + [length] * (found.shape[1] - len(row))
    found.sum().backward()
    assert embedded.grad is not None and features.grad is not None
    assert int(embedded.grad.sum()) == 3 * sum(len(row) - sum(row) for row in rows)
    assert int(features.grad.sum()) == 3 * patches * int(counts.sum())


def test_images_are_as_many_as_their_places() -> None:
    ids = torch.tensor([[5, IMAGE_PLACE]])
    with pytest.raises(RuntimeError, match="as many as their places"):
        splice(torch.zeros(1, 2, 3), ids, torch.zeros(2, 4, 3), torch.tensor([2]), torch.ones_like(ids))


def test_the_projector_has_an_exact_gelu() -> None:
    with seeded(0, 2):
        made = projector(3, 5)
    x = torch.randn(7, 3)
    hidden = x @ made[0].weight.T + made[0].bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(made(x), hidden @ made[2].weight.T + made[2].bias)
    assert [name for name, _ in made.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_streams_are_of_seed_and_number_alone() -> None:
    def drawn(seed: int, stream: int) -> float:
        with seeded(seed, stream):
            return float(torch.rand(()))

    before = torch.get_rng_state()
    values = [drawn(seed, stream) for seed in range(3) for stream in range(3)]
    assert values == [drawn(seed, stream) for seed in range(3) for stream in range(3)]
    assert len(set(values)) == 9 and torch.equal(torch.get_rng_state(), before)
