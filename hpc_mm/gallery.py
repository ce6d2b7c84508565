"""The HTML page of an evaluation: its scores, and examples to sort and to search. One file, no server. Never torch."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from hpc_mm.data.pictures import UnreadableImage, opened_picture, orientation
from hpc_mm.data.recode import as_jpeg, shrunk, turned
from hpc_mm.gallery_script import SCRIPT
from hpc_mm.page import document

SIDE = 160  # pixels of a thumbnail's longer side
QUALITY = 80  # of its JPEG
COLUMNS = ("Shots", "Selection", "Metric", "Score", "95 % interval", "Seeds", "Other metrics", "Protocol")


@dataclass(frozen=True)
class Shot:
    """A demonstration as it stood in a prompt."""

    image: str  # key of an image; empty where it stood without
    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A question of the benchmark, what came before it, and what the model said."""

    id: str
    image: str  # key of an image
    question: str
    demonstrations: tuple[Shot, ...]
    prediction: str
    truth: tuple[str, ...]
    score: float  # shown times 100
    trial: str  # such as "4 shots, seed 42"


def thumbnail(data: bytes) -> bytes:
    """A JPEG of the upright picture, its longer side at most 160 pixels; nothing where the bytes give no picture."""
    try:
        with opened_picture(data) as image:
            share = min(1.0, SIDE / max(image.size))
            width, height = (max(1, round(length * share)) for length in image.size)
            turn = orientation(image)
            small = shrunk(image, (width, height))
    except UnreadableImage:  # what that means for its score is told where it is scored
        return b""
    return as_jpeg(turned(small, turn), QUALITY)


def page(
    title: str, summary: Sequence[Mapping[str, Any]], examples: Sequence[Example], images: Mapping[str, bytes]
) -> str:
    """A whole HTML page. Pure: same values, same text.

    ``summary``: the scores of results.json. ``images``: thumbnails by key; for one that is missing or has no bytes
    a placeholder is shown, and one that no example shows is left out.
    """
    asked = any(example.question for example in examples)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="card table" role="region" aria-label="Scores" tabindex="0">{table(summary)}</div>',
        EXAMPLES.format(prompt="Question" if asked else "Demonstrations"),
        f'<script type="application/json" id="data">{block(examples, images)}</script>',
    ]
    return document(title, "\n".join(body), STYLE, SCRIPT)


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th scope="col" role="columnheader">{name}</th>' for name in COLUMNS)
    return (
        f'<table class="scores" role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(map(line, summary))}</tbody></table>'
    )


def line(score: Mapping[str, Any]) -> str:
    """A row of the table of scores. Beside each seed stands the score of its trial."""
    trials = [trial for trial in score["trials"] if trial["seed"] is not None]
    seeds = ", ".join(f"{trial['seed']} ({trial['score']:.1f})" for trial in trials)
    others = ", ".join(f"<span>{escape(name)} {value:.1f}</span>" for name, value in score["others"].items())
    cells = [
        str(score["shots"]),
        escape(score["selection"]),
        escape(score["metric"]),
        f"<b>{score['score']:.1f}</b>",
        interval(score["low"], score["high"]),
        escape(seeds) or "none",
        others or "none",
        f"<code>{escape(score['protocol'])}</code>",
    ]
    told = zip(COLUMNS, cells, strict=True)
    row = "".join(f'<td role="cell" data-label="{name}">{cell}</td>' for name, cell in told)
    return f'<tr role="row">{row}</tr>'


def interval(low: float | None, high: float | None) -> str:
    """One item has none."""
    if low is None or high is None or not math.isfinite(high - low):
        return "not known"
    return f"{low:.1f} to {high:.1f}"


def block(examples: Sequence[Example], images: Mapping[str, bytes]) -> str:
    """JSON that ends no script element: nothing in it is markup, as it is ASCII without a less-than sign."""
    keys = dict.fromkeys(
        key for example in examples for key in (example.image, *(shot.image for shot in example.demonstrations))
    )
    data = {
        "images": {key: base64.b64encode(images[key]).decode() for key in keys if images.get(key)},
        "examples": [asdict(example) for example in examples],
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


EXAMPLES = """<h2 id="examples">Examples</h2>
<noscript><p>They are shown by a script, which this browser does not run.</p></noscript>
<div class="controls" role="search">
<label>Search all texts <input type="search" id="search" autocomplete="off" spellcheck="false"></label>
<label>Trial <select id="trial"><option value="">all</option></select></label>
<p id="count" role="status"></p>
</div>
<div class="card table">
<table class="examples" role="table" aria-labelledby="examples">
<thead role="rowgroup"><tr role="row">
<th scope="col" role="columnheader">Image</th>
<th scope="col" role="columnheader" aria-sort="none"><button type="button" data-sort="id">Id</button></th>
<th scope="col" role="columnheader" aria-sort="none"><button type="button" data-sort="trial">Trial</button></th>
<th scope="col" role="columnheader">{prompt}</th>
<th scope="col" role="columnheader">Prediction</th>
<th scope="col" role="columnheader">Truth</th>
<th scope="col" role="columnheader" aria-sort="none"><button type="button" data-sort="score">Score</button></th>
</tr></thead>
<tbody role="rowgroup" id="rows"></tbody>
</table>
</div>
<button type="button" id="more" hidden></button>"""

STYLE = """
main { max-width: 1280px; }
h1 { margin-bottom: 20px; overflow-wrap: anywhere; }
.scores th, .examples th { width: auto; padding-right: 12px; }
.scores td { white-space: nowrap; padding-right: 24px; font-variant-numeric: tabular-nums; }
.scores td:nth-last-child(2) { white-space: normal; min-width: 16ch; }
.scores span { white-space: nowrap; }
.scores td:last-child { white-space: normal; min-width: 32ch; padding-right: 0; }
tbody tr:first-child > * { border-top: 1px solid var(--rule); }
button, input, select { font: inherit; font-size: 14px; color: var(--ink); background: var(--card); max-width: 100%;
  border: 1px solid var(--rule); border-radius: 8px; padding: 0 12px; min-height: 38px; }
button { cursor: pointer; }
button:hover { border-color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.controls { display: flex; flex-wrap: wrap; gap: 12px 16px; align-items: end; margin-bottom: 12px; }
.controls label { color: var(--soft); font-size: 12px; display: grid; gap: 4px; min-width: 0; }
.controls label:first-child { flex: 0 1 360px; }
.controls p { margin: 0; line-height: 38px; font-size: 14px; font-variant-numeric: tabular-nums; }
th button { border: 0; border-radius: 2px; padding: 0; min-height: 0; background: none; font-weight: 500;
  color: inherit; }
th button:hover { color: var(--ink); }
th button::after { content: " \\2195"; opacity: 0.6; }
[aria-sort=ascending] button, [aria-sort=descending] button { color: var(--accent); font-weight: 600; }
[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
.examples td { padding: 12px 20px 12px 0; line-height: 1.4; }
.examples td:last-child, .examples th:last-child { padding-right: 0; text-align: right; }
.examples .picture { width: 128px; }
.examples .id, .examples .trial { min-width: 14ch; max-width: 20ch; color: var(--soft); }
.examples .said { min-width: 12ch; max-width: 36ch; }
.examples .score { font-weight: 600; font-variant-numeric: tabular-nums; }
.examples .right { color: var(--good); }
.examples img, .missing { display: block; width: 108px; height: 108px; object-fit: contain; border-radius: 8px;
  background: var(--paper); border: 1px solid var(--rule); }
.missing { display: grid; place-items: center; color: var(--soft); font-size: 12px; }
.said p, .said li { white-space: pre-wrap; overflow-wrap: anywhere; }
.said p { margin: 0; color: inherit; }
.said ul { list-style: none; margin: 0; padding: 0; }
.said li + li { margin-top: 4px; }
.said small { color: var(--soft); }
.said p + details { margin-top: 6px; }
.said summary { color: var(--soft); white-space: nowrap; }
.shot { display: flex; gap: 10px; margin-top: 10px; }
.examples .shot :is(img, .missing) { flex: none; width: 56px; height: 56px; font-size: 11px; text-align: center; }
.shot p + p { font-weight: 600; }
#more { margin-top: 16px; }
@media (max-width: 900px) {
  main { padding: 24px 12px 48px; }
  .card.table { padding: 12px; }
  .controls label { flex: 1 1 140px; }
  .controls label:first-child { flex: 1 1 100%; }
  .controls p { flex: 1 1 100%; line-height: inherit; }
  table, thead, tbody { display: block; }
  tbody tr { display: grid; gap: 0 12px; padding: 12px 0; border-top: 1px solid var(--rule); }
  .scores tbody tr { grid-template-columns: repeat(auto-fill, minmax(90px, 1fr)); gap: 8px 12px; }
  .scores tbody tr:first-child { border-top: 0; padding-top: 0; }
  .examples tbody tr { grid-template: auto 1fr / 108px 1fr auto; }
  tbody tr > td, .scores td, .examples td { border: 0; padding: 0; min-width: 0; max-width: none; white-space: normal; }
  .scores thead, .examples thead th:not([aria-sort]) { position: absolute; width: 1px; height: 1px;
    overflow: hidden; clip-path: inset(50%); }
  .examples thead tr { display: flex; gap: 20px; padding-bottom: 6px; }
  thead th, tbody tr:first-child > td { border: 0; }
  [data-label]::before { content: attr(data-label); display: block; color: var(--soft); font-size: 12px; }
  .scores tbody td:nth-last-child(-n+3) { grid-column: 1 / -1; min-width: 0; }
  .examples .picture { grid-row: 1 / 3; width: auto; }
  .examples .score { grid-area: 1 / 3; }
  .examples .trial { grid-area: 2 / 2 / 3 / 4; }
  .examples .said { grid-column: 1 / 4; max-width: none; padding-top: 10px; }
}
"""
