import errno
import hashlib
import io
import os
import resource
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Picture
from samples import encoded, picture, repeating_scans

from hpc_mm.config import ConfigError, validated
from hpc_mm.data.perceptual import perceptual_hash
from hpc_mm.data.pictures import MAX_PIXELS, MAX_SCANS, ORIENTATION, SCAN, TRANSPOSE, UnreadableImage, opened_picture
from hpc_mm.data.recode import Recode, Room, StoredImage, recode

KEEP = Recode()
RATIO = Recode(resize="keep_ratio", size=32)
MODES = [RATIO, Recode(resize="border", size=32), Recode(resize="center_crop", size=32)]


def opened(stored: StoredImage) -> Picture.Image:
    image = Picture.open(io.BytesIO(stored.data))
    image.load()
    assert image.size == (stored.width, stored.height)
    assert stored.sha256 == hashlib.sha256(stored.data).hexdigest()
    return image


def psnr(one: Picture.Image, other: Picture.Image) -> float:
    """dB; infinite where both are equal."""
    error = np.mean((np.asarray(one).astype(float) - np.asarray(other)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_none_keeps_the_bytes(kind: str) -> None:
    data = encoded(picture(0), kind)
    stored = recode(data, KEEP)
    assert stored == StoredImage(data, 40, 30, 40, 30, hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize(
    ("mode", "width", "height", "size"),
    [
        ("keep_ratio", 640, 480, (341, 256)),
        ("keep_ratio", 480, 640, (256, 341)),
        ("keep_ratio", 255, 900, (255, 900)),
        ("border", 640, 480, (256, 256)),
        ("border", 100, 50, (256, 256)),
        ("border", 2000, 40, (256, 256)),
        ("center_crop", 640, 480, (256, 256)),
        ("center_crop", 300, 100, (256, 256)),
    ],
)
def test_sizes(mode: str, width: int, height: int, size: tuple[int, int]) -> None:
    stored = recode(encoded(picture(1, width, height), "JPEG"), Recode.model_validate({"resize": mode}))
    assert opened(stored).size == size
    assert (stored.original_width, stored.original_height) == (width, height)


def test_border_shows_the_whole_picture_on_white_and_centre_crop_its_middle() -> None:
    halves = Picture.new("RGB", (600, 200), "red")
    halves.paste("blue", (200, 0, 400, 200))
    border = np.asarray(opened(recode(encoded(halves), Recode(resize="border", size=60))))
    assert border[:18].min() > 240 and border[42:].min() > 240
    assert (border[30, 5, 0], border[30, 5, 2]) > (200, 0) and border[30, 30, 2] > 200
    crop = np.asarray(opened(recode(encoded(halves), Recode(resize="center_crop", size=60))))
    assert crop[..., 2].min() > 150 and crop[..., 0].max() < 100
    small = np.asarray(opened(recode(encoded(Picture.new("RGB", (20, 10))), Recode(resize="center_crop", size=60))))
    assert small[30, 30].max() < 15 and small[20].min() > 240 and small[:, 15].min() > 240


@pytest.mark.parametrize("options", MODES, ids=lambda options: options.resize)
def test_a_jpeg_that_is_as_wanted_keeps_its_bytes(options: Recode) -> None:
    data = encoded(picture(2, 32, 32), "JPEG", quality=40)
    assert recode(data, options).data == data
    assert recode(encoded(picture(2, 32, 32), "PNG"), options).data[:2] == b"\xff\xd8"
    with pytest.raises(UnreadableImage):
        recode(data[:-20], options)


def test_nothing_is_enlarged() -> None:
    stored = recode(encoded(picture(3, 20, 10)), RATIO)
    assert opened(stored).size == (20, 10)


def real_images(folder: Path) -> list[bytes]:
    with tarfile.open(folder / "cc12m-32.tar") as tar:
        return [tar.extractfile(info).read() for info in tar if info.name.endswith(".jpg")]  # type: ignore[union-attr]


@pytest.mark.parametrize(("size", "least"), [(256, 41.5), (128, 47.5), (100, 50.0)])
def test_real_images_are_as_close_to_lanczos_as_by_opencvs_area(shared_data: Path, size: int, least: float) -> None:
    """Mean PSNR of INTER_AREA on these images: 41.6 dB at 256 pixels, 39.0 at 128, 38.3 at 100."""
    from hpc_mm.data.recode import shrunk, sizes

    found = []
    for data in real_images(shared_data):
        image = Picture.open(io.BytesIO(data))
        target, _ = sizes(image.size, Recode(resize="keep_ratio", size=size))
        expected = image.convert("RGB").resize(target, Picture.Resampling.LANCZOS)
        found.append(psnr(shrunk(Picture.open(io.BytesIO(data)), target), expected))
    print(f"{size} px: mean PSNR {np.mean(found):.1f} dB, least {min(found):.1f} dB")
    assert np.mean(found) >= least


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("options", MODES, ids=lambda options: options.resize)
def test_exif_turns_are_applied(turn: int, options: Recode) -> None:
    upright = picture(4, 200, 150)
    back = {6: 8, 8: 6}.get(turn, turn)  # the turn that undoes this one
    exif = Picture.Exif()
    exif[ORIENTATION] = turn
    data = encoded(upright.transpose(TRANSPOSE[back]) if back in TRANSPOSE else upright, "JPEG", quality=95, exif=exif)
    stored = recode(data, options)
    expected = opened(recode(encoded(upright, "PNG"), options))
    assert (stored.original_width, stored.original_height) == (200, 150)
    assert opened(stored).getexif().get(ORIENTATION) is None
    assert psnr(opened(stored), expected) > 30
    kept = recode(data, KEEP)
    assert kept.data == data and (kept.width, kept.height) == (200, 150)


def test_metadata_does_not_travel() -> None:
    exif = Picture.Exif()
    exif[0x010E] = "private"
    stored = recode(encoded(picture(5, 90, 90), "JPEG", exif=exif, comment=b"private", icc_profile=b"private"), RATIO)
    assert b"private" not in stored.data


@pytest.mark.parametrize("options", MODES, ids=lambda options: options.resize)
def test_transparent_is_white(options: Recode) -> None:
    for kind in ("PNG", "WEBP", "GIF"):
        image = opened(recode(encoded(Picture.new("RGBA", (64, 48), (0, 0, 0, 0)), kind), options))
        assert image.mode == "RGB" and np.asarray(image).min() >= 254


def test_cmyk_grey_palette_and_16_bits_become_rgb() -> None:
    base = picture(6, 64, 48)
    expected = opened(recode(encoded(base), RATIO))
    cmyk = recode(encoded(base.convert("CMYK"), "JPEG", quality=95), RATIO)
    assert opened(cmyk).mode == "RGB" and psnr(opened(cmyk), expected) > 25
    grey = base.convert("L")
    wide = Picture.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert wide.mode.startswith("I")
    expected = opened(recode(encoded(grey), RATIO))
    for image in (wide, grey.convert("P")):
        assert opened(recode(encoded(image), RATIO)).mode == "RGB"
        assert psnr(opened(recode(encoded(image), RATIO)), expected) > 35
    small = encoded(Picture.new("CMYK", (8, 8)), "JPEG")
    assert opened(recode(small, RATIO)).mode == "RGB" and recode(small, KEEP).data == small


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Picture.new("RGB", (64, 48), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert recode(data, KEEP).data == data
    red, green, blue = np.asarray(opened(recode(data, RATIO))).reshape(-1, 3).mean(0)
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("options", [KEEP, *MODES], ids=lambda options: options.resize)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"<!doctype html><html><body>Not found</body></html>",
        b"\xff\xd8\xff\xe0<html>" + b" " * 4000,
        bytes(5000),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
    ids=["zero bytes", "three bytes", "html", "html after a JPEG mark", "zeros", "svg"],
)
def test_what_is_no_picture_is_refused_with_one_reason(data: bytes, options: Recode) -> None:
    reasons = set()
    for _ in range(2):
        with pytest.raises(UnreadableImage) as caught:
            recode(data, options)
        reasons.add(str(caught.value))
    assert len(reasons) == 1 and "0x" not in reasons.pop()


@settings(max_examples=80)
@given(cut=st.integers(1, 400), progressive=st.booleans(), subsampling=st.sampled_from([0, 2]))
def test_a_jpeg_without_its_last_bytes_is_refused(cut: int, progressive: bool, subsampling: int) -> None:
    data = encoded(picture(7, 61, 43), "JPEG", quality=90, progressive=progressive, subsampling=subsampling)
    for options in (KEEP, RATIO):
        with pytest.raises(UnreadableImage):
            recode(data[: len(data) - min(cut, len(data))], options)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "AVIF"])
def test_half_of_a_file_is_refused(kind: str) -> None:
    data = encoded(picture(7, 200, 150), kind)
    with pytest.raises(UnreadableImage):
        recode(data[: len(data) // 2], KEEP)


def test_a_bomb_is_refused_by_its_header() -> None:
    side = 20_000
    bomb = encoded(Picture.new("1", (side, side)))  # 400 megapixels in 50 kB
    for options in (KEEP, RATIO):
        with pytest.raises(UnreadableImage, match=r"megapixels|DecompressionBomb"):
            recode(bomb, options)
    half = Recode(max_pixels=640 * 480 - 1)
    with pytest.raises(UnreadableImage, match="640 x 480 pixels are more"):
        recode(encoded(picture(0, 640, 480), "JPEG"), half)
    with pytest.raises(ConfigError, match="max_pixels"):
        validated(Recode, {"max_pixels": MAX_PIXELS + 1})


def test_a_jpeg_that_repeats_its_scans_is_refused() -> None:
    bomb = repeating_scans(MAX_SCANS)
    for read in (lambda: recode(bomb, KEEP), lambda: recode(bomb, RATIO), lambda: perceptual_hash(bomb)):
        with pytest.raises(UnreadableImage, match="110 scans of a JPEG are more than 100"):
            read()
    some = repeating_scans(20)
    assert recode(some, KEEP).data == some
    other = encoded(picture(0)) + SCAN * 200
    assert recode(other, KEEP).data == other, "no JPEG"


def test_pictures_that_are_decoded_at_once_have_no_more_pixels_than_there_is_room_for() -> None:
    images = [encoded(picture(seed, side, side)) for seed, side in enumerate([10, 50, 100, 20, 100, 70] * 4)]
    room, lock, inside, seen = Room(100 * 100), threading.Lock(), list[int](), list[int]()

    def watched(data: bytes) -> StoredImage:
        with room.lease() as wait:
            stored = recode(data, RATIO, wait)
            pixels = stored.original_width * stored.original_height
            with lock:
                inside.append(pixels)
                seen.append(sum(inside))
            time.sleep(0.002)
            with lock:
                inside.remove(pixels)
            return stored

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(watched, images))
    assert found == [recode(data, RATIO) for data in images]
    assert len(seen) == len(images) and max(seen) == 100 * 100 == room.free


def test_a_large_picture_does_not_wait_for_all_small_ones() -> None:
    room, order = Room(100), list[int]()

    def take(pixels: int) -> None:
        with room.lease() as wait:
            wait(pixels)
            order.append(pixels)

    threads = [threading.Thread(target=take, args=(pixels,)) for pixels in (100, 10)]
    with room.lease() as wait:
        wait(60)
        threads[0].start()
        while not room.turn.locked():
            time.sleep(0.001)
        threads[1].start()
        threads[1].join(0.2)
    for thread in threads:
        thread.join()
    assert order == [100, 10]


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """So much of one of this process's resources."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_machine_without_descriptors_is_not_the_pictures_fault() -> None:
    data = encoded(picture(4, 90, 90), "JPEG")
    expected = recode(data, RATIO)
    with limited(resource.RLIMIT_NOFILE, 0), pytest.raises(OSError, match="Too many open files"):
        recode(data, RATIO)
    assert recode(data, RATIO) == expected
    with pytest.raises(OSError, match="Too many open files"), opened_picture(data):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_machine_without_memory_is_not_the_pictures_fault() -> None:
    """In a new process, whose memory is its own. libjpeg says nothing else of it than of broken data."""
    large = Picture.new("RGB", (4000, 3000), "gray")
    cases = [encoded(large, "JPEG", progressive=True), encoded(large)]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(without_memory, cases).result()
    assert found == [MemoryError] * 4 + [UnreadableImage]


def without_memory(cases: list[bytes]) -> list[type[Exception]]:
    """What comes of pictures, and of half a small one beside them; all but that are pictures with memory again."""
    small = encoded(picture(1, 60, 60), "JPEG")
    tries = [(data, options) for data in cases for options in (KEEP, RATIO)]
    recode(small, RATIO)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    found: list[type[Exception]] = []
    with limited(resource.RLIMIT_AS, used + 30 * 2**20):
        for data, options in [*tries, (small[: len(small) // 2], KEEP)]:
            try:
                recode(data, options)
            except (MemoryError, UnreadableImage) as error:
                found.append(MemoryError if isinstance(error, MemoryError) else UnreadableImage)
    for data, options in tries:
        recode(data, options)
    return found


def test_threads_give_the_same_bytes() -> None:
    images = [encoded(picture(seed, 320, 240), "JPEG") for seed in range(8)]
    expected = [recode(data, RATIO) for data in images] * 4
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda data: recode(data, RATIO), images * 4)) == expected


@settings(max_examples=80)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_damaged_bytes_are_a_picture_or_unreadable(kind: str, places: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(picture(8), kind))
    for place, value in places:
        data[int(place * len(data))] = value
    try:
        opened(recode(bytes(data), MODES[1]))
    except UnreadableImage as reason:
        assert str(reason)


def test_none_can_be_said_on_a_command_line() -> None:
    assert Recode.model_validate({"resize": None}) == Recode(resize="none")
