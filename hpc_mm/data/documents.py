"""How the public corpora write interleaved documents, as parts: in natural order, or placed by similarity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_mm.data.schema import Image, Part, Text, image_key


class Record(dict[str, Any]):
    """A record by its fields. ``place``: where it was read, such as ``a.jsonl line 12``."""

    def __init__(self, fields: Any = (), place: str = "") -> None:
        super().__init__(fields)
        self.place = place


class BrokenRecord(Exception):
    """A record that is not of its corpus's schema; the message is the reason, the same for the same mistake."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(reason)
        self.place = place


def natural_urls(record: Record) -> list[str]:
    """URLs of a document whose ``images`` and ``texts`` fill each other's gaps, without those marked as not valid."""
    places, valid = record.get("images") or [], record.get("valid_image")
    if not isinstance(places, list):
        raise BrokenRecord("images is not a list")
    urls = [url for url in places if url is not None]
    if not all(isinstance(url, str) for url in urls):
        raise BrokenRecord("a URL is not text")
    valid = valid or [True] * len(urls)
    if not isinstance(valid, list) or len(valid) != len(urls):
        raise BrokenRecord("valid_image is not as long as the images")
    return [url for url, good in zip(urls, valid, strict=True) if good]


def natural_parts(record: Record, images: Mapping[str, bytes], max_images: int) -> tuple[Part, ...]:
    """Texts and images in the document's own order, the first ``max_images`` images of those that were found.

    ``images`` and ``texts`` are equally long lists, one of the two null at every place; ``metadata`` (a list or JSON)
    has an image's facts at its place. OBELICS, and OmniCorpus in natural arrangement.
    """
    wanted, count = set(natural_urls(record)), 0
    urls, texts, facts = record.get("images"), record.get("texts"), image_facts(record)
    if not isinstance(urls, list) or not isinstance(texts, list) or not len(urls) == len(texts) == len(facts):
        raise BrokenRecord("images, texts and metadata are not lists of one length")
    parts: list[Part] = []
    for url, text, about in zip(urls, texts, facts, strict=True):
        if (url is None) == (text is None):
            raise BrokenRecord("a place has both or neither of an image and a text")
        if text is not None:
            parts.append(Text(checked_text(text)))
        elif url in wanted and image_key(url) in images and count < max_images:
            parts.append(Image(images[image_key(url)], facts={"url": url, **about}))
            count += 1
    return tuple(parts)


def image_facts(record: Record) -> list[dict[str, Any]]:
    """``metadata`` as one dict per place."""
    values = record.get("metadata")
    try:
        values = json.loads(values) if isinstance(values, str) else values
    except (ValueError, RecursionError):
        raise BrokenRecord("metadata is not JSON") from None
    if values is None:
        return [{} for _ in record.get("images") or []]
    if not isinstance(values, list):
        raise BrokenRecord("metadata is not a list")
    # A parquet struct has every name that any image has, null where this one has not.
    found = [value if isinstance(value, dict) else {} for value in values]
    return [{name: fact for name, fact in value.items() if fact is not None} for value in found]


def checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise BrokenRecord("a text is not a string")
    return text


def assigned_parts(
    sentences: Sequence[str], urls: Sequence[str], similarity: NDArray[np.float64], images: Mapping[str, bytes]
) -> tuple[Part, ...]:
    """Each found image before the sentence that the best one-to-one assignment gives it, in the sentences' order.

    ``similarity``: (images, sentences). The assignment has the largest total similarity (Hungarian method; MMC4,
    arXiv 2304.06939, section 3); where there are more images than sentences, the worst are left over. Every image
    keeps its similarity, so that training can ask for a smallest one (``min_similarity``).
    """
    from scipy.optimize import linear_sum_assignment

    if not isinstance(sentences, list) or similarity.shape != (len(urls), len(sentences)):
        raise BrokenRecord("the similarity matrix is not images x sentences")
    found = [i for i, url in enumerate(urls) if image_key(url) in images]
    rows, columns = linear_sum_assignment(similarity[found], maximize=True)
    image_of = {int(column): found[int(row)] for row, column in zip(rows, columns, strict=True)}
    parts: list[Part] = []
    for place, sentence in enumerate(sentences):
        if place in image_of:
            i = image_of[place]
            facts = {"url": urls[i], "similarity": float(similarity[i, place])}
            parts.append(Image(images[image_key(urls[i])], facts=facts))
        parts.append(Text(checked_text(sentence)))
    return tuple(parts)


def matrix(rows: Any) -> NDArray[np.float64]:
    """A list of equally long rows of numbers as an array."""
    try:
        values = np.array(rows, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise BrokenRecord("the similarity matrix is not a matrix of numbers") from None
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise BrokenRecord("the similarity matrix is not a matrix of numbers")
    return values
