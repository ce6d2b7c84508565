"""Chats and image-caption pairs to rows of an encoder-decoder, and rows to its batch."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_mm.config import IMAGE_PLACE, IMAGE_TOKEN, ConfigError, ImageSpec, Source
from hpc_mm.data.batch import (
    IGNORED,
    Batch,
    LeftOut,
    Pictures,
    Row,
    Unusable,
    encode,
    similar,
    special_text,
    stacked,
    without_special,
)
from hpc_mm.data.schema import Sample, Text
from hpc_mm.data.templates import SPEAKERS, TEMPLATES, Turn

PAD = 0  # T5's padding token


@dataclass(frozen=True)
class EncoderDecoderBatch(Batch):
    """B chats: ``input_ids`` (B, T) of the encoder, IMAGE_PLACE for an image, and ``labels`` (B, L) of the decoder.

    ``attention_mask`` counts an image as 1 place; the counts below count it as ``spec.tokens``, as the model does. All
    labels but IGNORED are targets, the first too. Where no row is left, one row of one token without image and target.
    """

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Places of the encoder, those of images with them, and of the decoder."""
        return int(self._encoder_lengths().sum()) + self.targets

    @property
    def padded_tokens(self) -> int:
        return len(self.input_ids) * int(self._encoder_lengths().max()) + self.labels.numel()

    @property
    def pairs(self) -> int:
        """Pairs of places of the encoder: the squares of its rows' lengths, summed."""
        return int((self._encoder_lengths() ** 2).sum())

    def _encoder_lengths(self) -> Tensor:
        return self.attention_mask.sum(1) + self.image_counts * (self.spec.tokens - 1)


# ---------------------------------------------------------------- sample -> row


def chat_row(sample: Sample, source: Source, tokenizer: Any, spec: ImageSpec, seed: int, epoch: int) -> Row:
    """The row of a chat, or of a pair, whose answer is its caption: ``labels`` are the answer's ids with their end.

    What is longer than ``source.max_tokens``, question or answer, is cut on the right. LeftOut by a rule, such as an
    image that would be cut, Unusable where an image cannot be read. What is drawn depends on (seed, epoch, sample id).
    """
    assert source.template is not None  # as Source says of form=chat
    chance = random.Random(f"{seed}/{epoch}/{sample.id}")
    pictures = Pictures(sample, spec, source.flip, chance)
    turns = conversation(sample, special_text(tokenizer))
    check_images(sample, source)
    check_turns(turns, source)
    question, answer = TEMPLATES[source.template](turns, chance)
    ids, labels = spliced_ids(question, tokenizer), ended_ids(answer, tokenizer)
    if (ids[source.max_tokens :] == IMAGE_PLACE).any():
        raise LeftOut("image beyond max_tokens")
    cut = max(len(ids), len(labels)) > source.max_tokens
    ids, labels = ids[: source.max_tokens], labels[: source.max_tokens]
    count = len(sample.images)
    if not all(map(pictures.read, range(count))):
        raise Unusable("; ".join(pictures.lost.values()))
    images = [pictures.found[i] for i in range(count)]
    return Row(sample.id, ids, labels, images, [], extra=count * (spec.tokens - 1) + len(labels), cut=cut)


def conversation(sample: Sample, special: re.Pattern[str]) -> list[Turn]:
    """The turns of a chat from the user's first on, without text that would be taken for a special token.

    Without roles: images without a question, and the first text as their answer.
    """
    if not any(part.role for part in sample.parts):
        texts = (without_special(part.text, special).strip() for part in sample.parts if isinstance(part, Text))
        return [Turn("user", "", len(sample.images)), Turn("assistant", next(filter(None, texts), ""))]
    turns = []
    for role, grouped in groupby(sample.parts, key=lambda part: part.role):
        parts = list(grouped)
        texts_of_turn = [part.text for part in parts if isinstance(part, Text)]
        text = without_special("".join(texts_of_turn), special).strip()
        turns.append(Turn(role, text, len(parts) - len(texts_of_turn)))
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), len(turns))
    if any(turn.images for turn in turns[:first]):
        raise LeftOut("an image before the first question")
    for turn in turns[first:]:
        if turn.role not in SPEAKERS:
            raise LeftOut(f"a turn of {turn.role or 'nobody'}")
    return turns[first:]


def check_images(sample: Sample, source: Source) -> None:
    """LeftOut by a rule of images. A chat cannot do without one, for its text may be about it."""
    if len(sample.images) > source.max_images:
        raise LeftOut(f"{len(sample.images)} images (max_images)")
    if len(similar(sample, source)) < len(sample.images):
        raise LeftOut("similarity")


def check_turns(turns: Sequence[Turn], source: Source) -> None:
    """LeftOut where these turns are no chat of the source's template."""
    if not turns or turns[-1].role != "assistant" or not turns[-1].text:
        raise LeftOut("no answer at the end")
    if turns[-1].images:
        raise LeftOut("an image in the answer")
    if source.template == "t5_v1":
        if not all(turn.text or turn.images for turn in turns):
            raise LeftOut("an empty turn")
    elif len(turns) > 2:
        raise LeftOut(f"several questions ({source.template})")
    elif not turns[0].images:
        raise LeftOut(f"no image ({source.template})")


def spliced_ids(text: str, tokenizer: Any) -> NDArray[np.int64]:
    """Ids of the text between image marks, each chunk with its own end token, and IMAGE_PLACE for the marks."""
    first, *others = (ended_ids(chunk, tokenizer) for chunk in text.split(IMAGE_TOKEN))
    return np.concatenate([first, *(part for ids in others for part in ([IMAGE_PLACE], ids))])


def ended_ids(text: str, tokenizer: Any) -> NDArray[np.int64]:
    """The text's ids, with the end token. ConfigError where the tokenizer adds none."""
    ids = encode(tokenizer, text)
    if not len(ids) or ids[-1] != tokenizer.eos_token_id:
        raise ConfigError(f"the tokenizer ends no text with its eos_token={tokenizer.eos_token}, as T5's does")
    return ids


# ---------------------------------------------------------------- rows -> batch


def collate_chats(
    rows: Sequence[Row],
    spec: ImageSpec,
    unreadable: Sequence[tuple[str, str]] = (),
    left_out: Sequence[tuple[str, str]] = (),
) -> EncoderDecoderBatch:
    """The chats, one per row, padded on the right to the longest question and to the longest answer."""
    ids = padded([row.input_ids for row in rows], PAD)
    lengths = torch.tensor([len(row.input_ids) for row in rows] or [1])
    return EncoderDecoderBatch(
        input_ids=ids,
        attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        labels=padded([row.labels for row in rows], IGNORED),
        images=stacked([image for row in rows for image in row.images], spec.size),
        image_counts=torch.tensor([len(row.images) for row in rows] or [0]),
        spec=spec,
        ids=[row.id for row in rows],
        unreadable=list(unreadable),
        left_out=list(left_out),
        cut=[row.id for row in rows if row.cut],
    )


def padded(rows: Sequence[NDArray[np.int64]], value: int) -> Tensor:
    """(B, longest), at least (1, 1)."""
    table = np.full((max(1, len(rows)), max(map(len, rows), default=1)), value, dtype=np.int64)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return torch.from_numpy(table)
