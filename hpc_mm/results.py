"""What an evaluation came to: results.json with its protocols, predictions with their scores, files for challenges."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Discriminator, Tag

from hpc_mm import challenge, evaluations, ok_vqa
from hpc_mm.benchmark import Benchmark
from hpc_mm.config import ConfigError, Part, Run, validated
from hpc_mm.data.store import MissingKey, Store, open_store, write_changed
from hpc_mm.intervals import Interval
from hpc_mm.predictions import Row, merged
from hpc_mm.protocol import RICES
from hpc_mm.rules import OPENFLAMINGO
from hpc_mm.scoring import PERCENT, Scores, scores
from hpc_mm.tracking import wandb_run
from hpc_mm.trials import Planned, Trial, protocol

RESULTS = evaluations.RESULTS
VQASCORE: Literal["vqascore"] = "vqascore"  # as the paper has it
Record = dict[str, Any]


class OfTrial(Part, extra="allow"):  # a later version's keys are kept, here and below
    """A trial's score times 100, and the ends of its 95 % interval, of which a single question has none."""

    seed: int | None  # none = similar demonstrations
    file: str  # with every question's score, below the results' own folder
    score: float
    low: float | None
    high: float | None


class Score(Part, extra="allow"):
    """A score times 100, and the ends of its 95 % interval, of which a single question has none."""

    metric: str
    score: float
    low: float | None
    high: float | None
    protocol: str


class Answered(Score):
    """What answers scored by one protocol: the mean of its trials."""

    shots: int
    selection: str
    rules: str
    others: dict[str, float]  # further metrics
    trials: list[OfTrial]
    values: dict[str, Any]  # of the protocol

    @property
    def name(self) -> str:
        """Below its benchmark, among the names of metrics."""
        shots = f"{self.shots}shot" + (f"-{RICES}" if self.selection == RICES else "")
        return "/".join((shots, self.metric, *(() if self.rules == OPENFLAMINGO.name else (self.rules,))))

    @property
    def label(self) -> str:
        """What tells it from others of its benchmark."""
        similar = ", similar" if self.selection == RICES else ""
        rules = "" if self.rules == OPENFLAMINGO.name else f", {self.rules}"
        return f"{self.shots} {'shot' if self.shots == 1 else 'shots'}{similar}{rules}"

    @property
    def group(self) -> tuple[Any, ...]:
        """What belongs on one chart, the first group of a benchmark on that which is shown."""
        return (self.rules != OPENFLAMINGO.name, self.rules)

    @property
    def rank(self) -> tuple[Any, ...]:
        """Its place in its group."""
        return (self.shots, self.selection)

    @property
    def count(self) -> int:
        """Trials that it is the mean of."""
        return len(self.trials)


class Judged(Score):
    """A figure of how faithfully images show texts; ``metric``: how each pair is scored."""

    figure: str  # a slash divides its name from that of the part of the items that it is of

    @property
    def name(self) -> str:
        return f"{self.metric}/{self.figure}"

    @property
    def label(self) -> str:
        return self.figure.replace("/", ", ")

    @property
    def group(self) -> tuple[Any, ...]:
        return (self.metric != VQASCORE, self.metric, "/" in self.figure)

    @property
    def rank(self) -> tuple[Any, ...]:
        return ()  # as they were written

    @property
    def count(self) -> int:
        return 1


Entry = Answered | Judged


def kind_of(scores: Any) -> str:
    judged = isinstance(scores, list) and any(
        isinstance(one, Judged) or (isinstance(one, dict) and "figure" in one) for one in scores
    )
    return "judged" if judged else "answered"


class Results(Part, extra="allow"):
    """results.json."""

    benchmark: str
    data: str  # address of the benchmark's shards, or the folder of its published files
    checkpoint: str
    step: str
    scores: Annotated[  # all of one kind, so that an error tells what is wrong in that
        Annotated[list[Answered], Tag("answered")] | Annotated[list[Judged], Tag("judged")], Discriminator(kind_of)
    ]


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
        entries.append({"seed": trial.seed, "file": file, **interval(one.interval())})
    values = list(found.values())
    others = {name: PERCENT * float(np.mean([one.others[name] for one in values])) for name in values[0].others}
    return {
        "shots": next(iter(rows)).shots,
        "selection": made_by.demonstrations.selection,
        "metric": benchmark.metric,
        "rules": rules,
        **interval(together.interval()),
        "others": others,
        "trials": entries,
        "protocol": made_by.id,
        "values": made_by.model_dump(mode="json"),
    }


def interval(found: Interval) -> Record:
    """As a ``Score`` has it."""
    return {"score": found.mean, "low": finite(found.low), "high": finite(found.high)}


def finite(value: float) -> float | None:
    """JSON has no infinity, which ends the interval of a single question."""
    return value if np.isfinite(value) else None


def save(store: Store, benchmark: Benchmark, origin: Origin, entries: list[Record]) -> None:
    refuse_other(store, benchmark.name)
    new = {entry["protocol"] for entry in entries}
    before = read(store).model_dump() if is_there(store) else {"scores": []}
    kept = [entry for entry in before["scores"] if entry["protocol"] not in new]
    scored = sorted(kept + entries, key=lambda entry: (entry["rules"], entry["shots"], entry["protocol"]))
    about = {"benchmark": benchmark.name, **origin.__dict__, "questions": len_of(scored)}
    write(store, {**before, **about, "scores": scored})


def refuse_other(store: Store, benchmark: str) -> None:
    """ConfigError where the results of another benchmark are kept there."""
    if is_there(store) and (kept := read(store).benchmark) != benchmark:
        raise ConfigError(f"{store.address} holds results of {kept}; give another out= for those of {benchmark}")


def write(store: Store, values: Record) -> None:
    """Keep ``Results``."""
    found: Results = validated(Results, values)
    write_changed(store, RESULTS, json.dumps(found.model_dump(), indent=1).encode())


def len_of(scored: Sequence[Record]) -> int:
    return int(scored[0]["values"]["questions"]["count"])


def is_there(store: Store) -> bool:
    return store.size(RESULTS) is not None


def read(store: Store) -> Results:
    """ConfigError where there are none, or not all of what an evaluation writes."""
    try:
        found: Results = validated(Results, json.loads(store.read(RESULTS)))
        return found
    except MissingKey:
        raise ConfigError(f"{store.address} holds no {RESULTS}: stage=collect writes it") from None
    except (ValueError, ConfigError) as error:
        place = f"{store.address}/{RESULTS}"
        raise ConfigError(f"{place} is damaged ({error}): remove it, and stage=collect writes it again") from None


def read_rows(store: Store, file: str) -> list[Record]:
    """A line of every question: id, text, score. ConfigError where they are not whole."""
    try:
        rows = [json.loads(line) for line in store.read(file).splitlines()]
        return [{"id": row["id"], "text": row["text"], **row, "score": float(row["score"])} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{store.address}/{file} is damaged ({error!r}): stage=collect writes it again") from None


def track(run: Run, store: Store) -> None:
    """The scores in Weights & Biases, where the run is tracked there: a run of their own in its group."""
    found = read(store)
    tracked = wandb_run(run, Path(found.checkpoint), f"{found.benchmark}-step-{found.step}")
    if tracked is None:
        return
    for name, score in named(found.benchmark, found.scores).items():
        tracked.summary[name] = score
    tracked.finish()


def named(benchmark: str, entries: Iterable[Entry]) -> dict[str, float]:
    """Scores by flat names, such as eval/coco/4shot/cider, eval/coco/4shot-rices/cider/lmms-eval, or
    eval/winoground/vqascore/group.

    Of several scores of one name that of most trials counts.
    """
    ordered = sorted(entries, key=lambda entry: (entry.count, entry.protocol))
    return {f"{evaluations.FOLDER}/{benchmark}/{entry.name}": entry.score for entry in ordered}


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
