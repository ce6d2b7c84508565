"""MPT's attention in one fused operation; transformers writes it out, with fp32 scores of all pairs of tokens."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.mpt.modeling_mpt import MptAttention

from hpc_mm.models.mosaic_gpt import ALIGNMENT


class AlibiBias:
    """The bias of a forward pass, which all layers share: ALiBi, and the lowest value where nothing is seen.

    It lives as long as the mask of that pass.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self, _: object = None) -> None:
        self.mask: weakref.ref[Tensor] | None = None
        self.bias = torch.empty(0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a pass and its recomputation must run the same code
    def of(self, mask: Tensor, slopes: Tensor, dtype: torch.dtype) -> Tensor:
        """``mask`` (B, 1, T, K) is True where nothing is seen, ``slopes`` (H, 1, 1): (B, H, T, K)."""
        if self.mask is None or self.mask() is not mask or self.bias.dtype != dtype:
            tokens, keys = mask.shape[-2:]
            padded = -(-keys // ALIGNMENT) * ALIGNMENT
            place = torch.arange(padded, device=mask.device)
            # By distance, not by key as transformers has it: near a token the numbers are small, and exact in bf16.
            alibi = ((place - place[keys - tokens : keys, None]) * slopes).to(dtype)
            hidden = functional.pad(mask, (0, padded - keys), value=True)
            self.bias = torch.where(hidden, torch.finfo(dtype).min, alibi)[..., :keys]
            self.mask = weakref.ref(mask, self._forget)
        return self.bias


class FusedMptAttention(MptAttention):  # type: ignore[misc]
    """As transformers' class, whose weights it has; attention weights are not returned."""

    alibi: AlibiBias  # one for all layers

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        queries, keys, values = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in mixed.chunk(3, dim=-1)
        )
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        assert attention_mask is not None  # MptModel always makes one
        slopes = position_bias[..., -1:] - position_bias[..., -2:-1]
        bias = self.alibi.of(attention_mask, slopes, queries.dtype)
        dropout = self.attn_dropout_p if self.training else 0.0
        seen = functional.scaled_dot_product_attention(
            queries, keys, values, bias, dropout_p=dropout, scale=self.softmax_scale
        )
        return self.out_proj(seen.transpose(1, 2).flatten(2)), None


def fuse_attention(model: nn.Module) -> None:
    """Let every MPT attention of ``model`` run fused."""
    alibi = AlibiBias()
    for module in model.modules():
        if type(module) is MptAttention:
            module.__class__ = FusedMptAttention
            vars(module)["alibi"] = alibi
