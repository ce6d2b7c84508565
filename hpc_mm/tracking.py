"""Weights & Biases beside what is written to files, where a run wants it. Never torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from hpc_mm.config import Run


def wandb_run(run: Run, folder: Path, evaluation: str = "") -> Any:
    """wandb's run of a training run, or of an ``evaluation`` of it in the same group; None where it is not tracked."""
    if run.tracking.wandb == "off":
        return None
    import wandb

    place = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()  # others call theirs toy too
    name = f"{run.name}-{evaluation}" if evaluation else run.name
    return wandb.init(
        project=run.tracking.project,
        entity=run.tracking.entity or None,
        name=name,
        id=f"{name}-{place}",
        group=run.name,
        job_type="evaluation" if evaluation else "training",
        resume="allow",
        mode=run.tracking.wandb,
        dir=str(folder),
        config=run.model_dump(mode="json"),
    )
