"""Where published files lie: a file or folder, a snapshot of the hub on disk, an S3 store, or a file on the web."""

from __future__ import annotations

import hashlib
import http.client
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from hpc_mm.config import ConfigError
from hpc_mm.data.store import Store, open_store

WEB = ("http://", "https://")
COPIES = "source"  # folder of what was on the web, in the store that is written
DIGITS = 12  # of a digest of an address
MOST = 2**34  # bytes of a file from the web
SILENCE = 60  # seconds between two pieces of an answer
SLOWEST = 2**14  # bytes per second on average after the first SILENCE seconds
PIECE = 2**20  # bytes


def open_source(address: str, endings: tuple[str, ...], out: str) -> tuple[Store, str]:
    """The store at an address, and the key that it names in it: empty for all of a folder.

    What ends in one of the ``endings`` is one file. A file on the web is copied into the store at ``out`` once, whole,
    and read there ever after, so all processes see the same bytes. ConfigError where there is no such file.
    """
    if address.startswith(WEB):
        return kept_copy(address, endings, out)
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


def kept_copy(address: str, endings: tuple[str, ...], out: str) -> tuple[Store, str]:
    """The store of the copy and its name. Files of one name have folders of their own, by the digest of the address."""
    name = Path(unquote(urlsplit(address).path)).name
    if not name.endswith(endings) or "\0" in name:
        raise ConfigError(f"source={address} is not one of {', '.join(endings)}")
    place = f"{COPIES}/{hashlib.sha256(address.encode()).hexdigest()[:DIGITS]}"
    store = open_store(f"{out.rstrip('/')}/{place}", make=True)
    if store.size(name) is None:
        with tempfile.TemporaryDirectory(prefix="hpc_mm-source-") as folder:
            download(address, Path(folder, "copy"))
            if store.size(name) is None:  # else another process was faster
                store.upload(name, Path(folder, "copy"))
    return store, name


def download(address: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(address, timeout=SILENCE) as answer, path.open("wb") as file:
            copied(answer, file, answer.headers.get("Content-Length"))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConfigError(f"source={address}: {error}") from None


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
