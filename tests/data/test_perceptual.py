import io
import tarfile
from pathlib import Path

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture
from samples import encoded, picture

from hpc_mm.config import ConfigError
from hpc_mm.data.perceptual import (
    MAX_DISTANCE,
    NearHashes,
    hamming_distance,
    perceptual_hash,
    read_hashes,
    write_hashes,
)
from hpc_mm.data.pictures import ORIENTATION, UnreadableImage
from hpc_mm.data.recode import Recode, recode
from hpc_mm.data.store import open_store

Hash = st.integers(0, 2**64 - 1)


def theirs(image: Picture.Image) -> str:
    return str(imagehash.phash(image))


def real_images(folder: Path) -> list[bytes]:
    with tarfile.open(folder / "cc12m-32.tar") as tar:
        return [tar.extractfile(info).read() for info in tar if info.name.endswith(".jpg")]  # type: ignore[union-attr]


def test_is_the_imagehash_librarys_value_on_real_images(shared_data: Path) -> None:
    for data in real_images(shared_data):
        assert f"{perceptual_hash(data):016x}" == theirs(Picture.open(io.BytesIO(data)).convert("RGB"))


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), width=st.integers(8, 200), height=st.integers(8, 200), grey=st.booleans())
def test_is_the_imagehash_librarys_value(seed: int, width: int, height: int, grey: bool) -> None:
    image = picture(seed, width, height).convert("L" if grey else "RGB")
    assert f"{perceptual_hash(encoded(image)):016x}" == theirs(image)


def test_a_smaller_copy_is_near_and_another_picture_is_far(shared_data: Path) -> None:
    images = real_images(shared_data)
    hashes = [perceptual_hash(data) for data in images]
    copies = [perceptual_hash(recode(data, Recode(resize="keep_ratio", size=128, quality=60)).data) for data in images]
    assert max(map(hamming_distance, hashes, copies)) <= 4
    others = [hamming_distance(one, other) for i, one in enumerate(hashes) for other in hashes[:i]]
    assert min(others) > MAX_DISTANCE


def test_is_of_the_upright_picture_on_white() -> None:
    upright = picture(3, 120, 90)
    exif = Picture.Exif()
    exif[ORIENTATION] = 6
    assert perceptual_hash(encoded(upright.transpose(Picture.Transpose.ROTATE_90), exif=exif)) == perceptual_hash(
        encoded(upright)
    )
    clear = Picture.new("RGBA", (120, 90), (0, 0, 0, 0))
    clear.paste(upright.crop((0, 0, 60, 90)), (0, 0))
    white = Picture.new("RGB", (120, 90), "white")
    white.paste(upright.crop((0, 0, 60, 90)), (0, 0))
    assert perceptual_hash(encoded(clear)) == perceptual_hash(encoded(white))


def test_no_picture_has_no_hash() -> None:
    for data in (b"", b"<html>", encoded(picture(0), "JPEG")[:-30]):
        with pytest.raises(UnreadableImage):
            perceptual_hash(data)


def test_distance() -> None:
    assert hamming_distance(0, 2**64 - 1) == 64
    assert hamming_distance(0b1010, 0b0110) == 2


@settings(max_examples=200)
@given(
    known=st.lists(Hash, max_size=20),
    near=st.lists(st.tuples(st.integers(0, 19), st.sets(st.integers(0, 63), max_size=MAX_DISTANCE + 3)), max_size=20),
    far=st.lists(Hash, max_size=5),
    distance=st.integers(0, MAX_DISTANCE),
)
def test_finds_what_brute_force_finds(
    known: list[int], near: list[tuple[int, set[int]]], far: list[int], distance: int
) -> None:
    """Queries are known hashes with some bits turned, and any others."""
    turned = [known[i % len(known)] ^ sum(1 << bit for bit in bits) for i, bits in near if known]
    index = NearHashes(np.array(known, dtype=np.uint64), distance)
    for query in turned + far:
        assert index.near(query) == any(hamming_distance(query, other) <= distance for other in known)


def test_finds_what_brute_force_finds_among_many() -> None:
    draw = np.random.default_rng(0)
    known = draw.integers(0, 2**64, 20_000, dtype=np.uint64)
    bits = [draw.permutation(64)[:count] for count in np.arange(400) % 20]
    flips = np.array([sum(1 << int(bit) for bit in chosen) for chosen in bits], dtype=np.uint64)
    queries = known[: len(flips)] ^ flips
    for distance in (0, 3, 4, 8, 11, 12, MAX_DISTANCE):
        index = NearHashes(known, distance)
        expected = [bool((np.bitwise_count(known ^ query) <= distance).any()) for query in queries]
        assert [index.near(int(query)) for query in queries] == expected
        assert 0 < sum(expected) < len(queries)


def test_a_distance_that_means_nothing_is_refused() -> None:
    for distance in (-1, MAX_DISTANCE + 1):
        with pytest.raises(ValueError, match="0 to 15 bits"):
            NearHashes(np.zeros(1, dtype=np.uint64), distance)


def test_a_file_of_hashes(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_hashes(store, "hashes/coco.npy", [7, 2**64 - 1, 7, 0])
    assert read_hashes(store, "hashes/coco.npy").tolist() == [0, 7, 2**64 - 1]
    write_hashes(store, "none.npy", [])
    assert read_hashes(store, "none.npy").tolist() == []
    one = store.read("hashes/coco.npy")
    write_hashes(store, "hashes/coco.npy", [0, 2**64 - 1, 7])
    assert store.read("hashes/coco.npy") == one


def test_what_is_no_file_of_hashes_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    floats = io.BytesIO()
    np.save(floats, np.zeros(3))
    for data in (b"", b"hello", file.getvalue(), floats.getvalue(), floats.getvalue()[:-4]):
        store.write("bad.npy", data)
        with pytest.raises(ConfigError, match="no file of hashes"):
            read_hashes(store, "bad.npy")
    with pytest.raises(ConfigError, match="no hashes at"):
        read_hashes(store, "missing.npy")
