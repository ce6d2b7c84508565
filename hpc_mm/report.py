"""``python -m hpc_mm.report run=runs/NAME``: one self-contained report.html of what a run is and did. Never torch."""

from __future__ import annotations

import base64
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

Record = dict[str, Any]

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #ffffff; --ink: #16191f; --soft: #5c6470; --rule: #e1e4ea;
  --accent: #2563eb; --good: #15803d; }
@media (prefers-color-scheme: dark) { :root { --paper: #101318; --card: #191d24; --ink: #e8eaee; --soft: #9aa3b0;
  --rule: #2b313b; --accent: #7aa7ff; --good: #4ade80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 40px 0 12px; }
p { margin: 0 0 12px; color: var(--soft); }
code, pre { font: 13px/1.5 ui-monospace, monospace; }
.tiles, .charts, .samples { display: grid; gap: 16px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); margin-top: 24px; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 16px; margin: 0; }
.tile b { display: block; font-size: 24px; line-height: 1.25; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 14px; }
.chart figcaption { font-weight: 600; margin-bottom: 4px; }
.chart svg { display: block; width: 100%; height: auto; color: var(--soft); }
.sample { display: grid; grid-template-columns: 96px 1fr; gap: 14px; }
.sample img { width: 96px; height: 96px; object-fit: cover; border-radius: 8px; border: 1px solid var(--rule); }
dl { margin: 0; font-size: 14px; line-height: 1.4; min-width: 0; overflow-wrap: anywhere; }
dt { color: var(--soft); font-size: 12px; }
dd { margin: 0 0 6px; }
dd.right { color: var(--good); }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 7px 12px 7px 0; border-top: 1px solid var(--rule); }
tr:first-child > * { border-top: 0; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; width: 1%; padding-right: 32px; }
td { overflow-wrap: anywhere; }
summary { cursor: pointer; }
pre { overflow-x: auto; margin: 12px 0 0; }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


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
    page = PAGE.format(title=escape(f"{run.name}: training report"), style=STYLE, body="\n".join(body))
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


def picture(image: bytes | None, alternative: str) -> str:
    if image is None:
        return "<p>no picture</p>"
    url = f"data:{mime_type(image)};base64,{base64.b64encode(image).decode()}"
    return f'<img src="{url}" alt="{escape(alternative)}" width="96" height="96">'


def mime_type(image: bytes) -> str:
    starts = {b"\xff\xd8": "image/jpeg", b"\x89PNG": "image/png", b"GIF8": "image/gif", b"RIFF": "image/webp"}
    return next((kind for start, kind in starts.items() if image.startswith(start)), "application/octet-stream")


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
