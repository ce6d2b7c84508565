"""How long training stands still for a checkpoint: ours beside torch.distributed.checkpoint, in one process.

    python benchmarks/checkpoint.py

A GiB of fp32 weights and Adam moments, saved again and again by each in turn; every save is waited for before the next
one begins. The stall is what the training loop waits for; the whole is until the checkpoint is on disk and marked. Our
stall is bound by copying memory (the last column is a plain copy of the same bytes), our whole by the disk.
"""

import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed import checkpoint as dcp

from hpc_mm import checkpoint, sharding

ROUNDS = 7  # the first one makes buffers and is not counted
GIB = 2**30
WIDTH, LAYERS = 4096, 5  # 5 x 16.8 M parameters x (weight + 2 moments) x 4 bytes = 0.94 GiB


class Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def main() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1")
    warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
    distributed.init_process_group("gloo")
    accelerator = Accelerator(cpu=True)
    objective = Objective()
    parts = (accelerator, *accelerator.prepare(objective, torch.optim.AdamW(objective.parameters())))
    views = [tensor for fragment in sharding.own(*parts) for tensor in fragment.tensors.values()]
    size = sum(view.numel() for view in views) * 4 / GIB
    state = {"model": objective.state_dict(), "optimizer": parts[2].optimizer.state_dict()}
    folder = Path(tempfile.mkdtemp(prefix="hpc_mm-benchmark-"))
    saver = checkpoint.Saver(accelerator, folder, keep=1)

    def ours(number: int) -> Callable[[], object]:
        saver.start(sharding.own(*parts), {"step": number, "updates": 0})
        return saver.finish

    def dcp_async(number: int) -> Callable[[], object]:
        return dcp.async_save(state, checkpoint_id=folder / f"async{number % 2}").result  # type: ignore[union-attr]

    def dcp_sync(number: int) -> Callable[[], object]:
        dcp.save(state, checkpoint_id=folder / f"sync{number % 2}")
        return lambda: None

    def copy(number: int) -> Callable[[], object]:
        for view, kept in zip(views, copies, strict=True):
            kept.copy_(view)
        return lambda: None

    copies = [torch.empty_like(view) for view in views]
    ways = {"hpc_mm": ours, "dcp.async_save": dcp_async, "dcp.save": dcp_sync, "plain copy": copy}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            wait = way(number)
            stalled = time.perf_counter() - started
            wait()
            times[name].append((stalled / size, (time.perf_counter() - started) / size))
    shutil.rmtree(folder, ignore_errors=True)
    distributed.destroy_process_group()
    report({name: found[1:] for name, found in times.items()}, size)


def report(times: dict[str, list[tuple[float, float]]], size: float) -> None:
    peer = statistics.median(stall for stall, _ in times["dcp.async_save"])
    print(f"{size:.2f} GiB, seconds per GiB, median (min - max) of {ROUNDS - 1} rounds in turn")
    print(f"{'':16}{'stall':>22}  of dcp.async_save{'until on disk':>16}")
    for name, found in times.items():
        stalls = [stall for stall, _ in found]
        middle = statistics.median(stalls)
        spread = f"{middle:.3f} ({min(stalls):.3f} - {max(stalls):.3f})"
        whole = statistics.median(whole for _, whole in found)
        print(f"{name:16}{spread:>22}{middle / peer:17.2f}x{whole:16.3f}")


if __name__ == "__main__":
    main()
