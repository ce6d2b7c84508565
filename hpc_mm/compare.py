"""``python -m hpc_mm.compare first=OUT second=OUT``: is one model better than another, by their results? Never torch.

Scores of one protocol are compared question by question; those of unlike protocols are refused, with the difference.
"""

from __future__ import annotations

import json
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
        refuse_unlike(read_protocol(before[key]["values"]), read_protocol(after[key]["values"]))
        difference = paired_bootstrap(PERCENT * each_of(one, before[key]), PERCENT * each_of(other, after[key]))
        compared.append(Compared(before[key], after[key], difference))
    return compared


def told(entries: Mapping[Key, Record]) -> str:
    return ", ".join(f"{shots} shots ({selection})" for shots, selection in entries) or "no such score"


def entries(store: Store, options: Compare) -> dict[Key, Record]:
    """Scores by these rules, by shots and selection. ConfigError where several are of the same."""
    found: dict[Key, Record] = {}
    for entry in results.read(store)["scores"]:
        key = entry["shots"], entry["selection"]
        if entry["rules"] != options.rules or (options.shots and entry["shots"] not in options.shots):
            continue
        if key in found:
            both = f"{found[key]['protocol']} and {entry['protocol']}"
            raise ConfigError(f"{store.address} has two scores of {key[0]} shots: {both}; use an out for each")
        found[key] = entry
    return found


def each_of(store: Store, entry: Record) -> NDArray[np.float64]:
    """Every question's score, in the order of questions, its mean over the trials."""
    trials = []
    for trial in entry["trials"]:
        lines = store.read(trial["file"]).decode().splitlines()
        trials.append([json.loads(line)["score"] for line in lines])
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
