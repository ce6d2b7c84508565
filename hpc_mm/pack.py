"""The pack stage: records of a corpus and the images in a store become shards, file by file."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

from pydantic import Field, model_validator

from hpc_mm.config import ConfigError, Part, Positive
from hpc_mm.data.documents import BrokenRecord, Record
from hpc_mm.data.filters import Filtering, Filters
from hpc_mm.data.pace import Pace
from hpc_mm.data.parts import Moment, SourcePart, have_come, looked_again, read_marker, write_marker
from hpc_mm.data.records import ENDINGS, DamagedFile, WrongColumns, check_columns, holds_records, read_records
from hpc_mm.data.schema import Sample, image_key
from hpc_mm.data.shards import DIGITS, INDEX, ShardInfo, ShardWriter, write_manifest
from hpc_mm.data.sources import open_source
from hpc_mm.data.store import MissingKey, Store, StoreError, open_store, refuse_if_down

STATS = "stats.json"  # counts of the whole corpus
FETCHED = "fetched"  # in it, URLs by what became of them
AHEAD = 64  # records whose images are being read
HELD = 128 * 2**20  # bytes of images that have been read ahead, above which no further record is begun
QUEUED = 2  # images that have not come, whose sizes nobody knows yet, as a multiple of those that are read at once
LEFT_OUT = "left out: "  # starts the names of counts of records
NAMED = 3  # places of each reason that are told
DECLARED = 9  # times at most that a launch declares what others go on changing
SHARD = re.compile(rf"([A-Za-z0-9-]+)-\d{{6,}}-[0-9a-f]{{{DIGITS}}}\.tar({re.escape(INDEX)})?")


class Packing(Part):
    """How records and images become shards."""

    WORK: ClassVar[frozenset[str]] = frozenset({"source", "images", "out", "tasks", "task", "reads", "recheck"})
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
    recheck: str = Field(
        "", description="any word: files that lack images look for them once more, once per word (a fetch is noticed)"
    )
    columns: str = Field("", description="names of a .tsv file's values, with commas; empty = its first line has them")

    def column_names(self) -> list[str]:
        return [name for name in self.columns.split(",") if name]

    def forms(self) -> list[list[str]]:
        """The columns of each form of record; a file that has not all of one is not of this corpus. None: any has."""
        return []

    def parts(self) -> tuple[Store, list[SourcePart]]:
        """The store of the source and what of it is done or not done as a whole."""
        return source_parts(self.source, self.out)

    def records(self, store: Store, part: SourcePart) -> Iterator[Record | BrokenRecord]:
        """The records of a part, in order."""
        return read_records(store, part.key, self.column_names())

    def url_columns(self) -> list[str]:
        """Columns that ``urls`` reads; empty = any."""
        return []

    def records_with_urls(self, store: Store, part: SourcePart) -> Iterator[Record | BrokenRecord]:
        """The records of a part with no more of them than ``urls`` reads, where that is told."""
        if not self.url_columns():
            return self.records(store, part)
        return read_records(store, part.key, self.column_names(), self.url_columns())

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


def source_parts(address: str, out: str) -> tuple[Store, list[SourcePart]]:
    """The store and the files of records at an address, which is one such file or a folder of them.

    ``out``: where a copy of a file on the web is kept.
    """
    store, name = open_source(address, ENDINGS, out)
    if name:
        return store, [SourcePart(name, store.size(name) or 0)]
    parts = [SourcePart(entry.key, entry.size) for entry in store.list() if holds_records(entry.key)]
    if not parts:
        raise ConfigError(f"source={address} holds no {', '.join(ENDINGS)} files")
    twice = [name for name, count in Counter(part.name for part in parts).items() if count > 1]
    if twice:
        raise ConfigError(f"source={address}: several files would become shards named {twice[0]}")
    return store, parts


def kept_options(options: Packing) -> dict[str, Any]:
    return options.model_dump(mode="json", exclude=set(options.WORK))


# ---------------------------------------------------------------- one part


NOT_THERE, UNREADABLE = "not in the store", "could not be read"  # reasons that may pass


def fetch(store: Store, key: str, smallest: int) -> bytes | str:
    """The image, or why it is left out. A store that fails altogether raises: the part is then done another time."""
    try:
        data = read_twice(store, key)
    except MissingKey:
        return NOT_THERE
    except StoreError:
        return UNREADABLE
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


def keys_of(urls: list[str], options: Packing) -> set[str]:
    try:
        return {options.key(url) for url in urls}
    except (AttributeError, UnicodeEncodeError):
        raise BrokenRecord("a URL is not text") from None


class ReadAhead:
    """Reads the images of the next records while others are packed: so many records, bytes and requests at most."""

    def __init__(self, urls: Callable[[Record], list[str]], store: Store, options: Packing) -> None:
        self.urls, self.store, self.options = urls, store, options
        self.threads = ThreadPoolExecutor(options.reads, "fetch")
        self.lock = threading.Lock()
        self.asked, self.held = 0, 0  # images that have not come, bytes of those that have

    def fetched(self, records: Iterator[Record | BrokenRecord]) -> Generator[Fetched | BrokenRecord, None, None]:
        """The records in order."""
        waiting: deque[Fetched | BrokenRecord] = deque()
        try:
            for record in records:
                while waiting and self.is_far_ahead(len(waiting)):
                    yield self.next(waiting)
                waiting.append(self.start(record))
            while waiting:
                yield self.next(waiting)
        finally:
            self.threads.shutdown(cancel_futures=True)

    def is_far_ahead(self, records: int) -> bool:
        return records >= AHEAD or self.held >= HELD or self.asked >= QUEUED * self.options.reads

    def next(self, waiting: deque[Fetched | BrokenRecord]) -> Fetched | BrokenRecord:
        item = waiting.popleft()
        if isinstance(item, Fetched):
            size = sum(len(data) for future in item.images.values() if isinstance(data := future.result(), bytes))
            with self.lock:
                self.held -= size
        return item

    def start(self, record: Record | BrokenRecord) -> Fetched | BrokenRecord:
        if isinstance(record, BrokenRecord):
            return record
        try:
            keys = sorted(keys_of(self.urls(record), self.options))
        except BrokenRecord as reason:
            return BrokenRecord(str(reason), record.place)
        with self.lock:
            self.asked += len(keys)
        smallest = self.options.smallest(record)
        return Fetched(record, {key: self.threads.submit(self.read, key, smallest) for key in keys})

    def read(self, key: str, smallest: int) -> bytes | str:
        found = fetch(self.store, key, smallest)
        with self.lock:
            self.asked -= 1
            self.held += len(found) if isinstance(found, bytes) else 0
        return found


@dataclass(frozen=True)
class Tally:
    """What became of the records of a part."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)  # the first that were left out, by reason

    def leave_out(self, reason: str, place: str) -> None:
        self.counts[LEFT_OUT + reason] += 1
        self.name(LEFT_OUT + reason, place)

    def name(self, counted: str, place: str) -> None:
        places = self.places.setdefault(counted.removeprefix(LEFT_OUT), [])
        if len(places) < NAMED:
            places.append(place)


def pack_part(
    store: Store,
    part: SourcePart,
    out: Store,
    options: Options,
    urls: Urls[Options],
    arrange: Arrange[Options],
    images: Store,
    filtering: Filtering,
    moment: Moment,
    pace: Pace,
) -> dict[str, Any]:
    """Write the shards of one file of records, then its done marker, which is returned."""
    filtering.start_file()
    tally, missing = Tally(), set[str]()
    counts = tally.counts
    options.check(store, part)
    records = pace.through(part, options.records(store, part))
    found = ReadAhead(lambda record: urls(record, options), images, options).fetched(records)
    with ShardWriter(out, part.name, options.shard_mb * 2**20, manifest=False) as writer, closing(found):
        for number, item in enumerate(found):
            counts["records"] += 1
            try:
                if isinstance(item, BrokenRecord):
                    raise item
                found_images = bytes_of(item.images, counts, missing)
                sample = arrange(item.record, f"{part.name}-{number:08d}", found_images, options)
            except BrokenRecord as reason:
                tally.leave_out(str(reason), reason.place or (item.record.place if isinstance(item, Fetched) else ""))
                continue
            if not sample.images and not options.TEXT_ALONE:
                tally.leave_out("no image", item.record.place)
                continue
            kept, filtered = filtering(sample)
            counts.update(filtered)
            if kept is None:
                tally.name(next(reason for reason in filtered if reason.startswith(LEFT_OUT)), item.record.place)
                continue
            counts["samples"] += 1
            counts["images"] += len(kept.images)
            writer.add(kept)
    marker = {
        "made_from": part.made_from,
        "options": kept_options(options),
        "shards": [asdict(shard) for shard in writer.shards],
        "counts": dict(counts),
        "places": tally.places,
    }
    write_marker(out, part, marker, missing, moment)
    return marker


def bytes_of(images: Mapping[str, Future[bytes | str]], counts: Counter[str], missing: set[str]) -> dict[str, bytes]:
    """The images that were found; the others are counted by reason, and those that may come yet are ``missing``."""
    results = {key: future.result() for key, future in images.items()}
    counts.update(f"images left out: {reason}" for reason in results.values() if isinstance(reason, str))
    missing.update(key for key, reason in results.items() if reason in (NOT_THERE, UNREADABLE))
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
    """Do this task's parts that are to do; the counts of the whole corpus once all of its parts are done.

    The task that finds every part done writes the statistics and then the manifest, which declares the corpus whole.
    A damaged file or one that its store does not give is told, the others are done, and DamagedFile ends the task. A
    task that has no part leaves the corpus to those that have.
    """
    store, parts = options.parts()
    mine = list(dict.fromkeys(part for i, part in enumerate(parts) if options.task in (None, i % options.tasks)))
    if not mine:
        print(f"there are {len(parts)} files for {options.tasks} tasks: none is of task {options.task}")
        return None
    check_first(options, store, parts[0])
    out = open_store(options.out, make=True)
    images, filtering = open_store(options.images), Filtering(options.filters, options.WHOLE)
    moment, kept, pace = Moment.now(out, options.recheck), kept_options(options), Pace(mine)

    def do(part: SourcePart) -> dict[str, Any]:
        done = pack_part(store, part, out, options, urls, arrange, images, filtering, moment, pace)
        print(f"{part.key}: {summary(done['counts'])}")
        for reason, places in done["places"].items():
            print("".join(f"{place}: {reason}\n" for place in places), end="")
        return done

    failed: list[str] = []
    for part in mine:
        marker = read_marker(out, part, kept)
        try:
            if marker is None or (moment.is_later(marker) and have_come(out, part, marker, images, options.reads)):
                do(part)
                continue
            pace.skip(part)
            if moment.is_later(marker):
                looked_again(out, part, marker, moment)
        except (DamagedFile, StoreError) as error:
            failed.append(f"{part.key}: {error}")
    if failed:
        raise DamagedFile("\n".join([*failed, f"{len(failed)} files are not done"]))
    # Another task's part may wait for being done again: then the corpus is not as whole as it will be.
    whole = [
        part
        for part, marker in zip(parts, read_markers(options, out, parts), strict=True)
        if marker is not None and (part in mine or not moment.is_later(marker))
    ]
    print(f"{len(whole)} of {len(parts)} files are done")
    return declare(options, out, parts, do) if len(whole) == len(parts) else None


def read_markers(options: Packing, out: Store, parts: Sequence[SourcePart]) -> list[dict[str, Any] | None]:
    kept = kept_options(options)
    with ThreadPoolExecutor(options.reads, "marker") as threads:
        return list(threads.map(lambda part: read_marker(out, part, kept), parts))


def declare(
    options: Packing, out: Store, parts: Sequence[SourcePart], do: Callable[[SourcePart], dict[str, Any]]
) -> dict[str, int]:
    """Write statistics and manifest of parts that are done, and delete the shards that they have no more.

    Another launch may write markers meanwhile. So the markers are read again after the last change: if they are those
    that were declared, whoever writes one later also lists and declares later, and mends what is missing then.
    """
    for _ in range(DECLARED):
        markers = read_markers(options, out, parts)
        part_of = {entry.key: found[1] for entry in out.list() if (found := SHARD.fullmatch(entry.key))}
        whole = [
            marker if marker is not None and is_there(marker, part_of) else do(part)
            for part, marker in zip(parts, markers, strict=True)
        ]
        counts = sum((Counter(marker["counts"]) for marker in whole), Counter[str]())
        refuse_nothing(options, counts)
        write_stats(out, counts)
        shards = [ShardInfo(**shard) for marker in whole for shard in marker["shards"]]
        write_manifest(out, shards)
        if read_markers(options, out, parts) != whole:
            continue
        kept, names = {shard.name for shard in shards}, {part.name for part in parts}
        old = [key for key, name in part_of.items() if name in names and key.removesuffix(INDEX) not in kept]
        for key in old:
            out.delete(key)
        if not old or read_markers(options, out, parts) == whole:
            print(f"{options.out}: {summary(counts)}")
            return dict(counts)
    raise ConfigError(f"{options.out}: other launches go on changing it; let them end, then the same command goes on")


def refuse_nothing(options: Packing, counts: Mapping[str, int]) -> None:
    """ConfigError where there is nothing to declare."""
    if not counts["records"]:
        raise ConfigError(f"source={options.source} holds no records")
    if not counts["samples"]:
        raise ConfigError(
            f"{options.out}: no record became a sample ({summary(counts)}); where images={options.images} has been "
            "filled since, recheck=again looks again"
        )


def is_there(marker: Mapping[str, Any], listed: Collection[str]) -> bool:
    """Whether the shards of a part are in the store: another launch may have taken them for old ones."""
    names = [shard["name"] for shard in marker["shards"]]
    return all(name in listed and name + INDEX in listed for name in names)


def write_stats(out: Store, counts: Mapping[str, int]) -> None:
    """Statistics that say the same keep what the verify stage has added to them."""
    try:
        known = json.loads(out.read(STATS))
    except MissingKey:
        known = {}
    if {name: count for name, count in known.items() if name != FETCHED} != counts:
        out.write(STATS, json.dumps(counts, indent=1).encode())


def summary(counts: Mapping[str, int]) -> str:
    first = ("records", "samples", "images")
    names = [*first, *sorted(set(counts) - set(first))]
    return ", ".join(f"{counts.get(name, 0)} {name}" for name in names)
