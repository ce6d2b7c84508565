"""Chats and image-caption pairs to rows of an encoder-decoder, and rows to its batch."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
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

    answer_segments: Tensor | None = None  # (B, L) int64, of which sample of its row a label is; as ``segments``

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Places of the encoder, those of images with them, and of the decoder."""
        return int(self.places.sum()) + self.targets

    @property
    def padded_tokens(self) -> int:
        return len(self.input_ids) * int(self.places.sum(1).max()) + self.labels.numel()

    @property
    def places(self) -> Tensor:
        """Places of the encoder."""
        return torch.where(self.input_ids == IMAGE_PLACE, self.spec.tokens, self.attention_mask)


# ---------------------------------------------------------------- sample -> row


def chat_row(sample: Sample, source: Source, tokenizer: Any, spec: ImageSpec, seed: int, epoch: int) -> Row:
    """The row of a chat, or of a pair, whose answer is its caption: ``labels`` are the answer's ids with their end.

    What is longer than ``source.max_tokens``, question or answer, is cut on the right. LeftOut by a rule, such as an
    image that would be cut, Unusable where an image cannot be read. What is drawn depends on (seed, epoch, sample id).
    """
    chance = random.Random(f"{seed}/{epoch}/{sample.id}")
    pictures = Pictures(sample, spec, source.flip, chance)
    question, answer = chat_texts(sample, source, special_text(tokenizer), chance)
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


def chat_texts(sample: Sample, source: Source, special: re.Pattern[str], chance: random.Random) -> tuple[str, str]:
    """The encoder's text, with IMAGE_TOKEN for images, and the answer; LeftOut as ``chat_row``, but for what is cut."""
    assert source.template is not None  # as Source says of form=chat
    turns = conversation(sample, special)
    check_images(sample, source)
    check_turns(turns, source)
    return TEMPLATES[source.template](turns, chance)


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
    rows: Sequence[Sequence[Row]],
    spec: ImageSpec,
    unreadable: Sequence[tuple[str, str]] = (),
    left_out: Sequence[tuple[str, str]] = (),
) -> EncoderDecoderBatch:
    """The chats that share each row, one after another, padded on the right to the longest row of questions, and of
    answers."""
    chats = [chat for row in rows for chat in row]
    questions, answers = ([[getattr(chat, part) for chat in row] for row in rows] for part in ("input_ids", "labels"))
    segments, answer_segments = padded(map(numbered, questions), -1), padded(map(numbered, answers), -1)
    several = len(chats) > len(rows)
    return EncoderDecoderBatch(
        input_ids=padded(map(np.concatenate, questions), PAD),
        attention_mask=(segments >= 0).long() if rows else torch.ones(1, 1, dtype=torch.int64),
        labels=padded(map(np.concatenate, answers), IGNORED),
        images=stacked([image for chat in chats for image in chat.images], spec.size),
        image_counts=torch.tensor([sum(len(chat.images) for chat in row) for row in rows] or [0]),
        spec=spec,
        ids=[chat.id for chat in chats],
        unreadable=list(unreadable),
        left_out=list(left_out),
        segments=segments if several else None,
        cut=[chat.id for chat in chats if chat.cut],
        answer_segments=answer_segments if several else None,
    )


def numbered(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The number of the part that each token of a row stands in, from 0."""
    return np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def padded(rows: Iterable[NDArray[np.int64]], value: int) -> Tensor:
    """(B, longest), at least (1, 1)."""
    found = list(rows)
    table = np.full((max(1, len(found)), max(map(len, found), default=1)), value, dtype=np.int64)
    for place, row in enumerate(found):
        table[place, : len(row)] = row
    return torch.from_numpy(table)
