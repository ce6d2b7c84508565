"""Benchmarks of classes: Hateful Memes and ImageNet from their published files to questions."""

import json
from pathlib import Path
from typing import Any

import pytest
from questions import MEMES
from scripts import run, written
from test_annotations import image_of, put_images

from hpc_mm.benchmark import IMAGENET, Benchmark, questions

# ---------------------------------------------------------------- hateful memes


def meme(number: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "img": f"img/{number:05d}.png", "text": f"so {number}", **more}


def write_memes(folder: Path, **splits: list[dict[str, Any]]) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name, entries in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
        put_images(folder, *(entry["img"] for entry in entries))
    return {"source": folder, "images": folder, "out": folder / "out"}


@pytest.mark.parametrize("name", ["dev", "dev_seen"])
def test_memes_of_both_phases(tmp_path: Path, name: str) -> None:
    splits = {"train": [meme(1, label=0)], name: [meme(1765, label=1), meme(8, label=0)], "test_seen": [meme(9)]}
    assert run("hateful_memes", **write_memes(tmp_path, **splits)) == 0
    found = {sample.id: sample for sample in written(tmp_path / "out")}
    assert found["1765"].metadata == {
        "split": "dev",
        "file_name": "img/01765.png",
        "text": "so 1765",
        "label": "yes",
    }
    assert [image.data for image in found["8"].images] == [image_of("img/00008.png")]
    assert found["9"].metadata == {"split": "test", "file_name": "img/00009.png", "text": "so 9"}
    asked = questions(str(tmp_path / "out"), "dev", MEMES)
    assert [(q.id, q.text, q.references) for q in asked] == [
        ("1765", "so 1765", ("yes",)),
        ("8", "so 8", ("no",)),
    ]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([meme(1, label=0), meme(2, label=2)], "dev.jsonl: the label of image 2 is 2, not 0 or 1"),
        ([meme(1, label="1")], "dev.jsonl: the label of image 1 is '1', not 0 or 1"),
        ([meme(1)], "dev.jsonl: not the published form (KeyError: 'label')"),
        ([meme(1, label=0, text=None)], "dev.jsonl: the text of image 1 is None"),
        ([meme(1, label=0), meme(1, label=1)], "dev.jsonl: several images have the id 1"),
    ],
)
def test_memes_with_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], entries: list[dict[str, Any]], said: str
) -> None:
    assert run("hateful_memes", **write_memes(tmp_path, dev=entries)) == 2
    assert capsys.readouterr().err.endswith(f"{said}\n1 files are not done\n")


def test_a_meme_whose_image_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = write_memes(tmp_path, dev=[meme(1, label=0)])
    (tmp_path / "img" / "00001.png").unlink()
    assert run("hateful_memes", **values) == 2
    assert "dev.jsonl image 1: img/00001.png is not in" in capsys.readouterr().err


# ---------------------------------------------------------------- imagenet

NAMES = {"n02": "missile", "n01": "tench", "n03": "missile"}  # as in OpenAI's list, two classes have one name
VAL = {"ILSVRC2012_val_00000001": "n03", "ILSVRC2012_val_00000002": "n01", "ILSVRC2012_val_00000003": "n02"}


def write_imagenet(folder: Path, flat: bool, names: dict[str, str] = NAMES) -> dict[str, Path]:
    (folder / "names").mkdir(parents=True)
    (folder / "names" / "classes.tsv").write_text("".join(f"{synset}\t{name}\n" for synset, name in names.items()))
    truth = "".join(f"{image},{synset} 85 1 499 272 \n" for image, synset in VAL.items())
    if flat:
        (folder / "names" / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{truth}")
    put_images(folder, *(f"val/{image}.JPEG" if flat else f"val/{VAL[image]}/{image}.JPEG" for image in VAL))
    put_images(folder, *(f"train/{synset}/{synset}_{i}.JPEG" for synset in NAMES for i in (7, 10)))
    return {"source": folder / "names", "images": folder, "out": folder / "out"}


@pytest.mark.parametrize("flat", [True, False])
def test_imagenet_however_val_is_arranged(tmp_path: Path, flat: bool) -> None:
    assert run("imagenet", **write_imagenet(tmp_path, flat)) == 0
    found = {sample.id: sample for sample in written(tmp_path / "out")}
    first = found["ILSVRC2012_val_00000001"]
    file_name = f"val/{'' if flat else 'n03/'}ILSVRC2012_val_00000001.JPEG"
    assert first.metadata == {"split": "val", "file_name": file_name, "synset": "n03", "label": "missile"}
    assert [image.data for image in first.images] == [image_of(file_name)]
    options = {"name": "imagenet", "kind": "classes", "prompt": IMAGENET, "metric": "accuracy"}
    benchmark = Benchmark(**options, classes=("tench", "missile"))
    val = questions(str(tmp_path / "out"), "val", benchmark)
    assert {q.id: q.references[0] for q in val} == {image: NAMES[synset] for image, synset in VAL.items()}
    train = questions(str(tmp_path / "out"), "train", benchmark)
    assert [q.id for q in train] == ["n01_10", "n01_7", "n02_10", "n02_7", "n03_10", "n03_7"]


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("names/classes.tsv", "n01\ttench\n", "val/: 2 classes have no name in classes.tsv: n02, n03"),
        (
            "names/classes.tsv",
            "".join(f"n0{i}\ta\n" for i in range(1, 9)),
            "val/: 5 classes have no image: n04, n05, n06, ...",
        ),
        ("names/classes.tsv", "n01\ta\nn01\tb\n", "val/: 1 lines of classes.tsv begin like another"),
        ("names/classes.tsv", "n01\ta\nn02 tench\n", "classes.tsv is damaged: line 2 has not two values: b'n02 tench'"),
        ("names/classes.tsv", "n01\ta\nn02\t\n", "classes.tsv is damaged: line 2 has not two values: b'n02\\t'"),
        ("names/classes.tsv", b"n01\ta\n\xff\tb\n", "classes.tsv is damaged: line 2 has not two values"),
        (
            "names/LOC_val_solution.csv",
            "ImageId,PredictionString\nILSVRC2012_val_00000001,n03 1 2\n",
            "val/: 2 images have no class in LOC_val_solution.csv: ILSVRC2012_val_00000002, ILSVRC2012_val_00000003",
        ),
        ("val/ILSVRC2012_val_00000002.JPEG", None, "1 images of LOC_val_solution.csv are missing: ILSVRC2012_val_00"),
        ("val/n01/ILSVRC2012_val_00000002.JPEG", b"", "val/: several images have the id ILSVRC2012_val_00000002"),
    ],
)
def test_imagenet_with_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, content: str | bytes | None, said: str
) -> None:
    values = write_imagenet(tmp_path, flat=True)
    file = tmp_path / path
    if content is None:
        file.unlink()
    else:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert run("imagenet", **values, splits="val") == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 2


def test_what_imagenet_lacks_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = write_imagenet(tmp_path, flat=False)
    assert run("imagenet", **{**values, "images": tmp_path / "val"}, splits="val") == 2
    assert f"images={tmp_path / 'val'} has no val/*.JPEG and no val/*/*.JPEG\n" == capsys.readouterr().err
    assert run("imagenet", **{**values, "source": tmp_path}) == 2
    assert "has no classes.tsv: lines of a synset, a tab and its class's name\n" in capsys.readouterr().err
