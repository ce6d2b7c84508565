"""All scores of a run: what its evaluations left in RUN/eval, by benchmark and step. Never torch."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_mm import results
from hpc_mm.config import ConfigError
from hpc_mm.data.store import open_store
from hpc_mm.protocol import RICES
from hpc_mm.rules import OPENFLAMINGO

FOLDER = "eval"  # of a run, where evaluations leave their results
STEP = re.compile(r"step-(0|[1-9][0-9]*)")  # 0 = before training; weights that were exported have no step
KEYS = {"shots", "selection", "metric", "rules", "score", "low", "high", "trials", "protocol"}

Record = dict[str, Any]


@dataclass(frozen=True)
class RunScore:
    """One evaluation of a run. Benchmark and step are those that its folder is named after."""

    benchmark: str
    step: int
    folder: Path
    version: tuple[int, int]  # of results.json: its time in ns and its size in bytes
    data: str  # address of the benchmark's shards
    entries: list[Record]  # the scores of results.json, times 100


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
                data, entries = read(folder)
                one = RunScore(benchmark.name, int(match[1]), folder, version, data, entries)
            found.append(one)
    return sorted(found, key=lambda one: (one.benchmark, one.step))


def folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def version_of(file: Path) -> tuple[int, int] | None:
    """None where there is no such file."""
    try:
        facts = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (facts.st_mtime_ns, facts.st_size) if stat.S_ISREG(facts.st_mode) else None


def read(folder: Path) -> tuple[str, list[Record]]:
    """Address of the data, and scores. ConfigError where results.json is not what an evaluation writes."""
    values = results.read(open_store(str(folder)))
    try:
        data, entries = str(values["data"]), list(values["scores"])
        missing = sorted({key for entry in entries for key in KEYS - entry.keys()})
    except (KeyError, TypeError, AttributeError) as error:
        missing = [f"{type(error).__name__}: {error}"]
    if missing:
        place = folder / results.RESULTS
        raise ConfigError(f"{place} is damaged (no {', '.join(missing)}): stage=collect writes it again")
    return data, entries


def metrics_of(scores: Iterable[RunScore]) -> dict[str, float]:
    """Scores by flat names, such as eval/coco/4shot/cider, or eval/coco/4shot-rices/cider/lmms-eval.

    Of several scores of one name, that of the last step counts, and there the one of most trials.
    """
    found: dict[str, float] = {}
    for one in sorted(scores, key=lambda one: one.step):
        for entry in sorted(one.entries, key=lambda entry: (len(entry["trials"]), entry["protocol"])):
            found[name_of(one.benchmark, entry)] = entry["score"]
    return found


def name_of(benchmark: str, entry: Record) -> str:
    shots = f"{entry['shots']}shot" + (f"-{RICES}" if entry["selection"] == RICES else "")
    rules = () if entry["rules"] == OPENFLAMINGO.name else (entry["rules"],)
    return "/".join((FOLDER, benchmark, shots, entry["metric"], *rules))
