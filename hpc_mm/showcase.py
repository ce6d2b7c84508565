"""Examples of an evaluation's questions and answers, with pictures, for its page."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hpc_mm import gallery, results
from hpc_mm.asking import Prompts
from hpc_mm.benchmark import Benchmark, Question
from hpc_mm.data.store import open_store, write_changed
from hpc_mm.gallery import Example, Shot, thumbnail
from hpc_mm.similarity import Encoder
from hpc_mm.trials import Planned, Trial, some_of

PAGE = "index.html"
READS = 16  # images read at once


def write_page(planned: Planned, benchmark: Benchmark, rules: str, data: str, encoder: Encoder, count: int) -> str:
    """Write the page of results with ``count`` questions, the same ones of every trial; its address."""
    store = open_store(planned.address)
    values = results.read(store)
    asked = some_of(planned.questions, min(count, len(planned.questions)))
    prompts = Prompts(benchmark, planned, data, encoder, asked)
    examples: list[Example] = []
    wanted: dict[str, Question] = {}
    for trial in planned.plans:
        rows = {row["id"]: row for row in results.read_rows(planned.store(trial), f"{rules}.jsonl")}
        shots = prompts.demonstrations(trial, asked)
        for question, others in zip(asked, shots, strict=True):
            examples.append(example(question, others, rows[question.id], trial))
            wanted |= {one.image_key: one for one in (question, *(others if trial.shots else ()))}
    with ThreadPoolExecutor(READS, "images") as threads:
        pictures = threads.map(lambda question: thumbnail(prompts.read(question)), wanted.values())
        images = dict(zip(wanted, pictures, strict=True))
    title = f"{values.benchmark}: {values.checkpoint}, step {values.step}"
    write_changed(store, PAGE, gallery.page(title, values.model_dump()["scores"], examples, images).encode())
    return f"{store.address}/{PAGE}"


def example(question: Question, others: Iterable[Question], row: dict[str, Any], trial: Trial) -> Example:
    shots = tuple(
        Shot(other.image_key if trial.shots else "", other.text, other.references[0] if other.references else "")
        for other in others
    )
    truth = tuple(dict.fromkeys(question.references))
    return Example(question.id, question.image_key, question.text, shots, row["text"], truth, row["score"], str(trial))
