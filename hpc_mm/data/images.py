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
REVERSED = {2, 3, 7, 8}, {3, 4, 6, 7}  # turns that reverse a stored picture's columns, and its rows
ROWS = 512  # of a picture that are padded at once


def decode(data: bytes, spec: ImageSpec) -> NDArray[np.uint8]:
    """The picture as (size, size, 3) uint8 RGB, upright, on white where transparent.

    ``square="crop"``: short side resized, centre cut; this is open_clip's evaluation transform (antialiased bicubic) up
    to normalisation, to one level of 255, two where it is enlarged. ``square="pad"``: on a square of the mean colour,
    then resized; this is LLaVA's with the same precision (two levels at a few edges), but upright, as LLaVA's is not.
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

    The width is resized first, some rows at a time, so that no large square is ever made. Where the border is odd, its
    smaller half is on the top or left of the upright picture.
    """
    side = max(shown)
    left, top = (
        math.ceil((side - length) / 2) if turn in reversed_turns else math.floor((side - length) / 2)
        for length, reversed_turns in zip(shown, REVERSED, strict=True)
    )
    colour = torch.tensor([*(int(255 * mean) for mean in spec.mean), 255], dtype=torch.uint8)[: pixels.shape[2]]
    strips = (pixels[start : start + ROWS] for start in range(0, len(pixels), ROWS))
    wide = (bordered(strip, 1, left, math.ceil(side), colour) for strip in strips)
    narrow = torch.cat([resized(strip, (side, len(strip)), spec.size, len(strip)) for strip in wide])
    return resized(bordered(narrow, 0, top, math.ceil(side), colour), (spec.size, side), spec.size, spec.size)


def bordered(pixels: Tensor, axis: int, start: int, length: int, colour: Tensor) -> Tensor:
    """(H, W, C) at ``start`` of an axis that becomes so long, the rest of it in one colour."""
    if pixels.shape[axis] == length:
        return pixels
    shape = list(pixels.shape)
    shape[axis] = length
    whole = colour.expand(shape).clone()
    whole.narrow(axis, start, pixels.shape[axis]).copy_(pixels)
    return whole


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
