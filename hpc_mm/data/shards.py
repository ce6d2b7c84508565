"""Shards: plain WebDataset tars with an index of their members beside them, so that any sample is one ranged read."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from datetime import time as clock_time
from decimal import Decimal
from json.encoder import encode_basestring_ascii
from pathlib import Path
from types import TracebackType
from typing import Any, overload
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from hpc_mm.config import ConfigError
from hpc_mm.data.cache import ReadCache
from hpc_mm.data.schema import Image, Part, Sample, Text
from hpc_mm.data.store import MissingKey, Store, StoreError, told, write_changed

MANIFEST = "index.json"  # of a folder of shards: written last, so a folder that has it is whole
INDEX = ".index.json"  # ends the name of a shard's own index
SHARD_BYTES = 256 * 2**20  # size at which a shard is closed
BLOCK = 512  # bytes; a tar's unit
DIGITS = 16  # of a tar's SHA-256 in its name, where several write into a folder
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "avif")
CAPTION_SUFFIXES = ("txt", "caption")
DIGESTED = re.compile(r"-[0-9a-f]{16}\.tar")  # ends the name of a shard that never has other bytes


class BrokenShard(Exception):
    """A tar or an index that is not what it should be; the message names the shard and the byte."""


@dataclass(frozen=True)
class ShardInfo:
    name: str  # of the tar inside its folder
    samples: int
    bytes: int


class Shards(Sequence[ShardInfo]):
    """The shards of a folder as columns, since 100,000 objects would take longer to make than a batch to read."""

    def __init__(self, names: Sequence[str], samples: Sequence[int], sizes: Sequence[int]) -> None:
        self.names = names
        self.samples, self.bytes = np.array(samples, dtype=np.int64), np.array(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, place: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, place: slice) -> list[ShardInfo]: ...
    def __getitem__(self, place: int | slice) -> ShardInfo | list[ShardInfo]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return ShardInfo(self.names[place], int(self.samples[place]), int(self.bytes[place]))


@dataclass(frozen=True)
class Member:
    """One file of a sample: ``suffix`` is its name after the sample's key and a dot; bytes [start, end) of the tar."""

    suffix: str
    start: int
    end: int


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard lie. Arrays, since a worker keeps the indexes of several shards."""

    tar_bytes: int
    keys: list[str]  # (S,) of the samples
    first: NDArray[np.int64]  # (S + 1,) sample i has members first[i] to first[i + 1]
    suffixes: list[str]  # every distinct one
    suffix: NDArray[np.int64]  # (M,) into suffixes
    start: NDArray[np.int64]  # (M,) bytes
    size: NDArray[np.int64]  # (M,) bytes

    def members(self, sample: int) -> list[Member]:
        return [
            Member(self.suffixes[self.suffix[i]], int(self.start[i]), int(self.start[i] + self.size[i]))
            for i in range(self.first[sample], self.first[sample + 1])
        ]

    def dump(self) -> bytes:
        values = {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()
        }
        return json.dumps(values, separators=(",", ":")).encode()


def pack_index(size: int, samples: list[tuple[str, list[Member]]]) -> ShardIndex:
    members = [member for _, found in samples for member in found]
    suffixes = sorted({member.suffix for member in members})
    place = {suffix: i for i, suffix in enumerate(suffixes)}
    return ShardIndex(
        tar_bytes=size,
        keys=[key for key, _ in samples],
        first=np.cumsum([0] + [len(found) for _, found in samples], dtype=np.int64),
        suffixes=suffixes,
        suffix=np.array([place[member.suffix] for member in members], dtype=np.int64),
        start=np.array([member.start for member in members], dtype=np.int64),
        size=np.array([member.end - member.start for member in members], dtype=np.int64),
    )


def read_index(store: Store, shard: str) -> ShardIndex:
    """The index beside ``shard``."""
    try:
        values = json.loads(store.read(shard + INDEX))
        arrays = {name: np.array(values[name], dtype=np.int64) for name in ("first", "suffix", "start", "size")}
        index = ShardIndex(int(values["tar_bytes"]), values["keys"], suffixes=values["suffixes"], **arrays)
        whole = consistent(index)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        if isinstance(error, MissingKey):
            raise
        raise BrokenShard(f"{store.address}/{shard}{INDEX} is no shard index: index the shards again") from error
    if not whole:
        raise BrokenShard(f"{store.address}/{shard}{INDEX} contradicts itself: index the shards again")
    return index


def consistent(index: ShardIndex) -> bool:
    """Whether every sample has members, and every member its own bytes inside the tar."""
    members = len(index.start)
    arrays = (index.first, index.suffix, index.start, index.size)
    if any(array.ndim != 1 for array in arrays) or not len(index.suffix) == members == len(index.size):
        return False
    if len(index.first) != len(index.keys) + 1 or index.first[0] != 0 or index.first[-1] != members:
        return False
    if not all(isinstance(name, str) for name in (*index.keys, *index.suffixes)):
        return False
    ends = np.concatenate([[0], index.start + index.size])
    known = (index.suffix >= 0) & (index.suffix < len(index.suffixes))
    apart = (index.start >= ends[:-1]) & (index.size >= 0) & (index.size <= index.tar_bytes)
    return bool((np.diff(index.first) > 0).all() and known.all() and apart.all() and ends[-1] <= index.tar_bytes)


def version(store: Store, shard: str) -> str:
    """The name of a shard with what tells it from others of that name: the digest of its bytes or of its index.

    So what was computed of another shard is never taken for this one's. MissingKey where there is no index to ask.
    """
    if DIGESTED.search(shard):
        return shard
    return f"{shard}.{hashlib.sha256(store.read(shard + INDEX)).hexdigest()[:DIGITS]}"


# ---------------------------------------------------------------- the manifest


def write_manifest(store: Store, shards: list[ShardInfo]) -> None:
    """Declare the folder whole. A manifest that says the same stays untouched."""
    rows = [asdict(shard) for shard in sorted(shards, key=lambda shard: shard.name)]
    write_changed(store, MANIFEST, json.dumps(rows, indent=0).encode())


def read_manifest(store: Store) -> Shards:
    """The shards of a folder, by name. ConfigError where there are none, or where preparing them never ended."""
    try:
        rows = from_json(store.read(MANIFEST), cache_strings="keys")  # twice as fast as json
        names, samples, sizes = ([row[column] for row in rows] for column in ("name", "samples", "bytes"))
        shards = Shards(names, samples, sizes)
    except MissingKey:
        raise ConfigError(
            f"no shards at {store.address}: {MANIFEST} is missing (preparing was not finished; "
            "foreign tars are indexed by python -m hpc_mm.index shards=ADDRESS)"
        ) from None
    except StoreError as error:
        raise ConfigError(f"{store.address}: {error}") from None
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ConfigError(f"{store.address}/{MANIFEST} is no list of shards: prepare or index them again") from None
    if not shards.samples.sum():
        raise ConfigError(f"the shards at {store.address} hold no samples")
    return shards


def corpus_digest(shards: Shards) -> str:
    """SHA-256 in hex of the names and sample counts in order, which decide the order of training."""
    rows = zip(map(encode_basestring_ascii, shards.names), shards.samples.tolist(), strict=True)
    text = ", ".join(f"[{name}, {samples}]" for name, samples in rows)  # as json.dumps, in a third of its time
    return hashlib.sha256(f"[{text}]".encode()).hexdigest()


def check_shards(store: Store) -> list[str]:
    """What is wrong with a folder of shards, a line each, from its manifest and one listing."""
    shards = read_manifest(store)
    sizes = {entry.key: entry.size for entry in store.list()}
    problems = []
    for shard in shards:
        found = sizes.get(shard.name)
        if found is None:
            problems.append(f"{store.address}/{shard.name} is missing")
        elif found != shard.bytes:
            problems.append(f"{store.address}/{shard.name} has {found} bytes, its index says {shard.bytes}")
        if shard.name + INDEX not in sizes:
            problems.append(f"{store.address}/{shard.name}{INDEX} is missing")
    return problems


# ---------------------------------------------------------------- writing


def members_of(sample: Sample) -> list[tuple[str, bytes]]:
    """(suffix, bytes) of the files that stand for a sample, the JSON with its parts first."""
    parts: list[dict[str, Any]] = []
    files: list[tuple[str, bytes]] = []
    for part in sample.parts:
        role = {"role": part.role} if part.role else {}
        if isinstance(part, Text):
            parts.append({"text": part.text, **role})
            continue
        entry: dict[str, Any] = {"facts": part.facts} if part.facts else {}
        if part.key is not None:
            entry["image_key"] = part.key
        if part.data is not None:
            entry["image"] = f"{len(files)}.{image_suffix(part.data)}"
            files.append((entry["image"], part.data))
        parts.append({**entry, **role})
    facts = {"parts": parts, "metadata": sample.metadata}
    head = json.dumps(facts, ensure_ascii=False, separators=(",", ":"), default=as_text)
    return [("json", head.encode(errors="replace")), *files]


def as_text(value: Any) -> str:
    """What a table may hold and JSON cannot: times in ISO 8601, bytes in base64, all else as Python prints it."""
    if isinstance(value, date | clock_time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, timedelta | Decimal | UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot stand in a shard")


def image_suffix(data: bytes) -> str:
    """The usual file ending of encoded image bytes, by their first ones; ``jpg`` where they say nothing."""
    signatures = ((b"\x89PNG", "png"), (b"GIF8", "gif"), (b"\xff\xd8", "jpg"))
    for start, suffix in signatures:
        if data.startswith(start):
            return suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "avif" if data[4:12] in (b"ftypavif", b"ftypavis") else "jpg"


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


class ShardWriter:
    """Writes samples into ``NAME-000000.tar``, ``NAME-000001.tar``, ... with their indexes, and then the manifest.

    A shard is built on this machine's disk (TMPDIR) and uploaded whole; it is closed at ``max_bytes``. Sample ids are
    letters, digits, ``_`` and ``-`` (a tar key ends at its first dot) and differ within a shard.

    ``manifest=False`` is for one of several writers into a folder: whoever sees them all finished writes it. Names are
    then ``NAME-000000-DIGEST.tar`` with 16 hex digits of the tar's SHA-256, so that a shard is never replaced by other
    bytes: an older manifest stays true, and two processes with one task cannot mix their work.
    """

    def __init__(self, store: Store, name_prefix: str, max_bytes: int = SHARD_BYTES, manifest: bool = True) -> None:
        self.store, self.name_prefix, self.max_bytes, self.manifest = store, name_prefix, max_bytes, manifest
        self.shards: list[ShardInfo] = []
        self._folder = tempfile.TemporaryDirectory(prefix="hpc_mm-shard-")
        self._tar: tarfile.TarFile | None = None
        self._samples: list[tuple[str, list[Member]]] = []
        self._ids: set[str] = set()

    @property
    def _path(self) -> Path:
        return Path(self._folder.name, f"{len(self.shards):06d}.tar")

    def add(self, sample: Sample) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", sample.id):
            raise ValueError(f"sample id {sample.id!r}: only letters, digits, _ and - can stand in a shard")
        if sample.id in self._ids:
            raise ValueError(f"sample id {sample.id!r} is in this shard already")
        with told(self._path):
            if self._tar is None:
                self._tar = tarfile.open(self._path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115, open between adds
            members = [self._put(self._tar, sample.id, suffix, data) for suffix, data in members_of(sample)]
        self._samples.append((sample.id, members))
        self._ids.add(sample.id)
        if self._tar.offset >= self.max_bytes:
            self._flush()

    def _put(self, tar: tarfile.TarFile, key: str, suffix: str, data: bytes) -> Member:
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        info.mode = 0o644
        tar.addfile(info, io.BytesIO(data))
        end = tar.offset - -len(data) % BLOCK
        return Member(suffix, end - len(data), end)

    def _flush(self) -> None:
        if self._tar is None:
            return
        path = self._path
        with told(path):
            self._tar.close()
        self._tar = None
        if self.manifest and not self.shards:
            self.store.delete(MANIFEST)  # from here on the folder is not what an older manifest says
        index = pack_index(path.stat().st_size, self._samples)
        name = f"{self.name_prefix}-{len(self.shards):06d}{'' if self.manifest else '-' + digest(path)}.tar"
        if self.manifest or self.store.size(name) != index.tar_bytes:
            self.store.upload(name, path)
        if self.manifest or self.store.size(name + INDEX) is None:
            self.store.write(name + INDEX, index.dump())
        path.unlink()
        self.shards.append(ShardInfo(name, len(index.keys), index.tar_bytes))
        self._samples, self._ids = [], set()

    def close(self) -> None:
        """Upload what is left, and write the manifest unless this is one of several writers."""
        self._flush()
        self._folder.cleanup()
        if self.manifest:
            write_manifest(self.store, self.shards)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            return self.close()
        if self._tar is not None:
            with suppress(OSError):  # what happened first is told
                self._tar.close()
        self._folder.cleanup()


# ---------------------------------------------------------------- reading


def assemble(key: str, files: dict[str, bytes]) -> Sample:
    """A sample from its files: ours by the parts in its JSON, a foreign one as an image and its caption."""
    try:
        facts = json.loads(files.get("json", b"{}"))
        if isinstance(facts, dict) and "parts" in facts:
            return Sample(key, tuple(_part(entry, files) for entry in facts["parts"]), facts["metadata"])
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        caption = next((files[suffix].decode() for suffix in CAPTION_SUFFIXES if suffix in files), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenShard(f"sample {key}: {type(error).__name__}: {error}") from error
    if image is None or caption is None:
        raise BrokenShard(f"sample {key} has files {sorted(files)}: neither parts nor an image with a caption")
    return Sample(key, (Image(image), Text(caption)), facts if isinstance(facts, dict) else {})


def _part(entry: dict[str, Any], files: dict[str, bytes]) -> Part:
    if "text" in entry:
        return Text(entry["text"], entry.get("role", ""))
    data = files[entry["image"]] if "image" in entry else None
    return Image(data, entry.get("image_key"), entry.get("facts", {}), entry.get("role", ""))


class ShardReader:
    """Reads samples of a folder of shards; keeps the last ``indexes`` shard indexes. Safe with threads."""

    def __init__(self, store: Store, indexes: int = 32, cache: ReadCache | None = None) -> None:
        self.store, self.indexes, self.cache = store, indexes, cache
        self._found: OrderedDict[str, Future[ShardIndex]] = OrderedDict()
        self._lock = threading.Lock()

    def index(self, shard: str) -> ShardIndex:
        """Read once even when several threads ask; a failure is forgotten, so that the next one tries again."""
        with self._lock:
            future = self._found.get(shard)
            mine = future is None
            if future is None:
                future = self._found[shard] = Future()
            self._found.move_to_end(shard)
            while len(self._found) > self.indexes:
                self._found.popitem(last=False)
        if mine:
            try:
                future.set_result(read_index(self.store, shard))
            except BaseException as error:
                with self._lock:
                    self._found.pop(shard, None)
                future.set_exception(error)
        return future.result()

    def read(self, shard: str, sample: int) -> Sample:
        """One ranged read. MissingKey, StoreError or BrokenShard where the sample cannot be had."""
        index = self.index(shard)
        if sample >= len(index.keys):
            raise BrokenShard(f"{self.store.address}/{shard}{INDEX} has no sample {sample}: index the shards again")
        key, members = index.keys[sample], index.members(sample)
        start, end = members[0].start, members[-1].end
        if self.cache is None:
            return cut(key, members, self.store.read(shard, start, end))
        try:
            return cut(key, members, self.cache.read(self.store, shard, start, end, index.tar_bytes))
        except BrokenShard:  # by the cache's copy, perhaps
            self.cache.drop(self.store, shard, start, end, index.tar_bytes)
            return cut(key, members, self.cache.read(self.store, shard, start, end, index.tar_bytes))


def cut(key: str, members: list[Member], data: bytes) -> Sample:
    """A sample from the bytes between the start of its first member and the end of its last."""
    start = members[0].start
    return assemble(key, {member.suffix: data[member.start - start : member.end - start] for member in members})


def read_samples(store: Store) -> Iterator[Sample]:
    """Every sample of a folder of shards in stored order."""
    reader = ShardReader(store, indexes=1)
    for shard in read_manifest(store):
        for sample in range(shard.samples):
            yield reader.read(shard.name, sample)
