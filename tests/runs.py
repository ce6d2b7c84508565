"""Small runs of the toy recipe, and what they left in their folders."""

import json
from pathlib import Path
from typing import Any

# Small enough for seconds, with every part of the toy model in it; batches divide over 1 to 4 ranks.
SMALL = [
    "recipe=toy",
    "sources.documents.batch=4",
    "sources.pairs.batch=8",
    "sources.questions.batch=4",
    "train.log_every=1",
    "train.warmup=2",
    "train.steps=6",
    "loader.workers=0",
]
LOCAL = ["cluster=local", *SMALL]


def small(*words: str) -> list[str]:
    """The words, after those of a small run that they do not say otherwise."""
    given = {word.partition("=")[0] for word in words}
    return [*(word for word in SMALL if word.partition("=")[0] not in given), *words]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[list[float]]:
    """The losses of all sources, step by step."""
    return [[line[f"loss/{name}"] for name in ("documents", "pairs", "questions")] for line in lines(run)]
