"""Evaluation from the command line of an eval/ script to results.json: real weights, real shards, our own metrics."""

import itertools
import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import clips
import judges
import pytest
import questions
import samples
import small_run

from hpc_mm import arrays, benchmark, checkpoint, evaluate, metrics, scoring, trials
from hpc_mm.benchmark import Benchmark
from hpc_mm.config import ConfigError
from hpc_mm.predictions import NAME

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = benchmark.Decoding(max_new_tokens=4)
CAPTIONS = Benchmark(name="coco", kind="caption", prompt=benchmark.CAPTION, decoding=SHORT, metric="cider")
VQA = Benchmark(name="vqav2", kind="vqa", prompt=benchmark.VQA, decoding=SHORT, metric="vqa-accuracy")
MEMES = Benchmark(name="memes", kind="classes", prompt=benchmark.HATEFUL_MEMES, classes=("no", "yes"), metric="roc-auc")
COLORS = Benchmark(name="colors", kind="classes", prompt=benchmark.IMAGENET, metric="accuracy")
ALL = {one.name: one for one in (CAPTIONS, VQA, MEMES, COLORS)}
TESTED, TRAINED = range(11), range(11, 31)
WORDS = ["cluster=local", "shots=2", "seeds=3,4", "part=4", "examples=0"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_run(tmp_path_factory.mktemp("runs") / "toy")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The address of every benchmark's shards."""
    folder = tmp_path_factory.mktemp("data")
    return {
        name: questions.write_splits(folder / name, 2**14, test=facts(name, TESTED), train=facts(name, TRAINED))
        for name in ALL
    }


def facts(name: str, numbers: range) -> dict[str, dict[str, Any]]:
    if name == "coco":
        return {str(i): {"captions": [samples.sentence(random.Random(i * 5 + k)) for k in range(5)]} for i in numbers}
    if name == "vqav2":
        return {str(i): {"questions": [asked(i, k) for k in range(2)]} for i in numbers}
    if name == "memes":
        return {str(i): {"label": ("no", "yes")[i % 3 == 0], "text": f"text {i}"} for i in numbers}
    return {str(i): {"label": ("red", "blue", "circle left")[i % 3]} for i in numbers}


def asked(image: int, number: int) -> dict[str, Any]:
    draw = random.Random(f"{image}/{number}")
    answers = [{"answer": draw.choice(samples.WORDS)} for _ in range(10)]
    return {"question_id": 10 * image + number, "question": f"What {number}?", "answers": answers}


def run(one: Benchmark, run_folder: Path, data: dict[str, str], out: Path | str, *words: str) -> int:
    given = [f"checkpoint={run_folder}", f"data={data[one.name]}", f"out={out}"]
    own = {word.partition("=")[0] for word in words} | ({"seeds"} if "selection=rices" in words else set())
    return evaluate.main(one, [*given, *(word for word in WORDS if word.partition("=")[0] not in own), *words])


def answered(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of every file of predictions, by its name."""
    return {
        str(file.relative_to(out)): [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted(out.glob("*/openflamingo.jsonl"))
    }


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("name", ALL)
def test_the_same_bits_for_any_tasks_and_batch(
    name: str, run_folder: Path, data: dict[str, str], tmp_path: Path
) -> None:
    found = {}
    for tasks, batch in itertools.product((1, 3, 8), (1, 7, 32)) if name == "vqav2" else ((1, 1), (3, 7), (8, 32)):
        out, words = tmp_path / f"{tasks}-{batch}", [f"tasks={tasks}", f"batch={batch}", "shots=2,0", "seeds=3"]
        assert run(ALL[name], run_folder, data, out, "stage=plan", *words) == 0
        for task in range(tasks):
            assert run(ALL[name], run_folder, data, out, "stage=answer", f"task={task}", *words) == 0
        assert run(ALL[name], run_folder, data, out, "stage=collect", *words) == 0
        found[tasks, batch] = (answered(out), results(out))
    rows, scored = found[1, 1]
    assert all(other == (rows, scored) for other in found.values())
    assert list(rows) == ["0shot-s3/openflamingo.jsonl", "2shot-s3/openflamingo.jsonl"]
    assert len({row["text"] for some in rows.values() for row in some}) > 1
    assert [entry["shots"] for entry in scored["scores"]] == [0, 2]
    if ALL[name].kind == "classes":
        without, with_images = rows.values()
        assert without != with_images, "demonstrations matter"


def test_scores_are_those_of_the_rows(run_folder: Path, data: dict[str, str], tmp_path: Path) -> None:
    assert run(VQA, run_folder, data, tmp_path, "shots=2") == 0
    (entry,) = results(tmp_path)["scores"]
    answers = [[a["answer"] for a in asked(i, k)["answers"]] for i in TESTED for k in range(2)]
    trials = [metrics.vqa_accuracy([row["text"] for row in rows], answers) for rows in answered(tmp_path).values()]
    assert [trial["score"] for trial in entry["trials"]] == [100 * score for score in trials]
    assert entry["score"] == pytest.approx(100 * sum(trials) / 2)
    assert entry["low"] < entry["score"] < entry["high"]
    assert [trial["seed"] for trial in entry["trials"]] == [3, 4]
    assert "2shot-random-s3,4-train-40@" in entry["protocol"] and entry["protocol"].endswith("@v1")


def test_captions_have_further_metrics(run_folder: Path, data: dict[str, str], tmp_path: Path) -> None:
    assert run(CAPTIONS, run_folder, data, tmp_path, "shots=2", "seeds=3") == 0
    (entry,) = results(tmp_path)["scores"]
    (rows,) = answered(tmp_path).values()
    references = [facts("coco", TESTED)[row["id"]]["captions"] for row in rows]
    found = metrics.caption_scores([row["text"] for row in rows], references)
    assert entry["score"] == pytest.approx(100 * found["cider"].score)
    assert entry["others"] == {name: 100 * one.score for name, one in found.items() if name != "cider"}


def test_processes_here_share_the_work(
    run_folder: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script of eval/ in processes of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [
        f"checkpoint={run_folder}",
        f"data={data['vqav2']}",
        "split=test",
        "decoding.max_new_tokens=4",
        *WORDS,
        "gpus=0",
    ]
    script = Path(evaluate.__file__).parents[1] / "eval" / "vqav2.py"
    done = script_run(script, *words, "tasks=2", f"out={tmp_path}/script")
    assert done.returncode == 0, done.stdout + done.stderr
    assert run(VQA, run_folder, data, tmp_path / "here") == 0
    assert answered(tmp_path / "script") == answered(tmp_path / "here")
    assert results(tmp_path / "script")["scores"] == results(tmp_path / "here")["scores"]
    assert "95 % interval" in done.stdout and "vqav2-test-22@" in done.stdout


def test_a_model_is_loaded_once_for_each_there_is_room_for(
    run_folder: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ``tasks`` is."""
    monkeypatch.setattr(arrays, "run_tasks", lambda *words: started.append(words) or 0)
    for visible, tasks, expected in (("", 8, []), ("3", 8, []), ("0,1", 8, [2]), ("0,1,2", 2, [2]), ("0,1", 1, [])):
        started: list[Any] = []
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(evaluate, "run_stage", lambda stage, *_: None)
        assert run(VQA, run_folder, data, tmp_path / "out", f"tasks={tasks}") == 0
        assert [count for _, _, count, _ in started] == expected
        assert all(words.count(f"tasks={count}") == 1 for words, _, count, _ in started)
        assert all(len([word for word in words if word.startswith("tasks=")]) == 1 for words, *_ in started)


def script_run(script: Path, *words: str) -> Any:
    import subprocess

    return subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)


def test_similar_demonstrations(
    run_folder: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features are made once, by any number of tasks, and the same answers come out."""
    own = {"colors": shutil.copytree(data["colors"], tmp_path / "colors").as_posix()}
    clip = clips.write_clip(tmp_path / "clip")
    words = ["selection=rices", f"rices.model={clip.model}", "shots=2,0"]
    for tasks, out in ((1, tmp_path / "1"), (3, tmp_path / "3")):
        assert run(COLORS, run_folder, own, out, *words, "stage=plan") == 0
        if tasks == 1:
            assert run(COLORS, run_folder, own, out, *words, "stage=answer") == 2
            assert "the stage features computes them" in capsys.readouterr().err
        for stage in ("features", "answer"):
            for task in range(tasks):
                shares = [f"tasks={tasks}", f"task={task}", f"stage={stage}"]
                assert run(COLORS, run_folder, own, out, *words, *shares) == 0
        assert run(COLORS, run_folder, own, out, *words, "stage=collect", "examples=3") == 0
    said = capsys.readouterr().out
    assert said.count("features of 0 shards were made here") == 3, "another evaluation made them"
    assert answered(tmp_path / "1") == answered(tmp_path / "3")
    assert set(answered(tmp_path / "1")) == {"0shot-rices/openflamingo.jsonl", "2shot-rices/openflamingo.jsonl"}
    scored = results(tmp_path / "1")["scores"]
    assert f"2shot-rices-{clip.name}-train-20@" in scored[1]["protocol"]
    assert results(tmp_path / "3")["scores"] == scored


def test_jobs_find_local_weights_wherever_they_run() -> None:
    given = {"checkpoint": "runs/a", "data": "x", "split": "val", "decoding": {}}
    words = ["shots=2", "rices.model=local-dir:clip", "selection=rices"]
    options = evaluate.Evaluation(**given, rices={"model": "local-dir:clip"})
    said = evaluate.script_words(words, options, "coco.py")
    assert f"rices.model=local-dir:{Path.cwd()}/clip" in said and "shots=2" in said
    assert evaluate.Evaluation(**given, rices={"pretrained": "some.safetensors"}).rices.pretrained.startswith("/")
    assert evaluate.Evaluation(**given).rices.pretrained == "openai"


# ---------------------------------------------------------------- again and again


def test_what_is_done_is_not_done_again(run_folder: Path, data: dict[str, str], tmp_path: Path) -> None:
    assert run(VQA, run_folder, data, tmp_path) == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    lost = sorted(tmp_path.glob("2shot-s3/parts/*"))[1]
    lost.unlink()
    assert run(VQA, run_folder, data, tmp_path) == 0
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    changed = {file for file in before if after[file] != before[file]}
    assert changed == {lost}, "its head says when it was made"
    assert before[lost].splitlines()[1:] == after[lost].splitlines()[1:]


def test_a_missing_part_is_told(
    run_folder: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(VQA, run_folder, data, tmp_path) == 0
    (tmp_path / "2shot-s4" / "parts" / "000002.jsonl").unlink()
    assert run(VQA, run_folder, data, tmp_path, "stage=collect") == 2
    assert "1 of 6 parts are not done: 2; run the same command again" in capsys.readouterr().err


def test_a_doubled_output_file_is_refused(
    run_folder: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(VQA, run_folder, data, tmp_path) == 0
    parts = tmp_path / "2shot-s4" / "parts"
    for copy in ("000001.jsonl", "000100.jsonl", "000000 (copy).jsonl"):
        kept = (parts / copy).read_bytes() if (parts / copy).exists() else None
        shutil.copy(parts / "000000.jsonl", parts / copy)
        assert run(VQA, run_folder, data, tmp_path, "stage=collect") == 2
        complaint = capsys.readouterr().err
        assert copy in complaint and "remove it" in complaint and complaint.count("\n") == 1
        assert bool(NAME.fullmatch(f"parts/{copy}")) == (copy != "000000 (copy).jsonl")
        (parts / copy).unlink() if kept is None else (parts / copy).write_bytes(kept)
    assert run(VQA, run_folder, data, tmp_path, "stage=collect") == 0


def test_results_of_other_rules_and_shots_stay(run_folder: Path, data: dict[str, str], tmp_path: Path) -> None:
    """One file of predictions under three sets of rules, without the model."""
    assert run(VQA, run_folder, data, tmp_path, "shots=2") == 0
    before = results(tmp_path)["scores"]
    rules = "rules=openflamingo,lmms-eval,vlmevalkit"
    assert run(VQA, run_folder, data, tmp_path, "shots=2", "stage=collect", rules) == 0
    scored = results(tmp_path)["scores"]
    assert [entry for entry in scored if entry["rules"] == "openflamingo"] == before
    assert len({entry["protocol"] for entry in scored}) == len(scored) == 3
    assert run(VQA, run_folder, data, tmp_path, "shots=0") == 0
    assert [(entry["rules"], entry["shots"]) for entry in results(tmp_path)["scores"]] == [
        ("lmms-eval", 2),
        ("openflamingo", 0),
        ("openflamingo", 2),
        ("vlmevalkit", 2),
    ]


def test_a_split_without_answers_becomes_a_file_for_the_challenge(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hidden(numbers: range) -> dict[str, dict[str, Any]]:
        found = facts("vqav2", numbers)
        for image in found.values():
            for question in image["questions"]:
                del question["answers"]
        return found

    splits = {"train": facts("vqav2", TRAINED), "test": hidden(range(12)), "test_dev": hidden(range(2, 6))}
    data = {"vqav2": questions.write_splits(tmp_path / "data", **splits)}
    out = tmp_path / "out"
    assert run(VQA, run_folder, data, out, "split=test-dev", "shots=2", "seeds=3") == 0
    (file,) = out.glob("vqav2-*.json")
    assert file.name == "vqav2-test-dev-2shot-s3.json" and str(file) in capsys.readouterr().out
    assert run(VQA, run_folder, data, out, "split=test-dev", "shots=2", "seeds=3", "watch=true") == 0
    assert capsys.readouterr().out.startswith("8 of 8 questions\n"), "nothing to score"
    lines = json.loads(file.read_text())
    assert [line["question_id"] for line in lines] == [10 * i + k for i in range(12) for k in range(2)]
    assert {line["question_id"] for line in lines if line["answer"]} <= {
        10 * i + k for i in range(2, 6) for k in (0, 1)
    }
    assert any(line["answer"] for line in lines)
    vizwiz = VQA.model_copy(update={"name": "vizwiz"})
    assert run(vizwiz, run_folder, {"vizwiz": data["vqav2"]}, tmp_path / "v", "split=test", "shots=2", "seeds=3") == 0
    lines = json.loads((tmp_path / "v" / "vizwiz-test-2shot-s3.json").read_text())
    assert [set(line) for line in lines] == [{"image", "answer"}] * 24


def test_watching(run_folder: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(VQA, run_folder, data, tmp_path) == 0
    capsys.readouterr()
    assert run(VQA, run_folder, data, tmp_path, "watch=true") == 0
    said = capsys.readouterr().out
    assert "44 of 44 questions" in said and "2 shots, seed 3" in said
    for entry in results(tmp_path)["scores"]:
        for trial in entry["trials"]:
            assert f": {trial['score']:.2f} ({trial['score']:.2f} to {trial['score']:.2f})" in said, "all are scored"


def test_the_jobs_that_are_watched_are_those_that_answer(
    run_folder: Path,
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(VQA, run_folder, data, tmp_path / "out", "stage=plan") == 0
    for more in ({}, {"name": "mine"}, {"selection": "rices"}):
        words = ["cluster=print", *(f"{key}={value}" for key, value in more.items())]
        given = {"checkpoint": str(run_folder), "data": data["vqav2"], "split": "test", "decoding": {}, **more}
        planned = trials.read(f"{tmp_path}/out", evaluate.Choice((2,), (3, 4), 2048, ""))
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        capsys.readouterr()
        assert run(VQA, run_folder, data, tmp_path / "out", *words) == 0
        named = re.findall(r"--job-name=(\S+)", capsys.readouterr().out)
        monkeypatch.setenv("PATH", str(tmp_path))
        watched = evaluate.Evaluation(**given).watched("vqav2", planned.step)
        assert watched == [name for name in named if not name.endswith("-collect")] and watched
        assert evaluate.Evaluation(**given, cluster="local").watched("vqav2", planned.step) == []
    monkeypatch.setenv("PATH", "")
    assert evaluate.Evaluation(**given).watched("vqav2", planned.step) == []


# ---------------------------------------------------------------- mistakes


MISTAKES = {
    "no such run": (["checkpoint=/nowhere/at/all"], "no run at /nowhere/at/all"),
    "no such step": (["step=9"], "'9': known: 7, latest"),
    "a typo": (["shts=4"], "unknown key 'shts': did you mean shots?"),
    "a typo below": (["decoding.beems=4"], "did you mean decoding.beams?"),
    "no such split": (["split=val"], "has no split 'val': it has test, train"),
    "no such data": (["data=/nowhere/at/all"], "/nowhere/at/all"),
    "more shots than there are": (["shots=50"], "shots=50 shows 50 of a query set of 40: too few"),
    "a small query set": (["shots=5", "query_set=4"], "shots=5 shows 5 of a query set of 4: too few"),
    "more questions than there are": (["samples=50"], "samples=50: there are 22 questions"),
    "unknown rules": (["rules=openflamenco"], "rules=openflamenco"),
    "shots twice": (["shots=4,4"], "one is there twice"),
    "negative": (["shots=-1"], "shots.0='-1'"),
    "a task too many": (["stage=answer", "tasks=2", "task=2"], "task=2: tasks=2 are numbered from 0 to 1"),
    "a task of no stage": (["tasks=2", "task=1"], "task=1 is of one stage: give stage=features or stage=answer too"),
    "no shots": (["shots="], "shots=[]: give one or more"),
    "seeds of similar ones": (["selection=rices"], "seeds=3,4 is of random demonstrations, and selection=rices"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_any_work(
    mistake: str, run_folder: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, said = MISTAKES[mistake]
    given = {"checkpoint": str(run_folder), "data": data["vqav2"], "out": f"{tmp_path}/out"}
    given |= dict(word.split("=", 1) for word in [*WORDS, *words])
    assert evaluate.main(VQA, [f"{key}={value}" for key, value in given.items()]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1
    assert not list(tmp_path.rglob("parts"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("query_set=9", "query_set=9 is of random demonstrations, and selection=rices: leave it out"),
        ("rices.model=ViT-L14", "unknown open_clip model rices.model 'ViT-L14': did you mean ViT-L-14?"),
    ],
)
def test_a_mistake_about_similar_demonstrations(
    word: str, said: str, run_folder: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(VQA, run_folder, data, tmp_path, "selection=rices", word) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def test_prompts_that_are_too_long_are_told_before_any_is_answered(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the last part."""
    test = facts("vqav2", TESTED)
    test["10"]["questions"][1]["question"] = "What " * 300
    data = {"vqav2": questions.write_splits(tmp_path / "data", test=test, train=facts("vqav2", TRAINED))}
    assert run(VQA, run_folder, data, tmp_path / "out", "shots=1,2", "seeds=3") == 2
    complaint = capsys.readouterr().err
    assert "question 101: its prompt of " in complaint and complaint.count("\n") == 1
    assert "take fewer shots, or shorter demonstrations" in complaint
    assert not list(tmp_path.glob("out/*/parts"))


def test_a_model_that_writes_no_answers(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = judges.write_run(tmp_path / "judge")
    for stage in ("plan", "answer"):
        assert run(VQA, folder, data, "", "step=0", f"stage={stage}") == 2
        complaint = capsys.readouterr().err
        assert "model.family=clip_flant5 answers no" in complaint and complaint.count("\n") == 1
    assert not (folder / "eval").exists()


def test_data_of_another_benchmark(
    run_folder: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(VQA, run_folder, {"vqav2": data["coco"]}, tmp_path) == 2
    assert "vqa wants questions, but image 0 holds captions" in capsys.readouterr().err


def test_other_values_need_another_folder(
    run_folder: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(VQA, run_folder, data, tmp_path, "stage=plan") == 0
    for words, said in (
        (["step=0"], "weights: "),
        (["decoding.beams=1"], "protocol.decoding.beams: 3 -> 1"),
        (["precision=bf16"], "precision: fp32 -> bf16"),
        (["samples=5"], "holds other questions than are asked for now"),
    ):
        assert run(VQA, run_folder, data, tmp_path, "stage=plan", *words) == 2
        complaint = capsys.readouterr().err
        assert said in complaint and "use another" in complaint and complaint.count("\n") == 1
    assert run(VQA, run_folder, data, tmp_path, "stage=plan", "batch=3", "tasks=9") == 0


OTHERWISE = [
    ("answer", ["step=0"], "step: 7 -> 0; weights: "),
    ("answer", ["decoding.beams=2"], "protocol.decoding.beams: 3 -> 2"),
    ("answer", ["query_set=9"], "protocol.demonstrations.query_set: 2048 -> 9"),
    ("answer", ["precision=fp32"], "precision: bf16 -> fp32"),
    ("answer", ["batch=3"], "batch: 32 -> 3"),
    ("collect", ["decoding.beams=2"], "protocol.decoding.beams: 3 -> 2"),
    ("collect", ["step=0"], "step: 7 -> 0"),
]


def test_what_answers_and_scores_is_what_was_planned(
    run_folder: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = "precision=bf16"
    assert run(VQA, run_folder, data, tmp_path, "stage=plan", half) == 0
    for stage, words, said in OTHERWISE:
        given = words if "precision=fp32" in words else [*words, half]
        assert run(VQA, run_folder, data, tmp_path, f"stage={stage}", *given) == 2
        complaint = capsys.readouterr().err
        assert f"was planned otherwise: {said}" in complaint and complaint.count("\n") == 1
    assert run(VQA, run_folder, {"vqav2": data["coco"]}, tmp_path, "stage=collect", half) == 2
    assert "was planned otherwise: data: " in capsys.readouterr().err
    assert run(VQA, run_folder, data, tmp_path, "stage=answer", half) == 0
    assert run(VQA, run_folder, data, tmp_path, "stage=collect", half) == 0
    assert results(tmp_path)["step"] == "7"


def test_weights_before_training_answer_otherwise(run_folder: Path, data: dict[str, str], tmp_path: Path) -> None:
    for step in ("0", "latest"):
        assert run(VQA, run_folder, data, tmp_path / step, f"step={step}", "shots=2") == 0
    assert answered(tmp_path / "0") != answered(tmp_path / "latest")
    assert results(tmp_path / "0")["step"] == "0" and results(tmp_path / "latest")["step"] == str(small_run.STEP)


def test_results_lie_beside_the_checkpoint(run_folder: Path, data: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "toy")
    words = [f"checkpoint={folder}", f"data={data['vqav2']}", *WORDS, "samples=6"]
    assert evaluate.main(VQA, words) == 0
    assert results(folder / "eval" / "vqav2" / "step-7")["questions"] == 6


def test_a_checkpoint_that_vanishes_or_rots(
    run_folder: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "toy")
    assert run(VQA, folder, data, tmp_path / "out", "stage=plan") == 0
    file = next(folder.glob("checkpoints/step-*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert run(VQA, folder, data, tmp_path / "out", "step=7") == 2
    assert "is damaged" in capsys.readouterr().err
    assert run(VQA, folder, data, tmp_path / "out", "stage=plan") == 2, "every stage takes the same checkpoint"
    assert "step-00000007 is damaged" in capsys.readouterr().err
    for mistake, said in (("split=vall", "no split 'vall'"), ("shots=50", "too few"), ("samples=50", "there are 22")):
        assert run(VQA, folder, data, tmp_path / "out", mistake) == 2
        assert said in capsys.readouterr().err, "no byte of the weights was read for that"
    shutil.rmtree(file.parent)
    assert run(VQA, folder, data, tmp_path / "out", "stage=answer") == 2
    assert "known: latest" in capsys.readouterr().err


def test_weights_are_verified_once(
    run_folder: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the plan; tasks look at sizes and heads."""
    verified: list[str] = []
    original = checkpoint.digest

    def noting(file: Path) -> str:
        verified.append(file.name)
        return original(file)

    monkeypatch.setattr(checkpoint, "digest", noting)
    assert run(VQA, run_folder, data, tmp_path) == 0
    assert sorted(verified) == ["progress.json", "rank-00000.safetensors"]


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [(0, 8, "is damaged: Error while deserializing header"), (0, None, "has 0 bytes, not")],
)
def test_weights_that_rot_after_the_plan(
    start: int,
    end: int | None,
    said: str,
    run_folder: Path,
    data: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "toy")
    assert run(VQA, folder, data, tmp_path / "out", "stage=plan") == 0
    file = next(folder.glob("checkpoints/step-*/*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:start] + (b"?" * (end - start) + whole[end:] if end else b""))
    assert run(VQA, folder, data, tmp_path / "out", "stage=answer") == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def test_a_metric_that_is_none(run_folder: Path, data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean cider"):
        scoring.metric_of("cidr")
