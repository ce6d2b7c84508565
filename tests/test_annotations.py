import gzip
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st
from scripts import run, written

from hpc_mm.annotations import Disagreement, joined
from hpc_mm.data.shards import read_manifest
from hpc_mm.data.store import open_store


def archive(path: Path, **files: Any) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as found:
        for name, content in files.items():
            found.writestr(f"annotations/{name}.json", json.dumps(content))


def put_images(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_of(name))


def image_of(name: str) -> bytes:
    """Another one for every name."""
    return samples.encoded(samples.picture(zlib.crc32(name.encode())))


def answer(number: int, text: str) -> dict[str, Any]:
    return {"answer": text, "answer_confidence": "yes", "answer_id": number}


# ---------------------------------------------------------------- captions


def karpathy(*rows: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    images = [
        {"split": split, "sentences": [{"raw": f"{split} {i}", "tokens": []} for i in range(2)], **fields}
        for split, fields in rows
    ]
    return {"images": images, "dataset": "some"}


def test_coco_has_the_published_splits(tmp_path: Path) -> None:
    names = [f"COCO_val2014_{i:012d}.jpg" for i in range(4)]
    rows = [
        (split, {"filepath": "val2014", "filename": name, "cocoid": i, "imgid": 9})
        for i, (split, name) in enumerate(zip(("test", "restval", "test", "val"), names, strict=True))
    ]
    flickr = karpathy(("test", {"filename": "1.jpg"}))
    archive(tmp_path / "caption_datasets.zip", dataset_coco=karpathy(*rows), dataset_flickr30k=flickr)
    put_images(tmp_path / "images", *(f"val2014/{name}" for name in names))
    values = {"source": tmp_path / "caption_datasets.zip", "images": tmp_path / "images", "out": tmp_path / "out"}
    assert run("coco", **values, splits="test") == 0
    assert [sample.id for sample in written(tmp_path / "out")] == ["0", "2"]
    assert run("coco", **values) == 0
    found = written(tmp_path / "out")
    shards = [shard.name.rpartition("-")[0] for shard in read_manifest(open_store(str(tmp_path / "out")))]
    assert shards == ["restval-000000", "test-000000", "val-000000"]
    assert [(sample.id, sample.metadata["split"]) for sample in found] == [
        ("1", "restval"),
        ("0", "test"),
        ("2", "test"),
        ("3", "val"),
    ]
    file_name = f"val2014/{names[2]}"
    assert found[2].metadata == {"split": "test", "file_name": file_name, "captions": ["test 0", "test 1"]}
    assert [image.data for image in found[2].images] == [image_of(file_name)] and len(found[2].parts) == 1


def test_flickr30k_is_known_by_file_names(tmp_path: Path) -> None:
    rows = [(split, {"filename": f"{i}.jpg", "imgid": i}) for i, split in enumerate(("train", "test"), 1000)]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps(karpathy(*rows)))
    put_images(tmp_path, "1000.jpg", "1001.jpg")
    values = {"source": tmp_path / "dataset_flickr30k.json", "images": tmp_path, "out": tmp_path / "out"}
    assert run("flickr30k", **values, splits="train,test") == 0
    assert [(sample.id, sample.metadata["split"]) for sample in written(tmp_path / "out")] == [
        ("1001", "test"),
        ("1000", "train"),
    ]


# ---------------------------------------------------------------- questions


def vqa(*rows: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Questions and annotations of (question id, image id), the annotations in the other order."""
    questions = [{"question_id": q, "image_id": i, "question": f"What {q}?"} for q, i in rows]
    annotations = [
        {
            "question_id": q,
            "image_id": i,
            "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": "a",
            "answers": [answer(k, f"a{k % 3}") for k in range(1, 11)],
        }
        for q, i in reversed(rows)
    ]
    return {"questions": questions, "task_type": "Open-Ended"}, {"annotations": annotations}


def vqav2(tmp_path: Path) -> dict[str, Path]:
    """As published: an archive each of questions and annotations, and test questions without answers."""
    questions, annotations = vqa((10, 1), (20, 2), (11, 1))
    source = tmp_path / "in"
    source.mkdir()
    archive(source / "v2_Questions_Val_mscoco.zip", v2_OpenEnded_mscoco_val2014_questions=questions)
    archive(source / "v2_Annotations_Val_mscoco.zip", v2_mscoco_val2014_annotations=annotations)
    tests = {f"v2_OpenEnded_mscoco_{name}2015_questions": vqa((30, 3))[0] for name in ("test", "test-dev")}
    archive(source / "v2_Questions_Test_mscoco.zip", **tests)
    put_images(tmp_path / "images", *(f"val2014/COCO_val2014_{i:012d}.jpg" for i in (1, 2)))
    put_images(tmp_path / "images", f"test2015/COCO_test2015_{3:012d}.jpg")
    return {"source": source, "images": tmp_path / "images", "out": tmp_path / "out"}


def test_vqav2_joins_questions_and_answers(tmp_path: Path) -> None:
    assert run("vqav2", **vqav2(tmp_path)) == 0
    found = {f"{sample.metadata['split']} {sample.id}": sample.metadata for sample in written(tmp_path / "out")}
    assert list(found) == ["test 3", "test-dev 3", "val 1", "val 2"]
    assert found["val 1"]["file_name"] == "val2014/COCO_val2014_000000000001.jpg"
    first, second = found["val 1"]["questions"]
    assert first == {
        "question_id": 10,
        "question": "What 10?",
        "question_type": "what",
        "answer_type": "other",
        "multiple_choice_answer": "a",
        "answers": [answer(k, f"a{k % 3}") for k in range(1, 11)],
    }
    assert second["question_id"] == 11
    assert found["test 3"]["questions"] == [{"question_id": 30, "question": "What 30?"}]


def test_splits_are_prepared_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = vqav2(tmp_path)
    assert run("vqav2", **values, splits="val") == 0
    assert [sample.id for sample in written(tmp_path / "out")] == ["1", "2"]
    assert run("vqav2", **values, splits="train") == 2
    said = "v2_OpenEnded_mscoco_train2014_questions.json with v2_mscoco_train2014_annotations.json"
    assert capsys.readouterr().err == f"source={values['source']} has no {said}\n"
    assert run("vqav2", **values, splits="dev") == 2
    assert capsys.readouterr().err == "splits=dev: there are train, val, test, test-dev\n"
    assert run("vqav2", **values) == 0
    assert len(written(tmp_path / "out")) == 4


def test_okvqa_keeps_raw_answers(tmp_path: Path) -> None:
    questions, annotations = vqa((10, 1))
    for entry in annotations["annotations"]:
        entry["answers"] = [{**answer(k, "cat"), "raw_answer": "cats"} for k in range(1, 11)]
    (tmp_path / "OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(questions))
    (tmp_path / "mscoco_val2014_annotations.json").write_text(json.dumps(annotations))
    put_images(tmp_path / "images", f"val2014/COCO_val2014_{1:012d}.jpg")
    assert run("okvqa", source=tmp_path, images=tmp_path / "images", out=tmp_path / "out") == 0
    (sample,) = written(tmp_path / "out")
    assert [given["raw_answer"] for given in sample.metadata["questions"][0]["answers"]] == ["cats"] * 10


def test_vizwiz_has_names_in_place_of_ids(tmp_path: Path) -> None:
    row = {"image": "VizWiz_val_00000000.jpg", "question": "What is this?"}
    answers = [{"answer": "soda", "answer_confidence": "maybe"}] * 10
    full = {**row, "answers": answers, "answer_type": "other", "answerable": 1}
    archive(tmp_path / "Annotations.zip", val=[full], test=[{**row, "image": "VizWiz_test_00000001.jpg"}])
    put_images(tmp_path, "val/VizWiz_val_00000000.jpg", "test/VizWiz_test_00000001.jpg")
    assert run("vizwiz", source=tmp_path / "Annotations.zip", images=tmp_path, out=tmp_path / "out") == 0
    second, first = written(tmp_path / "out")
    asked = {"question_id": "VizWiz_val_00000000.jpg", "question": "What is this?", "answerable": 1}
    assert (first.id, first.metadata["questions"]) == (
        "VizWiz_val_00000000",
        [{**asked, "answer_type": "other", "answers": answers}],
    )
    assert (second.id, list(second.metadata["questions"][0])) == ("VizWiz_test_00000001", ["question", "question_id"])


def test_textvqa_as_its_authors_publish_it(tmp_path: Path) -> None:
    row = {"question_id": 5, "image_id": "ab12", "question": "what?", "image_width": 9}
    for split, answers in (("val", {"answers": ["a"] * 10}), ("test", {})):
        data = {"dataset_name": "textvqa", "data": [{**row, "image_id": f"{split}1", **answers}]}
        (tmp_path / f"TextVQA_0.5.1_{split}.json").write_text(json.dumps(data))
    put_images(tmp_path, "train_images/val1.jpg", "test_images/test1.jpg")
    assert run("textvqa", source=tmp_path, images=tmp_path, out=tmp_path / "out") == 0
    first, second = written(tmp_path / "out")
    assert first.metadata["questions"] == [{"question_id": 5, "question": "what?"}]
    assert second.metadata["questions"] == [{"question_id": 5, "question": "what?", "answers": [{"answer": "a"}] * 10}]


def test_textvqa_val_whole(shared_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    published: dict[str, Any] = {}
    for name in ("questions", "annotations"):
        file = f"textvqa_val_{name}.json.gz"
        (source / file).symlink_to(shared_data / file)
        published[name] = json.loads(gzip.decompress((shared_data / file).read_bytes()))[name]
    put_images(tmp_path / "images", *{f"train_images/{entry['image_id']}.jpg" for entry in published["questions"]})
    assert run("textvqa", source=source, images=tmp_path / "images", out=tmp_path / "out") == 0
    found = written(tmp_path / "out")
    assert len(found) == 3166
    asked = [question for sample in found for question in sample.metadata["questions"]]
    by_id = {question["question_id"]: question for question in asked}
    assert len(asked) == len(by_id) == 5000
    for question, annotation in zip(published["questions"], published["annotations"], strict=True):
        both = {**question, **annotation}
        image = both.pop("image_id")
        assert by_id[question["question_id"]] == both
        assert len(both["answers"]) == 10 and image


# ---------------------------------------------------------------- what is wrong


def test_part_of_a_benchmark_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = vqav2(tmp_path)
    gone = values["images"] / "val2014" / "COCO_val2014_000000000002.jpg"
    gone.unlink()
    assert run("vqav2", **values) == 2
    said = capsys.readouterr().err
    assert f"image 2: val2014/{gone.name} is not in {values['images']}" in said and "1 files are not done" in said
    put_images(values["images"], f"val2014/{gone.name}")
    assert run("vqav2", **values) == 0


def test_two_images_of_one_id_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("test", {"filename": f"7.{ending}"}) for ending in ("jpg", "png")]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps(karpathy(*rows)))
    put_images(tmp_path, "7.jpg", "7.png")
    assert run("flickr30k", source=tmp_path, images=tmp_path, out=tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert told.endswith("dataset_flickr30k.json: several images have the id 7\n1 files are not done\n")


GOOD = vqa((10, 1), (20, 2))
NAMED = {"questions": [{"question_id": 1, "image_id": "x", "question": "?"}]}


@pytest.mark.parametrize(
    ("questions", "annotations", "said"),
    [
        (GOOD[0], vqa((10, 1))[1], "1 questions have no annotation: 20"),
        (vqa((10, 1))[0], vqa(*((i, 1) for i in range(10, 15)))[1], "4 annotations have no question: 14, 13, 12, ..."),
        (GOOD[0], vqa((10, 1), (20, 3))[1], "question 20 is about image 2, its annotation about 3"),
        (vqa((10, 1), (10, 2))[0], GOOD[1], "1 of the questions have the question_id of another"),
        ({"questions": [{}]}, GOOD[1], "not the published form (KeyError: 'question_id')"),
        ({"questions": {}}, GOOD[1], "there is no list of questions or annotations"),
        (NAMED, {"annotations": NAMED["questions"]}, "Unknown format code 'd'"),
        (b'{"questions":\n[,]}', GOOD[1], "mscoco_val2014_questions.json is damaged: line 2: Expecting value"),
        (b'{"questions":\n\n"\xff"}', GOOD[1], "is damaged: line 3 is not UTF-8"),
    ],
)
def test_files_that_do_not_belong_together_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], questions: Any, annotations: Any, said: str
) -> None:
    data = questions if isinstance(questions, bytes) else json.dumps(questions).encode()
    (tmp_path / "OpenEnded_mscoco_val2014_questions.json").write_bytes(data)
    (tmp_path / "mscoco_val2014_annotations.json").write_text(json.dumps(annotations))
    put_images(tmp_path / "images", *(f"val2014/COCO_val2014_{i:012d}.jpg" for i in (1, 2)))
    assert run("okvqa", source=tmp_path, images=tmp_path / "images", out=tmp_path / "out") == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.endswith("\n1 files are not done\n") and complaint.count("\n") == 2


@pytest.mark.parametrize(
    ("name", "said"), [("a.txt", "has no dataset_coco.json"), ("dataset_coco.json.gz", "is damaged: ")]
)
def test_other_sources_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"{}")[:-3])
    assert run("coco", source=tmp_path, images=tmp_path, out=tmp_path / "out") == 2
    assert said in capsys.readouterr().err


def test_two_files_of_one_name_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.zip", "b.zip"):
        archive(tmp_path / name, dataset_coco=karpathy(), other={})
    assert run("coco", source=tmp_path, images=tmp_path, out=tmp_path / "out") == 2
    assert "has two files dataset_coco.json: a.zip and b.zip\n" in capsys.readouterr().err
    (tmp_path / "b.zip").write_bytes(io.BytesIO().getvalue())
    assert run("coco", source=tmp_path, images=tmp_path, out=tmp_path / "out") == 2
    assert "b.zip is damaged: File is not a zip file\n" in capsys.readouterr().err


numbers = st.lists(st.integers(0, 5), max_size=6)


@given(asked=numbers, answered=numbers)
def test_only_lists_of_each_other_are_joined(asked: list[int], answered: list[int]) -> None:
    questions = [{"question_id": number, "image_id": number, "q": number} for number in asked]
    annotations = [{"question_id": number, "image_id": number, "a": number} for number in answered]
    if len(set(asked)) == len(asked) and sorted(asked) == sorted(answered):
        found = list(joined(questions, annotations))
        assert [(row["q"], row["a"]) for row in found] == [(number, number) for number in asked]
    else:
        with pytest.raises(Disagreement):
            list(joined(questions, annotations))
