"""Encoded image bytes to the square RGB picture that a vision tower wants."""

from __future__ import annotations

import math

import numpy as np
import pyarrow
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.dlpack import from_dlpack

from hpc_mm.config import ImageSpec
from hpc_mm.data.pictures import TRANSPOSE, as_rgb, draft_to, opened_picture, orientation

DRAFT_MARGIN = 1.5  # a drafted image is so many times as large as wanted; photos keep 39 dB PSNR, at 1.25 only 36
REVERSED = {3, 4, 6, 7}, {2, 3, 7, 8}  # turns that reverse a stored picture's rows, and its columns


def decode(data: bytes, spec: ImageSpec) -> NDArray[np.uint8]:
    """The picture as (size, size, 3) uint8 RGB, upright, on white where transparent.

    ``square="crop"``: short side resized, centre cut; this is open_clip's evaluation transform (antialiased bicubic) up
    to normalisation, to one level of 255, two where it is enlarged. ``square="pad"``: on a square of the mean colour,
    then resized; this is LLaVA's, with the same precision, but upright, which LLaVA's is not.
    A JPEG that stays at least 1.5 times as large as wanted is decoded at 1/2, 1/4 or 1/8 of its size by its DCT
    coefficients, which stays above 35 dB PSNR; one to be padded only where its border stays a whole number of pixels.
    Of an animation the first frame counts. Safe with threads, which run side by side.
    """
    pad = spec.square == "pad"
    with opened_picture(data) as image:
        width, height = (spec.size * length // min(image.size) for length in image.size)  # as in torchvision
        shown = draft_to(image, padded_short_side(image.size, spec.size) if pad else spec.size, DRAFT_MARGIN)
        pixels, turn = pixels_of(as_rgb(image)), orientation(image)
    if pad:
        return centre(upright(on_square(pixels, shown, turn, spec), turn), spec.size)
    return centre(upright(resized(pixels, shown, width, height), turn), spec.size)


def padded_short_side(size: tuple[int, int], side: int) -> float:
    """What the short side becomes; all of it where half the border, at 1/8, would be no whole number of pixels."""
    short, long = sorted(size)
    return short if (long - short) % 16 else side * short / long


def on_square(pixels: Tensor, shown: tuple[float, float], turn: int, spec: ImageSpec) -> Tensor:
    """(H, W, C) to (size, size, C): resized as if it lay in the middle of a square of the mean colour.

    The long side is resized before the border is added, so that no large square is ever made. Where the border is odd,
    its smaller half is on the top or left of the upright picture.
    """
    wide = shown[0] >= shown[1]
    axis, side = (0, max(shown)) if wide else (1, max(shown))  # along the short side
    height, width, channels = pixels.shape
    strip = (
        resized(pixels, (shown[0], height), spec.size, height)
        if wide
        else resized(pixels, (width, shown[1]), width, spec.size)
    )
    shape = (math.ceil(side), spec.size) if wide else (spec.size, math.ceil(side))
    colour = torch.tensor([*(int(255 * mean) for mean in spec.mean), 255], dtype=torch.uint8)
    square = colour[:channels].repeat(*shape, 1)
    border = (side - min(shown)) / 2
    start = math.ceil(border) if turn in REVERSED[axis] else math.floor(border)
    square.narrow(axis, start, pixels.shape[axis]).copy_(strip)
    return resized(square, (spec.size, side) if wide else (side, spec.size), spec.size, spec.size)


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
