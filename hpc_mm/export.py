"""``python -m hpc_mm.export run=runs/toy out=FOLDER``: a checkpoint's trained weights as one safetensors folder.

The folder holds ``model.safetensors`` (in several files with an index above 5 GB) with every trained parameter by its
name in the model, ``run.json``, and the run's tokenizer where it has one of its own; of a run with LoRA also
``adapter``, the folder that ``peft.PeftModel.from_pretrained`` puts upon the language model. Frozen weights are those
of the models that run.json names; of a run with ``model.weights`` they are in the file too. ``model.weights=FOLDER``
starts another run from it.

``form=released`` writes a CLIP-FlanT5 as the folder that upstream's loader reads, ``form=projector`` its projector
alone, as ``mm_projector.bin`` in the folder; ``model.weights`` starts from both, from the latter by the file.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hpc_mm import checkpoint
from hpc_mm.answerer import Weights, trained
from hpc_mm.config import ClipFlanT5, ConfigError, Part, parse_arguments, read_run, with_overrides

if TYPE_CHECKING:
    from torch import Tensor


class Export(Part):
    run: str = Field("", description="folder of the run")
    out: str = Field("", description="folder to write; it must not exist")
    step: str = Field("latest", description="step of a checkpoint, or latest")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the weights in the file")
    form: Literal["ours", "released", "projector"] = Field(
        "ours", description="ours, or of clip_flant5: upstream's folder, or its mm_projector.bin"
    )


def export(options: Export) -> Path:
    """Write the folder, whole or not at all; the checkpoint that it was made from."""
    folder, out = Path(options.run), Path(options.out)
    run = read_run(folder)
    if options.form != "ours" and not isinstance(run.model, ClipFlanT5):
        raise ConfigError(f"form={options.form} is of model.family=clip_flant5; {folder} is of {run.model.family}")
    if out.exists():
        raise ConfigError(f"out={options.out}: it exists; name a folder that does not")
    found = checkpoint.chosen(folder, options.step)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        weights = Weights(run, folder, str(checkpoint.step_of(found)))
        if options.form == "ours":
            write_ours(options, weights, aside)
        else:
            write_upstreams(options, weights, aside)
        if (folder / "tokenizer.json").exists():
            shutil.copy2(folder / "tokenizer.json", aside)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return found


def weights_of(found: Weights) -> dict[str, Tensor]:
    """What the checkpoint holds, over what the run began with; all weights where ``model.weights`` gave others."""
    assert found.checkpoint is not None
    if found.run.model.weights and not found.run.model.holds_what_it_began_with:
        model, _ = trained(found, "fp32")
        return {name: value.detach() for name, value in model.named_parameters()}
    began = checkpoint.read_weights(Path(found.run.start)) if found.run.start else {}
    return {**began, **checkpoint.read_weights(found.checkpoint)}


def write_ours(options: Export, found: Weights, folder: Path) -> None:
    """The weights, run.json, and LoRA's updates."""
    import torch
    from huggingface_hub import save_torch_state_dict

    run, weights = found.run, weights_of(found)
    if options.precision == "bf16":
        weights = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    save_torch_state_dict(weights, folder)
    (folder / "run.json").write_text(run.model_dump_json(indent=2))
    if isinstance(run.model, ClipFlanT5) and run.model.lora.rank:
        from hpc_mm.models.lora import UPDATE, save_adapter

        below = any(name.startswith("language.") and UPDATE not in name for name in weights)
        save_adapter(run.model.lora, "" if below else run.model.language.name, weights, folder / "adapter")


def write_upstreams(options: Export, weights: Weights, folder: Path) -> None:
    """A CLIP-FlanT5 as it is released, or its projector, frozen weights too."""
    import torch

    from hpc_mm.models.clip_flant5_weights import PROJECTOR_FILE, save_projector, save_released

    model, _ = trained(weights, "fp32")
    precision = torch.bfloat16 if options.precision == "bf16" else torch.float32
    if options.form == "released":
        save_released(model, folder, precision)
    else:
        save_projector(model, folder / PROJECTOR_FILE, precision)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, or 2 for a user's mistake, told in one line on stderr."""
    try:
        options: Export = with_overrides(Export(), parse_arguments(arguments))
        for key in ("run", "out"):
            if not getattr(options, key):
                raise ConfigError(f"{key}=FOLDER is missing: {Export.model_fields[key].description}")
        found = export(options)
    except (ConfigError, checkpoint.DamagedCheckpoint, OSError) as error:
        print(f"hpc_mm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{found} -> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
