"""What eval/vqascore.py calls: how faithfully images show texts, in parts by any number of tasks. Never torch.

``plan`` fixes the items, ``score`` is the model's work, ``collect`` merges. Each skips what is done, so any of them is
simply run again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from hpc_mm import answerer, faithfulness, results
from hpc_mm.answerer import ModelOptions
from hpc_mm.arrays import run_stages
from hpc_mm.benchmark import digest
from hpc_mm.checkpoint import LATEST
from hpc_mm.config import ConfigError, Run
from hpc_mm.data.parts import changes
from hpc_mm.data.store import MissingKey, Store, StoreError, open_store, write_changed
from hpc_mm.data.templates import QUESTION
from hpc_mm.faithfulness import Floats
from hpc_mm.faithfulness_files import Item
from hpc_mm.intervals import Interval
from hpc_mm.metrics import vqascore
from hpc_mm.predictions import Plan, Row, as_read, merged, not_planned, parts_to_do, read_plan, save_plan, write_part
from hpc_mm.results import VQASCORE
from hpc_mm.scoring import percent
from hpc_mm.site import read_options
from hpc_mm.staged import PLAN, Staged, exit_code

if TYPE_CHECKING:
    from hpc_mm.vqascore import VqaScorer

SCORE, COLLECT = "score", "collect"
SCRIPT = "vqascore.py"  # in eval/
FAMILY = "clip_flant5"  # the models that judge
ANSWER = "Yes"
VERSION = 1  # of what is computed here from an answer's probabilities
MODES: tuple[Literal["vqascore", "p_yes"], ...] = (VQASCORE, "p_yes")
SCORES = "scores.jsonl"
Template = Literal["t5_v1", "t5_plain"]


class Judge(ModelOptions):
    """The model, and how it is asked: what every command that scores images takes."""

    template: Literal["run", "t5_v1", "t5_plain"] = Field(
        "run", description="around the question: a chat, or the bare question; run = a chat where it was trained on any"
    )

    def template_of(self, run: Run) -> Template:
        if self.template != "run":
            return self.template
        return "t5_v1" if any(source.template == "t5_v1" for source in run.sources.values()) else "t5_plain"

    def load(self, weights: answerer.Weights, task: int | None = None) -> VqaScorer:
        from hpc_mm.vqascore import load

        longest = max(source.max_tokens for source in weights.run.sources.values())
        return load(weights, self.running(weights.run, task), self.template_of(weights.run), longest)


class Judging(Staged, Judge):
    """What eval/vqascore.py takes."""

    STAGES: ClassVar[tuple[str, ...]] = (PLAN, SCORE, COLLECT)
    SHARED: ClassVar[tuple[str, ...]] = (SCORE,)

    benchmark: str = Field(description=f"one of {', '.join(faithfulness.BENCHMARKS)}")
    data: str = Field(description="folder of its published files, or a name inside the site's store")
    stage: Literal["all", "plan", "score", "collect"] = Field("all", description="what to do")

    def located(self, benchmark: str, step: str) -> Self:
        options = super().located(benchmark, step)
        if "://" in options.data:
            raise ConfigError(f"data={options.data}: published files are read from a folder that every node sees")
        return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, 1 where a task failed, 2 after one line about a user's mistake."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code(lambda: command(words))


def command(words: Sequence[str]) -> int:
    options: Judging = read_options(Judging, words)
    wanted = options.plans or not options.out
    weights = found(options.checkpoint, options.step, digests=options.plans) if wanted else None
    options = options.located(options.benchmark, weights.step if weights else options.step)
    if options.watch:
        return watch(options)
    if weights and options.plans and options.cluster != "print":
        plan(options, weights)
    if options.stage == PLAN:
        return 0
    todo = {SCORE: score, COLLECT: collect}
    name = options.job_name(options.benchmark, options.step)
    work = options.work(name, options.stages, options.again(SCRIPT, words))
    return run_stages(work, options.cluster, options.task, lambda stage: todo[stage](options))


def found(folder: str, step: str, digests: bool = True) -> answerer.Weights:
    """The weights that are named, as ``answerer.find``. ConfigError where they are of no model that can judge."""
    weights = answerer.find(folder, step, digests)
    family = weights.run.model.family
    if family != FAMILY:
        raise ConfigError(f"checkpoint={folder} is a {family} model; images are judged by {FAMILY} models")
    return weights


# ---------------------------------------------------------------- the stages


def plan(options: Judging, weights: answerer.Weights) -> Plan:
    """Fix the work list. All that a user may have got wrong is told here, before anything is queued, but for texts that
    are too long: they take the model's tokenizer, and each task looks at its own before it begins."""
    items, images = read(options)
    sizes = faithfulness.BENCHMARKS[options.benchmark].sizes
    if sizes and len(items) not in sizes:
        print(f"{len(items):,} items, {' or '.join(f'{size:,}' for size in sizes)} are published")
    planned = Plan(work_of(options, weights, items, images), tuple(item.id for item in items), options.part)
    store = open_store(options.out, make=True)
    results.refuse_other(store, options.benchmark)
    save_plan(store, planned)
    print(f"{options.benchmark}: {len(items)} items, {count_pairs(items)} pairs, in {planned.parts} parts")
    return planned


def read(options: Judging) -> tuple[list[Item], str]:
    """The items, and what names their images' bytes. ConfigError where one of their files is not as it must be."""
    items = faithfulness.read(options.benchmark, Path(options.data))
    return items, faithfulness.image_versions(options.benchmark, items, Path(options.data))


def work_of(options: Judging, weights: answerer.Weights, items: Sequence[Item], images: str) -> dict[str, Any]:
    """What decides scores. ``images`` of the same bytes are others elsewhere, and so no part of the protocol."""
    protocol = protocol_of(options.benchmark, items, options.template_of(weights.run))
    return {**options.decides(weights), "names, sizes and times of images": images, "protocol": protocol}


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
        raise not_planned(options.out, missing) from None
    items, images = read(options)
    step = kept.work["step"] if options.step == LATEST else options.step
    weights = found(options.checkpoint, step, digests=False)  # whoever planned has verified them
    differences = changes(as_read(kept.work), as_read(work_of(options, weights, items, images)))
    if differences:
        raise ConfigError(f"{options.out} was planned otherwise: {'; '.join(differences)}")
    return store, kept, items, weights


def score(options: Judging) -> None:
    """This task's parts."""
    store, kept, items, weights = planned(options)
    todo = parts_to_do(store, kept, *options.share)
    if not todo:
        print("nothing is left to score here")
        return
    by_id = {item.id: item for item in items}
    chosen = {part: [by_id[name] for name in kept.ids_of(part)] for part in todo}
    scorer = options.load(weights, options.task)
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


def watch(options: Judging) -> int:
    """How far it is, and the figures of the items so far."""
    from hpc_mm import watch

    store, kept, items, _ = planned(options)
    scored = partial(figures_so_far, options.benchmark, {item.id: item for item in items}, {})
    watched = watch.Watched(options.benchmark, store, kept, scored)
    jobs = options.watched(options.benchmark, str(kept.work["step"]))
    return watch.watch([watched], "items", f"{options.benchmark}, {VQASCORE}", "95 % interval", jobs)


def figures_so_far(
    benchmark: str, by_id: Mapping[str, Item], known: dict[str, Floats], new: Mapping[int, list[Row]]
) -> dict[str, Interval]:
    """Times 100, as ``collect`` has them, with the rows of new parts; those of parts of the items where there are no
    others. Where all items so far do not suffice, those of whole groups; else none. ``known``: scores by item, to which
    those of the rows are added."""
    known.update((row["id"], vqascore(row["log_probabilities"], VQASCORE)) for rows in new.values() for row in rows)
    begun = {item.group for name, item in by_id.items() if name not in known}
    items = [item for name, item in by_id.items() if name in known]
    for some in (items, [item for item in items if item.group not in begun]):
        try:
            found = faithfulness.results(benchmark, some, [known[item.id] for item in some])
            break
        except ValueError:  # of a curve, one class alone so far
            found = {}
    whole = {name: one for name, one in found.items() if "/" not in name}
    return {name: percent(one) for name, one in (whole or found).items()}


def collect(options: Judging) -> None:
    """Merge the parts and write every item's scores, and results.json: figures times 100 by both modes."""
    store, kept, items, weights = planned(options)
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
            {
                "metric": mode,
                "figure": name,
                **results.interval(percent(one)),
                "protocol": id_of(kept.work["protocol"], mode),
            }
            for mode, some in figures.items()
            for name, one in some.items()
        ],
        "values": kept.work["protocol"],
    }
    results.refuse_other(store, options.benchmark)
    results.write(store, values)
    show(values)
    results.track(weights.run, store)


def id_of(protocol: dict[str, Any], mode: str) -> str:
    """By which protocol a figure was made, in one short id."""
    asked = digest((protocol["question"], protocol["answer"]))
    items = f"{protocol['benchmark']}-{protocol['items']}@{protocol['digest'][:4]}"
    return f"{items}/{protocol['template']}@{asked[:4]}/{mode}@v{protocol['version']}"


def show(values: dict[str, Any]) -> None:
    """The figures as a table, VQAScore's with their intervals."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("", *MODES, "95 % interval"):
        table.add_column(name, justify="right" if name else "left")
    first, second = ([entry for entry in values["scores"] if entry["metric"] == mode] for mode in MODES)
    for one, other in zip(first, second, strict=True):
        between = "" if one["low"] is None or one["high"] is None else f"{one['low']:.1f} to {one['high']:.1f}"
        table.add_row(one["figure"], f"{one['score']:.1f}", f"{other['score']:.1f}", between)
    Console().print(table)
    print(first[0]["protocol"])
    if values["cleaned"]:
        print(f"{values['cleaned']} texts held what would be taken for a special token, which was removed")
