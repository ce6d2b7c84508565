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
from hpc_mm.config import ConfigError
from hpc_mm.deadline import LAUNCHER
from hpc_mm.prepare import SHARED, STAGES, Preparation, whole
from hpc_mm.site import read_site
from hpc_mm.submission import frozen, locked, next_submission

SNAPSHOT = ("hpc_mm", "data_prep", "sbatch")  # what a job reads of the checkout
WARNING = 120  # seconds before a job's end at which it goes back into the queue (sbatch/data_prep.sbatch has it too)
LEAST_MINUTES = 3  # a start, and some work before the warning


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


def script(options: Preparation, stage: str, tasks: range, words: Sequence[str], submission: Submission) -> str:
    """The batch script of one array: task ``tasks.start + i`` is its i-th job."""
    array = stage in SHARED
    log = submission.folder / (f"{stage}-%A_%a.log" if array else f"{stage}-%j.log")
    directives = {"job-name": f"{job_name(options)}-{stage}", "nodes": "1", "ntasks": "1", "output": str(log)}
    directives |= {"open-mode": "append", "requeue": "", "signal": f"B:USR2@{WARNING}"}
    directives |= site_directives(options.slurm)
    if array:
        directives["array"] = f"0-{len(tasks) - 1}"
    lines = [*header(directives), "set -eo pipefail"]
    lines += [f"cd {shlex.quote(str(submission.code))}  # the code as it was at submission", "export PYTHONPATH=$PWD"]
    step = container_step(options, submission)
    if not step:
        lines.append(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")
    command = shlex.join([*step, *words, f"stage={stage}"])
    if array:
        command += f" task=$(({tasks.start} + SLURM_ARRAY_TASK_ID))"
    return "\n".join([*lines, f"exec bash sbatch/data_prep.sbatch {command}", ""])


def container_step(options: Preparation, submission: Submission) -> list[str]:
    """What stands before a data_prep/ script to run it in slurm.container, as training does; nothing without one."""
    if not options.slurm.container:
        return []
    places = [options.source, options.out, options.images, *options.filters.against, os.environ.get("HPC_MM_SITE", "")]
    folders = {str(submission.run_folder), *(mounted(whole(place)) for place in places if place)}
    return [
        "srun",
        f"--container-image={options.slurm.container}",
        f"--container-mounts={','.join(f'{folder}:{folder}' for folder in sorted(folders) if folder)}",
        f"--container-workdir={submission.code}",
        *("python", "-u"),
    ]


def mounted(address: str) -> str:
    """The folder that holds an address on the node's file systems, since it need not exist yet; empty for a store."""
    if "://" in address:
        return ""
    folder = Path(address)
    while not folder.is_dir():
        folder = folder.parent
    return str(folder) if folder != Path("/") else address


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
            found[name] = script(options, stage, tasks, words, submission)
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
    check_time(options.slurm.time)
    folder = Path(read_site().runs).expanduser().resolve() / f"prepare-{job_name(options)}"
    if options.cluster == "print":
        print("\n".join(scripts(options, stages, words, next_submission(folder)).values()))
        return 0
    if not slurm.is_here():
        raise ConfigError("cluster=slurm: sbatch is not on PATH; cluster=local runs here, cluster=print shows the jobs")
    with locked(folder):
        refuse_if_active(job_name(options))
        submission = next_submission(folder)
        texts = scripts(options, stages, words, submission)
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


def check_time(time: str) -> None:
    if 0 < slurm.minutes(time) <= LEAST_MINUTES:  # 0 is Slurm's word for no limit
        raise ConfigError(
            f"slurm.time={time} leaves no time to work: a task goes back into the queue {WARNING} s before its end; "
            f"give more than {LEAST_MINUTES} minutes"
        )


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
