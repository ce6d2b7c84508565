import multiprocessing
import os
from pathlib import Path

import pytest

from hpc_mm.data.cache import DRAWERS, ReadCache
from hpc_mm.data.store import FolderStore, MissingKey, open_store


class Counting(FolderStore):
    """A folder that counts its reads."""

    reads = 0

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        type(self).reads += 1
        return super().read(key, start, end)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_second_read_comes_from_the_folder(tmp_path: Path) -> None:
    store = Counting(str(tmp_path / "store"))
    store.write("key", b"0123456789")
    cache = ReadCache(tmp_path / "cache", 10**6)
    Counting.reads = 0
    for _ in range(2):
        assert cache.read(store, "key", 2, 5, 10) == b"234"
        assert cache.read(store, "key", 2, 6, 10) == b"2345"
    assert Counting.reads == 2


def test_a_damaged_file_is_read_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.write("key", b"0123456789")
    cache = ReadCache(tmp_path / "cache", 10**6)
    cache.read(store, "key", 0, 10, 10)
    (kept,) = files(tmp_path / "cache")
    kept.write_bytes(b"012")
    assert cache.read(store, "key", 0, 10, 10) == b"0123456789" == kept.read_bytes()


def test_what_was_kept_of_another_version_or_dropped_is_read_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    cache = ReadCache(tmp_path / "cache", 10**6)
    store.write("key", b"0123456789")
    assert cache.read(store, "key", 0, 5, 10) == b"01234"
    store.write("key", b"abcdefghijkl")
    assert cache.read(store, "key", 0, 5, 12) == b"abcde"
    assert cache.read(store, "key", 0, 5, 10) == b"01234"
    for _ in range(2):
        cache.drop(store, "key", 0, 5, 10)
    assert cache.read(store, "key", 0, 5, 10) == b"abcde"


def test_the_limit_holds_and_too_large_values_are_not_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.write("key", os.urandom(3000))
    cache = ReadCache(tmp_path / "cache", 1000 * DRAWERS)
    for start in range(1000):
        cache.read(store, "key", start, start + 400, 3000)
        cache.read(store, "key", start, start + 1001, 3000)
    sizes = [path.stat().st_size for path in files(tmp_path / "cache")]
    assert set(sizes) == {400} and DRAWERS < len(sizes) <= 2 * DRAWERS  # two fit into a drawer


def test_errors_of_the_store_come_through_and_a_full_disk_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path / "store"))
    store.write("key", b"0123456789")
    with pytest.raises(MissingKey):
        ReadCache(tmp_path / "cache", 10**6).read(store, "absent", 0, 5, 10)
    (tmp_path / "file").write_bytes(b"")
    assert ReadCache(tmp_path / "file" / "below", 10**6).read(store, "key", 0, 5, 10) == b"01234"
    assert "keeps nothing" in caplog.text


def read_all(cache: ReadCache, address: str, wrong: "multiprocessing.Queue[int]") -> None:
    store = open_store(address)
    whole = store.read("key")
    places = [start for start in range(0, 2000, 7)] * 3
    wrong.put(sum(cache.read(store, "key", start, start + 300, 3000) != whole[start : start + 300] for start in places))


def test_processes_share_it(tmp_path: Path) -> None:
    """Three processes with room for one file per drawer: every read evicts what another may be reading."""
    store = open_store(str(tmp_path / "store"))
    store.write("key", os.urandom(3000))
    wrong: multiprocessing.Queue[int] = multiprocessing.Queue()
    cache = ReadCache(tmp_path / "cache", 300 * DRAWERS)
    processes = [multiprocessing.Process(target=read_all, args=(cache, store.address, wrong)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [wrong.get(timeout=60) for _ in processes] == [0, 0, 0]
    for process in processes:
        process.join()
    assert not [path for path in files(tmp_path / "cache") if path.name.startswith(".")]
