"""What makes images similar: features by a CLIP's image tower, computed once per shard and kept beside the shards.

``features/ENCODER/SHARD.safetensors`` has ``features``, (samples, D) float32, L2-normalised. A shard's name has the
digest of its bytes in it; where it has not, the digest of its index follows the name, so that what was computed of
another shard is never taken for this one's.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hpc_mm.config import ConfigError, ImageSpec, Part, unknown
from hpc_mm.data.pictures import UnreadableImage
from hpc_mm.data.shards import ShardReader, version
from hpc_mm.data.store import MissingKey, Store, StoreError, whole

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FOLDER = FEATURES = "features"  # of the store, the stage that fills it, and the tensor in its files
BATCH = 32  # images that are encoded at once, always, since the shape of a batch decides how its rows are rounded
AHEAD = 2  # batches that are read and decoded while one is encoded
READS = 16  # images, or files of features, read at once
LOCAL = "local-dir:"
LOCAL_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
TOLD = 3  # shards named in an error

Place = tuple[str, int]
"""A shard's name and a sample's number in it."""


class Encoder(Part):
    """A CLIP's image tower; OpenFlamingo's choice unless another is given."""

    model: str = Field("ViT-L-14", description="open_clip model, or local-dir:FOLDER, or hf-hub:ID")
    pretrained: str = Field(
        "openai", min_length=1, description="open_clip weights tag or file; a folder or hub id brings its own"
    )

    @field_validator("model")
    @classmethod
    def folder_is_whole(cls, model: str) -> str:
        """The same wherever a job runs."""
        return LOCAL + whole(model.removeprefix(LOCAL)) if model.startswith(LOCAL) else model

    @field_validator("pretrained")
    @classmethod
    def file_is_whole(cls, pretrained: str) -> str:
        return whole(pretrained) if is_file(pretrained) else pretrained

    @cached_property
    def name(self) -> str:
        """Names it in protocols and stores; a local file by the first 8 hex digits of its SHA-256."""
        if self.model.startswith(LOCAL):
            folder = Path(self.model.removeprefix(LOCAL))
            words = [LOCAL.rstrip(":"), *(file_digest(folder / file) for file in LOCAL_FILES)]
        elif ":" in self.model:
            words = [self.model]
        else:
            words = [self.model, file_digest(Path(self.pretrained)) if is_file(self.pretrained) else self.pretrained]
        name = ":".join(words).replace("/", ":")
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name of an open_clip model and its weights, such as ViT-L-14 and openai")
        return name

    def check(self) -> None:
        """ConfigError where open_clip has no such model, by its files: importing it takes as long as torch."""
        found = find_spec("open_clip")
        if ":" in self.model or found is None or found.origin is None:
            return
        known = [file.stem for file in Path(found.origin).parent.glob("model_configs/*.json")]
        if self.model.replace("/", "-") not in known:
            raise unknown("open_clip model rices.model", self.model, known)


def is_file(pretrained: str) -> bool:
    return "." in pretrained or "/" in pretrained


def file_digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()[:8]
    except OSError as error:
        raise ConfigError(f"no weights at {file}: {error.strerror}") from None


def key_of(store: Store, shard: str, encoder: Encoder) -> str:
    """Where a shard's features lie. MissingKey where its index is to say and is not there."""
    return f"{FOLDER}/{encoder.name}/{version(store, shard)}.safetensors"


# ---------------------------------------------------------------- computing


def shards_to_do(store: Store, shards: Sequence[str], encoder: Encoder, task: int = 0, tasks: int = 1) -> list[str]:
    """A task's shards that have no features yet."""
    there = {entry.key for entry in store.list(f"{FOLDER}/{encoder.name}/")}
    return [shard for shard in shards[task::tasks] if key_of(store, shard, encoder) not in there]


def compute(store: Store, shards: Sequence[str], encoder: Encoder, device: torch.device | str) -> None:
    """Write the features of shards, each file whole: the same bytes on the same kind of device, whoever computes them.

    On CPUs that takes as many threads, too: how these divide the work shows in the last bit.

    ConfigError where a sample has no image, or one that cannot be read; BrokenShard, MissingKey and StoreError as
    ``ShardReader.read``.
    """
    if not shards:
        return
    tower, reader = Tower(encoder, device), ShardReader(store)
    for done, shard in enumerate(shards, 1):
        key = key_of(store, shard, encoder)  # before its samples are read: what replaces the shard has another key
        features = np.concatenate(list(tower.features(reader, shard)))
        store.write(key, save({FEATURES: features}, {"shard": shard}))
        logger.info("features of %s: %d images (%d of %d shards)", shard, len(features), done, len(shards))


class Tower:
    """An encoder's open_clip model, whose image tower is on ``device``. ConfigError where it cannot be used."""

    def __init__(self, encoder: Encoder, device: torch.device | str) -> None:
        from hpc_mm.models.vision_tower import load_clip

        self.device = device
        self.clip = load_clip(encoder.model, encoder.pretrained).eval()
        self.clip.visual.to(device)
        facts = self.clip.visual.preprocess_cfg
        for key, wanted in (("interpolation", "bicubic"), ("resize_mode", "shortest")):
            if facts[key] != wanted:
                raise ConfigError(f"{encoder.name} wants images by {key}={facts[key]}; only {wanted} can be had")
        sides = {facts["size"]} if isinstance(facts["size"], int) else set(facts["size"])
        if len(sides) > 1:
            raise ConfigError(f"{encoder.name} takes images of {facts['size']}; they must be square")
        self.spec = ImageSpec(sides.pop(), tuple(facts["mean"]), tuple(facts["std"]))

    def features(self, reader: ShardReader, shard: str) -> Iterator[NDArray[np.float32]]:
        """Of a shard's samples in order, (up to BATCH, D) each."""
        samples = range(len(reader.index(shard).keys))
        batches: deque[list[Future[NDArray[np.uint8]]]] = deque()
        with ThreadPoolExecutor(READS, "pictures") as threads:
            try:
                for start in range(0, len(samples), BATCH):
                    batch = samples[start : start + BATCH]
                    batches.append([threads.submit(self.picture, reader, shard, sample) for sample in batch])
                    if len(batches) > AHEAD:
                        yield self.encoded([future.result() for future in batches.popleft()])
                for futures in batches:
                    yield self.encoded([future.result() for future in futures])
            finally:
                threads.shutdown(cancel_futures=True)

    def picture(self, reader: ShardReader, shard: str, sample: int) -> NDArray[np.uint8]:
        from hpc_mm.data.images import decode

        found = reader.read(shard, sample)
        data = next((image.data for image in found.images if image.data is not None), None)
        if data is None:
            raise ConfigError(f"sample {found.id} of {shard} holds no image")
        try:
            return decode(data, self.spec)
        except UnreadableImage as error:
            raise ConfigError(f"the image of sample {found.id} of {shard} cannot be read: {error}") from None

    def encoded(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """(N, D) of up to BATCH pictures (S, S, 3), in fp32 and in a batch that is filled up with the last of them."""
        import torch

        from hpc_mm.data.batch import normalised

        filled = [*pictures, *[pictures[-1]] * (BATCH - len(pictures))]
        with torch.inference_mode():
            found = self.clip.encode_image(normalised(filled, self.spec).to(self.device), normalize=True)
        rows: NDArray[np.float32] = found[: len(pictures)].float().cpu().numpy()
        return rows


# ---------------------------------------------------------------- reading


def read_features(store: Store, encoder: Encoder, images: Sequence[Place]) -> NDArray[np.float32]:
    """(N, D) of images in their order; each shard's file is read once.

    ConfigError where features are missing. ValueError where no image is asked for.
    """
    rows_of: dict[str, list[int]] = {}
    for row, (shard, _) in enumerate(images):
        rows_of.setdefault(shard, []).append(row)

    def wanted(shard: str) -> NDArray[np.float32] | None:
        return features_of(store, encoder, shard, [images[row][1] for row in rows_of[shard]])

    with ThreadPoolExecutor(READS, FOLDER) as threads:
        found = dict(zip(rows_of, threads.map(wanted, rows_of), strict=True))
    missing = [shard for shard, values in found.items() if values is None]
    if missing:
        named = ", ".join(missing[:TOLD]) + (", ..." if len(missing) > TOLD else "")
        raise ConfigError(
            f"{store.address} has no {encoder.name} features of {len(missing)} of {len(found)} shards: {named}; "
            f"the stage {FOLDER} computes them"
        )
    order = np.argsort([row for rows in rows_of.values() for row in rows])
    return np.concatenate([values for values in found.values() if values is not None])[order]


def features_of(store: Store, encoder: Encoder, shard: str, samples: Sequence[int]) -> NDArray[np.float32] | None:
    """(N, D) of some of a shard's samples; None where it has no features."""
    try:
        key = key_of(store, shard, encoder)
        data = store.read(key)
    except MissingKey:
        return None
    except StoreError as error:
        raise ConfigError(f"{store.address}: {error}") from None
    try:
        rows: NDArray[np.float32] = load(data)[FEATURES][list(samples)]
    except (SafetensorError, KeyError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{store.address}/{key} is not the features of its shard ({reason}): remove it") from None
    return rows
