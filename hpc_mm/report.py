"""``python -m hpc_mm.report run=runs/NAME``: one self-contained report.html of what a run is and did. Never torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from pydantic import Field

from hpc_mm import report_scores
from hpc_mm.charts import Line, chart
from hpc_mm.config import ConfigError, Part, Positive, Run, parse_arguments, read_run, with_overrides
from hpc_mm.data.store import MissingKey, StoreDown, StoreError
from hpc_mm.page import document
from hpc_mm.report_scores import Series, series_of
from hpc_mm.run_scores import scores_of

Record = dict[str, Any]


class Report(Part):
    """What hpc_mm.report takes."""

    run: str = Field(default="", description="folder of the run")
    samples: Positive = Field(default=12, description="held-out images that are shown")


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options: Report = with_overrides(Report(), parse_arguments(sys.argv[1:] if arguments is None else arguments))
        if not options.run:
            raise ConfigError("run=FOLDER is missing: the folder of the run to report on")
        path, series = write_report(Path(options.run), options.samples)
    except (ConfigError, MissingKey, StoreError, StoreDown, OSError) as error:  # OSError: of disks
        print(str(error) or repr(error), file=sys.stderr)
        return 2
    for one in series:
        print(one)
    if not series:
        print(f"no evaluation in {options.run}/eval yet: an eval/ script makes one")
    print(path)
    return 0


def write_report(folder: Path, samples: int) -> tuple[Path, list[Series]]:
    """Write ``report.html`` into the run's folder, whole or not at all."""
    run = read_run(folder)
    records = read_metrics(folder)
    evaluations = scores_of(folder)
    series = series_of(evaluations)
    body = [head(run, records, series), curves(run, records)]
    if series:
        body += [report_scores.section(folder, evaluations, series), report_scores.gallery(series, samples)]
    body.append(facts(run, folder))
    page = document(f"{run.name}: training report", "\n".join(body), report_scores.STYLE)
    path = folder / "report.html"
    aside = folder / "report.html.partial"
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)
    return path, series


# ---------------------------------------------------------------- what the run left


def read_metrics(folder: Path) -> list[Record]:
    """The lines of metrics.jsonl, one per step: a resumed run writes some steps again, and the later line counts."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.exists() else []
    records = [json.loads(line) for line in lines[:-1] if line]  # a running job may be in the middle of the last one
    return sorted({record["step"]: record for record in records}.values(), key=lambda record: int(record["step"]))


# ---------------------------------------------------------------- the page


def head(run: Run, records: list[Record], series: list[Series]) -> str:
    tiles = report_scores.tiles(series)
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
