"""Rows that hold several samples, one behind the other: each token sees its own sample alone.

``segments`` (B, T) says which sample of its row a token belongs to, 0, 1, ..., and -1 on the padding behind them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpc_mm.config import ConfigError

BY_POSITION = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")  # transformers' masks tell samples apart by position


def starts(segments: Tensor) -> Tensor:
    """Whether a token is the first of its sample, (B, T)."""
    return functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)


def places(segments: Tensor) -> Tensor:
    """A token's place in its sample, from 0, (B, T)."""
    place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    return place - torch.where(starts(segments), place, 0).cummax(dim=1).values


def sees(segments: Tensor) -> Tensor:
    """Whether a token may look at another, (B, T, T): at itself and at what stands before it in its sample."""
    return (segments[:, :, None] == segments[:, None, :]).tril()


def packed_arguments(language: Any, segments: Tensor) -> dict[str, Tensor]:
    """What a language model takes so that samples of a row do not see each other; a ConfigError where it cannot."""
    kind = language.config.model_type
    if kind in BY_POSITION:
        return {"position_ids": places(segments)}
    if kind == "mosaic_gpt":
        return {"segments": segments}
    if kind == "mpt":  # where its mask is True, nothing is seen
        return {"attention_mask": ~sees(segments)[:, None]}
    if kind == "opt":
        return {"attention_mask": sees(segments)[:, None], "position_ids": places(segments)}
    known = ", ".join(sorted((*BY_POSITION, "mosaic_gpt", "mpt", "opt")))
    raise ConfigError(
        f"pack_tokens: rows of several samples are not known for language models of {kind}, but of {known}"
    )
