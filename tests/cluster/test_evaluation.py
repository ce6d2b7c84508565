"""Evaluation as an array of jobs on the real Slurm: killed tasks, watching, and a trained model beside an untrained."""

import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import small_run
from checkout import ROOT, environment, launch
from jobs import submitted, wait

pytestmark = pytest.mark.usefixtures("slurm")
JOB = ["cluster=slurm", "gpus=0", "slurm.cpus_per_task=1", "slurm.memory=1400M", "slurm.time=20"]


def evaluated(values: dict[str, str], script: str, *words: str) -> str:
    command = [sys.executable, f"eval/{script}.py", *words]
    result = subprocess.run(command, cwd=ROOT, env=values, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def scores(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "results.json").read_text())["scores"]
    return found


def test_an_array_of_which_a_task_is_killed(shapes: Path, tmp_path: Path) -> None:
    """Three shot counts and two seeds in one array; a task is lost, and the same command goes on."""
    run = small_run.write_run(tmp_path / "runs" / "toy")
    values = environment(ROOT, tmp_path, HPC_MM_STORE=str(shapes), OMP_NUM_THREADS="1")
    words = [f"checkpoint={run}", "shots=0,2,4", "seeds=1,2", "part=8"]
    evaluated(values, "toy_vqa", *words, f"out={tmp_path}/here", "cluster=local", "examples=0")
    array = [*words, f"out={tmp_path}/array", "tasks=4", *JOB]
    jobs = submitted(evaluated(values, "toy_vqa", *array))
    assert list(jobs) == ["answer", "collect"] and len(jobs["answer"]) == 1
    watching = [sys.executable, "eval/toy_vqa.py", *array, "watch=true"]
    with subprocess.Popen(watching, cwd=ROOT, env=values, stdout=subprocess.PIPE, text=True) as watch:
        lost = f"{jobs['answer'][0]}_1"
        while subprocess.run(["squeue", "-hj", lost, "-o", "%T"], capture_output=True).stdout.strip() != b"RUNNING":
            time.sleep(0.1)
        subprocess.run(["scancel", lost], check=True)  # while it imports, before it can have done all its parts
        wait(jobs["answer"][0])
        assert wait(jobs["collect"][0]) == "CANCELLED", "not all is there to collect"
        assert not (tmp_path / "array" / "results.json").exists()
        assert watch.stdout is not None
        assert any("Slurm has no job toy-toy_vqa-step-7-answer" in line for line in islice(watch.stdout, 60))
        again = submitted(evaluated(values, "toy_vqa", *array))
        assert wait(again["collect"][0]) == "COMPLETED"
        said = watch.stdout.read()
    assert watch.returncode == 0 and "2 shots, seed 1" in said
    for trial in (tmp_path / "here").glob("*shot-s*"):
        rows = (trial / "openflamingo.jsonl").read_bytes()
        assert (tmp_path / "array" / trial.name / "openflamingo.jsonl").read_bytes() == rows
    found = scores(tmp_path / "array")
    assert found == scores(tmp_path / "here")
    assert [(entry["shots"], [trial["seed"] for trial in entry["trials"]]) for entry in found] == [
        (shots, [1, 2]) for shots in (0, 2, 4)
    ]
    assert "<script" in (tmp_path / "array" / "index.html").read_text()


@pytest.mark.chaos
def test_a_trained_toy_is_above_an_untrained_one(tmp_path: Path) -> None:
    """The whole toy: corpus, training on four nodes, three shot counts and two seeds as one array, both benchmarks."""
    values = environment(ROOT, tmp_path)
    subprocess.run([sys.executable, "data_prep/shapes.py", "seed=0"], cwd=ROOT, env=values, check=True)
    result = launch(values, "recipe=toy", "nodes=4", "cluster=slurm", "slurm.memory=1400M", "slurm.time=120")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "toy"
    assert wait((run / "submissions" / "001" / "job_id").read_text().strip(), 7200) == "COMPLETED"
    for script in ("toy", "toy_vqa"):
        intervals = {}
        for step in ("0", "600"):
            words = [f"checkpoint={run}", f"step={step}", "shots=0,2,4", "seeds=42,43", "tasks=4"]
            jobs = submitted(evaluated(values, script, *words, *JOB))
            assert wait(jobs["collect"][0], 3600) == "COMPLETED"
            print(evaluated(values, script, *words, *JOB, "watch=true"))
            intervals[step] = [(one["low"], one["high"]) for one in scores(run / "eval" / script / f"step-{step}")]
        for before, after in zip(intervals["0"], intervals["600"], strict=True):
            assert before[1] < after[0]
