"""What a model makes of images, once for each: encoded in batches of one shape, and kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_mm.config import ConfigError, ImageSpec
from hpc_mm.data.batch import normalised
from hpc_mm.data.images import decode
from hpc_mm.data.pictures import UnreadableImage

ENCODED = 32  # images that a GPU encodes at once


class Features:
    """What the model made of images, by digest; beyond ``limit`` bytes those that were not used longest are dropped."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, digest: bytes) -> Tensor | None:
        if digest in self.kept:
            self.kept.move_to_end(digest)
        return self.kept.get(digest)

    def put(self, digest: bytes, feature: Tensor) -> None:
        self.kept[digest] = feature
        self.bytes += feature.nbytes
        while self.bytes > self.limit:
            self.bytes -= self.kept.popitem(last=False)[1].nbytes

    def of(
        self,
        images: Mapping[bytes, tuple[bytes, str]],
        encode: Callable[[Tensor], Tensor],
        spec: ImageSpec,
        device: torch.device,
    ) -> dict[bytes, Tensor]:
        """Features of images by digest. ``images``: by digest their encoded bytes, and whose they are, for errors.

        New ones are encoded ``at_once``, the last batch filled up with a picture of it: the shape of a batch decides
        how matrix products are rounded, and what else is in it does not. ``encode``: (N, 3, S, S) to (N, ...).
        """
        found = {digest: kept for digest in images if (kept := self.get(digest)) is not None}
        new = [digest for digest in images if digest not in found]
        size = at_once(device)
        with ThreadPoolExecutor() as pool:
            for digests in slices(new, size):
                pictures = list(pool.map(lambda digest: read(*images[digest], spec), digests))
                pictures += pictures[-1:] * (size - len(pictures))
                made = encode(normalised(pictures, spec).to(device))
                for digest, feature in zip(digests, made, strict=False):
                    found[digest] = feature.clone()  # a view would keep the whole batch
                    self.put(digest, found[digest])
        return found


def read(data: bytes, owner: str, spec: ImageSpec) -> NDArray[np.uint8]:
    try:
        return decode(data, spec)
    except UnreadableImage as error:
        raise ConfigError(f"{owner}: an image cannot be read: {error}") from None


def at_once(device: torch.device) -> int:
    """Images of a batch. CPUs encode each alone: there a place in a batch changes rounding, as threads divide it."""
    return 1 if device.type == "cpu" else ENCODED


def slices(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
