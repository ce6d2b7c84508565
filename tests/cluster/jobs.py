"""Slurm jobs that a test waits for."""

import subprocess
import time
from pathlib import Path


def job_of(folder: Path) -> str:
    return (folder / "submissions" / "001" / "job_id").read_text().strip()


def start_now(job: str) -> None:
    """Begin a requeued job at once; Slurm would hold it back for two minutes."""
    for _ in range(120):
        state = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.strip()
        if (
            state == "PENDING"
            and not subprocess.run(
                ["scontrol", "update", f"jobid={job}", "starttime=now"], capture_output=True
            ).returncode
        ):
            return
        time.sleep(0.5)
    raise AssertionError(f"job {job} does not come back into the queue: {state}")


def appears(file: Path, seconds: int = 120) -> None:
    """Wait for a file that a job writes."""
    for _ in range(seconds * 5):
        if file.exists():
            return
        time.sleep(0.2)
    raise AssertionError(f"{file} does not appear")


def wait(job: str, seconds: int = 120) -> str:
    """The state in which a job has ended."""
    for _ in range(seconds * 2):
        if not subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout:
            break
        time.sleep(0.5)
    for _ in range(40):  # accounting comes a little later
        state = subprocess.run(["sacct", "-nXj", job, "-o", "State"], capture_output=True, text=True).stdout.split()
        if state and state[0] not in ("PENDING", "RUNNING"):
            return state[0]
        time.sleep(0.5)
    raise AssertionError(f"job {job} does not end")
