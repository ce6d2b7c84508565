"""Encoded image bytes to the square RGB picture that a vision tower wants."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpc_mm.config import ImageSpec

MAX_PIXELS = 64 * 2**20  # 64 megapixels, 192 MB decoded; the header of a larger image is all that is read
MAX_RATIO = 50  # of the sides; resizing the short side of a longer one would take gigabytes
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # none runs a program, as EPS would
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
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


def decode(data: bytes, spec: ImageSpec, draft: bool = True) -> NDArray[np.uint8]:
    """The picture as (size, size, 3) uint8 RGB: upright, on white where transparent, short side resized, centre cut.

    Without ``draft`` this is open_clip's evaluation transform (bicubic) up to normalisation. With it, a JPEG that
    stays at least twice as large as wanted is decoded at 1/2, 1/4 or 1/8 of its size by its DCT coefficients, which is
    several times faster and stays above 35 dB PSNR. Of an animation the first frame counts.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own pixel limit warns; ours, below, refuses
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                check_size(image)
                size = image.size
                box = draft_to(image, 2 * spec.size) if draft and image.format == "JPEG" else None
                small = resized(as_rgb(image), size, spec.size, box)
                turn = TRANSPOSE.get(orientation(image))
                return np.array(centre(small if turn is None else small.transpose(turn), spec.size))
    except UnreadableImage:
        raise
    except Exception as error:  # a parser meets bytes from anywhere: whatever it raises means the same
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels are more than {MAX_PIXELS >> 20} megapixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UnreadableImage(f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other")


def draft_to(image: Any, side: int) -> Box | None:
    """Let the JPEG decoder shrink the image while its short side stays at least ``side`` pixels.

    The part of the shrunk image that shows the picture, in its pixels: sides that do not divide are padded.
    """
    share = side / min(image.size)
    if share > 0.5:
        return None
    found = image.draft(None, (int(np.ceil(image.width * share)), int(np.ceil(image.height * share))))
    return None if found is None else found[1]


def orientation(image: Image.Image) -> int:
    """The EXIF turn of a picture, 1 to 8; 1 where its EXIF data is broken."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # as in decode; a picture with broken EXIF data is still a picture
        return 1


def as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip instead of scale
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnreadableImage("pixels are fractions without a known range")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def resized(image: Image.Image, size: tuple[int, int], side: int, box: Box | None) -> Image.Image:
    """Short side to ``side`` pixels, bicubic; the long one follows ``size``, rounded as in torchvision."""
    width, height = (side * length // min(size) for length in size)
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC, box)


def centre(image: Image.Image, side: int) -> Image.Image:
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))
