"""The launcher on a real Slurm: what reaches the nodes, what is refused before the queue, what an edit changes."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import environment, facts, launch, make_checkout, make_store, write_train
from jobs import appears, job_of, start_now, wait

from hpc_mm import attempt

pytestmark = pytest.mark.usefixtures("slurm")


@pytest.fixture
def user(tmp_path: Path) -> dict[str, str]:
    """A user with a checkout and a store, as an environment."""
    checkout = make_checkout(tmp_path / "checkout")
    make_store(str(tmp_path / "store"))
    return environment(checkout, tmp_path)


def test_a_job_reaches_every_node(user: dict[str, str], tmp_path: Path) -> None:
    result = launch(user, "recipe=toy", "nodes=2", "slurm.cpus_per_task=2")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "toy"
    job = job_of(run)
    assert f"submitted job {job}" in result.stdout
    assert wait(job) == "COMPLETED", list(run.glob("submissions/001/*.log"))
    ranks = [facts(run, rank) for rank in range(2)]
    assert [rank["SLURM_NODEID"] for rank in ranks] == ["0", "1"]
    for rank in ranks:
        assert rank["WORLD_SIZE"] == "2"
        assert rank["SRUN_CPUS_PER_TASK"] == "2" and rank["cores"] == 2  # not the one core of a bare srun
        assert rank["OMP_NUM_THREADS"] == "2"
        assert rank["MASTER_PORT"] == str(10000 + int(job) % 10000)
        assert rank["MASTER_ADDR"] == ranks[0]["SLURMD_NODENAME"]
        assert rank["DS_ACCELERATOR"] == "cpu" and rank["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert rank["cwd"] == str(run / "submissions" / "001" / "code")
        assert Path(rank["file"]).is_relative_to(rank["cwd"])
    kept = {path.name for path in (run / "submissions" / "001").iterdir()}
    expected = {"job.sbatch", "code", "commit.txt", "dirty.diff", "packages.txt", "node0.log", "node1.log"}
    assert expected <= kept


def test_an_edit_of_the_checkout_changes_no_queued_job(user: dict[str, str], tmp_path: Path) -> None:
    assert launch(user, "recipe=toy", "nodes=1", "slurm.extra.hold=").returncode == 0
    run = tmp_path / "runs" / "toy"
    job = job_of(run)
    write_train(tmp_path / "checkout", 2)
    (tmp_path / "checkout" / "hpc_mm" / "config.py").write_text("broken")
    subprocess.run(["scontrol", "release", job], check=True)
    assert wait(job) == "COMPLETED"
    assert facts(run, 0)["version"] == 1


def test_a_requeued_job_runs_again_from_its_snapshot(user: dict[str, str], tmp_path: Path) -> None:
    assert launch({**user, "TEST_SLEEP": "300"}, "recipe=toy", "nodes=1").returncode == 0
    run = tmp_path / "runs" / "toy"
    job = job_of(run)
    appears(run / "rank0.json")
    write_train(tmp_path / "checkout", 2)
    (run / "rank0.json").unlink()
    subprocess.run(["scontrol", "requeue", job], check=True)
    start_now(job)
    appears(run / "rank0.json")
    subprocess.run(["scancel", job], check=True)
    assert facts(run, 0)["version"] == 1
    assert facts(run, 0)["SLURM_RESTART_COUNT"] == "1"


def test_a_run_in_the_queue_is_not_started_twice(user: dict[str, str], tmp_path: Path) -> None:
    assert launch(user, "recipe=toy", "nodes=1", "slurm.extra.hold=").returncode == 0
    job = job_of(tmp_path / "runs" / "toy")
    again = launch(user, "recipe=toy", "nodes=1")
    (tmp_path / "runs" / "toy" / "submissions" / "001" / "job_id").unlink()  # a launcher that was killed after sbatch
    killed = launch(user, "recipe=toy", "nodes=1")
    subprocess.run(["scancel", job], check=True)
    assert killed.returncode == 2 and f"job {job} is PENDING" in killed.stderr
    assert again.returncode == 2
    assert f"job {job} is PENDING; scancel {job} ends it" in again.stderr
    assert again.stderr.count("\n") == 1


def test_slurm_and_ours_agree_on_the_environment(user: dict[str, str], tmp_path: Path) -> None:
    """SBATCH_* stands above a recipe and below the command line, and never reaches sbatch a second time."""
    names = {"SBATCH_TIMELIMIT": "5", "SBATCH_PARTITION": "short", "SBATCH_OUTPUT": str(tmp_path / "elsewhere")}
    result = launch({**user, **names}, "recipe=toy", "nodes=1", "slurm.time=7", "slurm.extra.hold=")
    assert result.returncode == 0, result.stderr
    job = job_of(tmp_path / "runs" / "toy")
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    subprocess.run(["scancel", job], check=True)
    assert "Partition=short" in shown and "TimeLimit=00:07:00" in shown
    assert str(tmp_path / "runs" / "toy") in shown and "elsewhere" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurm.partition=mian"], "unknown slurm.partition 'mian': did you mean main? known: main, short, urgent"),
        (
            ["slurm.partition=short", "slurm.time=1:00:00"],
            "slurm.time=1:00:00 is over the limit of partition short: 00:10:00",
        ),
        (["slurm.time=1"], "slurm.time=1 leaves no time to save: 3 minutes are the least"),
        (
            ["nodes=8", "sources.documents.batch=8", "sources.questions.batch=8"],
            "nodes=8: partition main gives a job at most 4",
        ),
        (["gpus_per_node=2", "nodes=1"], "gpus_per_node=2: partition main has no GPUs"),
        (["slurm.cpus_per_task=64"], "sbatch would refuse this job"),
        (["slurm.memory=900G"], "sbatch would refuse this job"),
        (["slurm.constraint=h100"], "sbatch would refuse this job"),
        (["slurm.extra.reservation=none"], "sbatch would refuse this job"),
    ],
)
def test_what_the_cluster_cannot_do_is_refused_before_the_queue(
    user: dict[str, str], tmp_path: Path, words: list[str], message: str
) -> None:
    result = launch(user, "recipe=toy", *words)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_missing_shards_are_found_before_the_queue(user: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "store" / "shapes" / "train-pairs" / "index.json").unlink()
    result = launch(user, "recipe=toy")
    assert result.returncode == 2
    assert "sources.pairs: no shards at" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_the_hand_written_script_runs_a_run_folder(user: dict[str, str], tmp_path: Path) -> None:
    assert launch(user, "recipe=toy", "nodes=2").returncode == 0
    run = tmp_path / "runs" / "toy"
    assert wait(job_of(run)) == "COMPLETED"
    for rank in range(2):
        (run / f"rank{rank}.json").unlink()
    log, script = tmp_path / "hand.log", tmp_path / "checkout" / "sbatch" / "train.sbatch"
    command = ["sbatch", "--parsable", "--cpus-per-task=1", "--mem=2G", f"--output={log}"]
    job = subprocess.check_output([*command, "--nodes=2", str(script), str(run)], env=user, text=True)
    assert wait(job.strip()) == "COMPLETED", log.read_text()
    assert [facts(run, rank)["SLURM_NODEID"] for rank in range(2)] == ["0", "1"]
    job = subprocess.check_output([*command, "--nodes=1", str(script), str(run)], env=user, text=True)
    assert wait(job.strip()) == "FAILED"
    assert log.read_text() == "hpc_mm: this job has 1 nodes, the run 2: launch it with nodes=1 to change that\n"


# ---------------------------------------------------------------- stopping and coming back

Start = Callable[..., tuple[Path, str]]


def attempts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def endings(run: Path) -> list[tuple[str, int, int]]:
    """Of each attempt how it ended, where it began, and the newest checkpoint after it."""
    return [(line["ending"], line["from"], line["newest"]) for line in attempts(run)]


@pytest.fixture
def start(user: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Starts a run on two nodes that trains until it is told to stop; gives its folder and its job."""
    run = tmp_path / "runs" / "toy"

    def start(*words: str) -> tuple[Path, str]:
        result = launch({**user, "TEST_SLEEP": "600"}, "recipe=toy", "nodes=2", *words)
        assert result.returncode == 0, result.stderr
        return run, job_of(run)

    yield start
    subprocess.run(["scancel", "--quiet", job_of(run)], check=True)


def ranks(run: Path) -> list[dict[str, Any]]:
    """What both ranks note once they train. Their notes are gone then, so that the next attempt's are waited for."""
    found = []
    for rank in range(2):
        appears(run / f"rank{rank}.json")
        found.append(facts(run, rank))
    for rank in range(2):
        (run / f"rank{rank}.json").unlink()
    return found


def log_of(run: Path, job: str) -> str:
    return (run / "submissions" / "001" / f"job-{job}.log").read_text()


@pytest.mark.chaos
@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_a_warned_job_saves_is_requeued_and_goes_on(start: Start, strategy: str) -> None:
    run, job = start(f"strategy={strategy}", "slurm.time=60")
    first = ranks(run)
    unix = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    end = subprocess.check_output(["squeue", "-h", "-j", job, "-o", "%e"], env=unix, text=True)
    assert [rank["end"] for rank in first] == [float(end)] * 2
    told = time.time()
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    start_now(job)
    second = ranks(run)
    print(f"{strategy}: {second[0]['time'] - told:.1f} s from SIGUSR2 through the queue to a rank that trains again")
    subprocess.run(["scancel", job], check=True)
    assert wait(job).startswith("CANCELLED")
    assert second[0]["first"] == 1
    assert [rank["SLURM_RESTART_COUNT"] for rank in second] == ["1", "1"]
    assert endings(run)[0] == ("warned", 0, 1) and len(attempts(run)) <= 2
    assert "time is up; requeueing" in log_of(run, job)


def test_a_preempted_job_saves_and_comes_back(start: Start) -> None:
    run, job = start()
    ranks(run)
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "--mem=100M", "-o", "/dev/null"]
    other = subprocess.check_output([*urgent, "--wrap", "sleep 5"], text=True).strip()
    assert wait(other) == "COMPLETED"
    start_now(job)
    assert ranks(run)[0]["first"] == 1
    subprocess.run(["scancel", job], check=True)
    wait(job)
    assert endings(run)[0] == ("ended", 0, 1)
    assert "the job is preempted; requeueing" in log_of(run, job)


@pytest.mark.chaos
def test_what_is_killed_starts_again_in_place(start: Start) -> None:
    run, job = start("strategy=ddp")
    known = ranks(run)
    for number, victim in enumerate(["rank", "agent", "step"]):
        killed = time.time()
        if victim == "step":
            subprocess.run(["scancel", "--signal=KILL", f"{job}.{number}"], check=True)
        else:
            os.kill(known[1]["pid" if victim == "rank" else "parent"], signal.SIGKILL)
        again = ranks(run)
        seen = attempts(run)[-1]["time"]
        print(f"kill -9 of a {victim}: {seen - killed:.1f} s to its end, {again[0]['time'] - seen:.1f} s to a new rank")
        assert not any(Path(f"/proc/{rank['pid']}").exists() for rank in known)
        known = again
    subprocess.run(["scancel", "--signal=TERM", job], check=True)  # to the ranks alone
    assert wait(job) == "FAILED"
    assert [(begun, newest) for _, begun, newest in endings(run)] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert endings(run)[-1][0] == "ended"
    assert log_of(run, job).count("starting again") == 3 and "it got SIGTERM" in log_of(run, job)


@pytest.mark.chaos
def test_a_lost_node_sends_the_job_back_into_the_queue(start: Start) -> None:
    run, job = start()
    node = ranks(run)[1]["SLURMD_NODENAME"]
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"], check=True)  # for a while
    try:
        start_now(job)
        again = ranks(run)
        subprocess.run(["scancel", job], check=True)
        wait(job)
    finally:
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True)
        # (it says no where the node's own slurmd has been quicker)
    assert again[0]["first"] == 1 and again[0]["SLURM_RESTART_COUNT"] == "1"
    assert "DUE TO NODE FAILURE" in log_of(run, job)


@pytest.mark.chaos
def test_a_signal_that_comes_while_ranks_import_is_told_again(user: dict[str, str], tmp_path: Path) -> None:
    result = launch({**user, "TEST_SLEEP": "600", "TEST_IMPORTS": "12"}, "recipe=toy", "nodes=2")
    assert result.returncode == 0, result.stderr
    run, job = tmp_path / "runs" / "toy", job_of(tmp_path / "runs" / "toy")
    for rank in range(2):
        appears(run / f"importing{rank}")
    subprocess.run(["scancel", "--batch", "--signal=TERM", job], check=True)  # to the supervisor alone
    assert wait(job) == "FAILED"
    assert endings(run) == [("ended", 0, 1)] and "it got SIGTERM" in log_of(run, job)


@pytest.mark.chaos
def test_a_cancelled_job_stays_cancelled(start: Start) -> None:
    run, job = start()
    ranks(run)
    subprocess.run(["scancel", job], check=True)
    assert wait(job).startswith("CANCELLED")
    if (run / "attempts.jsonl").exists():  # not where Slurm's KillWait was over before the supervisor had written it
        assert endings(run) == [("ended", 0, 1)]
        assert "the job was cancelled" in log_of(run, job)
    else:
        assert attempt.read(run)["ending"] == "ended"


def test_a_run_without_progress_stops_with_a_reason(user: dict[str, str], tmp_path: Path) -> None:
    assert launch({**user, "TEST_FAILS": "0"}, "recipe=toy", "nodes=2").returncode == 0
    run = tmp_path / "runs" / "toy"
    job = job_of(run)
    assert wait(job) == "FAILED"
    assert endings(run) == [("crashed", 0, 0)] * 2
    assert "the reason of the failure" in (run / "submissions" / "001" / "node0.log").read_text()
    last = log_of(run, job).splitlines()[-1]
    assert "newest checkpoint step 0: 2 attempts in a row made no checkpoint; its log: " in last
    assert last.endswith(f"{run}/submissions/001/node*.log")


def test_shards_and_tokenizer_in_ceph(user: dict[str, str], ceph: str, tmp_path: Path) -> None:
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    make_store(f"{ceph}/corpora")
    user = {**user, **keys, "HPC_MM_STORE": f"{ceph}/corpora"}
    result = launch(user, "recipe=toy", "nodes=1", "slurm.extra.hold=")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "toy"
    subprocess.run(["scancel", job_of(run)], check=True)
    assert (run / "tokenizer.json").read_bytes() == b"{}"
    assert f'"{run}/tokenizer.json"' in (run / "run.json").read_text()
    assert f'"{ceph}/corpora/shapes/train-pairs"' in (run / "run.json").read_text()
    bare = {name: value for name, value in user.items() if not name.startswith("AWS_")}
    bare |= {"AWS_ENDPOINT_URL": keys["AWS_ENDPOINT_URL"], "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    refused = launch(bare, "recipe=toy", "name=other", "nodes=1")
    assert refused.returncode == 2
    assert "credentials" in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "runs" / "other").exists()
