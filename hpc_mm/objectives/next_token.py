"""Cross-entropy of the next token, summed, so that the caller can divide by the targets of the whole step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

IGNORED = -100  # the label of a token that is no target


class TextBatch(Protocol):
    """What the objective reads of a batch: (B, T) ids, mask and labels, (N, 3, S, S) images, (B,) image counts."""

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


def next_token(model: Callable[..., Tensor], batch: TextBatch) -> Tensor:
    """Sum of -log p(token | what is left of it) over the batch's targets, in fp32; 0 where there is no target.

    Logits are made only at positions whose next token is a target.
    """
    targets = batch.labels[:, 1:]
    positions = functional.pad(targets != IGNORED, (0, 1))  # (B, T); the last token predicts nothing
    logits = model(batch.input_ids, batch.attention_mask, batch.images, batch.image_counts, positions=positions)
    wanted = targets[positions[:, :-1]]
    if not len(wanted):
        return logits.sum() * 0.0  # keeps every parameter in the graph
    return functional.cross_entropy(logits.float(), wanted, reduction="sum")
