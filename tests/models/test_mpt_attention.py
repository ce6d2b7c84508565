"""MPT with fused attention is transformers' MPT."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, WORDS, sharpen
from transformers import AutoConfig, AutoModelForCausalLM

from hpc_mm.models.mpt_attention import FusedMptAttention, fuse_attention


@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("left", [False, True])
def test_equals_transformers(heads: int, left: bool) -> None:
    values = {**FAMILIES["mpt"], "d_model": 48, "n_heads": heads, "attn_config": {"clip_qkv": 0.5}}
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    sharpen(plain)
    fused = AutoModelForCausalLM.from_config(plain.config)
    fused.load_state_dict(plain.state_dict())
    fuse_attention(fused)
    assert sum(isinstance(module, FusedMptAttention) for module in fused.modules()) == 4
    ids, mask = torch.randint(1, WORDS, (2, 13)), torch.ones(2, 13, dtype=torch.long)
    mask[1, slice(0, 4) if left else slice(9, 13)] = 0
    real = mask.bool()
    one, two = (model(ids, attention_mask=mask).logits[real] for model in (plain, fused))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)
    for logits in (one, two):
        logits.logsumexp(-1).sum().backward()
    for (name, expected), found in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4, msg=name)
    cached, more = fused(ids[:1, :8], use_cache=True), ids[:1, 8:]
    again = fused(more, past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(again, plain(ids[:1]).logits[:, 8:], atol=1e-5, rtol=1e-5)
    assert all(module.alibi.bias.numel() == 0 for module in fused.modules() if isinstance(module, FusedMptAttention))
    fused.bfloat16()
    torch.testing.assert_close(fused(ids, attention_mask=mask).logits[real].float(), one, atol=0.3, rtol=0.1)
