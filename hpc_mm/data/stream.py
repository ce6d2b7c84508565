"""The order of samples, a pure function of (seed, epoch, position), and the batches that every rank reads from it."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from hpc_mm.config import ConfigError, ImageSpec, Loader, Source
from hpc_mm.data.batch import Batch, LeftOut, Unusable, collate, to_row, vocabulary
from hpc_mm.data.cache import ReadCache
from hpc_mm.data.schema import Sample
from hpc_mm.data.shards import BrokenShard, ShardInfo, ShardReader, corpus_digest, read_manifest
from hpc_mm.data.store import MissingKey, StoreError, open_store

Key = TypeVar("Key")
Value = TypeVar("Value")

CACHED_EPOCHS, CACHED_WINDOWS = 2, 4  # orders that stay in memory: 8 bytes per shard, and per sample of a window
SHARD_ORDER, SAMPLE_ORDER = 0, 1  # what a permutation is drawn for


class Place(NamedTuple):
    epoch: int
    shard: int  # into the manifest
    sample: int  # inside the shard


class Order:
    """Where the sample at every position of an endless stream lies; positions count samples over all epochs.

    Each epoch holds every sample once: the shards are permuted, ``window`` of them at a time are put together, and the
    samples of such a window are permuted. Memory is O(shards + samples of a window). The order is that of random
    64-bit words of the Philox generator, whose stream NumPy guarantees, so it stays the same over NumPy's versions.
    """

    def __init__(self, shards: Sequence[ShardInfo], seed: int, window: int) -> None:
        self.sizes = np.array([shard.samples for shard in shards], dtype=np.int64)
        self.samples = int(self.sizes.sum())  # per epoch
        if not self.samples:
            raise ConfigError("shards without any sample make no stream")
        self.seed, self.window = seed, window
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def locate(self, position: int) -> Place:
        epoch, place = divmod(position, self.samples)
        shards, ends = self._shards(epoch)
        window = int(np.searchsorted(ends, place, side="right")) // self.window
        first = window * self.window
        start = int(ends[first - 1]) if first else 0
        stop = int(ends[min(first + self.window, len(ends)) - 1])
        chosen = start + int(self._samples(epoch, window, stop - start)[place - start])
        shard = int(np.searchsorted(ends, chosen, side="right"))
        return Place(epoch, int(shards[shard]), chosen - int(ends[shard] - self.sizes[shards[shard]]))

    def _shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards of an epoch in order, and where each ends in it."""
        if epoch not in self._epochs:
            shards = self._permutation(len(self.sizes), epoch, SHARD_ORDER, 0)
            remember(self._epochs, epoch, (shards, np.cumsum(self.sizes[shards])), CACHED_EPOCHS)
        return self._epochs[epoch]

    def _samples(self, epoch: int, window: int, size: int) -> NDArray[np.int64]:
        if (epoch, window) not in self._windows:
            order = self._permutation(size, epoch, SAMPLE_ORDER, window)
            remember(self._windows, (epoch, window), order, CACHED_WINDOWS)
        return self._windows[epoch, window]

    def _permutation(self, size: int, epoch: int, use: int, window: int) -> NDArray[np.int64]:
        words = np.random.Philox(np.random.SeedSequence([self.seed, epoch, use, window])).random_raw(size)
        return np.argsort(words, kind="stable")


def remember(cache: OrderedDict[Key, Value], key: Key, value: Value, limit: int) -> None:
    """Keep the ``limit`` newest."""
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)


def positions(micro_step: int, batch: int, accumulate: int, rank: int, world: int) -> range:
    """The places in the global order of one rank's rows in one micro-step.

    Optimizer step s takes positions [s * batch, (s + 1) * batch), its micro-steps take equal runs of them in turn, and
    in a micro-step the ranks do. So the state of a stream is the optimizer step alone, for any number of ranks.
    """
    if batch % (accumulate * world):
        raise ConfigError(f"batch={batch} cannot be divided over {world} ranks x {accumulate} micro-steps")
    share = batch // accumulate // world
    start = (micro_step * world + rank) * share
    return range(start, start + share)


class MicroBatches(Dataset[Batch]):
    """A rank's batch of every micro-step. It reads ``reads`` samples at once and decodes in the process that asks.

    A sample whose bytes cannot be had leaves its place empty and is listed, as one that a rule leaves out.
    """

    def __init__(
        self,
        source: Source,
        settings: Loader,
        seed: int,
        tokenizer: Any,
        spec: ImageSpec,
        rank: int,
        world: int,
        accumulate: int,
    ) -> None:
        self.source, self.settings, self.seed = source, settings, seed
        self.tokenizer, self.spec = tokenizer, spec
        self.rank, self.world, self.accumulate = rank, world, accumulate
        positions(0, source.batch, accumulate, rank, world)  # says at once whether the batch can be divided
        self.store = open_store(source.data)
        self.shards = read_manifest(self.store)
        self.corpus = corpus_digest(self.shards)  # another one is another order
        self.order = Order(self.shards, seed, source.shuffle_shards)
        self._readers: dict[int, tuple[ShardReader, ThreadPoolExecutor]] = {}  # by process id: threads do not fork

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def _reader(self) -> tuple[ShardReader, ThreadPoolExecutor]:
        if os.getpid() not in self._readers:
            cache = None
            if self.settings.cache:
                cache = ReadCache(Path(self.settings.cache), int(self.settings.cache_gb * 1e9))
            reader = ShardReader(self.store, 2 * self.source.shuffle_shards + 2, cache)  # this window and the next
            self._readers[os.getpid()] = reader, ThreadPoolExecutor(self.settings.reads, "read")
        return self._readers[os.getpid()]

    def places(self, micro_step: int) -> list[Place]:
        """Where this rank's samples of a micro-step lie, in order."""
        run = positions(micro_step, self.source.batch, self.accumulate, self.rank, self.world)
        return [self.order.locate(position) for position in run]

    def _read(self, reader: ShardReader, place: Place) -> Sample | str:
        """The sample, or why it cannot be had."""
        try:
            return reader.read(self.shards[place.shard].name, place.sample)
        except (MissingKey, StoreError, BrokenShard) as error:
            return str(error)

    def __getitem__(self, micro_step: int) -> Batch:
        reader, threads = self._reader()
        places = self.places(micro_step)
        rows, unreadable, left_out = [], [], []
        for place, sample in zip(places, threads.map(lambda place: self._read(reader, place), places), strict=True):
            if isinstance(sample, str):
                unreadable.append((f"{self.shards[place.shard].name}:{place.sample}", sample))
                continue
            try:
                rows.append(to_row(sample, self.source, self.tokenizer, self.spec, self.seed, place.epoch))
            except LeftOut as rule:
                left_out.append((sample.id, str(rule)))
            except Unusable as reason:
                unreadable.append((sample.id, str(reason)))
        return collate(rows, vocabulary(self.tokenizer).pad, self.spec, unreadable, left_out)


def make_loader(
    source: Source,
    settings: Loader,
    seed: int,
    tokenizer: Any,
    spec: ImageSpec,
    rank: int,
    world: int,
    accumulate: int,
    first_step: int,
    last_step: int,
) -> DataLoader[Batch]:
    """A rank's batches of the micro-steps of optimizer steps [first_step, last_step), in order.

    Their content depends on the arguments and the shards alone, not on ``settings``. ConfigError where ``source.data``
    holds no whole shards.
    """
    return DataLoader(
        MicroBatches(source, settings, seed, tokenizer, spec, rank, world, accumulate),
        batch_size=None,
        sampler=range(first_step * accumulate, last_step * accumulate),
        num_workers=settings.workers,
        prefetch_factor=settings.prefetch if settings.workers else None,
        pin_memory=torch.cuda.is_available(),
    )
