"""What data_prep/ scripts of chats and of preference pairs share: turns whose text has marks where images belong."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from hpc_mm.config import IMAGE_TOKEN
from hpc_mm.data.documents import BrokenRecord, Record, checked_text
from hpc_mm.data.schema import Image, Part, Sample, Text
from hpc_mm.prepare import NamedImages

SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # of LLaVA's turns
ROLES = ("system", "user", "assistant")


class Chats(NamedImages):
    """What scripts of chats take. A chat may have no image, but none that cannot be had."""

    TEXT_ALONE: ClassVar[bool] = True
    WHOLE: ClassVar[bool] = True

    def forms(self) -> list[list[str]]:
        return [["conversations"]]


def names_of(value: Any) -> list[str]:
    """The images of a field: a name, a list of names, or nothing."""
    names = value if isinstance(value, list) else [value] if value else []
    if not all(isinstance(name, str) and name for name in names):
        raise BrokenRecord("an image's name is not text")
    return names


def found_images(
    names: Sequence[str], images: Mapping[str, bytes], options: NamedImages, role: str = ""
) -> list[Image]:
    """The images of a record, all of them."""
    keys = [options.key(name) for name in names]
    if not all(key in images for key in keys):
        raise BrokenRecord("an image of it is missing")
    return [Image(images[key], facts={"file": name}, role=role) for name, key in zip(names, keys, strict=True)]


def chat_parts(turns: Sequence[tuple[str, Any]], items: Mapping[str, Sequence[Image | str]]) -> tuple[Part, ...]:
    """The parts of a chat: the text of its turns, cut at the marks, with the items in the marks' places.

    ``turns``: role and text of each; roles take turns. ``items``: by mark, what its marks stand for in order: an image,
    or a text of its own (role ``document``). Where a chat has no items for a mark, the mark is text. Putting the marks
    back gives the text of every turn again.
    """
    left = {mark: deque(found) for mark, found in items.items() if found}
    marks = re.compile("(" + "|".join(map(re.escape, left)) + ")") if left else None
    parts: list[Part] = []
    before = ""
    for role, text in turns:
        if role not in ROLES:
            raise BrokenRecord(f"a turn has a role that is not one of {', '.join(ROLES)}")
        if role == before:
            raise BrokenRecord("one role has two turns in a row")
        before = role
        pieces = marks.split(checked_text(text)) if marks else [checked_text(text)]
        parts += [placed(piece, role, left) for piece in pieces if piece or len(pieces) == 1]
    if any(left.values()):
        raise BrokenRecord("there are fewer marks than items for them")
    return tuple(parts)


def placed(piece: str, role: str, left: Mapping[str, deque[Image | str]]) -> Part:
    """A piece of text as a part, or the next item in the place of a mark."""
    if piece not in left:
        return Text(piece, role)
    if not left[piece]:
        raise BrokenRecord("there are more marks than items for them")
    item = left[piece].popleft()
    return replace(item, role=role) if isinstance(item, Image) else Text(item, "document")


# ---------------------------------------------------------------- LLaVA's records


def urls(record: Record, options: NamedImages) -> list[str]:
    return names_of(record.get("image"))


def arrange(record: Record, sample_id: str, images: Mapping[str, bytes], options: NamedImages) -> Sample:
    """``conversations`` of turns (``from``, ``value``), and the ``image`` or images that their marks stand for."""
    turns = [(SPEAKERS.get(speaker, speaker), text) for speaker, text in conversation(record)]
    found = found_images(urls(record, options), images, options)
    rest = {name: value for name, value in record.items() if name not in ("image", "conversations")}
    return Sample(sample_id, chat_parts(turns, {IMAGE_TOKEN: found}), rest)


def conversation(record: Record) -> list[tuple[str, str]]:
    """Speaker and text of each turn."""
    try:
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    except (KeyError, TypeError):
        raise BrokenRecord("conversations is not a list of turns with from and value") from None
    if not turns:
        raise BrokenRecord("conversations is empty")
    for speaker, text in turns:
        checked_text(speaker)
        checked_text(text)
    return turns


def single_turns(records: Iterable[Record | BrokenRecord]) -> Iterator[Record | BrokenRecord]:
    """A record for each question and its answer, the image before every question: CLIP-FlanT5's flattened form.

    Earlier turns are not kept as context. Records without an image get no mark. A question without an answer at the end
    is left out.
    """
    for record in records:
        if isinstance(record, BrokenRecord):
            yield record
            continue
        try:
            conversation(record)
        except BrokenRecord as reason:
            yield BrokenRecord(str(reason), record.place)
            continue
        turns = record["conversations"]
        for start in range(0, len(turns) - 1, 2):
            pair = [dict(turn) for turn in turns[start : start + 2]]
            if start and record.get("image"):
                pair[0]["value"] = f"{IMAGE_TOKEN}\n{pair[0]['value']}"
            yield Record({**record, "conversations": pair}, record.place)
        if len(turns) % 2:
            yield BrokenRecord("the last question has no answer", record.place)
