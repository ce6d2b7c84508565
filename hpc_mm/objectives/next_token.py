"""Cross-entropy of the next token, summed, so that the caller can divide by the targets of the whole step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

IGNORED = -100  # the label of a token that is no target


class TextBatch(Protocol):
    """What the objective reads of a batch: (B, T) ids, mask, labels and perhaps segments, (N, 3, S, S) images, (B,)
    image counts."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def attention_mask(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def images(self) -> Tensor: ...
    @property
    def image_counts(self) -> Tensor: ...
    @property
    def segments(self) -> Tensor | None: ...


def next_token(model: Callable[..., Tensor], batch: TextBatch) -> Tensor:
    """Sum of -log p(token | what is left of it) over the batch's targets, in fp32; 0 where there is no target.

    The model makes logits only at positions whose next token is a target, and sums up their cross-entropy itself.
    """
    targets = batch.labels[:, 1:]
    positions = functional.pad(targets != IGNORED, (0, 1))  # (B, T); the last token predicts nothing
    return model(
        batch.input_ids,
        batch.attention_mask,
        batch.images,
        batch.image_counts,
        positions=positions,
        segments=batch.segments,
        targets=targets[positions[:, :-1]],
    )
