"""Benchmarks put to a model in stages, as arrays of jobs or as processes of this machine, by what a command says."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hpc_mm import slurm
from hpc_mm.answerer import EXPORT, ModelOptions, Weights
from hpc_mm.arrays import Stage, Work
from hpc_mm.config import ConfigError, Positive, Slurm
from hpc_mm.data.store import MissingKey, StoreDown, StoreError, whole
from hpc_mm.evaluations import HERE, place_of
from hpc_mm.predictions import SIZE
from hpc_mm.site import in_store, read_site

PLAN = "plan"  # the first stage
SNAPSHOT = ("hpc_mm", "eval", "sbatch")  # what a job reads of the checkout
FOUND = ("checkpoint", "step", "data", "out", "tasks")  # told to jobs as they were found, whatever the words said


class Staged(ModelOptions):
    """What every eval/ script takes: a model, a benchmark's data, and which stages and tasks run where."""

    STAGES: ClassVar[tuple[str, ...]]
    SHARED: ClassVar[tuple[str, ...]]  # those that several tasks divide

    data: str
    part: Positive = Field(SIZE, description="questions or items of a part, which is done or not done as a whole")
    out: str = Field("", description="folder or store of the results; empty = eval/ in the checkpoint's folder")
    stage: str = "all"
    tasks: Positive = Field(1, description="jobs that share the work")
    task: int | None = Field(None, ge=0, description="which of them this is, from 0; none = all of them")
    cluster: Literal["auto", "slurm", "local", "print"] = Field("auto", description="auto = Slurm where sbatch is")
    name: str = Field("", description="of the Slurm jobs; empty = run, benchmark and step")
    slurm: Slurm = Field(Slurm(), description="what sbatch is told")
    watch: bool = Field(False, description="show how far it is, and scores so far, until all is done")

    @model_validator(mode="after")
    def a_task_is_of_one_stage(self) -> Self:
        if self.task is not None and self.stage not in self.SHARED:
            raise ValueError(f"task={self.task} is of one stage: give stage={' or stage='.join(self.SHARED)} too")
        if self.task is not None and self.task >= self.tasks:
            raise ValueError(f"task={self.task}: tasks={self.tasks} are numbered from 0 to {self.tasks - 1}")
        return self

    @property
    def plans(self) -> bool:
        """Whether this command fixes the work list."""
        return self.stage in ("all", PLAN) and not self.watch

    @property
    def stages(self) -> tuple[str, ...]:
        """Those after planning."""
        return self.STAGES[1:] if self.stage == "all" else (self.stage,)

    @property
    def share(self) -> tuple[int, int]:
        """Which of how many tasks this process is."""
        return (0, 1) if self.task is None else (self.task, self.tasks)

    def located(self, benchmark: str, step: str) -> Self:
        """With whole addresses, the number of the step, and a place for results, so that jobs see what is seen here."""
        folder = Path(self.checkpoint).expanduser().absolute()
        out, data = self.out or str(place_of(folder, benchmark, step)), in_store(self.data, read_site().store)
        return self.model_copy(update={"checkpoint": str(folder), "step": step, "out": whole(out), "data": data})

    def decides(self, weights: Weights) -> dict[str, Any]:
        """What decides scores beside the protocol. In bf16 rounding depends on what is in a batch, and shows."""
        precision = self.precision_of(weights.run)
        batch = {"batch": self.batch} if precision == "bf16" else {}
        return {"step": weights.step, "weights": weights.digest, "data": self.data, "precision": precision, **batch}

    def again(self, script: str, words: Sequence[str]) -> list[str]:
        """A located command for one stage and task of it. ``script``: its file in eval/."""
        gone = {*FOUND, "stage", "task", "cluster", "watch"}
        found = [f"{key}={getattr(self, key)}" for key in FOUND if key != "step" or self.step != EXPORT]
        return [f"eval/{script}", HERE, *found, *(word for word in words if word.partition("=")[0] not in gone)]

    def job_name(self, benchmark: str, step: str) -> str:
        """Of the Slurm jobs, before their stage."""
        return self.name or f"{Path(self.checkpoint).name}-{benchmark}-step-{step}"

    def watched(self, benchmark: str, step: str) -> list[str]:
        """Names of the Slurm jobs whose work is watched; none where this command would run here."""
        if self.cluster not in ("auto", "slurm") or not slurm.is_here():
            return []
        name = self.job_name(benchmark, step)
        return [f"{name}-{stage}" for stage in self.stages if stage in self.SHARED]

    def work(self, name: str, stages: Sequence[str], words: Sequence[str]) -> Work:
        """A located command's stages as jobs; ``words`` as of ``again``."""
        shared = {stage: Stage(stage, self.tasks, self.gpus, model=True) for stage in self.SHARED}
        jobs = [shared.get(stage, Stage(stage)) for stage in stages]
        places = [self.checkpoint, self.data, self.out]
        return Work(name, f"eval-{name}", jobs, self.STAGES[1:], words, places, SNAPSHOT, self.slurm)


def exit_code(run: Callable[[], int]) -> int:
    """The command's: its own, or 2 after one line about a user's mistake."""
    try:
        return run()
    except (ConfigError, StoreError, MissingKey, StoreDown, OSError) as error:  # OSError: of disks
        print(str(error) or repr(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the way to leave watching, too
        return 128 + signal.SIGINT
