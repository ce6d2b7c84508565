"""A stand-in of this branch for the chats' own module, dropped at the merge: token ids of plain chats."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_mm.config import IMAGE_PLACE, Source
from hpc_mm.data.schema import Image, Sample


def chat_ids(
    sample: Sample, source: Source, tokenizer: Any, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids: list[int] = []
    for part in sample.parts[:-1]:
        ids += [IMAGE_PLACE] if isinstance(part, Image) else tokenizer(part.text)["input_ids"]
    labels = tokenizer(sample.parts[-1].text)["input_ids"]  # type: ignore[union-attr]
    return np.array(ids[: source.max_tokens]), np.array(labels[: source.max_tokens])
