"""Evaluations of a run's checkpoints while it trains, begun by what starts its ranks, never by a rank.

``scheduled`` has written at launch what is to do, with a mark for the step. The supervisor of a Slurm job submits it as
jobs of their own, the launcher of a local run starts it as a process beside the ranks. Whatever has no results is begun
once by each of them, so that what was lost to a kill is begun again when the run goes on. Plain Python 3.9.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_mm import chain, checkpoint
from hpc_mm.deadline import LAUNCHER

if TYPE_CHECKING:
    from hpc_mm.config import Run

FILE = "evaluate.json"  # of a submission
RESULTS = "results.json"
STEP = "@STEP@"  # stands for the step in what was written at launch
NICE = ("nice", "-n", "19")
# What jobs of training are told beside Slurm's own variables: threads and devices of a rank, torch, accelerate.
OF_TRAINING = re.compile(
    r"(OMP|PET|TORCHELASTIC|ACCELERATE|DS)_|(CUDA_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL)$"
)

Tell = Callable[[str], None]


def place_of(run_folder: Path, benchmark: str, step: int | str) -> Path:
    """Where an evaluation's results lie."""
    return run_folder / "eval" / benchmark / f"step-{step}"


def logs_of(run_folder: Path, benchmark: str, step: int | str) -> Path:
    return run_folder / "eval" / "logs" / f"{benchmark}-step-{step}"


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and how it is begun."""

    run_folder: Path
    every: int  # steps; 0 = never
    steps: int  # of the run, the last of which is evaluated too
    benchmarks: Mapping[str, Any]  # name -> what ``scheduled`` wrote of it

    def missing(self, step: int) -> list[str]:
        """Benchmarks whose results for a checkpoint are awaited."""
        if not self.every or (step % self.every and step != self.steps):
            return []
        return [name for name in self.benchmarks if not (place_of(self.run_folder, name, step) / RESULTS).exists()]

    def due(self) -> list[tuple[str, int]]:
        """Benchmark and step of what has no results, for every whole checkpoint that is there, oldest first."""
        if not self.every:
            return []
        steps = [checkpoint.step_of(path) for path in checkpoint.finished(self.run_folder)]
        return [(name, step) for step in steps for name in self.missing(step)]


def read_plan(run_folder: Path, submission: Path) -> Plan:
    try:
        values = json.loads((submission / FILE).read_text())
    except FileNotFoundError:
        return Plan(run_folder, 0, 0, {})
    return Plan(run_folder, **values)


def awaited(run: Run, run_folder: Path) -> Callable[[int], bool]:
    """Whether the checkpoint of a step has to stay for an evaluation."""
    plan = Plan(run_folder, run.evaluate.every, run.train.steps, run.evaluate.benchmarks)
    return lambda step: bool(plan.missing(step))


class Evaluations:
    """Those of a submission, each of which is begun once. ``tell`` takes a line for the log of training."""

    def __init__(self, run_folder: Path, submission: Path, tell: Tell) -> None:
        self.plan, self.tell = read_plan(run_folder, submission), tell
        self.begun: set[tuple[str, int]] = set()

    def next(self) -> tuple[str, int] | None:
        """What is begun now, if anything is due."""
        found = next((one for one in self.plan.due() if one not in self.begun), None)
        if found is not None:
            self.begun.add(found)
        return found


class Jobs(Evaluations):
    """As Slurm jobs of their own, submitted from the job that trains."""

    def update(self) -> None:
        """Submit what is due. A problem is a line of the log and no more."""
        while (found := self.next()) is not None:
            name, step = found
            try:
                self.submit(name, step)
            except (chain.Refused, OSError) as problem:
                self.tell(f"step {step} is not evaluated by {name}: {problem}")

    def submit(self, name: str, step: int) -> None:
        logs, values = logs_of(self.plan.run_folder, name, step), self.plan.benchmarks[name]
        if any(job.startswith(values["name"].replace(STEP, str(step)) + "-") for job in queued()):
            return  # by this run's job, before it was requeued or launched again
        logs.mkdir(parents=True, exist_ok=True)
        files: dict[str, list[Path]] = {}
        for stage, scripts in values["stages"].items():
            files[stage] = [logs / script for script in scripts]
            for script, text in scripts.items():
                (logs / script).write_text(text.replace(STEP, str(step)))
        jobs = chain.chained(files, environment())
        every = " ".join(job for numbers in jobs.values() for job in numbers)
        self.tell(f"step {step} is evaluated by {name}: jobs {every}, logs {logs}")


def queued() -> list[str]:
    """Names of this user's jobs in the queue; none where Slurm does not say."""
    try:
        answer = subprocess.run(["squeue", "--me", "--noheader", "-o", "%j"], capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        return []
    return answer.stdout.split("\n")


def environment() -> dict[str, str]:
    """What an evaluation's job takes over of the environment of the job that trains."""
    return {name: value for name, value in chain.outside().items() if not OF_TRAINING.match(name)}


class Processes(Evaluations):
    """As processes of this machine, of low priority, one after the other."""

    def __init__(self, run_folder: Path, submission: Path, tell: Tell, values: Mapping[str, str]) -> None:
        """``values``: environment variables of the run's first node."""
        super().__init__(run_folder, submission, tell)
        self.code, self.values = submission / "code", values
        self.process: subprocess.Popen[bytes] | None = None
        self.said = ""  # of the process: what it evaluates
        self.log = Path()

    def update(self) -> bool:
        """Begin the next one when the one before it has ended; whether one is under way."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return True
            self.process = None
            if code:
                self.tell(f"{self.said} failed (exit code {code}): {last_line(self.log)}; its log: {self.log}")
        found = self.next()
        if found is not None:
            try:
                self.begin(*found)
            except OSError as problem:
                self.tell(f"{self.said} could not begin: {problem}")
        return found is not None

    def begin(self, name: str, step: int) -> None:
        self.said = f"evaluating step {step} by {name}"
        self.log = logs_of(self.plan.run_folder, name, step).with_suffix(".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        words = [word.replace(STEP, str(step)) for word in self.plan.benchmarks[name]["command"]]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*NICE, *words],
                cwd=self.code,
                env={**os.environ, **self.values, LAUNCHER: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it ends with the ranks, not with a Ctrl-C that they still save after
            )


def last_line(file: Path) -> str:
    return next((line for line in reversed(file.read_text(errors="replace").splitlines()) if line.strip()), "")
