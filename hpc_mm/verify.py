"""The verify stage: every URL of the plan has its line, every shard is whole; a table of what became of all."""

from __future__ import annotations

import json
from collections import Counter

from rich.console import Console
from rich.table import Table

from hpc_mm.config import ConfigError
from hpc_mm.data.ledger import OK, Ledger
from hpc_mm.data.shards import check_shards
from hpc_mm.data.store import Store, open_store, write_changed
from hpc_mm.data.wanted import read_plan
from hpc_mm.pack import FETCHED, STATS


def verify(address: str) -> None:
    """Print the table and write it to stats.json. ConfigError where something is missing or broken."""
    out = open_store(address)
    fetched, missing = ledger_counts(out)
    problems = check_shards(out)
    if not problems:
        stats = json.loads(out.read(STATS))
        write_changed(out, STATS, json.dumps({**stats, FETCHED: fetched}, indent=1).encode())
        show(address, {**{f"fetched: {name}": count for name, count in fetched.items()}, **stats})
    if missing:
        problems.append(f"{missing} URLs of the plan were not tried: stage=fetch is not done")
    if problems:
        raise ConfigError(f"{address}: {problems[0]}; {len(problems)} problems in all")


def ledger_counts(out: Store) -> tuple[dict[str, int], int]:
    """URLs by what became of them, and how many have no line."""
    plan = read_plan(out)
    counts: Counter[str] = Counter()
    missing = 0
    for part in plan.parts if plan else ():
        lines = Ledger(out, part.name).lines
        counts.update(line.status if line.status == OK else f"{line.status} ({line.reason})" for line in lines.values())
        missing += part.urls - len(lines)
    return dict(counts), missing


def show(address: str, counts: dict[str, int]) -> None:
    table = Table(title=address)
    table.add_column("what")
    table.add_column("count", justify="right")
    for name, count in counts.items():
        if isinstance(count, int):
            table.add_row(name, f"{count:,}")
    Console().print(table)
