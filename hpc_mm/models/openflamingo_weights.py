"""The format of OpenFlamingo's released checkpoint.pt: reading it into our model, and writing it.

Its keys (github.com/mlfoundations/open_flamingo, versions 1 and 2), any of them with ``module.`` inside:

- ``perceiver.*``: our ``resampler.*``
- ``lang_encoder.LAYERS.I.gated_cross_attn_layer.*`` (2) or ``lang_encoder.gated_cross_attn_layers.I.*`` (1)
- ``lang_encoder.EMBEDDING.weight``: the table up to the tokenizer's length and, behind it, ``<|endofchunk|>``,
  ``<image>`` and perhaps ``<PAD>``; the head's, where it is not tied, may stand beside it
- ``lang_encoder.old_decoder_blocks.*``: copies of the frozen layers; ``vision_encoder.*``: the frozen tower
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hpc_mm.config import ConfigError
from hpc_mm.models.weight_files import pickled, state_in

if TYPE_CHECKING:
    from hpc_mm.models.flamingo import FlamingoModel

GATED = re.compile(r"lang_encoder\.(?:.*\.)?(?:gated_cross_attn_layers\.(\d+)|(\d+)\.gated_cross_attn_layer)\.(.+)")
LEARNT = ("resampler", "cross_attention")  # what every checkpoint must hold whole

logger = logging.getLogger(__name__)


def load_openflamingo(model: FlamingoModel, source: str | Path | Mapping[str, Tensor]) -> None:
    """Copy a checkpoint (a file, the folder of a checkpoint.pt, or a state dict) into ``model``, of the same shape.

    The resampler and all cross-attention must be there; the token tables and frozen parts are taken where they are.
    A ConfigError names the first thing that is missing, unknown or of another shape.
    """
    state = source if isinstance(source, Mapping) else _read(Path(source))
    ours = model.state_dict()
    found, ignored = _translated(model, {_plain(key): value for key, value in state.items()}, ours)
    missing = [key for key, _ in model.named_parameters() if model.part_of(key) in LEARNT and key not in found]
    if missing:
        raise ConfigError(
            f"checkpoint lacks {len(missing)} weights of this model, such as {missing[0]}; "
            "do cross_attn_every_n_layers, resampler_depth and the language model match?"
        )
    for key, value in found.items():
        if value.shape != ours[key].shape:
            raise ConfigError(
                f"checkpoint's {key} has shape {tuple(value.shape)}, this model's has {tuple(ours[key].shape)}"
            )
    model.load_state_dict(found, strict=False)
    if ignored:
        logger.info("%d weights of the checkpoint have no use here, such as %s", len(ignored), ignored[0])


def openflamingo_state(model: FlamingoModel) -> dict[str, Tensor]:
    """The model's learnt parts as OpenFlamingo saves them; new token rows are merged into the tables."""
    state = {}
    for key, value in model.state_dict().items():
        part = model.part_of(key)
        if part in LEARNT:
            prefix, ours = ("perceiver.", "resampler.") if part == "resampler" else ("lang_encoder.", "language.")
            state[prefix + key.removeprefix(ours)] = value
    for name, module in _tables(model).items():
        rows = _base_rows(model, module)
        base = getattr(module, "base", module).weight.detach()[:rows]
        new = getattr(module, "new_rows", None)
        state[f"lang_encoder.{name}.weight"] = base if new is None else torch.cat([base, new.detach()])
    return state


def _read(path: Path) -> Mapping[str, Tensor]:
    path = path.expanduser()
    if path.is_dir():
        path /= "checkpoint.pt"
    content = pickled(path)
    state = content.get("model_state_dict", content) if isinstance(content, Mapping) else None
    return state_in(state, f"checkpoint {path} is no state dict of OpenFlamingo")


def _plain(key: str) -> str:
    return re.sub(r"(^|\.)module\.", r"\1", key)


def _translated(
    model: FlamingoModel, state: Mapping[str, Tensor], ours: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The state under our names, and the keys that have no place in our model."""
    tables = _tables(model)
    found: dict[str, Tensor] = {}
    ignored = []
    for key, value in state.items():
        name = _renamed(model, key)
        table = name.removeprefix("language.").removesuffix(".weight")
        if table in tables:
            found.update(_split(model, table, value))
        elif name in ours:
            found[name] = value
        elif model.part_of(name) in LEARNT:
            raise ConfigError(f"checkpoint's {key} has no place in this model, whose shape differs")
        else:
            ignored.append(key)
    return found, ignored


def _renamed(model: FlamingoModel, key: str) -> str:
    gated = GATED.fullmatch(key)
    if gated:
        number = gated[1] or gated[2]
        return f"language.{model.layers_name}.{number}.gated_cross_attn_layer.{gated[3]}"
    key = re.sub(r"^lang_encoder\.embed_out\.", "lang_encoder.lm_head.", key)  # GPT-NeoX's head before transformers 5
    for theirs, prefix in (
        ("perceiver.", "resampler."),
        ("lang_encoder.", "language."),
        ("vision_encoder.", "vision."),
    ):
        if key.startswith(theirs):
            return prefix + key.removeprefix(theirs)
    return key


def _tables(model: FlamingoModel) -> dict[str, Any]:
    """The modules that hold token rows, by their name in the language model: the embedding, and a head of its own."""
    embedding, head = model.language.get_input_embeddings(), model.language.get_output_embeddings()
    tied = head.base.weight is getattr(embedding, "base", embedding).weight
    wanted = (embedding,) if tied else (embedding, head)
    return {name: module for name, module in model.language.named_modules() if any(module is one for one in wanted)}


def _base_rows(model: FlamingoModel, module: Any) -> int:
    new = getattr(module, "new_rows", None)
    return model.vocabulary - (0 if new is None else len(new))


def _split(model: FlamingoModel, name: str, merged: Tensor) -> dict[str, Tensor]:
    """A merged table as our two parameters; rows of the base table that no token uses stay as they are."""
    module = _tables(model)[name]
    if len(merged) != model.vocabulary:
        raise ConfigError(
            f"checkpoint's {name} has {len(merged)} token rows, this model's tokenizer {model.vocabulary}"
        )
    rows = _base_rows(model, module)
    base = getattr(module, "base", module)
    prefix = f"language.{name}" if base is module else f"language.{name}.base"
    unused = base.weight.detach()[rows:]
    split = {f"{prefix}.weight": torch.cat([merged[:rows].to(unused), unused])}
    if getattr(module, "new_rows", None) is not None:
        split[f"language.{name}.new_rows"] = merged[rows:]
    return split
