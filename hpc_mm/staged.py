"""Stages of work, as arrays of jobs or as processes of this machine, by what a command says of cluster and task."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

from hpc_mm.arrays import Work, queue, run_tasks, wants_slurm
from hpc_mm.deadline import LAUNCHER, die_with_parent, ended_in_order


def run_stages(work: Work, stages: Sequence[str], cluster: str, task: int | None, run: Callable[[str], None]) -> int:
    """All ``stages`` of the work in their order; 0, or 1 where a task failed.

    ``task``: this process is that one of its stage. ``run``: does a stage, or its task, here.
    """
    if task is None and wants_slurm(cluster):
        queue(work, cluster)
        return 0
    if LAUNCHER in os.environ:
        die_with_parent(signal.SIGTERM)  # else work whose launcher was killed would go on beside the next one
    tasks = {stage.name: stage.tasks for stage in work.stages}
    for stage in stages:
        count = tasks[stage]
        if count is not None and count > 1 and task is None:
            code = run_tasks([sys.executable, *work.words], stage, count)
            if code:
                return code
            continue
        with ended_in_order():
            run(stage)
    return 0
