"""Save, find, verify and load the newest whole checkpoint.

A checkpoint is a folder ``checkpoints/step-00000100`` of the run folder:

- ``weights.safetensors``: every trainable parameter by its name in the model, fp32 masters
- ``state/``: the optimizer's state, as accelerate and DeepSpeed write it
- ``progress.json``: the step and the counters that go on with it
- ``manifest.json``: size and digest of every file above, written last

It is written aside as ``step-00000100.partial``, verified, and moved into place, so that a folder without ``.partial``
in its name was whole once; digests tell whether it still is. Finding one needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
PROGRESS = "progress.json"
PARTIAL = ".partial"

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- finding


def path_of(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def finished(run_folder: Path) -> list[Path]:
    """Checkpoints that were marked whole, oldest first."""
    return sorted(path.parent for path in run_folder.glob(f"checkpoints/step-*/{MANIFEST}") if not _partial(path))


def _partial(manifest: Path) -> bool:
    return manifest.parent.name.endswith(PARTIAL)


def newest(run_folder: Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; damaged ones are named and passed over."""
    for checkpoint in reversed(finished(run_folder)):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("checkpoint %s is damaged (%s); using the one before it", checkpoint, problem)
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a missing, cut or changed file; None if nothing is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    for name, expected in manifest.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if digest(file) != expected["blake2b"]:
            return f"{name} has other bytes than were written"
    return None


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def read_progress(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / PROGRESS).read_text())  # type: ignore[no-any-return]


# ---------------------------------------------------------------- saving


def save(accelerator: Accelerator, model: nn.Module, run_folder: Path, progress: dict[str, Any], keep: int) -> Path:
    """Save on all ranks together; the folder appears under its name only when it is whole.

    ``model`` is what ``accelerator.prepare`` returned for the objective; ``progress["step"]`` names the checkpoint.
    """
    final = path_of(run_folder, progress["step"])
    partial = final.with_name(final.name + PARTIAL)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    _save_weights(accelerator, model, partial)
    _save_state(accelerator, partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / PROGRESS).write_text(json.dumps(progress))
        _publish(partial, final)
        _prune(run_folder, keep)
    accelerator.wait_for_everyone()
    return final


def _save_weights(accelerator: Accelerator, model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    weights: dict[str, Tensor] = {}
    for name, parameter in accelerator.unwrap_model(model).model.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = _master(accelerator, parameter)
        if accelerator.is_main_process:
            weights[name] = whole.detach().float().to("cpu", copy=True).contiguous()
    if accelerator.is_main_process:
        save_file(weights, folder / WEIGHTS)


def _master(accelerator: Accelerator, parameter: Tensor) -> Tensor:
    """The whole fp32 parameter, from however many ranks hold it. A collective: every rank calls it."""
    if accelerator.distributed_type == "DEEPSPEED":
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)  # type: ignore[no-any-return]
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _save_state(accelerator: Accelerator, folder: Path) -> None:
    options = {"exclude_frozen_parameters": True} if accelerator.distributed_type == "DEEPSPEED" else {}
    with _without_models(accelerator):
        accelerator.save_state(str(folder / "state"), **options)


@contextlib.contextmanager
def _without_models(accelerator: Accelerator) -> Any:
    """Keep whole models out of accelerate's state where ours are not split: the weights file has what learns."""
    if accelerator.distributed_type in ("DEEPSPEED", "FSDP"):
        yield
        return
    hooks = (
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear()),
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear()),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _publish(partial: Path, final: Path) -> None:
    """Flush, digest, mark, move. The manifest is the mark."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {}
    for file in files:
        _flush(file)
        manifest[str(file.relative_to(partial))] = {"bytes": file.stat().st_size, "blake2b": digest(file)}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _flush(partial / MANIFEST)
    shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
    partial.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(run_folder: Path, keep: int) -> None:
    """Remove all but the newest, and what a killed process left of older ones."""
    kept = finished(run_folder)[-keep:]
    for old in run_folder.glob("checkpoints/step-*"):
        if old.name < kept[-1].name and old not in kept:
            (old / MANIFEST).unlink(missing_ok=True)  # no longer a checkpoint, whatever happens next
            shutil.rmtree(old)


# ---------------------------------------------------------------- loading


def resume(accelerator: Accelerator, model: nn.Module, run_folder: Path) -> dict[str, Any] | None:
    """Put every rank where the newest whole checkpoint stands; its progress, or None where there is none."""
    from accelerate.utils import broadcast_object_list

    found: list[Path | None] = [newest(run_folder) if accelerator.is_main_process else None]
    checkpoint = broadcast_object_list(found)[0]
    if checkpoint is None:
        return None
    options = {"load_module_strict": False} if accelerator.distributed_type == "DEEPSPEED" else {}
    with _without_models(accelerator):
        accelerator.load_state(str(checkpoint / "state"), **options)
    if accelerator.distributed_type not in ("DEEPSPEED", "FSDP"):
        load_weights(accelerator.unwrap_model(model).model, checkpoint)
    return read_progress(checkpoint)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copy the trainable parameters of ``checkpoint`` into ``model``. Names and shapes must agree exactly."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(checkpoint / WEIGHTS)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise ValueError(f"{checkpoint} is of another model: {len(odd)} names differ, such as {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                shapes = f"{tuple(weights[name].shape)}, not {tuple(parameter.shape)}"
                raise ValueError(f"{checkpoint}: {name} has shape {shapes}")
            parameter.copy_(weights[name])
