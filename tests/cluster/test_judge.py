"""CLIP-FlanT5's two stages on a real Slurm, killed and come back, and its VQAScore before and after."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, environment, launch
from jobs import ends_well, job_of, stepped, wait

JOB = ["cluster=slurm", "slurm.cpus_per_task=1", "slurm.memory=2500M", "slurm.time=60"]


def trained(values: dict[str, str], recipe: str, step: int) -> Path:
    """The run, after its job was killed once it had a checkpoint before ``step``, and launched again."""
    run = Path(values["HPC_MM_RUNS"]) / recipe
    for killed in (True, False):
        result = launch(values, f"recipe={recipe}", "train.log_every=5", *JOB)
        assert result.returncode == 0, result.stderr
        job = job_of(run, len(list(run.glob("submissions/*/job_id"))))
        if killed:
            stepped(run, step, 3600)
            subprocess.run(["scancel", "--signal=KILL", job], check=True)
            wait(job)
        else:
            ends_well(run, job)
    return run


def accuracy(values: dict[str, str], run: Path, step: str) -> dict[str, float]:
    """Of held-out scenes' true and false captions, scored by an array of two tasks."""
    data = f"{values['HPC_MM_STORE']}/shapes/faithfulness"
    words = ["benchmark=pairs", f"checkpoint={run}", f"step={step}", f"data={data}", "tasks=2", "gpus=0", *JOB]
    said = subprocess.run(
        [sys.executable, "eval/vqascore.py", *words], cwd=ROOT, env=values, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    collect = next(line for line in said.stdout.splitlines() if line.startswith("submitted collect"))
    assert wait(collect.rpartition(" ")[2], 3600) == "COMPLETED"
    (results,) = (run / "eval" / "pairs").glob(f"step-{step}/results.json")
    first: dict[str, float] = json.loads(results.read_text())["scores"][0]
    assert (first["metric"], first["figure"]) == ("vqascore", "accuracy")
    return first


@pytest.mark.chaos
def test_a_judge_trained_in_two_stages_tells_true_captions_from_false_ones(tmp_path: Path) -> None:
    values = environment(ROOT, tmp_path)
    subprocess.run([sys.executable, "data_prep/shapes.py", "seed=0"], cwd=ROOT, env=values, check=True)
    trained(values, "clip_flant5_toy_stage1", 60)
    run = trained(values, "clip_flant5_toy_stage2", 200)
    steps = json.loads((run / "run.json").read_text())["train"]["steps"]
    before, after = accuracy(values, run, "0"), accuracy(values, run, str(steps))
    print(f"true captions above false ones: {before} -> {after}")
    assert before["high"] < 75
    assert after["score"] > 90
