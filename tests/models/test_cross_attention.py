"""Grouped attention is the masked attention of the paper, whatever the layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpc_mm.models.cross_attention import (
    HEAD_WIDTH,
    CrossAttention,
    GatedCrossAttention,
    Images,
    PerceiverResampler,
    group_by_image,
    image_of_token,
    split_heads,
)

LATENTS, WIDTH, VISION = 3, 16, 24


def masked_attention(layer: CrossAttention, x: Tensor, latents: Tensor, image: Tensor) -> Tensor:
    """The plain form: all tokens against all latents of the batch, masked to those of the token's image."""
    images = len(latents)
    queries = split_heads(layer.to_q(layer.norm(x)))
    keys, values = layer.to_kv(latents).flatten(0, 1)[None].chunk(2, dim=-1)
    scores = queries @ split_heads(keys).transpose(-1, -2) / HEAD_WIDTH**0.5
    owner = torch.arange(images).repeat_interleave(LATENTS)
    scores = scores.masked_fill((image[:, None, :, None] != owner), float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num(0.0)  # a token that sees nothing has no finite score
    return layer.to_out((weights @ split_heads(values)).transpose(1, 2).flatten(2))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_groups_equal_the_mask(data: st.DataObject) -> None:
    rows, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    flags = data.draw(st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens))
    is_image = torch.tensor(flags).view(rows, tokens)
    counts = is_image.sum(dim=1)
    torch.manual_seed(0)
    layer = CrossAttention(WIDTH, VISION)
    x, latents = torch.randn(rows, tokens, WIDTH), torch.randn(max(int(counts.sum()), 1), LATENTS, VISION)
    image = image_of_token(is_image, counts)
    found = layer(x, group_by_image(latents, image, None))
    torch.testing.assert_close(found, masked_attention(layer, x, latents, image), atol=1e-5, rtol=1e-5)


def test_image_of_token() -> None:
    is_image = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
    found = image_of_token(is_image, torch.tensor([2, 1, 0]))  # the second row has tokens without images
    assert found.tolist() == [[-1, 0, 0, 1, 1], [2, 2, 2, 2, 2], [-1, -1, -1, -1, -1]]


def test_text_before_the_first_image_gets_the_feed_forward_alone() -> None:
    torch.manual_seed(0)
    block = GatedCrossAttention(WIDTH, VISION)
    block.attn_gate.data.fill_(1.0)
    block.ff_gate.data.fill_(0.5)
    x = torch.randn(1, 3, WIDTH)
    media = group_by_image(torch.randn(1, LATENTS, VISION), torch.tensor([[-1, -1, 0]]), None)
    expected = x + torch.tensor(0.5).tanh() * block.ff(x)
    torch.testing.assert_close(block(x, media)[:, :2], expected[:, :2])
    assert not torch.allclose(block(x, media)[:, 2], expected[:, 2])


def test_a_closed_gate_is_the_identity() -> None:
    x = torch.randn(2, 3, WIDTH)
    media = group_by_image(torch.randn(1, LATENTS, VISION), torch.tensor([[-1, 0, 0], [-1, -1, -1]]), None)
    assert torch.equal(GatedCrossAttention(WIDTH, VISION)(x, media), x)


def test_generation_steps_look_at_the_prompts_last_image() -> None:
    prompts = torch.tensor([[-1, 0, 1], [-1, -1, 2], [-1, -1, -1]])
    images = Images(torch.randn(3, LATENTS, VISION), prompts, keep=True)
    assert images._image(6, 1).flatten().tolist() == [1, 1, 2, 2, -1, -1]  # two beams, cached keys
    assert images._image(3, 5).tolist() == [[-1, 0, 1, 1, 1], [-1, -1, 2, 2, 2], [-1] * 5]  # no cache
    assert len(images.media(6, 1).latents) == 2  # image 0 is no longer looked at


def test_keys_and_values_are_made_once_per_generation() -> None:
    layer = CrossAttention(WIDTH, VISION)
    made = []
    layer.to_kv.register_forward_hook(lambda *_: made.append(1))
    images = Images(torch.randn(1, LATENTS, VISION), torch.tensor([[0, 0]]), keep=True)
    with torch.no_grad():
        for tokens in (2, 1, 1, 1):
            layer(torch.randn(1, tokens, WIDTH), images.media(1, tokens))
    assert len(made) == 2  # for the prompt, and for the images that all later steps look at


@pytest.mark.parametrize("patches", [1, 9])
def test_resampler_makes_any_number_of_patches_fixed(patches: int) -> None:
    resampler = PerceiverResampler(VISION, depth=2, latents=5)
    assert resampler(torch.randn(2, patches, VISION)).shape == (2, 5, VISION)
