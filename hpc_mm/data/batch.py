"""Samples to token rows and image pixels, and rows to the batch that a model takes."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN, ConfigError, ImageSpec, Source
from hpc_mm.data.images import decode
from hpc_mm.data.pictures import UnreadableImage
from hpc_mm.data.schema import Image, Sample, Text

IGNORED = -100  # the label of a token that is no target
TOKENIZING = threading.Lock()  # a call may set a fast tokenizer's truncation and padding, which fails beside another


class LeftOut(Exception):
    """A rule of the source leaves this sample out; the message says which."""


class Unusable(Exception):
    """Nothing of this sample can be trained on; the message is the reason."""


@dataclass(frozen=True)
class Row:
    """One sample ready for a batch."""

    id: str
    input_ids: NDArray[np.int64]  # (T,)
    labels: NDArray[np.int64]  # (T,) unshifted; of an encoder-decoder (L,), the decoder's
    images: list[NDArray[np.uint8]]  # (S, S, 3) each, in the order of the image tokens, one per image token
    lost_images: list[str]  # why images of this sample could not be read
    extra: int = 0  # places that it takes beside those of its input_ids: of spliced images, of a decoder
    cut: bool = False  # whether a chat was longer than max_tokens

    @property
    def length(self) -> int:
        """Places that it takes in the model."""
        return len(self.input_ids) + self.extra


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens padded on the right, and their N images. Where no row is left, one row without a target.

    A row holds one sample, or several where ``segments`` says which of them a token belongs to.
    """

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 = token, 0 = padding
    labels: Tensor  # (B, T) int64, unshifted; IGNORED = no target, as the first token of every sample
    images: Tensor  # (N, S, S, 3) uint8, row after row, within a row in the order of its image tokens; see to()
    image_counts: Tensor  # (B,) int64, sums to N
    spec: ImageSpec  # what images are normalised with
    ids: list[str]  # of the samples, row after row; empty where no row is left
    unreadable: list[tuple[str, str]]  # (sample, reason): their places are empty
    left_out: list[tuple[str, str]]  # (sample, rule): their places are empty
    lost_images: list[tuple[str, str]] = field(default_factory=list)  # (sample, reason): the sample goes on without
    segments: Tensor | None = None  # (B, T) int64, sample of the row from 0, -1 = padding; None = one sample per row
    cut: list[str] = field(default_factory=list)  # chats of which a part beyond max_tokens is missing

    @property
    def targets(self) -> int:
        """Tokens that are predicted: labels after the first position that are not IGNORED."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def places(self) -> Tensor:
        """Places that each token takes in the model, (B, T) int64."""
        return self.attention_mask

    @property
    def tokens(self) -> int:
        return int(self.attention_mask.sum())

    @property
    def padded_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def pairs(self) -> int:
        """Pairs of tokens of one sample: the squares of the samples' lengths, summed."""
        segments = self.attention_mask - 1 if self.segments is None else self.segments
        lengths = torch.zeros(len(segments), int(segments.max()) + 2, dtype=torch.int64)  # the first column is padding
        lengths.scatter_add_(1, segments + 1, self.places)
        return int((lengths[:, 1:] ** 2).sum())

    def to(self, device: torch.device | str, images: torch.dtype = torch.float32) -> Batch:
        """The batch on a device, its images normalised there: (N, 3, S, S) as ``images``."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self._tensors().items()}
        return replace(self, **{**moved, "images": normalise(moved["images"], self.spec).to(images)})

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; DataLoader calls this."""
        return replace(self, **{name: value.pin_memory() for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the tokens that rules speak of, and the pattern of text that would be taken for a special token."""

    image: int
    endofchunk: int
    pad: int
    eos: int
    eos_token: str
    special: re.Pattern[str]


@lru_cache(maxsize=8)
def vocabulary(tokenizer: Any) -> Vocabulary:
    """Look the special tokens up once. ConfigError where the tokenizer lacks one."""
    known = tokenizer.get_vocab()
    for token in (IMAGE_TOKEN, ENDOFCHUNK_TOKEN):
        if token not in known:
            raise ConfigError(f"the tokenizer has no token {token}")
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no end-of-text token (eos_token)")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else known.get(PAD_TOKEN)
    if pad is None:
        raise ConfigError(f"the tokenizer has no padding token; {PAD_TOKEN} would be one")
    eos = int(tokenizer.eos_token_id)
    return Vocabulary(
        known[IMAGE_TOKEN], known[ENDOFCHUNK_TOKEN], int(pad), eos, tokenizer.eos_token, special_text(tokenizer)
    )


@lru_cache(maxsize=8)
def special_text(tokenizer: Any) -> re.Pattern[str]:
    """What would be taken for a special token of the tokenizer, or of any of ours."""
    named = {*tokenizer.all_special_tokens, IMAGE_TOKEN, ENDOFCHUNK_TOKEN, PAD_TOKEN}
    unnamed = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}  # Llama 3 has 250
    return re.compile("|".join(map(re.escape, sorted(named | unnamed, key=len, reverse=True))))


def plain(text: str, words: Vocabulary) -> str:
    """Stripped text in which nothing is taken for a special token: a page may say ``<image>`` or ``</s>``."""
    return without_special(text, words.special).strip()


def without_special(text: str, special: re.Pattern[str]) -> str:
    text = text.encode(errors="replace").decode()  # half a surrogate pair, which JSON can hold, is no text
    while special.search(text):
        text = special.sub("", text)
    return text


def encode(tokenizer: Any, text: str) -> NDArray[np.int64]:
    with TOKENIZING:
        return np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)


def pair_labels(ids: NDArray[np.int64], words: Vocabulary) -> NDArray[np.int64]:
    """Labels of ``<image>caption<|endofchunk|>eos``: everything but image tokens, the eos too."""
    return np.where(ids == words.image, IGNORED, ids)


def interleaved_labels(ids: NDArray[np.int64], words: Vocabulary) -> NDArray[np.int64]:
    """Labels of a document: the text of each image's chunk with the ``<|endofchunk|>`` that ends it.

    No targets: image tokens, what stands before the first image, and what follows an endofchunk up to the
    next image, so the last eos too. A token's chunk is open if the newest image or earlier endofchunk is an image.
    """
    place = np.arange(len(ids))
    newest_image = np.maximum.accumulate(np.where(ids == words.image, place, -1))
    ended = np.maximum.accumulate(np.where(ids == words.endofchunk, place, -1))
    ended_before = np.concatenate([[-1], ended[:-1]]) if len(ids) else ended  # an endofchunk still is in its chunk
    open_chunk = (newest_image >= 0) & (ended_before < newest_image)
    return np.where(open_chunk & (ids != words.image), ids, IGNORED)


def document_text(parts: Sequence[str | None], words: Vocabulary) -> str:
    """Parts in order, None for an image: ``<image>`` opens a chunk, ``<|endofchunk|>`` ends it before the next."""
    text = ""
    open_chunk = False
    for part in parts:
        if part is None:
            text += (ENDOFCHUNK_TOKEN if open_chunk else "") + IMAGE_TOKEN
            open_chunk = True
        elif part:
            text += part if not text or text.endswith(IMAGE_TOKEN) else f" {part}"
    return text + ENDOFCHUNK_TOKEN + words.eos_token


# ---------------------------------------------------------------- sample -> row


def to_row(sample: Sample, source: Source, tokenizer: Any, spec: ImageSpec, seed: int, epoch: int) -> Row:
    """The row of a sample. LeftOut by a rule of the source, Unusable where its images cannot be read.

    What is drawn depends on (seed, epoch, sample id) alone.
    """
    words = vocabulary(tokenizer)
    chance = random.Random(f"{seed}/{epoch}/{sample.id}")
    pictures = Pictures(sample, spec, source.flip, chance)
    if source.form == "pairs":
        return pair_row(sample, source, tokenizer, words, pictures)
    row = document_row(sample, source, tokenizer, words, pictures)
    if len(row.images) == 1 and chance.random() < source.drop_single_image:
        raise LeftOut("one image (drop_single_image)")
    return row


class Pictures:
    """The decoded images of one sample, each decoded once and only if asked for."""

    def __init__(self, sample: Sample, spec: ImageSpec, flip: float, chance: random.Random) -> None:
        self.images, self.spec = sample.images, spec
        self.flips = [chance.random() < flip for _ in self.images]
        self.found: dict[int, NDArray[np.uint8]] = {}
        self.lost: dict[int, str] = {}

    def read(self, i: int) -> bool:
        """Whether image ``i`` of the sample can be had."""
        if i not in self.found and i not in self.lost:
            try:
                self.found[i] = self._decode(self.images[i], self.flips[i])
            except UnreadableImage as error:
                self.lost[i] = f"image {i}: {error}"
        return i in self.found

    def _decode(self, image: Image, flip: bool) -> NDArray[np.uint8]:
        if image.data is None:
            raise UnreadableImage("its bytes are not in the shard")
        pixels = decode(image.data, self.spec)
        return pixels[:, ::-1] if flip else pixels


def similar(sample: Sample, source: Source) -> list[int]:
    """Places of the sample's images that are similar enough to their text."""
    if source.min_similarity is None:
        return list(range(len(sample.images)))
    if not all("similarity" in image.facts for image in sample.images):
        raise ConfigError(
            f"min_similarity={source.min_similarity}, but images of sample {sample.id} have no similarity"
        )
    return [i for i, image in enumerate(sample.images) if image.facts["similarity"] >= source.min_similarity]


def pair_row(sample: Sample, source: Source, tokenizer: Any, words: Vocabulary, pictures: Pictures) -> Row:
    """``<image>caption<|endofchunk|>eos``; a long caption is cut so that its end tokens stay."""
    caption = next((plain(part.text, words) for part in sample.parts if isinstance(part, Text)), "")
    if not caption:
        raise LeftOut("no caption")
    kept = similar(sample, source)[:1]
    if not kept:
        raise LeftOut("similarity" if sample.images else "no image")
    ids = encode(tokenizer, f"{IMAGE_TOKEN}{caption}{ENDOFCHUNK_TOKEN}{words.eos_token}")
    end = int(np.flatnonzero(ids == words.endofchunk)[-1])
    room = source.max_tokens - (len(ids) - end)
    if room <= np.flatnonzero(ids == words.image)[0]:
        raise ConfigError(f"max_tokens={source.max_tokens} has no room for an image, a caption and its end")
    ids = np.concatenate([ids[: min(room, end)], ids[end:]])
    if not pictures.read(kept[0]):
        raise Unusable(pictures.lost[kept[0]])
    return Row(sample.id, ids, pair_labels(ids, words), [pictures.found[kept[0]]], [])


def document_row(sample: Sample, source: Source, tokenizer: Any, words: Vocabulary, pictures: Pictures) -> Row:
    """Text and the first readable images in order, cut on the right; only images whose token stays are decoded.

    An unreadable image vanishes, its text stays, and a later image takes its place.
    """
    kept = similar(sample, source)
    texts = [plain(part.text, words) if isinstance(part, Text) else None for part in sample.parts]
    while True:
        chosen = kept[: source.max_images]
        ids = encode(tokenizer, document_text(with_images(texts, chosen), words))[: source.max_tokens]
        chosen = chosen[: int((ids == words.image).sum())]
        lost = [i for i in chosen if not pictures.read(i)]
        if not lost:
            break
        kept = [i for i in kept if i not in lost]
    if len(chosen) < source.min_images:
        if pictures.lost:
            raise Unusable("; ".join(pictures.lost.values()))
        raise LeftOut(f"{len(chosen)} images (min_images)")
    labels = interleaved_labels(ids, words) if chosen else pair_labels(ids, words)  # without images: all text
    if (labels[1:] == IGNORED).all():
        raise LeftOut("no text after an image")
    return Row(sample.id, ids, labels, [pictures.found[i] for i in chosen], list(pictures.lost.values()))


def with_images(texts: Sequence[str | None], chosen: Sequence[int]) -> list[str | None]:
    """The parts of a document without the images that are not chosen."""
    kept, image = [], -1
    for text in texts:
        image += text is None
        if text is not None or image in chosen:
            kept.append(text)
    return kept


# ---------------------------------------------------------------- rows -> batch


def collate(
    rows: Sequence[Sequence[Row]],
    pad: int,
    spec: ImageSpec,
    unreadable: Sequence[tuple[str, str]] = (),
    left_out: Sequence[tuple[str, str]] = (),
) -> Batch:
    """The samples that share each row, one after another, padded on the right to the longest row."""
    samples = [sample for row in rows for sample in row]
    lengths = [sum(len(sample.input_ids) for sample in row) for row in rows] or [1]
    shape = len(lengths), max(lengths)
    ids, labels, segments = np.full(shape, pad), np.full(shape, IGNORED), np.full(shape, -1)
    for place, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row):
            end = start + len(sample.input_ids)
            ids[place, start:end] = sample.input_ids
            labels[place, start + 1 : end] = sample.labels[1:]
            segments[place, start:end] = segment
            start = end
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=(torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long(),
        labels=torch.from_numpy(labels),
        images=stacked([image for sample in samples for image in sample.images], spec.size),
        image_counts=torch.tensor([sum(len(sample.images) for sample in row) for row in rows] or [0]),
        spec=spec,
        ids=[sample.id for sample in samples],
        unreadable=list(unreadable),
        left_out=list(left_out),
        lost_images=[(sample.id, reason) for sample in samples for reason in sample.lost_images],
        segments=torch.from_numpy(segments) if len(samples) > len(rows) else None,
    )


def stacked(images: Sequence[NDArray[np.uint8]], size: int) -> Tensor:
    """N pictures (size, size, 3) as one (N, size, size, 3) uint8."""
    pixels = np.empty((len(images), size, size, 3), np.uint8)
    for place, image in enumerate(images):
        pixels[place] = image
    return torch.from_numpy(pixels)


def normalise(pixels: Tensor, spec: ImageSpec) -> Tensor:
    """(N, S, S, 3) uint8 to (N, 3, S, S) float32: (value / 255 - mean) / std per channel."""
    mean, std = channels(spec, pixels.device)
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=8)
def channels(spec: ImageSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (3, 1, 1); kept, since copying them to a device waits for all its work."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (spec.mean, spec.std))
    return mean, std


def normalised(images: Sequence[NDArray[np.uint8]], spec: ImageSpec) -> Tensor:
    """N pictures (S, S, 3) uint8 to (N, 3, S, S) float32, as ``normalise``."""
    return normalise(stacked(images, spec.size), spec)
