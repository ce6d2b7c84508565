"""How a run is split: the one module that tells ddp, DeepSpeed's ZeRO and FSDP apart."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from hpc_mm.config import ConfigError, Run

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # a rank that waits longer for the others ends, and with it the attempt
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of every parameter
KINDS = ("weight", *MOMENTS)


def make_accelerator(run: Run) -> Any:
    """accelerate with this run's values; the launch command has said how to split the model."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    cpu = run.gpus_per_node == 0
    handlers: list[Any] = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=COLLECTIVE_TIMEOUT),
    ]
    if cpu:  # not Accelerator(cpu=True), which turns DeepSpeed off without a word
        _without_shared_memory_op()
    accelerator = Accelerator(gradient_accumulation_steps=run.train.accumulate, kwargs_handlers=handlers)
    if accelerator.num_processes != run.world_size:
        raise ConfigError(f"{accelerator.num_processes} processes were started, but the run wants {run.world_size}")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _prepare_fsdp(accelerator, run)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=1,  # DeepSpeed only multiplies it; our loss is divided by its own targets
            gradient_accumulation_steps=run.train.accumulate,
            gradient_clipping=run.train.clip,
        )
        if run.precision == "bf16":
            plugin.deepspeed_config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return accelerator


def _without_shared_memory_op() -> None:
    """On CPU, let DeepSpeed use gloo alone.

    Its own shared-memory reduction is compiled at the first use, for a minute or more, and a build that is killed
    leaves a lock on which every later run waits for ever.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _prepare_fsdp(accelerator: Any, run: Run) -> None:
    """FSDP on CPU too, where accelerate takes ddp without a word; in bf16 runs losses and reductions stay fp32."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = accelerator.state
    if accelerator.num_processes > 1 and state.distributed_type != DistributedType.FSDP:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP  # accelerate reads it from both
    if run.precision == "bf16" and state.distributed_type == DistributedType.FSDP:
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


def update(accelerator: Any, objective: Any, optimizer: Any, clip: float) -> float:
    """Clip (0 = do not) and step, where DeepSpeed has not done both inside backward already; the global gradient norm.

    A norm that is not finite is told as inf or nan, on all ranks alike, and no weight is changed.
    """
    if accelerator.distributed_type == "DEEPSPEED":
        norm = float(objective.get_global_grad_norm())
        return math.inf if accelerator.optimizer_step_was_skipped or norm < 0 else norm  # -1 is its NaN
    norm = float(accelerator.clip_grad_norm_(objective.parameters(), clip or math.inf))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ---------------------------------------------------------------- what this rank keeps of weights and moments


@dataclass(frozen=True)
class Fragment:
    """A run of a parameter's elements, flat, in fp32, with Adam's moments: views, so that writing changes the state."""

    name: str  # of the parameter in the model
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # place of the run in the flat parameter
    tensors: dict[str, Tensor]  # kind -> (n,)

    def __len__(self) -> int:
        return len(self.tensors["weight"])

    def part(self, index: int, parts: int) -> Fragment:
        """The ``index``-th of ``parts`` runs that make up this one; lengths differ by at most one."""
        first, last = len(self) * index // parts, len(self) * (index + 1) // parts
        cut = {kind: tensor[first:last] for kind, tensor in self.tensors.items()}
        return Fragment(self.name, self.shape, self.start + first, cut)


def held(accelerator: Any, objective: Any, optimizer: Any) -> list[Fragment]:
    """Everything that this rank keeps of trainable parameters; the other ranks' fragments complete it."""
    model = accelerator.unwrap_model(objective).model
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if accelerator.distributed_type == "DEEPSPEED":
        zero = objective.optimizer
        flats = _flat_groups(zero)
        for flat in flats:
            _make_moments(zero.optimizer, flat)
        stage3 = hasattr(learning[0][1], "ds_id")
        find = _stage3_fragment if stage3 else _stage12_fragment
        found = (find(zero, flats, name, parameter) for name, parameter in learning)
    else:
        found = (_torch_fragment(optimizer.optimizer, name, parameter) for name, parameter in learning)
    return [fragment for fragment in found if fragment is not None and len(fragment)]


def own(accelerator: Any, objective: Any, optimizer: Any) -> list[Fragment]:
    """What this rank saves: every element is in exactly one rank's list. Under ddp, where all hold all, a share."""
    fragments = held(accelerator, objective, optimizer)
    if accelerator.distributed_type in ("DEEPSPEED", "FSDP"):
        return fragments
    shares = (fragment.part(accelerator.process_index, accelerator.num_processes) for fragment in fragments)
    return [fragment for fragment in shares if len(fragment)]


@torch.no_grad()
def restored(accelerator: Any, objective: Any, optimizer: Any, updates: int) -> None:
    """After ``held`` was written to: set Adam's count of updates, and what is derived from the fp32 weights."""
    if accelerator.distributed_type != "DEEPSPEED":
        _set_updates(optimizer.optimizer, updates)
        return
    zero = objective.optimizer
    _set_updates(zero.optimizer, updates)
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()  # parameters that every rank keeps whole are gathered anew by the epilogue
    flats = _flat_groups(zero)
    for parameter in zero.module.parameters():
        if parameter.requires_grad:
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            parameter.ds_tensor.data.copy_(flats[group].narrow(0, offset, length))
    zero.checkpoint_event_epilogue()


def _flat_groups(zero: Any) -> list[Tensor]:
    """This rank's fp32 partition of every parameter group, as stage 3, stages 1 and 2, and bf16's optimizer call it."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    raise TypeError(f"DeepSpeed's {type(zero).__name__} keeps no fp32 partitions: only ZeRO-1, -2 and -3 are supported")


def _stage12_fragment(zero: Any, flats: list[Tensor], name: str, parameter: Any) -> Fragment | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # all of it lies on other ranks
        return None
    flat, address = flats[mapping.param_group_index], mapping.hp_fragment_address
    tensors = _of_flat(zero, flat, address.start, address.numel)
    return Fragment(name, tuple(parameter.shape), mapping.lp_fragment_address.start, tensors)


def _stage3_fragment(zero: Any, flats: list[Tensor], name: str, parameter: Any) -> Fragment | None:
    """Ranks keep equal runs; the last ones end in padding."""
    group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
    start = length * zero._get_param_partition_rank(parameter)
    filled = min(length, parameter.ds_numel - start)
    if filled <= 0:
        return None
    return Fragment(name, tuple(parameter.ds_shape), start, _of_flat(zero, flats[group], offset, filled))


def _of_flat(zero: Any, flat: Tensor, offset: int, length: int) -> dict[str, Tensor]:
    whole = {"weight": flat.data, **{kind: zero.optimizer.state[flat][kind] for kind in MOMENTS}}
    return {kind: tensor.narrow(0, offset, length) for kind, tensor in whole.items()}


def _torch_fragment(optimizer: Any, name: str, parameter: Any) -> Fragment:
    """The whole parameter, or under FSDP the rows that this rank keeps."""
    _make_moments(optimizer, parameter)
    tensors = {"weight": parameter.data, **{kind: optimizer.state[parameter][kind] for kind in MOMENTS}}
    start = 0
    if hasattr(parameter, "to_local"):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = parameter.device_mesh, parameter.placements
        _, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        start = offset[0] * math.prod(parameter.shape[1:]) if offset else 0
        tensors = {kind: tensor.to_local() for kind, tensor in tensors.items()}
    return Fragment(name, tuple(parameter.shape), start, {kind: tensor.view(-1) for kind, tensor in tensors.items()})


def _make_moments(optimizer: Any, parameter: Tensor) -> None:
    """Adam's state, which it makes at its first update only. A fused one has its count on the device."""
    if optimizer.state[parameter]:
        return
    moments = {kind: torch.zeros_like(parameter.data) for kind in MOMENTS}
    step: Any = 0
    if isinstance(optimizer, torch.optim.AdamW):
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        step = torch.zeros((), device=parameter.device if on_device else "cpu")
    optimizer.state[parameter].update(step=step, **moments)


def _set_updates(optimizer: Any, updates: int) -> None:
    for state in optimizer.state.values():
        if isinstance(state["step"], Tensor):
            state["step"].fill_(updates)
        else:
            state["step"] = updates
