"""Predictions in parts: each is one file written whole, and all of them together hold every question exactly once."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from hpc_mm.benchmark import digest, doubled
from hpc_mm.config import ConfigError
from hpc_mm.data.parts import changes
from hpc_mm.data.store import MissingKey, Store

FOLDER = "parts"
PLAN = "plan.json"
SIZE = 64  # questions of a part: what a task that is killed does again
NAME = re.compile(rf"{FOLDER}/(\d{{6}})\.jsonl")
READS = 16  # parts read at once
TOLD = 3  # of several of the same mistakes

Row = dict[str, Any]
"""What a model made of a question: its ``id``, and any JSON values beside it."""


@dataclass(frozen=True)
class Plan:
    """The questions in order, divided into parts of ``size``, however many tasks there are.

    ``work``: JSON values of all else that decides the predictions: the checkpoint, the protocol.
    """

    work: Mapping[str, Any]
    ids: tuple[str, ...]
    size: int = SIZE

    @cached_property
    def digest(self) -> str:
        return digest((json.dumps([self.work, self.size], sort_keys=True), *self.ids))

    @property
    def parts(self) -> int:
        return -(-len(self.ids) // self.size)

    def ids_of(self, part: int) -> tuple[str, ...]:
        return self.ids[part * self.size : (part + 1) * self.size]


def save_plan(store: Store, plan: Plan) -> None:
    """Keep the plan beside its parts. ConfigError where another one is kept there."""
    twice = doubled(plan.ids)
    if twice is not None or not plan.ids:
        raise ConfigError("there is no question to plan" if twice is None else f"question {twice} is planned twice")
    try:
        kept = read_plan(store)
    except MissingKey:
        values = {"work": plan.work, "ids": plan.ids, "size": plan.size}
        store.write(PLAN, json.dumps(values, sort_keys=True).encode())
        return
    if kept.digest != plan.digest:
        before, now = ({**as_read(some.work), "part size": some.size} for some in (kept, plan))
        found = changes(before, now) + [f"{name} is new" for name in now if name not in before]
        raise ConfigError(
            f"{store.address} holds a plan of {'; '.join(found) or 'other questions'}: use another folder"
        )


def as_read(work: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values as reading gives them back: lists in place of tuples."""
    values: dict[str, Any] = json.loads(json.dumps(work))
    return values


def read_plan(store: Store) -> Plan:
    """The plan that is kept. MissingKey where none is."""
    data = store.read(PLAN)
    try:
        values = json.loads(data)
        return Plan(values["work"], tuple(values["ids"]), values["size"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{store.address}/{PLAN} is no plan ({type(error).__name__}: {error})") from None


def not_planned(address: str, missing: Exception) -> ConfigError:
    return ConfigError(
        f"{address}: not all is planned there ({missing}); stage=plan comes first, or give the step= that was planned"
    )


# ---------------------------------------------------------------- parts


@dataclass(frozen=True)
class Done:
    """A part that is done: a row per question in the plan's order, and when it was made (Unix time, s)."""

    rows: list[Row]
    began: float
    ended: float


def name_of(part: int) -> str:
    return f"{FOLDER}/{part:06d}.jsonl"


def parts_to_do(store: Store, plan: Plan, task: int = 0, tasks: int = 1) -> list[int]:
    """A task's parts that are not done. ConfigError where a file is there that is not the plan's."""
    mine, there = range(task, plan.parts, tasks), set(listed(store, plan))
    for part in mine:
        if part in there:
            read_part(store, plan, part)
    return [part for part in mine if part not in there]


def write_part(store: Store, plan: Plan, part: int, rows: Sequence[Row], began: float) -> None:
    """Write a part, whole, whoever else may have. ValueError where the rows are not of its questions in order."""
    if tuple(row["id"] for row in rows) != plan.ids_of(part):
        raise ValueError(f"the rows are not of the {len(plan.ids_of(part))} questions of part {part} in their order")
    head = {"plan": plan.digest, "part": part, "began": began, "ended": time.time()}
    lines = (json.dumps(values, allow_nan=False) for values in (head, *rows))
    store.write(name_of(part), "".join(f"{line}\n" for line in lines).encode())


def listed(store: Store, plan: Plan) -> list[int]:
    """The parts that have a file, in order. ConfigError where a file is none of the plan's parts."""
    found = []
    for entry in store.list(f"{FOLDER}/"):
        match = NAME.fullmatch(entry.key)
        if match is None or int(match[1]) >= plan.parts:
            raise ConfigError(f"{store.address}/{entry.key} is none of the plan's {plan.parts} parts: remove it")
        found.append(int(match[1]))
    return found


def read_part(store: Store, plan: Plan, part: int) -> Done:
    """A part that is done. ConfigError where the file is not just this plan's part."""
    where = f"{store.address}/{name_of(part)}"
    try:
        head, *rows = map(json.loads, store.read(name_of(part)).decode().splitlines())
        made_for, number, began, ended = head["plan"], head["part"], float(head["began"]), float(head["ended"])
        ids = [row["id"] for row in rows]
    except MissingKey:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where} is damaged ({type(error).__name__}: {error}): remove it") from None
    if made_for != plan.digest:
        raise ConfigError(f"{where} is of plan {made_for}, not of this one, {plan.digest}: remove it")
    if number != part:
        raise ConfigError(f"{where} is a copy of part {number}: remove it")
    wrong = complaint(ids, plan.ids_of(part))
    if wrong:
        raise ConfigError(f"{where}: {wrong}: remove it")
    return Done(rows, began, ended)


def complaint(ids: Sequence[Any], wanted: Sequence[str]) -> str:
    """What is wrong with a part's ids; empty where nothing is."""
    if list(ids) == list(wanted):
        return ""
    twice = doubled(map(str, ids))
    unknown, missing = (
        [name for name in some if name not in others] for some, others in ((ids, wanted), (wanted, ids))
    )
    if twice is not None:
        return f"question {twice} is there twice"
    if unknown:
        return f"{named(unknown)} not of this part"
    return f"{named(missing)} missing" if missing else "its questions are in another order"


def named(names: Iterable[Any]) -> str:
    found = list(map(str, names))
    what = "question" if len(found) == 1 else f"{len(found)} questions:"
    return (
        f"{what} {', '.join(found[:TOLD])}{', ...' if len(found) > TOLD else ''} {'is' if len(found) == 1 else 'are'}"
    )


NOTHING: Mapping[int, Done] = MappingProxyType({})


def done_parts(store: Store, plan: Plan, known: Mapping[int, Done] = NOTHING) -> dict[int, Done]:
    """The parts that are done, in order. ``known`` ones are not read again: no part ever changes what it says.

    ConfigError where a file is there that is not the plan's.
    """
    found = listed(store, plan)
    new = [part for part in found if part not in known]
    with ThreadPoolExecutor(READS, "parts") as threads:
        read = dict(zip(new, threads.map(lambda part: read_part(store, plan, part), new), strict=True))
    return {part: read[part] if part in read else known[part] for part in found}


def merged(store: Store, plan: Plan) -> list[Row]:
    """A row for every question, in the plan's order. ConfigError where a part is missing or is not the plan's."""
    done = done_parts(store, plan)
    gaps = [part for part in range(plan.parts) if part not in done]
    if gaps:
        first = ", ".join(map(str, gaps[:TOLD])) + (", ..." if len(gaps) > TOLD else "")
        raise ConfigError(
            f"{store.address}: {len(gaps)} of {plan.parts} parts are not done: {first}; run the same command again"
        )
    return [row for part in range(plan.parts) for row in done[part].rows]


# ---------------------------------------------------------------- while it runs


@dataclass(frozen=True)
class State:
    """How far an evaluation has come."""

    parts: int
    questions: int
    total: int  # questions
    rate: float | None  # questions per second since the first part began, by all tasks together; None before any

    @property
    def left(self) -> float | None:
        """Seconds at this rate."""
        return (self.total - self.questions) / self.rate if self.rate else None


def state(plan: Plan, done: Mapping[int, Done]) -> State:
    """The state by the parts that are done (``done_parts``)."""
    questions = sum(len(plan.ids_of(part)) for part in done)
    seconds = max((p.ended for p in done.values()), default=0.0) - min((p.began for p in done.values()), default=0.0)
    return State(len(done), questions, len(plan.ids), questions / seconds if seconds > 0 else None)
