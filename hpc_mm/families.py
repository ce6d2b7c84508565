"""What training asks of each model family: its tokenizer, the model, what is minimised, and what sharding gathers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from hpc_mm import checkpoint
from hpc_mm.config import ConfigError, ImageSpec, Run
from hpc_mm.models.weight_files import places


class Model(Protocol):
    """A model as training sees it: a module that knows its pictures, its decayed weights and its work."""

    image_spec: ImageSpec

    def decays(self, name: str, parameter: Tensor) -> bool: ...
    def training_flops(self, tokens: int, pairs: int, images: int, targets: int) -> float: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class Family(NamedTuple):
    load_tokenizer: Callable[[Any], Any]  # of the configuration's language part
    build: Callable[..., Any]  # (configuration, tokenizer, seed, precision) -> the model on the CPU
    loss: Callable[[Any, Any], Tensor]  # (model, batch) -> sum of the batch's losses, to be divided by its targets
    layers: tuple[str, ...]  # classes that FSDP gathers one at a time


def flamingo() -> Family:
    from hpc_mm.models.flamingo import build, load_tokenizer
    from hpc_mm.objectives.next_token import next_token

    return Family(load_tokenizer, build, next_token, ("ConditionedLayer",))


def clip_flant5() -> Family:
    from hpc_mm.models.clip_flant5 import build, load_tokenizer
    from hpc_mm.objectives.answer import answer

    return Family(load_tokenizer, build, answer, ("T5Block",))


FAMILIES: Mapping[str, Callable[[], Family]] = {"flamingo": flamingo, "clip_flant5": clip_flant5}


def family_of(run: Run) -> Family:
    return FAMILIES[run.model.family]()


def initial(run: Run, family: Family, tokenizer: Any) -> Any:
    """The model as the run begins: as built, with the weights that ``run.start`` has trained copied over."""
    model = family.build(run.model, tokenizer, run.train.seed, run.precision)
    if run.start:
        begin_with(model, Path(run.start))
    return model


def begin_with(model: nn.Module, start: Path) -> None:
    """Copy all that a checkpoint of another run has trained. ConfigError where this model has no place for it."""
    try:
        problem = checkpoint.damage(start, digests=False)
        weights = {} if problem else checkpoint.read_weights(start)
    except (checkpoint.DamagedCheckpoint, OSError) as error:
        problem = str(error)
    if problem:
        raise ConfigError(f"start={start}: {problem}")
    parameters = places(model)
    for name, value in weights.items():
        if name not in parameters or parameters[name].shape != value.shape:
            found = f"shape {tuple(parameters[name].shape)}" if name in parameters else "no such parameter"
            raise ConfigError(f"start={start}: {name} has shape {tuple(value.shape)} there; this model has {found}")
        parameters[name].data.copy_(value)
