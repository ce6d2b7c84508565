"""CLIP-FlanT5-XXL, second stage: as XL's, with its published values, which are the same (arXiv 2404.01291; 8 GPUs)."""

from hpc_mm.config import Run, with_overrides
from hpc_mm.recipes.clip_flant5_xl_stage2 import clip_flant5_xl_stage2


def clip_flant5_xxl_stage2() -> Run:
    values = {"name": "clip_flant5_xxl_stage2", "start": "clip_flant5_xxl_stage1"}
    values["model.language.name"] = "google/flan-t5-xxl"
    return with_overrides(clip_flant5_xl_stage2(), values)  # type: ignore[no-any-return]
