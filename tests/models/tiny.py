"""Tiny language models of every family, a small tower, and a ragged batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WORDS = 60  # ids 0 to 59; the special tokens come behind
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt",
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.1,
    },
    "gpt_neox": {"model_type": "gpt_neox", "max_position_embeddings": 64, **SMALL},
    "llama": {"model_type": "llama", "max_position_embeddings": 64, **SMALL},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, **SMALL},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, **SMALL},
    "mpt": {
        "model_type": "mpt",
        "d_model": 32,
        "n_layers": 4,
        "n_heads": 4,
        "max_seq_len": 64,
        "vocab_size": 72,  # as MPT's own table, longer than its tokenizer
    },
    "mosaic_gpt": {"model_type": "mosaic_gpt", "d_model": 32, "n_layers": 4, "n_heads": 4, "vocab_size": 72},
}
TOWER = {"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
BATCH = tuple[Tensor, Tensor, Tensor, Tensor]


def open_gates(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5


def sharpen(model: torch.nn.Module) -> None:
    """Tiny random models are too close to uniform to tell tokens or images apart; larger matrices are not."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "vision" not in name and "perceiver" not in name and "resampler" not in name:
            parameter.data.mul_(4.0)


def ragged(left: bool, image_id: int = WORDS + 1) -> BATCH:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (4, 12), generator=generator)
    mask = torch.ones_like(ids)
    for row, place in ((0, 0), (0, 5), (1, 7), (3, 4)):
        ids[row, place] = image_id
    padding = slice(0, 3) if left else slice(9, 12)
    ids[3, padding], mask[3, padding] = WORDS + 2, 0
    return ids, mask, torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([2, 1, 0, 1])
