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
    MANIFEST,
    BrokenShard,
    Member,
    ShardIndex,
    ShardInfo,
    pack_index,
    read_index,
    write_manifest,
)
from hpc_mm.data.store import Entry, MissingKey, Store, StoreError, open_store, opened


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


def old_index(store: Store, tar: Entry) -> ShardIndex | None:
    """The index that lies beside a tar, if it is one and for as many bytes."""
    try:
        index = read_index(store, tar.key)
    except (MissingKey, BrokenShard):
        return None
    return index if index.tar_bytes == tar.size else None


def index_foreign(store: Store) -> tuple[list[ShardInfo], dict[str, list[str]]]:
    """Write an index beside every tar of a folder, then the manifest. The shards, and what of each cannot be used.

    Only headers matter, but a tar is read through: a small object store read costs more than its bytes. So a tar that
    has an index of its size is not read again, and the second of two runs does what the first left. BrokenShard after
    all tars, with a line for each that is broken; there is no manifest then.
    """
    tars = [entry for entry in store.list() if entry.key.endswith(".tar")]
    if not tars:
        raise ConfigError(f"no tars at {store.address}")
    store.delete(MANIFEST)  # from here on the folder is not what an older manifest says
    shards, unusable, broken = [], {}, []
    for tar in tars:
        index = old_index(store, tar)
        if index is None:
            try:
                index, left = index_tar(store, tar.key)
            except BrokenShard as error:
                broken.append(str(error))
                continue
            store.write(tar.key + INDEX, index.dump())
            if left:
                unusable[tar.key] = left
        shards.append(ShardInfo(tar.key, len(index.keys), index.tar_bytes))
    if broken:
        raise BrokenShard("\n".join(broken))
    if not sum(shard.samples for shard in shards):
        raise ConfigError(f"{len(tars)} tars at {store.address} hold no sample with an image and a caption")
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
