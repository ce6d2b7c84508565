"""The cluster: what it has, what it would refuse, and the way into its queue (through submitit)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from hpc_mm.chain import one_line, outside
from hpc_mm.command import Submission
from hpc_mm.config import ConfigError, Run, unknown
from hpc_mm.site import SBATCH_VARIABLES

# sbatch puts these above what a script says; the run's own values and log files must win.
DECIDED_HERE = {"SBATCH_JOB_NAME", "SBATCH_GPUS_PER_NODE", "SBATCH_OUTPUT", "SBATCH_ERROR", "SBATCH_OPEN_MODE"}
LEAST_MINUTES = 3  # a start, a step, and what deadline.py keeps for a save that it has not measured yet


def is_here() -> bool:
    return shutil.which("sbatch") is not None


def ask(*words: str) -> str:
    answer = subprocess.run(words, capture_output=True, text=True)
    if answer.returncode:
        raise ConfigError(f"Slurm does not answer {' '.join(words)!r}: {one_line(answer.stderr)}")
    return answer.stdout


def queued(names: Sequence[str]) -> list[str]:
    """This user's jobs of these names in the queue: id and name of each."""
    return ask("squeue", "--me", "--noheader", f"--name={','.join(names)}", "-o", "%i %j").splitlines()


def check(run: Run, script: str) -> None:
    """Refuse what the cluster could never start: partition, time limit, nodes, GPUs, and all that sbatch checks."""
    if not is_here():
        raise ConfigError("cluster=slurm: sbatch is not on PATH; cluster=local runs here, cluster=print shows the job")
    if 0 < minutes(run.slurm.time) < LEAST_MINUTES:  # 0 is Slurm's word for no limit
        raise ConfigError(f"slurm.time={run.slurm.time} leaves no time to save: {LEAST_MINUTES} minutes are the least")
    partitions = _partitions()
    names = (
        run.slurm.partition.split(",")
        if run.slurm.partition
        else [n for n, p in partitions.items() if p["Default"] == "YES"]
    )
    if not names:
        raise ConfigError(
            f"this cluster has no default partition: set slurm.partition to one of {', '.join(sorted(partitions))}"
        )
    problems = []
    for name in names:
        if name not in partitions:
            raise unknown("slurm.partition", name, partitions)
        try:
            _check_partition(run, name, partitions[name])
        except ConfigError as error:
            problems.append(error)
    if len(problems) == len(names):  # Slurm starts a job in any one of several partitions
        raise problems[0]
    test(script)


def test(script: str) -> None:
    """All that sbatch itself checks of a batch script."""
    words = ["sbatch", "--test-only"]
    answer = subprocess.run(words, input=script, env=job_environment(), capture_output=True, text=True)
    if answer.returncode:
        raise ConfigError(f"sbatch would refuse this job: {one_line(answer.stderr)}")


def _partitions() -> dict[str, dict[str, str]]:
    """Partition name -> Slurm's own words about it: Default, MaxTime, TotalNodes, ..."""
    lines = ask("scontrol", "show", "partition", "-a", "-o").splitlines()
    found = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    return {values["PartitionName"]: values for values in found if "PartitionName" in values}


def _check_partition(run: Run, name: str, partition: dict[str, str]) -> None:
    limit = partition["MaxTime"]
    if limit != "UNLIMITED" and minutes(run.slurm.time) > minutes(limit):
        raise ConfigError(f"slurm.time={run.slurm.time} is over the limit of partition {name}: {limit}")
    most = min(int(partition[key]) for key in ("TotalNodes", "MaxNodes") if partition[key].isdigit())
    if run.nodes > most:
        raise ConfigError(f"nodes={run.nodes}: partition {name} gives a job at most {most}")
    if run.gpus_per_node and "gpu" not in ask("sinfo", "--noheader", "-p", name, "-o", "%G"):
        raise ConfigError(f"gpus_per_node={run.gpus_per_node}: partition {name} has no GPUs (0 trains on CPU)")


def minutes(time: str) -> float:
    """Slurm's ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` and ``D-H:M:S``, in minutes."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, mins, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:
        hours, mins, seconds = 0, *[*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def job_environment() -> dict[str, str]:
    """What sbatch, and so the job, sees of the environment: not what is already folded into the script."""
    gone = DECIDED_HERE | set(SBATCH_VARIABLES)
    return {name: value for name, value in outside().items() if name not in gone}


def refuse_if_active(last: Submission | None) -> None:
    """A run whose last job still waits or runs must not be started twice."""
    if last is None or not (last.folder / "job.sbatch").exists():
        return
    file, folder = last.folder / "job_id", last.run_folder
    if not file.exists() and not is_here():
        raise ConfigError(f"run {folder} has a Slurm job without an id, and no Slurm is here to say what became of it")
    job = file.read_text().strip() if file.exists() else find(last)
    if not job:
        return  # sbatch was never reached
    if not is_here():
        raise ConfigError(f"run {folder} is Slurm's job {job}, and no Slurm is here to say whether it has ended")
    answer = subprocess.run(["squeue", "--noheader", "-j", job, "-o", "%T"], capture_output=True, text=True)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise ConfigError(f"Slurm does not say whether job {job} has ended: {one_line(answer.stderr)}")
    if answer.stdout.strip():
        raise ConfigError(
            f"run {folder} is in the queue: job {job} is {answer.stdout.split()[0]}; scancel {job} ends it"
        )


def find(submission: Submission) -> str | None:
    """Id of a job in the queue that nobody noted: the launcher was killed between sbatch and writing it down."""
    name, script = submission.run_folder.name, str(submission.folder / "job.sbatch")
    for line in ask("squeue", "--me", "--noheader", f"--name={name}", "-o", "%i %o").splitlines():
        job, _, command = line.partition(" ")
        if command.strip() == script:
            return job
    return None


def submit(script: str, run: Run, submission: Submission) -> str:
    """Hand the script to sbatch through submitit; the job's id, which is kept in the submission's folder."""
    import submitit

    file = submission.folder / "job.sbatch"

    class Script(submitit.SlurmExecutor):  # type: ignore[misc]
        """submitit with our own script (its own would hide the command in a pickle) and a clean environment."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return command

        def _make_submission_command(self, submission_file_path: object) -> list[str]:
            gone = [word for name in sorted(set(os.environ) - set(job_environment())) for word in ("-u", name)]
            return ["env", *gone, "sbatch", str(file)]

    executor = Script(folder=submission.folder / "submitit")
    executor.update_parameters(nodes=run.nodes)
    executor.folder.mkdir(exist_ok=True)
    try:
        job = str(executor._submit_command(script).job_id)
    except submitit.core.utils.FailedJobError as error:  # sbatch refused, or said what submitit cannot read
        queued = find(submission)
        if queued is None:
            raise ConfigError(f"sbatch refused the job: {one_line(str(error))}") from None
        job = queued
    (submission.folder / "job_id").write_text(f"{job}\n")
    return job
