"""What eval/ scripts call: a checkpoint's answers to a benchmark's questions, in parts by any number of tasks, scored.

``plan`` fixes questions and demonstrations, ``features`` makes images comparable (similar demonstrations alone need
it), ``answer`` is the model's work, ``collect`` scores. Each skips what is done, so any of them is simply run again.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hpc_mm import answerer, results, trials
from hpc_mm.arrays import Stage, Work
from hpc_mm.benchmark import Benchmark, Decoding, questions, shards_of
from hpc_mm.checkpoint import LATEST
from hpc_mm.config import ConfigError, Part, Positive, Run, Slurm, parse_arguments, read_run
from hpc_mm.data.shards import read_manifest
from hpc_mm.data.store import MissingKey, StoreDown, StoreError, open_store, whole
from hpc_mm.demonstrations import QUERY_SET
from hpc_mm.evaluations import FOLDER, HERE
from hpc_mm.predictions import SIZE, parts_to_do
from hpc_mm.protocol import RICES
from hpc_mm.rules import OPENFLAMINGO, rules_of
from hpc_mm.scoring import metric_of
from hpc_mm.similarity import Encoder, compute, shards_to_do
from hpc_mm.site import in_store, read_options, read_site
from hpc_mm.staged import run_stages
from hpc_mm.trials import Choice, Planned, Pool, Trial

PLAN, FEATURES, ANSWER, COLLECT = STAGES = ("plan", "features", "answer", "collect")
SHARED = (FEATURES, ANSWER)  # stages that several tasks divide
SNAPSHOT = ("hpc_mm", "eval", "sbatch")  # what a job reads of the checkout
Whole = Annotated[int, Field(ge=0)]


class Evaluation(Part):
    """What every eval/ script takes. ``split`` and ``decoding`` are the script's, unless they are given."""

    checkpoint: str = Field(description="folder of a run, or of weights that hpc_mm.export wrote")
    step: str = Field(LATEST, description="of the run's checkpoints: latest, a number, or 0 = before training")
    data: str = Field(description="shards that data_prep/ wrote: an address, or a name inside the site's store")
    split: str = Field(description="whose questions are asked")
    samples: Whole = Field(0, description="questions, as good as drawn at random; 0 = all")
    shots: tuple[Whole, ...] = Field((4,), description="demonstrations; 0 = two without their images")
    selection: Literal["random", "rices"] = Field("random", description="rices = demonstrations with similar images")
    seeds: tuple[Whole, ...] = Field((42,), description="of random demonstrations, a trial each")
    query_set: Positive = Field(QUERY_SET, description="training questions that random demonstrations come from")
    rices: Encoder = Field(Encoder(), description="what makes images similar")
    decoding: Decoding = Field(description="how answers are searched for")
    rules: tuple[str, ...] = Field((OPENFLAMINGO.name,), description="by whose rules answers are scored")
    precision: Literal["run", "bf16", "fp32"] = Field("run", description="of the arithmetic; run = as in training")
    batch: Positive = Field(32, description="questions answered at once")
    keep_mb: Positive = Field(1024, description="image features kept on the device, MiB")
    part: Positive = Field(SIZE, description="questions of a part, which is done or not done as a whole")
    out: str = Field("", description="folder or store of the results; empty = eval/ in the checkpoint's folder")
    examples: Whole = Field(60, description="questions on the page of results, of every trial; 0 = no page")
    stage: Literal["all", "plan", "features", "answer", "collect"] = Field("all", description="what to do")
    tasks: Positive = Field(1, description="jobs that share the work")
    task: int | None = Field(None, ge=0, description="which of them this is, from 0; none = all of them")
    cluster: Literal["auto", "slurm", "local", "print"] = Field("auto", description="auto = Slurm where sbatch is")
    watch: bool = Field(False, description="show how far it is, and scores so far, until all is done")
    gpus: int = Field(1, ge=0, le=1, description="GPUs of a job; 0 = it runs on CPUs")
    name: str = Field("", description="of the Slurm jobs; empty = run, benchmark and step")
    slurm: Slurm = Field(Slurm(), description="what sbatch is told")

    @field_validator("shots", "seeds", "rules")
    @classmethod
    def some_and_none_twice(cls, values: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if not values:
            raise ValueError("give one or more")
        if len(set(values)) < len(values):
            raise ValueError("one is there twice")
        return values

    @field_validator("rules")
    @classmethod
    def rules_are_known(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        for name in rules:
            rules_of(name)
        return rules

    @model_validator(mode="after")
    def a_task_is_of_one_stage(self) -> Evaluation:
        if self.task is not None and self.stage not in SHARED:
            raise ValueError(f"task={self.task} is of one stage: give stage={' or stage='.join(SHARED)} too")
        if self.task is not None and self.task >= self.tasks:
            raise ValueError(f"task={self.task}: tasks={self.tasks} are numbered from 0 to {self.tasks - 1}")
        return self

    @property
    def plans(self) -> bool:
        return self.stage in ("all", PLAN) and not self.watch

    @property
    def choice(self) -> Choice:
        similar = self.selection == RICES
        return Choice(self.shots, () if similar else self.seeds, self.query_set, self.rices.name if similar else "")

    @property
    def stages(self) -> tuple[str, ...]:
        """Those after planning."""
        if self.stage != "all":
            return (self.stage,)
        return STAGES[1:] if self.selection == RICES else STAGES[2:]


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None, **values: Any) -> int:
    """The command line of an eval/ script: 0, 1 where a task failed, 2 after one line about a user's mistake.

    ``values``: the script's own, of Evaluation: what it calls VALUES, where ``scheduled`` reads them too.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = options_of(benchmark, words, values)
        asked = benchmark.model_copy(update={"split": options.split, "decoding": options.decoding})
        weights = found(options)
        options = located(options, asked, weights.step if weights else options.step)
        if options.watch:
            from hpc_mm.watch import watch

            planned = trials.read(options.out, options.choice)
            return watch(planned, asked, options.rules, jobs_of(options, asked, planned))
        if options.plans and options.cluster != "print":
            plan(options, asked)
        return run(options, asked, words) if options.stage != PLAN else 0
    except (ConfigError, StoreError, MissingKey, StoreDown, OSError) as error:  # OSError: of disks
        print(str(error) or repr(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the way to leave watching, too
        return 128 + signal.SIGINT


def options_of(benchmark: Benchmark, words: Sequence[str], values: Mapping[str, Any]) -> Evaluation:
    """The words of a command over the script's own values, these over its benchmark's.

    ConfigError where something of it would count for nothing.
    """
    own = {"split": benchmark.split, "decoding": benchmark.decoding.model_dump(), **values}
    options: Evaluation = read_options(Evaluation, words, own)
    if options.selection != RICES:
        return options
    options.rices.check()
    given = parse_arguments(words)
    for key in ("seeds", "query_set"):
        if key in given:
            raise ConfigError(f"{key}={given[key]} is of random demonstrations, and selection={RICES}: leave it out")
    return options


def found(options: Evaluation) -> answerer.Weights | None:
    """The weights where they are to be looked for, by sizes alone: the same ones for every stage.

    ConfigError where they are of no model that answers.
    """
    if not options.plans and options.out:
        return None
    weights = answerer.find(options.checkpoint, options.step, digests=False)
    answerer.check_family(weights.run)
    return weights


def located(options: Evaluation, benchmark: Benchmark, step: str) -> Evaluation:
    """With whole addresses, the number of the step, and a place for results, so that jobs see what is seen here."""
    folder = str(Path(options.checkpoint).expanduser().absolute())
    out = options.out or f"{folder}/{FOLDER}/{benchmark.name}/step-{step}"
    data = in_store(options.data, read_site().store)
    update = {"checkpoint": folder, "step": step, "out": whole(out), "data": data}
    return options.model_copy(update=update)


# ---------------------------------------------------------------- the stages


def plan(options: Evaluation, benchmark: Benchmark) -> Planned:
    """Fix the work list. All that a user may have got wrong is told here, before anything is queued, but for prompts
    that are too long for the model: they take its tokenizer, and each task looks at the longest before it begins."""
    metric_of(benchmark.metric)
    asked = questions(options.data, benchmark.split, benchmark)
    pool = questions(options.data, benchmark.demonstrations, benchmark)
    known = Pool.of(benchmark, pool)
    benchmark = trials.with_classes(benchmark, known)
    planned = Planned(options.out, options.choice, trials.some_of(asked, options.samples), known, {})
    shown = options.choice.shown(pool)
    trials.check(benchmark, planned, shown)
    if OPENFLAMINGO.name in options.rules:
        results.check_tools(benchmark)
    weights = answerer.find(options.checkpoint, options.step)  # every byte is read, when all else is right
    trials.save(planned, shown, benchmark, work_of(options, weights), options.part)
    parts = sum(plan.parts for plan in planned.plans.values())
    print(
        f"{benchmark.name} {benchmark.split}: {len(planned.questions)} questions x {len(planned.plans)} trials in "
        f"{parts} parts, demonstrations from {len(pool)} of {benchmark.demonstrations}"
    )
    return planned


def work_of(options: Evaluation, weights: answerer.Weights) -> dict[str, Any]:
    """What decides predictions beside the protocol. In bf16 rounding depends on the prompts of a batch, and shows."""
    precision = precision_of(options, weights.run)
    batch = {"batch": options.batch} if precision == "bf16" else {}
    return {"step": weights.step, "weights": weights.digest, "data": options.data, "precision": precision, **batch}


def precision_of(options: Evaluation, trained: Run) -> Literal["bf16", "fp32"]:
    return trained.precision if options.precision == "run" else options.precision


def answer(options: Evaluation, benchmark: Benchmark) -> None:
    """This task's parts of all trials."""
    planned = trials.read(options.out, options.choice)
    benchmark = trials.with_classes(benchmark, planned.pool)
    todo = parts_of(planned, options.task or 0, options.tasks if options.task is not None else 1)
    if not todo:
        print("nothing is left to answer here")
        return
    from hpc_mm.asking import ask

    step = planned.step if options.step == LATEST else options.step
    weights = answerer.find(options.checkpoint, step, digests=False)  # whoever planned has verified them
    trials.refuse_other(planned, benchmark, work_of(options, weights))
    precision = precision_of(options, weights.run)
    device = answerer.device_of(options.task, options.gpus)
    running = answerer.Running(precision, options.batch, options.keep_mb * 2**20, device)
    ask(answerer.load(weights, running), benchmark, planned, todo, options.data, options.rices)


def parts_of(planned: Planned, task: int, tasks: int) -> list[tuple[Trial, int]]:
    """A task's parts that are not done: every ``tasks``-th of those of all trials, one after the other."""
    todo, before = [], 0
    for trial, plan in planned.plans.items():
        mine = parts_to_do(planned.store(trial), plan, (task - before) % tasks, tasks)
        todo += [(trial, part) for part in mine]
        before += plan.parts
    return todo


def features(options: Evaluation, benchmark: Benchmark) -> None:
    """Image features of this task's shards, where demonstrations are chosen by them."""
    store, task = open_store(options.data), options.task or 0
    every = read_manifest(store)
    shards = [
        shard.name
        for split in dict.fromkeys((benchmark.split, benchmark.demonstrations))
        for shard in shards_of(every, split, options.data)
    ]
    todo = shards_to_do(store, shards, options.rices, task, options.tasks if options.task is not None else 1)
    compute(store, todo, options.rices, answerer.device_of(options.task, options.gpus))
    print(f"features of {len(todo)} shards were made here, {len(shards)} are wanted")


def collect(options: Evaluation, benchmark: Benchmark) -> None:
    """Merge the parts of every trial, score them, and write results and page."""
    planned = trials.read(options.out, options.choice)
    benchmark = trials.with_classes(benchmark, planned.pool)
    step = planned.step if options.step == LATEST else options.step
    trials.refuse_other(planned, benchmark, {"step": step, "data": options.data})
    origin = results.Origin(options.data, options.checkpoint, step)
    if not results.collect(planned, benchmark, options.rules, origin):
        return
    if options.examples:
        from hpc_mm.showcase import write_page

        print(write_page(planned, benchmark, options.rules[0], options.data, options.rices, options.examples))
    results.track(read_run(Path(options.checkpoint)), benchmark, planned, origin)


def run_stage(stage: str, options: Evaluation, benchmark: Benchmark) -> None:
    {FEATURES: features, ANSWER: answer, COLLECT: collect}[stage](options, benchmark)


# ---------------------------------------------------------------- where they run


def run(options: Evaluation, benchmark: Benchmark, words: Sequence[str]) -> int:
    """The stages after planning, as jobs or here."""
    stages = [
        Stage(stage, options.tasks, options.gpus) if stage in SHARED else Stage(stage) for stage in options.stages
    ]
    places = [options.checkpoint, options.data, options.out]
    name = job_name(options, benchmark, options.step)
    again = script_words(words, options)
    work = Work(name, f"eval-{name}", stages, STAGES[1:], again, places, SNAPSHOT, options.slurm)
    return run_stages(work, options.cluster, options.task, lambda stage: run_stage(stage, options, benchmark))


def job_name(options: Evaluation, benchmark: Benchmark, step: str) -> str:
    """Of the Slurm jobs, before their stage."""
    return options.name or f"{Path(options.checkpoint).name}-{benchmark.name}-step-{step}"


def jobs_of(options: Evaluation, benchmark: Benchmark, planned: Planned) -> list[str]:
    """Names of the Slurm jobs whose work is watched; none where this command would run here."""
    from hpc_mm import slurm

    if options.cluster not in ("auto", "slurm") or not slurm.is_here():
        return []
    name = job_name(options, benchmark, planned.step)
    return [f"{name}-{stage}" for stage in options.stages if stage in SHARED]


def script_words(words: Sequence[str], options: Evaluation, script: str = "") -> list[str]:
    """This command again, for one stage and task of it; addresses, step and tasks as they were found.

    ``script``: its file in eval/, where it is not this process's.
    """
    found = ("checkpoint", "step", "data", "out", "tasks")
    gone = {*found, "stage", "task", "cluster", "watch"}
    places = {f"rices.{key}": f"rices.{key}={getattr(options.rices, key)}" for key in ("model", "pretrained")}
    keys = {word: word.partition("=")[0] for word in words}
    kept = [places.get(key, word) for word, key in keys.items() if key not in gone]
    return [
        f"eval/{script or Path(sys.argv[0]).name}",
        HERE,
        *(f"{key}={getattr(options, key)}" for key in found if key != "step" or options.step != answerer.EXPORT),
        *kept,
    ]
