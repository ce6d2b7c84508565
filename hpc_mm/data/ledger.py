"""What became of every URL of a part of a plan: parquet files in the store that only grow until the part is done."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from hpc_mm.data.store import MissingKey, Store
from hpc_mm.data.tables import read_table, write_table

FOLDER = "ledger"
OK, GONE, RETRY, BLOCKED, POISON = "ok", "gone", "retry", "blocked", "poison"
STATUSES = (OK, GONE, RETRY, BLOCKED, POISON)


@dataclass(frozen=True)
class Line:
    """The newest word about a URL."""

    key: str  # sha256(url), hex
    status: str  # one of STATUSES
    reason: str  # the class of a failure: timeout, dns, http_404, ...; empty where it is ok
    attempts: int  # over all runs
    bytes: int = 0  # that came over the wire; 0 = unknown where it is ok: its process died before it wrote the line
    stored: int = 0  # bytes in the store
    sha256: str = ""  # of the stored bytes
    host: str = ""  # that answered, after redirects
    width: int = 0  # of the stored picture
    height: int = 0
    original_width: int = 0  # before it was shrunk; 0 = unknown, likewise
    original_height: int = 0
    time: float = 0.0  # unix seconds
    retry_at: float | None = None  # unix seconds before which the host does not want to be asked again


def _schema() -> Any:
    import pyarrow

    kinds = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64()}
    return pyarrow.schema([(field.name, kinds[str(field.type).partition(" ")[0]]) for field in fields(Line)])


def to_parquet(lines: Iterable[Line]) -> bytes:
    import pyarrow

    rows = list(lines)
    columns = [[getattr(row, name) for row in rows] for name in _schema().names]
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(*pair) for pair in zip(columns, _schema().types, strict=True)], schema=_schema()
    )
    return write_table(table)


def from_parquet(data: bytes) -> list[Line]:
    return [Line(**row) for row in read_table(data).to_pylist()]


class Ledger:
    """The lines of one part, which one process at a time writes.

    ``add`` and ``flush`` append a file of new lines; ``finish`` puts all lines into one file, sorted by key. A line
    with more attempts replaces one with fewer, so it does not matter where a process dies between writing and deleting.
    No two processes write a file of one name, save the last: where two launches do the same part, none loses lines that
    the other needs, since either has all lines in memory.
    """

    def __init__(self, store: Store, part: str) -> None:
        self.store, self.whole = store, f"{FOLDER}/{part}.parquet"
        self.pieces = sorted(entry.key for entry in store.list(f"{FOLDER}/{part}/"))
        self.begun = bool(self.pieces)  # by a process that did not come to its end
        self.lines: dict[str, Line] = {}
        for name in (self.whole, *self.pieces):
            try:
                found = from_parquet(store.read(name))
            except MissingKey:  # the whole one, before the first end
                continue
            for line in found:
                self._take(line)
        self._next = 1 + max((int(name.rpartition("/")[2].partition("-")[0]) for name in self.pieces), default=-1)
        self._own = uuid.uuid4().hex[:8]
        self._new: list[Line] = []
        self._part = part

    def _take(self, line: Line) -> None:
        known = self.lines.get(line.key)
        if known is None or line.attempts >= known.attempts:
            self.lines[line.key] = line

    def add(self, line: Line) -> None:
        self._take(line)
        self._new.append(line)

    def flush(self) -> None:
        """Write what is new; the first call marks the part as begun even where nothing is."""
        if not self._new and self.begun:
            return
        new = list(self._new)
        name = f"{FOLDER}/{self._part}/{self._next:06d}-{self._own}.parquet"
        self.store.write(name, to_parquet(new))
        del self._new[: len(new)]
        self.pieces.append(name)
        self._next, self.begun = self._next + 1, True

    def finish(self) -> None:
        self.store.write(self.whole, to_parquet(self.lines[key] for key in sorted(self.lines)))
        for name in self.pieces:
            self.store.delete(name)
        self.pieces, self._new, self.begun = [], [], False
