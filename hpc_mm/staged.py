"""Stages of work, as arrays of jobs or as processes of this machine, by what a command says of cluster and task."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from hpc_mm.arrays import Work, queue, room_of_models, run_tasks, wants_slurm
from hpc_mm.deadline import LAUNCHER, die_with_parent, ended_in_order
from hpc_mm.local import visible_gpus


def run_stages(work: Work, cluster: str, task: int | None, run: Callable[[str], None]) -> int:
    """All stages of the work in their order; 0, or 1 where a task failed.

    A task here loads the model once and takes its share of all, so there are no more of them than there is room for.
    ``task``: this process is that one of its stage. ``run``: does a stage, or its task, here.
    """
    if task is None and wants_slurm(cluster):
        queue(work, cluster)
        return 0
    if LAUNCHER in os.environ:
        die_with_parent(signal.SIGTERM)  # else work whose launcher was killed would go on beside the next one
    for stage in work.stages:
        if stage.tasks is not None and stage.tasks > 1 and task is None:
            rooms = room_of_models(visible_gpus() if stage.gpus else None)
            at_once = min(stage.tasks, len(rooms))
            if at_once > 1:
                words = [word for word in work.words if not word.startswith("tasks=")]
                code = run_tasks([sys.executable, *words, f"tasks={at_once}"], stage.name, at_once, rooms)
                if code:
                    return code
                continue
        with ended_in_order():
            run(stage.name)
    return 0
