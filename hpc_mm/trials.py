"""An evaluation as it was planned: its questions, what they are answered with, and a plan of parts for every trial."""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from pydantic_core import ValidationError, from_json

from hpc_mm.benchmark import Benchmark, Question
from hpc_mm.config import ConfigError, Part, one_line
from hpc_mm.data.parts import changes
from hpc_mm.data.store import MissingKey, Store, StoreError, open_store
from hpc_mm.demonstrations import QuerySet, Similar
from hpc_mm.predictions import Plan, as_read, not_planned, read_plan, save_plan
from hpc_mm.protocol import RICES, Demonstrations, Protocol, Questions, Scoring, digest_of, protocol_of
from hpc_mm.rules import OPENFLAMINGO, VERSION

QUESTIONS, POOL, POOL_FACTS = "questions.jsonl", "pool.jsonl", "pool.json"


@dataclass(frozen=True)
class Trial:
    """One way to put demonstrations before every question."""

    shots: int
    seed: int | None  # of random demonstrations; None = similar ones (RICES)

    @property
    def name(self) -> str:
        """Also that of its folder."""
        return f"{self.shots}shot-{RICES if self.seed is None else f's{self.seed}'}"

    def __str__(self) -> str:
        return f"{self.shots} shots, {'similar' if self.seed is None else f'seed {self.seed}'}"


@dataclass(frozen=True)
class Choice:
    """How demonstrations are chosen."""

    shots: tuple[int, ...]
    seeds: tuple[int, ...]  # none = similar ones
    query_set: int
    features: str  # by which images are similar

    @property
    def trials(self) -> list[Trial]:
        return [Trial(shots, seed) for shots in self.shots for seed in self.seeds or (None,)]

    def file(self, seed: int | None) -> str:
        """Of the questions that a trial's demonstrations are taken from."""
        return POOL if seed is None else f"queries-{self.query_set}-s{seed}.jsonl"

    def shown(self, pool: Sequence[Question]) -> dict[str, Sequence[Question]]:
        """As much of the pool as prompts can show, by its file: each seed's query set, or all of it."""
        if not self.seeds:
            return {self.file(None): pool}
        return {self.file(seed): QuerySet(pool, seed, self.query_set).questions for seed in self.seeds}


class Pool(Part):
    """What protocols and scores take from the pool of demonstrations."""

    count: int
    digest: str
    labels: tuple[str, ...]  # all of them, sorted, where questions are of classes

    @classmethod
    def of(cls, benchmark: Benchmark, pool: Sequence[Question]) -> Pool:
        labels = {question.references[0] for question in pool} if benchmark.kind == "classes" else set()
        return cls(count=len(pool), digest=digest_of(pool), labels=tuple(sorted(labels)))


@dataclass(frozen=True)
class Planned:
    """What all tasks and ``collect`` go by."""

    address: str  # of the folder or store that holds it all
    choice: Choice
    questions: list[Question]
    pool: Pool  # that demonstrations are taken from
    plans: dict[Trial, Plan]

    @cached_property
    def ids(self) -> tuple[str, ...]:
        return tuple(question.id for question in self.questions)

    @cached_property
    def by_id(self) -> dict[str, Question]:
        return {question.id: question for question in self.questions}

    @cached_property
    def asked(self) -> str:
        """Digest of the questions."""
        return digest_of(self.questions)

    @property
    def step(self) -> str:
        """Of the checkpoint that answers."""
        return str(next(iter(self.plans.values())).work["step"])

    def store(self, trial: Trial) -> Store:
        return open_store(f"{self.address}/{trial.name}")

    def queries(self, seed: int) -> QuerySet:
        """As drawn from the whole pool: of what was drawn first, the same is drawn again."""
        found = self._read(self.choice.file(seed))
        if len(found) != min(self.choice.query_set, self.pool.count):
            raise self._damaged(seed)
        return QuerySet(found, seed, self.choice.query_set)

    def similar(self) -> Similar:
        found = self._read(self.choice.file(None))
        if digest_of(found) != self.pool.digest:
            raise self._damaged(None)
        return Similar(found)

    def _read(self, name: str) -> list[Question]:
        try:
            return read_questions(open_store(self.address), name)
        except MissingKey as missing:
            raise not_planned(self.address, missing) from None

    def _damaged(self, seed: int | None) -> ConfigError:
        return ConfigError(f"{self.address}/{self.choice.file(seed)} is damaged: remove it and plan again")


def protocol(benchmark: Benchmark, planned: Planned, trials: Sequence[Trial], rules: str) -> Protocol:
    """By which the score of trials of so many shots is made."""
    choice, asked = planned.choice, Questions(split=benchmark.split, count=len(planned.ids), digest=planned.asked)
    pool = Questions(split=benchmark.demonstrations, count=planned.pool.count, digest=planned.pool.digest)
    (shots,) = {trial.shots for trial in trials}
    seeds = tuple(trial.seed for trial in trials if trial.seed is not None)
    shown = (
        Demonstrations(shots=shots, pool=pool, query_set=choice.query_set, seeds=seeds)
        if seeds
        else Demonstrations(shots=shots, pool=pool, selection=RICES, query_set=0, features=choice.features)
    )
    return protocol_of(benchmark, asked, shown, Scoring(metric=benchmark.metric, rules=rules, version=VERSION))


def some_of(questions: Sequence[Question], count: int) -> list[Question]:
    """So many questions in their order, as good as drawn at random, and the same whatever else is asked; 0 = all."""
    if not count:
        return list(questions)
    if count > len(questions):
        raise ConfigError(f"samples={count}: there are {len(questions)} questions")
    least = heapq.nsmallest(count, questions, lambda question: sha256(f"samples/{question.id}".encode()).digest())
    chosen = {question.id for question in least}
    return [question for question in questions if question.id in chosen]


def with_classes(benchmark: Benchmark, pool: Pool) -> Benchmark:
    """The benchmark with the labels of the pool as its classes, where they are to be found there."""
    if benchmark.kind != "classes" or benchmark.classes:
        return benchmark
    return benchmark.model_copy(update={"classes": pool.labels})


def check(benchmark: Benchmark, planned: Planned, shown: Mapping[str, Sequence[Question]]) -> None:
    """ConfigError where a question has too few demonstrations, or where only some questions have answers.

    ``shown``: what demonstrations are taken from, as ``save`` keeps it.
    """
    questions, choice = planned.questions, planned.choice
    without = [question.id for question in questions if not question.references]
    if without and len(without) < len(questions):
        raise ConfigError(
            f"{benchmark.name} split={benchmark.split}: {len(without)} of {len(questions)} questions have no answer, "
            f"such as {without[0]}: all must have, or none (then a file for the challenge's server is written)"
        )
    if benchmark.classes:
        strange = {label for question in questions for label in question.references} - set(benchmark.classes)
        if strange:
            raise ConfigError(
                f"{benchmark.name} split={benchmark.split}: {min(strange)!r} is none of the {len(benchmark.classes)} "
                f"classes of {benchmark.demonstrations}"
            )
    for seed in choice.seeds:
        queries = QuerySet(shown[choice.file(seed)], seed, choice.query_set)
        for shots in choice.shots:
            queries.check(shots, questions)
    if not choice.seeds:
        Similar(shown[choice.file(None)]).check(max(choice.shots))


# ---------------------------------------------------------------- kept and read


def save(
    planned: Planned, shown: Mapping[str, Sequence[Question]], benchmark: Benchmark, work: dict[str, Any], size: int
) -> Planned:
    """Keep what is planned, with plans of parts of ``size``. ConfigError where the address holds another plan."""
    store = open_store(planned.address, make=True)
    keep(store, POOL_FACTS, planned.pool.model_dump_json().encode())
    for name, questions in {QUESTIONS: planned.questions, **shown}.items():
        keep(store, name, "".join(line(question) for question in questions).encode())
    for trial in planned.choice.trials:
        values = {**work, "protocol": unscored(benchmark, planned, trial)}
        planned.plans[trial] = Plan(values, planned.ids, size)
        save_plan(open_store(f"{planned.address}/{trial.name}", make=True), planned.plans[trial])
    return planned


def unscored(benchmark: Benchmark, planned: Planned, trial: Trial) -> dict[str, Any]:
    """The protocol of a trial's predictions."""
    return protocol(benchmark, planned, [trial], OPENFLAMINGO.name).model_dump(mode="json", exclude={"scoring"})


def refuse_other(planned: Planned, benchmark: Benchmark, work: dict[str, Any]) -> None:
    """ConfigError where this command says otherwise than the plan does. ``work``: as much of it as is known."""
    for trial, plan in planned.plans.items():
        now = {**plan.work, **work, "protocol": unscored(benchmark, planned, trial)}
        found = changes(as_read(plan.work), as_read(now))
        if found:
            raise ConfigError(f"{planned.address}/{trial.name} was planned otherwise: {'; '.join(found)}")


def keep(store: Store, name: str, data: bytes) -> None:
    try:
        if store.read(name) != data:
            raise ConfigError(
                f"{store.address}/{name} holds other questions than are asked for now: use another out, or "
                f"remove {store.address}"
            )
    except MissingKey:
        store.write(name, data)


def read(address: str, choice: Choice) -> Planned:
    """What was planned. ConfigError where one of the trials was not."""
    store = open_store(address)
    try:
        planned = Planned(address, choice, read_questions(store, QUESTIONS), read_pool(store), {})
        for trial in choice.trials:
            planned.plans[trial] = read_plan(planned.store(trial))
    except (MissingKey, StoreError) as missing:
        raise not_planned(address, missing) from None
    for trial, plan in planned.plans.items():
        if plan.ids != planned.ids:
            raise ConfigError(f"{address}/{trial.name} is a plan of other questions than {QUESTIONS}: use another out")
    return planned


def read_pool(store: Store) -> Pool:
    try:
        return Pool.model_validate_json(store.read(POOL_FACTS))
    except ValidationError as error:
        reason = one_line(error, Pool)
        raise ConfigError(f"{store.address}/{POOL_FACTS} is damaged ({reason}): remove it and plan again") from None


def line(question: Question) -> str:
    """A question as JSON: its values in their order, for there may be hundreds of thousands."""
    values = [question.id, question.image, question.shard, question.sample, question.text, question.references]
    return json.dumps(values) + "\n"


def read_questions(store: Store, name: str) -> list[Question]:
    found = []
    try:
        for row in store.read(name).splitlines():
            number, image, shard, sample, text, references = from_json(row)
            found.append(Question(number, image, shard, sample, text, tuple(references)))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{store.address}/{name} is damaged ({error}): remove it and plan again") from None
    return found
