"""Benchmarks of how faithfully an image shows a text: what is read of them, and the figures that they report.

A benchmark's folder holds its annotation files (``faithfulness_files``) and its images as they were published. An item
has one or two images and one or more texts, each image of which is scored with each text. Figures are shares and
correlations with 95 % intervals, where papers print percent; ``/`` divides a figure's name from that of the part of the
items which it is of.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from hpc_mm import faithfulness_files as files
from hpc_mm.agreement import (
    choice_each,
    kendall_each,
    matching_each,
    pairwise_accuracy_each,
    pearson_each,
    tie_calibration,
)
from hpc_mm.benchmark import digest, doubled
from hpc_mm.config import ConfigError, unknown
from hpc_mm.data.store import version_of
from hpc_mm.faithfulness_files import Item
from hpc_mm.intervals import Interval, mean_interval
from hpc_mm.metrics import roc_auc_each

Floats = NDArray[np.float64]
Figures = dict[str, Interval]

TOLD = 3  # of several missing images
STATS, AT_ONCE = 32, 64  # threads that look at images, and images of a thread's turn


@dataclass(frozen=True)
class Reader:
    """A benchmark: its annotation files, how many items are published (any number where none is given), and what is
    made of them. ``figures`` takes items and their scores, each (images, texts)."""

    files: tuple[str, ...]
    items: Callable[[Path], list[Item]]
    figures: Callable[[Sequence[Item], Sequence[Floats]], Figures]
    sizes: tuple[int, ...] = ()


def read(benchmark: str, folder: Path) -> list[Item]:
    """The items of a benchmark in their published order, all checked before any work but for their images.

    ConfigError for an unknown benchmark, an annotation file that is missing, damaged or another, an id that is there
    twice, and an image outside the folder.
    """
    reader = _known(benchmark)
    absent = [name for name in reader.files if not (folder / name).is_file()]
    if absent:
        raise ConfigError(f"{folder} has no {', '.join(absent)}; {benchmark} is read from {', '.join(reader.files)}")
    items = reader.items(folder)
    if not items:
        raise ConfigError(f"{folder} holds no items of {benchmark}")
    twice = doubled(item.id for item in items)
    if twice is not None:
        raise ConfigError(f"{folder}: item {twice} of {benchmark} is there twice")
    for name in image_names(items):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ConfigError(f"{folder}: image {name!r} of {benchmark} is not inside the folder")
    return items


def image_names(items: Sequence[Item]) -> list[str]:
    return list(dict.fromkeys(name for item in items for name in item.images))


def image_versions(benchmark: str, items: Sequence[Item], folder: Path) -> str:
    """What names the images' bytes as they lie there: a digest of their names, sizes and times (whole seconds, since a
    file system may forget the rest), for reading all of them takes too long. ConfigError where images are missing,
    listed and counted."""
    names = image_names(items)

    def looked_at(start: int) -> list[tuple[int, int] | None]:
        return [version_of(folder / name) for name in names[start : start + AT_ONCE]]

    with ThreadPoolExecutor(STATS, "images") as threads:  # a network's file system answers each after a while
        versions = [one for some in threads.map(looked_at, range(0, len(names), AT_ONCE)) for one in some]
    missing = [name for name, version in zip(names, versions, strict=True) if version is None]
    if missing:
        first = ", ".join(missing[:TOLD]) + (", ..." if len(missing) > TOLD else "")
        raise ConfigError(f"{folder}: {len(missing):,} of {len(names):,} images of {benchmark} are missing: {first}")
    found = ((name, *version) for name, version in zip(names, versions, strict=True) if version)
    return digest(json.dumps((name, time // 10**9, size)) for name, time, size in found)


def image_bytes(file: Path) -> bytes:
    """An image's file as it is; an array of EqBen's frames (.npy: height x width x BGR bytes) as PNG. ConfigError for
    another array."""
    if file.suffix != ".npy":
        return file.read_bytes()
    try:
        pixels = np.lib.format.open_memmap(file, mode="r")  # no more than the file holds, whatever its head says
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"{file} is no array: {error}") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ConfigError(f"{file} holds {pixels.dtype} of shape {pixels.shape}, not bytes of height x width x 3")
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1])).save(encoded, "PNG")
    return encoded.getvalue()


def results(benchmark: str, items: Sequence[Item], scores: Sequence[ArrayLike]) -> Figures:
    """A benchmark's figures by name. ``scores``: for each item (images, texts). ValueError where the scores are not of
    the items or not finite, and where the items do not suffice for a figure (one source without a negative label)."""
    reader = _known(benchmark)
    found = [np.asarray(matrix, dtype=np.float64) for matrix in scores]
    if len(found) != len(items) or not items:
        raise ValueError(f"scores of {len(found)} items for {len(items)} items of {benchmark}; each needs its own")
    for item, matrix in zip(items, found, strict=True):
        if matrix.shape != (len(item.images), len(item.texts)) or not np.isfinite(matrix).all():
            raise ValueError(
                f"item {item.id} of {benchmark} has scores of shape {matrix.shape}, which must be finite and "
                f"({len(item.images)}, {len(item.texts)})"
            )
    return reader.figures(items, found)


def _known(benchmark: str) -> Reader:
    if benchmark not in BENCHMARKS:
        raise unknown("benchmark", benchmark, BENCHMARKS)
    return BENCHMARKS[benchmark]


# ---------------------------------------------------------------- figures


def _parts(names: Iterable[Iterable[str]]) -> Mapping[str, list[int]]:
    """Places of the items of each part, by the part's name."""
    places: dict[str, list[int]] = {}
    for place, of in enumerate(names):
        for name in of:
            places.setdefault(name, []).append(place)
    return dict(sorted(places.items()))


def _matching(items: Sequence[Item], scores: Sequence[Floats]) -> Figures:
    """Text, image and group score, and the last of each part."""
    each = matching_each(np.stack(scores))
    parts = _parts((*item.skills, *([item.group] if item.group else [])) for item in items)
    return {name: mean_interval(values) for name, values in each._asdict().items()} | {
        f"group/{name}": mean_interval(each.group[places]) for name, places in parts.items()
    }


def _preference(items: Sequence[Item], scores: Sequence[Floats]) -> Figures:
    first = [item.human == 1 for item in items]
    return {"accuracy": mean_interval(choice_each(np.stack(scores)[:, :, 0], first))}


def _labels(items: Sequence[Item], scores: Sequence[Floats]) -> Figures:
    """Area under the ROC curve of each source, as published: sources are never put together."""
    values, positive = np.array([matrix[0, 0] for matrix in scores]), np.array([item.human == 1 for item in items])
    texts = np.array([item.texts[0] for item in items])
    figures = {}
    for name, places in _parts([item.group] for item in items).items():
        try:
            each = roc_auc_each(values[places], positive[places].tolist())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        figures[f"auroc/{name}"] = _interval(each, texts[places])
    return figures


def _true_above_false(items: Sequence[Item], scores: Sequence[Floats]) -> Figures:
    """The share of false texts that score lower than the true one, the first; a tie fails."""
    false = [matrix.shape[1] - 1 for matrix in scores]
    right = np.concatenate([matrix[0, 0] > matrix[0, 1:] for matrix in scores]).astype(np.float64)
    images = np.repeat([item.images[0] for item in items], false)
    parts = _parts([name] if name else [] for name in np.repeat([item.group for item in items], false))
    return {"accuracy": _interval(right, images)} | {
        f"accuracy/{name}": _interval(right[places], images[places]) for name, places in parts.items()
    }


def _ratings(items: Sequence[Item], scores: Sequence[Floats]) -> Figures:
    """Pairwise accuracy with ties calibrated, over all pairs and within prompts, and correlations; pairwise accuracy of
    each skill, calibrated on its items; mean scores of generators, over all items and by basic and advanced skills."""
    values = np.array([matrix[0, 0] for matrix in scores])
    human = np.array([item.human for item in items], dtype=np.float64)
    prompts = np.array([item.group for item in items])
    figures = {
        "pairwise_accuracy": _interval(_calibrated_each(values, human), prompts),
        "pearson": _interval(pearson_each(values, human), prompts),
        "kendall": _interval(kendall_each(values, human), prompts),
    }
    rows = list(_parts([item.group] for item in items).values())
    if len({len(places) for places in rows}) == 1 and len(rows[0]) > 1:
        figures["pairwise_accuracy_within_prompts"] = mean_interval(_calibrated_each(values[rows], human[rows]))
    for name, places in _parts(item.skills for item in items).items():
        figures[f"pairwise_accuracy/{name}"] = _interval(
            _calibrated_each(values[places], human[places]), prompts[places]
        )
    for name, places in _parts([item.generator, *_levels(item)] for item in items).items():
        figures[f"score/{name}"] = mean_interval(values[places])
    return figures


def _calibrated_each(values: Floats, human: Floats) -> Floats:
    """Shares of pairwise accuracy at the best eps, which intervals take as given."""
    return pairwise_accuracy_each(values, human, tie_calibration(values, human).eps)


def _interval(each: Floats, units: NDArray[np.str_]) -> Interval:
    """The mean of shares with the interval of a ratio of sums by unit: what is of one image, or of one prompt, is not
    independent."""
    _, place = np.unique(units, return_inverse=True)
    sums, counts = np.bincount(place, each), np.bincount(place)
    mean = float(each.mean())
    found = mean_interval(mean + (sums - mean * counts) / counts.mean())
    return Interval(mean, found.low, found.high)


def _levels(item: Item) -> list[str]:
    return [f"{item.generator}/{level}" for level in ("basic", "advanced") if level in item.skills]


BENCHMARKS: Mapping[str, Reader] = {
    "winoground": Reader(("examples.jsonl",), files.winoground, _matching, (400,)),
    "eqben": Reader(("all_select.json",), files.eqben, _matching),
    "tifa160": Reader(("tifa160.json", "dsg_tifa160_anns.csv"), files.tifa160, _ratings, (800,)),
    "pickapic": Reader(("test_captions.json",), files.pickapic, _preference, (len(files.PICKAPIC),)),
    "seetrue": Reader(("SeeTRUE.csv",), files.seetrue, _labels, (6930,)),
    "sugarcrepe": Reader(tuple(f"{kind}.json" for kind in files.SUGARCREPE), files.sugarcrepe, _true_above_false),
    "genai_bench": Reader(("genai_image.json", "genai_skills.json"), files.genai_bench, _ratings, (527 * 6, 1600 * 6)),
    "pairs": Reader(("pairs.jsonl",), files.pairs, _true_above_false),
}
