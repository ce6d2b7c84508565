"""Low-rank updates (LoRA) by peft: put into an encoder-decoder, and written as the folder that peft reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.lora import Linear
from safetensors.torch import save_file
from torch import Tensor, nn

from hpc_mm.config import Lora
from hpc_mm.models.weight_files import without_updates

UPDATE = ".lora_"  # in the name of every parameter of an update, and in no other
ADAPTER = ".default."  # peft's name for the only one


def with_updates(language: Any, lora: Lora) -> Any:
    """The language model with updates, zero at first, of every matrix of its layers; not of its tables and head."""
    leaves = {name.rpartition(".")[2] for name, part in language.named_modules() if isinstance(part, nn.Linear)}
    return inject_adapter_in_model(peft_config(lora, leaves), language)


def peft_config(lora: Lora, leaves: Iterable[str]) -> LoraConfig:
    """peft's values; ``leaves`` are the last names of the matrices with updates."""
    return LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # which is divided by r
        lora_dropout=lora.dropout,
        target_modules=sorted(leaves),
    )


def merged(language: nn.Module) -> dict[str, Tensor]:
    """The language model's weights without LoRA: updates are added to what they update."""
    state = {without_updates(name): value.detach() for name, value in language.named_parameters() if UPDATE not in name}
    for name, module in language.named_modules():
        if isinstance(module, Linear):
            state[f"{name}.weight"] = state[f"{name}.weight"] + module.get_delta_weight("default").detach()
    return state


def save_adapter(lora: Lora, base: str, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the updates among ``weights``, by their names in our model, as ``PeftModel.from_pretrained`` reads them.

    ``base`` is the name of the language model that they update; empty = it has none.
    """
    updates = {name: value for name, value in weights.items() if UPDATE in name}
    config = peft_config(lora, {name.partition(UPDATE)[0].rpartition(".")[2] for name in updates})
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    theirs = {
        f"base_model.model.{name.removeprefix('language.').replace(ADAPTER, '.')}": value.contiguous()
        for name, value in updates.items()
    }
    save_file(theirs, folder / "adapter_model.safetensors", metadata={"format": "pt"})
