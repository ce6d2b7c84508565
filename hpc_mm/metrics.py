"""Scores of model output: pure functions on lists."""

from __future__ import annotations

from hpc_mm.caption_metrics import (
    Scored,
    bleu,
    bleu_each,
    caption_scores,
    cider,
    cider_each,
    rouge_l,
    rouge_l_each,
)

__all__ = ["Scored", "bleu", "bleu_each", "caption_scores", "cider", "cider_each", "rouge_l", "rouge_l_each"]
