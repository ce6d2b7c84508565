"""Counts and rates of a run: metrics.jsonl always, Weights & Biases where it is wanted."""

from __future__ import annotations

import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

import torch

from hpc_mm.config import ConfigError, Run
from hpc_mm.evaluations import FOLDER
from hpc_mm.run_scores import RunScore, metrics_of, scores_of
from hpc_mm.tracking import wandb_run

logger = logging.getLogger(__name__)

EVALUATED = "eval/step"  # whose scores a line has beside its own step

# Dense bf16 peak of one device, FLOP/s, by a word of its name (vendors' data sheets).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """Peak of this rank's device in FLOP/s; None where we do not know it, as on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in PEAK_FLOPS.items() if word in name), None)


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: the device's, or the host's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # ru_maxrss is in KiB


class Records:
    """metrics.jsonl of the run folder and wandb beside it. Made on rank 0 only."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.file, self.folder = folder / "metrics.jsonl", folder
        self.steps = run.train.steps
        self.wandb = wandb_run(run, folder)
        if self.wandb is not None:
            self.wandb.define_metric(f"{FOLDER}/*", step_metric=EVALUATED)
        self.scores: list[RunScore] = []  # of evaluations, as they were found last
        self.told: set[tuple[int, str]] = set()  # those that a line has: step that was evaluated, name

    def cut(self, step: int) -> None:
        """Forget what was recorded after ``step``: a run that goes on from there records it again."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # the process died while it wrote this line
            record = json.loads(line)
            if record["step"] <= step:
                kept.append(line)
                self.told |= {(record[EVALUATED], name) for name in record if EVALUATED in record}
        aside = self.file.with_suffix(".partial")
        aside.write_text("".join(kept))
        aside.replace(self.file)

    def news(self) -> dict[str, float]:
        """Scores that no line has yet, of the first evaluated step that has such. A problem is a warning."""
        try:
            self.scores = scores_of(self.folder, self.scores)
        except (ConfigError, OSError) as problem:
            logger.warning("scores are left out here: %s", problem)
            return {}
        for step in sorted({one.step for one in self.scores}):
            found = metrics_of(one for one in self.scores if one.step == step)
            new = {name: score for name, score in found.items() if (step, name) not in self.told}
            if new:
                self.told |= {(step, name) for name in new}
                return {EVALUATED: step, **new}
        return {}

    def write(self, values: dict[str, Any]) -> None:
        values = {**values, **self.news()}
        record = {"step": values["step"], "steps": self.steps, "time": time.time(), **values}
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        logger.info(
            "step %d/%d  loss %s  lr %.2e  %.1f samples/s  waiting for data %.0f %%",
            record["step"],
            self.steps,
            "none: skipped" if record["loss"] is None else format(record["loss"], ".4f"),
            record["lr"],
            record["samples_per_s"],
            100 * record["data_wait"],
        )
        if self.wandb is not None:
            self.wandb.log({key: value for key, value in values.items() if value is not None}, step=values["step"])

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()
