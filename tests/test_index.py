import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import samples

from hpc_mm.config import ConfigError
from hpc_mm.data.schema import Image, Text
from hpc_mm.data.shards import BrokenShard, check_shards, read_index, read_manifest, read_samples
from hpc_mm.data.store import open_store
from hpc_mm.index import index_foreign, index_tar, main

PICTURE = samples.encoded(samples.picture(0), "JPEG")


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_real_tar_is_read_in_place(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(shared_data / "cc12m-32.tar", tmp_path)
    assert main([f"shards={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"indexed 32 samples in 1 shards at {tmp_path}\n"
    store = open_store(str(tmp_path))
    assert check_shards(store) == []
    with tarfile.open(tmp_path / "cc12m-32.tar") as tar:
        files = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    found = list(read_samples(store))
    assert len(found) == 32
    for sample in found:
        image, caption = sample.parts
        assert isinstance(image, Image) and image.data == files[f"{sample.id}.jpg"]
        assert isinstance(caption, Text) and caption.text == files[f"{sample.id}.txt"].decode()
        assert sample.metadata == json.loads(files[f"{sample.id}.json"])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_as_tars_have_them(tmp_path: Path, form: int) -> None:
    long = "folder/" * 14 + "é" * 20  # more than the 100 bytes of a plain header
    members = [
        (f"{long}.JPG", PICTURE),
        (f"{long}.txt", b"one"),
        ("b.c.png", b"no image of b"),
        ("b.webp", PICTURE),
        ("b.caption", b"two"),
        ("__meta__.json", b"{}"),
        ("nosuffix", b"x"),
    ]
    write_tar(tmp_path / "a.tar", members, form)
    index, unusable = index_tar(open_store(str(tmp_path)), "a.tar")
    assert index.keys == [long, "b"] and unusable == []
    assert [member.suffix for member in index.members(1)] == ["c.png", "webp", "caption"]


def test_samples_that_are_no_pairs_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", PICTURE), ("a.txt", b"x"), ("b.jpg", PICTURE), ("c.txt", b"x")])
    assert main([f"shards={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "a.tar: 2 samples without an image and a caption, first b" in said
    assert [sample.id for sample in read_samples(open_store(str(tmp_path)))] == ["a"]


def test_a_cut_tar_is_told_with_its_place(tmp_path: Path) -> None:
    write_tar(tmp_path / "whole.tar", [("a.jpg", PICTURE), ("a.txt", b"x"), ("b.jpg", PICTURE), ("b.txt", b"x")])
    whole = (tmp_path / "whole.tar").read_bytes()
    store = open_store(str(tmp_path))
    end = read_end(whole)
    for cut in [*range(1, 512, 200), *range(512, end, 512), *range(700, end, 1100), end]:
        store.write("cut.tar", whole[:cut])
        with pytest.raises(BrokenShard, match=r"cut.tar"):
            index_tar(store, "cut.tar")
    store.write("cut.tar", whole[: end + 512])
    assert index_tar(store, "cut.tar")[0].keys == ["a", "b"]


def read_end(tar: bytes) -> int:
    """Where the last member's blocks end."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        last = file.getmembers()[-1]
    return last.offset_data + 512


def test_a_broken_header_is_told_with_its_byte(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", b"x" * 512), ("a.txt", b"x"), ("b.jpg", PICTURE)])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1024:1100] = b"\xff" * 76  # the second header
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(BrokenShard, match=r"a.tar is cut or broken at byte 1024"):
        index_tar(open_store(str(tmp_path)), "a.tar")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.jpg", b""), ("b.jpg", b""), ("a.txt", b"")], "files of sample a are not side by side"),
        ([("a.jpg", b""), ("a.jpg", b"")], "sample a has two files .jpg"),
    ],
)
def test_tars_that_are_no_webdataset_are_told(tmp_path: Path, members: list[tuple[str, bytes]], said: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(BrokenShard, match=said):
        index_tar(open_store(str(tmp_path)), "a.tar")


PAIR = [("a.jpg", PICTURE), ("a.txt", b"x")]


def test_broken_tars_are_told_together_and_whole_ones_are_read_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abcd":
        write_tar(tmp_path / f"{name}.tar", PAIR)
    whole = (tmp_path / "a.tar").read_bytes()
    for name in "ac":
        (tmp_path / f"{name}.tar").write_bytes(whole[:700])
    assert main([f"shards={tmp_path}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "a.tar" in said[0] and "c.tar" in said[1]
    assert not (tmp_path / "index.json").exists()
    times = {name: (tmp_path / f"{name}.tar.index.json").stat().st_mtime_ns for name in "bd"}
    for name in "ac":
        (tmp_path / f"{name}.tar").write_bytes(whole)
    write_tar(tmp_path / "d.tar", [*PAIR, ("b.jpg", PICTURE * 30), ("b.txt", b"x")])  # another tar than was indexed
    assert main([f"shards={tmp_path}"]) == 0
    assert "indexed 5 samples in 4 shards" in capsys.readouterr().out
    assert (tmp_path / "b.tar.index.json").stat().st_mtime_ns == times["b"]
    assert check_shards(open_store(str(tmp_path))) == []


def test_an_old_manifest_is_withdrawn_before_indexes_change(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_tar(tmp_path / "a.tar", PAIR)
    index_foreign(store)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(BrokenShard):
        index_foreign(store)
    with pytest.raises(ConfigError, match=r"index.json is missing"):
        read_manifest(store)


def test_our_own_shards_can_be_indexed_again(tmp_path: Path) -> None:
    from hpc_mm.data.shards import ShardWriter

    store = open_store(str(tmp_path))
    with ShardWriter(store, "x") as writer:
        for number in range(4):
            writer.add(samples.document(number))
    before = read_index(store, "x-000000.tar").dump()
    store.delete("x-000000.tar.index.json")
    index_foreign(store)
    assert read_index(store, "x-000000.tar").dump() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "shards=ADDRESS is missing"),
        (["shard=x"], "did you mean shards"),
        (["shards=/nowhere/at/all"], "no folder /nowhere/at/all"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def test_a_folder_without_pairs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"shards={tmp_path}"]) == 2
    assert f"no tars at {tmp_path}" in capsys.readouterr().err
    write_tar(tmp_path / "a.tar", [("c.txt", b"x")])
    assert main([f"shards={tmp_path}"]) == 2
    assert "1 tars at" in capsys.readouterr().err
