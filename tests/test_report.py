"""report.html: complete, self-contained, escaped, and made without torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import questions
from browser import Browser, opened
from evaluations import TOY, VQA, evaluate

from hpc_mm import results
from hpc_mm.config import with_overrides
from hpc_mm.data.store import open_store
from hpc_mm.recipes.toy import toy
from hpc_mm.report import main, read_metrics

EVIL = '<script>alert("x")</script> & "quotes"'


class Tags(HTMLParser):
    """What a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def metrics(step: int) -> dict[str, float | None]:
    loss = 6.0 / step
    return {
        "step": step,
        "loss": loss,
        "loss/documents": loss / 2,
        "loss/pairs": loss / 3,
        "lr": 0.001 / step,
        "samples_per_s": 1234.5,
        "tokens_per_s": 9999.0,
        "mfu": None,
        "data_wait": 0.01,
        "padding": 0.2,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained, was resumed at step 20, and was evaluated before and after, with its data beside it."""
    folder = tmp_path_factory.mktemp("all") / "runs" / "toy"
    folder.mkdir(parents=True)
    run = with_overrides(toy(), {"train.steps": "30", "model.vision.name": EVIL})
    (folder / "run.json").write_text(run.model_dump_json())
    lines = [json.dumps(metrics(step)) for step in (10, 20, 30, 20, 30)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + lines[0][:20])
    for number, text in (("001", "0" * 40), ("002", "a" * 40 + "\n")):
        (folder / "submissions" / number).mkdir(parents=True)
        (folder / "submissions" / number / "commit.txt").write_text(text)
    (folder / "submissions" / "002" / "dirty.diff").write_text("+1")
    data = heldout(folder.parents[1], range(4))
    for step, said in ((0, [EVIL] * 4), (30, [*map(caption, range(3)), "nothing"])):
        evaluate(folder, TOY, step, data, said)
        (folder / "eval" / "toy" / f"step-{step}" / "index.html").write_text("its own page")
    return folder


@pytest.fixture
def run_folder(made: Path, tmp_path: Path) -> Path:
    """A copy of its own; the addresses in it are those of the first."""
    copy = tmp_path / "runs" / "toy"
    shutil.copytree(made.parents[1], tmp_path, dirs_exist_ok=True)
    for file in copy.glob("eval/*/*/results.json"):
        file.write_text(file.read_text().replace(str(made.parents[1]), str(tmp_path)))
    return copy


def caption(number: int) -> str:
    return f"a {('red', 'green', 'blue', 'grey')[number]} circle of size {number}"


def heldout(folder: Path, numbers: range) -> str:
    """Captioned images, and some to demonstrate with."""
    splits = {"test": numbers, "train": range(10, 15)}
    facts = {
        split: {str(number): {"captions": [caption(number % 4), "one circle"]} for number in some}
        for split, some in splits.items()
    }
    return questions.write_splits(folder / "store" / "toy", 1, **facts)  # a shard each


def score(run_folder: Path, name: str, step: int) -> dict[str, Any]:
    """The first score of an evaluation."""
    values = json.loads((run_folder / "eval" / name / f"step-{step}" / "results.json").read_text())
    found: dict[str, Any] = values["scores"][0]
    return found


def test_the_report_tells_it_all(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"run={run_folder}", "samples=3"]) == 0
    first, last = score(run_folder, "toy", 0), score(run_folder, "toy", 30)
    said = f"toy cider {first['score']:.1f} at step 0, {last['score']:.1f} at step 30\n{run_folder}/report.html\n"
    assert capsys.readouterr().out == said and first["score"] < last["score"]
    page = Tags((run_folder / "report.html").read_text())
    images = [attributes for tag, attributes in page.found if tag == "img"]
    assert len(images) == 3
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in images)
    assert {image["alt"] for image in images} < set(map(caption, range(4)))
    charts = {str(attributes["aria-label"]) for tag, attributes in page.found if tag == "svg"}
    assert len(charts) == 5
    assert any("all sources from 0.6 to 0.2" in label for label in charts)
    assert f"toy: CIDEr, 2 shots, CIDEr: 2 shots from {first['score']:.3g} to {last['score']:.3g}" in charts
    for told in ("30 of 30", "1,234", "a" * 40 + " with uncommitted changes", "zero2", "documents"):
        assert told in page.text
    assert f"{first['score']:.1f} \u2192 {last['score']:.1f}CIDEr, toy, 2 shots" in page.text


def test_a_table_of_all_scores(run_folder: Path) -> None:
    assert main([f"run={run_folder}"]) == 0
    assert rows(run_folder) == [
        (
            *("toy", str(step), "2 shots", "CIDEr", f"{one['score']:.1f}"),
            *(f"{one['low']:.1f} to {one['high']:.1f}", "examples", *((one["protocol"],) if step == 0 else ())),
        )
        for step in (0, 30)
        for one in [score(run_folder, "toy", step)]
    ]
    links = [values["href"] for tag, values in Tags((run_folder / "report.html").read_text()).found if tag == "a"]
    assert links == ["eval/toy/step-0/index.html", "eval/toy/step-30/index.html"]
    assert all((run_folder / str(link)).is_file() for link in links)


def rows(run_folder: Path) -> list[tuple[str, ...]]:
    tables = re.findall('<table class="scores">.*?</table>', (run_folder / "report.html").read_text())
    found = [row for table in tables for row in re.findall("<tr>(.*?)</tr>", table)[1:]]
    cells = [re.findall("<td.*?>(.*?)</td>", row) for row in found]
    return [tuple(re.sub("<.*?>", "", cell) for cell in row) for row in cells]


def test_several_benchmarks_shots_and_rules(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each protocol is a line of its own; what was scored once has no chart."""
    store, (toy_data, said) = run_folder.parents[1] / "store", (str(run_folder.parents[1] / "store" / "toy"), ["x"] * 4)
    asked = questions.write_splits(store / "vqav2", test=questions.asked(0, 1), train=questions.asked(3, 4))
    evaluate(run_folder, TOY, 30, toy_data, said, shots=(1,), rules=("openflamingo", "lmms-eval"))
    evaluate(run_folder, TOY, 60, toy_data, said[:2], samples=2)
    evaluate(run_folder, VQA, 30, asked, ["a1", "x", "x", "a1"])
    assert main([f"run={run_folder}"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(" at step ")[0].rpartition(" ")[0] for line in out[:-1]] == [
        *("toy cider (1 shot)", "toy cider (2 shots)", "toy cider (2 shots, protocol 2)"),
        *("toy cider (1 shot, lmms-eval)", "vqav2 vqa-accuracy"),
    ]
    assert [row[:3] for row in rows(run_folder)] == [
        *(("toy", "30", "1 shot"), ("toy", "0", "2 shots"), ("toy", "30", "2 shots")),
        *(("toy", "60", "2 shots, protocol 2"), ("toy", "30", "1 shot, lmms-eval"), ("vqav2", "30", "2 shots")),
    ]
    page = Tags((run_folder / "report.html").read_text())
    charts = [str(attributes["aria-label"]) for tag, attributes in page.found if tag == "svg"]
    assert len(charts) == 5 and any("1 shot from" in label and "2 shots from" in label for label in charts)
    assert not any("lmms-eval" in label or "vqav2" in label for label in charts)
    assert "VQA accuracy, vqav2, 2 shots" in page.text and "Images of toy, 2 shots." in page.text


def test_figures_of_images_that_are_judged(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """VQAScores of all items are lines of one chart, the table has all; no images are shown."""
    shutil.rmtree(run_folder / "eval")
    figures = {"text": 30.0, "image": 25.0, "group/Object": 15.0, "group": -4.0}
    for step in (10, 30):
        entries = [
            {"metric": metric, "figure": name, "score": value + step, "low": 0.0, "high": 50.0, "protocol": metric}
            for metric in ("vqascore", "p_yes")
            for name, value in figures.items()
        ]
        store = open_store(str(run_folder / "eval" / "winoground" / f"step-{step}"), make=True)
        about = {"benchmark": "winoground", "data": "d", "checkpoint": str(run_folder), "step": str(step)}
        results.write(store, {**about, "scores": entries})
    assert main([f"run={run_folder}"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "winoground vqascore (text) 40.0 at step 10, 60.0 at step 30"
    labels = ["text", "image", "group", "group, Object"]
    assert [row[:6] for row in rows(run_folder)] == [
        ("winoground", str(step), label, metric, f"{figures[label.replace(', ', '/')] + step:.1f}", "0.0 to 50.0")
        for metric in ("VQAScore", "P(Yes)")
        for label in labels
        for step in (10, 30)
    ]
    text = (run_folder / "report.html").read_text()
    page, (folded,) = Tags(text), re.findall("<details><summary>Further figures</summary>.*?</details>", text)
    assert folded.count("group, Object") == 4 and folded.count("VQAScore") == 2 and folded.count("P(Yes)") == 8
    (chart,) = [str(values["aria-label"]) for tag, values in page.found if tag == "svg"][4:]
    assert chart == "winoground: VQAScore, VQAScore: text from 40 to 60; image from 35 to 55; group from 6 to 26"
    assert "40.0 \u2192 60.0VQAScore, winoground, text" in page.text and "Held-out" not in page.text


def test_questions_stand_beside_their_images(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "eval")
    store = run_folder.parents[1] / "store"
    asked = questions.write_splits(store / "vqav2", test=questions.asked(0, 1), train=questions.asked(3, 4))
    evaluate(run_folder, VQA, 30, asked, ["a1", "", "x", " a1"])
    assert main([f"run={run_folder}"]) == 0
    text = (run_folder / "report.html").read_text()
    assert text.count("<dt>question</dt><dd>What 0?</dd>") == 2 and text.count("<img") == 4
    assert text.count('<dd class="right">a1</dd>') == 2 and "(nothing)" in text
    assert text.count("<figure") == 4, "one step makes no chart"
    assert not rows(run_folder)[0][6], "there is no page"


def test_the_report_needs_no_network_and_no_scripts(run_folder: Path) -> None:
    assert main([f"run={run_folder}"]) == 0
    text = (run_folder / "report.html").read_text()
    page = Tags(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.found}
    for tag, attributes in page.found:
        for name in ("src", "href", "xlink:href"):
            loads_nothing = ("data:", "#", "eval/") if (tag, name) == ("a", "href") else ("data:", "#")
            assert str(attributes.get(name, "data:")).startswith(loads_nothing)
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert page.text.count(EVIL) == 4, "what the model said"
    ids = re.findall(r'\bid="([^"]+)"', text)
    references = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    assert references <= set(ids)


def test_two_reports_of_a_run_are_equal(run_folder: Path) -> None:
    assert main([f"run={run_folder}"]) == 0
    first = (run_folder / "report.html").read_bytes()
    assert main([f"run={run_folder}"]) == 0
    assert (run_folder / "report.html").read_bytes() == first


def test_a_run_that_has_only_begun(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "metrics.jsonl").unlink()
    for file in run_folder.glob("eval/*/*/results.json"):
        file.unlink()
    assert main([f"run={run_folder}"]) == 0
    assert f"no evaluation in {run_folder}/eval yet: an eval/ script makes one" in capsys.readouterr().out
    assert "No step has been logged yet." in (run_folder / "report.html").read_text()


def test_a_heldout_corpus_that_was_made_again(run_folder: Path) -> None:
    """Only the first two images are where they were."""
    shutil.rmtree(run_folder.parents[1] / "store")
    heldout(run_folder.parents[1], range(2))
    assert main([f"run={run_folder}"]) == 0
    page = Tags((run_folder / "report.html").read_text())
    assert len([tag for tag, _ in page.found if tag == "img"]) == 2
    assert page.text.count("no picture") == 2


@pytest.mark.parametrize(("place", "value"), [(1, "9"), (3, 1)], ids=["image", "sample"])
def test_another_image_is_not_shown(run_folder: Path, place: int, value: str | int) -> None:
    file = run_folder / "eval" / "toy" / "step-30" / "questions.jsonl"
    first, *others = map(json.loads, file.read_text().splitlines())
    first[place] = value
    file.write_text("".join(f"{json.dumps(line)}\n" for line in (first, *others)))
    assert main([f"run={run_folder}"]) == 0
    page = Tags((run_folder / "report.html").read_text())
    assert page.text.count("no picture") == 1 and len([tag for tag, _ in page.found if tag == "img"]) == 3


@pytest.mark.parametrize("size", [0, 700])
def test_a_heldout_tar_that_is_missing_or_cut(run_folder: Path, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    (tar,) = (run_folder.parents[1] / "store" / "toy").glob("test-000000-*.tar")
    os.truncate(tar, size) if size else tar.unlink()
    assert main([f"run={run_folder}"]) == 2
    complaint = capsys.readouterr().err
    assert tar.name in complaint and complaint.count("\n") == 1


DAMAGES = {
    "results.json": ("{", "results.json is damaged"),
    "questions.jsonl": ("{}", "questions.jsonl is damaged"),
    "2shot-s42/openflamingo.jsonl": ("{}", "openflamingo.jsonl is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_evaluation(run_folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, (text, said) = run_folder / "eval" / "toy" / "step-30" / name, DAMAGES[name]
    file.write_text(text)
    assert main([f"run={run_folder}"]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def test_an_evaluation_without_its_questions(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "eval" / "toy" / "step-30" / "questions.jsonl").unlink()
    assert main([f"run={run_folder}"]) == 2
    complaint = capsys.readouterr().err
    assert "no questions.jsonl in" in complaint and complaint.count("\n") == 1


def test_steps_that_were_done_again_count_once(run_folder: Path) -> None:
    assert [record["step"] for record in read_metrics(run_folder)] == [10, 20, 30]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run=/nowhere/at/all"], "no run at /nowhere/at/all"),
        ([], "run=FOLDER is missing"),
        (["rum=x"], "did you mean run?"),
        (["runs/toy"], "is not key=value"),
    ],
)
def test_a_users_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def test_no_torch(run_folder: Path) -> None:
    code = f"import sys, hpc_mm.report; hpc_mm.report.main(['run={run_folder}']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened(tmp_path_factory.mktemp("browser") / "profile") as tab:
        yield tab


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(run_folder: Path, browser: Browser, scheme: str) -> None:
    assert main([f"run={run_folder}"]) == 0
    browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.ask("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=False)
    browser.visit((run_folder / "report.html").as_uri())
    assert not browser.complaints() and {asked.split(":")[0] for asked in browser.requests()} == {"file", "data"}
    assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "as on a telephone"
    assert browser.run("[...document.images].map((image) => image.naturalWidth)") == [40] * 4
    browser.visit(browser.run("document.querySelector('.scores a').href"))
    assert browser.run("document.body.innerText") == "its own page"
