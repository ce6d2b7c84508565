"""The one record that everything reads and writes: text and images in order, an id, and facts about them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Text:
    text: str
    role: str = ""


@dataclass(frozen=True)
class Image:
    """An image by its encoded bytes, by its key in a store, or by both. ``facts``: similarity, width, url, ..."""

    data: bytes | None = None
    key: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    role: str = ""


Part = Text | Image


@dataclass(frozen=True)
class Sample:
    """An ordered list of parts. Pairs, interleaved documents, chats and preference pairs are all Samples.

    In a chat every part has the ``role`` of its turn: ``system``, ``user`` or ``assistant``. Neighbours of one role are
    one turn, with its images at their places in its text. A preference pair is a chat followed by the parts of a better
    answer (``chosen``) and of a worse one (``rejected``), each a turn of the assistant's. Elsewhere roles are empty.
    """

    id: str
    parts: tuple[Part, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[Image]:
        return [part for part in self.parts if isinstance(part, Image)]


def image_key(url: str) -> str:
    """Where the image of ``url`` lies in every store: SHA-256 of the URL in hex, without extension."""
    return hashlib.sha256(url.encode()).hexdigest()
