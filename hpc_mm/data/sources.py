"""Where published files lie: a file or folder, a snapshot of the hub on disk, an S3 store, or a file on the web."""

from __future__ import annotations

import http.client
import shutil
import tempfile
import time
import urllib.request
from functools import lru_cache
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from hpc_mm.config import ConfigError
from hpc_mm.data.store import Store, open_store

WEB = ("http://", "https://")
MOST = 2**34  # bytes of a file from the web
SILENCE = 60  # seconds between two pieces of an answer
SLOWEST = 2**14  # bytes per second on average after the first SILENCE seconds
PIECE = 2**20  # bytes


def open_source(address: str, endings: tuple[str, ...]) -> tuple[Store, str]:
    """The store at an address, and the key that it names in it: empty for all of a folder.

    What ends in one of the ``endings`` is one file. A file on the web is downloaded first, into a temporary folder that
    is removed when the process ends. ConfigError where there is no such file.
    """
    if address.startswith(WEB):
        folder, name = downloaded(address)
        if not name.endswith(endings):
            raise ConfigError(f"source={address} is not one of {', '.join(endings)}")
        return open_store(folder), name
    if not address.endswith(endings):
        return open_store(snapshot(address)), ""
    parent, _, name = address.rpartition("/")
    store = open_store(parent or ("/" if address.startswith("/") else "."))
    if store.size(name) is None:
        raise ConfigError(f"source={address} does not exist")
    return store, name


def snapshot(address: str) -> str:
    """A dataset in the hub's cache (``datasets--OWNER--NAME``) is the newest snapshot in it; all else is itself."""
    folder = Path(address).expanduser()
    newest = folder / "refs" / "main"
    if "://" in address or not newest.is_file():
        return address
    found = folder / "snapshots" / newest.read_text().strip()
    if not found.is_dir():
        raise ConfigError(f"source={address}: the snapshot {found} is missing")
    return str(found)


@lru_cache
def downloaded(address: str) -> tuple[str, str]:
    """The folder and the name of a copy on this machine's disk (TMPDIR)."""
    name = Path(unquote(urlsplit(address).path)).name
    if not name:
        raise ConfigError(f"source={address} names no file")
    folder = temporary_folder()
    try:
        with urllib.request.urlopen(address, timeout=SILENCE) as answer, Path(folder, name).open("wb") as file:
            copied(answer, file, answer.headers.get("Content-Length"))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConfigError(f"source={address}: {error}") from None
    return folder, name


def copied(answer: http.client.HTTPResponse, file: IO[bytes], promised: str | None) -> None:
    """OSError where the answer is too long, too slow, or not as long as it ``promised``."""
    start, size = time.monotonic(), 0
    while piece := answer.read1(PIECE):
        file.write(piece)
        size += len(piece)
        if size > MOST:
            raise OSError(f"it has more than {MOST} bytes")
        seconds = time.monotonic() - start
        if seconds > SILENCE and size < SLOWEST * seconds:
            raise OSError(f"{size} bytes in {seconds:.0f} s are too few to wait for it")
    if promised is not None and size != int(promised):
        raise OSError(f"it ended after {size} of {promised} bytes")


@lru_cache
def temporary_folder() -> str:
    """One for each process, removed when it ends."""
    import atexit

    folder = tempfile.mkdtemp(prefix="hpc_mm-source-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
