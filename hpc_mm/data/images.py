"""Encoded image bytes to the square RGB picture that a vision tower wants."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.dlpack import from_dlpack

from hpc_mm.config import ImageSpec

warnings.filterwarnings("ignore", module=r"PIL\.")  # bytes from anywhere; what matters of them is refused below

MAX_PIXELS = 64 * 2**20  # 64 megapixels, 192 MB decoded; the header of a larger image is all that is read
MAX_RATIO = 50  # of the sides; resizing the short side of a longer one would take gigabytes
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # none runs a program, as EPS would
DRAFT_MARGIN = 1.5  # a drafted image is so many times as large as wanted; photos keep 39 dB PSNR, at 1.25 only 36
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


def decode(data: bytes, spec: ImageSpec) -> NDArray[np.uint8]:
    """The picture as (size, size, 3) uint8 RGB: upright, on white where transparent, short side resized, centre cut.

    This is open_clip's evaluation transform (antialiased bicubic) up to normalisation, to one level of 255. A JPEG that
    stays at least 1.5 times as large as wanted is decoded at 1/2, 1/4 or 1/8 of its size by its DCT coefficients, which
    stays above 35 dB PSNR. Of an animation the first frame counts. Safe with threads, which run side by side.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image)
            width, height = (spec.size * length // min(image.size) for length in image.size)  # as in torchvision
            shown = draft_to(image, spec.size) if image.format == "JPEG" else image.size
            small = resized(pixels_of(as_rgb(image)), shown, width, height)
            return centre(upright(small, orientation(image)), spec.size)
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


def draft_to(image: Any, side: int) -> tuple[float, float]:
    """Let the JPEG decoder shrink the image while its short side stays DRAFT_MARGIN times ``side``.

    Width and height of the picture in pixels of the decoded image: sides that do not divide are padded.
    """
    share = DRAFT_MARGIN * side / min(image.size)
    if share > 0.5:
        return float(image.width), float(image.height)
    _, (_, _, width, height) = image.draft(None, tuple(int(np.ceil(length * share)) for length in image.size))
    return width, height


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
    return image if image.mode == "RGB" else image.convert("RGB")


def pixels_of(image: Image.Image) -> Tensor:
    """(H, W, 3 or 4) uint8 of an RGB image: Pillow's own memory, which holds four bytes per pixel, where it can be had.

    Pillow keeps an image of more than 16 MiB in several blocks, which are copied.
    """
    try:
        return from_dlpack(pyarrow.array(image).values).view(image.height, image.width, 4)
    except ValueError:
        return torch.from_numpy(np.array(image))


def resized(pixels: Tensor, shown: tuple[float, float], width: int, height: int) -> Tensor:
    """(H, W, C) to ``height`` x ``width``, bicubic; ``shown``: width and height of the picture in pixels of H and W."""
    if pixels.shape[:2] == (height, width):
        return pixels
    scale = (height + 1e-6) / shown[1], (width + 1e-6) / shown[0]  # a little more, for the product is rounded down
    planes = pixels.permute(2, 0, 1)[None]
    return interpolate(planes, scale_factor=scale, mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def upright(pixels: Tensor, turn: int) -> NDArray[np.uint8]:
    if turn not in TRANSPOSE:
        return pixels.numpy()
    return np.asarray(Image.fromarray(pixels[..., :3].numpy()).transpose(TRANSPOSE[turn]))


def centre(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The (side, side, 3) in the middle of (H, W, 3 or 4)."""
    top, left = (round((length - side) / 2) for length in pixels.shape[:2])
    cut = np.empty((side, side, 3), dtype=np.uint8)
    for channel in range(3):  # several times faster than one strided copy of all
        cut[..., channel] = pixels[top : top + side, left : left + side, channel]
    return cut
