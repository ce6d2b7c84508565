"""hpc_mm.score from its command line: the CSV, the page, and users' mistakes."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import judges
import pytest
import samples
import torch
from safetensors.torch import save_file

from hpc_mm import score
from hpc_mm.answerer import Weights, trained
from hpc_mm.config import read_run
from hpc_mm.recipes.toy import toy
from hpc_mm.vqascore import VqaScorer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ['a "red" circle, <b>large</b>', "=blue", "a green star of the left"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judges.write_run(tmp_path_factory.mktemp("runs") / "judge")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one of them further down, and a file that is none."""
    for name, image in zip(("b.png", "a<i>.png", "more/c.PNG"), judges.images(3, 40, 30), strict=True):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    (tmp_path / "images" / "notes.md").write_text("no image")
    return tmp_path / "images"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    return tmp_path / "texts.txt"


def run(run_folder: Path, folder: Path, texts: Path | str, out: Path, *words: str) -> int:
    given = [f"checkpoint={run_folder}", "step=0", f"images={folder}", f"texts={texts}", f"out={out}"]
    own = {word.partition("=")[0] for word in words}
    return score.main([*(word for word in given if word.partition("=")[0] not in own), *words])


def rows(out: Path) -> list[dict[str, str]]:
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def scorer(run_folder: Path) -> VqaScorer:
    model, tokenizer = trained(Weights(read_run(run_folder), run_folder, "0"), "fp32")
    return VqaScorer(model, tokenizer, "cpu")


def test_every_image_is_scored_with_every_text(
    run_folder: Path, folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "scores.csv"
    assert run(run_folder, folder, texts, out) == 0
    found = rows(out)
    names = ["a<i>.png", "b.png", "more/c.PNG"]
    assert [(row["image"], row["text"]) for row in found] == [(name, text) for name in names for text in TEXTS]
    judge = scorer(run_folder)
    for row in found:
        assert (
            float(row["score"]) == judge.score([(folder / row["image"]).read_bytes()], [row["text"]], [(0, 0)]).item()
        )
    assert len({row["score"] for row in found}) == 9
    assert "1 files of" in capsys.readouterr().out, "what is no image is counted"


def test_the_page_shows_the_highest_first_and_loads_nothing(
    run_folder: Path, folder: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.csv"
    assert run(run_folder, folder, texts, out, "shown=7", "mode=p_yes") == 0
    page = (tmp_path / "scores.html").read_text()
    shown = [float(value) for value in re.findall(r"<dd><b>([0-9.]+)</b></dd>", page)]
    expected = sorted((float(row["score"]) for row in rows(out)), reverse=True)[:7]
    assert shown == [float(f"{value:.4f}") for value in expected]
    assert "7 of 9 pairs" in page and "default-src 'none'" in page
    assert "<b>large</b>" not in page and "&lt;b&gt;large&lt;/b&gt;" in page and "<i>" not in page
    assert all(url.startswith("data:image/jpeg") for url in re.findall(r'src="([^"]*)"', page))
    assert not re.search(r"https?://|<script", page)
    assert run(run_folder, folder, texts, tmp_path / "other.csv", "shown=0") == 0
    assert not (tmp_path / "other.html").exists()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_listed_pairs_are_scored_in_their_order(run_folder: Path, folder: Path, tmp_path: Path, kind: str) -> None:
    pairs = [("more/c.PNG", "a, red\nstar"), ("b.png", "blue"), ("more/c.PNG", "blue"), ("b.png", "blue")]
    file, out = tmp_path / f"pairs.{kind}", tmp_path / "scores.csv"
    with file.open("w", newline="") as stream:
        if kind == "csv":
            writer = csv.writer(stream)
            writer.writerows([("text", "image"), *((text, image) for image, text in pairs)])
        else:
            stream.writelines(json.dumps({"image": image, "text": text, "id": 3}) + "\n" for image, text in pairs)
    assert run(run_folder, folder, file, out) == 0
    found = rows(out)
    assert [(row["image"], row["text"]) for row in found] == pairs
    assert found[1] == found[3] and found[1]["score"] != found[2]["score"]


def test_the_same_scores_whatever_is_at_once(
    run_folder: Path, folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(run_folder, folder, texts, tmp_path / "one.csv") == 0
    monkeypatch.setattr(score, "IMAGES", 2)
    assert run(run_folder, folder, texts, tmp_path / "two.csv", "keep_mb=1", "batch=3") == 0
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def test_a_text_itself_and_special_tokens(
    run_folder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.csv"
    assert run(run_folder, folder, "a <image> red star</s>", out) == 0
    assert "1 texts hold what would be taken for a special token" in capsys.readouterr().out
    assert run(run_folder, folder, "a  red star", tmp_path / "plain.csv") == 0
    assert [row["score"] for row in rows(out)] == [row["score"] for row in rows(tmp_path / "plain.csv")]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["images=nowhere"], "there is no such folder"),
        (["texts=nowhere.txt"], "there is no such file"),
        (["texts= "], "1 of 1 texts are empty: text"),
        (["out=scores"], "must name a .csv"),
        (["checkpoint=nowhere"], "no run at"),
        (["txets=a"], "unknown key 'txets': did you mean texts"),
        (["mode=yes"], "p_yes"),
        (["shown=-1"], "shown"),
    ],
)
def test_a_mistake_is_one_line(
    run_folder: Path, folder: Path, tmp_path: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(run_folder, folder, "red", tmp_path / "scores.csv", *words) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.csv"))


def test_lines_end_at_line_feeds_alone(folder: Path, tmp_path: Path) -> None:
    texts = ["a red\u2028star", "blue\x85", "a\x0bstar"]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    rows = [json.dumps({"image": "b.png", "text": text}, ensure_ascii=False) for text in texts[:2]]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    assert list(score.text_lines(tmp_path / "texts.txt").values()) == texts
    assert score.listed_pairs(folder, tmp_path / "pairs.jsonl").texts == texts[:2]


def test_a_place_that_cannot_be_written_is_told_before_anything_is_scored(
    run_folder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "scores_of", None)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/proc")):
        assert str(place) in mistake(capsys, run_folder, folder, "red", place / "scores.csv")


def mistake(capsys: pytest.CaptureFixture[str], *given: Any) -> str:
    assert run(*given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_images_and_texts_are_looked_at_before_anything_is_scored(
    run_folder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "scores.csv", tmp_path / "texts.txt"
    for number in range(5):
        (folder / f"broken{number}.jpg").write_bytes(samples.encoded(samples.picture(number), "JPEG")[: 90 * number])
    told = mistake(capsys, run_folder, folder, "red", out)
    assert "5 of 8 images cannot be read: broken0.jpg, broken1.jpg, broken2.jpg, ..." in told
    (tmp_path / "none").mkdir()
    assert "none of its 0 files is an image" in mistake(capsys, run_folder, tmp_path / "none", "red", out)
    for text, reason in (("", "is empty"), ("red\n\nblue\n \n", "2 of 4 texts are empty: line 2, line 4")):
        file.write_text(text)
        for image in folder.glob("broken*"):
            image.unlink()
        assert reason in mistake(capsys, run_folder, folder, file, out)
    file.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in mistake(capsys, run_folder, folder, file, out)
    file.write_text("red\n" + "blue " * 99)
    assert "line 2: its question has" in mistake(capsys, run_folder, folder, file, out)
    pairs = tmp_path / "pairs.csv"
    for text, reason in (
        ("image,text\n", "holds no pairs"),
        ("picture,text\nb.png,red\n", "it must have an image and a text"),
        ("image,text\nb.png,red\nd.png,red\n../texts.txt,red\n", "2 of 3 are missing: d.png, ../texts.txt"),
    ):
        pairs.write_text(text)
        assert reason in mistake(capsys, run_folder, folder, pairs, out)
    (tmp_path / "pairs.jsonl").write_text('{"image": 3}\n')
    assert "pair 1 is" in mistake(capsys, run_folder, folder, tmp_path / "pairs.jsonl", out)
    assert not list(tmp_path.glob("scores*"))


def test_a_checkpoint_of_another_family_or_size_is_refused(
    run_folder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.csv"
    (tmp_path / "flamingo").mkdir()
    (tmp_path / "flamingo" / "run.json").write_text(toy().model_dump_json())
    assert "is a flamingo model" in mistake(capsys, tmp_path / "flamingo", folder, "red", out)
    exported = judges.write_run(tmp_path / "exported")
    save_file({"projector.0.bias": torch.zeros(48)}, exported / "model.safetensors")
    told = mistake(capsys, exported, folder, "red", out, "step=latest")
    assert "projector.0.bias" in told and "48" in told


def test_a_gpu_is_used_unless_none_is_wanted(
    run_folder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_run = read_run(run_folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for gpus, device in ((1, "cuda:0"), (0, "cpu")):
        given = score.Score(checkpoint="c", images="i", texts="t", out="o.csv", gpus=gpus)
        assert given.running(trained_run).device == device
    assert given.model_copy(update={"gpus": 1}).running(trained_run, task=4).device == "cuda:1"
    assert run(run_folder, folder, "red", tmp_path / "scores.csv", "gpus=0", "shown=0") == 0, "there is none here"
    capsys.readouterr()
    assert "gpus=" in mistake(capsys, run_folder, folder, "red", tmp_path / "other.csv", "gpus=2")
