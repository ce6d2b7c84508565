"""Evaluations of a run's checkpoints while it trains, begun by what starts its ranks, never by a rank.

``scheduled`` has written at launch what is to do, with a mark for the step. The supervisor of a Slurm job submits it as
jobs of their own, the launcher of a local run starts it as a process beside the ranks. Whatever has no results is begun
once by each of them, so that what was lost to a kill is begun again when the run goes on; of what ended without results
the log has a line. Plain Python 3.9.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_mm import chain, checkpoint
from hpc_mm.deadline import LAUNCHER

FILE = "evaluate.json"  # of a submission
FOLDER = "eval"  # of a run, where evaluations leave their results
RESULTS = "results.json"
STEP = "@STEP@"  # stands for the step in what was written at launch
LOOK = 30  # seconds between two looks at the queue for evaluations that are under way
HERE = "cluster=local"  # of a script's words: not as jobs
NICE = ("nice", "-n", "19")
# What jobs of training are told beside Slurm's own variables: threads and devices of a rank, torch, accelerate.
OF_TRAINING = re.compile(
    r"(OMP|PET|TORCHELASTIC|ACCELERATE|DS)_|(CUDA_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL)$"
)

PROBLEMS = (chain.Refused, OSError, ValueError, subprocess.SubprocessError)  # of evaluation, not of training
Tell = Callable[[str], None]


def place_of(run_folder: Path, benchmark: str, step: int | str) -> Path:
    """Where an evaluation's results lie."""
    return run_folder / FOLDER / benchmark / f"step-{step}"


def logs_of(run_folder: Path, benchmark: str, step: int | str) -> Path:
    return run_folder / FOLDER / "logs" / f"{benchmark}-step-{step}"


@dataclass(frozen=True)
class Plan:
    """What is evaluated, and how it is begun."""

    run_folder: Path
    every: int  # steps; 0 = never
    steps: int  # of the run, the last of which is evaluated too
    benchmarks: Mapping[str, Any]  # name -> what ``scheduled`` wrote of it

    def missing(self, step: int) -> list[str]:
        """Benchmarks whose results for a checkpoint are awaited: none of those of before they were asked for."""
        if not self.every or (step % self.every and step != self.steps):
            return []
        asked = [name for name, values in self.benchmarks.items() if step >= values["since"]]
        return [name for name in asked if not self.has_results(name, step)]

    def has_results(self, name: str, step: int) -> bool:
        return os.path.exists(place_of(self.run_folder, name, step) / RESULTS)  # Path.exists raises on a stale handle

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


def awaited(run_folder: Path, submission: Path) -> Callable[[int], bool]:
    """Whether the checkpoint of a step has to stay for an evaluation."""
    plan = read_plan(run_folder, submission)
    return lambda step: bool(plan.missing(step))


class Evaluations:
    """Those of a submission, each of which is begun once. ``tell`` takes a line for the log of training."""

    def __init__(self, run_folder: Path, submission: Path, tell: Tell) -> None:
        self.plan, self.tell = read_plan(run_folder, submission), tell
        self.code = submission / "code"
        self.begun: set[tuple[str, int]] = set()
        self.told: set[str] = set()  # problems

    def update(self) -> bool:
        """Begin what is due, tell of what has failed; whether a process is under way.

        A problem is a line of the log, once, and no more.
        """
        try:
            return self.advance()
        except PROBLEMS as problem:
            if str(problem) not in self.told:
                self.told.add(str(problem))
                self.tell(f"evaluations: {problem}")
            return False

    def advance(self) -> bool:
        raise NotImplementedError

    def next(self) -> tuple[str, int] | None:
        """What is begun now, if anything is due."""
        found = next((one for one in self.plan.due() if one not in self.begun), None)
        if found is not None:
            self.begun.add(found)
        return found

    def words(self, name: str, step: int) -> list[str]:
        """The command of an evaluation as a process."""
        return [word.replace(STEP, str(step)) for word in self.plan.benchmarks[name]["command"]]

    def by_hand(self, words: Sequence[str]) -> str:
        code = shlex.quote(str(self.code))
        return f"by hand: cd {code} && PYTHONPATH={code} {shlex.join(words)}"


class Jobs(Evaluations):
    """As Slurm jobs of their own, submitted from the job that trains."""

    def __init__(self, run_folder: Path, submission: Path, tell: Tell) -> None:
        super().__init__(run_folder, submission, tell)
        self.under_way: dict[tuple[str, int], bool] = {}  # without results: whether the last look found no job of it
        self.looked: float = -LOOK  # when, in seconds of the monotonic clock

    def advance(self) -> bool:
        """Submit all that is due, and look for what has failed."""
        while (found := self.next()) is not None:
            name, step = found
            try:
                self.submit(name, step)
            except PROBLEMS as problem:
                self.tell(f"step {step} is not evaluated by {name}: {problem}")
            else:
                self.under_way[found] = False
        if self.under_way and time.monotonic() - self.looked >= LOOK:
            self.look()
        return False

    def look(self) -> None:
        """Tell of each evaluation that has neither jobs nor results any more.

        Two looks must find that, because a file system may show late what another node wrote.
        """
        self.looked, jobs = time.monotonic(), queued()
        for found, gone in list(self.under_way.items()):
            if self.plan.has_results(*found):
                del self.under_way[found]
            elif jobs is None or self.has_job(*found, jobs):
                self.under_way[found] = False
            elif not gone:
                self.under_way[found] = True
            else:
                del self.under_way[found]
                name, step = found
                words = [word for word in self.words(name, step) if word != HERE]
                logs = logs_of(self.plan.run_folder, name, step)
                self.tell(f"evaluating step {step} by {name} ended without results; logs {logs}; {self.by_hand(words)}")

    def has_job(self, name: str, step: int, jobs: Sequence[str]) -> bool:
        start = self.plan.benchmarks[name]["name"].replace(STEP, str(step)) + "-"
        return any(job.startswith(start) for job in jobs)

    def submit(self, name: str, step: int) -> None:
        logs, values = logs_of(self.plan.run_folder, name, step), self.plan.benchmarks[name]
        if self.has_job(name, step, queued() or ()):
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


def queued() -> list[str] | None:
    """Names of this user's jobs in the queue; None where Slurm does not say."""
    try:
        answer = subprocess.run(["squeue", "--me", "--noheader", "-o", "%j"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if answer.returncode else answer.stdout.decode(errors="replace").split("\n")


def environment() -> dict[str, str]:
    """What an evaluation's job takes over of the environment of the job that trains."""
    return {name: value for name, value in chain.outside().items() if not OF_TRAINING.match(name)}


class Processes(Evaluations):
    """As processes of this machine, of low priority, one after the other."""

    def __init__(self, run_folder: Path, submission: Path, tell: Tell, values: Mapping[str, str]) -> None:
        """``values``: environment variables of the run's first node."""
        super().__init__(run_folder, submission, tell)
        self.values = values
        self.process: subprocess.Popen[bytes] | None = None
        self.command: list[str] = []
        self.said = ""  # of the process: what it evaluates
        self.log = Path()

    def advance(self) -> bool:
        """Begin the next one when the one before it has ended."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return True
            self.process = None
            if code:
                why = f"(exit code {code}): {last_line(self.log)}; its log: {self.log}"
                self.tell(f"{self.said} failed {why}; {self.by_hand(self.command)}")
        found = self.next()
        if found is not None:
            try:
                self.begin(*found)
            except PROBLEMS as problem:
                self.tell(f"{self.said} could not begin: {problem}")
        return found is not None

    def begin(self, name: str, step: int) -> None:
        self.said = f"evaluating step {step} by {name}"
        self.log = logs_of(self.plan.run_folder, name, step).with_suffix(".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.command = self.words(name, step)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*NICE, *self.command],
                cwd=self.code,
                env={**os.environ, **self.values, LAUNCHER: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it ends with the ranks, not with a Ctrl-C that they still save after
            )


def last_line(file: Path) -> str:
    return next((line for line in reversed(file.read_text(errors="replace").splitlines()) if line.strip()), "")
