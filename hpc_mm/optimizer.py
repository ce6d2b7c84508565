"""What a step does to which weights: the learning rate of a step, and the parameters with and without decay."""

from __future__ import annotations

import math
from typing import Any

from hpc_mm.config import Train
from hpc_mm.families import Model


def learning_rate(train: Train, step: int) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up, then constant, linear or cosine decay to 0."""
    if step < train.warmup:
        return train.learning_rate * step / train.warmup
    done = (step - train.warmup) / max(1, train.steps - train.warmup)
    if train.schedule == "linear":
        return train.learning_rate * max(0.0, 1.0 - done)
    if train.schedule == "cosine":
        return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return train.learning_rate


def parameter_groups(model: Model, train: Train) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay; the model says which."""
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in learning if model.decays(name, parameter)]
    others = [parameter for name, parameter in learning if not model.decays(name, parameter)]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
