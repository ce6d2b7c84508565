"""eval/vqascore.py from its command line to results.json: any number of tasks, killed ones, and users' mistakes."""

import json
import os
import runpy
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import judges
import pytest
import samples
from checkout import ROOT

from hpc_mm import arrays, compare, faithfulness, judging, results
from hpc_mm.answerer import Weights, trained
from hpc_mm.config import ConfigError, read_run
from hpc_mm.data.store import open_store
from hpc_mm.faithfulness_files import Item
from hpc_mm.metrics import vqascore
from hpc_mm.recipes.toy import toy
from hpc_mm.vqascore import VqaScorer

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS = 11
WORDS = ["benchmark=pairs", "step=0", "part=2", "cluster=local"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judges.write_run(tmp_path_factory.mktemp("runs") / "judge")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """True and false texts of some images, one of which is of two items; a text would be taken for a special token."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for number, image in enumerate(judges.images(ITEMS - 1, 40, 30)):
        (folder / f"{number}.png").write_bytes(image)
    for number, text in enumerate(judges.texts(ITEMS)):
        wrong = [f"{text} left", "a blue star </s>"][: 1 + number % 2]
        lines.append({"id": f"i{number}", "image": f"{number % (ITEMS - 1)}.png", "true": text, "false": wrong})
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def run(run_folder: Path, data: Path, out: Path, *words: str) -> int:
    own = {word.partition("=")[0] for word in words}
    given = [f"checkpoint={run_folder}", f"data={data}", f"out={out}", *WORDS]
    return judging.main([*(word for word in given if word.partition("=")[0] not in own), *words])


def told(out: Path) -> tuple[bytes, bytes]:
    return (out / "results.json").read_bytes(), (out / "scores.jsonl").read_bytes()


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


def test_the_same_bits_for_any_tasks_parts_and_batch(run_folder: Path, data: Path, tmp_path: Path) -> None:
    found = {}
    for tasks, batch, part in ((1, 1, 64), (3, 7, 2), (8, 32, 1)):
        out = tmp_path / f"{tasks}"
        words = [f"tasks={tasks}", f"batch={batch}", f"part={part}"]
        assert run(run_folder, data, out, "stage=plan", *words) == 0
        for task in reversed(range(tasks)):
            assert run(run_folder, data, out, "stage=score", f"task={task}", *words) == 0
        assert run(run_folder, data, out, "stage=collect", *words) == 0
        found[tasks] = told(out)
    assert found[1] == found[3] == found[8]


def test_figures_are_those_of_the_scores(run_folder: Path, data: Path, tmp_path: Path) -> None:
    assert run(run_folder, data, tmp_path) == 0
    values, items = read(tmp_path), faithfulness.read("pairs", data)
    model, tokenizer = trained(Weights(read_run(run_folder), run_folder, "0"), "fp32")
    scorer = VqaScorer(model, tokenizer, "cpu")
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    for entry in values["scores"]:
        mode = entry["metric"]
        for item, row in zip(items, rows, strict=True):
            image = (data / item.images[0]).read_bytes()
            alone = [scorer.score([image], [text], [(0, 0)], mode).item() for text in item.texts]
            assert row["id"] == item.id and row[mode] == [alone]
        expected = faithfulness.results("pairs", items, [row[mode] for row in rows])[entry["figure"]]
        assert [entry[end] for end in ("score", "low", "high")] == [100 * value for value in expected]
    assert [entry["figure"] for entry in values["scores"]] == ["accuracy"] * 2
    assert [entry["protocol"].split("/")[2] for entry in values["scores"]] == ["vqascore@v1", "p_yes@v1"]
    assert (values["items"], values["pairs"], values["cleaned"]) == (ITEMS, 27, 5)
    assert values["scores"][0] != values["scores"][1]


def test_watching(run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It shows the figures of what is done, and at the end those of results.json."""
    assert run(run_folder, data, tmp_path) == 0
    entry = read(tmp_path)["scores"][0]
    capsys.readouterr()
    assert run(run_folder, data, tmp_path, "watch=true") == 0
    said = capsys.readouterr().out
    assert f"{ITEMS} of {ITEMS} items  accuracy: " in said and "pairs, vqascore" in said
    assert f"accuracy: {entry['score']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})" in said


def test_figures_so_far_are_those_of_the_items_that_are_done(run_folder: Path, data: Path, tmp_path: Path) -> None:
    assert run(run_folder, data, tmp_path) == 0
    items, rows = faithfulness.read("pairs", data), [json.loads(line) for line in raw_rows(tmp_path)]
    known: dict[str, Any] = {}
    for part in (3, 0):  # one after the other, in any order
        new = {part: rows[2 * part : 2 * part + 2]}
        found = judging.figures_so_far("pairs", {item.id: item for item in items}, known, new)
    done = [*range(2), *range(6, 8)]
    scores = [vqascore(rows[place]["log_probabilities"], "vqascore") for place in done]
    expected = faithfulness.results("pairs", [items[place] for place in done], scores)
    assert found == {"accuracy": tuple(100 * value for value in expected["accuracy"])}


def raw_rows(out: Path) -> list[str]:
    """Lines of the parts, without their heads."""
    return [line for file in sorted(out.glob("parts/*")) for line in file.read_text().splitlines()[1:]]


def test_figures_so_far_of_sources(tmp_path: Path) -> None:
    """Of one class alone there is none; where no figure is of all items, those of their parts are shown."""
    items = [Item(str(place), ("a",), (f"t{place}",), human=place % 2, group="coco") for place in range(4)]
    by_id, known = {item.id: item for item in items}, {}
    rows = [{"id": item.id, "log_probabilities": [[[-1.0 - place]]]} for place, item in enumerate(items)]
    assert judging.figures_so_far("seetrue", by_id, known, {0: rows[::2]}) == {}
    found = judging.figures_so_far("seetrue", by_id, known, {1: rows[1::2]})
    assert list(found) == ["auroc/coco"] and found["auroc/coco"].mean == 25.0
    begun = Item("4", ("a",), ("t4",), human=1, group="drawbench")
    rows.append({"id": "4", "log_probabilities": [[[-1.0]]]})
    both = {**by_id, "4": begun, "5": replace(begun, id="5", human=0)}
    assert judging.figures_so_far("seetrue", both, known, {2: rows[4:]}) == found, "of sources that are whole"


def test_killed_tasks_are_run_again(run_folder: Path, data: Path, tmp_path: Path) -> None:
    """At any place: a part is done as a whole, and the same command does the rest."""
    assert run(run_folder, data, tmp_path / "whole") == 0
    out = tmp_path / "killed"
    child = os.fork()  # a new process would import torch for seconds
    if not child:
        os._exit(run(run_folder, data, out, "part=1"))
    while len(list(out.glob("parts/*.jsonl"))) < 3:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it is at work"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kept = {file: file.stat().st_mtime_ns for file in out.glob("parts/*.jsonl")}
    assert 3 <= len(kept) < ITEMS and not (out / "results.json").exists()
    assert run(run_folder, data, out, "part=1") == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "what was done is not done again"
    assert told(out) == told(tmp_path / "whole")


def test_what_was_planned_otherwise_is_refused(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(run_folder, data, tmp_path, "stage=plan") == 0
    capsys.readouterr()
    for word, reason in (
        ("template=t5_plain", "template"),
        ("precision=bf16", "precision"),
    ):
        assert run(run_folder, data, tmp_path, "stage=score", word) == 2
        error = capsys.readouterr().err
        assert "planned otherwise" in error and reason in error and error.count("\n") == 1
    assert run(run_folder, data, tmp_path, "stage=collect") == 2
    assert "parts are not done" in capsys.readouterr().err


def test_scores_of_an_image_that_has_changed_are_not_mixed(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is it another protocol: the same images elsewhere, with times of their own, are the same benchmark."""
    shutil.copytree(data, tmp_path / "data")
    copied, out = tmp_path / "data", tmp_path / "out"
    image = copied / "4.png"
    assert run(run_folder, copied, out, "stage=plan") == 0
    assert run(run_folder, copied, out, "stage=score", "task=0", "tasks=2") == 0
    image.write_bytes(judges.images(8, 40, 30)[7])
    os.utime(image, (10**9, 10**9))
    capsys.readouterr()
    for words in (["stage=score", "task=1", "tasks=2"], ["stage=collect"], ["stage=plan"]):
        assert run(run_folder, copied, out, *words) == 2
        error = capsys.readouterr().err
        assert "names, sizes and times of images: " in error and error.count("\n") == 1
    image.write_bytes((data / "4.png").read_bytes())
    os.utime(image, ns=(0, 0))
    assert run(run_folder, copied, tmp_path / "elsewhere") == run(run_folder, data, tmp_path / "first") == 0
    one, other = read(tmp_path / "elsewhere"), read(tmp_path / "first")
    assert one["data"] != other["data"] and {**one, "data": ""} == {**other, "data": ""}


def test_results_of_another_benchmark_are_not_replaced(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"benchmark": "coco", "data": "x", "checkpoint": "x", "step": "1", "scores": []}
    (tmp_path / "results.json").write_text(json.dumps(about))
    assert run(run_folder, data, tmp_path, "stage=plan") == 2
    error = capsys.readouterr().err
    assert "holds results of coco; give another out=" in error and error.count("\n") == 1
    assert json.loads((tmp_path / "results.json").read_text()) == about and not (tmp_path / "plan.json").exists()
    with pytest.raises(ConfigError, match="holds results of coco"):
        stated = runpy.run_path(str(ROOT / "eval" / "vqav2.py"), run_name="vqav2")
        results.save(open_store(str(tmp_path)), stated["BENCHMARK"], results.Origin("x", "x", "1"), [])


def test_a_damaged_score_is_told_as_what_it_is(run_folder: Path, data: Path, tmp_path: Path) -> None:
    assert run(run_folder, data, tmp_path) == 0
    file = tmp_path / "results.json"
    values = json.loads(file.read_text())
    del values["scores"][0]["low"]
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"is damaged \(scores\.judged\.0\.low is missing\)"):
        results.read(open_store(str(tmp_path)))


def test_answers_alone_are_compared(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(run_folder, data, tmp_path) == 0
    assert compare.main([f"first={tmp_path}", f"second={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "holds scores of images" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["benchmark=winogrond"], "winoground"),
        (["checkpoint=nowhere"], "no run at"),
        (["step=12"], "12"),
        (["data=nowhere"], "nowhere"),
        (["data=s3://bucket/pairs"], "folder"),
        (["task=0"], "stage=score"),
        (["stage=score", "task=3", "tasks=2"], "numbered from 0 to 1"),
        (["stage=score"], "no folder"),
        (["bacth=3"], "batch"),
        (["template=v1"], "t5_v1"),
    ],
)
def test_a_mistake_is_one_line(
    run_folder: Path, data: Path, tmp_path: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(run_folder, data, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_items_are_what_is_published_and_decide_the_protocol(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = faithfulness.BENCHMARKS["pairs"]
    for sizes, said in (((ITEMS,), ""), ((400, 1600), "11 items, 400 or 1,600 are published\n")):
        monkeypatch.setitem(faithfulness.BENCHMARKS, "pairs", replace(reader, sizes=sizes))
        assert run(run_folder, data, tmp_path, "stage=plan") == 0
        assert capsys.readouterr().out == f"{said}pairs: 11 items, 27 pairs, in 6 parts\n"
    item = faithfulness.read("pairs", data)[0]
    others = [
        replace(item, **{key: value})
        for key, value in (("human", 1.0), ("group", "g"), ("skills", ("s",)), ("generator", "g"), ("texts", ("red",)))
    ]
    protocols = {str(judging.protocol_of("pairs", [one], "t5_v1")) for one in (item, *others)}
    assert len(protocols) == len(others) + 1


def test_missing_images_are_listed_and_counted_before_anything_is_planned(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    for number in range(5):
        (tmp_path / "data" / f"{number}.png").unlink()
    assert run(run_folder, tmp_path / "data", tmp_path / "out") == 2
    assert "5 of 10 images of pairs are missing: 0.png, 1.png, 2.png, ..." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_family_and_a_text_that_is_too_long_are_refused(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    line = {"id": "long", "image": "0.png", "true": "red " * 90, "false": ["blue"]}
    with (tmp_path / "data" / "pairs.jsonl").open("a") as file:
        file.write(f"{json.dumps(line)}\n")
    assert run(run_folder, tmp_path / "data", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "item long, text 0: its question has" in error and "at most 96" in error
    assert not list((tmp_path / "out").glob("parts/*")), "told before anything is scored"
    (tmp_path / "flamingo").mkdir()
    (tmp_path / "flamingo" / "run.json").write_text(toy().model_dump_json())
    assert run(tmp_path / "flamingo", data, tmp_path / "other") == 2
    assert "is a flamingo model" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_named(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "3.png").write_bytes(samples.encoded(samples.picture(3))[:200])
    assert run(run_folder, tmp_path / "data", tmp_path / "out") == 2
    assert "3.png: an image cannot be read" in capsys.readouterr().err


def test_processes_here_are_as_many_as_there_is_room_for(
    run_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(arrays, "run_tasks", lambda *words: started.append(words) or 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for tasks in (8, 2):
        assert run(run_folder, data, tmp_path, "stage=score", f"tasks={tasks}", "gpus=0") == 0
    for (words, stage, tasks, rooms), expected in zip(started, (3, 2), strict=True):
        assert (stage, tasks, len(rooms)) == ("score", expected, 3)
        assert [word for word in words if word.startswith("tasks=")] == [f"tasks={expected}"]


def test_print_shows_an_array_of_jobs_and_one_that_collects(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPC_MM_RUNS", str(tmp_path / "runs"))
    given = [f"checkpoint={run_folder}", f"data={data}", "benchmark=pairs", "step=0", "cluster=print"]
    assert judging.main(given) == 0
    shown = capsys.readouterr().out
    assert "--array=0-0" in shown and "stage=score" in shown and "stage=collect" in shown
    assert f"out={run_folder}/eval/pairs/step-0" in shown and "--job-name=judge-pairs-step-0-score" in shown
