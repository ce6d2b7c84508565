"""The pack stage: records of a corpus and the images in a store become shards, file by file."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import Field, model_validator

from hpc_mm.config import ConfigError, Part, Positive
from hpc_mm.data.documents import BrokenRecord, Record
from hpc_mm.data.filters import Filtering, Filters
from hpc_mm.data.records import ENDINGS, DamagedFile, WrongColumns, check_columns, holds_records, read_records
from hpc_mm.data.schema import Sample, image_key
from hpc_mm.data.shards import ShardInfo, ShardWriter, write_manifest
from hpc_mm.data.sources import open_source
from hpc_mm.data.store import MissingKey, Store, StoreError, open_store, refuse_if_down

STATS = "stats.json"  # counts of the whole corpus
PARTS = "parts"  # folder of the done markers, one per source file
AHEAD = 64  # records whose images are being read
NAMED = 3  # places of each mistake that are told


class Packing(Part):
    """How records and images become shards."""

    WORK: ClassVar[frozenset[str]] = frozenset({"source", "images", "out", "tasks", "task", "reads"})
    """How the work is done; everything else must be the same for all parts of a corpus."""
    TEXT_ALONE: ClassVar[bool] = False
    """Whether a sample may have no image."""
    WHOLE: ClassVar[bool] = False
    """Whether a sample goes with the first of its images that is filtered out."""

    source: str = Field(description="file or folder of records: a path, s3://bucket/prefix or https://...")
    out: str = Field(description="folder of shards to write: a path or s3://bucket/prefix")
    images: str = Field("", description="store in which the images lie under sha256(url); empty = images beside out")
    tasks: Positive = Field(1, description="jobs that share the work")
    task: int | None = Field(None, ge=0, description="which of them this is, from 0; none = all of them")
    reads: Positive = Field(32, description="images read at once")
    shard_mb: Positive = Field(256, description="size at which a shard is closed, MiB")
    min_image_bytes: int = Field(0, ge=0, description="smaller image files are left out")
    columns: str = Field("", description="names of a .tsv file's values, with commas; empty = its first line has them")

    def column_names(self) -> list[str]:
        return [name for name in self.columns.split(",") if name]

    def forms(self) -> list[list[str]]:
        """The columns of each form of record; a file that has not all of one is not of this corpus. None: any has."""
        return []

    def parts(self) -> tuple[Store, list[SourcePart]]:
        """The store of the source and what of it is done or not done as a whole."""
        return source_parts(self.source)

    def records(self, store: Store, part: SourcePart) -> Iterator[Record | BrokenRecord]:
        """The records of a part, in order."""
        return read_records(store, part.key, self.column_names())

    def check(self, store: Store, part: SourcePart) -> None:
        """WrongColumns if a part has not those of any form."""
        if self.forms():
            check_columns(store, part.key, self.forms(), self.column_names())

    def key(self, name: str) -> str:
        """Where an image that a record names lies in the store of images."""
        return image_key(name)

    filters: Filters = Field(Filters(), description="what is left out of the corpus")

    def smallest(self, record: Record) -> int:
        """Bytes that an image of this record must have."""
        return self.min_image_bytes

    @model_validator(mode="after")
    def task_exists(self) -> Packing:
        if self.task is not None and self.task >= self.tasks:
            raise ValueError(f"task={self.task} is not one of tasks={self.tasks}: 0 to {self.tasks - 1}")
        return self


Options = TypeVar("Options", bound=Packing)
Urls = Callable[[Record, Options], list[str]]  # the images that a record wants
# record, sample id, image bytes by key (those that were found), options -> sample
Arrange = Callable[[Record, str, Mapping[str, bytes], Options], Sample]


# ---------------------------------------------------------------- the parts


@dataclass(frozen=True)
class SourcePart:
    """One file of records: what is done or not done as a whole."""

    key: str
    bytes: int
    split: str = ""  # of a benchmark

    @property
    def name(self) -> str:
        """Starts the names of its shards and samples."""
        if self.split:
            return self.split
        ending = next(ending for ending in ENDINGS if self.key.endswith(ending))
        return re.sub(r"[^A-Za-z0-9]+", "-", self.key.removesuffix(ending)).strip("-") or "part"

    @property
    def marker(self) -> str:
        return f"{PARTS}/{self.name}.json"


def source_parts(address: str) -> tuple[Store, list[SourcePart]]:
    """The store and the files of records at an address, which is one such file or a folder of them."""
    store, name = open_source(address, ENDINGS)
    if name:
        return store, [SourcePart(name, store.size(name) or 0)]
    parts = [SourcePart(entry.key, entry.size) for entry in store.list() if holds_records(entry.key)]
    if not parts:
        raise ConfigError(f"source={address} holds no {', '.join(ENDINGS)} files")
    twice = [name for name, count in Counter(part.name for part in parts).items() if count > 1]
    if twice:
        raise ConfigError(f"source={address}: several files would become shards named {twice[0]}")
    return store, parts


def read_marker(out: Store, part: SourcePart, options: Packing) -> dict[str, Any] | None:
    """What was written when the part was done; None if it is to do. ConfigError if it was done in another way."""
    try:
        marker: dict[str, Any] = json.loads(out.read(part.marker))
    except MissingKey:
        return None
    made_from = f"{part.key} of {part.bytes} bytes"
    if marker["made_from"] != made_from:
        raise ConfigError(f"{out.address} holds {marker['made_from']}, source has {made_from}: use another out")
    now = kept_options(options)
    changes = [f"{key}: {value} -> {now.get(key)}" for key, value in marker["options"].items() if now.get(key) != value]
    if changes:
        raise ConfigError(f"{out.address} holds parts prepared in another way ({'; '.join(changes)}): use another out")
    return marker


def kept_options(options: Packing) -> dict[str, Any]:
    return options.model_dump(mode="json", exclude=set(options.WORK))


# ---------------------------------------------------------------- one part


def fetch(store: Store, key: str, smallest: int) -> bytes | str:
    """The image, or why it is left out. A store that fails altogether raises: the part is then done another time."""
    try:
        data = read_twice(store, key)
    except MissingKey:
        return "not in the store"
    except StoreError:
        return "could not be read"
    return data if len(data) >= max(smallest, 1) else "too small"


def read_twice(store: Store, key: str) -> bytes:
    """A value. StoreError twice means this value; StoreDown means that the store answers nothing at all."""
    try:
        return store.read(key)
    except StoreError:
        refuse_if_down(store)
        return store.read(key)


@dataclass(frozen=True)
class Fetched:
    """A record and its images, which may still be on their way."""

    record: Record
    images: dict[str, Future[bytes | str]]  # by key


def fetched(
    records: Iterator[Record | BrokenRecord], urls: Callable[[Record], list[str]], store: Store, options: Packing
) -> Generator[Fetched | BrokenRecord, None, None]:
    """Records in order, while the images of the next ones are being read."""
    threads = ThreadPoolExecutor(options.reads, "fetch")
    waiting: deque[Fetched | BrokenRecord] = deque()
    try:
        for record in records:
            waiting.append(start_fetching(record, urls, store, threads, options))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting
    finally:
        threads.shutdown(cancel_futures=True)


def keys_of(urls: list[str], options: Packing) -> set[str]:
    try:
        return {options.key(url) for url in urls}
    except (AttributeError, UnicodeEncodeError):
        raise BrokenRecord("a URL is not text") from None


def start_fetching(
    record: Record | BrokenRecord,
    urls: Callable[[Record], list[str]],
    store: Store,
    threads: ThreadPoolExecutor,
    options: Packing,
) -> Fetched | BrokenRecord:
    if isinstance(record, BrokenRecord):
        return record
    try:
        keys = keys_of(urls(record), options)
    except BrokenRecord as reason:
        return BrokenRecord(str(reason), record.place)
    smallest = options.smallest(record)
    return Fetched(record, {key: threads.submit(fetch, store, key, smallest) for key in sorted(keys)})


def pack_part(
    store: Store,
    part: SourcePart,
    out: Store,
    options: Options,
    urls: Urls[Options],
    arrange: Arrange[Options],
    images: Store,
    filtering: Filtering,
) -> dict[str, Any]:
    """Write the shards of one file of records, then its done marker, which is returned."""
    filtering.start_file()
    counts: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    options.check(store, part)
    records = options.records(store, part)
    found = fetched(records, lambda record: urls(record, options), images, options)
    with ShardWriter(out, part.name, options.shard_mb * 2**20, manifest=False) as writer, closing(found):
        for number, item in enumerate(found):
            counts["records"] += 1
            try:
                if isinstance(item, BrokenRecord):
                    raise item
                found_images = bytes_of(item.images, counts)
                sample = arrange(item.record, f"{part.name}-{number:08d}", found_images, options)
            except BrokenRecord as reason:
                counts[f"left out: {reason}"] += 1
                place = reason.place or (item.record.place if isinstance(item, Fetched) else "")
                if len(places.setdefault(str(reason), [])) < NAMED:
                    places[str(reason)].append(place)
                continue
            if not sample.images and not options.TEXT_ALONE:
                counts["left out: no image"] += 1
                continue
            kept, filtered = filtering(sample)
            counts += filtered
            if kept is None:
                continue
            counts["samples"] += 1
            counts["images"] += len(kept.images)
            writer.add(kept)
    marker = {
        "made_from": f"{part.key} of {part.bytes} bytes",
        "options": kept_options(options),
        "shards": [asdict(shard) for shard in writer.shards],
        "counts": dict(counts),
        "places": places,
    }
    out.write(part.marker, json.dumps(marker, indent=1).encode())
    return marker


def bytes_of(images: Mapping[str, Future[bytes | str]], counts: Counter[str]) -> dict[str, bytes]:
    """The images that were found; the others are counted by reason."""
    results = {key: future.result() for key, future in images.items()}
    counts.update(f"images left out: {reason}" for reason in results.values() if isinstance(reason, str))
    return {key: data for key, data in results.items() if isinstance(data, bytes)}


# ---------------------------------------------------------------- all of them


def check_first(options: Packing, store: Store, part: SourcePart) -> None:
    """WrongColumns before any work; a damaged file is told when it is its turn, so that the others are done."""
    try:
        options.check(store, part)
    except WrongColumns:
        raise
    except (DamagedFile, StoreError):
        return


def pack(options: Options, urls: Urls[Options], arrange: Arrange[Options]) -> dict[str, int] | None:
    """Do this task's parts that are not done yet; the counts of the whole corpus once all of its parts are done.

    The task that finds every part done writes the statistics and then the manifest, which declares the corpus whole.
    A damaged file or one that its store does not give is told, the others are done, and DamagedFile ends the task.
    """
    store, parts = options.parts()
    check_first(options, store, parts[0])
    out = open_store(options.out, make=True)
    images, filtering = open_store(options.images), Filtering(options.filters, options.WHOLE)
    failed: list[str] = []
    for number, part in enumerate(parts):
        mine = options.task is None or number % options.tasks == options.task
        if mine and read_marker(out, part, options) is None:
            try:
                done = pack_part(store, part, out, options, urls, arrange, images, filtering)
            except (DamagedFile, StoreError) as error:
                failed.append(f"{part.key}: {error}")
                continue
            print(f"{part.key}: {summary(done['counts'])}")
            for reason, places in done["places"].items():
                print("".join(f"{place}: {reason}\n" for place in places), end="")
    if failed:
        raise DamagedFile("\n".join([*failed, f"{len(failed)} files are not done"]))
    markers = [read_marker(out, part, options) for part in parts]
    whole = [marker for marker in markers if marker is not None]
    print(f"{len(whole)} of {len(parts)} files are done")
    if len(whole) < len(parts):
        return None
    counts = sum((Counter(marker["counts"]) for marker in whole), Counter[str]())
    if not counts["records"]:
        raise ConfigError(f"source={options.source} holds no records")
    out.write(STATS, json.dumps(counts, indent=1).encode())
    write_manifest(out, [ShardInfo(**shard) for marker in whole for shard in marker["shards"]])
    print(f"{options.out}: {summary(counts)}")
    return dict(counts)


def summary(counts: Mapping[str, int]) -> str:
    first = ("records", "samples", "images")
    names = [*first, *sorted(set(counts) - set(first))]
    return ", ".join(f"{counts.get(name, 0)} {name}" for name in names)
