"""Where bytes lie: an S3 bucket (Ceph, AWS, MinIO) or a folder, with the same verbs for both."""

from __future__ import annotations

import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

from hpc_mm.config import ConfigError

DEADLINE = 60.0  # seconds that one verb may take, with all its retries, before it counts as failed
NONE: Mapping[str, str] = MappingProxyType({})
PARTIAL = ".partial"  # ends the hidden name of a file that is being written


class MissingKey(KeyError):
    """There is nothing under this key."""

    def __str__(self) -> str:
        return str(self.args[0])


class StoreError(Exception):
    """The store did not give or take whole bytes within the deadline; the message names the key."""


class StoreDown(Exception):
    """A store does not answer at all; the message is what it was asked and for how long."""


@dataclass(frozen=True)
class Entry:
    key: str
    size: int  # bytes
    version: str = field(default="", compare=False)  # another one for other bytes: the ETag; a file's time, ns


class Store(Protocol):
    """Bytes under keys (relative paths with ``/``).

    Writing is whole or absent: nobody ever reads half of a value. ``read`` gives bytes [start, end) and raises
    MissingKey or StoreError; ``write`` takes facts that an object store keeps beside the value and a folder does not;
    every verb raises ConfigError where only the user can help (credentials, bucket, folder).
    """

    @property
    def address(self) -> str: ...
    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes: ...
    def write(self, key: str, data: bytes, metadata: Mapping[str, str] = NONE) -> None: ...
    def upload(self, key: str, path: Path) -> None: ...
    def download(self, key: str, path: Path) -> None: ...
    def list(self, prefix: str = "") -> Iterator[Entry]: ...
    def size(self, key: str) -> int | None: ...
    def delete(self, key: str) -> None: ...


def open_store(address: str, deadline: float = DEADLINE, make: bool = False) -> Store:
    """The store at ``s3://bucket/prefix`` or in a folder. Nothing is contacted before the first verb.

    A folder that does not exist is an error where something is read or listed, unless ``make`` makes it.

    Endpoint and credentials of s3 come by boto3's own chain (AWS_ENDPOINT_URL, AWS_PROFILE, ~/.aws, ...).
    ``deadline``: seconds per verb, all retries together.
    """
    scheme, found, rest = address.partition("://")
    if not found:
        if not address:
            raise ConfigError("an empty address names no store: give a folder or s3://bucket/prefix")
        folder = whole(address)
        if make:
            make_folder(Path(folder))
        return FolderStore(folder)
    if scheme != "s3":
        raise ConfigError(f"{address}: stores are folders or s3://bucket/prefix, not {scheme}://")
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise ConfigError(f"{address} names no bucket: s3://bucket/prefix")
    from hpc_mm.data.s3 import S3Store  # boto3 takes longer to import than the rest of a launch

    return S3Store(bucket, prefix.strip("/"), deadline)


def whole(address: str) -> str:
    """The address as it is in every folder that a job may run in: a path from the root."""
    return address if "://" in address else str(Path(address).expanduser().absolute())


def write_changed(store: Store, key: str, data: bytes) -> None:
    """Write a value unless it is there already: what stays the same keeps its time and its ETag."""
    try:
        if store.read(key) == data:
            return
    except MissingKey:
        pass
    store.write(key, data)


def refuse_if_down(store: Store) -> None:
    """After a StoreError about a key: StoreDown where the store does not even say whether another is there."""
    try:
        store.size("index.json")
    except (StoreError, OSError) as error:
        raise StoreDown(f"the store does not answer: {error}") from error


def checked(key: str) -> str:
    """The key itself, if it is a plain relative path that cannot leave its store."""
    if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"{key!r} is no key: keys are relative paths without empty, '.' or '..' parts")
    return key


def checked_range(key: str, start: int | None, end: int | None) -> tuple[int, int | None]:
    first = start or 0
    if first < 0 or (end is not None and end < first):
        raise ValueError(f"{key}: no bytes from {start} to {end}")
    return first, end


# ---------------------------------------------------------------- a folder


@dataclass(frozen=True)
class FolderStore:
    address: str  # absolute path

    def _path(self, key: str) -> Path:
        return Path(self.address, checked(key))

    def _missing(self, key: str) -> NoReturn:
        if not os.path.isdir(self.address):
            raise ConfigError(f"no folder {self.address}")
        raise MissingKey(f"no {key} in {self.address}")

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        first, end = checked_range(key, start, end)
        try:
            with open(self._path(key), "rb") as file:
                file.seek(first)
                data = file.read() if end is None else file.read(end - first)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._missing(key)
        except OSError as error:
            raise StoreError(f"{key} in {self.address}: {error.strerror}") from error
        if end is not None and len(data) < end - first:
            raise StoreError(f"{key} in {self.address} ends before byte {end}")
        return data

    def write(self, key: str, data: bytes, metadata: Mapping[str, str] = NONE) -> None:
        with told(self._path(key)), written_aside(self._path(key)) as part:
            part.write_bytes(data)

    def upload(self, key: str, path: Path) -> None:
        with told(self._path(key)), written_aside(self._path(key)) as part:
            shutil.copyfile(path, part)

    def download(self, key: str, path: Path) -> None:
        try:
            with written_aside(path) as part:
                shutil.copyfile(self._path(key), part)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._missing(key)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        parent = prefix.rpartition("/")[0]
        if parent:
            checked(parent)
        if not os.path.isdir(self.address):
            raise ConfigError(f"no folder {self.address}")
        yield from (entry for entry in self._walk(parent) if entry.key.startswith(prefix))

    def _walk(self, folder: str) -> Iterator[Entry]:
        """Entries below ``folder`` in the order of their keys: a folder sorts as its name and a slash."""
        try:
            with os.scandir(Path(self.address, folder)) as found:
                entries = sorted((entry.name + "/" if entry.is_dir() else entry.name, entry) for entry in found)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise ConfigError(f"cannot list {self.address}/{folder}: {error.strerror}") from None
        for name, entry in entries:
            key = f"{folder}/{name}" if folder else name
            if name.endswith("/"):
                yield from self._walk(key.removesuffix("/"))
            elif not name.endswith(PARTIAL):
                try:
                    facts = entry.stat()
                except FileNotFoundError:  # gone since, or a link to nothing
                    continue
                except OSError as error:
                    raise ConfigError(f"cannot list {self.address}/{key}: {error.strerror}") from None
                yield Entry(key, facts.st_size, str(facts.st_mtime_ns))

    def size(self, key: str) -> int | None:
        path = self._path(key)
        if path.is_file():
            return path.stat().st_size
        if not os.path.isdir(self.address):
            raise ConfigError(f"no folder {self.address}")
        return None

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from None


def version_of(file: Path) -> tuple[int, int] | None:
    """Time (ns) and size (bytes) of a file, others of other bytes; None where there is no such file."""
    try:
        facts = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (facts.st_mtime_ns, facts.st_size) if stat.S_ISREG(facts.st_mode) else None


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What a disk says while a file is written (no space left, ...) as ConfigError with its name."""
    try:
        yield
    except FileNotFoundError:  # what is to be copied is not there: no disk's fault
        raise
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A hidden file beside ``path`` to write into; it becomes ``path`` when the block ends well, else it goes."""
    part = f"{path.parent}/.{uuid.uuid4().hex}{PARTIAL}"  # system calls alone: images are many and small
    descriptor = new_file(part, path)
    try:
        yield Path(part)
        os.fsync(descriptor)
        os.replace(part, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(part)
        raise
    finally:
        os.close(descriptor)


def new_file(part: str, path: Path) -> int:
    """A descriptor of an empty file, in a folder that is made if it is not there. ``path``: what it is to become."""
    try:
        try:
            return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except (FileNotFoundError, NotADirectoryError):
            make_folder(path.parent)
            return os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


# ---------------------------------------------------------------- a value as a file


class StoreFile(io.RawIOBase):
    """A stored value as a file that can be read and sought."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        super().__init__()
        self.store, self.key, self.bytes, self.position = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.bytes)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        end = min(self.bytes, self.position + len(buffer))
        if end <= self.position:
            return 0
        data = self.store.read(self.key, self.position, end)
        buffer[: len(data)] = data
        self.position = end
        return len(data)


def opened(store: Store, key: str, size: int) -> io.BufferedReader:
    """A value of ``size`` bytes as a file, read by ranges of a mebibyte."""
    return io.BufferedReader(StoreFile(store, key, size), buffer_size=2**20)
