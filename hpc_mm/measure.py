"""``python -m hpc_mm.measure recipe=NAME key=value ...``, or ``run=FOLDER``: count the tokens of a run's samples.

That is done once for the sources whose order goes by length, before they are trained on: here, or as an array of Slurm
jobs (tasks=N cluster=auto|slurm|local|print). What is done is skipped.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from hpc_mm.arrays import Stage, Work, run_stages
from hpc_mm.config import ConfigError, Part, Positive, Run, parse_arguments, read_run, validated, with_overrides
from hpc_mm.data.lengths import count, goes_by_length, name_of, shards_to_do
from hpc_mm.data.shards import BrokenShard, read_manifest
from hpc_mm.data.store import MissingKey, Store, StoreError, open_store, whole
from hpc_mm.launch import resolve
from hpc_mm.site import read_site
from hpc_mm.submission import frozen_tokenizer

STAGE = "lengths"
SNAPSHOT = ("hpc_mm", "sbatch")  # what a job reads of the checkout


class Options(Part):
    """What the command takes beside the run's own values."""

    recipe: str = Field("", description="the run's recipe, with key=value of the run")
    run: str = Field("", description="or the folder of a run that has been launched")
    tasks: Positive = Field(1, description="jobs, or processes here, that divide the shards")
    cluster: Literal["auto", "slurm", "local", "print"] = Field("auto", description="auto = Slurm where sbatch is")
    stage: Literal["lengths"] = Field("lengths", description="what a job does")
    task: int | None = Field(None, ge=0, description="which of the tasks this process is")


class Todo(NamedTuple):
    """A source's shards that have no lengths yet."""

    source: str
    store: Store
    name: str  # of the lengths
    shards: list[str]


def read_arguments(arguments: Sequence[str]) -> tuple[Options, Run, dict[str, str]]:
    """The options, the run, and the words about the run."""
    given = parse_arguments(arguments)
    options: Options = validated(Options, {key: given.pop(key) for key in Options.model_fields if key in given})
    if bool(options.recipe) == bool(options.run):
        raise ConfigError("recipe=NAME or run=FOLDER is missing: one of them says what is trained on")
    if options.task is not None and options.task >= options.tasks:
        raise ConfigError(f"task={options.task} must be below tasks={options.tasks}")
    run = with_overrides(read_run(options.run), given) if options.run else resolve(options.recipe, given, read_site())
    return options, run, given


def to_do(run: Run, options: Options) -> list[Todo]:
    """By source; of a task its share of all shards, whatever others have done meanwhile."""
    found = []
    for source, values in run.sources.items():
        if goes_by_length(values):
            store, name = open_store(values.data), name_of(values, run.model.language)
            shards = read_manifest(store).names[options.task or 0 :: 1 if options.task is None else options.tasks]
            found.append(Todo(source, store, name, shards_to_do(store, shards, name)))
    return found


def measure(run: Run, todo: Sequence[Todo]) -> None:
    """Count, in this process."""
    from hpc_mm.families import family_of

    with tempfile.TemporaryDirectory() as folder:
        run, tokenizer = frozen_tokenizer(run, Path(folder))  # which may lie in a store
        if tokenizer is not None:
            Path(folder, "tokenizer.json").write_bytes(tokenizer)
        words = family_of(run).load_tokenizer(run.model.language)
        for work in todo:
            count(work.store, work.shards, work.name, run.sources[work.source], words)


def words_of(run: Run, options: Options, given: dict[str, str]) -> list[str]:
    """This command again for a task, with whole addresses, since jobs run in another folder."""
    kept = [f"{key}={value}" for key, value in given.items()]
    if options.run:
        return [f"run={whole(options.run)}", *kept]
    language = run.model.language
    places = {f"sources.{name}.data": source.data for name, source in run.sources.items()}
    places |= {"model.language.tokenizer": language.tokenizer, "model.language.name": language.name}
    places = {key: value for key, value in places.items() if value}
    kept = [word for word in kept if word.partition("=")[0] not in places]
    return [f"recipe={options.recipe}", *kept, *(f"{key}={value}" for key, value in places.items())]


def work_for(run: Run, options: Options, words: Sequence[str]) -> Work:
    """The tasks as jobs, by this command again."""
    language = run.model.language
    files = [file for file in (language.tokenizer, language.name) if "/" in file and Path(file).exists()]
    return Work(
        name=run.name,
        folder=f"measure-{run.name}",
        stages=[Stage(STAGE, options.tasks)],
        every=[STAGE],
        words=["-m", "hpc_mm.measure", f"tasks={options.tasks}", "cluster=local", *words],
        places=[options.run, *(source.data for source in run.sources.values()), *files],
        snapshot=SNAPSHOT,
        slurm=run.slurm,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where a task failed, 2 after one line about a user's mistake."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("hpc_mm").setLevel(logging.INFO)
    try:
        options, run, given = read_arguments(sys.argv[1:] if arguments is None else arguments)
        todo = to_do(run, options)
        shards = sum(len(work.shards) for work in todo)
        if options.task is None:
            names = ", ".join(f"{work.source} ({len(work.shards)} shards)" for work in todo)
            print(f"lengths to count: {names}" if shards else f"{run.name}: no lengths are to be counted")
        if not shards:
            return 0
        work = work_for(run, options, words_of(run, options, given))
        return run_stages(work, options.cluster, options.task, lambda _: measure(run, todo))
    except (ConfigError, StoreError, MissingKey, BrokenShard, OSError) as error:
        print(f"hpc_mm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
