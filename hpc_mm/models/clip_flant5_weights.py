"""The formats that CLIP-FlanT5 is released in: reading them into our model, and writing them.

- ``mm_projector.bin``: ``mm_projector.{0,2}.{weight,bias}``, perhaps behind ``model.``, by torch.save
- a folder: config.json with model_type ``t5`` or ``clip_t5``, and ``pytorch_model.bin`` or ``model.safetensors``, or
  several files with an index, with ``mm_projector.*``, the T5 under transformers' own names, its table of tokens
  perhaps several times, and perhaps the tower as ``vision_tower.vision_tower.*`` under the names of transformers' CLIP
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from hpc_mm.config import ConfigError
from hpc_mm.models.lora import UPDATE, merged
from hpc_mm.models.weight_files import (
    copy_into,
    exported_files,
    load_exported,
    pickled,
    places,
    read_json,
    state_in,
    tensors,
    without_updates,
)

if TYPE_CHECKING:
    from hpc_mm.models.clip_flant5 import ClipFlanT5Model

PROJECTOR_FILE = "mm_projector.bin"
PICKLED = "pytorch_model.bin"
PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(.+)")
TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)")
TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "embed_tokens.weight")  # are shared.weight
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in old T5s
OF_CLIP = {  # transformers' names -> open_clip's
    r"embeddings\.class_embedding": "class_embedding",
    r"embeddings\.patch_embedding": "conv1",
    r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"pre_layrnorm": "ln_pre",
    r"post_layernorm": "ln_post",
    r"encoder\.layers\.(\d+)": r"transformer.resblocks.\1",
    r"self_attn\.out_proj": "attn.out_proj",
    r"layer_norm([12])": r"ln_\1",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
}


# ---------------------------------------------------------------- reading


def load_weights(model: ClipFlanT5Model, weights: str) -> None:
    """Copy ``weights`` into ``model``: an mm_projector.bin, a released folder, or what ``hpc_mm.export`` wrote.

    Of a path alone; it is never a hub's name. A ConfigError names the first thing that is missing, unknown or of
    another shape.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        load_projector(model, path)
    elif (path / "run.json").is_file() and (exported := exported_files(path)):
        load_exported(model, places(model), exported, ("projector",))
    elif (path / "config.json").is_file():
        load_released(model, path)
    else:
        raise ConfigError(
            f"weights={weights!r}: must be a file mm_projector.bin, a released folder with a config.json, or what "
            "hpc_mm.export wrote; there is none"
        )


def load_projector(model: ClipFlanT5Model, file: Path) -> None:
    """Copy the projector from an mm_projector.bin."""
    state = state_in(pickled(file), f"{file} is no state dict of a projector")
    ours, found = dict(model.projector.named_parameters()), set()
    for key, value in state.items():
        name = PROJECTOR.fullmatch(key)
        if not name:
            raise ConfigError(f"{file}: {key} is none of a projector, which are mm_projector.*")
        copy_into(ours, name[1], value, f"{file}: {key}")
        found.add(name[1])
    _complete(file, set(ours) - found)


def load_released(model: ClipFlanT5Model, folder: Path) -> None:
    """Copy the projector and the T5 from a released folder, and the tower where it is there.

    Files are read one after another. A folder of stage 1 holds the projector alone.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("t5", "clip_t5"):
        raise ConfigError(f"{folder}: config.json has model_type={kind!r}; it must be t5 or clip_t5")
    files = exported_files(folder) or exported_files(folder, PICKLED)
    if not files and (folder / PROJECTOR_FILE).is_file():
        return load_projector(model, folder / PROJECTOR_FILE)
    ours = _placed(model)
    tower: dict[str, Tensor] = {}
    found: set[str] = set()
    for file in files:
        for key, value in tensors(file):
            if part := TOWER.fullmatch(key):
                tower[part[1]] = value
            elif key != UNUSED:
                _take(ours, found, _name(model, key), value, f"{file}: {key}")
    _complete(folder, {name for name in ours if not name.startswith("vision.")} - found)
    if tower:
        _load_tower(model, tower, folder)
    return None


def _placed(model: ClipFlanT5Model) -> dict[str, Tensor]:
    """The parameters by the names that they have without LoRA, but its updates."""
    return {without_updates(name): value for name, value in model.named_parameters() if UPDATE not in name}


def _name(model: ClipFlanT5Model, key: str) -> str:
    if part := PROJECTOR.fullmatch(key):
        return f"projector.{part[1]}"
    tied = key == "lm_head.weight" and model.language.config.scale_decoder_outputs
    return "language.shared.weight" if key in TABLES or tied else f"language.{key}"


def _take(ours: Mapping[str, Tensor], found: set[str], name: str, value: Tensor, said: str) -> None:
    """Copy one weight, or, of a table that came already, see that it is the same."""
    if name not in found or ours[name].shape != value.shape:
        copy_into(ours, name, value, said)
        found.add(name)
    elif not torch.equal(ours[name], value.to(ours[name].dtype)):
        raise ConfigError(f"{said} differs from another copy of the same table")


def _load_tower(model: ClipFlanT5Model, tower: Mapping[str, Tensor], folder: Path) -> None:
    """Copy the tower; its last layer and norm may be there though ours ends before them."""
    ours = dict(model.vision.named_parameters())
    found = open_clip_names(tower)
    dropped = ("ln_post.", f"transformer.resblocks.{len(model.vision.transformer.resblocks)}.")
    for name, value in found.items():
        if name in ours or not name.startswith(dropped):
            copy_into(ours, name, value, f"{folder}: the tower's {name}")
    _complete(folder, {f"vision.{name}" for name in set(ours) - set(found)})


def open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' CLIPVisionModel, without ``vision_model.``, under open_clip's names."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("position_ids"):  # a count, in old files
            continue
        name = key
        for theirs, ours in OF_CLIP.items():
            name = re.sub(theirs, ours, name)
        if ".self_attn.q_proj." in name:
            three = [state.get(key.replace(".q_proj.", f".{one}_proj.")) for one in "qkv"]
            if all(one is not None for one in three):
                found[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(three)  # type: ignore[arg-type]
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            found[name] = value
    return found


def _complete(where: Path, missing: set[str]) -> None:
    if missing:
        raise ConfigError(f"{where} lacks {len(missing)} weights of this model, such as {min(missing)}")


# ---------------------------------------------------------------- writing


def save_projector(model: ClipFlanT5Model, file: Path, precision: torch.dtype = torch.float32) -> None:
    """Write an mm_projector.bin."""
    torch.save(_projector(model, precision), file)


def save_released(model: ClipFlanT5Model, folder: Path, precision: torch.dtype = torch.float32) -> None:
    """Write a released folder, without the tower, which its config.json names. LoRA's updates are merged."""
    state = _projector(model, precision)
    state.update({name: value.to(precision) for name, value in merged(model.language).items()})
    tied = model.language.config.scale_decoder_outputs
    state.update(dict.fromkeys((*TABLES, "lm_head.weight") if tied else TABLES, state["shared.weight"]))
    save_torch_state_dict(state, folder, filename_pattern="pytorch_model{suffix}.bin", safe_serialization=False)
    (folder / "config.json").write_text(json.dumps(released_config(model), indent=2))


def _projector(model: ClipFlanT5Model, precision: torch.dtype) -> dict[str, Tensor]:
    named = model.projector.named_parameters()
    return {f"mm_projector.{name}": value.detach().to(precision) for name, value in named}


def released_config(model: ClipFlanT5Model) -> dict[str, Any]:
    """The values of config.json that make a ``clip_t5``."""
    vision = model.config.vision
    of_openai = vision.name.startswith("ViT-L-14-336") and vision.pretrained == "openai"
    return {
        **model.language.config.to_dict(),
        "architectures": ["CLIPT5ForConditionalGeneration"],
        "model_type": "clip_t5",
        "tie_word_embeddings": model.language.config.scale_decoder_outputs,
        "vocab_size": len(model.language.shared.weight),
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": model.projector[0].in_features,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336" if of_openai else vision.name,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if model.config.square == "pad" else "square",
    }
