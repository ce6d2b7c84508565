"""A random CLIP as open_clip's folders have it."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from hpc_mm.similarity import Encoder

SIZE, WIDTH = 16, 24
TOWER = {"image_size": SIZE, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
CLIP = {"embed_dim": WIDTH, "vision_cfg": TOWER, "text_cfg": TEXT}


def write_clip(folder: Path, seed: int = 0, **preprocess: Any) -> Encoder:
    """A random CLIP as open_clip's folders have it."""
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = open_clip.CLIP(embed_dim=WIDTH, vision_cfg=dict(TOWER), text_cfg=dict(TEXT))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return Encoder(model=f"local-dir:{folder}")
