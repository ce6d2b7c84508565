"""Reasons to leave a sample or one of its images out of a corpus, each set by a value and counted. Never torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from hpc_mm.config import Part, Positive, Probability
from hpc_mm.data.perceptual import MAX_DISTANCE, NearHashes, perceptual_hash, read_hashes
from hpc_mm.data.pictures import UnreadableImage, opened_picture
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.store import open_store


class Filters(Part):
    """What is left out of a corpus; everything is off until it is set.

    OmniCorpus's own (arXiv 2406.08418, section 3.1): min_side=150 max_aspect=2 min_aesthetic=3.7 max_unsafe=0.8
    max_duplicates=10.
    """

    min_side: Positive | None = Field(None, description="pixels of an image's short side")
    max_side: Positive | None = Field(None, description="pixels of an image's long side")
    max_aspect: Annotated[float, Field(ge=1)] | None = Field(None, description="an image's long side / its short side")
    min_similarity: float | None = Field(None, description="of an image to its text, by the corpus's CLIP")
    min_aesthetic: float | None = Field(None, description="an image's aesthetic score in the corpus")
    max_unsafe: Probability | None = Field(
        None, description="probability in the corpus that an image is unsafe; of LAION's words UNSURE is 0.5, NSFW 1"
    )
    max_duplicates: int | None = Field(
        None, ge=0, description="copies of an image by perceptual hash (p_hash, d_hash) as the corpus counted them"
    )
    unique: bool = Field(False, description="of images with one perceptual hash in a file of records, the first stays")
    against: tuple[str, ...] = Field(
        (), description=".npy files of perceptual hashes whose images are left out, such as those of evaluation sets"
    )
    distance: int = Field(
        4, ge=0, le=MAX_DISTANCE, description="bits in which a perceptual hash is still that of the same image"
    )
    missing: Literal["keep", "drop"] = Field(
        "keep", description="what to do with an image for which the corpus does not tell a value that is asked for"
    )
    min_characters: Positive | None = Field(None, description="of all text of a sample")
    max_characters: Positive | None = Field(None, description="of all text of a sample")
    min_words: Positive | None = Field(None, description="of all text of a sample, words being what spaces divide")
    max_words: Positive | None = Field(None, description="of all text of a sample")


# Names under which corpora publish a value (OmniCorpus, LAION, COYO, DataComp), in lower case.
SIMILARITY = ("similarity", "clip_similarity_vitl14", "clip_similarity_vitb32", "clip_l14_similarity_score")
AESTHETIC = ("aesthetic_prob", "aesthetic_score", "aesthetic", "aesthetic_score_laion_v2")
UNSAFE = ("unsafe_prob", "punsafe", "nsfw", "nsfw_score_opennsfw2")
COPIES = ("p_hash_dup_count", "d_hash_dup_count")
NSFW_WORDS = {"unlikely": 0.0, "unsure": 0.5, "nsfw": 1.0}


@dataclass(frozen=True)
class Step:
    """One filter that is on: ``drops`` says None where the value is not known."""

    name: str
    limit: object
    drops: Callable[[Seen], bool | None]

    @property
    def reason(self) -> str:
        return f"{self.name}={self.limit}"


@dataclass(frozen=True)
class Seen:
    """What the filters look at: an image and what is known about it, by lower-case names."""

    image: Image
    about: Mapping[str, Any]

    def values(self, names: Iterable[str]) -> list[float]:
        """The numbers that the corpus gives under these names."""
        found = (number(self.about.get(name)) for name in names)
        return [value for value in found if value is not None]

    @cached_property
    def size(self) -> tuple[float, float] | None:
        """Short and long side: those of the original where they are told, else those of the bytes."""
        for names in (("original_width", "original_height"), ("width", "height")):
            sides = self.values(names)
            if len(sides) == 2:
                return min(sides), max(sides)
        if self.image.data is None:
            return None
        with opened_picture(self.image.data) as picture:
            return min(picture.size), max(picture.size)


def number(value: Any) -> float | None:
    """A finite number, also as text or as one of LAION's words; None for all else."""
    if isinstance(value, str):
        value = NSFW_WORDS.get(value.strip().lower(), value)
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


# ---------------------------------------------------------------- the steps


def image_steps(options: Filters) -> Iterator[Step]:
    """The filters of an image's facts that are on, in the order in which they are asked."""

    def size(measure: Callable[[float, float], bool]) -> Callable[[Seen], bool | None]:
        return lambda seen: None if seen.size is None else measure(*seen.size)

    def fact(names: Iterable[str], measure: Callable[[float], bool]) -> Callable[[Seen], bool | None]:
        return lambda seen: None if not (found := seen.values(names)) else measure(found[0])

    if (min_side := options.min_side) is not None:
        yield Step("min_side", min_side, size(lambda short, long: short < min_side))
    if (max_side := options.max_side) is not None:
        yield Step("max_side", max_side, size(lambda short, long: long > max_side))
    if (max_aspect := options.max_aspect) is not None:
        yield Step("max_aspect", max_aspect, size(lambda short, long: long > max_aspect * short))
    if (min_similarity := options.min_similarity) is not None:
        yield Step("min_similarity", min_similarity, fact(SIMILARITY, lambda value: value < min_similarity))
    if (min_aesthetic := options.min_aesthetic) is not None:
        yield Step("min_aesthetic", min_aesthetic, fact(AESTHETIC, lambda value: value < min_aesthetic))
    if (max_unsafe := options.max_unsafe) is not None:
        yield Step("max_unsafe", max_unsafe, fact(UNSAFE, lambda value: value > max_unsafe))
    if (most := options.max_duplicates) is not None:
        yield Step("max_duplicates", most, lambda seen: max(found) > most if (found := seen.values(COPIES)) else None)


def text_reason(sample: Sample, options: Filters) -> str | None:
    """The first filter of text that drops a sample."""
    texts = [part.text for part in sample.parts if isinstance(part, Text)]
    lengths = {"characters": sum(map(len, texts)), "words": sum(len(text.split()) for text in texts)}
    for unit, length in lengths.items():
        least, most = getattr(options, f"min_{unit}"), getattr(options, f"max_{unit}")
        if least is not None and length < least:
            return f"min_{unit}={least}"
        if most is not None and length > most:
            return f"max_{unit}={most}"
    return None


# ---------------------------------------------------------------- all of them


class Filtering:
    """The filters over files of records, each from its first sample to its last, which makes ``unique`` exact.

    A sample whose images are all dropped is dropped too, else its text stays. ``whole`` is for samples that mean
    nothing without one of their images (chats, preference pairs): they go with the first that is dropped. The files of
    ``against`` are read when this is made: ConfigError where one cannot be.
    """

    def __init__(self, options: Filters, whole: bool = False) -> None:
        self.options, self.whole = options, whole
        self.steps = list(image_steps(options))
        self.known = [NearHashes(hashes_at(address), options.distance) for address in options.against]
        self.start_file()

    def start_file(self) -> None:
        """Forget the samples so far."""
        self.hashes: set[int] = set()  # of the images that were kept

    def __call__(self, sample: Sample) -> tuple[Sample | None, Counter[str]]:
        """The sample without what is dropped, or None; and how often what was dropped for which reason."""
        counts: Counter[str] = Counter()
        reason = text_reason(sample, self.options)
        if reason is not None:
            return None, Counter([f"left out: {reason}"])
        about = {name.lower(): value for name, value in sample.metadata.items()} if len(sample.images) == 1 else {}
        kept, new = [], set[int]()
        for part in sample.parts:
            if isinstance(part, Image):
                reason = self.image_reason(part, about, new, counts)
                if reason is not None:
                    counts[f"images left out: {reason}"] += 1
                    continue
            kept.append(part)
        left = replace(sample, parts=tuple(kept))
        if len(left.images) < len(sample.images) and (self.whole or not left.images):
            counts["left out: image left out"] += 1
            return None, counts
        self.hashes |= new
        return left, counts

    def image_reason(self, image: Image, about: Mapping[str, Any], new: set[int], counts: Counter[str]) -> str | None:
        """Why an image is dropped. ``new``: hashes of this sample's images so far, to which its own is added."""
        seen = Seen(image, {**about, **{name.lower(): value for name, value in image.facts.items()}})
        try:
            for step in self.steps:
                drops = step.drops(seen)
                if drops:
                    return step.reason
                if drops is None and self.options.missing == "drop":
                    return f"no value for {step.name}"
                if drops is None:
                    counts[f"images without a value for {step.name}"] += 1
            return self.hash_reason(image, new)
        except UnreadableImage:
            return "unreadable"

    def hash_reason(self, image: Image, new: set[int]) -> str | None:
        if image.data is None or not (self.known or self.options.unique):
            return None
        value = perceptual_hash(image.data)
        for address, known in zip(self.options.against, self.known, strict=True):
            if known.near(value):
                return f"against={address}"
        if self.options.unique and value in self.hashes | new:
            return "unique=True"
        new.add(value)
        return None


def hashes_at(address: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    folder, _, name = address.rpartition("/")
    return read_hashes(open_store(folder or "."), name)
