"""The visual tower of a CLIP model, as patch tokens."""

from __future__ import annotations

import logging
from pickle import UnpicklingError
from typing import Any

import open_clip
from safetensors import SafetensorError
from torch import nn

from hpc_mm.config import ConfigError, ImageSpec, Vision, unknown

logger = logging.getLogger(__name__)


def load_vision(vision: Vision) -> nn.Module:
    """An open_clip vision transformer that maps (N, 3, S, S) to (unused, (N, patches, width)) without the CLS token.

    What stands behind the chosen tokens (pooling, projection, ln_post, the last layer) is dropped, so that no parameter
    is without use.
    """
    tower = _random(vision) if vision.architecture else load_clip(vision.name, vision.pretrained).visual
    if not isinstance(tower, open_clip.transformer.VisionTransformer) or tower.attn_pool is not None:
        raise ConfigError(f"vision.name={vision.name!r} is no plain vision transformer of open_clip; ViT-L-14 is one")
    if tower.image_size[0] != tower.image_size[1]:
        raise ConfigError(f"vision.name={vision.name!r} takes images of {tower.image_size}; they must be square")
    tower.output_tokens = True
    tower.pool_type = "tok"  # split the CLS token from the patches
    tower.final_ln_after_pool = False  # ln_post, where it is kept, on every token (open_clip >= 2.23)
    tower.proj = None
    if vision.tokens != "after_ln_post":
        tower.ln_post = nn.Identity()
    if vision.tokens == "penultimate":
        tower.transformer.resblocks = tower.transformer.resblocks[:-1]
    return tower  # type: ignore[no-any-return]


def image_spec(tower: Any) -> ImageSpec:
    """Size, mean and standard deviation that the tower was trained with (OpenAI's CLIP values if it does not say)."""
    facts = getattr(tower, "preprocess_cfg", None) or {}
    mean = tuple(facts.get("mean") or open_clip.OPENAI_DATASET_MEAN)
    std = tuple(facts.get("std") or open_clip.OPENAI_DATASET_STD)
    return ImageSpec(tower.image_size[0], mean, std)


def _random(vision: Vision) -> Any:
    fields = {name for name in open_clip.CLIPVisionCfg.__dataclass_fields__ if not name.startswith("timm_")}
    for name in vision.architecture:
        if name not in fields:
            raise unknown("key in vision.architecture", name, fields)
    shape = open_clip.CLIPVisionCfg(**vision.architecture)
    if shape.width % shape.head_width:
        raise ConfigError(f"vision.architecture: width={shape.width} is no multiple of head_width={shape.head_width}")
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=8, width=8, heads=1, layers=1)  # made and dropped
    return open_clip.CLIP(embed_dim=shape.width, vision_cfg=shape, text_cfg=text).visual


def load_clip(name: str, pretrained: str) -> Any:
    """An open_clip model in fp32 on the CPU: with the weights of a tag or file, or random ones where it is empty.

    A folder or hub id as its name brings its own. Of a pickled file open_clip reads tensors alone. ConfigError where
    the model or its weights cannot be had.
    """
    quick, own = needs_quick_gelu(name, pretrained), ":" in name
    try:
        return open_clip.create_model(
            name,
            pretrained=None if own else pretrained or None,
            force_quick_gelu=quick,
            require_pretrained=own or bool(pretrained),
        )
    except (RuntimeError, ValueError, OSError, UnpicklingError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"open_clip model {name!r} with weights {pretrained!r}: {reason}") from None


def needs_quick_gelu(name: str, pretrained: str) -> bool:
    """Whether the weights' tag asks for QuickGELU: since 2.29 open_clip only warns when the model name does not say it.

    A model name that says QuickGELU for weights trained without is an error.
    """
    facts = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    wanted = bool(facts.get("quick_gelu", False))
    said = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False)) if ":" not in name else False
    if facts and said and not wanted:
        plain = name.replace("-quickgelu", "")
        raise ConfigError(
            f"open_clip model {name!r}: weights {pretrained!r} were trained without QuickGELU; use {plain!r}"
        )
    if wanted and not said:
        logger.warning("%s with weights %r runs with QuickGELU, as it was trained", name, pretrained)
    return wanted
