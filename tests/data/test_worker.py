"""Signals that Slurm sends to every process of a step must not end a rank's workers; the rank itself must."""

import multiprocessing
import subprocess
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hpc_mm.data.worker import outlive_signals


@pytest.mark.parametrize("name", ["TERM", "USR2"])
def test_a_signal_from_outside_loses_no_batch(name: str) -> None:
    batches = iter(DataLoader(torch.arange(100), batch_size=None, num_workers=2, worker_init_fn=outlive_signals))
    found = [int(next(batches)) for _ in range(8)]  # both workers are up
    for worker in batches._workers:
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    time.sleep(0.2)
    assert found + [int(value) for value in batches] == list(range(100))


def sleep(ready: Any) -> None:
    outlive_signals(0)
    ready.set()
    time.sleep(600)


def test_the_rank_ends_its_workers() -> None:
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    worker = fork.Process(target=sleep, args=(ready,))
    worker.start()
    ready.wait()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(timeout=0.2)
    assert worker.is_alive()
    worker.terminate()
    worker.join()
    assert worker.exitcode == 0
