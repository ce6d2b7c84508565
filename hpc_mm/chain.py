"""Jobs that wait for one another, submitted. Plain Python 3.9, for the first node of a job too."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# Of the job that a submission may be part of itself: a job must not inherit another's shape.
INHERITED = re.compile(r"(SLURM|SLURMD|SRUN)_|(MASTER_ADDR|MASTER_PORT|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE)$")
KEPT = {"SLURM_CONF", "SLURM_CLUSTERS"}


class Refused(Exception):
    """Slurm does not take a job; the message says which and why."""


def one_line(text: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in text.splitlines()]
    return "; ".join(line for line in lines if line)


def outside() -> dict[str, str]:
    """The environment without what it has of a Slurm job."""
    return {name: value for name, value in os.environ.items() if name in KEPT or not INHERITED.match(name)}


def chained(files: Mapping[str, Sequence[Path]], environment: Mapping[str, str]) -> dict[str, list[str]]:
    """Submit the batch scripts of every stage, each after the one before has ended well; its jobs.

    Where Slurm refuses one, those before it are taken back.
    """
    jobs: dict[str, list[str]] = {}
    before: list[str] = []
    try:
        for stage, batches in files.items():
            jobs[stage] = []
            for file in batches:
                jobs[stage].append(submit(file, before, environment))
            before = jobs[stage]
    except Refused:
        submitted = [job for numbers in jobs.values() for job in numbers]
        if submitted:
            subprocess.run(["scancel", *submitted], check=False)
        raise
    return jobs


def submit(file: Path, after: Sequence[str], environment: Mapping[str, str]) -> str:
    """The job's id. Where a job before it fails, Slurm takes it out of the queue."""
    words = ["sbatch", "--parsable"]
    if after:
        words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    try:
        answer = subprocess.run([*words, str(file)], env=environment, capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        raise Refused("there is no sbatch on this node") from None
    if answer.returncode:
        raise Refused(f"sbatch refused {file}: {one_line(answer.stderr)}")
    return answer.stdout.strip().partition(";")[0]
