"""``python -m hpc_mm.compare first=OUT second=OUT``: is one model better than another, by their results? Never torch.

Scores of one protocol are compared question by question; those of unlike protocols are refused, with the difference.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from rich.console import Console
from rich.table import Table

from hpc_mm import results
from hpc_mm.config import ConfigError, Part, parse_arguments, with_overrides
from hpc_mm.data.store import MissingKey, Store, StoreDown, StoreError, open_store
from hpc_mm.intervals import Difference, paired_bootstrap
from hpc_mm.protocol import read_protocol, refuse_unlike
from hpc_mm.results import Answered
from hpc_mm.scoring import PERCENT

Record = dict[str, Any]
Key = tuple[int, str]  # shots and selection


class Compare(Part):
    """What hpc_mm.compare takes."""

    first: str = Field("", description="folder or store of an evaluation's results")
    second: str = Field("", description="of another one's")
    shots: tuple[int, ...] = Field((), description="of the scores; none = all that both have")
    rules: str = Field("openflamingo", description="by whose rules both are scored")


@dataclass(frozen=True)
class Compared:
    """Two scores of one protocol."""

    first: Record
    second: Record
    difference: Difference  # of the second, times 100


def compare(options: Compare) -> list[Compared]:
    """Scores of the same shots, selection and rules, side by side. ConfigError where their protocols differ."""
    one, other = (open_store(address) for address in (options.first, options.second))
    before, after = entries(one, options), entries(other, options)
    common = [key for key in before if key in after]
    if not common:
        raise ConfigError(f"nothing in common: {one.address} has {told(before)}; {other.address} has {told(after)}")
    compared = []
    for key in common:
        first, second = alike(before[key], after[key])
        refuse_unlike(read_protocol(first["values"]), read_protocol(second["values"]))
        difference = paired_bootstrap(PERCENT * each_of(one, first), PERCENT * each_of(other, second))
        compared.append(Compared(first, second, difference))
    return compared


def told(entries: Mapping[Key, object]) -> str:
    return ", ".join(f"{shots} shots ({selection})" for shots, selection in entries) or "no such score"


def entries(store: Store, options: Compare) -> dict[Key, list[Record]]:
    """Scores by these rules, by shots and selection, those of most trials first."""
    found: dict[Key, list[Record]] = {}
    for entry in sorted(results.read(store).scores, key=lambda entry: -entry.count):
        if not isinstance(entry, Answered):
            raise ConfigError(f"{store.address} holds scores of images; the answers to questions are compared")
        if entry.rules == options.rules and (not options.shots or entry.shots in options.shots):
            found.setdefault((entry.shots, entry.selection), []).append(entry.model_dump())
    return found


def alike(before: Sequence[Record], after: Sequence[Record]) -> tuple[Record, Record]:
    """Two of one protocol; where there are none, those of most trials."""
    pairs = ((one, other) for one in before for other in after if one["values"] == other["values"])
    return next(pairs, (before[0], after[0]))


def each_of(store: Store, entry: Record) -> NDArray[np.float64]:
    """Every question's score, in the order of questions, its mean over the trials."""
    trials = [[row["score"] for row in results.read_rows(store, trial["file"])] for trial in entry["trials"]]
    return np.asarray(np.mean(trials, axis=0))


def show(compared: Sequence[Compared]) -> None:
    table = Table()
    for name in ("shots", "first", "second", "second - first", "95 % interval", "p"):
        table.add_column(name, justify="right")
    for one in compared:
        first, second = (f"{entry['score']:.2f}" for entry in (one.first, one.second))
        mean, low, high, p = one.difference
        table.add_row(str(one.first["shots"]), first, second, f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{p:.4f}")
    console = Console()
    console.print(table)
    for one in compared:
        print(one.first["protocol"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 for a user's mistake, told in one line on stderr."""
    try:
        options: Compare = with_overrides(Compare(), parse_arguments(sys.argv[1:] if arguments is None else arguments))
        for key in ("first", "second"):
            if not getattr(options, key):
                raise ConfigError(f"{key}=OUT is missing: {Compare.model_fields[key].description}")
        show(compare(options))
    except (ConfigError, MissingKey, StoreError, StoreDown, OSError) as error:
        print(str(error) or repr(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
