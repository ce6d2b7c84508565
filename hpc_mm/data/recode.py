"""What is stored of a downloaded image: its own bytes, once they have been decoded, or a smaller JPEG. Never torch."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field, field_validator

from hpc_mm.config import Part, Positive
from hpc_mm.data.pictures import MAX_PIXELS, TRANSPOSE, as_rgb, draft_to, opened_picture, orientation

DRAFT_MARGIN = (
    1.5  # a drafted JPEG is so many times as large as wanted; at 1.25 some are further from Lanczos than INTER_AREA
)
REDUCING_GAP = 2  # pixels are averaged in whole blocks down to so many times the wanted size, then filtered


class Recode(Part):
    """How an image is stored. The modes are img2dataset's, but an image is never enlarged."""

    resize: Literal["none", "border", "keep_ratio", "center_crop"] = Field(
        "none",
        description="none = the bytes as they came; keep_ratio = short side at most size; border = whole picture on a "
        "white square of size; center_crop = middle square of size (smaller pictures on white)",
    )
    size: Positive = Field(256, description="pixels of the side that resize names")
    quality: Annotated[int, Field(ge=1, le=100)] = Field(95, description="of the JPEG that resize writes")
    max_pixels: Annotated[int, Field(ge=1, le=MAX_PIXELS)] = Field(
        MAX_PIXELS,
        description="width x height above which an image is refused by its header; a task decodes 64 megapixels "
        "at once at most, in 1.3 GB at most",
    )

    @field_validator("resize", mode="before")
    @classmethod
    def none_is_a_mode(cls, resize: Any) -> Any:
        return "none" if resize is None else resize  # as the command line reads the word


@dataclass(frozen=True)
class StoredImage:
    """What is to be stored. Sides are those of the upright picture, in pixels."""

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    sha256: str  # of data, in hex


class Room:
    """So many pixels may be decoded at once: several small pictures, or one large one alone.

    A decoded pixel takes 4 to 6 bytes, and up to 20 where a transparent picture is put on white. Safe with threads.
    """

    def __init__(self, pixels: int) -> None:
        self.free = pixels
        self.turn, self.changed = threading.Lock(), threading.Condition()

    @contextmanager
    def lease(self) -> Iterator[Callable[[int], None]]:
        """What waits for room for a picture of so many pixels, once; the end of the block gives it back."""
        held = 0

        def take(pixels: int) -> None:
            nonlocal held
            with self.turn, self.changed:  # in the order of coming, else small pictures would keep a large one waiting
                self.changed.wait_for(lambda: self.free >= pixels)
                self.free, held = self.free - pixels, pixels

        try:
            yield take
        finally:
            with self.changed:
                self.free += held
                self.changed.notify()


def at_once(pixels: int) -> None:
    """Wait for nothing."""


def recode(data: bytes, options: Recode, wait: Callable[[int], None] = at_once) -> StoredImage:
    """Check by decoding that ``data`` is a picture, and shrink it as asked; UnreadableImage where it is none.

    A new JPEG is upright, RGB, on white where the picture was transparent, 4:2:0, without metadata; of an animation it
    is the first frame. A JPEG that is already as wanted keeps its bytes. The same bytes give the same result with the
    same version of Pillow. Safe with threads: all heavy work is done without the interpreter's lock. ``wait`` is
    called with the pixels that the header tells before they are decoded, as by ``Room.lease``.
    """
    with opened_picture(data, options.max_pixels) as image:
        wait(image.width * image.height)
        stored, turn = image.size, orientation(image)
        original = stored[::-1] if turn >= 5 else stored
        target, canvas = sizes(stored, options)
        upright_canvas = canvas[::-1] if turn >= 5 else canvas
        if options.resize == "none" or (canvas == stored and is_plain(image, turn)):
            check_pixels(image)
            return StoredImage(data, *original, *original, hashlib.sha256(data).hexdigest())
        small = shrunk(image, target)
    kept = as_jpeg(framed(turned(small, turn), upright_canvas), options.quality)
    return StoredImage(kept, *upright_canvas, *original, hashlib.sha256(kept).hexdigest())


def sizes(stored: tuple[int, int], options: Recode) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height that the picture is resized to, and those of the result, which cuts it or has a white margin."""
    if options.resize == "none":
        return stored, stored
    side = max(stored) if options.resize == "border" else min(stored)
    share = min(1.0, options.size / side)
    width, height = (max(1, round(length * share)) for length in stored)
    target = width, height
    return target, target if options.resize == "keep_ratio" else (options.size, options.size)


def is_plain(image: Image.Image, turn: int) -> bool:
    return image.format == "JPEG" and image.mode in ("RGB", "L") and turn not in TRANSPOSE


def check_pixels(image: Any) -> None:
    """Read every byte of the picture; of a JPEG all coefficients, but pixels for an eighth of each side only."""
    if image.format == "JPEG":
        image.draft("L", (1, 1))
    image.load()


def shrunk(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """The picture in RGB and as large as ``target``, no further from Lanczos than OpenCV's INTER_AREA and as fast."""
    whole = image.size
    width, height = draft_to(image, min(target), DRAFT_MARGIN)
    picture = as_rgb(image)
    if target == whole:
        picture.load()
        return picture
    kernel = Image.Resampling.HAMMING if (width, height) == whole else Image.Resampling.LANCZOS
    return picture.resize(target, kernel, (0, 0, width, height), REDUCING_GAP)


def turned(picture: Image.Image, turn: int) -> Image.Image:
    return picture.transpose(TRANSPOSE[turn]) if turn in TRANSPOSE else picture


def framed(picture: Image.Image, canvas: tuple[int, int]) -> Image.Image:
    """The middle of the picture, on white where it is smaller than ``canvas``."""
    if picture.size == canvas:
        return picture
    frame = Image.new("RGB", canvas, "white")
    frame.paste(picture, ((canvas[0] - picture.width) // 2, (canvas[1] - picture.height) // 2))
    return frame


def as_jpeg(picture: Image.Image, quality: int) -> bytes:
    # Pillow lets other threads run while it encodes into a file, and only then; this one is in memory.
    with os.fdopen(os.memfd_create("jpeg"), "w+b", buffering=0) as file:
        picture.save(file, "JPEG", quality=quality, comment=b"")  # else a JPEG's comment is copied
        file.seek(0)
        return file.read()
