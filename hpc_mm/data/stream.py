"""The order of samples, a pure function of (seed, epoch, position), and the batches that every rank reads from it."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hpc_mm.config import ConfigError, ImageSpec, Loader, Source
from hpc_mm.data.batch import Batch, LeftOut, Row, Unusable, collate, to_row, vocabulary
from hpc_mm.data.cache import ReadCache
from hpc_mm.data.chat import chat_row, collate_chats
from hpc_mm.data.packing import micro_batches, share
from hpc_mm.data.shards import BrokenShard, ShardReader, corpus_digest, read_manifest
from hpc_mm.data.store import MissingKey, StoreError, open_store
from hpc_mm.data.worker import outlive_signals

Key = TypeVar("Key")
Value = TypeVar("Value")

CACHED_EPOCHS, CACHED_WINDOWS = 2, 4  # orders that stay in memory: 8 bytes per shard, and per sample of a window
SHARD_ORDER, SAMPLE_ORDER = 0, 1  # what a permutation is drawn for


class Place(NamedTuple):
    epoch: int
    shard: int  # into the manifest
    sample: int  # inside the shard


class NoRow(NamedTuple):
    """What is left of a sample that cannot be read, or that a rule leaves out."""

    name: str
    reason: str
    unreadable: bool


class Order:
    """Where the sample at every position of an endless stream lies; positions count samples over all epochs.

    Each epoch holds every sample once: the shards are permuted, ``window`` of them at a time are put together, and the
    samples of such a window are permuted. Memory is O(shards + samples of a window). The order is that of random
    64-bit words of the Philox generator, whose stream NumPy guarantees, so it stays the same over NumPy's versions.
    """

    def __init__(self, sizes: Sequence[int] | NDArray[np.int64], seed: int, window: int) -> None:
        self.sizes = np.array(sizes, dtype=np.int64)  # samples of each shard
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


def samples_before(source: Source, step: int) -> int:
    """Samples of a source in the optimizer steps before ``step``, which takes the stream from there.

    So the state of a stream is the optimizer step alone, whatever the ranks and however batch sizes change.
    """
    total, since, batch = 0, 0, source.batch
    for change, size in sorted(source.batch_from.items()):
        if change >= step:
            break
        total += (change - since) * batch
        since, batch = change, size
    return total + (step - since) * batch


class Reading(NamedTuple):
    """What one process reads with."""

    shards: ShardReader
    threads: ThreadPoolExecutor
    decoders: threading.Semaphore


class Steps(Dataset[list[Batch]]):
    """A rank's micro-batches of every optimizer step. ``reads`` samples are read at once.

    A worker decodes one at a time, so that it keeps one core busy; without workers as many as the cores have room for.
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
        self.store = open_store(source.data)
        self.shards = read_manifest(self.store)
        self.corpus = corpus_digest(self.shards)  # another one is another order
        self.order = Order(self.shards.samples, seed, source.shuffle_shards)
        self._readings: dict[int, Reading] = {}  # by process id: threads do not fork

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readings": {}}

    def _reading(self) -> Reading:
        if os.getpid() not in self._readings:
            cache = None
            if self.settings.cache:
                cache = ReadCache(Path(self.settings.cache), int(self.settings.cache_gb * 1e9))
            reader = ShardReader(self.store, 2 * self.source.shuffle_shards + 2, cache)  # this window and the next
            # Where torch works with several threads, each decoder has them all; all ranks of a node share its cores.
            cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            decoders = 1 if get_worker_info() else max(1, cores // torch.get_num_threads())
            threads = ThreadPoolExecutor(self.settings.reads, "read")
            self._readings[os.getpid()] = Reading(reader, threads, threading.Semaphore(decoders))
        return self._readings[os.getpid()]

    def stop_reading(self) -> None:
        """Give up what this process reads with: threads, connections, indexes of shards."""
        reading = self._readings.pop(os.getpid(), None)
        if reading is not None:
            reading.threads.shutdown()

    def places(self, step: int) -> list[Place]:
        """Where this rank's samples of an optimizer step lie, in stream order: its run of the step's positions."""
        first, end = (samples_before(self.source, at) for at in (step, step + 1))
        return [self.order.locate(first + i) for i in share(end - first, self.rank, self.world)]

    def _row(self, reading: Reading, place: Place) -> Row | NoRow:
        name = f"{self.shards.names[place.shard]}:{place.sample}"
        as_row = chat_row if self.source.form == "chat" else to_row
        try:
            sample = reading.shards.read(self.shards.names[place.shard], place.sample)
            name = sample.id
            with reading.decoders:
                return as_row(sample, self.source, self.tokenizer, self.spec, self.seed, place.epoch)
        except LeftOut as rule:
            return NoRow(name, str(rule), unreadable=False)
        except (MissingKey, StoreError, BrokenShard, Unusable) as error:
            return NoRow(name, str(error), unreadable=True)

    def __getitem__(self, step: int) -> list[Batch]:
        reading = self._reading()
        found = list(reading.threads.map(partial(self._row, reading), self.places(step)))
        rows = [row for row in found if isinstance(row, Row)]
        lost = [row for row in found if isinstance(row, NoRow)]
        unreadable = [(row.name, row.reason) for row in lost if row.unreadable]
        left_out = [(row.name, row.reason) for row in lost if not row.unreadable]
        first, *others = micro_batches(rows, self.source, self.settings.by_length, self.accumulate)
        return [self._batch(first, unreadable, left_out), *map(self._batch, others)]

    def _batch(
        self,
        rows: Sequence[Sequence[Row]],
        unreadable: Sequence[tuple[str, str]] = (),
        left_out: Sequence[tuple[str, str]] = (),
    ) -> Batch:
        if self.source.form == "chat":
            return collate_chats([sample for row in rows for sample in row], self.spec, unreadable, left_out)
        return collate(rows, vocabulary(self.tokenizer).pad, self.spec, unreadable, left_out)


class StepLoader(DataLoader[list[Batch]]):
    """Batches of ``steps`` in order. This process reads the first step itself, while the workers start."""

    def __init__(self, dataset: Steps, steps: range, **settings: Any) -> None:
        super().__init__(dataset, batch_size=None, sampler=steps[1:], **settings)
        self.steps, self.first = dataset, steps[:1]

    def __iter__(self) -> Any:
        others = super().__iter__()
        return chain(map(self._own, self.first), others)

    def _own(self, step: int) -> list[Batch]:
        batches = self.steps[step]
        if self.num_workers:
            self.steps.stop_reading()
        return batches


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
) -> StepLoader:
    """A rank's ``accumulate`` micro-batches of each of the optimizer steps [first_step, last_step), in order.

    Which samples a step holds depends on ``source``, ``seed`` and the shards alone. ConfigError where ``source.data``
    holds no whole shards.
    """
    return StepLoader(
        Steps(source, settings, seed, tokenizer, spec, rank, world, accumulate),
        range(first_step, last_step),
        num_workers=settings.workers,
        multiprocessing_context="fork" if settings.workers else None,  # as outlive_signals needs it
        worker_init_fn=outlive_signals,
        prefetch_factor=-(-settings.prefetch // accumulate) if settings.workers else None,
        pin_memory=torch.cuda.is_available(),
    )
