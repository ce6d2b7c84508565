"""Planned questions on their way to a model: prompts with their images, ahead of it, and its answers part by part."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from hpc_mm.answerer import Answerer
from hpc_mm.benchmark import Benchmark, Question, read_image
from hpc_mm.config import ConfigError
from hpc_mm.data.schema import Sample
from hpc_mm.data.shards import BrokenShard, ShardReader
from hpc_mm.data.store import open_store
from hpc_mm.demonstrations import QuerySet, Similar, prompt, shown
from hpc_mm.predictions import Row, write_part
from hpc_mm.similarity import Encoder
from hpc_mm.trials import Planned, Trial

READS = 16  # images read at once
IMAGES = 4096  # kept as read: demonstrations come again and again. Some 400 MB of photographs
LONGEST = 64  # prompts that are held against the model's context before any work
KEPT = 5  # classes of a row, the likeliest


def ask(
    model: Answerer,
    benchmark: Benchmark,
    planned: Planned,
    todo: Sequence[tuple[Trial, int]],
    data: str,
    encoder: Encoder,
) -> None:
    """Put parts of trials to the model and write its answers, a part at a time. The next part's images are read
    meanwhile. ConfigError before any of it where prompts are too long for the model."""
    asked = [question for trial, part in todo for question in part_of(planned, trial, part)]
    prompts = Prompts(benchmark, planned, data, encoder, asked)
    model.check(prompts.longest(todo), benchmark.classes or benchmark.decoding)
    with ThreadPoolExecutor(1, "ahead") as ahead:
        waiting = ahead.submit(prompts.of, *todo[0])
        for number, (trial, part) in enumerate(todo):
            began, plan = time.time(), planned.plans[trial]
            ready = waiting.result()
            if number + 1 < len(todo):
                waiting = ahead.submit(prompts.of, *todo[number + 1])
            rows = list(rows_of(model, benchmark, ready))
            write_part(planned.store(trial), plan, part, rows, began)
            rate = len(rows) / max(time.time() - began, 1e-9)
            done = f"{trial}: part {part + 1} of {plan.parts}"
            print(f"{done}, {len(rows)} questions, {rate:.1f}/s ({number + 1} of {len(todo)} here)", flush=True)


def rows_of(model: Answerer, benchmark: Benchmark, prompts: Sequence[Sample]) -> Iterator[Row]:
    """What the model makes of each prompt: its text, or of classes the likeliest with their mean log-probabilities."""
    if benchmark.kind != "classes":
        texts = model.generate(prompts, benchmark.decoding)
        yield from ({"id": prompt.id, "text": text} for prompt, text in zip(prompts, texts, strict=True))
        return
    for asked, scores in zip(prompts, model.score(prompts, benchmark.classes), strict=True):
        best = np.argsort(-scores, kind="stable")[:KEPT].tolist()  # of equals, the first in the benchmark's order
        found = {benchmark.classes[place]: float(scores[place]) for place in best}
        yield {"id": asked.id, "text": benchmark.classes[best[0]], "scores": found}


class Prompts:
    """Prompts of parts, with images read from the shards."""

    def __init__(
        self, benchmark: Benchmark, planned: Planned, data: str, encoder: Encoder, asked: Sequence[Question]
    ) -> None:
        """``asked``: all questions that come, since what is similar to them is found at once."""
        self.benchmark, self.planned, self.asked = benchmark, planned, asked
        self.store, self.encoder = open_store(data), encoder
        self.read = lru_cache(IMAGES)(reader(data))
        self.queries: dict[int, QuerySet] = {}  # by seed

    def of(self, trial: Trial, part: int) -> list[Sample]:
        asked = part_of(self.planned, trial, part)
        shots = self.demonstrations(trial, asked)
        wanted = {
            one.image_key: one
            for question, others in zip(asked, shots, strict=True)
            for one in (question, *(others if trial.shots else ()))
        }
        with ThreadPoolExecutor(READS, "images") as threads:
            images = dict(zip(wanted, threads.map(self.read, wanted.values()), strict=True))
        return [
            prompt(question, others, self.benchmark, trial.shots, images)
            for question, others in zip(asked, shots, strict=True)
        ]

    def longest(self, todo: Sequence[tuple[Trial, int]]) -> list[Sample]:
        """Of the prompts with most demonstrations those with most characters, without their images."""
        most = max(shown(trial.shots) for trial, _ in todo)
        every = (
            (question, others, trial.shots)
            for trial, part in todo
            if shown(trial.shots) == most
            for asked in [part_of(self.planned, trial, part)]
            for question, others in zip(asked, self.demonstrations(trial, asked), strict=True)
        )
        found = heapq.nlargest(LONGEST, every, key=lambda one: characters(*one[:2]))
        return [prompt(question, others, self.benchmark, shots) for question, others, shots in found]

    def demonstrations(self, trial: Trial, asked: Sequence[Question]) -> list[list[Question]]:
        """Of each question, the same whatever else is asked."""
        if trial.seed is None:
            return self._similar(asked, trial.shots)
        if trial.seed not in self.queries:
            self.queries[trial.seed] = self.planned.queries(trial.seed)
        return [self.queries[trial.seed].shots(question, trial.shots) for question in asked]

    def _similar(self, asked: Sequence[Question], shots: int) -> list[list[Question]]:
        return [self.similar.shots(question, shots, self.nearest[question.image_key]) for question in asked]

    @cached_property
    def similar(self) -> Similar:
        return self.planned.similar()

    @cached_property
    def nearest(self) -> dict[str, NDArray[np.int64]]:
        """Rows of the pool's images for every image that is asked about, enough for any trial."""
        return self.similar.nearest(self.asked, max(self.planned.choice.shots), self.store, self.encoder)


def characters(question: Question, demonstrations: Sequence[Question]) -> int:
    """Of a prompt, without its template, which all have: to build it takes far longer than to compare it."""
    return len(question.text) + sum(len(other.text) + len(other.references[0]) for other in demonstrations)


def part_of(planned: Planned, trial: Trial, part: int) -> list[Question]:
    size = planned.plans[trial].size
    return planned.questions[part * size : (part + 1) * size]


def reader(data: str) -> Callable[[Question], bytes]:
    """What reads a question's image from shards."""
    shards = ShardReader(open_store(data))

    def read(question: Question) -> bytes:
        try:
            return read_image(shards, question)
        except BrokenShard as error:
            raise ConfigError(f"{data}: {error}") from None

    return read
