"""report.html: complete, self-contained, escaped, and made without torch."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import samples

from hpc_mm.config import with_overrides
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.data.shards import ShardWriter
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


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run that trained, was resumed at step 20, and was evaluated."""
    data = tmp_path / "store" / "heldout"
    with ShardWriter(open_store(str(data)), "heldout") as writer:
        for number in range(4):
            picture = Image(samples.encoded(samples.picture(number)))
            writer.add(Sample(f"sample{number}", (picture, Text("a red circle"))))
    folder = tmp_path / "runs" / "toy"
    (folder / "eval").mkdir(parents=True)
    run = with_overrides(toy(), {"train.steps": "30", "model.vision.name": EVIL})
    (folder / "run.json").write_text(run.model_dump_json())
    lines = [json.dumps(metrics(step)) for step in (10, 20, 30, 20, 30)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + lines[0][:20])
    for number, text in (("001", "0" * 40), ("002", "a" * 40 + "\n")):
        (folder / "submissions" / number).mkdir(parents=True)
        (folder / "submissions" / number / "commit.txt").write_text(text)
    (folder / "submissions" / "002" / "dirty.diff").write_text("+1")
    scores = []
    for step, caption, cider in ((0, EVIL, 3.14159), (30, "a red circle", 141.159)):
        rows = [
            {"id": f"sample{number}", "caption": caption, "references": ["a red circle", "one circle"]}
            for number in range(4)
        ]
        (folder / "eval" / f"captions-step-{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        scores.append({"step": step, "file": f"captions-step-{step}.jsonl", "cider": cider})
    (folder / "eval" / "captions.json").write_text(json.dumps({"data": str(data), "scores": scores}))
    return folder


def test_the_report_tells_it_all(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"run={run_folder}", "samples=3"]) == 0
    assert capsys.readouterr().out == f"CIDEr 3.1 at step 0, 141.2 at step 30\n{run_folder}/report.html\n"
    page = Tags((run_folder / "report.html").read_text())
    images = [attributes for tag, attributes in page.found if tag == "img"]
    assert len(images) == 3
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in images)
    assert all(image["alt"] == "a red circle" for image in images)
    charts = {str(attributes["aria-label"]) for tag, attributes in page.found if tag == "svg"}
    assert len(charts) == 4
    assert any("all sources from 0.6 to 0.2" in label for label in charts)
    for told in ("3.1 \u2192 141.2", "30 of 30", "1,234", "a" * 40 + " with uncommitted changes", "zero2", "documents"):
        assert told in page.text


def test_the_report_needs_no_network_and_no_scripts(run_folder: Path) -> None:
    assert main([f"run={run_folder}"]) == 0
    text = (run_folder / "report.html").read_text()
    page = Tags(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.found}
    for _, attributes in page.found:
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name, "data:")).startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert EVIL in page.text
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
    (run_folder / "eval" / "captions.json").unlink()
    assert main([f"run={run_folder}"]) == 0
    assert "no captions in" in capsys.readouterr().out
    assert "No step has been logged yet." in (run_folder / "report.html").read_text()


def test_a_heldout_corpus_that_was_made_again(run_folder: Path) -> None:
    data = run_folder.parents[1] / "store" / "heldout"
    with ShardWriter(open_store(str(data)), "heldout") as writer:
        for number in (1, 9):
            picture = Image(samples.encoded(samples.picture(number)))
            writer.add(Sample(f"sample{number}", (picture, Text("a red circle"))))
    assert main([f"run={run_folder}"]) == 0
    page = Tags((run_folder / "report.html").read_text())
    assert len([tag for tag, _ in page.found if tag == "img"]) == 1
    assert page.text.count("no picture") == 3


@pytest.mark.parametrize("size", [0, 700])
def test_a_heldout_tar_that_is_missing_or_cut(run_folder: Path, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    tar = run_folder.parents[1] / "store" / "heldout" / "heldout-000000.tar"
    os.truncate(tar, size) if size else tar.unlink()
    assert main([f"run={run_folder}"]) == 2
    complaint = capsys.readouterr().err
    assert "heldout-000000.tar" in complaint and complaint.count("\n") == 1


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
