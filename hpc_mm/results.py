"""What an evaluation came to: results.json with its protocols, predictions with their scores, files for challenges."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpc_mm import challenge, evaluations, ok_vqa
from hpc_mm.benchmark import Benchmark
from hpc_mm.config import ConfigError, Run
from hpc_mm.data.store import MissingKey, Store, open_store, write_changed
from hpc_mm.predictions import Row, merged
from hpc_mm.scoring import PERCENT, Scores, scores
from hpc_mm.tracking import wandb_run
from hpc_mm.trials import Planned, Trial, protocol

RESULTS = evaluations.RESULTS
Record = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """What was evaluated on what."""

    data: str
    checkpoint: str
    step: str


def check_tools(benchmark: Benchmark) -> None:
    """What scoring needs is here, or is fetched now. ConfigError where it cannot be."""
    if benchmark.metric == "okvqa-accuracy":
        ok_vqa.fetch()


def collect(planned: Planned, benchmark: Benchmark, rules: Sequence[str], origin: Origin) -> bool:
    """Merge all parts, score them under each set of rules, and write results.json, where those of other protocols stay.

    Or, where the answers are not public, write files for a challenge's server, and give False.
    """
    rows = {trial: merged(planned.store(trial), plan) for trial, plan in planned.plans.items()}
    if not planned.questions[0].references:
        for trial, found in rows.items():
            name = f"{benchmark.name}-{benchmark.split}-{trial.name}.json"
            asked = planned.questions
            print(challenge.write(open_store(planned.address), name, benchmark, asked, found, origin.data, rules[0]))
        return False
    entries = []
    for name in rules:
        for shots in planned.choice.shots:
            trials = [trial for trial in rows if trial.shots == shots]
            entries.append(score(planned, benchmark, {trial: rows[trial] for trial in trials}, name))
    save(open_store(planned.address), benchmark, origin, entries)
    show(entries)
    return True


def score(planned: Planned, benchmark: Benchmark, rows: dict[Trial, list[Row]], rules: str) -> Record:
    """The result of trials of so many shots under a set of rules; every question's score goes into a file."""
    found = {trial: scores(benchmark, rules, planned.questions, some) for trial, some in rows.items()}
    together = Scores(np.mean([one.each for one in found.values()], axis=0))
    made_by = protocol(benchmark, planned, list(rows), rules)
    entries = []
    for trial, one in found.items():
        lines = ({**row, "score": value} for row, value in zip(rows[trial], one.each.tolist(), strict=True))
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        write_changed(planned.store(trial), f"{rules}.jsonl", text.encode())
        file = f"{trial.name}/{rules}.jsonl"
        entries.append({"seed": trial.seed, "file": file, **interval(one)})
    values = list(found.values())
    others = {name: PERCENT * float(np.mean([one.others[name] for one in values])) for name in values[0].others}
    return {
        "shots": next(iter(rows)).shots,
        "selection": made_by.demonstrations.selection,
        "metric": benchmark.metric,
        "rules": rules,
        **interval(together),
        "others": others,
        "trials": entries,
        "protocol": made_by.id,
        "values": made_by.model_dump(mode="json"),
    }


def interval(found: Scores) -> Record:
    mean, low, high = found.interval()
    return {"score": mean, "low": finite(low), "high": finite(high)}


def finite(value: float) -> float | None:
    """JSON has no infinity, which ends the interval of a single question."""
    return value if np.isfinite(value) else None


def save(store: Store, benchmark: Benchmark, origin: Origin, entries: list[Record]) -> None:
    new = {entry["protocol"] for entry in entries}
    kept = [entry for entry in read(store)["scores"] if entry["protocol"] not in new] if is_there(store) else []
    scored = sorted(kept + entries, key=lambda entry: (entry["rules"], entry["shots"], entry["protocol"]))
    values = {"benchmark": benchmark.name, **origin.__dict__, "questions": len_of(scored), "scores": scored}
    write_changed(store, RESULTS, json.dumps(values, indent=1).encode())


def len_of(scored: Sequence[Record]) -> int:
    return int(scored[0]["values"]["questions"]["count"])


def is_there(store: Store) -> bool:
    return store.size(RESULTS) is not None


def read(store: Store) -> Record:
    """results.json. ConfigError where there is none."""
    try:
        values: Record = json.loads(store.read(RESULTS))
    except MissingKey:
        raise ConfigError(f"{store.address} holds no {RESULTS}: stage=collect writes it") from None
    except ValueError as error:
        raise ConfigError(damaged(store, error)) from None
    if not isinstance(values, dict) or "scores" not in values:
        raise ConfigError(damaged(store, "no scores"))
    return values


def read_rows(store: Store, file: str) -> list[Record]:
    """A line of every question: id, text, score. ConfigError where they are not whole."""
    try:
        rows = [json.loads(line) for line in store.read(file).splitlines()]
        return [{"id": row["id"], "text": row["text"], **row, "score": float(row["score"])} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{store.address}/{file} is damaged ({error!r}): stage=collect writes it again") from None


def damaged(store: Store, why: object) -> str:
    return f"{store.address}/{RESULTS} is damaged ({why}): remove it, and stage=collect writes it again"


def track(run: Run, benchmark: Benchmark, planned: Planned, origin: Origin) -> None:
    """The scores in Weights & Biases, where the run is tracked there: a run of their own in its group."""
    tracked = wandb_run(run, Path(origin.checkpoint), f"{benchmark.name}-step-{origin.step}")
    if tracked is None:
        return
    for entry in read(open_store(planned.address))["scores"]:
        tracked.summary[f"{benchmark.name}/{entry['shots']}shot/{entry['metric']}/{entry['rules']}"] = entry["score"]
    tracked.finish()


def show(entries: Sequence[Record]) -> None:
    """The scores as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("shots", "trials", "score", "95 % interval", "rules"):
        table.add_column(name, justify="left" if name == "rules" else "right")
    for entry in entries:
        cells = (str(entry["shots"]), str(len(entry["trials"])), f"{entry['score']:.2f}", between(entry))
        table.add_row(*cells, f"{entry['metric']}, {entry['rules']}")
    Console().print(table)
    for entry in entries:
        print(entry["protocol"])


def between(entry: Record) -> str:
    return "" if entry["low"] is None else f"{entry['low']:.2f} to {entry['high']:.2f}"
