"""All scores of a run: what its evaluations left in RUN/eval, by benchmark and step. Never torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_mm import results
from hpc_mm.data.store import open_store, version_of
from hpc_mm.evaluations import FOLDER
from hpc_mm.results import Entry

STEP = re.compile(r"step-(0|[1-9][0-9]*)")  # 0 = before training; weights that were exported have no step


@dataclass(frozen=True)
class RunScore:
    """One evaluation of a run. Benchmark and step are those that its folder is named after."""

    benchmark: str
    step: int
    folder: Path
    version: tuple[int, int]  # of results.json: its time in ns and its size in bytes
    data: str  # address of what was asked
    entries: Sequence[Entry]  # the scores of results.json


def scores_of(run_folder: Path, known: Sequence[RunScore] = ()) -> list[RunScore]:
    """Every evaluation of a run that has results, by benchmark and step.

    Of ``known``, those whose results.json is as it was are given back and not read again. ConfigError where a
    results.json is damaged.
    """
    before = {one.folder: one for one in known}
    found = []
    for benchmark in folders(run_folder / FOLDER):
        for folder in folders(benchmark):
            match = STEP.fullmatch(folder.name)
            version = version_of(folder / results.RESULTS) if match else None
            if match is None or version is None:
                continue
            one = before.get(folder)
            if one is None or one.version != version:
                values = results.read(open_store(str(folder)))
                one = RunScore(benchmark.name, int(match[1]), folder, version, values.data, values.scores)
            found.append(one)
    return sorted(found, key=lambda one: (one.benchmark, one.step))


def folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def metrics_of(scores: Iterable[RunScore]) -> dict[str, float]:
    """Scores by the names that ``results`` gives them. Of several of one name, that of the last step counts."""
    found: dict[str, float] = {}
    for one in sorted(scores, key=lambda one: one.step):
        found |= results.named(one.benchmark, one.entries)
    return found
