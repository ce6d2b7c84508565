"""Which samples an optimizer step holds, a pure function of (seed, step): any, or those of like length and modality."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from hpc_mm.config import ConfigError, Source
from hpc_mm.data.lengths import Lengths

Key = TypeVar("Key")
Value = TypeVar("Value")

CACHED_EPOCHS, CACHED_WINDOWS, CACHED_POOLS = 2, 4, 4  # what stays in memory: 8 bytes per shard, and per sample
SHARD_ORDER, SAMPLE_ORDER, STEP_ORDER = 0, 1, 2  # what a permutation is drawn for
POOL = 256  # steps whose samples are sorted by their tokens together
GROUP = 2  # neighbouring steps of those whose samples are sorted by the encoder's tokens


class Place(NamedTuple):
    epoch: int
    shard: int  # into the manifest
    sample: int  # inside the shard


class StepOrder(Protocol):
    """The samples of every optimizer step."""

    def size(self, step: int) -> int: ...
    def places(self, step: int, part: range) -> list[Place]:
        """Of the step's samples, in their order, those that ``part`` counts."""
        ...


def make_order(
    source: Source, sizes: NDArray[np.int64], seed: int, lengths: Lengths | None, image_tokens: int
) -> StepOrder:
    """The order of a source whose shards have so many samples.

    ``lengths`` are of all its samples; without them order=random alone can be had. An image takes ``image_tokens``.
    """
    if source.order == "random":
        return AnyLength(source, sizes, seed)
    if lengths is None:
        raise ValueError(f"order={source.order} goes by lengths")
    if source.order == "length":
        return ByLength(source, sizes, seed, lengths, image_tokens)
    return ByModalityLength(source, sizes, seed, lengths)


def remember(cache: OrderedDict[Key, Value], key: Key, value: Value, limit: int) -> None:
    """Keep the ``limit`` newest."""
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)


def permutation(size: int, seed: int, epoch: int, use: int, window: int) -> NDArray[np.int64]:
    """By random 64-bit words of the Philox generator, whose stream NumPy guarantees: the same over its versions."""
    words = np.random.Philox(np.random.SeedSequence([seed, epoch, use, window])).random_raw(size)
    return np.argsort(words, kind="stable")


# ---------------------------------------------------------------- streams


class Order:
    """Where the sample at every position of an endless stream lies; positions count samples over all epochs.

    Each epoch holds every sample once: the shards are permuted, ``window`` of them at a time are put together, and the
    samples of such a window are permuted. Memory is O(shards + samples of a window).
    """

    def __init__(self, sizes: Sequence[int] | NDArray[np.int64], seed: int, window: int) -> None:
        self.sizes = np.array(sizes, dtype=np.int64)  # samples of each shard
        self.samples = int(self.sizes.sum())  # per epoch
        if not self.samples:
            raise ConfigError("shards without any sample make no stream")
        self.seed, self.window = seed, window
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def run(self, first: int, stop: int) -> NDArray[np.int64]:
        """(stop - first, 3): epoch, shard and sample of the positions [first, stop)."""
        pieces = [np.empty((0, 3), dtype=np.int64)]
        while first < stop:
            pieces.append(self._piece(first, stop))
            first += len(pieces[-1])
        return np.concatenate(pieces)

    def _piece(self, first: int, stop: int) -> NDArray[np.int64]:
        """As ``run``, up to the end of the first position's window."""
        epoch, place = divmod(first, self.samples)
        shards, ends = self._shards(epoch)
        window = int(np.searchsorted(ends, place, side="right")) // self.window
        start = int(ends[window * self.window - 1]) if window else 0
        end = int(ends[min((window + 1) * self.window, len(ends)) - 1])
        chosen = start + self._samples(epoch, window, end - start)[place - start : place - start + stop - first]
        number = np.searchsorted(ends, chosen, side="right")
        sample = chosen - (ends[number] - self.sizes[shards[number]])
        return np.stack([np.full_like(chosen, epoch), shards[number], sample], axis=1)

    def _shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards of an epoch in order, and where each ends in it."""
        if epoch not in self._epochs:
            shards = permutation(len(self.sizes), self.seed, epoch, SHARD_ORDER, 0)
            remember(self._epochs, epoch, (shards, np.cumsum(self.sizes[shards])), CACHED_EPOCHS)
        return self._epochs[epoch]

    def _samples(self, epoch: int, window: int, size: int) -> NDArray[np.int64]:
        if (epoch, window) not in self._windows:
            order = permutation(size, self.seed, epoch, SAMPLE_ORDER, window)
            remember(self._windows, (epoch, window), order, CACHED_WINDOWS)
        return self._windows[epoch, window]


class Modality:
    """The samples with images, or those without, as an endless stream of their own. Memory is O(samples)."""

    def __init__(self, chosen: NDArray[np.bool_], sizes: NDArray[np.int64], seed: int, window: int) -> None:
        self.ends = np.cumsum(sizes)  # of the shards, among all samples
        self.numbers = np.flatnonzero(chosen)  # of these samples among all
        found = np.searchsorted(self.numbers, self.ends)
        self.order = Order(np.diff(found, prepend=0), seed, window)
        self.firsts = found - self.order.sizes  # of each shard's samples, into numbers
        self.samples = len(self.numbers)

    def run(self, first: int, stop: int) -> NDArray[np.int64]:
        """(stop - first, 2): the epoch of each position, and the number of its sample among all of the source."""
        found = self.order.run(first, stop)
        return np.stack([found[:, 0], self.numbers[self.firsts[found[:, 1]] + found[:, 2]]], axis=1)


def modalities(lengths: Lengths, sizes: NDArray[np.int64], seed: int, window: int) -> list[Modality]:
    """Of the samples without images and of those with; only what there is."""
    with_images = lengths.images > 0
    return [Modality(chosen, sizes, seed, window) for chosen in (~with_images, with_images) if chosen.any()]


def placed(found: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[Place]:
    """Places of (epoch, number of the sample among all of the source)."""
    ends = np.cumsum(sizes)
    shards = np.searchsorted(ends, found[:, 1], side="right")
    samples = found[:, 1] - (ends - sizes)[shards]
    return [Place(*row) for row in np.stack([found[:, 0], shards, samples], axis=1).tolist()]


# ---------------------------------------------------------------- steps


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


class AnyLength:
    """Steps that take one stream of all samples from where the step before has left it."""

    def __init__(self, source: Source, sizes: NDArray[np.int64], seed: int) -> None:
        self.source, self.order = source, Order(sizes, seed, source.shuffle_shards)

    def size(self, step: int) -> int:
        return samples_before(self.source, step + 1) - samples_before(self.source, step)

    def places(self, step: int, part: range) -> list[Place]:
        first = samples_before(self.source, step)
        return [Place(*row) for row in self.order.run(first + part.start, first + part.stop).tolist()]


class ByLength:
    """Steps of samples of like length that all have images, or all have none.

    Samples of each modality are a stream of their own; a step takes the next ``batch`` samples of the one whose turn it
    is, such that both get through their epochs at one pace and no sample is left over. The samples of POOL such steps
    are sorted by tokens, those of each GROUP of steps, which now have about as many tokens, by their encoder's, so that
    neighbours are alike on the decoder's side too; that is cut into steps, and these are permuted. Samples without a
    target, which training leaves out, are spread over a pool: sorted by tokens they would fill steps of their own.
    """

    def __init__(
        self, source: Source, sizes: NDArray[np.int64], seed: int, lengths: Lengths, image_tokens: int
    ) -> None:
        self.sizes, self.seed, self.batch = sizes, seed, source.batch
        self.modalities = modalities(lengths, sizes, seed, source.shuffle_shards)
        self.encoder = lengths.encoder + image_tokens * lengths.images
        self.tokens = self.encoder + lengths.decoder
        self.left_out = lengths.decoder == 0
        self._pools: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def size(self, step: int) -> int:
        return self.batch

    def turn(self, step: int) -> tuple[int, int]:
        """Which modality's turn it is at a step, and how many turns it has had before."""
        first = self.modalities[0].samples
        total = sum(modality.samples for modality in self.modalities)
        before, after = (at * first // total for at in (step, step + 1))
        return (0, before) if after > before else (1, step - before)

    def places(self, step: int, part: range) -> list[Place]:
        which, turn = self.turn(step)
        # A pool is no more than an epoch, so that copies of a sample do not meet in a step.
        steps = min(POOL, max(1, self.modalities[which].samples // self.batch))
        pool, at = divmod(turn, steps)
        if (which, pool) not in self._pools:
            remember(self._pools, (which, pool), self._pool(which, pool, steps), CACHED_POOLS)
        return placed(self._pools[which, pool][at, part.start : part.stop], self.sizes)

    def _pool(self, which: int, pool: int, steps: int) -> NDArray[np.int64]:
        """(steps, batch, 2): epoch and number of the samples of a pool's steps, one epoch after the other."""
        size = steps * self.batch
        found = self.modalities[which].run(pool * size, (pool + 1) * size)
        left_out = self.left_out[found[:, 1]]
        rest = found[~left_out]
        rest = rest[np.lexsort((self.tokens[rest[:, 1]], rest[:, 0]))]
        spread = evenly(int(left_out.sum()), size)
        group = np.flatnonzero(~spread) // (GROUP * self.batch)
        pooled = np.empty_like(found)
        pooled[~spread] = rest[np.lexsort((self.encoder[rest[:, 1]], group))]
        pooled[spread] = found[left_out]
        return pooled.reshape(steps, self.batch, 2)[permutation(steps, self.seed, pool, STEP_ORDER, which)]


def evenly(count: int, size: int) -> NDArray[np.bool_]:
    """Which ``count`` of ``size`` places: any n neighbours hold n * count / size of them, rounded up or down."""
    chosen = np.zeros(size, dtype=np.bool_)
    chosen[(2 * np.arange(count) + 1) * size // (2 * max(count, 1))] = True
    return chosen


class ByModalityLength:
    """LLaVA's ``group_by_modality_length``, from one seed and epoch, whatever the ranks.

    An epoch's samples of each modality are cut into megabatches of ``batch``, each of which is dealt into chunks of
    ``chunk`` samples with about as many words; megabatches of both modalities are permuted. The last ones of the two
    make mixed steps, at the epoch's ends; its last step may be smaller.
    """

    def __init__(self, source: Source, sizes: NDArray[np.int64], seed: int, lengths: Lengths) -> None:
        self.sizes, self.seed, self.batch, self.chunks = sizes, seed, source.batch, source.batch // source.chunk
        self.words = lengths.words + lengths.images  # LLaVA's marker of an image is a word
        self.modalities = modalities(lengths, sizes, seed, source.shuffle_shards)
        self.whole = [-(-modality.samples // self.batch) - 1 for modality in self.modalities]  # without the last ones
        self.rest = sum(modality.samples for modality in self.modalities) - self.batch * sum(self.whole)
        self.steps = sum(self.whole) + -(-self.rest // self.batch)  # of an epoch
        self.mixed_first = len(self.modalities) > 1 and self.rest >= self.batch
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def size(self, step: int) -> int:
        return self.batch if (step + 1) % self.steps else (self.rest - 1) % self.batch + 1

    def places(self, step: int, part: range) -> list[Place]:
        return placed(self._step(*divmod(step, self.steps))[part.start : part.stop], self.sizes)

    def _step(self, epoch: int, at: int) -> NDArray[np.int64]:
        """(size, 2): epoch and number of the samples of an epoch's step."""
        if len(self.modalities) == 1:
            return self._megabatch(0, epoch, at)
        place = at - self.mixed_first
        if 0 <= place < sum(self.whole):
            number = int(self._order(epoch)[place])
            which = int(number >= self.whole[0])
            return self._megabatch(which, epoch, number - which * self.whole[0])
        rest = np.concatenate([self._megabatch(which, epoch, self.whole[which]) for which in (1, 0)])
        if not self.mixed_first:
            return rest
        return rest[self.batch :] if at else rest[: self.batch]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Of the megabatches that are not the last of their modality."""
        if epoch not in self._orders:
            order = permutation(sum(self.whole), self.seed, epoch, STEP_ORDER, 0)
            remember(self._orders, epoch, order, CACHED_EPOCHS)
        return self._orders[epoch]

    def _megabatch(self, which: int, epoch: int, number: int) -> NDArray[np.int64]:
        modality = self.modalities[which]
        first, stop = number * self.batch, min((number + 1) * self.batch, modality.samples)
        found = modality.run(epoch * modality.samples + first, epoch * modality.samples + stop)
        words = self.words[found[:, 1]]
        longest = np.argsort(-words, kind="stable")
        return found[longest[dealt(words[longest].tolist(), self.chunks)]]


def dealt(words: Sequence[int], chunks: int) -> list[int]:
    """Numbers of samples, longest first, chunk after chunk: the next one goes to the chunk with the fewest words.

    Chunks are of one size; where that cannot be, samples are dealt in turn.
    """
    if len(words) % chunks:
        return [number for chunk in range(chunks) for number in range(chunk, len(words), chunks)]
    members: list[list[int]] = [[] for _ in range(chunks)]
    fewest = [(0, chunk) for chunk in range(chunks)]  # a heap: among equals the first
    for number, length in enumerate(words):
        total, chunk = heapq.heappop(fewest)
        members[chunk].append(number)
        if len(members[chunk]) < len(words) // chunks:
            heapq.heappush(fewest, (total + length, chunk))
    return [number for chunk in members for number in chunk]
