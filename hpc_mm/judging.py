"""What eval/vqascore.py calls: how faithfully images show texts, in parts by any number of tasks. Never torch.

``plan`` fixes the items, ``score`` is the model's work, ``collect`` merges. Each skips what is done, so any of them is
simply run again.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from hpc_mm import answerer, faithfulness
from hpc_mm.arrays import Stage, Work
from hpc_mm.benchmark import digest
from hpc_mm.checkpoint import LATEST
from hpc_mm.config import ConfigError, Part, Positive, Run, Slurm
from hpc_mm.data.parts import changes
from hpc_mm.data.store import MissingKey, Store, StoreDown, StoreError, open_store, whole, write_changed
from hpc_mm.data.templates import QUESTION
from hpc_mm.faithfulness_files import Item
from hpc_mm.metrics import vqascore
from hpc_mm.predictions import SIZE, Plan, Row, as_read, merged, parts_to_do, read_plan, save_plan, write_part
from hpc_mm.results import RESULTS, finite
from hpc_mm.scoring import PERCENT
from hpc_mm.site import in_store, read_options, read_site
from hpc_mm.staged import run_stages

if TYPE_CHECKING:
    from hpc_mm.vqascore import VqaScorer

PLAN, SCORE, COLLECT = STAGES = ("plan", "score", "collect")
SNAPSHOT = ("hpc_mm", "eval", "sbatch")  # what a job reads of the checkout
FAMILY = "clip_flant5"  # the models that judge
ANSWER = "Yes"
VERSION = 1  # of what is computed here from an answer's probabilities
MODES: tuple[Literal["vqascore", "p_yes"], ...] = ("vqascore", "p_yes")
SCORES = "scores.jsonl"
Template = Literal["t5_v1", "t5_plain"]


class Judge(Part):
    """The model, and how it is asked: what every command that scores images takes."""

    checkpoint: str = Field(description="folder of a run, or of weights that hpc_mm.export wrote")
    step: str = Field(LATEST, description="of the run's checkpoints: latest, a number, or 0 = before training")
    template: Literal["run", "t5_v1", "t5_plain"] = Field(
        "run", description="around the question: a chat, or the bare question; run = a chat where it was trained on any"
    )
    precision: Literal["run", "bf16", "fp32"] = Field("run", description="of the arithmetic; run = as in training")
    batch: Positive = Field(32, description="pairs of image and text scored at once in bf16")
    keep_mb: Positive = Field(1024, description="image features kept on the device, MiB")

    def template_of(self, run: Run) -> Template:
        if self.template != "run":
            return self.template
        return "t5_v1" if any(source.template == "t5_v1" for source in run.sources.values()) else "t5_plain"

    def precision_of(self, run: Run) -> Literal["bf16", "fp32"]:
        return run.precision if self.precision == "run" else self.precision

    def load(self, weights: answerer.Weights, device: str) -> VqaScorer:
        from hpc_mm.vqascore import load

        running = answerer.Running(self.precision_of(weights.run), self.batch, self.keep_mb * 2**20, device)
        longest = max(source.max_tokens for source in weights.run.sources.values())
        return load(weights, running, self.template_of(weights.run), longest)


class Judging(Judge):
    """What eval/vqascore.py takes."""

    benchmark: str = Field(description=f"one of {', '.join(faithfulness.BENCHMARKS)}")
    data: str = Field(description="folder of its published files, or a name inside the site's store")
    part: Positive = Field(SIZE, description="items of a part, which is done or not done as a whole")
    out: str = Field("", description="folder or store of the results; empty = vqascore/ in the checkpoint's folder")
    stage: Literal["all", "plan", "score", "collect"] = Field("all", description="what to do")
    tasks: Positive = Field(1, description="jobs that share the work")
    task: int | None = Field(None, ge=0, description="which of them this is, from 0; none = all of them")
    cluster: Literal["auto", "slurm", "local", "print"] = Field("auto", description="auto = Slurm where sbatch is")
    gpus: int = Field(1, ge=0, le=1, description="GPUs of a job; 0 = it runs on CPUs")
    name: str = Field("", description="of the Slurm jobs; empty = run, benchmark and step")
    slurm: Slurm = Field(Slurm(), description="what sbatch is told")

    @model_validator(mode="after")
    def a_task_is_of_one_stage(self) -> Judging:
        if self.task is not None and self.stage != SCORE:
            raise ValueError(f"task={self.task} is of one stage: give stage={SCORE} too")
        if self.task is not None and self.task >= self.tasks:
            raise ValueError(f"task={self.task}: tasks={self.tasks} are numbered from 0 to {self.tasks - 1}")
        return self


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, 1 where a task failed, 2 after one line about a user's mistake."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options: Judging = read_options(Judging, words)
        plans = options.stage in ("all", PLAN)
        weights = found(options.checkpoint, options.step, plans) if plans or not options.out else None
        options = located(options, weights.step if weights else options.step)
        if weights and plans and options.cluster != "print":
            plan(options, weights)
        if options.stage == PLAN:
            return 0
        stages = STAGES[1:] if options.stage == "all" else (options.stage,)
        todo = {SCORE: score, COLLECT: collect}
        work = work_for(options, stages, words)
        return run_stages(work, options.cluster, options.task, lambda stage: todo[stage](options))
    except (ConfigError, StoreError, MissingKey, StoreDown, OSError) as error:  # OSError: of disks
        print(str(error) or repr(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def located(options: Judging, step: str) -> Judging:
    """With whole addresses, the number of the step, and a place for results, so that jobs see what is seen here."""
    folder = str(Path(options.checkpoint).expanduser().absolute())
    data = in_store(options.data, read_site().store)
    if "://" in data:
        raise ConfigError(f"data={data}: published files are read from a folder that every node sees")
    out = options.out or f"{folder}/vqascore/{options.benchmark}/step-{step}"
    return options.model_copy(update={"checkpoint": folder, "step": step, "out": whole(out), "data": data})


def found(folder: str, step: str, digests: bool = True) -> answerer.Weights:
    """The weights that are named, as ``answerer.find``. ConfigError where they are of no model that can judge."""
    weights = answerer.find(folder, step, digests)
    family = weights.run.model.family
    if family != FAMILY:
        raise ConfigError(f"checkpoint={folder} is a {family} model; images are judged by {FAMILY} models")
    return weights


def work_for(options: Judging, stages: Sequence[str], words: Sequence[str]) -> Work:
    """The stages as jobs, by this command again; addresses and step as they were found."""
    located = {key: getattr(options, key) for key in ("checkpoint", "step", "data", "out")}
    if options.step == answerer.EXPORT:
        del located["step"]
    gone = {*located, "step", "stage", "task", "cluster"}
    kept = [word for word in words if word.partition("=")[0] not in gone]
    again = ["eval/vqascore.py", "cluster=local", *(f"{key}={value}" for key, value in located.items()), *kept]
    jobs = [Stage(stage, options.tasks, options.gpus) if stage == SCORE else Stage(stage) for stage in stages]
    name = options.name or f"{Path(options.checkpoint).name}-{options.benchmark}-step-{options.step}"
    places = [options.checkpoint, options.data, options.out]
    return Work(name, f"eval-{name}", jobs, STAGES[1:], again, places, SNAPSHOT, options.slurm)


# ---------------------------------------------------------------- the stages


def plan(options: Judging, weights: answerer.Weights) -> Plan:
    """Fix the work list. All that a user may have got wrong is told here, before anything is queued, but for texts that
    are too long: they take the model's tokenizer, and each task looks at its own before it begins."""
    items = faithfulness.read(options.benchmark, Path(options.data))
    sizes = faithfulness.BENCHMARKS[options.benchmark].sizes
    if sizes and len(items) not in sizes:
        print(f"{len(items):,} items, {' or '.join(f'{size:,}' for size in sizes)} are published")
    planned = Plan(work_of(options, weights, items), tuple(item.id for item in items), options.part)
    save_plan(open_store(options.out, make=True), planned)
    print(f"{options.benchmark}: {len(items)} items, {count_pairs(items)} pairs, in {planned.parts} parts")
    return planned


def work_of(options: Judging, weights: answerer.Weights, items: Sequence[Item]) -> dict[str, Any]:
    """What decides scores. In bf16 the size of a batch decides how sums are rounded."""
    precision = options.precision_of(weights.run)
    batch = {"batch": options.batch} if precision == "bf16" else {}
    decides = {"step": weights.step, "weights": weights.digest, "data": options.data, "precision": precision, **batch}
    return {**decides, "protocol": protocol_of(options.benchmark, items, options.template_of(weights.run))}


def protocol_of(benchmark: str, items: Sequence[Item], template: Template) -> dict[str, Any]:
    """Everything about the scores that is not the model."""
    whole_items = digest(json.dumps(astuple(item)) for item in items)
    asked = {"template": template, "question": QUESTION, "answer": ANSWER}
    return {"benchmark": benchmark, "items": len(items), "digest": whole_items, **asked, "version": VERSION}


def count_pairs(items: Iterable[Item]) -> int:
    return sum(len(item.images) * len(item.texts) for item in items)


def planned(options: Judging) -> tuple[Store, Plan, list[Item], answerer.Weights]:
    """What was planned, and the weights. ConfigError where it was not, or otherwise than this command has it."""
    try:
        store = open_store(options.out)
        kept = read_plan(store)
    except (MissingKey, StoreError) as missing:
        raise ConfigError(f"{options.out}: nothing is planned there ({missing}); stage=plan comes first") from None
    items = faithfulness.read(options.benchmark, Path(options.data))
    step = kept.work["step"] if options.step == LATEST else options.step
    weights = found(options.checkpoint, step, digests=False)  # whoever planned has verified them
    differences = changes(as_read(kept.work), as_read(work_of(options, weights, items)))
    if differences:
        raise ConfigError(f"{options.out} was planned otherwise: {'; '.join(differences)}")
    return store, kept, items, weights


def score(options: Judging) -> None:
    """This task's parts."""
    store, kept, items, weights = planned(options)
    todo = parts_to_do(store, kept, options.task or 0, options.tasks if options.task is not None else 1)
    if not todo:
        print("nothing is left to score here")
        return
    by_id = {item.id: item for item in items}
    chosen = {part: [by_id[name] for name in kept.ids_of(part)] for part in todo}
    scorer = options.load(weights, answerer.device_of(options.task, options.gpus))
    for some in chosen.values():
        for item in some:
            scorer.check(named(item))
    for part, some in chosen.items():
        began = time.time()
        write_part(store, kept, part, rows_of(scorer, some, Path(options.data)), began)


def named(item: Item) -> dict[str, str]:
    return {f"item {item.id}, text {number}": text for number, text in enumerate(item.texts)}


def rows_of(scorer: VqaScorer, items: Sequence[Item], folder: Path) -> list[Row]:
    """For each item the log-probabilities of the answer's tokens, (images, texts, tokens), and how many of its texts
    were cleaned of what would be taken for a special token."""
    images = {name: place for place, name in enumerate(dict.fromkeys(name for item in items for name in item.images))}
    texts = {text: place for place, text in enumerate(dict.fromkeys(text for item in items for text in item.texts))}
    pairs = [(images[name], texts[text]) for item in items for name in item.images for text in item.texts]
    data = [faithfulness.image_bytes(folder / name) for name in images]
    values, rows, start = scorer.log_probabilities(data, list(texts), pairs, names=list(images)), [], 0
    for item in items:
        end = start + len(item.images) * len(item.texts)
        shaped = values[start:end].reshape(len(item.images), len(item.texts), -1)
        rows.append({"id": item.id, "log_probabilities": shaped.tolist(), "cleaned": scorer.check(named(item))})
        start = end
    return rows


def collect(options: Judging) -> None:
    """Merge the parts and write every item's scores, and results.json: figures times 100 by both modes."""
    store, kept, items, _ = planned(options)
    rows = merged(store, kept)
    scores = {mode: [vqascore(row["log_probabilities"], mode) for row in rows] for mode in MODES}
    try:
        figures = {mode: faithfulness.results(options.benchmark, items, some) for mode, some in scores.items()}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    matrices = zip(items, *scores.values(), strict=True)
    lines = ({"id": item.id, **dict(zip(MODES, map(np.ndarray.tolist, some), strict=True))} for item, *some in matrices)
    write_changed(store, SCORES, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    values = {
        "benchmark": options.benchmark,
        "data": options.data,
        "checkpoint": options.checkpoint,
        "step": kept.work["step"],
        "items": len(items),
        "pairs": count_pairs(items),
        "cleaned": sum(row["cleaned"] for row in rows),
        "scores": [
            {"mode": mode, "protocol": id_of(kept.work["protocol"], mode), "figures": as_percent(some)}
            for mode, some in figures.items()
        ],
        "values": kept.work["protocol"],
    }
    write_changed(store, RESULTS, json.dumps(values, indent=1).encode())
    show(values)


def id_of(protocol: dict[str, Any], mode: str) -> str:
    """By which protocol a figure was made, in one short id."""
    asked = digest((protocol["question"], protocol["answer"]))
    items = f"{protocol['benchmark']}-{protocol['items']}@{protocol['digest'][:4]}"
    return f"{items}/{protocol['template']}@{asked[:4]}/{mode}@v{protocol['version']}"


def as_percent(figures: faithfulness.Figures) -> dict[str, dict[str, float | None]]:
    ends = ("score", "low", "high")
    return {
        name: {end: finite(PERCENT * value) for end, value in zip(ends, interval, strict=True)}
        for name, interval in figures.items()
    }


def show(values: dict[str, Any]) -> None:
    """The figures as a table, VQAScore's with their intervals."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("", *MODES, "95 % interval"):
        table.add_column(name, justify="right" if name else "left")
    first, second = (entry["figures"] for entry in values["scores"])
    for name, one in first.items():
        between = "" if one["low"] is None or one["high"] is None else f"{one['low']:.1f} to {one['high']:.1f}"
        table.add_row(name, f"{one['score']:.1f}", f"{second[name]['score']:.1f}", between)
    Console().print(table)
    cleaned = values["cleaned"]
    print(values["scores"][0]["protocol"])
    if cleaned:
        print(f"{cleaned} texts held what would be taken for a special token, which was removed")
