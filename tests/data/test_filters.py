import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import encoded, picture

from hpc_mm.config import ConfigError, validated
from hpc_mm.data.documents import natural_parts, natural_urls
from hpc_mm.data.filters import Filtering, Filters
from hpc_mm.data.perceptual import perceptual_hash, write_hashes
from hpc_mm.data.recode import Recode, recode
from hpc_mm.data.schema import Image, Sample, Text, image_key
from hpc_mm.data.store import open_store


def pair(text: str = "a red circle", width: int = 40, height: int = 30, **facts: Any) -> Sample:
    return Sample("pair", (Image(encoded(picture(0, width, height)), facts=facts), Text(text)))


def reasons(sample: Sample, **options: Any) -> dict[str, int]:
    return dict(Filtering(Filters(**options))(sample)[1])


def dropped(sample: Sample, **options: Any) -> bool:
    return Filtering(Filters(**options))(sample)[0] is None


def test_everything_is_off_by_default() -> None:
    odd = Sample("odd", (Image(b"no picture", facts={"unsafe_prob": 1.0, "width": 1, "height": 9}), Text("")))
    assert Filtering(Filters())(odd) == (odd, {})
    assert Filtering(Filters())(Sample("text", (Text("words"),))) == (Sample("text", (Text("words"),)), {})


@pytest.mark.parametrize(
    ("option", "limit", "keeps", "drops"),
    [
        ("min_side", 30, {"width": 30, "height": 90}, {"width": 29, "height": 90}),
        ("max_side", 90, {"width": 30, "height": 90}, {"width": 30, "height": 91}),
        ("max_aspect", 2, {"width": 60, "height": 30}, {"width": 30, "height": 61}),
        ("min_similarity", 0.3, {"similarity": 0.3}, {"similarity": 0.29}),
        ("min_similarity", 0.3, {"similarity": "0.3"}, {"similarity": "0.29"}),
        ("min_aesthetic", 3.7, {"aesthetic_prob": 3.7}, {"aesthetic_prob": 3.6}),
        ("min_aesthetic", 5.0, {"AESTHETIC_SCORE": 5.1}, {"AESTHETIC_SCORE": 4.9}),
        ("max_unsafe", 0.8, {"unsafe_prob": 0.8}, {"unsafe_prob": 0.81}),
        ("max_unsafe", 0.1, {"punsafe": 0.1}, {"punsafe": 0.2}),
        ("max_unsafe", 0.4, {"NSFW": "UNLIKELY"}, {"NSFW": "UNSURE"}),
        ("max_unsafe", 0.5, {"NSFW": "UNSURE"}, {"NSFW": "NSFW"}),
        ("max_duplicates", 10, {"p_hash_dup_count": 10}, {"p_hash_dup_count": 11}),
        ("max_duplicates", 10, {"d_hash_dup_count": 10}, {"p_hash_dup_count": 1, "d_hash_dup_count": 11}),
    ],
)
def test_facts_at_their_limits(option: str, limit: float, keeps: dict[str, Any], drops: dict[str, Any]) -> None:
    assert reasons(pair(**keeps), **{option: limit}) == {}
    limit = getattr(Filters.model_validate({option: limit}), option)
    assert reasons(pair(**drops), **{option: limit}) == {
        f"images left out: {option}={limit}": 1,
        "left out: image left out": 1,
    }


@pytest.mark.parametrize(
    ("option", "keeps", "drops"),
    [
        ("min_characters", "abcde", "abcd"),
        ("max_characters", "abcde", "abcdef"),
        ("min_words", "1 2 3  4\n5", "words 2 3 4"),
        ("max_words", "1 2 3 4 5", "1 2 3 4 5 6"),
    ],
)
def test_text_at_its_limits(option: str, keeps: str, drops: str) -> None:
    assert reasons(pair(keeps), **{option: 5}) == {}
    assert reasons(pair(drops), **{option: 5}) == {f"left out: {option}=5": 1}
    assert dropped(pair(drops), **{option: 5})


def test_text_of_a_document_counts_together() -> None:
    document = Sample("document", (Text("one two"), *pair("three four").parts))
    assert reasons(document, min_words=4, max_words=4, min_characters=17, max_characters=17) == {}


def test_sizes_come_from_the_original_else_the_facts_else_the_bytes() -> None:
    assert dropped(pair(width=40, height=30), min_side=31)
    assert not dropped(pair(width=40, height=30), min_side=30)
    told = {"width": 256, "height": 256}
    assert not dropped(Sample("told", (Image(b"", facts=told),)), min_side=256)
    stored = {**told, "original_width": 100, "original_height": 256}
    assert dropped(Sample("stored", (Image(b"", facts=stored),)), min_side=256)
    assert reasons(Sample("broken", (Image(b"html"), Text("text"))), min_side=1) == {
        "images left out: unreadable": 1,
        "left out: image left out": 1,
    }


def test_a_pairs_metadata_is_about_its_image_and_a_documents_is_not() -> None:
    one = Sample("one", pair().parts, {"similarity": 0.1})
    two = Sample("two", pair().parts * 2, {"similarity": 0.1})
    assert dropped(one, min_similarity=0.2)
    assert reasons(two, min_similarity=0.2) == {"images without a value for min_similarity": 2}


@pytest.mark.parametrize("value", [None, "", "unknown", float("nan"), float("inf"), [], "1e999"])
def test_a_missing_value_is_kept_and_counted_or_dropped(value: Any) -> None:
    sample = pair(similarity=value)
    assert Filtering(Filters(min_similarity=0.2))(sample) == (sample, {"images without a value for min_similarity": 1})
    assert reasons(sample, min_similarity=0.2, missing="drop") == {
        "images left out: no value for min_similarity": 1,
        "left out: image left out": 1,
    }


def test_an_image_leaves_its_document_and_the_text_stays() -> None:
    parts = (Text("a"), Image(b"1", facts={"similarity": 0.1}), Text("b"), Image(b"2", facts={"similarity": 0.9}))
    document = Sample("document", parts, {"url": "u"})
    kept, counts = Filtering(Filters(min_similarity=0.2))(document)
    assert kept == Sample("document", (parts[0], parts[2], parts[3]), {"url": "u"})
    assert counts == {"images left out: min_similarity=0.2": 1}
    assert Filtering(Filters(min_similarity=0.2), whole=True)(document)[0] is None
    assert Filtering(Filters(min_similarity=0.95))(document)[0] is None


def test_only_the_first_reason_counts() -> None:
    sample = pair(similarity=0.1, punsafe=0.9, width=10, height=10)
    assert reasons(sample, min_side=20, min_similarity=0.2, max_unsafe=0.5) == {
        "images left out: min_side=20": 1,
        "left out: image left out": 1,
    }


def test_images_of_evaluation_sets_are_left_out(tmp_path: Path) -> None:
    known = [encoded(picture(seed, 300, 200), "JPEG", quality=95) for seed in range(5)]
    write_hashes(open_store(str(tmp_path)), "coco.npy", map(perceptual_hash, known[:3]))
    write_hashes(open_store(str(tmp_path)), "vqa.npy", map(perceptual_hash, known[3:4]))
    addresses = [str(tmp_path / "coco.npy"), str(tmp_path / "vqa.npy")]
    small = [recode(data, Recode(resize="keep_ratio", size=100, quality=80)).data for data in known]
    document = Sample("document", tuple(map(Image, small)))
    kept, counts = Filtering(validated(Filters, {"against": addresses, "distance": 6}))(document)
    assert kept is not None and kept.images == document.images[4:]
    assert counts == {f"images left out: against={addresses[0]}": 3, f"images left out: against={addresses[1]}": 1}
    with pytest.raises(ConfigError, match="no hashes at"):
        Filtering(Filters(against=(str(tmp_path / "flickr30k.npy"),)))


def test_the_distance_is_the_users(tmp_path: Path) -> None:
    value = perceptual_hash(encoded(picture(0)))
    write_hashes(open_store(str(tmp_path)), "far.npy", [value ^ 0b11111])
    for distance, found in ((4, False), (5, True)):
        assert dropped(pair(), against=(str(tmp_path / "far.npy"),), distance=distance) == found
    with pytest.raises(ConfigError, match="distance"):
        validated(Filters, {"distance": 16})


def test_unique_keeps_the_first_of_each_file() -> None:
    first, second, short = pair("one two"), pair("three four"), pair("five")
    filtering = Filtering(Filters(unique=True, min_words=2))
    assert filtering(short)[0] is None  # and its image is not one that was kept
    assert filtering(first) == (first, {})
    assert filtering(second) == (None, {"images left out: unique=True": 1, "left out: image left out": 1})
    filtering.start_file()
    assert filtering(second) == (second, {})


def test_unique_within_a_document_and_not_by_what_was_dropped_whole() -> None:
    other = Image(encoded(picture(9)))
    twice = Sample("twice", (*pair().parts, *pair().parts, other))
    kept, counts = Filtering(Filters(unique=True))(twice)
    assert kept is not None and len(kept.images) == 2 and counts == {"images left out: unique=True": 1}
    filtering = Filtering(Filters(unique=True), whole=True)
    assert filtering(twice)[0] is None
    assert filtering(pair())[0] is not None


@settings(max_examples=40)
@given(seeds=st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=8))
def test_unique_keeps_each_image_once_and_every_text(seeds: list[list[int]]) -> None:
    images = [Image(encoded(picture(seed))) for seed in range(7)]
    documents = [Sample(str(i), (Text(f"text {i}"), *(images[seed] for seed in row))) for i, row in enumerate(seeds)]
    filtering = Filtering(Filters(unique=True))
    results = [filtering(document) for document in documents]
    kept = [image for sample, _ in results if sample is not None for image in sample.images]
    assert kept == [images[seed] for seed in dict.fromkeys(seed for row in seeds for seed in row)]
    left_out = sum(counts["images left out: unique=True"] for _, counts in results)
    assert left_out == sum(map(len, seeds)) - len(kept)
    again = Filtering(Filters(unique=True))
    assert [again(document) for document in documents] == results


def test_real_documents(shared_data: Path) -> None:
    """OmniCorpus's own thresholds over its own schema: no value is missing, and sizes alone drop images here."""
    options = Filters(min_side=150, max_aspect=2, min_aesthetic=3.7, max_unsafe=0.8, max_duplicates=10)
    for line in (shared_data / "omnicorpus-8.jsonl").read_text().splitlines():
        record = json.loads(line)
        images = {image_key(url): b"image" for url in natural_urls(record)}
        sample = Sample("document", natural_parts(record, images, 16))
        kept, counts = Filtering(options)(sample)
        assert kept is not None and not any(reason.startswith("images without") for reason in counts)
        sides = [sorted((image.facts["width"], image.facts["height"])) for image in sample.images]
        good = [short >= 150 and long <= 2 * short for short, long in sides]
        assert kept.images == [image for image, stays in zip(sample.images, good, strict=True) if stays]
