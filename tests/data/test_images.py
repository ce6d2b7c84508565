import io
import resource
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as Picture
from samples import SPEC, encoded, picture, repeating_scans

from hpc_mm.config import ImageSpec
from hpc_mm.data.batch import normalised
from hpc_mm.data.images import decode
from hpc_mm.data.pictures import MAX_PIXELS, ORIENTATION, TRANSPOSE, UnreadableImage


def spec(size: int) -> ImageSpec:
    return ImageSpec(size, SPEC.mean, SPEC.std)


def padding(size: int) -> ImageSpec:
    return ImageSpec(size, SPEC.mean, SPEC.std, square="pad")


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """dB; infinite where both are equal."""
    error = np.mean((one.astype(float) - other) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def real_images(folder: Path) -> list[bytes]:
    with tarfile.open(folder / "cc12m-32.tar") as tar:
        return [tar.extractfile(info).read() for info in tar if info.name.endswith(".jpg")]  # type: ignore[union-attr]


def reference(data: bytes, size: int) -> NDArray[np.uint8]:
    """The picture as open_clip's evaluation transform gives it before normalising: Pillow's bicubic, centre cut."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    transform = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])
    return np.asarray(transform(Picture.open(io.BytesIO(data)).convert("RGB")))


def assert_equals_pillow(data: bytes, size: int, levels: int = 1) -> None:
    """To one level: both compute in whole numbers, of 16 and of 32 bits."""
    assert np.abs(decode(data, spec(size)).astype(int) - reference(data, size)).max() <= levels


@settings(max_examples=60)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.sampled_from([1, 7, 16, 32]))
def test_equals_pillows_bicubic(width: int, height: int, size: int) -> None:
    if max(width, height) > 50 * min(width, height):
        return
    levels = 2 if size > min(width, height) else 1  # weights of an enlarged picture are rounded twice
    assert_equals_pillow(encoded(picture(width * 100 + height, width, height)), size, levels)


def test_equals_open_clips_transform_on_real_images(shared_data: Path) -> None:
    from open_clip.transform import image_transform

    transform = image_transform(224, is_train=False, mean=SPEC.mean, std=SPEC.std)
    for data in real_images(shared_data):
        assert_equals_pillow(data, 224)
        theirs = transform(Picture.open(io.BytesIO(data)))
        ours = normalised([decode(data, spec(224))], spec(224))[0]
        assert (ours - theirs).abs().max() <= 1.001 / 255 / min(SPEC.std)


# ---------------------------------------------------------------- padded to a square


def padded(image: Picture.Image) -> Picture.Image:
    """On a square of the mean colour, the smaller half of an odd border on the left or top."""
    side = max(image.size)
    square = Picture.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def padded_reference(data: bytes, size: int) -> NDArray[np.uint8]:
    """The padded picture as Pillow resizes it."""
    return np.asarray(padded(Picture.open(io.BytesIO(data)).convert("RGB")).resize((size, size), 3))


@settings(max_examples=80)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.sampled_from([1, 7, 16, 32]))
def test_padding_equals_pillows_bicubic(width: int, height: int, size: int) -> None:
    if max(width, height) > 50 * min(width, height):
        return
    data = encoded(picture(width * 100 + height, width, height))
    found = decode(data, padding(size)).astype(int)
    levels = 2 if size > min(width, height) else 1
    assert found.shape == (size, size, 3) and np.abs(found - padded_reference(data, size)).max() <= levels


def test_padding_equals_clips_image_processor_on_real_images(shared_data: Path) -> None:
    from transformers import CLIPImageProcessorPil

    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    processor = CLIPImageProcessorPil(**sizes)
    for data in real_images(shared_data)[::2]:
        image = Picture.open(io.BytesIO(data)).convert("RGB")
        if max(image.size) >= 1.5 * 2 * 336:
            continue  # by draft
        theirs = processor(padded(image), return_tensors="pt")["pixel_values"][0]
        ours = normalised([decode(data, padding(336))], padding(336))[0]
        assert (ours - theirs).abs().max() <= 2.001 / 255 / min(SPEC.std)  # two levels at a few sharp edges


def test_a_square_picture_has_no_border() -> None:
    data = encoded(picture(1, 60, 60))
    assert np.array_equal(decode(data, padding(32)), decode(data, spec(32)))


@pytest.mark.parametrize(("width", "height"), [(60, 41), (41, 60), (330, 241)])
@pytest.mark.parametrize("turn", range(1, 9))
def test_padding_is_of_the_upright_picture(width: int, height: int, turn: int) -> None:
    """Though it is the stored picture that is padded. After a quarter turn height is resized before width."""
    levels = 1 if turn <= 4 else 8  # overshoot beyond 255 is lost between the two
    upright = picture(3, width, height)
    back = {5: 5, 6: 8, 7: 7, 8: 6}.get(turn, turn)
    stored = upright.transpose(TRANSPOSE[back]) if back in TRANSPOSE else upright
    exif = Picture.Exif()
    exif[ORIENTATION] = turn
    for size in (30, 97):
        found = decode(encoded(stored, exif=exif), padding(size)).astype(int)
        assert np.abs(found - decode(encoded(upright), padding(size))).max() <= levels
        assert psnr(decode(encoded(stored, "JPEG", quality=95, exif=exif), padding(size)), found.astype(np.uint8)) > 38


@pytest.mark.parametrize(("width", "height", "drafted"), [(960, 720, True), (719, 975, True), (961, 720, False)])
def test_padding_with_a_draft_keeps_the_border(width: int, height: int, drafted: bool) -> None:
    """A draft only where half the border is whole at every scale: 120 pixels, 128, but not 120.5."""
    fine = picture(5, 40, 40).resize((width, height), 3)
    data = encoded(fine, "JPEG", quality=92)
    for size in (64, 150, 300):
        found, expected = decode(data, padding(size)), padded_reference(data, size)
        assert psnr(found, expected) >= 37
        assert (np.abs(found.astype(int) - expected).max() > 1) == drafted


def test_drafts_of_padded_real_images(shared_data: Path) -> None:
    found = [
        psnr(decode(data, padding(size)), padded_reference(data, size))
        for data in real_images(shared_data)
        for size in (64, 128)
    ]
    print(f"PSNR at least {min(found):.1f} dB; {sum(value < 60 for value in found)} of {len(found)} by draft")
    assert 37 <= min(found) < 60


def test_padding_a_panorama_makes_no_large_square() -> None:
    """20,000 x 700 pixels: a square of them would take 1.6 GB, for which there is no room here."""
    data = encoded(picture(2, 200, 7).resize((20_000, 700)), "BMP")
    expected = decode(data, padding(224))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 800 * 2**20, limits[1]))
    try:
        assert np.array_equal(decode(data, padding(224)), expected)
        with pytest.raises(MemoryError):
            np.empty(20_000 * 20_000 * 4, np.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    border = np.concatenate([expected[:100], expected[124:]])
    assert (border == (122, 116, 104)).all()


# ---------------------------------------------------------------- memory, drafts, turns


def test_an_image_in_several_blocks_of_memory() -> None:
    """Pillow keeps pixels in blocks of 16 MiB."""
    assert_equals_pillow(encoded(picture(9, 2100, 2051), "BMP"), 64)


@pytest.mark.parametrize("size", [64, 96, 112, 128, 160, 170])
def test_draft_is_close_to_full_decoding_on_real_images(shared_data: Path, size: int) -> None:
    found = [psnr(decode(data, spec(size)), reference(data, size)) for data in real_images(shared_data)]
    print(
        f"{size} px: PSNR at least {min(found):.1f} dB; {sum(value < 60 for value in found)} of {len(found)} by draft"
    )
    assert 37 <= min(found) < 60  # at least one by draft: what is decoded whole stays above


@pytest.mark.parametrize(("width", "height"), [(900, 700), (701, 1399), (1333, 801), (641, 643)])
def test_draft_is_close_at_every_scale_and_odd_side(width: int, height: int) -> None:
    draw = np.random.default_rng(width)
    fine = Picture.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).resize((width, height), 3)
    data = encoded(fine, "JPEG", quality=92)
    for size in (32, 64, 100, 160, 213):
        assert psnr(decode(data, spec(size)), reference(data, size)) >= 35


def test_draft_is_used_only_where_its_margin_stays() -> None:
    data = encoded(picture(0, 640, 480), "JPEG")
    for size, used in ((159, True), (160, True), (161, False), (240, False)):
        error = np.abs(decode(data, spec(size)).astype(int) - reference(data, size)).max()
        assert (error > 1) == used


def test_threads_decode_side_by_side_and_alike() -> None:
    images = [encoded(picture(seed, 320, 240), "JPEG") for seed in range(16)]
    expected = [decode(data, SPEC) for data in images]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda data: decode(data, SPEC), images * 4))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected * 4, strict=True))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("size", [16, 60])
def test_exif_turns(turn: int, size: int) -> None:
    upright = picture(3, 200, 150)
    back = {5: 5, 6: 8, 7: 7, 8: 6}.get(turn, turn)  # the turn that undoes this one
    stored = upright.transpose(TRANSPOSE[back]) if back in TRANSPOSE else upright
    exif = Picture.Exif()
    exif[ORIENTATION] = turn
    for kind in ("PNG", "JPEG"):
        found = decode(encoded(stored, kind, exif=exif), spec(size))
        assert psnr(found, decode(encoded(upright, kind), spec(size))) > 38


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_does_not_hide_a_picture() -> None:
    data = encoded(picture(1), "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert psnr(decode(data, SPEC), decode(encoded(picture(1), "JPEG"), SPEC)) > 40


def test_cmyk() -> None:
    data = encoded(picture(2).convert("CMYK"), "JPEG", quality=95)
    assert psnr(decode(data, SPEC), decode(encoded(picture(2)), SPEC)) > 30


def png(width: int, height: int, depth: int, color: int, body: bytes) -> bytes:
    """A PNG by hand, for what Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def test_16_bits_are_scaled_not_clipped() -> None:
    grey = np.asarray(picture(4).convert("L"))
    wide = grey.astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    expected = decode(encoded(Picture.fromarray(grey)), SPEC)
    assert np.array_equal(decode(png(40, 30, 16, 0, rows), SPEC), expected)
    rows = b"".join(b"\0" + np.repeat(row, 3).tobytes() for row in wide)
    assert np.array_equal(decode(png(40, 30, 16, 2, rows), SPEC), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes(mode: str) -> None:
    image = picture(5).convert(mode)
    found = decode(encoded(image), SPEC)
    assert np.array_equal(found, decode(encoded(image.convert("RGB")), SPEC))


def test_transparent_is_white() -> None:
    clear = Picture.new("RGBA", (40, 30), (0, 0, 0, 0))
    grey = Picture.new("LA", (40, 30), (0, 0))
    palette = Picture.new("P", (40, 30), 0)
    palette.putpalette([0, 0, 0])
    for data in (
        encoded(clear),
        encoded(grey),
        encoded(palette, transparency=0),
        encoded(palette, "GIF", transparency=0),
        encoded(clear, "WEBP"),
    ):
        assert (decode(data, SPEC) == 255).all()


def test_formats() -> None:
    expected = decode(encoded(picture(6)), SPEC)
    for kind in ("WEBP", "BMP", "TIFF", "AVIF", "PPM"):
        options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "AVIF" else {}
        assert psnr(decode(encoded(picture(6), kind, **options), SPEC), expected) > 35


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Picture.new("RGB", (40, 30), color) for color in ("red", "blue", "green")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    found = decode(data, SPEC).reshape(-1, 3).mean(0)
    assert found[0] > 240 and found[1] < 15 and found[2] < 15


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_truncated(kind: str) -> None:
    data = encoded(picture(7, 200, 150), kind)
    for share in (0.0, 0.01, 0.3, 0.7, 0.9):
        with pytest.raises(UnreadableImage, match=r"\w"):
            decode(data[: int(len(data) * share)], SPEC)


def test_a_bomb_is_refused_by_its_header() -> None:
    """A header of 400 megapixels with no pixels after it: the size is the reason, so nothing was decoded."""
    for side in (8193, 11_000, 20_000):
        with pytest.raises(UnreadableImage, match=r"megapixels|DecompressionBomb"):
            decode(png(side, side, 8, 2, b""), SPEC)
    assert 8193**2 > MAX_PIXELS >= 8192**2


def test_a_thread_of_pixels_is_refused() -> None:
    with pytest.raises(UnreadableImage, match="scans of a JPEG are more than 100"):
        decode(repeating_scans(100), SPEC)
    with pytest.raises(UnreadableImage, match="more than 50 times"):
        decode(encoded(Picture.new("RGB", (1020, 20))), SPEC)
    assert decode(encoded(Picture.new("RGB", (1000, 20))), SPEC).shape == (16, 16, 3)


def test_formats_that_run_programs_are_refused() -> None:
    with pytest.raises(UnreadableImage, match="UnidentifiedImageError"):
        decode(encoded(picture(0), "EPS"), SPEC)
    with pytest.raises(UnreadableImage, match="fractions"):
        decode(encoded(picture(0).convert("F"), "TIFF"), SPEC)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_damaged_bytes_are_a_picture_or_unreadable(kind: str, places: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(picture(8), kind))
    for place, value in places:
        data[int(place * len(data))] = value
    try:
        assert decode(bytes(data), SPEC).shape == (16, 16, 3)
    except UnreadableImage as reason:
        assert str(reason)
