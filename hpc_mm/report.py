"""``python -m hpc_mm.report run=runs/NAME``: one self-contained report.html of what a run is and did. Never torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pydantic import Field

from hpc_mm.charts import Line, chart
from hpc_mm.config import ConfigError, Part, Positive, Run, parse_arguments, read_run, with_overrides
from hpc_mm.data.shards import BrokenShard, read_samples
from hpc_mm.data.store import MissingKey, StoreError, open_store
from hpc_mm.page import document, picture

Record = dict[str, Any]


class Report(Part):
    """What hpc_mm.report takes."""

    run: str = Field(default="", description="folder of the run")
    samples: Positive = Field(default=12, description="held-out images that are shown")


@dataclass(frozen=True)
class Evaluation:
    """What evaluate.py left in RUN/eval, first step first."""

    data: str
    scores: list[Record]  # step, file, cider (times 100)
    rows: list[list[Record]]  # per score: id, caption, references


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options: Report = with_overrides(Report(), parse_arguments(sys.argv[1:] if arguments is None else arguments))
        if not options.run:
            raise ConfigError("run=FOLDER is missing: the folder of the run to report on")
        path, evaluation = write_report(Path(options.run), options.samples)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if evaluation is None:
        print(f"no captions in {options.run}/eval yet: an eval/ script writes them")
    else:
        print("CIDEr " + ", ".join(f"{score['cider']:.1f} at step {score['step']:,}" for score in evaluation.scores))
    print(path)
    return 0


def write_report(folder: Path, samples: int) -> tuple[Path, Evaluation | None]:
    """Write ``report.html`` into the run's folder, whole or not at all."""
    run = read_run(folder)
    records = read_metrics(folder)
    evaluation = read_evaluation(folder)
    body = [head(run, folder, records, evaluation), curves(run, records)]
    if evaluation is not None:
        body.append(gallery(evaluation, samples))
    body.append(facts(run, folder))
    page = document(f"{run.name}: training report", "\n".join(body))
    path = folder / "report.html"
    aside = folder / "report.html.partial"
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)
    return path, evaluation


# ---------------------------------------------------------------- what the run left


def read_metrics(folder: Path) -> list[Record]:
    """The lines of metrics.jsonl, one per step: a resumed run writes some steps again, and the later line counts."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.exists() else []
    records = [json.loads(line) for line in lines[:-1] if line]  # a running job may be in the middle of the last one
    return sorted({record["step"]: record for record in records}.values(), key=lambda record: int(record["step"]))


def read_evaluation(folder: Path) -> Evaluation | None:
    path = folder / "eval" / "captions.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    scores = sorted(summary["scores"], key=lambda score: int(score["step"]))
    texts = [(path.parent / Path(score["file"]).name).read_text() for score in scores]
    return Evaluation(summary["data"], scores, [[json.loads(line) for line in text.splitlines()] for text in texts])


def read_images(address: str, wanted: set[str]) -> dict[str, bytes]:
    """The first image of each wanted sample; those that are not there, in a corpus made again, are left out."""
    found: dict[str, bytes] = {}
    try:
        for sample in read_samples(open_store(address)):
            if len(found) == len(wanted):
                break
            data = sample.images[0].data if sample.id in wanted and sample.images else None
            if data is not None:
                found[sample.id] = data
    except (MissingKey, StoreError, BrokenShard) as error:
        raise ConfigError(f"{address}: {error}") from None
    return found


# ---------------------------------------------------------------- the page


def head(run: Run, folder: Path, records: list[Record], evaluation: Evaluation | None) -> str:
    tiles: list[tuple[str, str]] = []
    if evaluation is not None and evaluation.scores:
        first, last = evaluation.scores[0], evaluation.scores[-1]
        tiles.append((f"{first['cider']:.1f} → {last['cider']:.1f}", f"CIDEr on {len(evaluation.rows[-1])} images"))
    last_record = records[-1] if records else {}
    done = f"{last_record.get('step', 0):,} of {run.train.steps:,}"
    tiles.append((done, "optimizer steps"))
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    if losses:
        tiles.append((f"{losses[0]:.3g} → {losses[-1]:.3g}", "training loss"))
    rates = [record["samples_per_s"] for record in records if record.get("samples_per_s") is not None]
    if rates:
        tiles.append((f"{sorted(rates)[len(rates) // 2]:,.0f}", "samples per second (median)"))
    boxes = "".join(f'<div class="card tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles)
    return (
        f"<h1>{escape(run.name)}</h1>\n<p>{escape(run.model.family)} on {escape(', '.join(run.sources))}, "
        f"{escape(run.strategy)} over {run.nodes:,} {'node' if run.nodes == 1 else 'nodes'}</p>\n"
        f'<div class="tiles">{boxes}</div>'
    )


def curves(run: Run, records: list[Record]) -> str:
    """Loss, learning rate, throughput and waiting, as inline SVG."""
    if not records:
        return "<h2>Training</h2><p>No step has been logged yet.</p>"
    losses = [line(records, "loss", "all sources")]
    if len(run.sources) > 1:
        losses += [line(records, f"loss/{name}", name) for name in run.sources]
    figures = [
        chart("Loss", "nats per target token", losses),
        chart("Learning rate", "AdamW", [line(records, "lr", "learning rate")]),
        chart("Throughput", "samples per second", [line(records, "samples_per_s", "samples/s")]),
        chart(
            "Where time and tokens go",
            "share",
            [line(records, "data_wait", "waiting for data"), line(records, "padding", "padding")],
        ),
    ]
    return '<h2>Training</h2>\n<div class="charts">' + "\n".join(figures) + "</div>"


def line(records: list[Record], key: str, label: str) -> Line:
    known = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return Line(label, [step for step, _ in known], [value for _, value in known])


def gallery(evaluation: Evaluation, samples: int) -> str:
    """Held-out images with a true caption and what the model says, before and after."""
    shown = [row["id"] for row in evaluation.rows[-1][:samples]]
    images = read_images(evaluation.data, set(shown))
    said = [{row["id"]: row for row in rows} for rows in evaluation.rows]
    cards = []
    for key in shown:
        truth = said[-1][key]["references"]
        spoken = [(score["step"], rows[key]["caption"]) for score, rows in zip(evaluation.scores, said, strict=True)]
        cards.append(card(images.get(key), truth, spoken))
    explained = "Images that training never saw. Green: the words of one of the references."
    return f'<h2>Held-out images</h2>\n<p>{explained}</p>\n<div class="samples">' + "\n".join(cards) + "</div>"


def card(image: bytes | None, truth: list[str], spoken: list[tuple[int, str]]) -> str:
    entries = [f"<dt>truth</dt><dd>{escape(truth[0])}</dd>"]
    for step, caption in spoken:
        label = "before training" if step == 0 else f"after step {step:,}"
        right = ' class="right"' if caption in truth else ""
        entries.append(f"<dt>{label}</dt><dd{right}>{escape(caption) or '(nothing)'}</dd>")
    return f'<div class="card sample">{picture(image, truth[0])}<dl>{"".join(entries)}</dl></div>'


def facts(run: Run, folder: Path) -> str:
    """What the run is: the values that matter most, and all of run.json to open."""
    train, model = run.train, run.model
    rows = [
        ("Folder", str(folder.resolve())),
        ("Commit", commit(folder)),
        ("Vision", model.vision.name if not model.vision.architecture else _short(model.vision.architecture)),
        ("Language", model.language.name or _short(model.language.architecture)),
        ("Trained parts", ", ".join(model.trainable)),
        *(
            (
                f"Source {name}",
                f"{source.data}: {source.batch:,} {source.form} samples per step, weight {source.weight:g}",
            )
            for name, source in run.sources.items()
        ),
        ("Learning rate", f"{train.learning_rate:g}, {train.schedule} after {train.warmup:,} steps of warm-up"),
        ("Processes", f"{run.nodes:,} nodes x {run.processes_per_node:,}, {run.strategy}, {run.precision}"),
        ("Accumulation", f"{train.accumulate:,} micro-steps per optimizer step"),
        ("Seed", str(train.seed)),
    ]
    table = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    whole = escape(json.dumps(run.model_dump(mode="json"), indent=2))
    return (
        f'<h2>The run</h2>\n<div class="card table"><table>{table}</table></div>\n<h2>Every value</h2>\n'
        f'<details class="card"><summary>run.json</summary><pre>{whole}</pre></details>'
    )


def commit(folder: Path) -> str:
    """The git commit of the newest submission, and whether the checkout had changes of its own."""
    submissions = sorted(path.parent for path in folder.glob("submissions/*/commit.txt"))
    if not submissions:
        return "not recorded"
    changes = submissions[-1] / "dirty.diff"
    dirty = " with uncommitted changes" if changes.exists() and changes.stat().st_size else ""
    return (submissions[-1] / "commit.txt").read_text().strip() + dirty


def _short(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
