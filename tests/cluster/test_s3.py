import multiprocessing
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import samples

from hpc_mm.config import ConfigError, Loader, Source
from hpc_mm.data.shards import ShardWriter, check_shards, read_samples
from hpc_mm.data.store import MissingKey, Store, StoreError, open_store
from hpc_mm.data.stream import make_loader
from hpc_mm.index import index_foreign


@pytest.fixture
def store(ceph: str) -> Store:
    """An empty place in the bucket."""
    return open_store(f"{ceph}/{uuid.uuid4().hex}")


def test_verbs(store: Store, tmp_path: Path) -> None:
    store.write("a/b.bin", b"0123456789")
    store.write("empty", b"")
    assert store.read("a/b.bin") == b"0123456789" and store.read("empty") == b""
    assert store.read("a/b.bin", 2, 5) == b"234" and store.read("a/b.bin", 8) == b"89"
    assert store.read("a/b.bin", 4, 4) == b""
    assert store.size("a/b.bin") == 10 and store.size("a/c") is None
    large = os.urandom(20 * 2**20)  # more than one part of a multipart upload
    (tmp_path / "file").write_bytes(large)
    store.upload("up", tmp_path / "file")
    store.download("up", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == large == store.read("up")
    assert store.read("up", 9_000_000, 9_000_100) == large[9_000_000:9_000_100]
    store.delete("up")
    store.delete("up")
    assert [(entry.key, entry.size) for entry in store.list()] == [("a/b.bin", 10), ("empty", 0)]
    assert [entry.key for entry in store.list("a/")] == ["a/b.bin"]


def test_what_is_not_there(store: Store, ceph: str, tmp_path: Path) -> None:
    store.write("short", b"abc")
    with pytest.raises(MissingKey, match="nothing: not in"):
        store.read("nothing")
    with pytest.raises(MissingKey):
        store.download("nothing", tmp_path / "x")
    with pytest.raises(StoreError):
        store.read("short", 1, 9)
    with pytest.raises(StoreError):
        store.read("short", 5, 9)
    absent = open_store(f"{ceph}-absent/x")
    (tmp_path / "file").write_bytes(b"x")
    for verb in (
        lambda: absent.read("a"),
        lambda: absent.size("a"),
        lambda: list(absent.list()),
        lambda: absent.write("a", b""),
        lambda: absent.upload("a", tmp_path / "file"),
        lambda: absent.download("a", tmp_path / "y"),
    ):
        with pytest.raises(ConfigError, match="the bucket does not exist"):
            verb()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_wrong_keys_are_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ConfigError, match="the secret key is wrong"):
        open_store(store.address).read("a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(ConfigError, match="the access key is unknown"):
        open_store(store.address).read("a")


def test_lists_of_more_than_a_page_are_whole_and_sorted(store: Store) -> None:
    keys = [f"{'abc'[i % 3]}/{i:04d}" for i in range(1200)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: store.write(key, b""), keys))
    assert [entry.key for entry in store.list()] == sorted(keys)


def read_in_child(store: Store, queue: Any) -> None:
    with ThreadPoolExecutor(4) as threads:
        queue.put(list(threads.map(store.read, [f"{i}" for i in range(20)])))


def test_a_store_goes_on_after_a_fork(store: Store) -> None:
    values = [f"value {i}".encode() for i in range(20)]
    for i, value in enumerate(values):
        store.write(f"{i}", value)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=read_in_child, args=(store, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [store.read(f"{i}") for i in range(20)] == values
    assert [queue.get(timeout=60) for _ in processes] == [values] * 3
    for process in processes:
        process.join()


def test_a_stream_from_ceph_equals_the_one_from_a_folder(store: Store, tmp_path: Path) -> None:
    for place in (store, open_store(str(tmp_path))):
        with ShardWriter(place, "documents", max_bytes=12_000) as writer:
            for number in range(17):
                writer.add(samples.document(number))
        assert check_shards(place) == []
    found = []
    for address, workers in ((store.address, 2), (store.address, 0), (str(tmp_path), 0)):
        source = Source(data=address, form="interleaved", batch=6, max_tokens=40, shuffle_shards=2)
        settings = Loader(workers=workers, reads=4)
        loader = make_loader(source, settings, 3, samples.word_tokenizer(), samples.SPEC, 0, 1, 1, 0, 5)
        found.append([(batch.ids, batch.input_ids.tolist(), batch.images.sum().item()) for (batch,) in loader])
    assert found[0] == found[1] == found[2]


def test_a_real_tar_in_ceph_is_read_in_place(store: Store, shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "cc12m-32.tar", tmp_path)
    store.upload("cc12m-32.tar", tmp_path / "cc12m-32.tar")
    local = open_store(str(tmp_path))
    for place in (store, local):
        index_foreign(place)
    assert list(read_samples(store)) == list(read_samples(local))
    assert check_shards(store) == []
