import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_mm.config import ConfigError
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import (
    MANIFEST,
    BrokenShard,
    ShardReader,
    ShardWriter,
    check_shards,
    image_suffix,
    read_index,
    read_manifest,
    read_samples,
)
from hpc_mm.data.store import MissingKey, Store, open_store

facts = st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=2)
texts = st.builds(Text, st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
images = st.builds(Image, st.binary(max_size=2000), st.none() | st.text("abc", max_size=5), facts)
keyed_images = st.builds(Image, st.none(), st.text("abc", min_size=1, max_size=5), facts)
bodies = st.tuples(st.lists(texts | images | keyed_images, max_size=5), facts)


@settings(max_examples=40)
@given(found=st.lists(bodies, min_size=1, max_size=8), max_bytes=st.sampled_from([1, 4000, 2**20]))
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, found: list[tuple[list[Any], dict[str, Any]]], max_bytes: int
) -> None:
    written = [Sample(f"s-{i}", tuple(parts), metadata) for i, (parts, metadata) in enumerate(found)]
    store = open_store(str(tmp_path_factory.mktemp("shards")))
    with ShardWriter(store, "some", max_bytes) as writer:
        for sample in written:
            writer.add(sample)
    assert list(read_samples(store)) == written
    assert check_shards(store) == []
    shards = read_manifest(store)
    assert sum(shard.samples for shard in shards) == len(written)
    if max_bytes == 1:
        assert [shard.name for shard in shards] == [f"some-{i:06d}.tar" for i in range(len(written))]


def write(folder: Path, count: int = 5, max_bytes: int = 8000) -> Store:
    store = open_store(str(folder))
    with ShardWriter(store, "shard", max_bytes) as writer:
        for number in range(count):
            writer.add(samples.document(number))
    return store


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    import webdataset

    store = write(tmp_path, 6, max_bytes=2**30)
    name = read_manifest(store)[0].name
    with open(tmp_path / name, "rb") as file:
        members = webdataset.tariterators.tar_file_expander([{"url": name, "stream": file}])
        found = [
            {**entry, "json": json.loads(entry["json"])} for entry in webdataset.tariterators.group_by_keys(members)
        ]
    assert [entry["__key__"] for entry in found] == [f"document{number:05d}" for number in range(6)]
    for number, entry in enumerate(found):
        expected = samples.document(number)
        assert [part["text"] for part in entry["json"]["parts"] if "text" in part] == [
            part.text for part in expected.parts if isinstance(part, Text)
        ]
        assert set(entry) - {"__key__", "__url__"} == {"json", "0.png", "1.png", "2.png"}


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_sample_is_one_ranged_read(tmp_path: Path) -> None:
    class Counting:
        def __init__(self, store: Store) -> None:
            self.store, self.address, self.reads = store, store.address, []

        def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
            self.reads.append((key, start, end))
            return self.store.read(key, start, end)

    store = Counting(write(tmp_path))
    reader = ShardReader(store)  # type: ignore[arg-type]
    shard = read_manifest(store)[0]  # type: ignore[arg-type]
    store.reads.clear()
    for sample in range(shard.samples):
        reader.read(shard.name, sample)
    assert [key for key, _, _ in store.reads] == [shard.name + ".index.json"] + [shard.name] * shard.samples


def test_threads_share_one_read_of_an_index(tmp_path: Path) -> None:
    store = write(tmp_path, 20)
    reader = ShardReader(store, indexes=2)
    places = [(shard.name, i) for shard in read_manifest(store) for i in range(shard.samples)] * 5
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda place: reader.read(*place).id, places))
    assert found == [f"document{number:05d}" for number in range(20)] * 5
    assert len(reader._found) <= 2


def test_a_failed_index_is_tried_again(tmp_path: Path) -> None:
    store = write(tmp_path)
    name = read_manifest(store)[0].name
    index = store.read(name + ".index.json")
    reader = ShardReader(store)
    store.delete(name + ".index.json")
    with pytest.raises(MissingKey):
        reader.read(name, 0)
    store.write(name + ".index.json", b"{}")
    with pytest.raises(BrokenShard, match=r"is no shard index"):
        reader.read(name, 0)
    store.write(name + ".index.json", index)
    assert reader.read(name, 0).id == "document00000"


def test_bytes_that_are_no_sample_are_told(tmp_path: Path) -> None:
    store = write(tmp_path)
    name = read_manifest(store)[0].name
    size = store.size(name)
    store.write(name, b"\0" * size)
    with pytest.raises(BrokenShard, match="sample document00000"):
        ShardReader(store).read(name, 0)


@pytest.mark.parametrize("sample_id", ["", "a.b", "a/b", "a b", "é"])
def test_ids_that_a_tar_key_cannot_hold_are_refused(tmp_path: Path, sample_id: str) -> None:
    writer = ShardWriter(open_store(str(tmp_path)), "x")
    with pytest.raises(ValueError, match="only letters, digits"):
        writer.add(Sample(sample_id, ()))
    writer.add(Sample("same", ()))
    with pytest.raises(ValueError, match="is in this shard already"):
        writer.add(Sample("same", ()))
    writer.close()


def test_a_failed_writer_declares_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(RuntimeError), ShardWriter(store, "x", max_bytes=1) as writer:
        writer.add(samples.pair(0))
        raise RuntimeError
    with pytest.raises(ConfigError, match=r"index.json is missing \(preparing was not finished"):
        read_manifest(store)


def test_writing_again_withdraws_the_old_manifest_first(tmp_path: Path) -> None:
    store = write(tmp_path)
    writer = ShardWriter(store, "shard", max_bytes=1)
    writer.add(samples.pair(0))
    assert store.size(MANIFEST) is None
    writer.close()
    assert [sample.id for sample in read_samples(store)] == ["pair00000"]


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"", "is no list of shards"),
        (b"[1]", "is no list of shards"),
        (b"[]", "hold no samples"),
        (b'[{"name": "a.tar", "samples": 0, "bytes": 1}]', "hold no samples"),
    ],
)
def test_a_manifest_without_shards_is_told(tmp_path: Path, manifest: bytes, said: str) -> None:
    store = open_store(str(tmp_path))
    store.write(MANIFEST, manifest)
    with pytest.raises(ConfigError, match=said):
        read_manifest(store)


def test_missing_and_changed_shards_are_found_before_training(tmp_path: Path) -> None:
    store = write(tmp_path, 12)
    first, second, third = (shard.name for shard in read_manifest(store)[:3])
    os.truncate(tmp_path / first, 512)
    os.remove(tmp_path / second)
    os.remove(tmp_path / (third + ".index.json"))
    problems = check_shards(store)
    assert len(problems) == 3
    assert f"{first} has 512 bytes, its index says" in problems[0]
    assert f"{second} is missing" in problems[1]
    assert f"{third}.index.json is missing" in problems[2]


def test_suffixes_follow_the_bytes() -> None:
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("GIF", "gif"), ("WEBP", "webp"), ("AVIF", "avif")):
        assert image_suffix(samples.encoded(samples.picture(0), kind)) == suffix
    assert image_suffix(b"") == "jpg"


def test_the_index_tells_where_the_tar_has_its_members(tmp_path: Path) -> None:
    store = write(tmp_path, 4, max_bytes=2**30)
    shard = read_manifest(store)[0]
    index = read_index(store, shard.name)
    with tarfile.open(tmp_path / shard.name) as tar:
        expected = [(info.name, info.offset_data, info.offset_data + info.size) for info in tar]
    found = [
        (f"{key}.{member.suffix}", member.start, member.end)
        for i, key in enumerate(index.keys)
        for member in index.members(i)
    ]
    assert found == expected
    assert json.loads(store.read(shard.name + ".index.json"))["tar_bytes"] == shard.bytes
