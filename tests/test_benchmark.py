import json
import re
from pathlib import Path
from typing import Any

import pytest
import questions
from questions import CAPTIONS, MEMES, VQA, asked, captioned, image_of, write_splits
from scripts import run
from test_annotations import karpathy, put_images

from hpc_mm import benchmark
from hpc_mm.benchmark import Benchmark, digest, read_image
from hpc_mm.benchmark import questions as read_questions
from hpc_mm.config import ConfigError, validated
from hpc_mm.data.schema import Image, Sample
from hpc_mm.data.shards import ShardReader, ShardWriter, read_manifest
from hpc_mm.data.store import FolderStore, open_store


def test_captions_are_one_question_per_image(tmp_path: Path) -> None:
    address = write_splits(tmp_path, test=captioned(7, 3), train=captioned(1))
    first, second = read_questions(address, "test", CAPTIONS)
    assert (first.id, first.image, first.text, second.id) == ("7", "7", "", "3")
    assert first.references == tuple(f"caption 7.{k} " for k in range(5))
    assert [question.id for question in read_questions(address, "train", CAPTIONS)] == ["1"]


def test_questions_with_answers(tmp_path: Path) -> None:
    address = write_splits(tmp_path, val=asked(4, 2))
    found = read_questions(address, "val", VQA)
    assert [(q.id, q.image, q.text) for q in found] == [
        ("40", "4", "What 0?"),
        ("41", "4", "What 1?"),
        ("20", "2", "What 0?"),
        ("21", "2", "What 1?"),
    ]
    assert found[0].references == tuple(f"a{n}" for n in range(10))
    assert found[0].image_key == found[1].image_key != found[2].image_key


def test_test_splits_have_no_answers(tmp_path: Path) -> None:
    images = asked(4)
    for entry in images["4"]["questions"]:
        del entry["answers"]
    found = read_questions(write_splits(tmp_path, test_dev=images), "test-dev", VQA)
    assert [question.references for question in found] == [(), ()]


def test_an_image_is_of_a_class(tmp_path: Path) -> None:
    address = write_splits(tmp_path, dev={"8": {"text": "so funny", "label": "yes"}, "9": {"label": "no"}})
    assert [(q.text, q.references) for q in read_questions(address, "dev", MEMES)] == [
        ("so funny", ("yes",)),
        ("", ("no",)),
    ]
    wrong = write_splits(tmp_path / "other", dev={"8": {"label": "Yes"}})
    with pytest.raises(ConfigError, match=r"'Yes' is none of the 2 classes$"):
        read_questions(wrong, "dev", MEMES)


def test_order_and_images_are_the_same_for_any_size_of_shards(tmp_path: Path) -> None:
    """From one shard and from a shard per image."""
    found = []
    for max_bytes in (1, 2**30):
        address = write_splits(tmp_path / str(max_bytes), max_bytes, val=asked(*range(12, 0, -1)))
        reader = ShardReader(open_store(address))
        read = read_questions(address, "val", VQA)
        found.append([(q.id, q.image, q.text, q.references, read_image(reader, q)) for q in read])
    assert found[0] == found[1]
    assert all(data == image_of(image) for _, image, _, _, data in found[0])


def test_no_image_is_read_with_the_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = write_splits(tmp_path, test=captioned(*range(20)))
    read = []
    original = FolderStore.read

    def counting(self: FolderStore, key: str, start: int | None = None, end: int | None = None) -> bytes:
        data = original(self, key, start, end)
        read.append((key.endswith(".tar"), len(data)))
        return data

    monkeypatch.setattr(FolderStore, "read", counting)
    read_questions(address, "test", CAPTIONS)
    assert sum(tar for tar, _ in read) == 20
    assert all(size < 300 for tar, size in read if tar)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys that are read from now on."""
    found: list[str] = []
    original = FolderStore.read

    def noting(self: FolderStore, key: str, start: int | None = None, end: int | None = None) -> bytes:
        found.append(key)
        return original(self, key, start, end)

    monkeypatch.setattr(FolderStore, "read", noting)
    return found


def test_samples_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later, for any benchmark and by anybody, one read for each shard."""
    address = write_splits(tmp_path, 30_000, val=asked(*range(40)))
    shards = list(read_manifest(open_store(address)).names)
    first = read_questions(address, "val", VQA)
    noted = reads(monkeypatch)
    monkeypatch.setattr(benchmark, "READS", 3)
    assert read_questions(address, "val", VQA) == first
    assert len(shards) > 3 and sorted(noted) == ["facts/" + shard + ".json" for shard in shards] + ["index.json"]
    with pytest.raises(ConfigError, match="caption wants captions, but image 0 holds questions"):
        read_questions(address, "val", CAPTIONS)
    (tmp_path / "facts" / f"{shards[1]}.json").unlink()
    assert read_questions(address, "val", VQA) == first
    (tmp_path / shards[2]).unlink()
    with pytest.raises(ConfigError, match=f"no {shards[2]} in"):
        read_questions(address, "val", VQA)


def test_of_shards_that_may_be_replaced_nothing_is_kept(tmp_path: Path) -> None:
    for label in ("yes", "not"):  # as long
        with ShardWriter(open_store(str(tmp_path)), "dev") as writer:  # no digest in its name
            writer.add(Sample("1", (Image(image_of("1")),), {"label": label}))
        classes = MEMES.model_copy(update={"classes": ()})
        assert [question.references for question in read_questions(str(tmp_path), "dev", classes)] == [(label,)]


@pytest.mark.parametrize("kept", [b"[", b"[1]", b"[]", b"7", b'[["1", 7, true], ["2", {}, true]]', None])
def test_facts_of_no_use_cost_time_alone(tmp_path: Path, kept: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    """Damaged, or of somebody whose files nobody else may read: told once, read from the samples, and kept again."""
    address = write_splits(tmp_path, 1, test=captioned(1, 2))
    first = read_questions(address, "test", CAPTIONS)
    files = sorted(tmp_path.glob("facts/*.json"))
    for file in files:
        file.unlink()
        if kept is None:
            file.symlink_to(file.name)  # root may read whatever a mode says, but not this
        else:
            file.write_bytes(kept)
    assert read_questions(address, "test", CAPTIONS) == first
    (line,) = caplog.messages
    assert line.startswith("questions of 2 of 2 shards were read from every sample again: ") and files[0].name in line
    assert read_questions(address, "test", CAPTIONS) == first and len(caplog.messages) == 1


def test_a_store_that_takes_nothing_costs_time_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    address = write_splits(tmp_path, 1, test=captioned(1, 2))
    (tmp_path / "facts").write_text("in the way")
    found = read_questions(address, "test", CAPTIONS)
    assert [question.id for question in found] == ["1", "2"] and read_questions(address, "test", CAPTIONS) == found
    assert caplog.text.count("questions are read from every sample again next time: cannot make the folder") == 2


def test_what_data_prep_wrote(tmp_path: Path) -> None:
    rows = [(split, {"filename": f"{i}.jpg", "imgid": i}) for i, split in enumerate(("train", "test", "test"), 1000)]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps(karpathy(*rows)))
    put_images(tmp_path, "1000.jpg", "1001.jpg", "1002.jpg")
    values = {"source": tmp_path / "dataset_flickr30k.json", "images": tmp_path, "out": tmp_path / "out"}
    assert run("flickr30k", **values) == 0
    found = read_questions(str(tmp_path / "out"), "test", CAPTIONS)
    assert [(q.id, q.references) for q in found] == [("1001", ("test 0", "test 1")), ("1002", ("test 0", "test 1"))]
    image = read_image(ShardReader(open_store(str(tmp_path / "out"))), found[1])
    assert image == (tmp_path / "1002.jpg").read_bytes()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("split", "benchmark", "images", "message"),
    [
        ("val", CAPTIONS, captioned(1), "has no split 'val': it has test"),
        ("test", VQA, captioned(1), "split=test: vqa wants questions, but image 1 holds captions"),
        ("test", CAPTIONS, asked(1), "split=test: caption wants captions, but image 1 holds questions"),
        ("test", CAPTIONS, {"1": {}}, "split=test: caption wants captions, but image 1 is no sample of a benchmark"),
        ("test", CAPTIONS, {"1": {"captions": []}}, "split=test: image 1 has no caption"),
        ("test", CAPTIONS, {"1": {"captions": [5]}}, "not the prepared form (TypeError: 5 is no text)"),
        ("test", VQA, {"1": {"questions": [{"question": "?"}]}}, "not the prepared form (KeyError: 'question_id')"),
        ("test", VQA, {"1": {"questions": []}}, "split=test holds no questions"),
        ("test", VQA, {"1": asked(1)["1"], "2": asked(1)["1"]}, "split=test: question 10 is there twice"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, split: str, benchmark: Benchmark, images: dict[str, Any], message: str
) -> None:
    address = write_splits(tmp_path, test=images)
    with pytest.raises(ConfigError) as told:
        read_questions(address, split, benchmark)
    assert message in str(told.value) and "\n" not in str(told.value) and address in str(told.value)


@pytest.mark.parametrize(("lost", "first"), [((3,), "3"), ((1, 3, 4, 7), "1, 3, 4, ...")])
def test_images_that_are_missing_are_counted(tmp_path: Path, lost: tuple[int, ...], first: str) -> None:
    with ShardWriter(open_store(str(tmp_path)), "test") as writer:
        for number in range(9):
            images = () if number in lost else (Image(image_of(str(number))),)
            writer.add(Sample(str(number), images, captioned(number)[str(number)]))
    with pytest.raises(ConfigError, match=rf"split=test: {len(lost)} of 9 images are missing: {re.escape(first)}$"):
        read_questions(str(tmp_path), "test", CAPTIONS)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    address = write_splits(tmp_path, test=captioned(1))
    (tar,) = tmp_path.glob("*.tar")
    tar.write_bytes(tar.read_bytes().replace(b'{"parts"', b'{"parts '))
    with pytest.raises(ConfigError, match=rf"{tar.name} sample 1: "):
        read_questions(address, "test", CAPTIONS)
    tar.write_bytes(b"")
    with pytest.raises(ConfigError, match=tar.name):
        read_questions(address, "test", CAPTIONS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": ["a"]}, "classes=('a',)"),
        ({"kind": "classes", "classes": ["a", "b", "a"]}, "a is there twice"),
        ({"prompt": {"name": "x", "query": "Output:", "demonstration": "<image>{answer}"}}, "needs one <image>"),
        (
            {"prompt": {"name": "x", "query": "<image>{answer}", "demonstration": "<image>{answer}"}},
            "needs no {answer}",
        ),
        ({"prompt": {"name": "x", "query": "<image>", "demonstration": "<image>"}}, "needs one {answer}"),
        ({"name": "COCO karpathy"}, "name='COCO karpathy'"),
        ({"decoding": {"beams": 0}}, "decoding.beams=0"),
    ],
)
def test_a_benchmark_is_checked(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        validated(Benchmark, {**questions.CAPTIONS.model_dump(), **changed})
    assert message in str(told.value)


def test_a_digest_keeps_texts_apart() -> None:
    assert len({digest(texts) for texts in (["ab"], ["a", "b"], ["", "ab"], ["ab", ""], [], ["b", "a"])}) == 6
