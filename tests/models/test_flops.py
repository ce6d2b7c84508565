"""The formula counts what torch counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import WORDS
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from hpc_mm.data.batch import Batch
from hpc_mm.models.flamingo import FlamingoModel
from hpc_mm.train import COUNTS, count

EVERYTHING = ("vision", "language", "resampler", "cross_attention", "new_tokens")


@pytest.mark.parametrize("trainable", [("resampler", "cross_attention", "new_tokens"), EVERYTHING])
def test_training_flops(make: Callable[..., FlamingoModel], trainable: tuple[str, ...]) -> None:
    model = make(trainable=trainable)
    ids = torch.randint(1, WORDS, (2, 32))
    ids[:, ::16] = model.image_id
    batch = (ids, torch.ones_like(ids), torch.randn(4, 3, 16, 16), torch.tensor([2, 2]))
    with FlopCounterMode(display=False) as counter:
        loss = functional.cross_entropy(model(*batch).flatten(0, 1), ids.flatten())
        loss.backward()
    estimate = model.training_flops(tokens=64, pairs=2 * 32**2, images=4, targets=64)
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_padding_is_no_work(make: Callable[..., FlamingoModel]) -> None:
    model = make()
    ids = torch.randint(1, WORDS, (2, 32))
    mask = (torch.arange(32) < torch.tensor([[32], [8]])).long()
    batch = Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=ids.where(mask.bool(), -100),
        images=torch.zeros(1, 16, 16, 3, dtype=torch.uint8),
        image_counts=torch.tensor([1, 0]),
        spec=model.image_spec,
        ids=["a"],
        unreadable=[],
        left_out=[],
    )
    found = dict(zip(COUNTS, count(model, [{"pairs": batch}])[0].tolist(), strict=True))
    assert (found["tokens"], found["padded_tokens"], found["targets"]) == (40, 64, 38)
    assert found["flops"] == model.training_flops(tokens=32 + 8, pairs=32**2 + 8**2, images=1, targets=38)
