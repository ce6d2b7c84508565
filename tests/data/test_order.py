import hashlib
import json
import tracemalloc
from collections import Counter
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hpc_mm.config import ConfigError, Source
from hpc_mm.data.lengths import Lengths
from hpc_mm.data.order import (
    POOL,
    ByLength,
    ByModalityLength,
    Order,
    Place,
    StepOrder,
    dealt,
    make_order,
    samples_before,
)
from hpc_mm.data.packing import share

IMAGE_TOKENS = 576

sizes = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)
seeds = st.integers(0, 2**32)


def order(shards: list[int], seed: int = 0, window: int = 3) -> Order:
    return Order(shards, seed, window)


def source(**more: Any) -> Source:
    return Source(**{"data": "x", "form": "interleaved", "batch": 12, "max_tokens": 40, "shuffle_shards": 3, **more})


# ---------------------------------------------------------------- the order


@given(shards=sizes, seed=seeds, window=st.integers(1, 14), epoch=st.integers(0, 1000))
def test_every_epoch_holds_every_sample_once(shards: list[int], seed: int, window: int, epoch: int) -> None:
    found = order(shards, seed, window)
    places = found.run(epoch * sum(shards), (epoch + 1) * sum(shards)).tolist()
    assert sorted(places) == [[epoch, s, i] for s, size in enumerate(shards) for i in range(size)]


@given(shards=sizes, seed=seeds, window=st.integers(1, 14), asked=st.lists(st.integers(0, 500), max_size=40))
def test_a_position_does_not_depend_on_what_was_asked_before(
    shards: list[int], seed: int, window: int, asked: list[int]
) -> None:
    used = order(shards, seed, window)
    whole = order(shards, seed, window).run(0, 501).tolist()
    assert [used.run(position, position + 1).tolist() for position in asked] == [
        [whole[position]] for position in asked
    ]


def test_seeds_and_epochs_give_other_orders() -> None:
    shards = [50] * 20
    orders = [order(shards, seed).run(epoch * 1000, (epoch + 1) * 1000)[:, 1:] for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).all(1).sum() < 20  # 1 would be expected by chance


def test_samples_of_a_window_are_well_mixed() -> None:
    """Each of 4 shards of a window gives each quarter of the window its share: 100 of 400, deviation 8.7."""
    found = order([400] * 8, window=4)
    for quarter in range(8):
        counts = Counter(found.run(quarter * 400, (quarter + 1) * 400)[:, 1].tolist())
        assert len(counts) == 4
        assert all(50 < count < 150 for count in counts.values())


def test_the_order_never_changes_with_versions() -> None:
    """A checkpoint of one year must go on in another: this is the order of today."""
    found = order([7, 5, 9, 1, 8], seed=42, window=2)
    text = json.dumps(found.run(0, 90).tolist())
    assert text.startswith("[[0, 1, 2], [0, 1, 1], [0, 0, 6], [0, 1, 4], [0")
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "e36938f46ab4c1a3"


def test_memory_does_not_grow_with_samples() -> None:
    """A billion samples in 100,000 shards: O(shards), not O(samples)."""
    shards = [10_000] * 100_000
    tracemalloc.start()
    found = order(shards, window=16)
    for position in np.linspace(0, 3 * 10**9 - 1, 20).astype(int):
        found.run(position, position + 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6


def test_shards_without_samples_make_no_stream() -> None:
    with pytest.raises(ConfigError, match="without any sample"):
        order([0, 0])


changes = st.dictionaries(st.integers(1, 300), st.integers(0, 9), max_size=4)


@given(batch=st.integers(1, 9), batch_from=changes, step=st.integers(0, 400))
def test_steps_follow_one_another_whatever_their_sizes(batch: int, batch_from: dict[int, int], step: int) -> None:
    found = source(batch=batch, batch_from=batch_from)
    sizes = [
        batch_from[max(s for s in batch_from if s <= at)] if any(s <= at for s in batch_from) else batch
        for at in range(step)
    ]
    assert samples_before(found, step) == sum(sizes)


def test_a_place_far_away_is_exact_and_found_at_once() -> None:
    found = source(batch=4097, batch_from={10**6: 8191, 2 * 10**6: 0, 3 * 10**6: 3})
    assert samples_before(found, 10**15) == 4097 * 10**6 + 8191 * 10**6 + 3 * (10**15 - 3 * 10**6)


# ---------------------------------------------------------------- steps by length and modality


def lengths(samples: int, with_images: int, seed: int = 0) -> Lengths:
    """Of so many samples, of which so many, anywhere among them, have an image or two."""
    draw = np.random.default_rng(seed)
    images = np.zeros(samples, np.int32)
    images[draw.permutation(samples)[:with_images]] = draw.integers(1, 3, with_images)
    encoder, decoder, words = (draw.geometric(0.02, samples).astype(np.int32) for _ in range(3))
    return Lengths(encoder, decoder, images, words)


def chats(kind: str, batch: int, **more: Any) -> Source:
    chunk = {"chunk": more.pop("chunk", 1)} if kind == "modality_length" else {}
    return source(form="chat", template="t5_v1", order=kind, batch=batch, **chunk, **more)


def steps_of(kind: str, shards: list[int], found: Lengths, seed: int, batch: int, **more: Any) -> StepOrder:
    return make_order(chats(kind, batch, **more), np.array(shards), seed, found, IMAGE_TOKENS)


def step(found: StepOrder, number: int) -> list[Place]:
    return found.places(number, range(found.size(number)))


def numbers(places: list[Place], shards: list[int]) -> NDArray[np.int64]:
    starts = np.cumsum([0, *shards])
    return np.array([starts[place.shard] + place.sample for place in places], dtype=np.int64)


@st.composite
def corpora(draw: Any) -> tuple[list[int], Lengths]:
    shards = draw(sizes)
    return shards, lengths(sum(shards), draw(st.integers(0, sum(shards))), draw(st.integers(0, 9)))


kinds = st.sampled_from(["random", "length", "modality_length"])


@given(
    kind=kinds,
    corpus=corpora(),
    seed=seeds,
    batch=st.integers(1, 9),
    at=st.integers(0, 500),
    world=st.integers(1, 10),
    accumulate=st.integers(1, 4),
)
def test_shares_of_ranks_and_micro_steps_make_the_step_at_any_restart(
    kind: str, corpus: tuple[list[int], Lengths], seed: int, batch: int, at: int, world: int, accumulate: int
) -> None:
    """Each rank asks anew for its share of one step, whatever has been asked before, as after a restart there."""
    shards, found = corpus
    used = steps_of(kind, shards, found, seed, batch)
    for before in range(max(0, at - 3), at):
        step(used, before)
    whole = step(used, at)
    parts = []
    for rank in range(world):
        fresh = steps_of(kind, shards, found, seed, batch)
        mine = fresh.places(at, share(fresh.size(at), rank, world))
        parts += [mine[i] for part in range(accumulate) for i in share(len(mine), part, accumulate)]
    assert parts == whole


@given(corpus=corpora(), seed=seeds, batch=st.integers(1, 9))
def test_by_length_every_step_is_whole_and_of_one_modality(
    corpus: tuple[list[int], Lengths], seed: int, batch: int
) -> None:
    shards, found = corpus
    steps = steps_of("length", shards, found, seed, batch)
    for at in range(60):
        images = found.images[numbers(step(steps, at), shards)] > 0
        assert len(images) == steps.size(at) == batch
        assert images.all() or not images.any()


@given(corpus=corpora(), seed=seeds, batch=st.integers(1, 9))
def test_by_length_an_epoch_of_a_modality_holds_each_of_its_samples_once(
    corpus: tuple[list[int], Lengths], seed: int, batch: int
) -> None:
    """Up to the end of a pool; all that has begun by then but the last epoch is whole, and that has no copy."""
    shards, found = corpus
    steps = steps_of("length", shards, found, seed, batch)
    assert isinstance(steps, ByLength)
    for which, modality in enumerate(steps.modalities):
        pools = 3 * min(POOL, max(1, modality.samples // batch))
        turns = islice((at for at in count() if steps.turn(at)[0] == which), pools)
        places = [place for at in turns for place in step(steps, at)]
        epochs = Counter(place.epoch for place in places)
        assert len(set(places)) == len(places) == pools * batch
        assert all(epochs[epoch] == modality.samples for epoch in range(max(epochs)))
        assert set(numbers(places, shards)) <= set(modality.numbers)


@given(samples=st.integers(1, 400), left_out=st.floats(0, 1), seed=seeds, batch=st.integers(1, 9))
def test_by_length_samples_that_are_left_out_are_spread_over_a_pool(
    samples: int, left_out: float, seed: int, batch: int
) -> None:
    """Each step holds its share of a pool's, rounded up or down, and every sample comes once."""
    found = lengths(samples, 0)
    empty = np.random.default_rng(seed).random(samples) < left_out
    found.encoder[empty] = found.decoder[empty] = 0
    steps = steps_of("length", [samples], found, seed, batch)
    pool = min(POOL, max(1, samples // batch))
    for first in range(0, 3 * pool, pool):
        places = [step(steps, at) for at in range(first, first + pool)]
        counts = [int(empty[numbers(one, [samples])].sum()) for one in places]
        assert {*counts} <= {sum(counts) // pool, -(-sum(counts) // pool)}
        assert len({place for one in places for place in one}) == pool * batch


@given(text=st.integers(0, 50), images=st.integers(0, 50))
def test_both_modalities_get_through_their_epochs_at_one_pace(text: int, images: int) -> None:
    assume(text + images)
    steps = steps_of("length", [text + images], lengths(text + images, images), 0, 1)
    assert isinstance(steps, ByLength)
    seen = Counter(len(steps.modalities) > 1 and steps.turn(at)[0] for at in range(7 * (text + images)))
    assert sorted(seen.values()) == sorted(7 * count for count in (text, images) if count)
    done = 0
    for at in range(text + images):
        done += images > 0 and steps.turn(at)[0] == len(steps.modalities) - 1
        assert abs(done - (at + 1) * images / (text + images)) < 1


@settings(max_examples=50)
@given(corpus=corpora(), seed=seeds, chunks=st.integers(1, 4), chunk=st.integers(1, 4), epoch=st.integers(0, 9))
def test_llava_an_epoch_holds_every_sample_once(
    corpus: tuple[list[int], Lengths], seed: int, chunks: int, chunk: int, epoch: int
) -> None:
    """All steps are whole but an epoch's last, and of one modality but its first and last."""
    shards, found = corpus
    steps = steps_of("modality_length", shards, found, seed, chunks * chunk, chunk=chunk)
    assert isinstance(steps, ByModalityLength)
    epochs = [step(steps, epoch * steps.steps + at) for at in range(steps.steps)]
    places = [place for places in epochs for place in places]
    assert sorted(places) == [Place(epoch, s, i) for s, size in enumerate(shards) for i in range(size)]
    assert [len(places) for places in epochs] == [steps.size(at) for at in range(steps.steps)]
    assert {len(places) for places in epochs[:-1]} <= {chunks * chunk}
    for places in epochs[1:-1]:
        assert len(set(found.images[numbers(places, shards)] > 0)) == 1


def published(found: Lengths, shuffled: list[list[int]], megabatches: list[int], batch: int, chunks: int) -> list[int]:
    """An epoch by the rule as it is described, from permutations of images, of texts, and of megabatches."""
    words = found.words + found.images
    groups = []
    for permutation in shuffled:
        groups.append([])
        for start in range(0, len(permutation), batch):
            left = sorted(permutation[start : start + batch], key=lambda i: -words[i])
            if len(left) % chunks:
                groups[-1].append([i for c in range(chunks) for i in left[c::chunks]])
                continue
            filled: list[list[int]] = [[] for _ in range(chunks)]
            for i in left:
                open_ones = [c for c in filled if len(c) < len(left) // chunks]
                min(open_ones, key=lambda c: sum(words[j] for j in c)).append(i)
            groups[-1].append([i for c in filled for i in c])
    leftover = groups[0].pop() + groups[1].pop()
    middle = [(groups[1] + groups[0])[i] for i in megabatches]
    if len(leftover) >= batch:
        middle, leftover = [leftover[:batch], *middle], leftover[batch:]
    return [i for part in [*middle, leftover] for i in part]


@pytest.mark.parametrize(("texts", "images"), [(50, 70), (59, 61), (24, 24), (3, 100), (31, 30)])
def test_llava_by_its_rule_from_the_same_permutations(texts: int, images: int) -> None:
    found, batch, chunk = lengths(texts + images, images), 12, 3
    shards = [texts, images]
    steps = steps_of("modality_length", shards, found, 5, batch, chunk=chunk)
    assert isinstance(steps, ByModalityLength)
    for epoch in range(3):
        permutations = [m.run(epoch * m.samples, (epoch + 1) * m.samples)[:, 1].tolist() for m in steps.modalities]
        expected = published(found, permutations[::-1], steps._order(epoch).tolist(), batch, batch // chunk)
        got = [step(steps, epoch * steps.steps + at) for at in range(steps.steps)]
        assert np.concatenate([numbers(places, shards) for places in got]).tolist() == expected


def test_chunks_get_about_as_many_words() -> None:
    assert dealt([9, 8, 7, 6, 5, 4], 2) == [0, 3, 4, 1, 2, 5]  # 9 6 5 and 8 7 4
    assert dealt([9, 1, 1, 1], 2) == [0, 3, 1, 2]  # a chunk is closed when it has its samples
    assert dealt([3, 2, 1], 2) == [0, 2, 1]


def test_the_orders_by_length_never_change_with_versions() -> None:
    number = np.arange(60)
    found = Lengths(number * 37 % 97, number * 53 % 97, number % 3 % 2, number * 11 % 59)
    texts = []
    for kind in ("length", "modality_length"):
        steps = steps_of(kind, [20, 25, 15], found, 42, 6)
        texts.append(json.dumps([step(steps, at) for at in range(30)]))
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts] == [
        "261403774196668e",
        "1acdbd47345cb5b6",
    ]


def test_samples_of_a_step_are_alike_and_steps_are_not() -> None:
    """Within a pool, steps are permuted: neighbours must not differ by less than any two do."""
    found = lengths(4000, 0)
    steps = steps_of("length", [4000], found, 0, 40)
    means = []
    for at in range(64):
        tokens = (found.encoder + found.decoder)[numbers(step(steps, at), [4000])]
        means.append(tokens.mean())
        assert (np.diff(found.encoder[numbers(step(steps, at), [4000])]) >= 0).all()
    assert np.std(means) > 20
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.35


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"form": "pairs"}, "order=length is of form=chat"),
        ({"batch_from": {10: 4}}, "keeps one batch"),
        ({"order": "modality_length", "chunk": 5}, "batch=12 must be a multiple of chunk=5"),
        ({"chunk": 4}, "chunk=4 is of order=modality_length, not of order=length"),
    ],
)
def test_an_order_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        source(**{"form": "chat", "template": "t5_v1", "order": "length", **values})
