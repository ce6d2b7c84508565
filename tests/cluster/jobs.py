"""Slurm jobs that a test waits for; its limits are those of a busy machine, which takes ten times as long."""

import subprocess
import time
from pathlib import Path

from checkout import launch
from runs import lines, small


def job_of(folder: Path, submission: int = 1) -> str:
    return (folder / "submissions" / f"{submission:03d}" / "job_id").read_text().strip()


def start_now(job: str, seconds: int = 300) -> None:
    """Begin a job at once when it is requeued; Slurm would hold it back for two minutes."""
    for _ in range(2 * seconds):
        state = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.strip()
        if state == "PENDING":
            break
        time.sleep(0.5)
    else:
        raise AssertionError(f"job {job} does not come back into the queue: {state}")
    time.sleep(2)  # in the second in which its credential was revoked, a node refuses the job, which fails of that
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=True)


def appears(file: Path, seconds: int = 600) -> None:
    """Wait for a file that a job writes."""
    for _ in range(seconds * 5):
        if file.exists():
            return
        time.sleep(0.2)
    raise AssertionError(f"{file} does not appear")


def wait(job: str, seconds: int = 600) -> str:
    """The state in which a job has ended; of an array, that of a task that did not complete, if there is one."""
    for _ in range(seconds * 2):
        if not subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout:
            break
        time.sleep(0.5)
    for _ in range(120):  # accounting comes a little later
        said = subprocess.run(["sacct", "-nXj", job, "-o", "State"], capture_output=True, text=True).stdout
        states = [line.split()[0] for line in said.splitlines()]
        if states and not {"PENDING", "RUNNING"} & set(states):
            return next((state for state in states if state != "COMPLETED"), "COMPLETED")
        time.sleep(0.5)
    raise AssertionError(f"job {job} does not end")


def submit(user: dict[str, str], name: str, *words: str) -> tuple[Path, str, str]:
    """The run's folder, the job, and what the launcher said."""
    result = launch(user, *small(*words), "cluster=slurm", f"name={name}")
    assert result.returncode == 0, result.stderr
    run = Path(user["HPC_MM_RUNS"]) / name
    newest = max(int(path.parent.name) for path in run.glob("submissions/*/job_id"))
    return run, job_of(run, newest), result.stdout


def ends_well(run: Path, job: str) -> None:
    state = wait(job)
    logs = [*run.glob("submissions/*/*.log")]
    assert state == "COMPLETED", "".join(log.read_text()[-2000:] for log in logs)


def stepped(run: Path, step: int, seconds: int = 600) -> float:
    """Wait until a step is recorded; when that was, in unix seconds."""
    for _ in range(seconds * 20):
        if (run / "metrics.jsonl").exists():
            found = [line["time"] for line in lines(run) if line["step"] >= step]
            if found:
                return float(found[0])
        time.sleep(0.05)
    raise AssertionError(f"{run} does not come to step {step}")


def submitted(said: str) -> dict[str, list[str]]:
    """The jobs of each stage."""
    found = [line.split() for line in said.splitlines() if line.startswith("submitted")]
    return {stage.rstrip(":"): [job.rstrip(",") for job in jobs] for _, stage, _, *jobs in found}
