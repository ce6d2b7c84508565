"""Work of other kinds than data preparation, in the real Slurm."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checkout import ROOT, environment
from jobs import wait

from hpc_mm.arrays import Stage, Work, queue
from hpc_mm.config import ConfigError, Slurm

STAGES = (Stage("answer", 3), Stage("collect"))
NOTE = """
import os, sys
words = dict(word.split("=") for word in sys.argv[1:])
with open(f"{words['out']}/{words['stage']}{words.get('task', '')}", "w") as file:
    print(words["cluster"], *sorted(os.listdir()), *sorted(os.listdir(words["out"])), file=file)
"""


@pytest.fixture
def work(slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """Two stages which note what they see of the snapshot's folder and of what was written before them."""
    for name, value in environment(ROOT, tmp_path).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "out").mkdir()
    name = tmp_path.name.replace("_", "-")
    words = [sys.executable, "-c", NOTE, f"out={tmp_path}/out"]
    values = Slurm(time="9", cpus_per_task=1, memory="200M")
    return Work(name, f"eval-{name}", STAGES, ("answer", "collect"), words, (), ("eval", "sbatch"), values)


def test_stages_follow_each_other(work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = queue(work, "slurm")
    assert {stage: len(numbers) for stage, numbers in jobs.items()} == {"answer": 1, "collect": 1}
    assert f"submitted answer: job {jobs['answer'][0]}\n" in capsys.readouterr().out
    assert wait(jobs["answer"][0]) == wait(jobs["collect"][0]) == "COMPLETED"
    notes = {path.name: path.read_text().split() for path in (tmp_path / "out").iterdir()}
    assert sorted(notes) == ["answer0", "answer1", "answer2", "collect"]
    assert notes["collect"] == ["local", "eval", "sbatch", "answer0", "answer1", "answer2", "collect"]


def test_none_of_its_stages_may_be_in_the_queue(work: Work, tmp_path: Path) -> None:
    held = replace(work, slurm=work.slurm.model_copy(update={"extra": {"hold": ""}}))
    job = queue(replace(held, stages=STAGES[1:]), "slurm")["collect"][0]
    with pytest.raises(ConfigError, match=f"{work.name}-collect is in the queue: job {job}; scancel {job} ends it"):
        queue(replace(held, stages=STAGES[:1]), "slurm")
    subprocess.run(["scancel", job], check=True)
    assert os.listdir(tmp_path / f"runs/{work.folder}/submissions") == ["001"]


def test_gpus_where_there_are_none_are_refused_before_a_job_is_queued(work: Work, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^sbatch would refuse this job: .*\S$"):
        queue(replace(work, stages=(STAGES[0], Stage("collect", gpus=1))), "slurm")
    queued = ["squeue", "--noheader", f"--name={work.name}-answer,{work.name}-collect"]
    assert subprocess.check_output(queued, text=True) == ""
    assert not (tmp_path / f"runs/{work.folder}/submissions").exists()
