"""``python -m hpc_mm.launch recipe=NAME key=value ...``: a run on Slurm, on this machine, or on the screen.

Nothing here imports torch, and the help page not even pydantic: a login node answers at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpc_mm.command import Submission
    from hpc_mm.config import Run, Site

CLUSTERS = ("auto", "slurm", "local", "print")


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, 1 where a local run failed, 2 for a user's mistake, told in one line on stderr."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        from hpc_mm import usage

        print(usage.text())
        return 0
    from hpc_mm.config import ConfigError
    from hpc_mm.data.store import StoreError

    try:
        return launch(arguments)
    except (ConfigError, StoreError, OSError) as error:  # OSError: of disks and shared folders, which say it in a line
        print(f"hpc_mm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def launch(arguments: Sequence[str]) -> int:
    from hpc_mm import slurm
    from hpc_mm.command import uses_deepspeed
    from hpc_mm.config import ConfigError, parse_arguments, unknown
    from hpc_mm.site import read_site
    from hpc_mm.submission import next_submission, with_shares_of_old

    values = parse_arguments(arguments)
    if "recipe" not in values:
        raise ConfigError(f"recipe=NAME is missing; known: {', '.join(recipe_names())}")
    recipe, cluster = values.pop("recipe"), values.pop("cluster", "auto")
    if cluster not in CLUSTERS:
        raise unknown("cluster", cluster, CLUSTERS)
    site = read_site()
    run = resolve(recipe, values, site)
    uses_deepspeed(run.strategy)  # refuses a strategy that does not exist
    folder = Path(site.runs).expanduser().resolve() / run.name
    if "train.accumulate" not in values:
        run = with_shares_of_old(run, folder)
    if run.evaluate.every:
        from hpc_mm import scheduled  # not above: the other runs need not wait for what it imports

        scheduled.check(run, folder)
    if cluster == "print":
        return show(run, next_submission(folder))
    if cluster == "slurm" or (cluster == "auto" and slurm.is_here()):
        return queue(run, folder)
    return here(run, folder)


def recipe_names() -> list[str]:
    files = (Path(__file__).parent / "recipes").glob("*.py")
    return sorted(file.stem for file in files if not file.stem.startswith("_"))


def resolve(recipe: str, overrides: dict[str, str], site: Site) -> Run:
    """The recipe's run; over it the site's Slurm values, over them the command line; addresses whole."""
    from hpc_mm.config import unknown, with_overrides
    from hpc_mm.site import at_site

    if recipe not in recipe_names():
        raise unknown("recipe", recipe, recipe_names())
    run: Run = getattr(importlib.import_module(f"hpc_mm.recipes.{recipe}"), recipe)()
    run = with_overrides(at_site(run, site), overrides)
    return at_site(run, site.model_copy(update={"slurm": {}}))  # names in the store that the command line gave


def show(run: Run, submission: Submission) -> int:
    """The job, and what was not checked, on the screen. Writes nothing, needs neither Slurm nor the data."""
    from hpc_mm.command import sbatch_script

    print(sbatch_script(run, submission))
    print("# Not checked:")
    limits = f"partition {run.slurm.partition or '(the default)'}, time {run.slurm.time}, {run.nodes} nodes"
    if run.gpus_per_node:
        limits += f" with {run.gpus_per_node} GPUs"
    print(f"#   that the cluster has {limits}")
    for name, source in run.sources.items():
        print(f"#   that {name} are whole shards at {source.data}")
    language, vision = run.model.language, run.model.vision
    loaded = {language.tokenizer or language.name, language.name, run.model.weights}
    loaded.add("" if vision.architecture else vision.name)
    for address in sorted(loaded - {""}):
        print(f"#   that {address} can be loaded")
    if run.start:
        print(f"#   that {run.start} has a checkpoint of such a model")
    for name in run.evaluate.benchmarks if run.evaluate.every else ():
        print(f"#   that the data of {name} are there, to be evaluated on every {run.evaluate.every} steps")
    print(
        f"#   whether {submission.run_folder} holds another run (a launch writes it, with the code that the job runs)"
    )
    return 0


def check_data(run: Run, folder: Path) -> None:
    """Every source has whole shards with samples in them, and they can be read from here; weights and benchmarks are
    there."""
    from hpc_mm.config import ConfigError, read_run
    from hpc_mm.data.lengths import check_lengths
    from hpc_mm.data.shards import check_shards
    from hpc_mm.data.store import open_store
    from hpc_mm.submission import refuse_other_updates

    for name, source in run.sources.items():
        try:
            problems = check_shards(open_store(source.data))
            if problems:
                raise ConfigError(f"{problems[0]}; {len(problems)} problems in all: prepare it again")
            check_lengths(source, run.model.language)
        except ConfigError as error:
            raise ConfigError(f"sources.{name}: {error}") from None
    weights = run.model.weights  # of a path alone, in every family
    if weights and not Path(weights).expanduser().exists():
        raise ConfigError(f"model.weights={weights}: there is no such file or folder")
    if weights and (Path(weights).expanduser() / "run.json").is_file():  # what hpc_mm.export wrote
        refuse_other_updates(f"model.weights={weights}", read_run(Path(weights).expanduser()), run)
    if run.evaluate.every:
        from hpc_mm import scheduled

        scheduled.check_data(run, folder)


def queue(run: Run, folder: Path) -> int:
    """Check everything, freeze the run, submit it."""
    from hpc_mm import slurm
    from hpc_mm.command import sbatch_script
    from hpc_mm.config import ConfigError
    from hpc_mm.submission import (
        frozen_start,
        frozen_tokenizer,
        last_submission,
        locked,
        next_submission,
        withdraw,
        write,
    )

    slurm.check(run, sbatch_script(run, next_submission(folder)))
    if run.evaluate.every:
        from hpc_mm import scheduled

        scheduled.check_jobs(run, next_submission(folder))
    check_data(run, folder)
    run, start = frozen_start(run, folder)
    run, tokenizer = frozen_tokenizer(run, folder)
    with locked(folder):
        slurm.refuse_if_active(last_submission(folder))
        announce(run, tokenizer, folder)
        frozen = folder / "run.json"
        before = frozen.read_bytes() if frozen.exists() else None
        submission = next_submission(folder)
        script = sbatch_script(run, submission)
        write(run, tokenizer, start, submission, {"job.sbatch": script, **evaluations(run, submission)})
        try:
            job = slurm.submit(script, run, submission)
        except ConfigError:
            withdraw(submission, before)
            raise
    print(f"submitted job {job}: {run.name} on {run.nodes} nodes\n  folder  {folder}\n  logs    {submission.log('*')}")
    print(f"  watch   tail -f {folder / 'metrics.jsonl'}\n  cancel  scancel {job}")
    return 0


def here(run: Run, folder: Path) -> int:
    """Check everything, freeze the run, and train on this machine until it ends."""
    from hpc_mm import local, slurm
    from hpc_mm.submission import frozen_start, frozen_tokenizer, last_submission, locked, next_submission, write

    local.check(run)
    check_data(run, folder)
    run, start = frozen_start(run, folder)
    run, tokenizer = frozen_tokenizer(run, folder)
    with locked(folder) as lock:
        slurm.refuse_if_active(last_submission(folder))
        announce(run, tokenizer, folder)
        submission, port = next_submission(folder), local.free_port()
        texts = {**local.texts(run, submission, port), **evaluations(run, submission)}
        write(run, tokenizer, start, submission, texts)
        print(
            f"{run.name}: {run.nodes} nodes on this machine, strategy {run.strategy}, logs {submission.log('*')}",
            flush=True,
        )
        code = local.train(run, submission, port, lock)
    if code == 0:
        print(f"done: {folder}")
    return code


def evaluations(run: Run, submission: Submission) -> dict[str, str]:
    """What begins them while the run trains, for the submission's folder."""
    if not run.evaluate.every:
        return {}
    from hpc_mm import scheduled

    return scheduled.texts(run, submission)


def announce(run: Run, tokenizer: bytes | None, folder: Path) -> None:
    """Say whether the run goes on, and with which other values; refuse another run of that name."""
    from hpc_mm.submission import changes

    changed = changes(run, tokenizer, folder)
    if changed is None:
        return
    print(f"{run.name} exists: going on with it")
    for line in changed:
        print(f"  {line}")
    if any(line.startswith(("nodes:", "gpus_per_node:", "train.accumulate:")) for line in changed):
        print(f"  the same samples in every step, now over {run.world_size} ranks x {run.train.accumulate} micro-steps")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
