"""The formats that CLIP-FlanT5 is released in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpc_mm.models.parts import exported_files, load_exported

if TYPE_CHECKING:
    from hpc_mm.models.clip_flant5 import ClipFlanT5Model


def load_weights(model: ClipFlanT5Model, weights: str) -> None:
    folder = Path(weights).expanduser()
    load_exported(model, dict(model.named_parameters()), exported_files(folder), ("projector",))
