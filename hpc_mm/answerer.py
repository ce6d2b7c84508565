"""The model of a checkpoint, ready to answer: where a model family joins evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from hpc_mm import checkpoint
from hpc_mm.benchmark import Decoding
from hpc_mm.checkpoint import LATEST
from hpc_mm.config import ConfigError, Part, Positive, Run, read_run, with_overrides
from hpc_mm.data.schema import Sample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXPORTED = "model.safetensors*"
FIRST, EXPORT = "0", "export"  # in place of a step: the weights before training, and those of an exported folder


class Answerer(Protocol):
    """What evaluation needs of a model. The result for a prompt must not depend on the prompts beside it."""

    def check(self, prompts: Sequence[Sample], answers: Decoding | Sequence[str]) -> None:
        """ConfigError where a prompt, whose images are without their bytes, leaves no room for what answers it."""
        ...

    def generate(self, prompts: Sequence[Sample], decoding: Decoding) -> list[str]:
        """What the model writes after each prompt, without special tokens and else uncut."""
        ...

    def score(self, prompts: Sequence[Sample], candidates: Sequence[str]) -> NDArray[np.float64]:
        """Mean log-probability of each candidate's tokens after each prompt, (prompts, candidates)."""
        ...


@dataclass(frozen=True)
class Weights:
    """Which weights of a run are evaluated."""

    run: Run
    folder: Path  # of the run, or of what hpc_mm.export made of it
    step: str  # of a checkpoint; 0 = before training; export = those of the folder

    @property
    def checkpoint(self) -> Path | None:
        return checkpoint.path_of(self.folder, int(self.step)) if self.step not in (FIRST, EXPORT) else None

    @property
    def digest(self) -> str:
        """Names the weights, by what their writer said of their bytes."""
        if self.checkpoint is not None:
            said = (self.checkpoint / checkpoint.MANIFEST).read_bytes()
        elif self.step == FIRST:
            said = json.dumps([self.run.model.model_dump(mode="json"), self.run.train.seed]).encode()
        else:
            said = "".join(checkpoint.digest(file) for file in sorted(self.folder.glob(EXPORTED))).encode()
        return hashlib.sha256(said).hexdigest()[:16]


@dataclass(frozen=True)
class Running:
    """How a model answers. ``precision`` changes answers, in bf16 ``batch`` does too, and the rest does not."""

    precision: Literal["bf16", "fp32"]
    batch: int  # prompts at once
    keep_bytes: int  # of image features, on the device
    device: str


class ModelOptions(Part):
    """Which weights, and how they run: what every command takes that loads a model."""

    checkpoint: str = Field(description="folder of a run, or of weights that hpc_mm.export wrote")
    step: str = Field(LATEST, description="of the run's checkpoints: latest, a number, or 0 = before training")
    precision: Literal["run", "bf16", "fp32"] = Field("run", description="of the arithmetic; run = as in training")
    batch: Positive = Field(
        32, description="questions answered at once; pairs of image and text scored at once in bf16"
    )
    keep_mb: Positive = Field(1024, description="image features kept on the device, MiB")
    gpus: int = Field(1, ge=0, le=1, description="GPUs of a process; 0 = it runs on CPUs")

    def precision_of(self, run: Run) -> Literal["bf16", "fp32"]:
        return run.precision if self.precision == "run" else self.precision

    def running(self, run: Run, task: int | None = None) -> Running:
        return Running(self.precision_of(run), self.batch, self.keep_mb * 2**20, device_of(task, self.gpus))


def find(folder: str, step: str, digests: bool = True) -> Weights:
    """The weights that a command names, whole (``checkpoint.chosen``). ConfigError where there are none."""
    path = Path(folder).expanduser().absolute()
    run = read_run(path)
    if any(path.glob(EXPORTED)):
        if step not in (LATEST, EXPORT):
            raise ConfigError(f"step={step}: {path} holds exported weights of one step; leave it out")
        values = {"model.weights": str(path), "start": ""}  # what it began with is among them
        if (path / "tokenizer.json").exists():
            values["model.language.tokenizer"] = str(path / "tokenizer.json")
        return Weights(with_overrides(run, values), path, EXPORT)
    if step == FIRST:
        return Weights(run, path, FIRST)
    return Weights(run, path, str(checkpoint.step_of(checkpoint.chosen(path, step, digests))))


def device_of(task: int | None, gpus: int) -> str:
    """A GPU of this machine for each of the tasks that run here, in turn, if it has any and ``gpus`` are wanted."""
    import torch

    return f"cuda:{(task or 0) % torch.cuda.device_count()}" if gpus and torch.cuda.is_available() else "cpu"


def check_family(run: Run) -> None:
    """ConfigError where the run's model writes no answers."""
    if run.model.family not in FAMILIES:
        raise ConfigError(
            f"model.family={run.model.family} answers no benchmark's questions, of eval/ or evaluate.every; those that "
            f"do: {', '.join(FAMILIES)}"
        )


def load(weights: Weights, running: Running) -> Answerer:
    check_family(weights.run)
    return FAMILIES[weights.run.model.family](weights, running)


def trained(weights: Weights, precision: Literal["bf16", "fp32"]) -> tuple[Any, Any]:
    """The model with these weights, on the CPU, and its tokenizer. ConfigError where they are of another model."""
    from hpc_mm.families import family_of, initial

    # lengths differ from batch to batch, so there is nothing to compile for
    run = with_overrides(weights.run, {"model.compile": "false", "precision": precision})
    family = family_of(run)
    tokenizer = family.load_tokenizer(run.model.language)
    model = initial(run, family, tokenizer)
    if weights.checkpoint is not None:
        try:
            checkpoint.load_weights(model, weights.checkpoint)
        except checkpoint.DamagedCheckpoint as error:
            raise ConfigError(str(error)) from None
    return model, tokenizer


def flamingo(weights: Weights, running: Running) -> Answerer:
    from hpc_mm.answering import FlamingoAnswers

    model, tokenizer = trained(weights, running.precision)
    return FlamingoAnswers(model, tokenizer, running.device, running.batch, running.keep_bytes, running.precision)


FAMILIES: Mapping[str, Callable[[Weights, Running], Answerer]] = {"flamingo": flamingo}
