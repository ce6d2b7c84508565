"""Perceptual hashes of pictures: near-duplicates have hashes that differ in few of 64 bits. Never torch."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpc_mm.config import ConfigError
from hpc_mm.data.pictures import TRANSPOSE, as_rgb, opened_picture, orientation
from hpc_mm.data.store import MissingKey, Store, StoreError

SIDE = 32  # pixels of the grey picture whose DCT is taken
LOW = 8  # lowest frequencies along each axis that become bits
MAX_DISTANCE = 15  # bits; hashes of unrelated photos differ in 31 on average, and in 16 at least among 500 pairs
BANDS = 4  # of 16 bits


def perceptual_hash(data: bytes) -> int:
    """The 64-bit pHash of a picture: which of its 8 x 8 lowest DCT coefficients lie above their median, row by row.

    As ``phash`` of the imagehash library, of the upright picture on white; its hex is ``f"{value:016x}"``.
    UnreadableImage where the bytes are no picture. Safe with threads.
    """
    from scipy.fft import dct  # half of the start of every task that needs none of this

    with opened_picture(data) as image:
        grey = as_rgb(image).convert("L") if image.mode != "L" else image
        turn = orientation(image)
        upright = grey.transpose(TRANSPOSE[turn]) if turn in TRANSPOSE else grey
        pixels = np.asarray(upright.resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    low = dct(dct(pixels, axis=0), axis=1)[:LOW, :LOW]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def hamming_distance(one: int, other: int) -> int:
    """Bits in which two hashes differ."""
    return (one ^ other).bit_count()


# ---------------------------------------------------------------- a file of hashes


def write_hashes(store: Store, key: str, hashes: Iterable[int]) -> None:
    """Every distinct hash in order as one .npy file of uint64."""
    file = io.BytesIO()
    np.save(file, np.unique(np.array(list(hashes), dtype=np.uint64)), allow_pickle=False)
    store.write(key, file.getvalue())


def read_hashes(store: Store, key: str) -> NDArray[np.uint64]:
    """(N,) uint64 of a file that ``write_hashes`` wrote; ConfigError where it is missing or something else."""
    where = f"{store.address}/{key}"
    try:
        hashes = np.load(io.BytesIO(store.read(key)), allow_pickle=False)
    except MissingKey:
        raise ConfigError(f"no hashes at {where}") from None
    except StoreError as error:
        raise ConfigError(str(error)) from None
    except (ValueError, EOFError, OSError):
        hashes = None
    if not isinstance(hashes, np.ndarray) or hashes.dtype != np.uint64 or hashes.ndim != 1:
        raise ConfigError(f"{where} is no file of hashes: one .npy array of uint64 is expected")
    return hashes


# ---------------------------------------------------------------- near ones


class NearHashes:
    """Which hashes lie within ``distance`` bits of one of ``hashes``, exactly.

    Hashes that differ in d bits differ in at most d // 4 bits in one of four bands of 16 (pigeonhole; multi-index
    hashing, arXiv 1307.2982). So only those of the hashes are compared whose band is that close, which a table finds.
    A million hashes take 32 MB and a second to sort; a look-up takes 0.2 ms at distance 4 and 0.9 ms at 12.
    """

    def __init__(self, hashes: NDArray[np.uint64], distance: int) -> None:
        if not 0 <= distance <= MAX_DISTANCE:
            raise ValueError(f"distance={distance}: 0 to {MAX_DISTANCE} bits")
        self.distance = distance
        words = np.arange(2**16)
        self._flips = words[np.bitwise_count(words) <= distance // BANDS]  # (F,) ways to differ in a band
        self._sorted: list[NDArray[np.uint64]] = []  # per band, (N,) the hashes in the order of that band
        self._first: list[NDArray[np.int64]] = []  # per band, (2**16 + 1,) where those with each value start
        for number in range(BANDS):
            values = band(hashes, number)
            self._sorted.append(hashes[np.argsort(values, kind="stable")])
            self._first.append(np.concatenate([[0], np.cumsum(np.bincount(values, minlength=2**16))]))

    def near(self, value: int) -> bool:
        """Whether a known hash lies within the distance of ``value``."""
        query = np.array([value], dtype=np.uint64)
        for number, (known, first) in enumerate(zip(self._sorted, self._first, strict=True)):
            buckets = band(query, number) ^ self._flips
            starts, sizes = first[buckets], first[buckets + 1] - first[buckets]
            # Places start, start + 1, ... of every bucket, one after the other.
            places = np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
            if (np.bitwise_count(known[places] ^ query) <= self.distance).any():
                return True
        return False


def band(hashes: NDArray[np.uint64], number: int) -> NDArray[np.int64]:
    """The number-th 16 bits of each hash."""
    return ((hashes >> np.uint64(16 * number)) & np.uint64(0xFFFF)).astype(np.int64)
