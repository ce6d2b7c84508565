"""Evaluations that a run asks for while it trains: checked at its launch, and written for ``evaluations`` to begin."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_mm import answerer, checkpoint, slurm
from hpc_mm.arrays import Stage, Work, check_time, scripts
from hpc_mm.benchmark import Benchmark, has_answers, shards_of
from hpc_mm.command import ROOT, Submission
from hpc_mm.config import ConfigError, Run, parse_arguments, unknown
from hpc_mm.data.shards import read_manifest
from hpc_mm.data.store import open_store
from hpc_mm.evaluate import PLAN, SHARED, Evaluation, options_of, script_words
from hpc_mm.evaluations import FILE, STEP, logs_of, place_of, read_plan
from hpc_mm.site import in_store, read_site

# Every evaluation's own.
FIXED = ("checkpoint", "step", "out", "stage", "task", "cluster", "watch", "name")
# Where training's jobs run, and so those of evaluation, unless they say it themselves.
AS_TRAINING = ("partition", "account", "qos", "constraint", "exclude", "container")


@dataclass(frozen=True)
class Scheduled:
    """One benchmark of a run: what it is, and the words of its script, with STEP for the step."""

    name: str  # of the script
    benchmark: Benchmark
    options: Evaluation
    words: list[str]

    def work(self, run: Run, run_folder: Path) -> Work:
        options, name = self.options, self.name
        stages = [Stage(stage, options.tasks, options.gpus) if stage in SHARED else Stage(stage) for stage in self.all]
        places = [options.checkpoint, options.data, options.out]
        logs = str(logs_of(run_folder, name, STEP))
        return Work(f"{run.name}-{name}-step-{STEP}", "", stages, (), self.words, places, (), options.slurm, logs)

    @property
    def all(self) -> tuple[str, ...]:
        return (PLAN, *self.options.stages)


def check(run: Run, run_folder: Path) -> None:
    """Refuse a model that writes no answers, and words that no script takes."""
    answerer.check_family(run)
    list(scheduled(run, run_folder))


def scheduled(run: Run, run_folder: Path) -> Iterator[Scheduled]:
    """What a run evaluates. ConfigError where its words are not what a script of eval/ takes."""
    known = {file.stem: file for file in (ROOT / "eval").glob("*.py")}
    for name, text in run.evaluate.benchmarks.items():
        if name not in known:
            raise unknown("benchmark evaluate.benchmarks", name, known)
        try:
            yield read(run, run_folder, known[name], text)
        except (ConfigError, ValueError) as error:  # ValueError: of shlex
            raise ConfigError(f"evaluate.benchmarks.{name}={text!r}: {error}") from None


def read(run: Run, run_folder: Path, script: Path, text: str) -> Scheduled:
    words = shlex.split(text)
    given = parse_arguments(words)
    for key in FIXED:
        if key in given:
            raise ConfigError(f"{key}= is not to be given here: it follows from the run and its checkpoints")
    values = run.slurm.model_dump()
    words += [f"slurm.{key}={values[key]}" for key in AS_TRAINING if values[key] and f"slurm.{key}" not in given]
    stated = runpy.run_path(str(script), run_name=script.stem)
    if "BENCHMARK" not in stated:
        raise ConfigError(f"eval/{script.name} asks no questions that a run can be evaluated by while it trains")
    benchmark: Benchmark = stated["BENCHMARK"]
    place = place_of(run_folder, script.stem, STEP)
    fixed = [f"checkpoint={run_folder}", f"step={STEP}", f"out={place}"]
    options = options_of(benchmark, [*fixed, *words], stated.get("VALUES", {}))
    options = options.model_copy(update={"data": in_store(options.data, read_site().store)})
    return Scheduled(script.stem, benchmark, options, script_words([*fixed, *words], options, script.name))


def check_data(run: Run, run_folder: Path) -> None:
    """Every benchmark has shards of its splits, with answers by which a score can be had."""
    for one in scheduled(run, run_folder):
        data, split = one.options.data, one.options.split
        shards_of(read_manifest(open_store(data)), one.benchmark.demonstrations, data)
        if not has_answers(data, split, one.benchmark):
            raise ConfigError(
                f"evaluate.benchmarks.{one.name}: the answers of split={split} are not public, so {data} gives no "
                f"scores while training goes on; eval/{one.name}.py by hand writes the file for the challenge's server"
            )


def check_jobs(run: Run, submission: Submission) -> None:
    """Slurm would take the jobs."""
    for one in scheduled(run, submission.run_folder):
        check_time(one.options.slurm.time)
        work = one.work(run, submission.run_folder)
        for stage in work.stages:
            for text in scripts(work, stage, submission).values():
                slurm.test(text.replace(STEP, "0"))


def texts(run: Run, submission: Submission) -> dict[str, str]:
    """``evaluate.json`` of a submission.

    A benchmark that no submission of the run has evaluated before is evaluated from the newest checkpoint on: earlier
    ones, however many are kept, were written when nobody had asked for their scores.
    """
    before: dict[str, Any] = {}
    for number in range(1, submission.number):
        before |= read_plan(submission.run_folder, Submission(submission.run_folder, number).folder).benchmarks
    newest = max(map(checkpoint.step_of, checkpoint.finished(submission.run_folder)), default=0)
    benchmarks = {}
    for one in scheduled(run, submission.run_folder):
        work = one.work(run, submission.run_folder)
        benchmarks[one.name] = {
            "name": work.name,
            "since": before.get(one.name, {}).get("since", newest),
            "command": [sys.executable, "-u", *one.words],
            "stages": {stage.name: scripts(work, stage, submission) for stage in work.stages},
        }
    values = {"every": run.evaluate.every, "steps": run.train.steps, "benchmarks": benchmarks}
    return {FILE: json.dumps(values, indent=1)}
