"""``python -m hpc_mm.score checkpoint=RUN images=FOLDER texts=FILE out=scores.csv``: how well images show texts.

Every image of the folder is scored with every text: each line of a ``.txt`` file, or the one text that is given
itself. A ``.csv`` or ``.jsonl`` file of pairs (``image``, ``text``) has just these scored. Beside the CSV stands a page
of the highest scores. Never torch before all that can be checked without is.
"""

from __future__ import annotations

import csv
import io
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from pydantic import Field

from hpc_mm.annotations import json_lines
from hpc_mm.answerer import Weights
from hpc_mm.config import ConfigError, parse_arguments, unknown, validated
from hpc_mm.data.pictures import FORMATS
from hpc_mm.data.store import written_aside
from hpc_mm.gallery import thumbnail
from hpc_mm.judging import Judge, found
from hpc_mm.metrics import vqascore
from hpc_mm.page import document, picture

IMAGES = 64  # whose features are on the device together
READS = 16  # images read at once
TOLD = 3  # of several of the same mistakes
COLUMNS = ("image", "text", "score")
TEXT, CSV, LINES = FILES = (".txt", ".csv", ".jsonl")
STYLE = (
    ".sample { grid-template-columns: 160px 1fr; } .sample img { width: 160px; height: 160px; object-fit: contain; }"
)


class Score(Judge):
    """What hpc_mm.score takes."""

    images: str = Field(description="folder of images, and of folders of them")
    texts: str = Field(description="a .txt file of a text per line, a .csv or .jsonl file of pairs, or a text itself")
    out: str = Field(description="the .csv file to write; the page beside it ends in .html")
    mode: Literal["vqascore", "p_yes"] = Field("vqascore", description="as the paper has it, or the probability of Yes")
    shown: int = Field(200, ge=0, description="pairs on the page, those that score highest; 0 = no page")


@dataclass(frozen=True)
class Pairs:
    """What is scored."""

    folder: Path
    images: list[str]  # files, relative to the folder
    texts: list[str]
    names: list[str]  # of the texts, for errors
    pairs: list[tuple[int, int]]  # places of image and text, in the order of the CSV


# ---------------------------------------------------------------- what is scored


def pairs_of(options: Score) -> Pairs:
    """ConfigError where there is nothing to score, or where an image is missing or cannot be read."""
    folder, file = Path(options.images).expanduser(), Path(options.texts).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"images={options.images}: there is no such folder")
    kind = file.suffix.lower()
    if kind in FILES and not file.is_file():
        raise ConfigError(f"texts={options.texts}: there is no such file")
    if kind in (CSV, LINES):
        some = listed_pairs(folder, file)
    else:
        texts = text_lines(file) if kind == TEXT else {"text": options.texts}
        images = image_files(folder)
        every = [(image, text) for image in range(len(images)) for text in range(len(texts))]
        some = Pairs(folder, images, list(texts.values()), list(texts), every)
    empty = [name for name, text in zip(some.names, some.texts, strict=True) if not text.strip()]
    refuse("texts", options.texts, empty, len(some.names), "texts are empty")
    with ThreadPoolExecutor(READS, "images") as threads:
        data = threads.map(lambda name: thumbnail((folder / name).read_bytes()), some.images)
        broken = [name for name, small in zip(some.images, data, strict=True) if not small]
    refuse("images", options.images, broken, len(some.images), "images cannot be read")
    return some


def refuse(key: str, value: str, wrong: Sequence[str], of: int, what: str) -> None:
    if wrong:
        first = ", ".join(wrong[:TOLD]) + (", ..." if len(wrong) > TOLD else "")
        raise ConfigError(f"{key}={value}: {len(wrong):,} of {of:,} {what}: {first}")


def image_files(folder: Path) -> list[str]:
    """Files that are images by their names, in order; how many are not is told."""
    suffixes = {suffix for suffix, kind in Picture.registered_extensions().items() if kind in FORMATS}
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    images = [name for name in files if Path(name).suffix.lower() in suffixes]
    if not images:
        raise ConfigError(f"images={folder}: none of its {len(files):,} files is an image by its name")
    if len(images) < len(files):
        print(f"{len(files) - len(images):,} files of {folder} are no images by their names, and left out")
    return images


def text_lines(file: Path) -> dict[str, str]:
    """The texts by the names of their lines."""
    text = text_of(file).removesuffix("\n")
    if not text:
        raise ConfigError(f"texts={file} is empty")
    return {f"line {number}": line for number, line in enumerate(text.split("\n"), 1)}


def text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"texts={file} is not UTF-8: {error}") from None


def listed_pairs(folder: Path, file: Path) -> Pairs:
    """The pairs of a CSV with a head, or of JSON lines."""
    rows = csv_rows(file) if file.suffix.lower() == CSV else json_rows(file)
    if not rows:
        raise ConfigError(f"texts={file} holds no pairs")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in COLUMNS[:2]):
            raise ConfigError(f"texts={file}: pair {number} is {row!r}; it must have an image and a text")
    images = {name: place for place, name in enumerate(dict.fromkeys(row["image"] for row in rows))}
    refuse("texts", str(file), [name for name in images if not is_inside(folder, name)], len(images), "are missing")
    pairs = [(images[row["image"]], number) for number, row in enumerate(rows)]
    texts = [row["text"] for row in rows]
    return Pairs(folder, list(images), texts, [f"pair {number}" for number in range(1, len(rows) + 1)], pairs)


def is_inside(folder: Path, name: str) -> bool:
    return (folder / name).is_file() and (folder / name).resolve().is_relative_to(folder.resolve())


def csv_rows(file: Path) -> list[Any]:
    try:
        return list(csv.DictReader(io.StringIO(text_of(file), newline=""), strict=True))
    except csv.Error as error:
        raise ConfigError(f"texts={file} is no CSV: {error}") from None


def json_rows(file: Path) -> list[Any]:
    try:
        return json_lines(text_of(file))
    except ValueError as error:
        raise ConfigError(f"texts={file} is not JSON lines: {error}") from None


# ---------------------------------------------------------------- scores


def scores_of(options: Score, some: Pairs, weights: Weights) -> NDArray[np.float64]:
    """Of every pair. ConfigError where a text is too long for the model."""
    scorer = options.load(weights)
    cleaned = scorer.check(dict(zip(some.names, some.texts, strict=True)))
    if cleaned:
        print(f"{cleaned:,} texts hold what would be taken for a special token, which is removed")
    of_image: list[list[int]] = [[] for _ in some.images]
    for place, (image, _) in enumerate(some.pairs):
        of_image[image].append(place)
    scores = np.empty(len(some.pairs))
    for start in range(0, len(some.images), IMAGES):
        names = some.images[start : start + IMAGES]
        places = [place for own in of_image[start : start + IMAGES] for place in own]
        texts = {text: number for number, text in enumerate(dict.fromkeys(some.pairs[place][1] for place in places))}
        pairs = [(image - start, texts[text]) for image, text in (some.pairs[place] for place in places)]
        data = [(some.folder / name).read_bytes() for name in names]
        values = scorer.log_probabilities(data, [some.texts[text] for text in texts], pairs, names)
        scores[places] = vqascore(values, options.mode)
    return scores


# ---------------------------------------------------------------- what is written


def table(some: Pairs, scores: Iterable[float]) -> str:
    """The CSV, in the order of the pairs; every digit of a score."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for (image, name), score in zip(some.pairs, scores, strict=True):
        writer.writerow((some.images[image], some.texts[name], repr(float(score))))
    return text.getvalue()


def page(title: str, some: Pairs, scores: NDArray[np.float64], shown: int) -> str:
    """The pairs that score highest, the best first."""
    order = np.argsort(-scores, kind="stable")[:shown].tolist()
    wanted = dict.fromkeys(some.images[some.pairs[place][0]] for place in order)
    with ThreadPoolExecutor(READS, "images") as threads:
        made = threads.map(lambda name: thumbnail((some.folder / name).read_bytes()), wanted)
        small = dict(zip(wanted, made, strict=True))
    cards = []
    for place in order:
        image, text = some.images[some.pairs[place][0]], some.texts[some.pairs[place][1]]
        facts = f"<dt>Score</dt><dd><b>{scores[place]:.4f}</b></dd><dt>Text</dt><dd>{escape(text)}</dd>"
        facts += f"<dt>Image</dt><dd>{escape(image)}</dd>"
        cards.append(f'<div class="card sample">{picture(small[image], image)}<dl>{facts}</dl></div>')
    told = f"{len(order):,} of {len(scores):,} pairs of image and text, those that score highest"
    body = [f"<h1>{escape(title)}</h1>", f"<p>{told}</p>", '<div class="samples">', *cards, "</div>"]
    return document(title, "\n".join(body), STYLE)


def run(options: Score) -> list[Path]:
    """Score, and write; the files."""
    out = Path(options.out).expanduser()
    if out.suffix.lower() != CSV or out.is_dir():
        raise ConfigError(f"out={options.out}: it must name a .csv file")
    weights = found(options.checkpoint, options.step)
    some = pairs_of(options)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):  # where nothing can be written, nothing is scored
        pass
    scores = scores_of(options, some, weights)
    files = {out: table(some, scores)}
    if options.shown:
        title = f"{weights.folder.name}, step {weights.step}: {options.mode}"
        files[out.with_suffix(".html")] = page(title, some, scores, options.shown)
    for file, text in files.items():
        with written_aside(file) as part:
            part.write_text(text, encoding="utf-8", errors="replace")
    return list(files)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, or 2 for a user's mistake, told in one line on stderr."""
    try:
        given = parse_arguments(arguments)
        for name in given:
            if name not in Score.model_fields:
                raise unknown("key", name, Score.model_fields)
        for name, field in Score.model_fields.items():
            if field.is_required() and name not in given:
                raise ConfigError(f"{name}=... is missing: {field.description}")
        for file in run(validated(Score, given)):
            print(file)
    except (ConfigError, OSError) as error:
        print(f"hpc_mm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
