"""What every reader of encoded images shares: limits, formats, orientation, colour. Never torch."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

warnings.filterwarnings("ignore", module=r"PIL\.")  # bytes from anywhere; what matters of them is refused below

MAX_PIXELS = 64 * 2**20  # 64 megapixels, 192 MB decoded; the header of a larger image is all that is read
MAX_RATIO = 50  # of the sides; resizing the short side of a longer one would take gigabytes
MAX_SCANS = 100  # of a JPEG; encoders write a dozen, and each may take as long to decode as a whole picture
SCAN = b"\xff\xda"  # begins a scan, and cannot occur inside one; a thumbnail adds its own
DECODER_BYTES = 6  # per pixel, that a decoder asks for at once: the coefficients of a progressive JPEG
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # none runs a program, as EPS would
ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """These bytes give no picture; the message is the reason."""


@contextmanager
def opened_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The picture in ``data``, header read and size checked. Whatever fails in the block is an UnreadableImage.

    Save what this machine is short of, which says nothing about the picture: MemoryError, and OSError with a number.
    """
    width = height = 0
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image, max_pixels)
            check_scans(image, data)
            width, height = image.size
            yield image
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its own message has an address in memory
        raise UnreadableImage(f"UnidentifiedImageError: not a whole header of {', '.join(FORMATS)}") from error
    except Exception as error:  # a parser meets bytes from anywhere: whatever else it raises means the same
        if isinstance(error, OSError) and error.errno is not None:  # Pillow's own, of truncated pictures, have none
            raise
        np.empty(width * height * DECODER_BYTES, np.uint8)  # MemoryError: without memory a codec calls the data broken
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels are more than {max_pixels / 2**20:g} megapixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UnreadableImage(f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other")


def check_scans(image: Image.Image, data: bytes) -> None:
    if image.format in ("JPEG", "MPO") and (scans := data.count(SCAN)) > MAX_SCANS:
        raise UnreadableImage(f"{scans} scans of a JPEG are more than {MAX_SCANS}")


def draft_to(image: Any, side: float, margin: float) -> tuple[float, float]:
    """Let the decoder of a JPEG shrink it to 1/2, 1/4 or 1/8 while its short side stays ``margin`` times ``side``.

    Width and height of the picture in pixels of the decoded image: sides that do not divide are padded.
    """
    share = margin * side / min(image.size)
    if share > 0.5 or image.format != "JPEG":
        return float(image.width), float(image.height)
    _, (_, _, width, height) = image.draft(None, tuple(math.ceil(length * share) for length in image.size))
    return width, height


def orientation(image: Image.Image) -> int:
    """The EXIF turn of a picture, 1 to 8; 1 where its EXIF data is broken."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # as in opened_picture; a picture with broken EXIF data is still a picture
        return 1


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, on white where it is transparent; 16 bits of grey are scaled to 8."""
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip instead of scale
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableImage("pixels are fractions without a known range")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
