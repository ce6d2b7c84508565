"""Answers in the files that challenge servers take, for splits whose answers are not public."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpc_mm.benchmark import Benchmark, Question, questions
from hpc_mm.config import ConfigError
from hpc_mm.data.store import Store, write_changed
from hpc_mm.predictions import Row
from hpc_mm.rules import rules_of

PART_OF = {"test-dev": "test"}  # a split -> the one whose every question the server wants to see in the file


def write(
    store: Store, name: str, benchmark: Benchmark, asked: Sequence[Question], rows: Sequence[Row], data: str, rules: str
) -> str:
    """Write the file ``name`` and say so. Answers are cleaned and compared by the rules; other questions get none."""
    known = rules_of(rules, benchmark.name)
    answers = {row["id"]: known.compared(known.answer(row["text"])) for row in rows}
    ids, note = [question.id for question in asked], ""
    if benchmark.split in PART_OF:
        ids, note = with_others(ids, benchmark, data)
    form = FORMS.get(benchmark.name, by_number)
    lines = [form(number, answers.get(number, "")) for number in ids]
    write_changed(store, name, json.dumps(lines).encode())
    return f"{store.address}/{name}: {len(answers)} answers of {len(ids)} questions to hand in{note}"


def with_others(ids: list[str], benchmark: Benchmark, data: str) -> tuple[list[str], str]:
    split = PART_OF[benchmark.split]
    try:
        every = [question.id for question in questions(data, split, benchmark)]
    except ConfigError:
        return ids, f"; the server may want all questions of {split}, which is not prepared in {data}"
    return [*every, *(dict.fromkeys(ids).keys() - set(every))], ""


def by_number(question: str, answer: str) -> dict[str, Any]:
    """As the VQA challenge and its followers have it."""
    return {"question_id": int(question) if question.isdecimal() else question, "answer": answer}


def by_image(question: str, answer: str) -> dict[str, Any]:
    """VizWiz has one question for each image."""
    return {"image": question, "answer": answer}


FORMS: Mapping[str, Callable[[str, str], dict[str, Any]]] = {"vizwiz": by_image}
