"""What eval/ scripts call: a checkpoint's answers to a benchmark's questions, in parts by any number of tasks, scored.

``plan`` fixes questions and demonstrations, ``features`` makes images comparable (similar demonstrations alone need
it), ``answer`` is the model's work, ``collect`` scores. Each skips what is done, so any of them is simply run again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from hpc_mm import answerer, results, scoring, trials
from hpc_mm.arrays import run_stages
from hpc_mm.benchmark import Benchmark, Decoding, questions, shards_of
from hpc_mm.checkpoint import LATEST
from hpc_mm.config import ConfigError, Positive, parse_arguments, read_run
from hpc_mm.data.shards import read_manifest
from hpc_mm.data.store import open_store
from hpc_mm.demonstrations import QUERY_SET
from hpc_mm.intervals import Interval
from hpc_mm.predictions import Row, parts_to_do
from hpc_mm.protocol import RICES
from hpc_mm.rules import OPENFLAMINGO, rules_of
from hpc_mm.similarity import Encoder, compute, shards_to_do
from hpc_mm.site import read_options
from hpc_mm.staged import PLAN, Staged, exit_code
from hpc_mm.trials import Choice, Planned, Pool, Trial

FEATURES, ANSWER, COLLECT = "features", "answer", "collect"
Whole = Annotated[int, Field(ge=0)]


class Evaluation(Staged):
    """What every eval/ script takes. ``split`` and ``decoding`` are the script's, unless they are given."""

    STAGES: ClassVar[tuple[str, ...]] = (PLAN, FEATURES, ANSWER, COLLECT)
    SHARED: ClassVar[tuple[str, ...]] = (FEATURES, ANSWER)

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
    examples: Whole = Field(60, description="questions on the page of results, of every trial; 0 = no page")
    stage: Literal["all", "plan", "features", "answer", "collect"] = Field("all", description="what to do")

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

    @property
    def choice(self) -> Choice:
        similar = self.selection == RICES
        return Choice(self.shots, () if similar else self.seeds, self.query_set, self.rices.name if similar else "")

    @property
    def stages(self) -> tuple[str, ...]:
        return super().stages if self.stage != "all" or self.selection == RICES else (ANSWER, COLLECT)


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None, **values: Any) -> int:
    """The command line of an eval/ script: 0, 1 where a task failed, 2 after one line about a user's mistake.

    ``values``: the script's own, of Evaluation: what it calls VALUES, where ``scheduled`` reads them too.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code(lambda: command(benchmark, words, values))


def command(benchmark: Benchmark, words: Sequence[str], values: Mapping[str, Any]) -> int:
    options = options_of(benchmark, words, values)
    asked = benchmark.model_copy(update={"split": options.split, "decoding": options.decoding})
    weights = found(options)
    options = options.located(asked.name, weights.step if weights else options.step)
    if options.watch:
        return watch(options, asked)
    if options.plans and options.cluster != "print":
        plan(options, asked)
    return run(options, asked, words) if options.stage != PLAN else 0


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


# ---------------------------------------------------------------- the stages


def plan(options: Evaluation, benchmark: Benchmark) -> Planned:
    """Fix the work list. All that a user may have got wrong is told here, before anything is queued, but for prompts
    that are too long for the model: they take its tokenizer, and each task looks at the longest before it begins."""
    scoring.metric_of(benchmark.metric)
    asked = questions(options.data, benchmark.split, benchmark)
    pool = questions(options.data, benchmark.demonstrations, benchmark)
    known = Pool.of(benchmark, pool)
    benchmark = trials.with_classes(benchmark, known)
    planned = Planned(options.out, options.choice, trials.some_of(asked, options.samples), known, {})
    shown = options.choice.shown(pool)
    trials.check(benchmark, planned, shown)
    if OPENFLAMINGO.name in options.rules:
        results.check_tools(benchmark)
    results.refuse_other(open_store(options.out, make=True), benchmark.name)
    weights = answerer.find(options.checkpoint, options.step)  # every byte is read, when all else is right
    trials.save(planned, shown, benchmark, options.decides(weights), options.part)
    parts = sum(plan.parts for plan in planned.plans.values())
    print(
        f"{benchmark.name} {benchmark.split}: {len(planned.questions)} questions x {len(planned.plans)} trials in "
        f"{parts} parts, demonstrations from {len(pool)} of {benchmark.demonstrations}"
    )
    return planned


def answer(options: Evaluation, benchmark: Benchmark) -> None:
    """This task's parts of all trials."""
    planned = trials.read(options.out, options.choice)
    benchmark = trials.with_classes(benchmark, planned.pool)
    todo = parts_of(planned, *options.share)
    if not todo:
        print("nothing is left to answer here")
        return
    from hpc_mm.asking import ask

    step = planned.step if options.step == LATEST else options.step
    weights = answerer.find(options.checkpoint, step, digests=False)  # whoever planned has verified them
    trials.refuse_other(planned, benchmark, options.decides(weights))
    model = answerer.load(weights, options.running(weights.run, options.task))
    ask(model, benchmark, planned, todo, options.data, options.rices)


def parts_of(planned: Planned, task: int, tasks: int) -> list[tuple[Trial, int]]:
    """A task's parts that are not done: every ``tasks``-th of those of all trials, one after the other."""
    todo, before = [], 0
    for trial, plan in planned.plans.items():
        mine = parts_to_do(planned.store(trial), plan, (task - before) % tasks, tasks)
        todo += [(trial, part) for part in mine]
        before += plan.parts
    return todo


def watch(options: Evaluation, benchmark: Benchmark) -> int:
    """How far all trials are, and their scores so far by the first rules."""
    from hpc_mm import watch

    planned, rules = trials.read(options.out, options.choice), options.rules[0]
    begin = scoring.running(benchmark, rules, planned.questions) if planned.questions[0].references else None
    watched = [
        watch.Watched(str(trial), planned.store(trial), plan, begin and partial(score_so_far, planned, trial, begin()))
        for trial, plan in planned.plans.items()
    ]
    jobs = options.watched(benchmark.name, planned.step)
    return watch.watch(watched, "questions", f"{benchmark.metric}, {rules}", "95 % interval of all", jobs)


def score_so_far(
    planned: Planned, trial: Trial, running: scoring.Running, new: Mapping[int, list[Row]]
) -> dict[str, Interval]:
    """A trial's score with the rows of new parts, by its name; none where they do not suffice."""
    running.add({part: ([planned.by_id[row["id"]] for row in rows], rows) for part, rows in new.items()})
    try:
        return {str(trial): running.scores().interval(len(planned.questions))}
    except ValueError:  # of a curve, one class alone so far
        return {}


def features(options: Evaluation, benchmark: Benchmark) -> None:
    """Image features of this task's shards, where demonstrations are chosen by them."""
    store = open_store(options.data)
    every = read_manifest(store)
    shards = [
        shard.name
        for split in dict.fromkeys((benchmark.split, benchmark.demonstrations))
        for shard in shards_of(every, split, options.data)
    ]
    todo = shards_to_do(store, shards, options.rices, *options.share)
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
    results.track(read_run(Path(options.checkpoint)), open_store(options.out))


def run_stage(stage: str, options: Evaluation, benchmark: Benchmark) -> None:
    {FEATURES: features, ANSWER: answer, COLLECT: collect}[stage](options, benchmark)


# ---------------------------------------------------------------- where they run


def run(options: Evaluation, benchmark: Benchmark, words: Sequence[str]) -> int:
    """The stages after planning, as jobs or here."""
    script = Path(sys.argv[0]).name
    work = options.work(
        options.job_name(benchmark.name, options.step), options.stages, script_words(words, options, script)
    )
    return run_stages(work, options.cluster, options.task, lambda stage: run_stage(stage, options, benchmark))


def script_words(words: Sequence[str], options: Evaluation, script: str) -> list[str]:
    """This command again, as ``Staged.again``, and by the same CLIP."""
    places = {f"rices.{key}": f"rices.{key}={getattr(options.rices, key)}" for key in ("model", "pretrained")}
    return options.again(script, [places.get(word.partition("=")[0], word) for word in words])
