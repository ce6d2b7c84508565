import multiprocessing
import os
import random
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from chat_samples import chat, t5_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from hpc_mm.config import IMAGE_PLACE, IMAGE_TOKEN, ConfigError, ImageSpec, Loader, Source
from hpc_mm.data.batch import Batch
from hpc_mm.data.chat import EncoderDecoderBatch
from hpc_mm.data.order import Order
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import ShardReader, ShardWriter, corpus_digest, read_manifest
from hpc_mm.data.store import open_store
from hpc_mm.data.stream import StepLoader, Steps, make_loader

TOKENIZER = samples.word_tokenizer()
IMAGE = TOKENIZER.convert_tokens_to_ids(IMAGE_TOKEN)
Row = tuple[str, list[int], list[int], bytes]  # id, tokens, labels, pixels

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


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """10 image-caption pairs in several shards."""
    folder = str(tmp_path_factory.mktemp("pairs"))
    with ShardWriter(open_store(folder), "pairs", max_bytes=12_000) as writer:
        for number in range(10):
            writer.add(samples.pair(number))
    return folder


def source(data: str, **more: Any) -> Source:
    values = {"form": "interleaved", "batch": 12, "max_tokens": 40, "shuffle_shards": 2, "flip": 0.5}
    return Source(data=data, **{**values, **more})


def loader(
    data: Source, rank: int = 0, world: int = 1, accumulate: int = 1, steps: tuple[int, int] = (0, 4), **settings: Any
) -> DataLoader[list[Batch]]:
    reading = Loader(**{"workers": 0, "reads": 3, "prefetch": 2, **settings})
    return make_loader(data, reading, 7, TOKENIZER, samples.SPEC, rank, world, accumulate, *steps)


def rows(batches: list[Batch]) -> list[Row]:
    """Everything of every sample of a rank's step, without its padding and whatever row it is in."""
    found = []
    for batch in batches:
        names, images = iter(batch.ids), iter(batch.images.numpy())
        segments = batch.attention_mask - 1 if batch.segments is None else batch.segments
        for i in range(len(batch.ids) and len(segments)):
            for segment in range(int(segments[i].max()) + 1):
                here = segments[i] == segment
                ids, labels = batch.input_ids[i][here], batch.labels[i][here]
                pixels = b"".join(next(images).tobytes() for _ in range(int((ids == IMAGE).sum())))
                found.append((next(names), ids.tolist(), labels.tolist(), pixels))
        assert not list(names) and not list(images)
    return found


def steps_of(data: Source, world: int, accumulate: int, steps: tuple[int, int], **settings: Any) -> list[list[Row]]:
    """The rows of every optimizer step in the global order."""
    ranks = [list(loader(data, rank, world, accumulate, steps, **settings)) for rank in range(world)]
    for found in ranks:
        assert [len(batches) for batches in found] == [accumulate] * (steps[1] - steps[0])
    return [[row for batches in step for row in rows(batches)] for step in zip(*ranks, strict=True)]


@settings(max_examples=12)
@given(world=st.integers(1, 13), accumulate=st.integers(1, 3), first=st.integers(0, 5))
def test_a_step_is_the_same_rows_for_any_split_and_restart(
    documents: str, world: int, accumulate: int, first: int
) -> None:
    """17 samples in batches of 12: an epoch ends inside a step. Rows are equal to the last pixel."""
    data = source(documents)
    whole = steps_of(data, 1, 1, (0, 6))
    assert steps_of(data, world, accumulate, (first, 6)) == whole[first:]


def test_a_stream_is_its_order_without_gaps(documents: str) -> None:
    data = source(documents, batch=5, batch_from={3: 0, 5: 11})
    store = open_store(documents)
    reader, shards = ShardReader(store), read_manifest(store)
    places = Order(shards.samples, 7, data.shuffle_shards)
    expected = [reader.read(shards.names[shard], sample).id for _, shard, sample in places.run(0, 15 + 44).tolist()]
    found = steps_of(data, 3, 2, (0, 9))
    assert [len(step) for step in found] == [5] * 3 + [0] * 2 + [11] * 4
    assert [row[0] for step in found for row in step] == expected


def test_epochs_hold_every_sample_once_through_the_loader(documents: str) -> None:
    names = [row[0] for step in steps_of(source(documents), 2, 1, (0, 17)) for row in step]
    assert len(names) == 17 * 12
    for start, stop in pairwise(range(0, 17 * 12 + 1, 17)):
        assert len(set(names[start:stop])) == 17


class Readers(Steps):
    """Who reads each step."""

    def __init__(self) -> None:
        self._readings = {}

    def __getitem__(self, step: int) -> Any:
        return step, os.getpid()


def test_a_rank_reads_its_first_step_itself() -> None:
    steps: list[Any] = list(StepLoader(Readers(), range(3, 7), num_workers=1, multiprocessing_context="fork"))
    assert [step for step, _ in steps] == [3, 4, 5, 6]
    assert [process == os.getpid() for _, process in steps] == [True, False, False, False]
    assert list(StepLoader(Readers(), range(5, 5))) == []


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(documents: str, workers: int) -> None:
    data = source(documents, drop_single_image=0.5)
    assert steps_of(data, 1, 2, (0, 3), workers=workers) == steps_of(data, 1, 2, (0, 3))


def test_workers_are_forked_whatever_python_would_do(documents: str) -> None:
    """Python 3.14 has a fork server; ``outlive_signals`` needs the rank as parent, and no other threads."""
    assert loader(source(documents), workers=1).multiprocessing_context.get_start_method() == "fork"


def test_flips_differ_by_epoch_and_not_by_split(documents: str) -> None:
    found: dict[str, set[bytes]] = {}
    for step in steps_of(source(documents), 1, 1, (0, 17)):
        for name, _, _, pixels in step:
            found.setdefault(name, set()).add(pixels)
    assert all(1 < len(pixels) <= 8 for pixels in found.values())  # of 12 epochs; 3 images have 8 ways to be flipped
    unflipped = steps_of(source(documents, flip=0.0), 1, 1, (0, 17))
    assert len({row for step in unflipped for row in map(repr, step)}) == 17


def test_two_sources_do_not_disturb_each_other(documents: str, pairs: str) -> None:
    sources = source(documents), source(pairs, form="pairs", batch=5)
    alone = [list(map(rows, loader(one))) for one in sources]
    together = [(rows(one), rows(two)) for one, two in zip(*map(loader, sources), strict=True)]
    assert together == list(zip(*alone, strict=True))


@pytest.mark.parametrize(("cores", "threads", "decoders"), [(16, 1, 16), (16, 8, 2), (4, 8, 1)])
def test_without_workers_as_many_decode_as_there_are_cores(
    documents: str, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, decoders: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    dataset = loader(source(documents), reads=16).dataset
    assert isinstance(dataset, Steps)
    places = dataset._reading().decoders
    taken = 0
    while places.acquire(blocking=False):
        taken += 1
    assert taken == decoders


def spawned(dataset: Steps, queue: Any) -> None:
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


# ---------------------------------------------------------------- chats

PATCHES = ImageSpec(16, samples.SPEC.mean, samples.SPEC.std, square="pad", tokens=500)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """15 chats of 1 to 3 questions and 0 to 2 images, and 2 pairs, in several shards."""
    folder = str(tmp_path_factory.mktemp("chats"))
    with ShardWriter(open_store(folder), "chats", max_bytes=12_000) as writer:
        for number in range(15):
            writer.add(chat(number, questions=1 + number % 3, images=number % 5 // 2))
        for number in range(2):
            writer.add(samples.pair(number))
    return folder


def chat_batches(
    data: Source, rank: int = 0, world: int = 1, accumulate: int = 1, last: int = 3, **settings: Any
) -> list[list[EncoderDecoderBatch]]:
    reading = Loader(**{"workers": 0, "reads": 3, "prefetch": 2, **settings})
    found: Any = list(make_loader(data, reading, 7, t5_tokenizer(), PATCHES, rank, world, accumulate, 0, last))
    assert all(isinstance(batch, EncoderDecoderBatch) for step in found for batch in step)
    return found


def chat_rows(batches: list[EncoderDecoderBatch]) -> list[Row]:
    """As ``rows``."""
    found = []
    for batch in batches:
        names, images = iter(batch.ids), iter(batch.images.numpy())
        for i in range(len(batch.ids)):
            ids, labels = batch.input_ids[i][batch.attention_mask[i] > 0], batch.labels[i][batch.labels[i] != -100]
            pixels = b"".join(next(images).tobytes() for _ in range(int((ids == IMAGE_PLACE).sum())))
            found.append((next(names), ids.tolist(), labels.tolist(), pixels))
        assert not list(names) and not list(images)
    return found


def chat_source(data: str, **more: Any) -> Source:
    return source(data, **{"form": "chat", "template": "t5_v1", "max_tokens": 240, **more})


@pytest.mark.parametrize("template", ["t5_v1", "t5_plain_split_text"])
def test_chats_are_the_same_for_any_split_and_workers(chats: str, template: str) -> None:
    data = chat_source(chats, template=template)
    whole = [chat_rows(step) for step in chat_batches(data)]
    assert sum(map(len, whole)) == 36 if template == "t5_v1" else 0 < sum(map(len, whole)) < 36
    for world, accumulate, workers in ((2, 1, 1), (3, 2, 0), (13, 1, 0)):
        ranks = [chat_batches(data, rank, world, accumulate, workers=workers) for rank in range(world)]
        together = [[row for batches in step for row in chat_rows(batches)] for step in zip(*ranks, strict=True)]
        assert together == whole


def test_what_templates_leave_out_and_cut_is_listed(chats: str) -> None:
    ((batch,),) = chat_batches(chat_source(chats, template="t5_plain", batch=17, max_tokens=4), last=1)
    reasons = Counter(reason for _, reason in batch.left_out)
    assert reasons == {"several questions (t5_plain)": 10, "no image (t5_plain)": 2}
    unfinished = [name for name, labels in zip(batch.ids, batch.labels, strict=True) if 1 not in labels]
    assert len(batch.ids) == 5 and batch.cut == unfinished != [] and not batch.unreadable


def test_chats_of_like_length_share_a_micro_batch_with_their_images_and_answers(chats: str) -> None:
    """An image takes 500 places, more than any text here."""
    ((one, two, three),) = chat_batches(chat_source(chats, batch=17), accumulate=3, last=1, by_length=True)
    counts = [count for batch in (one, two, three) for count in batch.image_counts.tolist()]
    assert counts == sorted(counts)
    lengths = [
        int(batch.attention_mask[i].sum()) + 499 * batch.image_counts[i] + int((batch.labels[i] != -100).sum())
        for batch in (one, two, three)
        for i in range(len(batch.ids))
    ]
    assert lengths == sorted(lengths) and len(lengths) == 17


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (3, 2)])
def test_packed_chats_are_the_same_and_fit_their_rows(chats: str, world: int, accumulate: int) -> None:
    room = 700  # one image of 500 places and its text, or several chats without any
    data = chat_source(chats, template="t5_v1", pack_tokens=room)
    whole = [chat_rows(step) for step in chat_batches(chat_source(chats, template="t5_v1"))]
    ranks = [chat_batches(data, rank, world, accumulate) for rank in range(world)]
    rows_of_several = 0
    for place, step in enumerate(zip(*ranks, strict=True)):
        batches = [batch for own in step for batch in own]
        assert sorted(name for batch in batches for name in batch.ids) == sorted(row[0] for row in whole[place])
        assert sum(batch.targets for batch in batches) == sum(len(row[2]) for row in whole[place])
        for batch in batches:
            assert batch.tokens <= batch.padded_tokens
            if batch.segments is not None and batch.answer_segments is not None:
                taken = batch.places.sum(1) + (batch.labels != -100).sum(1)
                several = batch.segments.max(1).values > 0
                assert torch.equal(several, batch.answer_segments.max(1).values > 0)
                assert (taken[several] <= room).all()
                rows_of_several += int(several.sum())
    assert rows_of_several


def test_a_rank_without_any_chat_still_has_a_batch(tmp_path: Path) -> None:
    with ShardWriter(open_store(str(tmp_path)), "texts") as writer:
        for number in range(4):
            writer.add(Sample(f"text{number}", (Text("a circle", "user"),)))
    ((batch,),) = chat_batches(chat_source(str(tmp_path), batch=4), last=1)
    assert batch.ids == [] and batch.targets == 0 and batch.labels.shape == (1, 1)
    assert sorted(batch.left_out) == [(f"text{number}", "no answer at the end") for number in range(4)]


# ---------------------------------------------------------------- coming back

WORLDS, WORKERS, PACKING = (1, 2, 3, 4, 8), (0, 1, 2, 5), (0, 64)


def blend(documents: str, pairs: str, pack_tokens: int) -> list[Source]:
    """Three sources of other sizes and forms, one of which pauses and grows."""
    few_images = {"pack_images": 7} if pack_tokens else {}
    return [
        source(documents, batch=8, drop_single_image=0.5, pack_tokens=pack_tokens),
        source(documents, batch=5, batch_from={9: 2, 120: 0, 140: 9}, shuffle_shards=5, pack_tokens=pack_tokens),
        source(pairs, batch=4, form="pairs", pack_tokens=pack_tokens, **few_images),
    ]


def assert_undisturbed(ranks: list[list[Row]], expected: list[Row], stream_order: bool) -> None:
    """The rows of one step, rank after rank; a rank that packs or sorts has its run of the stream in another order."""
    done = 0
    for found in ranks:
        run = expected[done : done + len(found)]
        assert found == run if stream_order else sorted(found) == sorted(run)
        done += len(found)
    assert done == len(expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(("stops", "processes"), [(50, 10), pytest.param(200, 40, marks=pytest.mark.chaos)])
def test_stops_change_nothing(documents: str, pairs: str, stops: int, processes: int) -> None:
    """A run is stopped so many times, after a step or two each, and goes on with other ranks, workers and micro-steps.

    Every (world, workers) of so many worker processes is met with them; they have read ahead when they are stopped.
    They are slow to start, so there packing alternates, such that every world and every number of workers is met with
    and without.
    """
    draw = random.Random(0)
    splits = [
        (world, workers, PACKING[(i + j) % 2])
        for i, world in enumerate(WORLDS)
        for j, workers in enumerate(WORKERS)
        if world * workers <= processes
    ]
    splits += [(draw.choice(WORLDS), 0, draw.choice(PACKING)) for _ in range(stops + 1 - len(splits))]
    draw.shuffle(splits)
    # With workers the first step of each leg is read by the rank itself, so that it takes two to see a worker's.
    counts = [2 if workers else draw.randint(1, 2) for _, workers, _ in splits]
    last = sum(counts)
    whole = [steps_of(one, 1, 1, (0, last)) for one in blend(documents, pairs, pack_tokens=0)]
    step = 0
    for (world, workers, pack_tokens), count in zip(splits, counts, strict=True):
        accumulate, by_length, end = draw.randint(1, 3), draw.random() < 0.3, min(step + count + 2, last)
        options = {"workers": workers, "by_length": by_length, "prefetch": 1}
        for one, expected in zip(blend(documents, pairs, pack_tokens), whole, strict=True):
            ranks = [loader(one, rank, world, accumulate, (step, end), **options) for rank in range(world)]
            for place, found in enumerate(islice(zip(*ranks, strict=True), count), start=step):
                assert_undisturbed(list(map(rows, found)), expected[place], not (pack_tokens or by_length))
        step += count


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
        found = list(loader(source(str(tmp_path), form="pairs", batch=6), steps=(0, 2), accumulate=2, workers=workers))
        for batch, other in found:
            assert sorted(batch.ids + other.ids) == ["pair00000", "pair00005"] and len(batch.ids) == 1
            assert not other.unreadable  # all of a step's are with its first micro-batch
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
    ((batch,),) = loader(source(str(tmp_path / "4"), form="pairs", batch=4), steps=(0, 1))
    assert len(batch.ids) == 3
    assert [place for place, _ in batch.unreadable] == ["pairs-000000.tar:3"]


def test_a_stream_knows_its_corpus(documents: str) -> None:
    dataset = loader(source(documents)).dataset
    assert isinstance(dataset, Steps)
    assert dataset.corpus == corpus_digest(read_manifest(open_store(documents)))


def test_a_rank_without_any_row_still_has_a_batch(tmp_path: Path) -> None:
    with ShardWriter(open_store(str(tmp_path)), "texts") as writer:
        for number in range(4):
            writer.add(Sample(f"text{number}", (Text("a circle"),)))
    ((batch,),) = loader(source(str(tmp_path), batch=4), steps=(0, 1))
    assert batch.ids == [] and batch.targets == 0
    assert sorted(batch.left_out) == [(f"text{number}", "0 images (min_images)") for number in range(4)]
    assert batch.input_ids.shape == batch.attention_mask.shape == (1, 1)
    assert batch.image_counts.tolist() == [0] and batch.to("cpu").images.shape == (0, 3, 16, 16)


def test_more_ranks_than_samples_leave_some_with_nothing(documents: str) -> None:
    data = source(documents, batch=1, batch_from={1: 3, 2: 0})
    found = [[[len(batch.ids) for batch in step] for step in loader(data, rank, 4, 2, (0, 3))] for rank in range(4)]
    assert found == [[[0, 0], [0, 0], [0, 0]], *[[[0, 0], [0, 1], [0, 0]]] * 2, [[0, 1], [0, 1], [0, 0]]]


def test_a_user_error_in_a_worker_is_raised(documents: str) -> None:
    with pytest.raises(ConfigError, match="have no similarity"):
        list(loader(source(documents, min_similarity=0.2), workers=1))


def test_a_loader_over_nothing_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        loader(source(str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"index.json is missing"):
        loader(source(str(tmp_path)))


@pytest.mark.parametrize("layout", [{}, {"pack_tokens": 40}])
def test_page_locking_reaches_every_tensor(documents: str, layout: dict[str, int], monkeypatch: Any) -> None:
    """What DataLoader does beside a GPU; without one, Tensor.pin_memory is replaced by a copy."""
    ((batch,),) = loader(source(documents, **layout), steps=(0, 1))
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(id(tensor)) or tensor.clone())
    (found,) = pin_memory([batch])
    assert isinstance(found, Batch) and rows([found]) == rows([batch])
    assert sorted(pinned) == sorted(id(value) for value in vars(batch).values() if isinstance(value, torch.Tensor))
