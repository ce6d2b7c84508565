import json
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_mm.data.documents import BrokenRecord, assigned_parts, matrix, natural_parts, natural_urls
from hpc_mm.data.schema import Image, Part, Text, image_key

RECORD: dict[str, Any] = {
    "images": [None, "u/1", "u/2", None, "u/3"],
    "texts": ["one", None, None, "two", None],
    "metadata": [None, {"width": 5}, None, None, {"width": 7}],
}


def stored(*urls: str) -> dict[str, bytes]:
    return {image_key(url): url.encode() for url in urls}


def brief(parts: tuple[Part, ...]) -> list[str]:
    return [part.text if isinstance(part, Text) else (part.data or b"").decode() for part in parts]


def test_natural_order_is_kept_and_missing_images_vanish() -> None:
    everything = stored("u/1", "u/2", "u/3")
    parts = natural_parts(RECORD, everything, max_images=9)
    assert brief(parts) == ["one", "u/1", "u/2", "two", "u/3"]
    assert [part.facts for part in parts if isinstance(part, Image)] == [
        {"url": "u/1", "width": 5},
        {"url": "u/2"},
        {"url": "u/3", "width": 7},
    ]
    assert natural_parts({**RECORD, "metadata": json.dumps(RECORD["metadata"])}, everything, 9) == parts
    assert brief(natural_parts({**RECORD, "metadata": None}, everything, 9)) == brief(parts)
    assert brief(natural_parts(RECORD, stored("u/3", "u/2"), max_images=1)) == ["one", "u/2", "two"]
    marked = {**RECORD, "valid_image": [True, False, True]}
    assert natural_urls(marked) == ["u/1", "u/3"]
    assert brief(natural_parts(marked, everything, 9)) == ["one", "u/1", "two", "u/3"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": [None]}, "of one length"),
        ({"texts": None}, "of one length"),
        ({"metadata": [None]}, "of one length"),
        ({"metadata": "{"}, "not JSON"),
        ({"metadata": 5}, "not a list"),
        ({"texts": ["one", "extra", None, "two", None]}, "both or neither"),
        ({"texts": [None, None, None, "two", None]}, "both or neither"),
        ({"texts": [5, None, None, "two", None]}, "not a string"),
        ({"valid_image": [True]}, "valid_image"),
        ({"valid_image": 5}, "valid_image"),
        ({"images": 5}, "not a list"),
        ({"images": True, "metadata": None}, "not a list"),
        ({"images": [None, ["u/1"], "u/2", None, "u/3"], "valid_image": [False, True, True]}, "not text"),
    ],
)
def test_records_of_another_schema_are_told(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BrokenRecord, match=reason):
        natural_parts({**RECORD, **changes}, stored("u/1"), 9)


@given(
    values=st.integers(1, 5).flatmap(
        lambda width: st.lists(st.lists(st.integers(-100, 100), min_size=width, max_size=width), min_size=1, max_size=4)
    ),
    missing=st.sets(st.integers(0, 3)),
)
def test_the_assignment_is_the_best_of_all(values: list[list[int]], missing: set[int]) -> None:
    similarity = np.array(values, dtype=float)
    urls = [f"u/{i}" for i in range(len(values))]
    sentences = [f"s{i}" for i in range(len(values[0]))]
    images = stored(*(url for i, url in enumerate(urls) if i not in missing))
    parts = assigned_parts(sentences, urls, similarity, images)
    assert [part.text for part in parts if isinstance(part, Text)] == sentences
    total, used = 0.0, []
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if isinstance(part, Image):
            assert isinstance(following, Text)  # one image per sentence, right before it
            row, column = urls.index(part.facts["url"]), sentences.index(following.text)
            assert part.facts["similarity"] == similarity[row, column]
            total += similarity[row, column]
            used.append(row)
    rows = [i for i in range(len(urls)) if i not in missing]
    assert len(used) == len(set(used)) == min(len(rows), len(sentences)) and set(used) <= set(rows)
    many, few = max(len(rows), len(sentences)), min(len(rows), len(sentences))
    by_rows = similarity[rows] if len(rows) <= len(sentences) else similarity[rows].T
    best = max(sum(by_rows[i, place[i]] for i in range(few)) for place in permutations(range(many), few))
    assert total == best


def test_images_stand_in_sentence_order() -> None:
    """The published order of tensors was that of the list of images; here images move with their tokens."""
    similarity = np.array([[0.1, 0.2, 0.9], [0.8, 0.1, 0.1]])
    parts = assigned_parts(["a", "b", "c"], ["u/1", "u/2"], similarity, stored("u/1", "u/2"))
    assert brief(parts) == ["u/2", "a", "b", "u/1", "c"]


@pytest.mark.parametrize(
    "rows", [[[1], [1, 2]], [["a"]], [[float("nan")]], 5, None, [1.0], [[]], [[], []], [[10**400]]]
)
def test_what_is_no_matrix_is_told(rows: Any) -> None:
    with pytest.raises(BrokenRecord, match="not a matrix"):
        matrix(rows)
    with pytest.raises(BrokenRecord, match="images x sentences"):
        assigned_parts(["a"], ["u/1"], matrix([[1, 2]]), {})
