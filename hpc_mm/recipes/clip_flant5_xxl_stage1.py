"""CLIP-FlanT5-XXL, first stage: as XL's, with its published values, which are the same (arXiv 2404.01291; 8 GPUs)."""

from hpc_mm.config import Run, with_overrides
from hpc_mm.recipes.clip_flant5_xl_stage1 import clip_flant5_xl_stage1


def clip_flant5_xxl_stage1() -> Run:
    values = {"name": "clip_flant5_xxl_stage1", "model.language.name": "google/flan-t5-xxl"}
    return with_overrides(clip_flant5_xl_stage1(), values)  # type: ignore[no-any-return]
