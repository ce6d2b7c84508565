"""A rank of test_strategies.py: uneven steps, one with a NaN on one rank, a checkpoint, and going on, with real parts.

accelerate launch ... tests/strategy_worker.py FOLDER STRATEGY PRECISION FOLDER_OF_OTHER_CHECKPOINTS CASE,...
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from strategy_cases import LAST_STEP, SAVED_STEP, SHARES, model_of, run_of, share, tokenizer_of

from hpc_mm import checkpoint, sharding
from hpc_mm.config import Run
from hpc_mm.families import family_of
from hpc_mm.models import token_head
from hpc_mm.optimizer import parameter_groups
from hpc_mm.train import Objective


class Rank:
    """This process: the small model of a case on a strategy."""

    def __init__(self, case: str, run: Run, make_accelerator: Callable[[Run], Any]) -> None:
        self.case, self.run, self.tokenizer = case, run, tokenizer_of(case, run)
        token_head.LOGITS = 5 * len(self.tokenizer)  # so many at a time: ranks make unequal numbers of parts
        model = model_of(case, run, self.tokenizer)  # before accelerate, as in Training
        self.spec = model.image_spec
        self.accelerator = make_accelerator(run)
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None:  # small parameters are divided too
            plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 2000
        # Such an epsilon keeps the rounding of small gradients from deciding the sign of a whole update.
        optimizer = torch.optim.AdamW(parameter_groups(model, run.train), lr=5e-3, eps=1e-2, fused=True)
        objective, optimizer = self.accelerator.prepare(Objective(model, family_of(run)), optimizer)
        objective.train()
        self.parts = (self.accelerator, objective, optimizer)

    def step(self, number: int) -> list[float]:
        """Loss over all ranks and gradient norm of optimizer step ``number``."""
        accelerator, objective, optimizer = self.parts
        first, alone = accelerator.process_index, accelerator.num_processes == 1
        ranks = range(len(SHARES)) if alone else range(first, first + 1)
        total = torch.zeros(())
        for micro in range(2):
            batches = share(self.case, self.run, self.tokenizer, self.spec, number, micro, ranks)
            with accelerator.accumulate(objective):
                loss = objective(batches).sum()
                accelerator.backward(loss * accelerator.num_processes * 2 / 100)  # about the targets of a step
            total += loss.detach()
        norm = sharding.update(accelerator, objective, optimizer, clip=1.0)
        return [float(accelerator.reduce(total, "sum")), norm]

    def train(self, folder: Path) -> list[list[float]]:
        """Losses and norms of all steps; a checkpoint of SAVED_STEP is left in ``folder``."""
        saver = checkpoint.Saver(self.accelerator, folder, keep=1)
        found: list[list[float]] = []
        for number in range(LAST_STEP):
            if number == SAVED_STEP:
                updates = sum(math.isfinite(norm) for _, norm in found)
                saver.start(sharding.own(*self.parts), {"step": number, "updates": updates})
            found.append(self.step(number))
        _, problem, _ = saver.finish()
        assert problem is None
        return found

    def go_on(self, folder: Path) -> list[list[float]]:
        """Losses and norms from the newest checkpoint of ``folder`` on."""
        found = checkpoint.find(self.accelerator, folder)
        assert found is not None
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        checkpoint.load(sharding.held(*self.parts), found, rank, ranks)
        progress = checkpoint.read_progress(found)
        sharding.restored(*self.parts, progress["updates"])
        return [self.step(number) for number in range(progress["step"], LAST_STEP)]


def main(folder: Path, strategy: str, precision: str, other: Path, cases: str) -> None:
    for case in cases.split(","):
        AcceleratorState._reset_state(
            reset_partial_state=True
        )  # which keeps the layers that FSDP gathers of the first model
        rank = Rank(case, run_of(case, strategy, precision), sharding.make_accelerator)
        result: dict[str, Any] = {"steps": rank.train(folder / case)}
        result["again"] = rank.go_on(folder / case)
        result["from other"] = rank.go_on(other / case)
        (folder / case / f"rank{rank.accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5])
