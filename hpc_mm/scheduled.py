"""Evaluations that a run asks for while it trains: checked at its launch, and written for ``evaluations`` to begin."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hpc_mm import answerer, checkpoint, judging, slurm
from hpc_mm.arrays import Work, check_time, scripts
from hpc_mm.benchmark import Benchmark, has_answers, shards_of
from hpc_mm.command import ROOT, Submission
from hpc_mm.config import ConfigError, Run, parse_arguments, unknown
from hpc_mm.data.shards import read_manifest
from hpc_mm.data.store import open_store
from hpc_mm.evaluate import Evaluation, options_of, script_words
from hpc_mm.evaluations import FILE, STEP, logs_of, place_of, read_plan
from hpc_mm.faithfulness import BENCHMARKS
from hpc_mm.judging import Judging
from hpc_mm.site import read_options
from hpc_mm.staged import PLAN, Staged

# Every evaluation's own.
FIXED = ("benchmark", "checkpoint", "step", "out", "stage", "task", "cluster", "watch", "name")
# Where training's jobs run, and so those of evaluation, unless they say it themselves.
AS_TRAINING = ("partition", "account", "qos", "constraint", "exclude", "container")


@dataclass(frozen=True)
class Scheduled:
    """One benchmark of a run: the words of its script, with STEP for the step, and what they say."""

    name: str
    options: Staged
    words: list[str]
    check_data: Callable[[], object]

    def work(self, run: Run, run_folder: Path) -> Work:
        stages = (PLAN, *self.options.stages)
        work = self.options.work(f"{run.name}-{self.name}-step-{STEP}", stages, self.words)
        return replace(work, logs=str(logs_of(run_folder, self.name, STEP)))


def check(run: Run, run_folder: Path) -> None:
    """Refuse benchmarks that are not for the run's model, and words that no script takes."""
    list(scheduled(run, run_folder))


def scheduled(run: Run, run_folder: Path) -> Iterator[Scheduled]:
    """What a run evaluates. ConfigError where its words are not what a script of eval/ takes."""
    family, asking = run.model.family, scripts_that_ask()
    judges = family == judging.FAMILY
    if not judges:
        answerer.check_family(run)
    known, others = (BENCHMARKS, asking) if judges else (asking, BENCHMARKS)
    for name, text in run.evaluate.benchmarks.items():
        if name in others:
            does = "judges images and answers no questions" if judges else "answers questions and judges no images"
            raise ConfigError(f"evaluate.benchmarks.{name}: model.family={family} {does}; known: {', '.join(known)}")
        if name not in known:
            raise unknown("benchmark evaluate.benchmarks", name, known)
        try:
            words = words_of(run, run_folder, name, text)
            yield judged(name, words) if judges else answered(asking[name], words)
        except (ConfigError, ValueError) as error:  # ValueError: of shlex
            raise ConfigError(f"evaluate.benchmarks.{name}={text!r}: {error}") from None


def scripts_that_ask() -> dict[str, Path]:
    """Scripts of eval/ that are of one benchmark each, by its name."""
    return {file.stem: file for file in sorted((ROOT / "eval").glob("*.py")) if file.name != judging.SCRIPT}


def words_of(run: Run, run_folder: Path, name: str, text: str) -> list[str]:
    """The words of a benchmark's script: a user's, and those that follow from the run."""
    words = shlex.split(text)
    given = parse_arguments(words)
    for key in FIXED:
        if key in given:
            raise ConfigError(f"{key}= is not to be given here: it follows from the run and its checkpoints")
    values = run.slurm.model_dump()
    words += [f"slurm.{key}={values[key]}" for key in AS_TRAINING if values[key] and f"slurm.{key}" not in given]
    return [f"checkpoint={run_folder}", f"step={STEP}", f"out={place_of(run_folder, name, STEP)}", *words]


def judged(name: str, words: list[str]) -> Scheduled:
    words = [f"benchmark={name}", *words]
    options: Judging = read_options(Judging, words).located(name, STEP)
    return Scheduled(name, options, options.again(judging.SCRIPT, words), partial(judging.read, options))


def answered(script: Path, words: list[str]) -> Scheduled:
    stated = runpy.run_path(str(script), run_name=script.stem)
    benchmark: Benchmark = stated["BENCHMARK"]
    options = options_of(benchmark, words, stated.get("VALUES", {})).located(script.stem, STEP)
    again = script_words(words, options, script.name)
    return Scheduled(script.stem, options, again, partial(check_answers, benchmark, options))


def check_answers(benchmark: Benchmark, options: Evaluation) -> None:
    """There are shards of the splits, with answers by which a score can be had."""
    data, split = options.data, options.split
    shards_of(read_manifest(open_store(data)), benchmark.demonstrations, data)
    if not has_answers(data, split, benchmark):
        raise ConfigError(
            f"evaluate.benchmarks.{benchmark.name}: the answers of split={split} are not public, so {data} gives no "
            f"scores while training goes on; eval/{benchmark.name}.py by hand writes the file for the challenge's "
            "server"
        )


def check_data(run: Run, run_folder: Path) -> None:
    """The data of every benchmark are there."""
    for one in scheduled(run, run_folder):
        one.check_data()


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
