"""Lines of how far a stage is that goes through files of records."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from hpc_mm.data.parts import SourcePart

REPORT = 15.0  # seconds between two lines
Item = TypeVar("Item")


class Pace:
    """Counts records while they are read and prints a line every REPORT seconds."""

    def __init__(self, parts: Sequence[SourcePart]) -> None:
        self.left = {part: part.bytes for part in parts}  # files that are to do
        self.done: dict[SourcePart, int] = {}
        self.records = 0
        self.started = self.told = time.monotonic()

    def through(self, part: SourcePart, records: Iterable[Item]) -> Iterator[Item]:
        """The records of a file in order."""
        for record in records:
            self.records += 1
            if time.monotonic() - self.told >= REPORT:
                self.told = time.monotonic()
                print(self.text(self.told - self.started), flush=True)
            yield record
        self.done[part] = part.bytes
        self.skip(part)

    def skip(self, part: SourcePart) -> None:
        """Nothing is to do of this file any more."""
        self.left.pop(part, None)

    def text(self, seconds: float) -> str:
        """After so many seconds: records, their rate, and the time left by the bytes of files, once one has ended."""
        files, done = len(self.done) + len(self.left), sum(self.done.values())
        line = f"{self.records} records, {self.records / max(seconds, 1e-9):.0f}/s, {len(self.done)} of {files} files"
        return line + (f", {seconds * sum(self.left.values()) / done:.0f} s left" if done else "")
