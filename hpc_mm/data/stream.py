"""The batches that every rank reads of a source's shards, in the order that is made of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hpc_mm.config import ImageSpec, Loader, Source
from hpc_mm.data.batch import Batch, LeftOut, Row, Unusable, collate, to_row, vocabulary
from hpc_mm.data.cache import ReadCache
from hpc_mm.data.chat import chat_row, collate_chats
from hpc_mm.data.lengths import Lengths
from hpc_mm.data.order import Place, make_order
from hpc_mm.data.packing import micro_batches, share
from hpc_mm.data.shards import BrokenShard, ShardReader, corpus_digest, read_manifest
from hpc_mm.data.store import MissingKey, StoreError, open_store
from hpc_mm.data.worker import outlive_signals


class NoRow(NamedTuple):
    """What is left of a sample that cannot be read, or that a rule leaves out."""

    name: str
    reason: str
    unreadable: bool


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
        lengths: Lengths | None = None,
    ) -> None:
        self.source, self.settings, self.seed = source, settings, seed
        self.tokenizer, self.spec = tokenizer, spec
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.store = open_store(source.data)
        self.shards = read_manifest(self.store)
        self.corpus = corpus_digest(self.shards) + (lengths.digest if lengths else "")  # another one is another order
        self.order = make_order(source, self.shards.samples, seed, lengths, spec.tokens)
        self._readings: dict[int, Reading] = {}  # by process id: threads do not fork

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readings": {}}

    def _reading(self) -> Reading:
        if os.getpid() not in self._readings:
            cache = None
            if self.settings.cache:
                cache = ReadCache(Path(self.settings.cache), int(self.settings.cache_gb * 1e9))
            windows = 2 if self.source.order == "random" else 4  # this and the next one, of each modality
            reader = ShardReader(self.store, windows * self.source.shuffle_shards + 2, cache)
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
        """Where this rank's samples of an optimizer step lie: its run of them, in the step's order."""
        return self.order.places(step, share(self.order.size(step), self.rank, self.world))

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
            return collate_chats(rows, self.spec, unreadable, left_out)
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
    lengths: Lengths | None = None,
) -> StepLoader:
    """A rank's ``accumulate`` micro-batches of each of the optimizer steps [first_step, last_step), in order.

    Which samples a step holds depends on ``source``, ``seed``, the shards and, unless order=random, the ``lengths`` of
    their samples. ConfigError where ``source.data``
    holds no whole shards.
    """
    return StepLoader(
        Steps(source, settings, seed, tokenizer, spec, rank, world, accumulate, lengths),
        range(first_step, last_step),
        num_workers=settings.workers,
        multiprocessing_context="fork" if settings.workers else None,  # as outlive_signals needs it
        worker_init_fn=outlive_signals,
        prefetch_factor=-(-settings.prefetch // accumulate) if settings.workers else None,
        pin_memory=torch.cuda.is_available(),
    )
