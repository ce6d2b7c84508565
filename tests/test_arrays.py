"""Stages as array jobs, as text; tests/cluster/ submits them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, environment

from hpc_mm.arrays import Stage, Work, queue, room_of_cores, room_of_models, run_tasks
from hpc_mm.config import Slurm


def run(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "data_prep/cc3m.py", *words]
    return subprocess.run(command, cwd=ROOT, env=environment(ROOT, folder, **more), capture_output=True, text=True)


def printed(folder: Path, *words: str) -> str:
    result = run(folder, "cluster=print", *words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_stage_is_a_script(tmp_path: Path) -> None:
    said = printed(
        tmp_path, "source=in.tsv", "out=s3://corpora/cc3m", "tasks=8", "slurm.partition=long", "web.host_rate=5"
    )
    scripts = [f"#!/bin/bash{text}" for text in said.split("#!/bin/bash")[1:]]
    assert [re.findall(r"stage=(\w+)", text) for text in scripts] == [["plan"], ["fetch"], ["pack"], ["verify"]]
    assert ["--array=0-7" in text for text in scripts] == [False, True, True, False]
    for text in scripts:
        assert "--partition=long" in text and "web.host_rate=5" in text and f"source={ROOT}/in.tsv" in text
        assert "out=s3://corpora/cc3m images=s3://corpora/images" in text
        assert subprocess.run(["/bin/bash", "-n"], input=text, text=True).returncode == 0
        for name in ("data_prep", "eval"):
            hand = (ROOT / "sbatch" / f"{name}.sbatch").read_text()
            same = re.findall(r"^#SBATCH --(?:signal|requeue|nodes|ntasks|open-mode).*", hand, re.MULTILINE)
            assert len(same) == 5 and set(same) <= set(text.splitlines())
    assert not (tmp_path / "runs").exists()


def test_a_stage_has_gpus_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment(ROOT, tmp_path).items():
        monkeypatch.setenv(name, value)
    stages = (Stage("answer", 1, gpus=2), Stage("collect"))
    words = ["eval/some.py", "checkpoint=a b"]
    work = Work("toy", "eval-toy", stages, ("answer", "collect"), words, (), ("hpc_mm",), Slurm(qos="long"))
    assert queue(work, "print") == {}
    answer, collect = capsys.readouterr().out.split("#!/bin/bash")[1:]
    logs = f"{tmp_path}/runs/eval-toy/submissions/001"
    for text, name, log in (answer, "answer", "%A_%a"), (collect, "collect", "%j"):
        assert f"--job-name=toy-{name}\n" in text and f"--output={logs}/{name}-{log}.log" in text
        assert "--qos=long\n" in text and f"cd {logs}/code " in text
        assert f"exec bash sbatch/stage.sh eval/some.py 'checkpoint=a b' stage={name}" in text
    assert "--gpus-per-node=2\n" in answer and "--array=0-0\n" in answer and " task=" in answer
    assert "--gpus" not in collect and "--array" not in collect and " task=" not in collect


def test_a_model_keeps_its_threads_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    assert room_of_cores() == [{}] * cores
    for threads, models in (("1", cores), (f"{cores},1", 1), (str(2 * cores), 1), ("none", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert room_of_models(None) == [{}] * models
        assert room_of_models([]) == [{}], "torch may see GPUs where no nvidia-smi is"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert room_of_models(None) == [{}]
    assert room_of_models(["3", "GPU-5a"]) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "GPU-5a"}]


NOTES = """
import os, sys, time
from pathlib import Path
stage, task = (word.partition("=")[2] for word in sys.argv[2:])
place = Path(sys.argv[1], os.environ["CUDA_VISIBLE_DEVICES"])
place.touch(exist_ok=False)  # one at a time
Path(sys.argv[1], f"{stage}-{task}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
time.sleep(0.05)
place.unlink()
sys.exit(task == "4")
"""


def test_tasks_take_turns_on_the_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.py").write_text(NOTES)
    words = [sys.executable, f"{tmp_path}/notes.py", str(tmp_path)]
    assert run_tasks(words, "answer", 7, room_of_models(["0", "2"])) == 1
    assert "answer: tasks [4] of 7 failed" in capsys.readouterr().err
    assert {(tmp_path / f"answer-{task}").read_text() for task in range(7)} == {"0", "2"}


@pytest.mark.parametrize("name", ["data_prep", "eval"])
def test_a_script_by_hand_is_told_its_task(name: str, tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text("import sys\nprint(sys.argv[1:])\n")
    values = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def said(*words: str, **more: str) -> str:
        command = ["bash", f"sbatch/{name}.sbatch", *words]
        result = subprocess.run(command, cwd=ROOT, env={**values, **more}, capture_output=True, text=True)
        return result.stdout if result.returncode == 0 else result.stderr

    script = f"{tmp_path}/some.py"
    assert said(script, "tasks=8") == "['tasks=8', 'cluster=local']\n"
    array = {"SLURM_ARRAY_TASK_ID": "3"}
    assert said("python", script, "tasks=8", **array) == "['tasks=8', 'cluster=local', 'task=3']\n"
    assert said(script, "cluster=print", "task=5", **array) == "['cluster=print', 'task=5']\n"
    assert f"usage: sbatch --array=0-N sbatch/{name}.sbatch " in said()


def test_a_container_runs_the_work_and_sees_its_folders(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    places = [f"source={tmp_path}/in", f"out={tmp_path}/new/out", "images=s3://images"]
    said = printed(tmp_path, *places, "stage=pack", "slurm.container=nvcr.io#some/image", "filters.against=hashes.npy")
    folders = sorted(map(str, [ROOT, tmp_path, tmp_path / "in", tmp_path / "runs" / "prepare-out"]))
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    step = f"srun '--container-image=nvcr.io#some/image' --container-mounts={mounts} --container-workdir="
    assert f"exec bash sbatch/stage.sh {step}" in said and "/code python -u data_prep/cc3m.py" in said
    assert f"{ROOT}/hashes.npy" in said, "jobs run in another folder"
    assert "export PATH" not in said, "the container has a Python of its own"


@pytest.mark.parametrize(("time", "code"), [("3", 2), ("0:02:00", 2), ("3:01", 0), ("0", 0)])
def test_time_for_some_work_is_needed(tmp_path: Path, time: str, code: int) -> None:
    result = run(tmp_path, "cluster=print", "source=in.tsv", "out=out", f"slurm.time={time}")
    assert result.returncode == code
    assert bool(code) == (f"slurm.time={time} leaves no time to work" in result.stderr)
    assert result.stderr.count("\n") == bool(code)


def test_two_launchers_never_take_one_number(tmp_path: Path) -> None:
    """Another launcher gets in whenever this one asks Slurm and the folder is free."""
    (tmp_path / "in.tsv").write_text("a\tu/1\n")
    folder = tmp_path / "runs" / "prepare-out"
    folder.mkdir(parents=True)
    theirs = f"flock --nonblock {folder}/.lock mkdir -p {folder}/submissions/001/theirs\n"
    answers = {"sbatch": "echo 7", "squeue": "true", "scontrol": "echo 'MaxArraySize = 9'"}
    (tmp_path / "bin").mkdir()
    for name, answer in answers.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{theirs}{answer}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    words = [f"source={tmp_path}/in.tsv", f"out={tmp_path}/out", "tasks=2", "stage=fetch", "cluster=slurm"]
    result = run(tmp_path, *words, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert result.returncode == 0, result.stderr
    newest = max((folder / "submissions").glob("[0-9]*"))
    assert (newest / "fetch.sbatch").exists() and not (newest / "theirs").exists()


@pytest.mark.parametrize("tasks", [1, 2500])
def test_more_tasks_than_an_array_holds_are_several_arrays(tmp_path: Path, tasks: int) -> None:
    said = printed(tmp_path, "source=in.tsv", "out=out", f"tasks={tasks}", "stage=fetch")
    lengths = [int(last) + 1 for last in re.findall(r"--array=0-(\d+)", said)]
    starts = [int(first) for first in re.findall(r"task=\$\(\((\d+) \+", said)]
    assert sum(lengths) == tasks and max(lengths) <= 1001
    assert starts == [sum(lengths[:number]) for number in range(len(lengths))]
