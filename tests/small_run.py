"""A run folder of a very small model, whose answers depend on images and texts."""

from pathlib import Path

import samples
import torch
from accelerate import Accelerator
from torch import nn

from hpc_mm import checkpoint, sharding
from hpc_mm.config import Run, with_overrides
from hpc_mm.models.flamingo import FlamingoModel, build, load_tokenizer
from hpc_mm.recipes.toy import toy

STEP = 7
ASKED = ["yes no blue Output : Question Short answer Answer is an image with written on it hateful ? What 0 1 2"]
SMALLER = {
    "model.vision.architecture": '{"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}',
    "model.language.architecture.hidden_size": "32",
    "model.language.architecture.intermediate_size": "64",
    "model.language.architecture.num_hidden_layers": "2",
    "model.language.architecture.tie_word_embeddings": "false",  # a tied one says its last input again
    "model.resampler_depth": "1",
    "model.resampler_latents": "4",
}


class Objective(nn.Module):
    """Holds the model as a training run's objective does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def write_run(folder: Path) -> Path:
    """The run's folder, with one checkpoint, at step 7, of weights that are not the first ones."""
    folder.mkdir(parents=True)
    samples.tokenizer([" ".join([*samples.WORDS, *ASKED])]).backend_tokenizer.save(str(folder / "tokenizer.json"))
    run: Run = with_overrides(
        toy(), {"name": "toy", "model.language.tokenizer": str(folder / "tokenizer.json"), **SMALLER}
    )
    (folder / "run.json").write_text(run.model_dump_json())
    save_checkpoint(folder, sharpened(build(run.model, load_tokenizer(run.model.language), seed=1234)))
    return folder


def save_checkpoint(folder: Path, model: nn.Module) -> None:
    """At STEP of the run, as training writes it."""
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    parts = (accelerator, *accelerator.prepare(Objective(model), optimizer))
    saver = checkpoint.Saver(accelerator, folder, keep=1)
    saver.start(sharding.own(*parts), {"step": STEP, "updates": STEP})
    saver.finish()


def sharpened(model: FlamingoModel) -> FlamingoModel:
    """With large matrices and open gates, so that texts and images matter."""
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(1.0)
        elif parameter.ndim > 1 and not name.startswith("vision"):
            parameter.data.mul_(12.0)
    return model
