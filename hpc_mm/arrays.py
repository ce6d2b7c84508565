"""Stages of work as arrays of Slurm jobs, each after the one before, or as processes of this machine."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from hpc_mm import chain, slurm
from hpc_mm.command import ROOT, Submission, header, site_directives
from hpc_mm.config import ConfigError, Slurm
from hpc_mm.data.store import whole
from hpc_mm.deadline import LAUNCHER, die_with_parent, ended_in_order
from hpc_mm.local import visible_gpus
from hpc_mm.site import read_site
from hpc_mm.submission import frozen, locked, next_submission

WARNING = 120  # seconds before a job's end at which it goes back into the queue (sbatch/*.sbatch have it too)
LEAST_MINUTES = 3  # a start, and some work before the warning


@dataclass(frozen=True)
class Stage:
    """One step of the work: an array of ``tasks`` jobs, or a single job where that is None. A job has one node."""

    name: str
    tasks: int | None = None
    gpus: int = 0  # of each job
    model: bool = False  # whether every job loads one


@dataclass(frozen=True)
class Work:
    """What is handed to Slurm: ``WORDS stage=STAGE`` for every stage, in an array with ``task=N`` too."""

    name: str  # jobs are NAME-STAGE
    folder: str  # of its submissions, below the site's runs
    stages: Sequence[Stage]  # what is to do, each after the one before
    every: Sequence[str]  # names of all stages that this work can have, of which none may be in the queue
    words: Sequence[str]  # a script of the checkout, then key=value
    places: Sequence[str]  # addresses that a job reads or writes, which a container must see; empty ones are none
    snapshot: Sequence[str]  # folders of the checkout that a job reads
    slurm: Slurm
    logs: str = ""  # folder; empty = that of the submission


def wants_slurm(cluster: str) -> bool:
    """Whether ``cluster=`` (auto, slurm, local, print) means jobs, or the sight of them, and not processes here."""
    return cluster in ("slurm", "print") or (cluster == "auto" and slurm.is_here())


def run_tasks(words: Sequence[str], stage: str, tasks: int, rooms: Sequence[Mapping[str, str]]) -> int:
    """Every task of a stage as a process; 0, or 1 where one failed.

    ``rooms``: environment variables, beside those that are here, of each process that there is room for at once.
    """
    environment = {**os.environ, LAUNCHER: str(os.getpid())}
    free = SimpleQueue[Mapping[str, str]]()
    for room in rooms:
        free.put(room)

    def run(task: int) -> int:
        room, command = free.get(), [*words, f"stage={stage}", f"task={task}"]
        try:
            return subprocess.run(command, cwd=ROOT, env={**environment, **room}).returncode
        finally:
            free.put(room)

    with ThreadPoolExecutor(len(rooms)) as threads:
        failed = [task for task, code in enumerate(threads.map(run, range(tasks))) if code]
    if failed:
        print(f"{stage}: tasks {failed} of {tasks} failed; the same command goes on", file=sys.stderr)
    return 1 if failed else 0


def room_of_cores() -> list[dict[str, str]]:
    """A process for every core."""
    return [{}] * len(os.sched_getaffinity(0))


def room_of_models(gpus: Sequence[str] | None) -> list[dict[str, str]]:
    """A model on every GPU, or one where none is seen: torch may see what we do not, and decides.

    ``gpus=None``: on CPUs, one that has all cores, or as many as have OMP_NUM_THREADS each. Threads are not divided
    among tasks: they divide the sums of a matrix product, and so decide how it is rounded.
    """
    if gpus is not None:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}]
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    at_once = len(os.sched_getaffinity(0)) // int(threads) if threads.isdecimal() and int(threads) else 1
    return [{}] * max(at_once, 1)


def script(work: Work, stage: Stage, tasks: range, submission: Submission) -> str:
    """The batch script of one job or array: task ``tasks.start + i`` is its i-th job."""
    array = stage.tasks is not None
    logs = Path(work.logs) if work.logs else submission.folder
    log = logs / (f"{stage.name}-%A_%a.log" if array else f"{stage.name}-%j.log")
    directives = {"job-name": f"{work.name}-{stage.name}", "nodes": "1", "ntasks": "1", "output": str(log)}
    directives |= {"open-mode": "append", "requeue": "", "signal": f"B:USR2@{WARNING}"}
    if stage.gpus:
        directives["gpus-per-node"] = str(stage.gpus)
    directives |= site_directives(work.slurm)
    if array:
        directives["array"] = f"0-{len(tasks) - 1}"
    lines = [*header(directives), "set -eo pipefail"]
    lines += [f"cd {shlex.quote(str(submission.code))}  # the code as it was at submission", "export PYTHONPATH=$PWD"]
    step = container_step(work, submission)
    if not step:
        lines.append(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH")
    command = shlex.join([*step, *work.words, f"stage={stage.name}"])
    if array:
        command += f" task=$(({tasks.start} + SLURM_ARRAY_TASK_ID))"
    return "\n".join([*lines, f"exec bash sbatch/stage.sh {command}", ""])


def container_step(work: Work, submission: Submission) -> list[str]:
    """What stands before a script to run it in slurm.container, as training does; nothing without one."""
    if not work.slurm.container:
        return []
    places = [*work.places, os.environ.get("HPC_MM_SITE", "")]
    folders = {str(submission.run_folder), *(mounted(whole(place)) for place in places if place)}
    return [
        "srun",
        f"--container-image={work.slurm.container}",
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


def scripts(work: Work, stage: Stage, submission: Submission) -> dict[str, str]:
    """The stage's batch scripts by name: several where it has more tasks than the cluster takes in an array."""
    count = stage.tasks or 1
    longest = longest_array() if count > 1 else count
    found = {}
    for number, start in enumerate(range(0, count, longest)):
        tasks = range(start, min(start + longest, count))
        name = f"{stage.name}.sbatch" if count <= longest else f"{stage.name}-{number}.sbatch"
        found[name] = script(work, stage, tasks, submission)
    return found


def longest_array() -> int:
    """Jobs that an array may have here (MaxArraySize); 1000 where no Slurm is here to ask."""
    if not slurm.is_here():
        return 1000
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", slurm.ask("scontrol", "show", "config"), re.MULTILINE)
    return int(found.group(1)) if found else 1000


def queue(work: Work, cluster: str) -> dict[str, list[str]]:
    """Submit the stages, each after the one before has ended well; or show their scripts (cluster=print).

    Gives the jobs of every stage, of which it has several where an array has not room for all its tasks.
    """
    check_time(work.slurm.time)
    folder = Path(read_site().runs).expanduser().resolve() / work.folder
    if cluster == "print":
        submission = next_submission(folder)
        print("\n".join(text for stage in work.stages for text in scripts(work, stage, submission).values()))
        return {}
    if not slurm.is_here():
        raise ConfigError("cluster=slurm: sbatch is not on PATH; cluster=local runs here, cluster=print shows the jobs")
    with locked(folder):
        refuse_if_active(work)
        submission = next_submission(folder)
        texts = {stage.name: scripts(work, stage, submission) for stage in work.stages}
        files = {name: text for found in texts.values() for name, text in found.items()}
        for text in files.values():
            slurm.test(text)
        with frozen(submission, work.snapshot, files):
            pass
        paths = {stage: [submission.folder / name for name in found] for stage, found in texts.items()}
        try:
            jobs = chain.chained(paths, slurm.job_environment())
        except chain.Refused as error:
            raise ConfigError(str(error)) from None
    for stage, numbers in jobs.items():
        print(f"submitted {stage}: job {', '.join(numbers)}")
    every = " ".join(job for numbers in jobs.values() for job in numbers)
    print(f"  logs    {submission.folder}\n  cancel  scancel {every}")
    return jobs


def check_time(time: str) -> None:
    if 0 < slurm.minutes(time) <= LEAST_MINUTES:  # 0 is Slurm's word for no limit
        raise ConfigError(
            f"slurm.time={time} leaves no time to work: a task goes back into the queue {WARNING} s before its end; "
            f"give more than {LEAST_MINUTES} minutes"
        )


def refuse_if_active(work: Work) -> None:
    """Two jobs must not work on the same parts."""
    active = slurm.queued([f"{work.name}-{stage}" for stage in work.every])
    if active:
        job, _, stage = active[0].partition(" ")
        raise ConfigError(f"{stage} is in the queue: job {job}; scancel {job} ends it")


def run_stages(work: Work, cluster: str, task: int | None, run: Callable[[str], None]) -> int:
    """All stages of the work in their order; 0, or 1 where a task failed.

    ``task``: this process is that one of its stage. ``run``: does a stage, or its task, here.
    """
    if task is None and wants_slurm(cluster):
        queue(work, cluster)
        return 0
    if LAUNCHER in os.environ:
        die_with_parent(signal.SIGTERM)  # else work whose launcher was killed would go on beside the next one
    for stage in work.stages:
        tasks, rooms = shares(stage) if task is None else (1, ())
        if tasks > 1:
            words = [word for word in work.words if not word.startswith("tasks=")]
            code = run_tasks([sys.executable, *words, f"tasks={tasks}"], stage.name, tasks, rooms)
            if code:
                return code
            continue
        with ended_in_order():
            run(stage.name)
    return 0


def shares(stage: Stage) -> tuple[int, Sequence[Mapping[str, str]]]:
    """How many tasks of a stage there are here, and the room of each that runs at once.

    A task loads its model once and takes its share of all, so there are no more of these than there is room for.
    """
    tasks = stage.tasks or 1
    if tasks == 1 or not stage.model:
        return tasks, room_of_cores()
    rooms = room_of_models(visible_gpus() if stage.gpus else None)
    return min(tasks, len(rooms)), rooms
