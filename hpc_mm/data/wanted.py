"""The unique URLs of a corpus that an image store has not, in parts: all URLs of a host in one group of parts."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from hpc_mm.data.schema import image_key
from hpc_mm.data.store import MissingKey, Store
from hpc_mm.data.tables import read_table, write_table

FOLDER, PLAN = "plan", "plan.json"
PART_URLS = 20_000  # of a part: some minutes of fetching
BUCKETS = 256  # by the first two hex digits of a key; one of them is in memory at a time
DIGITS = 12  # of a digest in the name of a part
GROUPS = 512  # at most: each is a file that is open while the plan is made


@dataclass(frozen=True)
class Part:
    """So many URLs of one group of hosts, which one process at a time fetches."""

    name: str
    group: int
    urls: int


@dataclass(frozen=True)
class Plan:
    """What is to be fetched."""

    made_from: dict[str, int]  # files of records and their bytes
    options: dict[str, Any]  # that decide which URLs are fetched, and what becomes of them
    named: int  # times that a record names an image
    unique: int  # URLs
    present: int  # of these, in the store already
    hosts: int
    parts: tuple[Part, ...]

    @property
    def wanted(self) -> int:
        return self.unique - self.present

    @property
    def groups(self) -> int:
        return 1 + max((part.group for part in self.parts), default=-1)


def host_of(url: str) -> str:
    """The name that is asked; empty where there is none, or where the URL is not one."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def read_plan(out: Store) -> Plan | None:
    try:
        values = json.loads(out.read(f"{FOLDER}/{PLAN}"))
    except MissingKey:
        return None
    return Plan(**{**values, "parts": tuple(Part(**part) for part in values["parts"])})


def read_urls(out: Store, part: Part) -> list[str]:
    table = read_table(out.read(f"{FOLDER}/{part.name}.parquet"))
    return table.column("url").to_pylist()  # type: ignore[no-any-return]


def make_plan(
    urls: Iterable[str],
    made_from: dict[str, int],
    options: dict[str, Any],
    images: Store,
    out: Store,
    part_urls: int = PART_URLS,
) -> Plan:
    """Write the parts, then the plan, which is returned. The same URLs and the same store give the same bytes.

    Where another launch has made a plan meanwhile, that one stays. Parts have the digest of their URLs in their names,
    so that two plans of one corpus, between which the store has grown, never share a part or its ledger.

    Memory is that of the largest 256th of the keys and of the largest group; the rest is in temporary files: about
    twice the text of the URLs. The store is listed once.
    """
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="hpc_mm-plan-") as folder, ExitStack() as spills:
        keyed = spills.enter_context(closing(Spill(Path(folder, "keyed"), BUCKETS)))
        for url in urls:
            counts["named"] += 1
            keyed.add(int(image_key(url)[:2], 16), url)
        # As many groups as parts are needed at most, before anything is known of the store.
        groups = min(GROUPS, max(1, -(-counts["named"] // part_urls)))
        grouped = spills.enter_context(closing(Spill(Path(folder, "grouped"), groups)))
        listed = Listing(images)
        for bucket in range(BUCKETS):
            found = {image_key(url): url for url in keyed.read(bucket)}
            present = listed.beginning(f"{bucket:02x}") & set(found)
            counts.update(unique=len(found), present=len(present))
            for key in sorted(set(found) - present):
                grouped.add(group_of(host_of(found[key]), groups), found[key])
        parts: list[Part] = []
        for group in range(groups):
            ordered, hosts = interleaved(grouped.read(group))
            counts["hosts"] += hosts
            for start in range(0, len(ordered), part_urls):
                members = ordered[start : start + part_urls]
                digest = hashlib.sha256(json.dumps(members).encode()).hexdigest()[:DIGITS]
                part = Part(f"{group:05d}-{start // part_urls:05d}-{digest}", group, len(members))
                out.write(f"{FOLDER}/{part.name}.parquet", _parquet(members))
                parts.append(part)
    numbers = {name: counts[name] for name in ("named", "unique", "present", "hosts")}
    plan, other = Plan(made_from, options, parts=tuple(parts), **numbers), read_plan(out)
    if other is not None:
        return other
    out.write(f"{FOLDER}/{PLAN}", json.dumps(asdict(plan)).encode())
    return plan


class Listing:
    """The keys of a store by their beginnings, asked for in order, so that one pass over its sorted list will do."""

    def __init__(self, store: Store) -> None:
        self.keys = (entry.key for entry in store.list())
        self.next = next(self.keys, None)

    def beginning(self, start: str) -> set[str]:
        found = set()
        while self.next is not None and self.next[: len(start)] <= start:
            if self.next.startswith(start):
                found.add(self.next)
            self.next = next(self.keys, None)
        return found


def group_of(host: str, groups: int) -> int:
    return int.from_bytes(hashlib.sha256(host.encode()).digest()[:8]) % groups


def interleaved(urls: Iterable[str]) -> tuple[list[str], int]:
    """The URLs with those of a host as far apart as can be, and the number of hosts: no host is asked in a row.

    The first of every host, then the second of every host, and so on; among equals by key.
    """
    turn: dict[str, Iterator[int]] = {}
    ranked = []
    for key, url in sorted((image_key(url), url) for url in urls):
        ranked.append((next(turn.setdefault(host_of(url), count())), key, url))
    return [url for _, _, url in sorted(ranked)], len(turn)


def _parquet(urls: list[str]) -> bytes:
    import pyarrow

    return write_table(pyarrow.table({"url": urls}))


class Spill:
    """Lists of URLs in files on disk, one per number."""

    def __init__(self, folder: Path, lists: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.files: list[IO[Any] | None] = [None] * lists

    def add(self, number: int, url: str) -> None:
        file = self.files[number]
        if file is None:
            file = self.files[number] = (self.folder / str(number)).open("w", buffering=2**14)
        file.write(json.dumps(url) + "\n")  # a URL may hold a line break

    def read(self, number: int) -> Iterator[str]:
        """What was added, in order; nothing more can be added then."""
        file = self.files[number]
        if file is None:
            return
        file.close()
        with (self.folder / str(number)).open() as lines:
            yield from map(json.loads, lines)
        (self.folder / str(number)).unlink()

    def close(self) -> None:
        for file in filter(None, self.files):
            file.close()
