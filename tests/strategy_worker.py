"""A rank of test_strategies.py: a step with a NaN on one rank, a checkpoint, and going on from it, with real parts.

accelerate launch ... tests/strategy_worker.py FOLDER STRATEGY PRECISION [FOLDER OF ANOTHER STRATEGY'S CHECKPOINT]
"""

import json
import math
import sys
from pathlib import Path

import torch

from hpc_mm import checkpoint, sharding
from hpc_mm.config import with_overrides
from hpc_mm.recipes.toy import toy

BAD_STEP, SAVED_STEP, LAST_STEP = 2, 4, 6


class ConditionedLayer(torch.nn.Linear):
    """Named as the unit that FSDP splits."""


class Objective(torch.nn.Module):
    """Two layers that learn around one that does not."""

    _no_split_modules = ("ConditionedLayer",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [ConditionedLayer(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), ConditionedLayer(16, 1)]
        self.model = torch.nn.Sequential(*layers)
        self.model[2].requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs.to(self.model[2].weight.dtype)).float().square().sum()


def step(accelerator, objective, optimizer, number: int) -> list[float]:
    """Loss over all ranks and gradient norm of optimizer step ``number``, of two micro-steps of eight rows."""
    total = torch.zeros(())
    for micro in range(2):
        generator = torch.Generator().manual_seed(10 * number + micro)
        inputs = torch.randn(8, 8, generator=generator)[accelerator.process_index :: accelerator.num_processes]
        if (number, micro, accelerator.process_index) == (BAD_STEP, 0, 1):
            inputs[0, 0] = float("nan")
        with accelerator.accumulate(objective):
            loss = objective(inputs)
            accelerator.backward(loss * accelerator.num_processes * 2)
        total += loss.detach()
    norm = sharding.update(accelerator, objective, optimizer, clip=1.0)
    return [float(accelerator.reduce(total, "sum")), norm]


def go_on(parts, folder: Path) -> list[list[float]]:
    """Losses and norms from the newest checkpoint of ``folder`` on."""
    accelerator = parts[0]
    found = checkpoint.find(accelerator, folder)
    checkpoint.load(sharding.held(*parts), found, accelerator.process_index, accelerator.num_processes)
    progress = checkpoint.read_progress(found)
    sharding.restored(*parts, progress["updates"])
    return [step(*parts, number) for number in range(progress["step"], LAST_STEP)]


def main(folder: Path, strategy: str, precision: str, other: str = "") -> None:
    words = {"strategy": strategy, "precision": precision, "train.accumulate": "2"}
    run = with_overrides(toy(), words)
    accelerator = sharding.make_accelerator(run)
    objective = Objective()
    learning = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    objective, optimizer = accelerator.prepare(objective, torch.optim.AdamW(learning, lr=0.01))
    parts = (accelerator, objective, optimizer)
    saver = checkpoint.Saver(accelerator, folder, keep=1)
    found = []
    for number in range(LAST_STEP):
        if number == SAVED_STEP:
            updates = sum(math.isfinite(norm) for _, norm in found)
            saver.start(sharding.own(*parts), {"step": number, "updates": updates})
        found.append(step(*parts, number))
    _, problem, _ = saver.finish()
    assert problem is None
    result = {"steps": found, "again": go_on(parts, folder), "from other": go_on(parts, Path(other)) if other else None}
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
