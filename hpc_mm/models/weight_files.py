"""Files of weights from outside: safetensors, torch.save's without running code, and what ``hpc_mm.export`` wrote."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hpc_mm.config import ConfigError

BELOW_UPDATES = ".base_layer."  # peft's, in the name of a weight that LoRA's updates are put upon


class HasParts(Protocol):
    """A model whose parameters belong to named parts."""

    def part_of(self, name: str) -> str: ...


def without_updates(name: str) -> str:
    """The name that a parameter has where there is no LoRA."""
    return name.replace(BELOW_UPDATES, ".")


def places(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by name, those below LoRA's updates by the name that they have without, too."""
    named = dict(model.named_parameters())
    return {**{without_updates(name): value for name, value in named.items()}, **named}


def exported_files(folder: Path, name: str = "model.safetensors") -> list[Path]:
    """The files of weights in a folder: one of that name, or several with an index, as ``hpc_mm.export`` writes them.

    Empty where there is neither. ConfigError where one of several is missing.
    """
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return list(folder.glob(name))
    names = {Path(file).name for file in read_json(index).get("weight_map", {}).values()}
    files = [folder / name for name in sorted(names)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {len(missing)} of {len(files)} files of weights, such as {missing[0]}")
    return files


def load_exported(model: HasParts, ours: Mapping[str, Tensor], files: Sequence[Path], needed: Sequence[str]) -> None:
    """Copy the weights that ``hpc_mm.export`` wrote into ``ours``, the model's by name; others stay.

    ConfigError where one has no place there, and where there are none of a part that is ``needed``.
    """
    absent = {model.part_of(name) for name in ours} & set(needed)
    for file in files:
        for name, value in tensors(file):
            absent.discard(model.part_of(name))
            copy_into(ours, name, value, f"{file}: {name}")
    if absent:
        raise ConfigError(
            f"{files[0].parent}: no weights of {' and '.join(sorted(absent))}; its run did not train them"
        )


def copy_into(ours: Mapping[str, Tensor], name: str, value: Tensor, said: str) -> None:
    """Copy one weight. ConfigError, in which ``said`` names it, where the model has none of its name and shape."""
    if name not in ours or ours[name].shape != value.shape:
        found = f"of shape {tuple(ours[name].shape)}" if name in ours else "not there"
        raise ConfigError(f"{said} has shape {tuple(value.shape)}, in this model it is {found}")
    ours[name].data.copy_(value)


# ---------------------------------------------------------------- reading


def tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of one file, read one by one as they are used."""
    if file.suffix != ".safetensors":
        yield from state_in(pickled(file), f"{file} is no state dict").items()
        return
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  # it is no mapping
                yield name, content.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: {str(error).splitlines()[0]}") from None


def pickled(file: Path) -> Any:
    """What torch.save wrote, of tensors and plain values alone. ConfigError where it is anything else."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise ConfigError(f"checkpoint {file}: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise ConfigError(
            f"checkpoint {file} holds more than tensors and plain values; such a file could run code"
        ) from None
    except RuntimeError:  # no zip, a cut one, or one of something else
        raise ConfigError(f"checkpoint {file} is no whole file of torch.save (PyTorch 1.6 or later)") from None


def state_in(content: Any, otherwise: str) -> Mapping[str, Tensor]:
    """A mapping of tensors; ConfigError ``otherwise``."""
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(otherwise)
    return content


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds no JSON object")
    return found
