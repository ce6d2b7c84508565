"""A run's scores: all that evaluations left, in order, read once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import questions
from evaluations import TOY, VQA, evaluate

from hpc_mm import results
from hpc_mm.config import ConfigError
from hpc_mm.data.store import Store, open_store
from hpc_mm.results import Answered
from hpc_mm.run_scores import RunScore, metrics_of, scores_of

SAID = ["caption 0.1", "nothing", "caption 2.2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "toy": questions.write_splits(
            folder / "toy", test=questions.captioned(0, 1, 2), train=questions.captioned(3, 4, 5)
        ),
        "vqav2": questions.write_splits(folder / "vqav2", test=questions.asked(0), train=questions.asked(3, 4)),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """A run with two benchmarks, evaluated at steps 0, 9 and 30, and its exported weights."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    for step in (30, 0, 9, "export"):
        evaluate(folder, TOY, step, data["toy"], SAID, shots=(0, 2), rules=("openflamingo", "lmms-eval"))
    evaluate(folder, VQA, 9, data["vqav2"], ["a1", "nothing"])
    return folder


@pytest.fixture
def run_folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders whose results.json was read."""
    found: list[str] = []
    read = results.read

    def counted(store: Store) -> results.Results:
        found.append("/".join(Path(store.address).parts[-2:]))
        return read(store)

    monkeypatch.setattr(results, "read", counted)
    return found


def places(scores: list[RunScore]) -> list[tuple[str, int]]:
    return [(one.benchmark, one.step) for one in scores]


def test_all_evaluations_in_order(run_folder: Path, data: dict[str, str]) -> None:
    scores = scores_of(run_folder)
    assert places(scores) == [("toy", 0), ("toy", 9), ("toy", 30), ("vqav2", 9)]
    for one in scores:
        assert one.folder == run_folder / "eval" / one.benchmark / f"step-{one.step}"
        written = json.loads((one.folder / "results.json").read_text())["scores"]
        assert [entry.model_dump() for entry in one.entries] == written
        assert one.data == data[one.benchmark]
    assert [(entry.rules, entry.shots) for entry in scores[0].entries if isinstance(entry, Answered)] == [
        *(("lmms-eval", 0), ("lmms-eval", 2)),
        *(("openflamingo", 0), ("openflamingo", 2)),
    ]


def test_what_is_no_evaluation(run_folder: Path, tmp_path: Path) -> None:
    """Not done yet, or put there by someone."""
    before = scores_of(run_folder)
    folder = run_folder / "eval"
    (folder / "toy" / "step-40" / "2shot-s42").mkdir(parents=True)
    (folder / "toy" / "step-50").write_text("")
    (folder / "toy" / "step-60" / "results.json").mkdir(parents=True)
    for name in ("step-", "step-007", "step--1", "step-9.old", "backup"):
        shutil.copytree(folder / "toy" / "step-9", folder / "toy" / name)
    shutil.copy(folder / "toy" / "step-9" / "results.json", folder / "results.json")
    (folder / "notes.txt").write_text("")
    assert scores_of(run_folder) == before
    assert scores_of(tmp_path / "nowhere") == []


def test_files_are_read_once(run_folder: Path, data: dict[str, str], reads: list[str]) -> None:
    first = scores_of(run_folder)
    assert sorted(reads) == ["toy/step-0", "toy/step-30", "toy/step-9", "vqav2/step-9"]
    reads.clear()
    again = scores_of(run_folder, first)
    assert reads == [] and all(one is other for one, other in zip(again, first, strict=True))
    evaluate(run_folder, TOY, 9, data["toy"], SAID, shots=(4,))
    evaluate(run_folder, TOY, 99, data["toy"], SAID)
    shutil.rmtree(run_folder / "eval" / "vqav2")
    reads.clear()
    found = scores_of(run_folder, first)
    assert sorted(reads) == ["toy/step-9", "toy/step-99"]
    assert places(found) == [("toy", 0), ("toy", 9), ("toy", 30), ("toy", 99)]
    assert [one.step for one in found if one not in first] == [9, 99], "what is new"
    assert len(found[1].entries) == len(first[1].entries) + 1


ABOUT = {"benchmark": "toy", "data": "d", "checkpoint": "c", "step": "9", "questions": 3}
SCORE = {"shots": 4, "selection": "random", "metric": "cider", "rules": "openflamingo", "score": 1.5, "low": None}
SCORE |= {"high": None, "others": {}, "trials": [], "protocol": "p", "values": {}}
FIGURE = {"metric": "vqascore", "figure": "group", "score": 1.5, "low": 1.0, "high": 2.0, "protocol": "p"}
DAMAGED = [
    {**ABOUT, "scores": {}},
    *({**ABOUT, "scores": [{key: value for key, value in SCORE.items() if key != gone}]} for gone in SCORE),
    *({**ABOUT, "scores": [{**SCORE, **wrong}]} for wrong in ({"score": None}, {"trials": [{"seed": 1}]})),
    {**ABOUT, "scores": [{**SCORE, "score": float("nan")}]},
    *({**ABOUT, "scores": [{key: value for key, value in FIGURE.items() if key != gone}]} for gone in FIGURE),
    {**ABOUT, "scores": [FIGURE, SCORE]},
]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"data": "d"}', *map(json.dumps, DAMAGED)])
def test_damaged_results_are_told_in_a_line(run_folder: Path, text: str) -> None:
    file = run_folder / "eval" / "toy" / "step-9" / "results.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as found:
        scores_of(run_folder)
    assert f"{file} is damaged" in str(found.value) and "\n" not in str(found.value)


def test_one_reader_gives_what_one_writer_wrote(run_folder: Path, data: dict[str, str], tmp_path: Path) -> None:
    """The same bytes, whether all rules came at once or one after the other."""
    for name in ("lmms-eval", "openflamingo", "lmms-eval"):
        evaluate(tmp_path / "other", TOY, 9, data["toy"], SAID, shots=(0, 2), rules=(name,))
    one, other = (folder / "eval" / "toy" / "step-9" / "results.json" for folder in (run_folder, tmp_path / "other"))
    text = one.read_text()
    assert other.read_text().replace(str(tmp_path / "other"), json.loads(text)["checkpoint"]) == text
    assert results.read(open_store(str(one.parent))).model_dump() == json.loads(text)


def test_what_a_later_version_adds_is_read_and_kept(run_folder: Path, data: dict[str, str]) -> None:
    file = run_folder / "eval" / "toy" / "step-9" / "results.json"
    values = json.loads(file.read_text())
    later = [values, values["scores"][0], values["scores"][0]["trials"][0]]
    for number, part in enumerate(later):
        part[f"new {number}"] = {"a": number}
    file.write_text(json.dumps(values))
    assert scores_of(run_folder)
    evaluate(run_folder, TOY, 9, data["toy"], SAID, shots=(4,))
    again = json.loads(file.read_text())
    assert again["new 0"] == {"a": 0} and len(again["scores"]) == len(values["scores"]) + 1
    assert values["scores"][0] in again["scores"]


def test_wandb_keeps_random_and_similar_demonstrations_apart(tmp_path: Path) -> None:
    """In a process of its own: wandb starts a service that outlives a test."""
    folder = tmp_path / "eval" / "coco" / "step-9"
    folder.mkdir(parents=True)
    scores = [{**SCORE, "selection": selection, "protocol": selection} for selection in ("random", "rices")]
    (folder / "results.json").write_text(json.dumps({**ABOUT, "checkpoint": str(tmp_path), "scores": scores}))
    code = (
        "import sys; from hpc_mm.config import with_overrides; from hpc_mm.data.store import open_store;"
        "from hpc_mm.recipes.toy import toy; from hpc_mm.results import track;"
        "track(with_overrides(toy(), {'tracking.wandb': 'offline'}), open_store(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(folder)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    for name in (b"eval/toy/4shot/cider", b"eval/toy/4shot-rices/cider"):
        assert name in written.read_bytes()


def test_names_of_metrics(run_folder: Path, data: dict[str, str]) -> None:
    scores = {(one.benchmark, one.step): one for one in scores_of(run_folder)}
    entries = [entry for entry in scores["toy", 30].entries if isinstance(entry, Answered)]
    last = {(entry.rules, entry.shots): entry.score for entry in entries}
    assert metrics_of([scores["toy", 30], scores["vqav2", 9]]) == {
        "eval/toy/0shot/cider": last["openflamingo", 0],
        "eval/toy/2shot/cider": last["openflamingo", 2],
        "eval/toy/0shot/cider/lmms-eval": last["lmms-eval", 0],
        "eval/toy/2shot/cider/lmms-eval": last["lmms-eval", 2],
        "eval/vqav2/2shot/vqa-accuracy": scores["vqav2", 9].entries[0].score,
    }
    assert metrics_of([]) == {}


def test_the_last_step_and_most_trials_count(tmp_path: Path) -> None:
    def scored(step: int, *scores: tuple[float, int, str]) -> RunScore:
        trial = {"seed": 1, "file": "f", "score": 1.0, "low": None, "high": None}
        entries = [
            Answered.model_validate({**SCORE, "score": score, "selection": selection, "trials": [trial] * count})
            for score, count, selection in scores
        ]
        return RunScore("coco", step, tmp_path, (0, 0), "", entries)

    two = [scored(30, (3.0, 2, "random"), (2.0, 1, "random"), (9.0, 1, "rices")), scored(4, (1.0, 5, "random"))]
    assert metrics_of(two) == {"eval/coco/4shot/cider": 3.0, "eval/coco/4shot-rices/cider": 9.0}
    assert metrics_of(two[::-1]) == metrics_of(two)


def test_figures_of_judged_images_are_named_by_how_pairs_are_scored(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "eval" / "winoground" / "step-9"), make=True)
    figures = [("vqascore", "text", 3.0), ("vqascore", "group/Object", 2.0), ("p_yes", "text", 1.0)]
    scores = [{**FIGURE, "metric": metric, "figure": figure, "score": score} for metric, figure, score in figures]
    results.write(store, {**ABOUT, "scores": scores, "items": 400})
    (one,) = scores_of(tmp_path)
    assert (one.benchmark, one.step, one.data) == ("winoground", 9, "d")
    assert metrics_of([one]) == {f"eval/winoground/{metric}/{figure}": score for metric, figure, score in figures}
    assert results.read(store).model_dump() == {**ABOUT, "scores": scores, "items": 400}
