"""A node-local folder that keeps what was read from a store, up to a size; several processes may share it."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hpc_mm.data.store import PARTIAL, Store

logger = logging.getLogger(__name__)

DRAWERS = 256  # folders, each with its share of the limit, so that making room looks at few files


@lru_cache
def complain(folder: Path, reason: str | None) -> None:
    """Once per process and reason, not once per sample."""
    logger.warning("the cache in %s keeps nothing: %s", folder, reason)


@dataclass(frozen=True)
class ReadCache:
    """Ranged reads through a folder. A file is written aside and moved, so that a reader never sees half of one."""

    folder: Path
    limit: int  # bytes; no drawer holds more than its share of it, so a larger value is never kept

    def _path(self, store: Store, key: str, start: int, end: int, size: int) -> Path:
        name = hashlib.sha256(f"{store.address}\0{key}\0{start}\0{end}\0{size}".encode()).hexdigest()
        return self.folder / f"{int(name[:8], 16) % DRAWERS:03d}" / name

    def read(self, store: Store, key: str, start: int, end: int, size: int) -> bytes:
        """Bytes [start, end) of the ``size`` bytes of ``key``, from the folder if they are there."""
        path = self._path(store, key, start, end, size)
        try:
            data = path.read_bytes()
        except OSError:  # not there, or a broken local disk, which costs speed and never data
            data = b""
        if len(data) == end - start:
            return data
        data = store.read(key, start, end)
        if len(data) <= self.limit // DRAWERS:
            self._keep(path, data)
        return data

    def drop(self, store: Store, key: str, start: int, end: int, size: int) -> None:
        """Forget what ``read`` with the same arguments kept."""
        with suppress(OSError):
            self._path(store, key, start, end, size).unlink()

    def _keep(self, path: Path, data: bytes) -> None:
        drawer = path.parent
        part = drawer / f".{uuid.uuid4().hex}{PARTIAL}"
        try:
            drawer.mkdir(parents=True, exist_ok=True)
            self._make_room(drawer, len(data))
            part.write_bytes(data)
            os.replace(part, path)
            return
        except OSError as error:
            complain(self.folder, error.strerror)
        with suppress(OSError):
            part.unlink()

    def _make_room(self, drawer: Path, size: int) -> None:
        """Delete the oldest files until ``size`` more bytes fit. Another process may be doing the same."""
        found = []
        for entry in os.scandir(drawer):
            try:
                facts = entry.stat()
            except FileNotFoundError:
                continue
            found.append((facts.st_mtime_ns, facts.st_size, entry.path))
        total = sum(length for _, length, _ in found) + size
        for _, length, path in sorted(found):
            if total <= self.limit // DRAWERS:
                return
            Path(path).unlink(missing_ok=True)
            total -= length
