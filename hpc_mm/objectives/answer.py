"""Cross-entropy of an encoder-decoder's answer, summed, so that the caller can divide by the targets of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


class AnswerBatch(Protocol):
    """What the objective reads of a batch: (B, T) ids, mask and perhaps segments of the encoder, (N, 3, S, S) images,
    (B,) image counts, and (B, L) labels and perhaps segments of the decoder."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def attention_mask(self) -> Tensor: ...
    @property
    def images(self) -> Tensor: ...
    @property
    def image_counts(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def segments(self) -> Tensor | None: ...
    @property
    def answer_segments(self) -> Tensor | None: ...


def answer(model: Callable[..., Tensor], batch: AnswerBatch) -> Tensor:
    """Sum of -log p(token | question, images, answer so far) over the answers' tokens, in fp32."""
    return model(
        batch.input_ids,
        batch.attention_mask,
        batch.images,
        batch.image_counts,
        batch.labels,
        segments=batch.segments,
        answer_segments=batch.answer_segments,
    )
