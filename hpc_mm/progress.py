"""How far a run is, shown from its metrics.jsonl: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from hpc_mm.config import Run

EVERY = 5.0  # seconds between lines where the output is not a terminal


class Metrics:
    """The lines that a growing metrics.jsonl has gained since the last look."""

    def __init__(self, file: Path):
        self.file = file
        found = file.stat() if file.exists() else None
        self.inode, self.offset = (found.st_ino, found.st_size) if found else (0, 0)
        self.newest = time.time()  # of the last line that was news, in unix seconds

    def news(self) -> list[dict[str, Any]]:
        """New whole lines; a line that is still being written waits for the next look.

        A run that goes on replaces the file by its beginning: of another file, only lines written since are news.
        """
        if not self.file.exists():
            return []
        with self.file.open("rb") as stream:
            found = os.fstat(stream.fileno())
            replaced = (self.inode or found.st_ino) != found.st_ino or found.st_size < self.offset
            self.inode, self.offset = found.st_ino, 0 if replaced else self.offset
            stream.seek(self.offset)
            whole = stream.read().rpartition(b"\n")[0]
        self.offset += len(whole) + 1 if whole else 0
        lines = [json.loads(line) for line in whole.splitlines()]
        if replaced:
            lines = [line for line in lines if line["time"] > self.newest]
        self.newest = lines[-1].get("time", self.newest) if lines else self.newest
        return lines


class Progress:
    """A context in which ``update`` shows what is new."""

    def __init__(self, run: Run, metrics: Path):
        self.metrics = Metrics(metrics)
        self.steps = run.train.steps
        self.first: tuple[int, float] | None = None  # step and time of the first line that was seen
        self.shown = time.monotonic()
        self.unshown = ""
        self.bar: Bar | None = None
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
            self.bar = Bar(*columns, console=Console())
            self.task = self.bar.add_task("training", total=self.steps, figures="")

    def __enter__(self) -> Progress:
        message = "starting: the first step takes longest (imports, reading ahead)"
        if self.bar:
            self.bar.start()
            self.bar.update(self.task, figures=message)
        else:
            print(message, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.update(last=True)
        if self.bar:
            self.bar.stop()

    def update(self, last: bool = False) -> None:
        news = self.metrics.news()
        now = time.monotonic()
        if news:
            newest = news[-1]
            self.first = self.first or (newest["step"], newest["time"])
            self.unshown = self.figures(*self.first, newest)
            if self.bar:
                self.bar.update(self.task, completed=newest["step"], figures=self.unshown)
        if not self.bar and self.unshown and (now - self.shown >= EVERY or last):
            print(self.unshown, flush=True)
            self.shown, self.unshown = now, ""

    def figures(self, step: int, start: float, newest: dict[str, Any]) -> str:
        """Speed is taken since ``step`` at time ``start``: ``step 120/600  loss 1.234  85.2 samples/s  1:05 left``"""
        loss = "none: skipped" if newest["loss"] is None else f"{newest['loss']:.3f}"
        words = [f"step {newest['step']}/{self.steps}", f"loss {loss}"]
        words.append(f"{newest['samples_per_s']:.1f} samples/s")
        if newest["step"] > step:
            left = (newest["time"] - start) / (newest["step"] - step) * (self.steps - newest["step"])
            words.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return "  ".join(words)
