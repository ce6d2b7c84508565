"""Counts and rates of a run: metrics.jsonl always, Weights & Biases where it is wanted."""

from __future__ import annotations

import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

import torch

from hpc_mm.config import Run
from hpc_mm.tracking import wandb_run

logger = logging.getLogger(__name__)

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
        self.file = folder / "metrics.jsonl"
        self.steps = run.train.steps
        self.wandb = wandb_run(run, folder)

    def cut(self, step: int) -> None:
        """Forget what was recorded after ``step``: a run that goes on from there records it again."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # the process died while it wrote this line
            if json.loads(line)["step"] <= step:
                kept.append(line)
        aside = self.file.with_suffix(".partial")
        aside.write_text("".join(kept))
        aside.replace(self.file)

    def write(self, values: dict[str, Any]) -> None:
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
