import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.config import Source
from hpc_mm.data.batch import Row
from hpc_mm.data.packing import micro_batches, packed, share

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 6)), max_size=40)  # tokens and images of samples


def samples_of(shapes: list[tuple[int, int]]) -> list[Row]:
    """Named by their places."""
    picture = np.zeros((1, 1, 3), np.uint8)
    return [
        Row(f"{place}", np.zeros(tokens, int), np.zeros(tokens, int), [picture] * images, [])
        for place, (tokens, images) in enumerate(shapes)
    ]


def names(rows: list[list[Row]]) -> list[list[int]]:
    return [[int(sample.id) for sample in row] for row in rows]


def tokens(row: list[Row]) -> int:
    return sum(len(sample.input_ids) for sample in row)


def source(pack_tokens: int) -> Source:
    packing = {"pack_tokens": pack_tokens, "pack_images": 8} if pack_tokens else {}
    return Source(data="x", form="pairs", batch=1, max_tokens=40, max_images=6, **packing)


@given(count=st.integers(0, 10**12), parts=st.integers(1, 64))
def test_shares_follow_one_another_and_differ_by_at_most_one(count: int, parts: int) -> None:
    shares = [share(count, part, parts) for part in range(parts)]
    assert [found.start for found in shares] == [0, *(found.stop for found in shares[:-1])]
    assert shares[-1].stop == count
    assert {len(found) for found in shares} <= {count // parts, -(-count // parts)}


@given(shapes=SHAPES, max_tokens=st.integers(40, 120), max_images=st.integers(6, 20))
def test_packing_is_first_fit_of_the_longest_first(
    shapes: list[tuple[int, int]], max_tokens: int, max_images: int
) -> None:
    rows = packed(samples_of(shapes), max_tokens, max_images)
    order = sorted(range(len(shapes)), key=lambda place: (-shapes[place][0], place))
    assert sorted(sample for row in names(rows) for sample in row) == sorted(order)
    where = {sample: place for place, row in enumerate(names(rows)) for sample in row}
    for turn, sample in enumerate(order):
        before = [[other for other in order[:turn] if where[other] == place] for place in range(len(rows))]
        fits = [
            sum(shapes[other][0] for other in row) + shapes[sample][0] <= max_tokens
            and sum(shapes[other][1] for other in row) + shapes[sample][1] <= max_images
            for row in before
        ]
        assert where[sample] == fits.index(True)


def test_a_packed_row_by_hand() -> None:
    shapes = [(10, 1), (30, 2), (10, 4), (20, 3), (40, 6), (10, 1)]
    assert names(packed(samples_of(shapes), max_tokens=40, max_images=6)) == [[4], [1, 0], [3, 5], [2]]
    assert packed([], 40, 6) == []


@given(shapes=SHAPES, count=st.integers(1, 5), pack_tokens=st.sampled_from([0, 64]), by_length=st.booleans())
def test_every_sample_is_in_one_micro_batch(
    shapes: list[tuple[int, int]], count: int, pack_tokens: int, by_length: bool
) -> None:
    found = micro_batches(samples_of(shapes), source(pack_tokens), by_length, count)
    rows = [row for micro_batch in found for row in micro_batch]
    assert len(found) == count and max(map(len, found)) - min(map(len, found)) <= 1
    assert sorted(sample for row in names(rows) for sample in row) == list(range(len(shapes)))
    if by_length:
        assert [tokens(row) for row in rows] == sorted(tokens(row) for row in rows)
    elif not pack_tokens:
        assert names(rows) == [[place] for place in range(len(shapes))]


def test_samples_of_like_length_share_a_micro_batch_in_stream_order() -> None:
    samples = samples_of([(9, 1), (5, 1), (7, 1), (5, 1), (9, 1), (1, 1)])
    assert list(map(names, micro_batches(samples, source(0), True, 2))) == [[[5], [1], [3]], [[2], [0], [4]]]
    assert list(map(names, micro_batches(samples, source(0), False, 4))) == [[[0]], [[1], [2]], [[3]], [[4], [5]]]


def test_packing_and_sorting_save_padding() -> None:
    """Documents of 16 to 512 tokens, most of them short, 64 per step in 4 micro-batches."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(4.7, 0.8, 64 * 20), 16, 512).astype(int)
    padding = {}
    for name, pack_tokens, by_length in (("plain", 0, False), ("by length", 0, True), ("packed", 512, False)):
        rows = Source(data="x", form="pairs", batch=1, max_tokens=512, pack_tokens=pack_tokens)
        padded = 0
        for step in lengths.reshape(20, 64):
            for found in micro_batches(samples_of([(length, 1) for length in step]), rows, by_length, 4):
                padded += len(found) * max(map(tokens, found))
        padding[name] = 1 - lengths.sum() / padded
    print({name: f"{share:.1%} padding" for name, share in padding.items()})
    assert padding["packed"] < 0.1 < padding["by length"] < padding["plain"] / 1.5
