"""The run's folder: what is frozen there at a launch, and whether a folder that exists may go on."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc_mm.checkpoint import LATEST, DamagedCheckpoint, chosen, shapes_of, step_of
from hpc_mm.command import ROOT, Submission, strategy_file
from hpc_mm.config import ClipFlanT5, ConfigError, Run, differences, read_run

# These change how a run is run, not what comes out of it.
MAY_CHANGE = (
    *("slurm.", "loader.", "evaluate.", "tracking.", "nodes:", "gpus_per_node:", "strategy:"),
    *("train.accumulate:", "train.log_every:", "train.save_every:", "train.keep:", "train.keep_every:"),
)
ORIGIN = "origin.txt"  # in the folder of the weights that a run began with: where they come from
SAME_MODEL = ("vision.", "language.name", "language.architecture")  # of a run that another one begins with
SNAPSHOT = ("hpc_mm", "accelerate_configs", "eval", "sbatch")  # all that a job reads of the checkout


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the run's folder, so that two launchers never work on it at once; a local run holds it to its end.

    Gives the lock's descriptor: the lock lives as long as any process that has inherited it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the run's folder {folder} cannot be made: {error.strerror}; set HPC_MM_RUNS") from None
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run {folder} is being launched or trained by another process on this machine") from None
        except OSError as error:
            raise ConfigError(f"{folder} cannot be locked ({error.strerror}): set HPC_MM_RUNS elsewhere") from None
        yield file.fileno()


def next_submission(folder: Path) -> Submission:
    return Submission(folder, (_numbers(folder) or [0])[-1] + 1)


def _numbers(folder: Path) -> list[int]:
    return sorted(int(found.name) for found in (folder / "submissions").glob("[0-9][0-9][0-9]"))


def last_submission(folder: Path) -> Submission | None:
    numbers = _numbers(folder)
    return Submission(folder, numbers[-1]) if numbers else None


def frozen_tokenizer(run: Run, folder: Path) -> tuple[Run, bytes | None]:
    """The run with its tokenizer file (in a store or on disk) inside the run's folder, and the bytes to put there."""
    address = run.model.language.tokenizer
    if not address.endswith(".json") or Path(address).is_relative_to(folder):
        return run, None
    from hpc_mm.data.store import open_store

    parent, _, name = address.rpartition("/")
    try:
        content = open_store(parent or ".").read(name)
    except KeyError:
        raise ConfigError(f"model.language.tokenizer: there is no {name} in {parent}") from None
    values = run.model_dump()
    values["model"]["language"]["tokenizer"] = str(folder / "tokenizer.json")
    return Run.model_validate(values), content


def frozen_start(run: Run, folder: Path) -> tuple[Run, Path | None]:
    """The run with the checkpoint that it begins with inside its folder, and where that is to be had from.

    It stays the same at every launch. ConfigError where ``run.start`` has none, or one of another model.
    """
    if not run.start:
        return run, None
    kept = folder / "start"
    inside = run.model_copy(update={"start": str(kept)})
    if kept.exists():
        origin = (kept / ORIGIN).read_text()
        if run.start != str(kept) and not Path(origin).is_relative_to(run.start):
            raise ConfigError(f"run {run.name} began with {origin}, not with start={run.start}; name=... is a new one")
        return inside, None
    try:
        old = read_run(run.start)
        found = chosen(Path(run.start), LATEST)
    except ConfigError as error:
        raise ConfigError(f"start: {error}") from None
    if old.model.family != run.model.family:
        raise ConfigError(f"start={run.start} is a run of {old.model.family}, not of {run.model.family}")
    other = [line for line in differences(old.model, run.model) if line.startswith(SAME_MODEL)]
    if other:
        raise ConfigError(f"start={run.start} is a run of another model: {'; '.join(other)}")
    if run.model.family == "clip_flant5" and "projector" not in old.model.trainable:
        raise ConfigError(f"start={run.start} has trained {', '.join(old.model.trainable)}, and no projector")
    refuse_other_updates(f"start={run.start}", old, run)
    refuse_lost(old, found, run)
    print(f"{run.name} begins with step {step_of(found):,} of {old.train.steps:,} of {run.start}")
    return inside, found


def refuse_other_updates(said: str, old: Run, run: Run) -> None:
    """ConfigError where ``old`` has trained LoRA's updates, which mean something else in the model of ``run``."""
    if not isinstance(old.model, ClipFlanT5) or not isinstance(run.model, ClipFlanT5) or not old.model.lora.rank:
        return
    lines = [f"model.lora.{line}" for line in differences(old.model.lora, run.model.lora)]
    other = [line for line in lines if not line.startswith("model.lora.dropout")]
    if other:
        raise ConfigError(
            f"{said} has LoRA of other values: {'; '.join(other)}. Take its values, or give model.weights=FOLDER of "
            "what hpc_mm.export form=released merges"
        )


def refuse_lost(old: Run, found: Path, run: Run) -> None:
    """ConfigError where the run ``old``, whose checkpoint is ``found``, began with weights that are not in it."""
    ours, theirs = (Path(model.weights).expanduser().absolute() for model in (run.model, old.model))
    if old.model.weights and ours != theirs and not old.model.holds_what_it_began_with:
        raise ConfigError(f"start={run.start} is a run with model.weights={old.model.weights}; give the same here")
    if not old.start:
        return
    kept = Path(run.start) / "start"  # wherever the run's folder has moved
    try:
        began = shapes_of(kept if kept.exists() else Path(old.start))
        lost = began.keys() - shapes_of(found).keys()
    except DamagedCheckpoint as error:
        raise ConfigError(f"start={run.start} itself began with weights that cannot be read: {error}") from None
    if not began:
        raise ConfigError(f"start={run.start} itself began with {old.start}, where no weights are any more")
    if lost:
        raise ConfigError(
            f"start={run.start} itself began with {len(lost)} weights that it has not trained, such as {min(lost)}; in "
            "its place give model.weights=FOLDER of what hpc_mm.export made of it"
        )


def keep_start(found: Path, folder: Path) -> None:
    """Put a checkpoint into the run's folder, whole or not at all: as links to its files, where those can be made."""
    aside = folder / f".start.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for file in found.iterdir():
        try:
            os.link(file, aside / file.name)
        except OSError:  # another file system, or one without links
            shutil.copy2(file, aside / file.name)
    (aside / ORIGIN).write_text(str(found))
    aside.rename(folder / "start")


def changes(run: Run, tokenizer: bytes | None, folder: Path) -> list[str] | None:
    """What this launch changes in a run that exists, or None for a new one. What may not change is refused."""
    if not (folder / "run.json").exists():
        return None
    found = differences(read_run(folder), run)
    refused = [line for line in found if not line.startswith(MAY_CHANGE)]
    frozen = folder / "tokenizer.json"
    if tokenizer is not None and not frozen.exists():
        raise ConfigError(f"run {run.name} has lost its tokenizer: there is no {frozen}; put the same file there")
    if tokenizer is not None and frozen.read_bytes() != tokenizer:
        refused.append("model.language.tokenizer: the file has other contents now")
    if refused:
        raise ConfigError(
            f"run {run.name} exists with other values: {'; '.join(refused)}. "
            f"Take its values to go on with it, or name=... for a new one (its folder: {folder})"
        )
    return found


def with_shares_of_old(run: Run, folder: Path) -> Run:
    """The run with so many micro-steps that a rank never holds more samples than where the run began.

    So a run goes on with fewer nodes in the memory of the same GPUs, and with all nodes again as it began.
    """
    first = Submission(folder, 1).folder / "run.json"
    if not first.exists():
        return run
    began = read_run(first)
    parts = began.world_size * began.train.accumulate
    micro_steps = -(-parts // run.world_size)
    return run.model_copy(update={"train": run.train.model_copy(update={"accumulate": micro_steps})})


def write(run: Run, tokenizer: bytes | None, start: Path | None, submission: Submission, texts: dict[str, str]) -> None:
    """Freeze values, code, commit, packages and texts in the submission's folder, whole or absent; then run.json."""
    values = run.model_dump_json(indent=2)
    strategy = strategy_file(run.strategy)
    with frozen(submission, SNAPSHOT, {**texts, "run.json": values}) as code:
        shutil.copy2(strategy, code / "accelerate_configs" / strategy.name)
    if tokenizer is not None:
        _write_whole(submission.run_folder / "tokenizer.json", tokenizer)
    if start is not None:
        keep_start(start, submission.run_folder)
    _write_whole(submission.run_folder / "run.json", values.encode())


@contextmanager
def frozen(submission: Submission, folders: Iterable[str], texts: dict[str, str]) -> Iterator[Path]:
    """Make the submission's folder, whole or absent: texts, commit, packages, and these folders of the checkout.

    So editing the checkout never changes a queued or requeued job. Gives the folder of the code, to add to.
    """
    aside = submission.folder.with_name(f".{submission.folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name in folders:
        if not (ROOT / name).is_dir():
            raise ConfigError(f"no folder {ROOT / name}: launch from a checkout (pip install -e .)")
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / name, aside / "code" / name, ignore=ignored)
    for name, text in {**texts, **_provenance()}.items():
        (aside / name).write_text(text)
    yield aside / "code"
    aside.rename(submission.folder)


def withdraw(submission: Submission, before: bytes | None) -> None:
    """Undo ``write`` after a cluster has refused the job. ``before``: the run.json that was there."""
    shutil.rmtree(submission.folder)
    folder = submission.run_folder
    if before is not None:
        _write_whole(folder / "run.json", before)
        return
    shutil.rmtree(folder / "start", ignore_errors=True)
    for name in ("run.json", "tokenizer.json", ".lock"):
        (folder / name).unlink(missing_ok=True)
    submission.folder.parent.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()


def _write_whole(file: Path, content: bytes) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_bytes(content)
    os.replace(aside, file)


def _provenance() -> dict[str, str]:
    """The commit, what differs from it, and the versions of all packages."""
    commit = _git("rev-parse", "HEAD").strip()
    packages = {f"{found.name}=={found.version}" for found in importlib.metadata.distributions()}
    return {
        "commit.txt": f"{commit or 'not in a git repository, or nothing committed yet'}\n{_git('status', '--short')}",
        "dirty.diff": _git("diff", "--binary", "HEAD") if commit else "",
        "packages.txt": "\n".join(sorted(packages, key=str.lower)) + "\n",
    }


def _git(*words: str) -> str:
    """Git's answer about the checkout; empty where there is none to ask."""
    if shutil.which("git") is None:
        return ""
    answer = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, errors="replace")
    return answer.stdout if answer.returncode == 0 else ""
