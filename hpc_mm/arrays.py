"""Stages of work as arrays of Slurm jobs, each after the one before, or as processes of this machine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hpc_mm import slurm
from hpc_mm.command import ROOT, Submission, header, site_directives
from hpc_mm.config import ConfigError, Slurm
from hpc_mm.deadline import LAUNCHER
from hpc_mm.prepare import SHARED, STAGES, Preparation
from hpc_mm.site import read_site
from hpc_mm.submission import frozen, locked, next_submission

SNAPSHOT = ("hpc_mm", "data_prep", "sbatch")  # what a job reads of the checkout
WARNING = 120  # seconds before a job's end at which it goes back into the queue


def run_tasks(words: Sequence[str], stage: str, tasks: int) -> int:
    """Every task of a stage as a process, so many at once as there are cores; 0, or 1 where one failed."""
    environment = {**os.environ, LAUNCHER: str(os.getpid())}

    def run(task: int) -> int:
        return subprocess.run([*words, f"stage={stage}", f"task={task}"], cwd=ROOT, env=environment).returncode

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        failed = [task for task, code in enumerate(threads.map(run, range(tasks))) if code]
    if failed:
        print(f"{stage}: tasks {failed} of {tasks} failed; the same command goes on", file=sys.stderr)
    return 1 if failed else 0


def script(name: str, stage: str, tasks: range, words: Sequence[str], values: Slurm, submission: Submission) -> str:
    """The batch script of one array: task ``tasks.start + i`` is its i-th job."""
    array = stage in SHARED
    log = submission.folder / (f"{stage}-%A_%a.log" if array else f"{stage}-%j.log")
    directives = {"job-name": f"{name}-{stage}", "nodes": "1", "ntasks": "1", "output": str(log)}
    directives |= {"open-mode": "append", "requeue": "", "signal": f"B:USR2@{WARNING}"}
    directives |= site_directives(values)
    if array:
        directives["array"] = f"0-{len(tasks) - 1}"
    lines = [*header(directives), "set -eo pipefail"]
    lines += [f"cd {shlex.quote(str(submission.code))}  # the code as it was at submission"]
    lines += ["export PYTHONPATH=$PWD", f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]
    lines += ["source sbatch/env.sh"]
    command = shlex.join(["python", "-u", *words, f"stage={stage}"])
    if array:
        command += f" task=$(({tasks.start} + SLURM_ARRAY_TASK_ID))"
    job = '"${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"'
    lines += ["# Near its end the job goes back into the queue; what is done is skipped then."]
    lines += [f"trap 'scontrol requeue {job} || true' USR2", f"{command} &", "work=$!"]
    wait = "wait $work && code=0 || code=$?"
    lines += [
        f"{wait}  # which a signal ends early",
        f"while kill -0 $work 2>/dev/null; do {wait}; done",
        "exit $code",
        "",
    ]
    return "\n".join(lines)


def scripts(
    options: Preparation, stages: Sequence[str], words: Sequence[str], submission: Submission
) -> dict[str, str]:
    """Every batch script by its name, in the order of submission; no array is longer than the cluster takes."""
    found = {}
    for stage in stages:
        count = options.tasks if stage in SHARED else 1
        longest = longest_array() if count > 1 else count
        for number, start in enumerate(range(0, count, longest)):
            tasks = range(start, min(start + longest, count))
            name = f"{stage}.sbatch" if count <= longest else f"{stage}-{number}.sbatch"
            found[name] = script(job_name(options), stage, tasks, words, options.slurm, submission)
    return found


def job_name(options: Preparation) -> str:
    return options.name or Path(options.out.rstrip("/")).name


def longest_array() -> int:
    """Jobs that an array may have here (MaxArraySize); 1000 where no Slurm is here to ask."""
    if not slurm.is_here():
        return 1000
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", slurm.ask("scontrol", "show", "config"), re.MULTILINE)
    return int(found.group(1)) if found else 1000


def queue(options: Preparation, stages: Sequence[str], words: Sequence[str]) -> int:
    """Submit the stages, each after the one before has ended well; or show their scripts (cluster=print)."""
    folder = Path(read_site().runs).expanduser().resolve() / f"prepare-{job_name(options)}"
    submission = next_submission(folder)
    texts = scripts(options, stages, words, submission)
    if options.cluster == "print":
        print("\n".join(texts.values()))
        return 0
    if not slurm.is_here():
        raise ConfigError("cluster=slurm: sbatch is not on PATH; cluster=local runs here, cluster=print shows the jobs")
    with locked(folder):
        refuse_if_active(job_name(options))
        for text in texts.values():
            slurm.test(text)
        with frozen(submission, SNAPSHOT, texts):
            pass
        jobs = chained(stages, submission, list(texts))
    for stage, numbers in jobs.items():
        print(f"submitted {stage}: job {', '.join(numbers)}")
    every = " ".join(job for numbers in jobs.values() for job in numbers)
    print(f"  logs    {submission.folder}\n  cancel  scancel {every}")
    return 0


def chained(stages: Sequence[str], submission: Submission, names: Sequence[str]) -> dict[str, list[str]]:
    """The jobs of every stage. Where Slurm refuses one, those before it are taken back."""
    jobs: dict[str, list[str]] = {}
    try:
        for name in names:
            stage = name.removesuffix(".sbatch").partition("-")[0]
            before = previous(stages, stage)
            jobs.setdefault(stage, []).append(submit(submission.folder / name, jobs[before] if before else []))
    except ConfigError:
        for numbers in jobs.values():
            subprocess.run(["scancel", *numbers], check=False)
        raise
    return jobs


def previous(stages: Sequence[str], stage: str) -> str:
    place = stages.index(stage)
    return stages[place - 1] if place else ""


def submit(file: Path, after: Sequence[str]) -> str:
    """The job's id. Where a job before it fails, Slurm takes it out of the queue."""
    words = ["sbatch", "--parsable"]
    if after:
        words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    answer = subprocess.run([*words, str(file)], env=slurm.job_environment(), capture_output=True, text=True)
    if answer.returncode:
        raise ConfigError(f"sbatch refused {file}: {slurm.one_line(answer.stderr)}")
    return answer.stdout.strip().partition(";")[0]


def refuse_if_active(name: str) -> None:
    """Two jobs must not work on the same parts."""
    names = ",".join(f"{name}-{stage}" for stage in STAGES)
    active = slurm.ask("squeue", "--me", "--noheader", f"--name={names}", "-o", "%i %j").split("\n")[0]
    if active:
        job, _, stage = active.partition(" ")
        raise ConfigError(f"{stage} is in the queue: job {job}; scancel {job} ends it")
