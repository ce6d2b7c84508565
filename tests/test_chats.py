import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import run, told, written

from hpc_mm.chats import chat_parts, single_turns
from hpc_mm.data.documents import BrokenRecord, Record
from hpc_mm.data.schema import Image, image_key
from hpc_mm.data.store import Store, open_store

MARKS = ("<image>", "<document>")
text = st.lists(st.sampled_from([*MARKS, "<", "image>", "\n", " ", "a", "ü"]) | st.text(max_size=3), max_size=6)


@given(contents=st.lists(text.map("".join), min_size=1, max_size=5), counted=st.booleans(), seed=st.integers(0, 99))
def test_no_text_is_lost_and_every_item_is_at_its_mark(contents: list[str], counted: bool, seed: int) -> None:
    """Putting the marks back between the parts of each turn gives its text again, whatever the text."""
    turns = [(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    wanted = [sum(content.count(mark) for content in contents) for mark in MARKS]
    numbers = wanted if counted else [random.Random(seed).randint(0, 3) for _ in MARKS]
    images, documents = [Image(str(i).encode()) for i in range(numbers[0])], [f"{i}" for i in range(numbers[1])]
    items = {MARKS[0]: images, MARKS[1]: documents}
    if any(number not in (0, want) for number, want in zip(numbers, wanted, strict=True)):
        with pytest.raises(BrokenRecord, match="marks than items for them"):
            chat_parts(turns, items)  # type: ignore[arg-type]
        return
    parts = chat_parts(turns, items)  # type: ignore[arg-type]
    again: list[str] = []
    before = ""
    for part in parts:
        role, piece = told(part)
        if role == "document":
            assert piece == documents.pop(0)
            role, piece = before, MARKS[1]
        elif isinstance(part, Image):
            assert piece == images.pop(0).data
            piece = MARKS[0]
        if role != before or not again:  # an item without a text before it opens its turn
            again.append("")
        again[-1] += piece
        before = role
    if not numbers[1]:  # a document does not say whose turn it opens
        assert again == contents
    assert "".join(again) == "".join(contents) and not images and not documents


@pytest.fixture
def images(tmp_path: Path) -> Store:
    store = open_store(str(tmp_path / "images"))
    for name in ("coco/1.jpg", "coco/2.jpg", image_key("https://host/3.jpg")):
        store.write(name, f"bytes of {name}".encode())
    return store


def turn(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


CHAT = [turn("human", "<image>\nWhat?"), turn("gpt", "A cat."), turn("human", "Where?"), turn("gpt", "Here.")]
RECORDS = [
    {"id": "1", "image": "coco/1.jpg", "conversations": CHAT, "model": ""},
    {"id": "text", "conversations": [turn("human", "Write <image> in HTML"), turn("gpt", ""), turn("human", "Why")]},
    {"id": "gone", "image": "coco/9.jpg", "conversations": CHAT},
    {"id": "bare", "image": "coco/2.jpg", "conversations": CHAT[2:]},
    {"id": "two", "image": "coco/2.jpg", "conversations": [CHAT[0], CHAT[0]]},
    {"id": "who", "conversations": [turn("bing", "a")]},
    {"id": "empty", "conversations": []},
    {"id": "odd", "conversations": [turn("human", 5)]},
    {"id": "up", "image": "../1.jpg", "conversations": CHAT},
]
ONE = b"bytes of coco/1.jpg"


def counts(out: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((out / "stats.json").read_text())
    return {name: count for name, count in found.items() if name.startswith("left out")}


@pytest.mark.parametrize("name", ["llava_pretrain", "llava_mix665k"])
def test_llava(name: str, tmp_path: Path, images: Store, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "llava.json"
    source.write_text(json.dumps(RECORDS))
    assert run(name, source=source, images=images.address, out=tmp_path / "out") == 0
    first, second = written(tmp_path / "out")
    assert [told(part) for part in first.parts] == [
        ("user", ONE),
        ("user", "\nWhat?"),
        ("assistant", "A cat."),
        ("user", "Where?"),
        ("assistant", "Here."),
    ]
    assert first.images[0].facts == {"file": "coco/1.jpg"} and first.metadata == {"id": "1", "model": ""}
    assert [told(part) for part in second.parts] == [
        ("user", "Write <image> in HTML"),
        ("assistant", ""),
        ("user", "Why"),
    ]
    assert counts(tmp_path / "out") == {
        "left out: an image of it is missing": 1,
        "left out: there are fewer marks than items for them": 1,
        "left out: one role has two turns in a row": 1,
        "left out: a turn has a role that is not one of system, user, assistant": 1,
        "left out: conversations is empty": 1,
        "left out: a text is not a string": 1,
        "left out: an image's name is no path inside a folder": 1,
    }
    assert "llava.json entry 3: an image of it is missing\n" in capsys.readouterr().out


def test_llava_flattened(tmp_path: Path, images: Store, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "llava.json"
    source.write_text(json.dumps(RECORDS[:3] + RECORDS[6:7]))
    assert run("llava_mix665k", source=source, images=images.address, out=tmp_path / "out", flatten="true") == 0
    assert [[told(part) for part in sample.parts] for sample in written(tmp_path / "out")] == [
        [("user", ONE), ("user", "\nWhat?"), ("assistant", "A cat.")],
        [("user", ONE), ("user", "\nWhere?"), ("assistant", "Here.")],
        [("user", "Write <image> in HTML"), ("assistant", "")],
    ]
    assert counts(tmp_path / "out") == {
        "left out: the last question has no answer": 1,
        "left out: an image of it is missing": 2,
        "left out: conversations is empty": 1,
    }
    assert "llava.json entry 2: the last question has no answer\n" in capsys.readouterr().out


@given(st.lists(st.text(max_size=5), min_size=1, max_size=7), st.booleans())
def test_flattening_loses_no_pair(texts: list[str], image: bool) -> None:
    turns = [turn(("human", "gpt")[i % 2], value) for i, value in enumerate(texts)]
    record = Record({"conversations": turns, **({"image": "a"} if image else {})}, "here")
    found = list(single_turns([record]))
    pairs = [row["conversations"] for row in found if isinstance(row, Record)]
    values = [turn["value"] for pair in pairs for turn in pair]
    mark = "<image>\n" if image else ""
    expected = [mark * (i % 2 == 0 and i > 0) + value for i, value in enumerate(texts[: len(texts) // 2 * 2])]
    assert values == expected and record["conversations"] == turns
    assert [row.place for row in found] == ["here"] * ((len(texts) + 1) // 2)


def test_multi_token(tmp_path: Path, images: Store) -> None:
    """As ``Dataset.save_to_disk`` writes it: arrow streams beside JSON files that are no records."""
    ask = {"role": "user", "content": "<image> or <image>?"}
    rows: list[dict[str, Any]] = [
        {
            "id": "1",
            "messages": [ask, {"role": "assistant", "content": "b"}],
            "images": ["/data/coco/1.jpg", "https://host/3.jpg"],
        },
        {"id": "2", "messages": [{"role": "user", "content": "Sum: <document><document>"}], "documents": ["x", "y"]},
        {"id": "3", "messages": [ask], "images": ["/data/coco/1.jpg"]},
        {"id": "4", "messages": [{"role": "user", "content": "<sound>"}], "sounds": ["a.wav"]},
        {"id": "5", "messages": None},
        {"id": "6", "messages": []},
    ]
    table = pyarrow.Table.from_pylist([{"images": None, "documents": None, "sounds": None, **row} for row in rows])
    (tmp_path / "in").mkdir()
    with pyarrow.ipc.new_stream(tmp_path / "in" / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    values = {"images": images.address, "out": tmp_path / "out", "strip": "/data/"}
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "in" / name).write_text("{}")
    assert run("multi_token", source=tmp_path / "in", **values) == 0
    first, second = written(tmp_path / "out")
    three = images.read(image_key("https://host/3.jpg"))
    assert [told(part) for part in first.parts] == [
        ("user", ONE),
        ("user", " or "),
        ("user", three),
        ("user", "?"),
        ("assistant", "b"),
    ]
    assert [told(part) for part in second.parts] == [("user", "Sum: "), ("document", "x"), ("document", "y")]
    assert counts(tmp_path / "out") == {
        "left out: there are more marks than items for them": 1,
        "left out: it has sounds": 1,
        "left out: messages is not a list of messages with role and content": 1,
        "left out: messages is empty": 1,
    }


def test_chameleon(tmp_path: Path, images: Store) -> None:
    two = "coco/2.jpg"
    judged = {"question": "q", "image_url": None, "response_1": "a", "response_2": "b", "p_response": 2}
    records = [
        {"question": "q", "response": "r", "image_url": ["coco/1.jpg", two], "output_image_url": None, "n": 1},
        {
            "input_text": "q",
            "input_image": None,
            "better_text": "b",
            "better_img": two,
            "worse_text": "w",
            "worse_img": "coco/1.jpg",
        },
        {**judged, "output_image_url_1": two, "output_image_url_2": None, "overall_response": 2},
        {**judged, "output_image_url_1": two, "output_image_url_2": None, "overall_response": "1"},
        {**judged, "overall_response": 0},
        {"question": "q"},
        {"question": 5, "response": "r"},
        {"question": "q", "response": "r", "image_url": "coco/9.jpg"},
    ]
    source = tmp_path / "train.json"
    source.write_text(json.dumps(records))
    assert run("chameleon", source=source, images=images.address, out=tmp_path / "out") == 0
    found = written(tmp_path / "out")
    other = b"bytes of coco/2.jpg"
    assert [[told(part) for part in sample.parts] for sample in found] == [
        [("user", ONE), ("user", other), ("user", "q"), ("assistant", "r")],
        [("user", "q"), ("chosen", other), ("chosen", "b"), ("rejected", ONE), ("rejected", "w")],
        [("user", "q"), ("chosen", "b"), ("rejected", other), ("rejected", "a")],
        [("user", "q"), ("chosen", other), ("chosen", "a"), ("rejected", "b")],
    ]
    assert [sample.metadata for sample in found] == [
        {"n": 1},
        {},
        {"p_response": 2, "overall_response": 2},
        {"p_response": 2, "overall_response": "1"},
    ]
    assert counts(tmp_path / "out") == {
        "left out: overall_response is neither 1 nor 2": 1,
        "left out: it has the fields of none of the three forms": 1,
        "left out: a text is not a string": 1,
        "left out: an image of it is missing": 1,
    }
