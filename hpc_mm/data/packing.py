"""Which samples share a row, and which rows a micro-batch: one rank's samples of one optimizer step at a time."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_mm.config import Source
from hpc_mm.data.batch import Row


def share(count: int, part: int, parts: int) -> range:
    """The part of ``count`` things in a row that is ``part``'s: shares differ by at most one, in order."""
    return range(count * part // parts, count * (part + 1) // parts)


def micro_batches(samples: Sequence[Row], source: Source, by_length: bool, count: int) -> list[list[list[Row]]]:
    """The samples of a step as ``count`` lists of rows: a row each or packed; in stream order, or short rows first."""
    rows = packed(samples, source.pack_tokens, source.pack_images) if source.pack_tokens else [[one] for one in samples]
    if by_length:
        rows.sort(key=tokens)
    return [[rows[place] for place in share(len(rows), part, count)] for part in range(count)]


def packed(samples: Sequence[Row], max_tokens: int, max_images: int) -> list[list[Row]]:
    """Rows of at most so many tokens and images: first fit, longest sample first, equals in stream order."""
    rows: list[list[Row]] = []
    room: list[tuple[int, int]] = []  # tokens and images that still fit into each row
    for sample in sorted(samples, key=lambda sample: -sample.length):
        size, images = sample.length, len(sample.images)
        fits = (place for place, (free, slots) in enumerate(room) if size <= free and images <= slots)
        place = next(fits, len(rows))
        if place == len(rows):
            rows.append([])
            room.append((max_tokens, max_images))
        rows[place].append(sample)
        room[place] = room[place][0] - size, room[place][1] - images
    return rows


def tokens(row: Sequence[Row]) -> int:
    return sum(sample.length for sample in row)
