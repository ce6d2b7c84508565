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
from hpc_mm.data.cache import ReadCache
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import (
    MANIFEST,
    BrokenShard,
    ShardReader,
    Shards,
    ShardWriter,
    check_shards,
    corpus_digest,
    image_suffix,
    members_of,
    read_index,
    read_manifest,
    read_samples,
)
from hpc_mm.data.store import MissingKey, Store, open_store

facts = st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=2)
roles = st.sampled_from(["", "user", "assistant", "chosen"])
texts = st.builds(Text, st.text(st.characters(exclude_categories=["Cs"]), max_size=20), roles)
images = st.builds(Image, st.binary(max_size=2000), st.none() | st.text("abc", max_size=5), facts, roles)
keyed_images = st.builds(Image, st.none(), st.text("abc", min_size=1, max_size=5), facts, roles)
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


def test_parts_without_roles_are_written_as_before_there_were_any(tmp_path: Path) -> None:
    sample = Sample("a", (Text("x"), Image(b"1", "k", {"url": "u"}), Image(key="m")), {"n": 1})
    ((_, head), _) = members_of(sample)
    assert head == (
        b'{"parts":[{"text":"x"},{"facts":{"url":"u"},"image_key":"k","image":"0.jpg"},{"image_key":"m"}],'
        b'"metadata":{"n":1}}'
    )


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


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": ["a"]},
        {"keys": [1, 2]},
        {"keys": []},
        {"first": [0, 1]},
        {"first": [0, 4, 2]},
        {"first": [0, 0, 4]},
        {"first": [[0, 2, 4]]},
        {"suffix": [0, 1, 2, 9]},
        {"suffixes": []},
        {"start": [0, 2048, 4096]},
        {"start": [-512, 2048, 4096, 6000]},
        {"start": [6000, 2048, 4096, 512]},
        {"size": [1, -5, 1, 1]},
        {"size": [1, 1, 1, 10**9]},
        {"size": [1, 1, 1, 10**30]},
        {"tar_bytes": 5},
        {"tar_bytes": None},
    ],
)
def test_an_index_that_contradicts_itself_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    store = open_store(str(tmp_path))
    values = {"tar_bytes": 10240, "keys": ["a", "b"], "first": [0, 2, 4], "suffixes": ["jpg", "txt"]}
    values |= {"suffix": [0, 1, 0, 1], "start": [512, 2048, 4096, 6000], "size": [1, 1, 1, 1]}
    store.write("a.tar.index.json", json.dumps(values).encode())
    assert read_index(store, "a.tar").keys == ["a", "b"]
    store.write("a.tar.index.json", json.dumps({**values, **changes}).encode())
    with pytest.raises(BrokenShard, match="index the shards again"):
        read_index(store, "a.tar")


def test_an_index_shorter_than_the_manifest_says_is_told(tmp_path: Path) -> None:
    store = write(tmp_path, 3, max_bytes=2**30)
    with pytest.raises(BrokenShard, match=r"shard-000000.tar.index.json has no sample 3: index the shards again"):
        ShardReader(store).read("shard-000000.tar", 3)


def test_a_corpus_is_known_by_its_names_and_counts() -> None:
    def digest(*shards: tuple[str, int, int]) -> str:
        return corpus_digest(Shards(*zip(*shards, strict=True)))

    first, second = ("a.tar", 5, 100), ("b.tar", 6, 100)
    found = digest(first, second)
    assert found == digest(("a.tar", 5, 999), second)
    others = [(second, first), (first,), (("a.tar", 6, 100), ("b.tar", 5, 100)), (("c.tar", 5, 100), second)]
    assert len({found, *(digest(*other) for other in others)}) == 5
    assert (
        found == "ba123b9ac985b2591af27d65f2ece80c3ceb8d0ea861bc664d93608a2c555676"
    )  # checkpoints hold it: it must not change


def test_a_damaged_copy_in_the_cache_is_read_again(tmp_path: Path) -> None:
    store = write(tmp_path / "store", 1)
    cache = ReadCache(tmp_path / "cache", 10**9)
    reader = ShardReader(store, cache=cache)
    assert reader.read("shard-000000.tar", 0).id == "document00000"
    (kept,) = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    good = kept.read_bytes()
    kept.write_bytes(bytes(len(good)))
    assert reader.read("shard-000000.tar", 0).id == "document00000"
    assert kept.read_bytes() == good


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
