"""What a shared cluster does to a run, done on purpose (``make chaos``): killed processes and daemons, lost nodes, a
full disk, a broken checkpoint. Every run must end with the losses, bit for bit, of one that was left in peace."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkout import ROOT, environment, launch
from jobs import ends_well, start_now, stepped, submit, wait
from runs import LOCAL, lines, losses

from hpc_mm import attempt, checkpoint

pytestmark = pytest.mark.chaos
EVERY = 2  # steps between checkpoints
WORDS = ["nodes=2", "strategy=zero2", "train.steps=16", f"train.save_every={EVERY}"]


@pytest.fixture(scope="module")
def quiet(slurm: None, user: dict[str, str]) -> list[list[float]]:
    run, job, _ = submit(user, "quiet", *WORDS)
    ends_well(run, job)
    return losses(run)


def processes(job: str, node: int, *, agent: bool) -> list[int]:
    """Of one node of a job: its accelerate process, or its ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            values, words = (folder / "environ").read_bytes().split(b"\0"), (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended since
        here = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_NODEID={node}".encode()} <= set(values)
        if here and b"hpc_mm.train" in words and (b"accelerate" in words) == agent and b"bash" not in words:
            found.append(int(folder.name))
    assert found, f"job {job} has no such process on node {node}"
    return found


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def kill_a_rank(job: str) -> None:
    os.kill(processes(job, 1, agent=False)[0], signal.SIGKILL)


def kill_an_agent(job: str) -> None:
    os.kill(processes(job, 1, agent=True)[0], signal.SIGKILL)


def kill_the_step_of_rank_0(job: str) -> None:
    """slurmstepd of the training step on the first node."""
    daemon = parent(processes(job, 0, agent=True)[0])
    assert b"slurmstepd" in Path(f"/proc/{daemon}/cmdline").read_bytes()
    os.kill(daemon, signal.SIGKILL)


@pytest.mark.parametrize("harm", [kill_a_rank, kill_an_agent])
def test_a_killed_process(harm: Callable[[str], None], user: dict[str, str], quiet: list[list[float]]) -> None:
    run, job, _ = submit(user, harm.__name__, *WORDS)
    stepped(run, 5)
    kept = checkpoint.step_of(checkpoint.finished(run)[-1])
    killed = time.time()
    harm(job)
    done = lines(run)[-1]["step"]
    assert done - kept <= 2 * EVERY, "an interval, and the one that was being written"
    back = stepped_since(run, killed)
    print(f"{harm.__name__}: {back - killed:.1f} s to the first new step; {done - kept} steps to do again at most")
    ends_well(run, job)
    assert losses(run) == quiet
    assert_nothing_is_left(job)


def test_a_killed_step_daemon_of_rank_0(user: dict[str, str], quiet: list[list[float]]) -> None:
    """Its processes go on without it, to the end or until srun misses it and the supervisor starts again."""
    run, job, _ = submit(user, "daemon", *WORDS)
    stepped(run, 5)
    kill_the_step_of_rank_0(job)
    ends_well(run, job)
    assert losses(run) == quiet


def stepped_since(run: Path, moment: float) -> float:
    """When the first step of the next attempt is recorded."""
    attempts = run / "attempts.jsonl"
    while not attempts.exists() or not attempts.read_text():
        assert time.time() - moment < 300, "nobody has seen that the attempt is over"
        time.sleep(0.05)
    over = attempts.stat().st_mtime
    while True:
        found = [line["time"] for line in lines(run) if line["time"] > over]
        if found:
            return float(found[0])
        assert time.time() - moment < 300
        time.sleep(0.05)


def assert_nothing_is_left(job: str) -> None:
    with pytest.raises(AssertionError, match="has no such process"):
        processes(job, 0, agent=False)
    with pytest.raises(AssertionError, match="has no such process"):
        processes(job, 1, agent=False)


def daemon_of(node: str) -> int:
    found = subprocess.run(["pgrep", "-f", f"slurmd -N {node}"], capture_output=True, text=True, check=True).stdout
    return int(found.split()[0])


def test_a_killed_slurmd(user: dict[str, str], quiet: list[list[float]]) -> None:
    """The job does not notice: its own processes live on."""
    run, job, _ = submit(user, "slurmd", *WORDS)
    stepped(run, 3)
    daemon = daemon_of(second_node(job))
    words = Path(f"/proc/{daemon}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    os.kill(daemon, signal.SIGKILL)
    try:
        stepped(run, 8)
    finally:
        subprocess.run(words, check=True)
    ends_well(run, job)
    assert losses(run) == quiet


def second_node(job: str) -> str:
    names = subprocess.run(["squeue", "-h", "-j", job, "-o", "%N"], capture_output=True, text=True).stdout.strip()
    return subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True).stdout.split()[1]


def test_a_node_that_goes_down(user: dict[str, str], quiet: list[list[float]]) -> None:
    run, job, _ = submit(user, "down", *WORDS)
    stepped(run, 5)
    node = second_node(job)
    down = time.time()
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"], check=True)
    try:
        start_now(job)
    finally:
        subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True)
        # (it says no where the node's own slurmd has been quicker)
    ends_well(run, job)
    assert losses(run) == quiet
    back = next(line["time"] for line in lines(run) if line["time"] > down)
    print(f"node down: {back - down:.1f} s to the first new step")


def test_time_that_runs_out(user: dict[str, str], slurm: None) -> None:
    """The job sees its end coming, saves while a save still fits, and comes back."""
    run, job, _ = submit(user, "clock", *WORDS[:2], "train.steps=100000", "train.save_every=100000", "slurm.time=4")
    stepped(run, 1)
    start_now(job)
    done = max(line["step"] for line in lines(run))
    stepped(run, done + 3)
    subprocess.run(["scancel", job], check=True)
    wait(job)
    first = json.loads((run / "attempts.jsonl").read_text().splitlines()[0])
    assert (first["ending"], first["from"], first["newest"]) == ("warned", 0, done)
    assert "time is up; requeueing" in (run / "submissions" / "001" / f"job-{job}.log").read_text()


# ---------------------------------------------------------------- on this machine


@pytest.fixture(scope="module")
def alone(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    folder = tmp_path_factory.mktemp("alone")
    result = launch(environment(ROOT, folder, HPC_MM_STORE=str(shapes)), *LOCAL, "nodes=1", "strategy=ddp")
    assert result.returncode == 0, result.stderr
    return losses(folder / "runs" / "toy")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the toy model, but not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=42m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(shapes: Path, small_disk: Path, alone: list[list[float]]) -> None:
    values = environment(ROOT, small_disk, HPC_MM_STORE=str(shapes))
    words = [*LOCAL, "nodes=1", "strategy=ddp", "train.save_every=2"]
    run = small_disk / "runs" / "toy"
    full = launch(values, *words)
    assert full.returncode == 1
    assert "could not be saved" in full.stderr and "No space left on device" in full.stderr
    assert [checkpoint.step_of(path) for path in checkpoint.finished(run)] == [2]
    assert checkpoint.newest(run) is not None and attempt.read(run)["ending"] == "stopped"
    subprocess.run(["mount", "-o", "remount,size=300m", str(small_disk)], check=True)
    again = launch(values, *words)
    assert again.returncode == 0, again.stderr
    assert losses(run) == alone


def test_a_newest_checkpoint_that_is_cut(shapes: Path, tmp_path: Path, alone: list[list[float]]) -> None:
    values = environment(ROOT, tmp_path, HPC_MM_STORE=str(shapes))
    words = [*LOCAL, "nodes=1", "strategy=ddp", "train.save_every=2"]
    run = tmp_path / "runs" / "toy"
    assert launch(values, *words).returncode == 0
    newest = checkpoint.path_of(run, 6) / "rank-00000.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    again = launch(values, *words)
    assert again.returncode == 0, again.stderr
    log = (run / "submissions" / "002" / "node0.log").read_text()
    assert "step-00000006 is damaged" in log and "resuming at step 4" in log
    assert losses(run) == alone
