"""The supervisor with real child processes; Slurm's commands are small scripts that say what a test wants them to."""

import ast
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpc_mm import attempt

ROOT = Path(__file__).resolve().parents[1]
JOB = 4711
# Does what the word of this attempt says: `save10` makes a checkpoint, `sleep` waits for a file, an ending is noted.
CHILD = """
import json, os, pathlib, sys, time
from hpc_mm import attempt
folder = pathlib.Path("run")
calls = folder / "calls"
number = len(calls.read_text().splitlines()) if calls.exists() else 0
with calls.open("a") as file:
    file.write(json.dumps({name: os.environ.get(name) for name in ("MASTER_PORT", "HPC_MM_END_TIME")}) + "\\n")
step = 0
for word in sys.argv[1:][number].split(","):
    if word.startswith("save"):
        step = int(word[4:])
        path = folder / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "manifest.json").write_text("{}")
    elif word == "sleep":
        (folder / "asleep").touch()
        while not (folder / "awake").exists():
            time.sleep(0.01)
    elif word == "begin":
        attempt.begin(folder, step)
    elif word == "crash":
        sys.exit(3)
    else:
        attempt.end(folder, word, step, "the reason")
"""
SCONTROL = """#!/bin/sh
if [ $1 = show ]; then cat facts; exit; fi
[ -e refuses ] && { echo 'Requested operation is presently disabled' >&2; exit 1; }
echo $2 >> requeued; kill -TERM $PPID
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, and a Slurm that has a job on one node without a time limit."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "HPC_MM_"))]:
        monkeypatch.delenv(name)
    for name, value in {"SLURM_JOB_ID": str(JOB), "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/bin:/usr/bin")
    for folder in ("bin", "run"):
        (tmp_path / folder).mkdir()
    program(tmp_path / "bin" / "scontrol", SCONTROL)
    program(tmp_path / "bin" / "sinfo", "#!/bin/sh\ncat nodes\n")
    (tmp_path / "nodes").write_text("node1 mix\n")
    (tmp_path / "run" / "run.json").write_text('{"nodes": 1}')
    slurm_says(tmp_path)
    return tmp_path


def program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def slurm_says(here: Path, **changed: str) -> None:
    facts = {"JobState": "RUNNING", "Reason": "None", "PreemptTime": "None", "Restarts": "0", "EndTime": "Unknown"}
    (here / "facts").write_text(" ".join(f"{name}={value}" for name, value in {**facts, **changed}.items()))


def command(*plan: str) -> list[str]:
    supervisor = [sys.executable, "-m", "hpc_mm.supervise", "run=run", "log=run/node*.log"]
    return [*supervisor, sys.executable, "-c", CHILD, *plan]


def supervise(*plan: str) -> tuple[int, str]:
    """Exit code, and what was said. ``plan``: what the child does in its first, second, ... attempt."""
    result = subprocess.run(command(*plan), capture_output=True, text=True, timeout=60)
    return result.returncode, result.stderr


def records(file: str = "attempts.jsonl") -> list[dict[str, Any]]:
    path = Path("run") / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def requeued(here: Path) -> bool:
    return (here / "requeued").exists() and (here / "requeued").read_text() == f"{JOB}\n"


# ---------------------------------------------------------------- ends that are ends


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("finished", 0, ""),
        ("stopped", 1, "hpc_mm: stopped: the reason\n"),
        ("refused", 2, "hpc_mm: refused: the reason\n"),
    ],
)
def test_a_run_that_says_how_it_ended_is_left_at_that(here: Path, ending: str, code: int, said: str) -> None:
    assert supervise(f"begin,save10,{ending}") == (code, said)
    (record,) = records()
    assert record["ending"] == ending and record["reason"] == "the reason" and record["job"] == str(JOB)
    assert (record["from"], record["newest"], record["progress"], record["restart"]) == (0, 10, True, 0)
    assert not requeued(here) and attempt.read(Path("run")) == {}


def test_another_number_of_nodes_is_refused_before_anything_starts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NNODES", "3")
    said = "hpc_mm: this job has 3 nodes, the run 1: launch it with nodes=3 to change that\n"
    assert supervise("finished") == (2, said)
    assert not records("calls")


# ---------------------------------------------------------------- crashes


def test_crashes_with_progress_start_again_in_place(here: Path) -> None:
    code, said = supervise("save10,begin,save20,crash", "crash", "save30,crash", "save40,begin,finished")
    assert code == 0 and said.count("starting again") == 3
    assert [line["newest"] for line in records()] == [20, 20, 30, 40]
    assert [line["from"] for line in records()] == [10, 20, 20, 40]
    assert [line["ending"] for line in records()] == ["crashed", "crashed", "crashed", "finished"]
    assert [line["code"] for line in records()] == [3, 3, 3, 0]


def test_two_crashes_in_a_row_without_progress_stop_the_run(here: Path) -> None:
    code, said = supervise("save10,crash", "crash", "crash", "finished")
    assert code == 1 and len(records()) == 3 and not requeued(here)
    last = said.splitlines()[-1]
    assert last == (
        "hpc_mm: crashed (exit code 3), newest checkpoint step 10: 2 attempts in a row made no checkpoint; "
        "its log: run/node*.log"
    )


def test_a_checkpoint_that_is_written_again_is_progress(here: Path) -> None:
    """The newest was damaged: training went on from the one before it and has come to the same step again."""
    assert supervise("save10,crash", "save10,crash", "save10,crash", "finished")[0] == 0


def test_an_end_without_a_word_is_a_crash_whatever_the_exit_code(here: Path) -> None:
    assert supervise("begin", "begin")[0] == 1
    assert [line["ending"] for line in records()] == ["crashed", "crashed"]


def test_silent_nodes_send_the_job_back_into_the_queue(here: Path) -> None:
    (here / "nodes").write_text("node1 mix\nnode2 alloc*\nnode3 down\nnode3 down\nnode4 drng\n")
    code, said = supervise("save10,crash")
    assert code == 0 and requeued(here) and "lost node2, node3; requeueing" in said


# ---------------------------------------------------------------- requeues


@pytest.mark.parametrize(
    ("ending", "facts", "why"),
    [
        ("warned", {}, "time is up"),
        ("ended", {"PreemptTime": "1795242062"}, "the job is preempted"),
        ("crash", {"PreemptTime": "1795242062"}, "the job is preempted"),
        ("ended", {"JobState": "COMPLETING", "Reason": "TimeLimit"}, "time is up"),
    ],
)
def test_what_slurm_cuts_off_is_requeued(here: Path, ending: str, facts: dict[str, str], why: str) -> None:
    slurm_says(here, **facts)
    code, said = supervise(f"begin,save10,{ending}")
    assert code == 0 and requeued(here)
    assert said.endswith(f"newest checkpoint step 10: {why}; requeueing\n")
    assert attempt.read(Path("run")) == {}  # it is told of once


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({}, "it got SIGTERM"),
        ({"JobState": "COMPLETING"}, "the job was cancelled"),
        ({"JobState": "COMPLETING", "Restarts": "1"}, "Slurm has requeued the job"),
        ({"JobState": "COMPLETING", "Restarts": "1", "PreemptTime": "1795242062"}, "Slurm has requeued the job"),
    ],
)
def test_what_a_user_or_slurm_has_decided_stays_so(here: Path, facts: dict[str, str], why: str) -> None:
    slurm_says(here, **facts)
    code, said = supervise("begin,save10,ended")
    assert code == 1 and not requeued(here)
    assert said.endswith(f"{why}; its log: run/node*.log\n")


def test_a_rank_that_saved_because_its_neighbour_failed_starts_again(here: Path) -> None:
    assert supervise("begin,save10,ended,crash", "finished")[0] == 0


@pytest.mark.parametrize("problem", ["refuses", "is missing"])
def test_where_slurm_does_not_requeue_the_user_is_told_what_to_type(
    here: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    if problem == "refuses":
        (here / "refuses").touch()
    else:
        (here / "bin" / "scontrol").unlink()
        monkeypatch.setenv("PATH", str(here / "bin"))
    code, said = supervise("begin,save10,warned")
    assert code == 1
    expected = "Requested operation is presently disabled" if problem == "refuses" else "there is no scontrol"
    assert expected in said
    assert said.splitlines()[-1].endswith(f"to go on, type: sbatch {here.parent}/job.sbatch")


def test_requeues_without_progress_stop_the_run(here: Path) -> None:
    assert supervise("begin,warned")[0] == 0 and requeued(here)
    code, said = supervise("", "begin,warned")
    assert code == 1 and "2 attempts in a row made no checkpoint" in said


def test_preemptions_are_not_the_runs_fault(here: Path) -> None:
    slurm_says(here, PreemptTime="1795242062")
    for _ in range(3):
        assert supervise(*["begin,ended"] * 3)[0] == 0
    assert (here / "requeued").read_text() == f"{JOB}\n" * 3


def test_a_save_that_outlasts_the_time_limit_does_not_cost_the_requeue(here: Path) -> None:
    """Slurm is about to kill all of it, this supervisor too, and does not bring back what has run out of time."""
    with subprocess.Popen(command("begin,sleep,save10,ended")) as process:
        while not (here / "run" / "asleep").exists():
            time.sleep(0.01)
        slurm_says(here, JobState="COMPLETING", Reason="TimeLimit")
        process.send_signal(signal.SIGTERM)
        while not requeued(here):
            assert process.poll() is None
            time.sleep(0.05)
        slurm_says(here, JobState="COMPLETING", Reason="TimeLimit", Restarts="1")
        (here / "run" / "awake").touch()
    assert requeued(here) and records()[0]["newest"] == 10


def test_what_slurm_killed_with_its_supervisor_counts_too(here: Path) -> None:
    """A lost node, twice before the first checkpoint: the third start gives up before it does anything."""
    for number in range(2):
        process = subprocess.Popen(command(*["begin,sleep"] * 2))
        while not (here / "run" / "asleep").exists():
            time.sleep(0.01)
        (here / "run" / "asleep").unlink()
        process.kill()
        process.wait()
        assert len(records()) == number
    (here / "run" / "awake").touch()
    code, said = supervise("", "", "finished")
    assert code == 1 and said == "hpc_mm: 2 attempts in a row made no checkpoint; their log: run/node*.log\n"
    assert [line["ending"] for line in records()] == ["killed", "killed"] and len(records("calls")) == 2


def test_another_jobs_crashes_do_not_count(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert supervise("crash", "crash")[0] == 1
    monkeypatch.setenv("SLURM_JOB_ID", str(JOB + 1))
    assert supervise("", "", "crash", "finished")[0] == 0


# ---------------------------------------------------------------- what the child gets


def test_sigterm_leaves_the_child_its_time(here: Path) -> None:
    with subprocess.Popen(command("begin,sleep,save10,finished")) as process:
        while not (here / "run" / "asleep").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        slurm_says(here, JobState="COMPLETING")
        (here / "run" / "awake").touch()
    assert process.returncode == 0 and records()[0]["newest"] == 10


def test_the_jobs_end_reaches_the_ranks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_MM_END_TIME", "1")  # of an outer job
    supervise("finished")
    slurm_says(here, EndTime="1795242062")
    supervise("", "finished")
    assert [call["HPC_MM_END_TIME"] for call in records("calls")] == [None, "1795242062"]


def test_a_port_that_is_taken_is_not_used(here: Path) -> None:
    supervise("finished")
    with socket.socket() as other:
        other.bind(("", 10000 + JOB))
        other.listen()
        supervise("", "finished")
    assert [call["MASTER_PORT"] for call in records("calls")] == [str(10000 + JOB), str(20000 + JOB)]


# ---------------------------------------------------------------- where it runs


def test_it_needs_nothing_installed_and_no_new_python() -> None:
    """With a container it runs outside of that, on what the node's system has."""
    ours = "[module.__file__ for name, module in sys.modules.items() if name.startswith('hpc_mm')]"
    code = f"import sys, hpc_mm.supervise; print(*{ours})"
    files = subprocess.check_output([sys.executable, "-S", "-c", code], cwd=ROOT, text=True).split()
    assert len(files) >= 4
    for file in files:
        ast.parse(Path(file).read_text(), feature_version=(3, 9))
