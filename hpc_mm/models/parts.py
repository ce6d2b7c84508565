"""What several model families are made of: random streams, the projector, and images spliced in among tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from hpc_mm.config import IMAGE_PLACE


@contextlib.contextmanager
def seeded(seed: int, stream: Literal[0, 1, 2]) -> Iterator[None]:
    """A random stream of its own; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3 * seed + stream)  # of the CPU alone; torch.manual_seed moves GPUs' too
        yield


# ---------------------------------------------------------------- images among tokens


def projector(width: int, out: int) -> nn.Sequential:
    """Two layers with an exact GELU between them (LLaVA's mlp2x_gelu): (..., width) -> (..., out)."""
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


def splice(
    embedded: Tensor,
    input_ids: Tensor,
    features: Tensor,
    image_counts: Tensor,
    attention_mask: Tensor,
    length: int = 0,
) -> tuple[Tensor, Tensor]:
    """Rows of token embeddings (B, T, D), with an image's features (P, D) in the place of every IMAGE_PLACE.

    ``features`` (N, P, D) are the rows' images in order, ``image_counts`` (B,) of them per row; where none has any,
    they may be anything, and get a gradient of zero. Gives the inputs (B, L, D), zero where there is padding, which
    stays on the right, and the token that each place belongs to, (B, L) int64, T where it is padding. L is ``length``;
    0 = that of the longest row, at least 1: reading it waits for the device.
    """
    is_image = (input_ids == IMAGE_PLACE) & attention_mask.bool()
    torch._assert_async((is_image.sum(dim=1) == image_counts).all(), "images must be as many as their places")
    rows, tokens = input_ids.shape
    patches, width = features.shape[1:]
    ends = torch.where(is_image, patches, attention_mask.long()).cumsum(dim=1)
    places = torch.arange(length or max(1, int(ends.max())), device=ends.device).repeat(rows, 1)
    owner = torch.searchsorted(ends, places, right=True)  # that a place belongs to; ``tokens`` where it is padding
    token = owner.clamp(max=tokens - 1) + tokens * torch.arange(rows, device=ends.device)[:, None]
    within = places - (ends.flatten()[token] - patches)  # of the image's features
    image = is_image.flatten().cumsum(dim=0)[token] - 1
    of_image = rows * tokens + patches * image + within
    source = torch.where(is_image.flatten()[token], of_image, token)
    nothing = rows * tokens + features.shape[0] * patches
    table = torch.cat([embedded.flatten(0, 1), features.flatten(0, 1), features.new_zeros(1, width)])
    return table[torch.where(owner < tokens, source, nothing)], owner
