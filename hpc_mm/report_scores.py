"""What a run's report tells of its evaluations: scores over steps as tiles, charts and a table, and held-out images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hpc_mm.benchmark import Question, read_image
from hpc_mm.charts import Line, chart
from hpc_mm.config import ConfigError
from hpc_mm.data.shards import BrokenShard, ShardReader, read_manifest
from hpc_mm.data.store import MissingKey, StoreError, open_store
from hpc_mm.gallery import interval, thumbnail
from hpc_mm.page import picture
from hpc_mm.results import VQASCORE, Answered, Entry, Judged, read_rows
from hpc_mm.run_scores import RunScore
from hpc_mm.trials import QUESTIONS, read_questions, some_of

METRICS = {"cider": "CIDEr", "vqa-accuracy": "VQA accuracy", "okvqa-accuracy": "VQA accuracy", "roc-auc": "ROC AUC"}
METRICS |= {VQASCORE: "VQAScore", "p_yes": "P(Yes)"}
CAPTIONS = "cider"  # the metric of captions
COLUMNS = ("Benchmark", "Step", "Which", "Metric", "Score", "95 % interval", "Page", "Protocol")
STYLE = """
a { color: var(--accent); }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(184px, 100%), 1fr)); }
.tile b { font-size: 21px; }
.charts + .table { margin-top: 16px; }
.scores th { width: auto; padding-right: 24px; }
.scores td { white-space: nowrap; padding-right: 24px; font-variant-numeric: tabular-nums; }
.scores :is(th, td):is(:nth-child(2), :nth-child(5)) { text-align: right; }
.scores .protocol { white-space: normal; min-width: 32ch; padding-right: 0; }
details > .table { margin-top: 8px; }
.table + details { margin-top: 16px; }
.scores tbody tr:first-child > * { border-top: 1px solid var(--rule); }
"""


@dataclass(frozen=True)
class Series:
    """One score of a benchmark by one protocol, over a run's steps: all that one line may connect."""

    benchmark: str
    label: str  # such as "4 shots", or "group": no other series of its benchmark and metric has it
    alone: bool  # the benchmark has no other series
    points: list[tuple[RunScore, Entry]]  # evaluation and its entry, first step first

    @property
    def first(self) -> Entry:
        return self.points[0][1]

    @property
    def metric(self) -> str:
        return METRICS.get(self.first.metric, self.first.metric)

    @property
    def line(self) -> Line:
        return Line(self.label, [one.step for one, _ in self.points], [entry.score for _, entry in self.points])

    def __str__(self) -> str:
        which = "" if self.alone else f" ({self.label})"
        told = ", ".join(f"{entry.score:.1f} at step {one.step:,}" for one, entry in self.points)
        return f"{self.benchmark} {self.first.metric}{which} {told}"


def series_of(evaluations: Sequence[RunScore]) -> list[Series]:
    """By benchmark, then its first group (OpenFlamingo's rules, VQAScore) before others, then as they rank there (few
    shots before many), then most steps first."""
    found: dict[tuple[str, str, str], list[tuple[RunScore, Entry]]] = {}
    for one in evaluations:
        for entry in one.entries:
            found.setdefault((one.benchmark, entry.name, entry.protocol), []).append((one, entry))
    counts = Counter(benchmark for benchmark, _, _ in found)
    names = Counter[tuple[str, str]]()
    series = []
    for benchmark, name, protocol in sorted(found, key=lambda key: order(key, found[key])):
        points = found[benchmark, name, protocol]
        names[benchmark, name] += 1
        number = names[benchmark, name]
        unlike = f", protocol {number}" if number > 1 else ""  # such as of fewer questions; the table tells which
        series.append(Series(benchmark, points[0][1].label + unlike, counts[benchmark] == 1, points))
    return series


def order(key: tuple[str, str, str], points: Sequence[tuple[RunScore, Entry]]) -> tuple[Any, ...]:
    (benchmark, _, protocol), entry = key, points[0][1]
    return benchmark, entry.group, entry.rank, -len(points), protocol


def by_benchmark(series: Sequence[Series]) -> dict[str, list[Series]]:
    found: dict[str, list[Series]] = {}
    for one in series:
        found.setdefault(one.benchmark, []).append(one)
    return found


def main_of(series: Sequence[Series]) -> Series:
    """Of one benchmark: of its first group the one of most steps."""
    return max(series, key=lambda one: (one.first.group == series[0].first.group, len(one.points)))


# ---------------------------------------------------------------- scores


def tiles(series: Sequence[Series]) -> list[tuple[str, str]]:
    """For every benchmark what its score was and is, and what that is."""
    found = []
    for name, some in by_benchmark(series).items():
        one = main_of(some)
        ends = (one.points[0], one.points[-1]) if len(one.points) > 1 else one.points
        told = " → ".join(f"{entry.score:.1f}" for _, entry in ends)
        found.append((told, f"{one.metric}, {name}, {one.label}"))
    return found


def section(folder: Path, evaluations: Sequence[RunScore], series: Sequence[Series]) -> str:
    """A chart of every benchmark that was scored at several steps, and a table of all scores.

    Figures of parts of the items, and by other ways than VQAScore, are many: they stand in a table to open.
    """
    charts, shown, folded = [], list[Series](), list[Series]()
    for name, some in by_benchmark(series).items():
        main = [one for one in some if one.first.group == some[0].first.group]
        if any(len(one.points) > 1 for one in main):
            alone = f", {main[0].label}" if len(main) == 1 else ""
            charts.append(chart(f"{name}: {main[0].metric}{alone}", main[0].metric, [one.line for one in main]))
        shown += main
        for one in some[len(main) :]:
            (folded if isinstance(one.first, Judged) else shown).append(one)
    figures = f'<div class="charts">{"".join(charts)}</div>\n' if charts else ""
    more = (
        f"<details><summary>Further figures</summary>{table(folder, evaluations, folded)}</details>" if folded else ""
    )
    return f"<h2>Evaluation</h2>\n{figures}{table(folder, evaluations, shown)}{more}"


def table(folder: Path, evaluations: Sequence[RunScore], series: Sequence[Series]) -> str:
    pages = {one.folder: link(folder, one) for one in evaluations}
    head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    rows = []
    for some in series:
        protocol = f'<td class="protocol" rowspan="{len(some.points)}"><code>{escape(some.first.protocol)}</code></td>'
        for one, entry in some.points:
            cells = (
                escape(some.benchmark),
                f"{one.step:,}",
                escape(some.label),
                escape(some.metric),
                f"<b>{entry.score:.1f}</b>",
                interval(entry.low, entry.high),
                pages[one.folder],
            )
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"{protocol}</tr>")
            protocol = ""  # it spans the rows of its series
    return (
        '<div class="card table" role="region" aria-label="Scores" tabindex="0"><table class="scores">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def link(folder: Path, one: RunScore) -> str:
    """To an evaluation's own page, from the run's folder, so that a run that is moved keeps it."""
    page = one.folder / "index.html"
    if not page.is_file():
        return ""
    label = escape(f"examples of {one.benchmark} at step {one.step:,}")
    return f'<a href="{quote(str(page.relative_to(folder)))}" aria-label="{label}">examples</a>'


# ---------------------------------------------------------------- held-out images


def gallery(series: Sequence[Series], samples: int) -> str:
    """Held-out images with a true answer and what the model says, before and after; nothing where none was asked."""
    asking = [one for one in series if isinstance(one.first, Answered)]
    if not asking:
        return ""
    one = for_gallery(asking)
    last = one.points[-1][0]
    store = open_store(str(last.folder))
    try:
        asked = read_questions(store, QUESTIONS)
        said = {some.step: answers(some, entry) for some, entry in one.points if isinstance(entry, Answered)}
    except MissingKey as missing:
        raise ConfigError(f"{missing}, which its results are of: run the evaluation again") from None
    asked = some_of(asked, min(samples, len(asked)))
    images = read_images(last.data, asked)
    cards = [
        card(images.get(question.id), question, {step: texts.get(question.id, "") for step, texts in said.items()})
        for question in asked
    ]
    explained = f"Images of {one.benchmark}, {one.label}. Green: the words of one of the references."
    return f'<h2>Held-out images</h2>\n<p>{escape(explained)}</p>\n<div class="samples">' + "\n".join(cards) + "</div>"


def for_gallery(series: Sequence[Series]) -> Series:
    """The first benchmark that was scored at several steps, one of captions if there is any."""
    some = [main_of(one) for one in by_benchmark(series).values()]
    return min(some, key=lambda one: (len(one.points) == 1, one.first.metric != CAPTIONS))


def answers(evaluation: RunScore, entry: Answered) -> dict[str, str]:
    """What the model said in the first trial, by question."""
    rows = read_rows(open_store(str(evaluation.folder)), entry.trials[0].file)
    return {row["id"]: row["text"].strip() for row in rows}


def read_images(address: str, asked: Sequence[Question]) -> dict[str, bytes]:
    """A small picture for each question; those that are not there, in a corpus made again, are left out."""
    found: dict[str, bytes] = {}
    try:
        reader = ShardReader(open_store(address))
        shards = {shard.name for shard in read_manifest(reader.store)}
        for question in asked:
            keys = reader.index(question.shard).keys if question.shard in shards else []
            if keys[question.sample : question.sample + 1] == [question.image]:
                found[question.id] = thumbnail(read_image(reader, question))
    except (MissingKey, StoreError, BrokenShard) as error:
        raise ConfigError(f"{address}: {error}") from None
    return found


def card(image: bytes | None, question: Question, said: dict[int, str]) -> str:
    """``said``: answers by step."""
    references = [text.strip() for text in question.references]
    truth = references[0] if references else ""
    entries = [f"<dt>question</dt><dd>{escape(question.text)}</dd>"] if question.text else []
    entries.append(f"<dt>truth</dt><dd>{escape(truth)}</dd>")
    for step, text in said.items():
        label = "before training" if step == 0 else f"after step {step:,}"
        right = ' class="right"' if text in references else ""
        entries.append(f"<dt>{label}</dt><dd{right}>{escape(text) or '(nothing)'}</dd>")
    return f'<div class="card sample">{picture(image or None, truth)}<dl>{"".join(entries)}</dl></div>'
