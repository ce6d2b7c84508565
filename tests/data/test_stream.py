import hashlib
import json
import multiprocessing
import os
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hpc_mm.config import ConfigError, Loader, Source
from hpc_mm.data.batch import Batch
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import ShardInfo, ShardWriter, corpus_digest, read_manifest
from hpc_mm.data.store import open_store
from hpc_mm.data.stream import MicroBatches, Order, Place, make_loader, positions

sizes = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)
seeds = st.integers(0, 2**32)


def order(shards: list[int], seed: int = 0, window: int = 3) -> Order:
    return Order([ShardInfo(f"{i:06d}.tar", size, 0) for i, size in enumerate(shards)], seed, window)


# ---------------------------------------------------------------- the order


@given(shards=sizes, seed=seeds, window=st.integers(1, 14), epoch=st.integers(0, 1000))
def test_every_epoch_holds_every_sample_once(shards: list[int], seed: int, window: int, epoch: int) -> None:
    found = order(shards, seed, window)
    places = [found.locate(epoch * sum(shards) + i) for i in range(sum(shards))]
    assert sorted(places) == [Place(epoch, s, i) for s, size in enumerate(shards) for i in range(size)]


@given(shards=sizes, seed=seeds, window=st.integers(1, 14), asked=st.lists(st.integers(0, 500), max_size=40))
def test_a_position_does_not_depend_on_what_was_asked_before(
    shards: list[int], seed: int, window: int, asked: list[int]
) -> None:
    used = order(shards, seed, window)
    assert [used.locate(position) for position in asked] == [
        order(shards, seed, window).locate(position) for position in asked
    ]


def test_seeds_and_epochs_give_other_orders() -> None:
    shards = [50] * 20
    orders = [
        [order(shards, seed).locate(epoch * 1000 + i)[1:] for i in range(1000)] for seed in (0, 1) for epoch in (0, 1)
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 20  # 1 would be expected by chance


def test_samples_of_a_window_are_well_mixed() -> None:
    """Each of 4 shards of a window gives each quarter of the window its share: 100 of 400, deviation 8.7."""
    found = order([400] * 8, window=4)
    for quarter in range(8):
        counts = Counter(found.locate(quarter * 400 + i).shard for i in range(400))
        assert len(counts) == 4
        assert all(50 < count < 150 for count in counts.values())


def test_the_order_never_changes_with_versions() -> None:
    """A checkpoint of one year must go on in another: this is the order of today."""
    found = order([7, 5, 9, 1, 8], seed=42, window=2)
    text = json.dumps([found.locate(i) for i in range(90)])
    assert text.startswith("[[0, 1, 2], [0, 1, 1], [0, 0, 6], [0, 1, 4], [0")
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "e36938f46ab4c1a3"


def test_memory_does_not_grow_with_samples() -> None:
    """A billion samples in 100,000 shards: O(shards), not O(samples)."""
    shards = [ShardInfo(f"{i}", 10_000, 0) for i in range(100_000)]
    tracemalloc.start()
    found = Order(shards, seed=0, window=16)
    for position in np.linspace(0, 3 * 10**9 - 1, 20).astype(int):
        found.locate(int(position))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6


def test_shards_without_samples_make_no_stream() -> None:
    with pytest.raises(ConfigError, match="without any sample"):
        order([0, 0])


@given(
    share=st.integers(1, 4),
    world=st.sampled_from([1, 2, 3, 4, 8]),
    accumulate=st.sampled_from([1, 2, 3]),
    step=st.integers(0, 10**6),
)
def test_ranks_and_micro_steps_split_a_step_in_order(share: int, world: int, accumulate: int, step: int) -> None:
    batch = share * world * accumulate
    found = [
        position
        for micro_step in range(step * accumulate, (step + 1) * accumulate)
        for rank in range(world)
        for position in positions(micro_step, batch, accumulate, rank, world)
    ]
    assert found == list(range(step * batch, (step + 1) * batch))


# ---------------------------------------------------------------- the loader


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """17 documents in several shards, some with one image only."""
    folder = str(tmp_path_factory.mktemp("documents"))
    with ShardWriter(open_store(folder), "documents", max_bytes=12_000) as writer:
        for number in range(17):
            writer.add(samples.document(number, images=1 + number % 3))
    assert len(read_manifest(open_store(folder))) > 3
    return folder


def source(data: str, **more: Any) -> Source:
    values = {"form": "interleaved", "batch": 12, "max_tokens": 40, "shuffle_shards": 2, "flip": 0.5}
    return Source(data=data, **{**values, **more})


def loader(
    data: Source, rank: int = 0, world: int = 1, accumulate: int = 1, steps: tuple[int, int] = (0, 4), **settings: Any
) -> DataLoader[Batch]:
    reading = Loader(**{"workers": 0, "reads": 3, "prefetch": 2, **settings})
    return make_loader(data, reading, 7, samples.word_tokenizer(), samples.SPEC, rank, world, accumulate, *steps)


def rows(batch: Batch) -> list[tuple[str, list[int], list[int], bytes]]:
    """Everything of every row, without its padding."""
    found, first = [], 0
    for i, name in enumerate(batch.ids):
        length, count = int(batch.attention_mask[i].sum()), int(batch.image_counts[i])
        pixels = batch.images[first : first + count].numpy().tobytes()
        found.append((name, batch.input_ids[i, :length].tolist(), batch.labels[i, :length].tolist(), pixels))
        first += count
    assert first == len(batch.images)
    return found


def steps_of(data: Source, world: int, accumulate: int, steps: tuple[int, int], **settings: Any) -> list[list[Any]]:
    """The rows of every optimizer step in the global order."""
    ranks = [list(loader(data, rank, world, accumulate, steps, **settings)) for rank in range(world)]
    return [
        [
            row
            for micro_step in range(step * accumulate, (step + 1) * accumulate)
            for rank in range(world)
            for row in rows(ranks[rank][micro_step])
        ]
        for step in range(steps[1] - steps[0])
    ]


@settings(max_examples=12)
@given(
    split=st.sampled_from([(1, 2), (1, 12), (2, 1), (2, 3), (3, 1), (3, 2), (4, 1), (4, 3), (6, 2), (12, 1)]),
    first=st.integers(0, 5),
)
def test_a_step_is_the_same_rows_for_any_split_and_restart(documents: str, split: tuple[int, int], first: int) -> None:
    """17 samples in batches of 12: an epoch ends inside a step. Rows are equal to the last pixel."""
    data = source(documents)
    whole = steps_of(data, 1, 1, (0, 6))
    assert steps_of(data, *split, (first, 6)) == whole[first:]


def test_epochs_hold_every_sample_once_through_the_loader(documents: str) -> None:
    names = [row[0] for step in steps_of(source(documents), 2, 1, (0, 17)) for row in step]
    assert len(names) == 17 * 12
    for start, stop in pairwise(range(0, 17 * 12 + 1, 17)):
        assert len(set(names[start:stop])) == 17


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(documents: str, workers: int) -> None:
    data = source(documents, drop_single_image=0.5)
    assert steps_of(data, 1, 2, (0, 3), workers=workers) == steps_of(data, 1, 2, (0, 3))


def test_flips_differ_by_epoch_and_not_by_split(documents: str) -> None:
    found: dict[str, set[bytes]] = {}
    for step in steps_of(source(documents), 1, 1, (0, 17)):
        for name, _, _, pixels in step:
            found.setdefault(name, set()).add(pixels)
    assert all(1 < len(pixels) <= 8 for pixels in found.values())  # of 12 epochs; 3 images have 8 ways to be flipped
    unflipped = steps_of(source(documents, flip=0.0), 1, 1, (0, 17))
    assert len({row for step in unflipped for row in map(repr, step)}) == 17


def test_two_sources_do_not_disturb_each_other(documents: str, tmp_path: Path) -> None:
    with ShardWriter(open_store(str(tmp_path)), "pairs", max_bytes=12_000) as writer:
        for number in range(10):
            writer.add(samples.pair(number))
    pairs = source(str(tmp_path), form="pairs", batch=5)
    alone = [rows(batch) for batch in loader(source(documents))], [rows(batch) for batch in loader(pairs)]
    together = [(rows(one), rows(two)) for one, two in zip(loader(source(documents)), loader(pairs), strict=True)]
    assert (together) == list(zip(*alone, strict=True))


def spawned(dataset: MicroBatches, queue: Any) -> None:
    queue.put([rows(dataset[i]) for i in range(3)])


def test_a_stream_travels_to_a_spawned_process(documents: str) -> None:
    dataset = loader(source(documents)).dataset
    expected = [rows(dataset[i]) for i in range(3)]  # it has threads and open indexes now
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=spawned, args=(dataset, queue))
    process.start()
    assert queue.get(timeout=120) == expected
    process.join()


def test_a_cache_folder_changes_nothing_and_serves_again(documents: str, tmp_path: Path) -> None:
    data = source(documents)
    plain = steps_of(data, 1, 1, (0, 4))
    assert steps_of(data, 1, 1, (0, 4), cache=str(tmp_path / "cache"), cache_gb=1) == plain
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(kept) == 17
    for shard in read_manifest(open_store(documents)):
        os.rename(Path(documents, shard.name), Path(documents, shard.name + ".away"))
    try:
        assert steps_of(data, 1, 1, (0, 4), cache=str(tmp_path / "cache"), cache_gb=1) == plain
    finally:
        for shard in read_manifest(open_store(documents)):
            os.rename(Path(documents, shard.name + ".away"), Path(documents, shard.name))


# ---------------------------------------------------------------- what cannot be read


def test_unreadable_samples_leave_their_places_empty(tmp_path: Path) -> None:
    broken = Sample("broken", (Image(b"\xff\xd8 no jpeg"), Text("a circle")))
    with ShardWriter(open_store(str(tmp_path)), "pairs", max_bytes=1) as writer:  # a shard each
        for sample in (samples.pair(0), broken, samples.pair(2), samples.pair(3), samples.pair(4), samples.pair(5)):
            writer.add(sample)
    (tmp_path / "pairs-000002.tar").unlink()
    (tmp_path / "pairs-000003.tar.index.json").write_text("{")
    (tmp_path / "pairs-000004.tar").write_bytes(bytes(10_000))
    for workers in (0, 2):
        batches = list(loader(source(str(tmp_path), form="pairs", batch=6), steps=(0, 2), workers=workers))
        for batch in batches:
            assert sorted(batch.ids) == ["pair00000", "pair00005"] and batch.input_ids.shape[0] == 2
            reasons = dict(batch.unreadable)
            assert set(reasons) == {"broken", *(f"pairs-00000{i}.tar:0" for i in (2, 3, 4))}
            assert "image 0" in reasons["broken"]
            assert reasons["pairs-000002.tar:0"].startswith("no pairs-000002.tar in")
            assert "is no shard index" in reasons["pairs-000003.tar:0"]
            assert "sample pair00004" in reasons["pairs-000004.tar:0"]


def test_an_index_with_fewer_samples_than_the_manifest_leaves_places_empty(tmp_path: Path) -> None:
    for count in (4, 3):
        with ShardWriter(open_store(str(tmp_path / f"{count}")), "pairs") as writer:
            for number in range(count):
                writer.add(samples.pair(number))
    name = "pairs-000000.tar.index.json"
    (tmp_path / "4" / name).write_bytes((tmp_path / "3" / name).read_bytes())
    (batch,) = loader(source(str(tmp_path / "4"), form="pairs", batch=4), steps=(0, 1))
    assert len(batch.ids) == 3
    assert [place for place, _ in batch.unreadable] == ["pairs-000000.tar:3"]


def test_a_stream_knows_its_corpus(documents: str) -> None:
    dataset = loader(source(documents)).dataset
    assert isinstance(dataset, MicroBatches)
    assert dataset.corpus == corpus_digest(read_manifest(open_store(documents)))


def test_a_rank_without_any_row_still_has_a_batch(tmp_path: Path) -> None:
    with ShardWriter(open_store(str(tmp_path)), "texts") as writer:
        for number in range(4):
            writer.add(Sample(f"text{number}", (Text("a circle"),)))
    (batch,) = loader(source(str(tmp_path), batch=4), steps=(0, 1))
    assert batch.ids == [] and batch.targets == 0
    assert sorted(batch.left_out) == [(f"text{number}", "0 images (min_images)") for number in range(4)]
    assert batch.input_ids.shape == batch.attention_mask.shape == (1, 1)
    assert batch.images.shape == (0, 3, 16, 16) and batch.image_counts.tolist() == [0]


def test_a_user_error_in_a_worker_is_raised(documents: str) -> None:
    with pytest.raises(ConfigError, match="have no similarity"):
        list(loader(source(documents, min_similarity=0.2), workers=1))


def test_a_loader_over_nothing_is_refused_at_once(tmp_path: Path, documents: str) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        loader(source(str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"index.json is missing"):
        loader(source(str(tmp_path)))
    with pytest.raises(ConfigError, match="batch=12 cannot be divided over 5 ranks x 1 micro-steps"):
        loader(source(documents), world=5)


def test_batches_can_be_moved(documents: str) -> None:
    (batch,) = loader(source(documents), steps=(0, 1))
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.images.dtype == torch.bfloat16 and moved.input_ids.dtype == torch.int64
    torch.testing.assert_close(moved.images.float(), batch.images, atol=0.02, rtol=0.01)
    assert moved.ids == batch.ids
