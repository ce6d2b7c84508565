"""Index tars of others in place: ``python -m hpc_mm.index shards=ADDRESS`` (any WebDataset tars, img2dataset's say)."""

from __future__ import annotations

import re
import sys
import tarfile
from collections.abc import Iterator, Sequence

from hpc_mm.config import ConfigError, parse_arguments, unknown
from hpc_mm.data.shards import (
    BLOCK,
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    INDEX,
    BrokenShard,
    Member,
    ShardIndex,
    ShardInfo,
    pack_index,
    write_manifest,
)
from hpc_mm.data.store import MissingKey, Store, StoreError, open_store, opened


def index_tar(store: Store, shard: str) -> tuple[ShardIndex, list[str]]:
    """The index of a WebDataset tar, and the keys of samples that are neither ours nor an image with a caption.

    A key is a member's path up to the first dot of its file name; folders and ``__meta__`` members are no samples.
    """
    size = store.size(shard)
    if size is None:
        raise MissingKey(f"{shard}: not in {store.address}")
    where = f"{store.address}/{shard}"
    samples: dict[str, list[Member]] = {}
    last = None
    for key, member in _tar_members(store, shard, size, where):
        if key != last and key in samples:
            raise BrokenShard(f"{where} at byte {member.start}: the files of sample {key} are not side by side")
        if any(other.suffix == member.suffix for other in samples.get(key, [])):
            raise BrokenShard(f"{where} at byte {member.start}: sample {key} has two files .{member.suffix}")
        samples.setdefault(key, []).append(member)
        last = key
    whole = [(key, members) for key, members in samples.items() if _usable(members)]
    return pack_index(size, whole), [key for key, members in samples.items() if not _usable(members)]


def _usable(members: list[Member]) -> bool:
    suffixes = {member.suffix for member in members}
    pair = suffixes.intersection(IMAGE_SUFFIXES) and suffixes.intersection(CAPTION_SUFFIXES)
    return bool(pair) or ("json" in suffixes and all(re.fullmatch(r"json|\d+\.\w+", suffix) for suffix in suffixes))


def _tar_members(store: Store, shard: str, size: int, where: str) -> Iterator[tuple[str, Member]]:
    """(key, member) of every file in the tar; BrokenShard where it is cut or not a tar any more."""
    file, offset = opened(store, shard, size), 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                offset = info.offset_data + info.size
                if offset > size:
                    raise BrokenShard(f"{where} ends at byte {size}, inside {info.name}, which reaches to {offset}")
                folder, _, name = info.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if info.isreg() and suffix and not stem.startswith("__"):
                    key = f"{folder}/{stem}" if folder else stem
                    yield key, Member(suffix.lower(), info.offset_data, offset)
            end = tar.offset
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise BrokenShard(f"{where} is cut or broken at byte {end}: no tar header and no end mark")
    except tarfile.TarError as error:
        raise BrokenShard(f"{where} is cut or broken at byte {offset} or soon after: {error}") from None


def index_foreign(store: Store) -> tuple[list[ShardInfo], dict[str, list[str]]]:
    """Write an index beside every tar of a folder, then the manifest. The shards, and what of each cannot be used.

    Only headers matter, but a tar is read through: a small object store read costs more than its bytes.
    """
    names = [entry.key for entry in store.list() if entry.key.endswith(".tar")]
    if not names:
        raise ConfigError(f"no tars at {store.address}")
    shards, unusable = [], {}
    for name in names:
        index, left = index_tar(store, name)
        store.write(name + INDEX, index.dump())
        shards.append(ShardInfo(name, len(index.keys), index.tar_bytes))
        if left:
            unusable[name] = left
    if not sum(shard.samples for shard in shards):
        raise ConfigError(f"{len(names)} tars at {store.address} hold no sample with an image and a caption")
    write_manifest(store, shards)
    return shards, unusable


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        values = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        for key in values:
            if key != "shards":
                raise unknown("key", key, ["shards"])
        if not values.get("shards"):
            raise ConfigError("shards=ADDRESS is missing: a folder or s3://bucket/prefix with tars")
        shards, unusable = index_foreign(open_store(values["shards"]))
    except (ConfigError, BrokenShard, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    for name, keys in unusable.items():
        print(f"{name}: {len(keys)} samples without an image and a caption, first {keys[0]}")
    print(f"indexed {sum(shard.samples for shard in shards)} samples in {len(shards)} shards at {values['shards']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
