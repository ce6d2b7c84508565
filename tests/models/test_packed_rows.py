"""Rows of several samples: logits, loss and gradients are those of the samples one per row."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, open_gates, sharpen
from torch import Tensor

from hpc_mm.config import ConfigError
from hpc_mm.models.cross_attention import image_of_token
from hpc_mm.models.flamingo import FlamingoModel
from hpc_mm.models.packing import packed_arguments, places, sees

Make = Callable[..., FlamingoModel]
IMAGE, PAD = WORDS + 1, WORDS + 2

# Where each sample's image tokens stand. A sample without one comes after samples that have some; one begins with text.
LENGTHS = [5, 7, 4, 1, 6, 9, 3]
IMAGES: list[list[int]] = [[0], [2, 4], [], [], [3], [0, 1, 5], []]
ROWS = [[0, 1, 2, 3], [4, 5], [6]]  # samples of each packed row, of 17, 15 and 3 tokens


def samples() -> tuple[list[Tensor], list[Tensor]]:
    """Token ids and images of each sample."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, WORDS, (length,), generator=generator) for length in LENGTHS]
    for tokens, images in zip(ids, IMAGES, strict=True):
        tokens[images] = IMAGE
    return ids, [torch.randn(len(images), 3, 16, 16, generator=generator) for images in IMAGES]


def rows_of(chosen: list[list[int]]) -> dict[str, Tensor]:
    """What the model takes for rows made of samples."""
    ids, images = samples()
    tokens = [torch.cat([ids[i] for i in row]) for row in chosen]
    numbers = [torch.cat([torch.full((LENGTHS[i],), place) for place, i in enumerate(row)]) for row in chosen]
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD)
    segments = torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True, padding_value=-1)
    return {
        "input_ids": padded,
        "attention_mask": (segments >= 0).long(),
        "images": torch.cat([images[i] for row in chosen for i in row]),
        "image_counts": torch.tensor([sum(len(IMAGES[i]) for i in row) for row in chosen]),
        "segments": segments,
    }


def run(model: FlamingoModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of all tokens in sample order, the cross-entropy's sum, and the gradients."""
    real = batch["segments"] >= 0
    logits = model(**batch)[real]
    ids, segments = batch["input_ids"], batch["segments"]
    positions = torch.zeros_like(real)
    positions[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & real[:, 1:]
    model.zero_grad()
    loss = model(**batch, positions=positions, targets=ids.roll(-1, dims=1)[positions])
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits, loss.detach(), gradients


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt_neox", "mpt", "mosaic_gpt", "opt"])
def test_packed_rows_equal_their_samples_alone(make: Make, family: str) -> None:
    model = make(family, trainable=("vision", "language", "resampler", "cross_attention", "new_tokens")).eval()
    sharpen(model)
    open_gates(model)
    packed, alone = run(model, rows_of(ROWS)), run(model, rows_of([[i] for row in ROWS for i in row]))
    assert alone[0].std() > 0.3  # the logits say something
    torch.testing.assert_close(packed[0], alone[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(packed[1], alone[1], atol=0, rtol=1e-6)
    assert set(packed[2]) == set(alone[2])
    for name, gradient in alone[2].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(packed[2][name], gradient, atol=1e-5 * max(scale, 1), rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_packed_rows_in_bf16(make: Make, family: str) -> None:
    model = make(family, precision="bf16")
    sharpen(model)
    with torch.autocast("cpu", torch.bfloat16):
        packed, alone = run(model, rows_of(ROWS)), run(model, rows_of([[i] for row in ROWS for i in row]))
    assert alone[0].std() > 0.3  # the logits say something
    torch.testing.assert_close(packed[0], alone[0], atol=0.06, rtol=0.03)
    torch.testing.assert_close(packed[1], alone[1], atol=0, rtol=2e-3)
    for name, gradient in alone[2].items():
        assert (packed[2][name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_checkpointing_and_packing(make: Make) -> None:
    plain, saving = make("llama"), make("llama", gradient_checkpointing=True)
    one, two = run(plain, rows_of(ROWS)), run(saving, rows_of(ROWS))
    assert torch.equal(one[1], two[1])
    for name, gradient in one[2].items():
        torch.testing.assert_close(two[2][name], gradient, msg=name)


def test_a_sliding_window_stays(make: Make) -> None:
    model = make("mistral", architecture={"sliding_window": 4}).eval()
    packed, alone = run(model, rows_of(ROWS)), run(model, rows_of([[i] for row in ROWS for i in row]))
    torch.testing.assert_close(packed[0], alone[0], atol=1e-5, rtol=1e-5)
    wide = make("mistral", architecture={"sliding_window": 64}).eval()
    assert not torch.allclose(run(wide, rows_of(ROWS))[0], packed[0], atol=1e-3)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_images_and_places_are_each_samples_own(data: st.DataObject) -> None:
    """Against counting sample by sample."""
    rows = data.draw(st.lists(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), max_size=4), min_size=1))
    longest = max(1, *(sum(map(len, row)) for row in rows))
    flags, segments = torch.zeros(len(rows), longest, dtype=torch.bool), torch.full((len(rows), longest), -1)
    expected, expected_places = segments.clone(), segments.clone()
    image = 0
    for i, row in enumerate(rows):
        at = 0
        for number, sample in enumerate(row):
            current = -1
            for place, flag in enumerate(sample):
                if flag:
                    current, image = image, image + 1
                flags[i, at], segments[i, at] = flag, number
                expected[i, at], expected_places[i, at] = current, place
                at += 1
    real = segments >= 0
    assert torch.equal(image_of_token(flags, flags.sum(1), segments)[real], expected[real])
    assert torch.equal(places(segments)[real], expected_places[real])


def test_sees() -> None:
    found = sees(torch.tensor([[0, 0, 1, -1]]))[0].int().tolist()
    assert found == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_other_families_are_refused_in_one_line() -> None:
    falcon = SimpleNamespace(config=SimpleNamespace(model_type="falcon"))
    with pytest.raises(ConfigError, match="language models of falcon, but of gpt_neox, llama") as error:
        packed_arguments(falcon, torch.zeros(1, 1))
    assert "\n" not in str(error.value)
