"""MosaicGPT, the architecture of MPT-1B-RedPajama-200B, which the hub has as code for an old transformers alone.

A decoder of pre-norm layers without biases, with ALiBi (arXiv 2108.12409), LayerNorm on queries and keys over the full
width, and a head tied to the embedding (github.com/mosaicml/examples, version 0.0.4). Importing this module makes
transformers' Auto classes use it wherever a config.json says ``"model_type": "mosaic_gpt"``; weights keep their names:

- ``transformer.wte.weight``, ``transformer.ln_f.weight``
- ``transformer.blocks.I.{ln_1,ln_2,attn.Wqkv,attn.q_ln,attn.k_ln,attn.out_proj,mlp.mlp_up,mlp.mlp_down}.weight``

Letters of shapes: B rows, T tokens, K tokens with those in the cache, D width, H heads.
"""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

# Further keys of a config.json that would change what is computed, and the one value of each that is known here.
FIXED = {
    "alibi": True,
    "attn_clip_qkv": None,
    "attn_pdrop": 0,
    "attn_qk_ln": True,
    "attn_uses_sequence_id": False,
    "emb_pdrop": 0,
    "embedding_fraction": 1,
    "logit_scale": None,
    "no_bias": True,
    "prefix_lm": False,
    "resid_pdrop": 0,
    "softmax_scale": None,
}
ALIGNMENT = 8  # elements; a bias whose rows begin at multiples of it is not copied by attention in every layer


@strict  # reads the types at run time, which is why this module does not postpone annotations
class MosaicGPTConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes, by default those of MPT-1B. A ValueError names what only other models of this kind have."""

    model_type = "mosaic_gpt"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "max_position_embeddings": "max_seq_len",
    }

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    mlp_ratio: int = 4
    max_seq_len: int = 2048
    vocab_size: int = 50432
    alibi_bias_max: int = 8
    init_std: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **others: Any) -> None:
        for name, value in FIXED.items():
            if others.get(name, value) != value:
                raise ValueError(f"mosaic_gpt with {name}={others[name]!r} is not supported, only {value!r}")
        if self.n_heads.bit_count() != 1:
            raise ValueError(f"mosaic_gpt with n_heads={self.n_heads} is not supported, only powers of two")
        if self.d_model % self.n_heads:
            raise ValueError(f"mosaic_gpt's d_model={self.d_model} must be divisible by n_heads={self.n_heads}")
        super().__post_init__(**others)


class Attention(nn.Module):
    """Causal self-attention, with a LayerNorm over all heads' queries and another over their keys."""

    def __init__(self, config: MosaicGPTConfig, number: int) -> None:
        super().__init__()
        self.heads = config.n_heads
        self.number = number  # of the layer, in the cache
        self.Wqkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.q_ln = nn.LayerNorm(config.d_model, bias=False)
        self.k_ln = nn.LayerNorm(config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, bias: Tensor, cache: Cache | None) -> Tensor:
        queries, keys, values = self.Wqkv(x).chunk(3, dim=-1)
        # autocast norms in fp32; attention wants one type
        queries, keys = self.q_ln(queries).to(values.dtype), self.k_ln(keys).to(values.dtype)
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (queries, keys, values)
        )
        if cache is not None:
            keys, values = cache.update(keys, values, self.number)
        seen = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        return self.out_proj(seen.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: MosaicGPTConfig) -> None:
        super().__init__()
        self.mlp_up = nn.Linear(config.d_model, config.mlp_ratio * config.d_model, bias=False)
        self.mlp_down = nn.Linear(config.mlp_ratio * config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_down(functional.gelu(self.mlp_up(x)))  # type: ignore[no-any-return]


class MosaicGPTBlock(nn.Module):
    def __init__(self, config: MosaicGPTConfig, number: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, bias=False)
        self.attn = Attention(config, number)
        self.ln_2 = nn.LayerNorm(config.d_model, bias=False)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, bias: Tensor, cache: Cache | None) -> Tensor:
        """(B, T, D) -> (B, T, D); ``bias`` as ``attention_bias`` makes it."""
        x = x + self.attn(self.ln_1(x), bias, cache)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class MosaicGPT(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The causal language model, for transformers' ``from_pretrained`` and ``generate``."""

    config_class = MosaicGPTConfig
    base_model_prefix = "mosaic_gpt"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}
    _no_split_modules: ClassVar[list[str]] = ["MosaicGPTBlock"]
    _supports_sdpa = True

    def __init__(self, config: MosaicGPTConfig) -> None:
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.d_model),
                "blocks": nn.ModuleList(MosaicGPTBlock(config, number) for number in range(config.n_layers)),
                "ln_f": nn.LayerNorm(config.d_model, bias=False),
            }
        )
        self.lm_head: nn.Module = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        segments: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, (B, T, V), or of the last ``logits_to_keep`` positions.

        ``attention_mask`` (B, K) is 0 on padding, on either side. Tokens see those of their own one of ``segments``
        (B, T) alone, for which there is no cache. The result is always an object, never a tuple.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden = self.transformer["wte"](input_ids)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        bias = attention_bias(self.config, hidden, past, attention_mask, segments)
        for block in self.transformer["blocks"]:  # type: ignore[attr-defined]
            hidden = block(hidden, bias, past_key_values)
        hidden = self.transformer["ln_f"](hidden)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, -logits_to_keep:]), past_key_values=past_key_values)


def attention_bias(
    config: MosaicGPTConfig, hidden: Tensor, past: int, attention_mask: Tensor | None, segments: Tensor | None = None
) -> Tensor:
    """What is added to attention's scores, (B, H, T, K): ALiBi, and the lowest value where a token may not look.

    Head h = 1..H takes 2 ** (-h * alibi_bias_max / H) times the distance off. Its type is the one attention runs in.
    """
    device = hidden.device
    keys = past + hidden.shape[1]
    padded = -(-keys // ALIGNMENT) * ALIGNMENT  # the last ones lie in the future of every token
    distance = torch.arange(past, keys, device=device)[:, None] - torch.arange(padded, device=device)
    sees = distance >= 0
    if attention_mask is not None:
        sees = sees & functional.pad(attention_mask.bool(), (0, padded - keys))[:, None, None]
    if segments is not None:
        same = segments[:, :, None] == functional.pad(segments, (0, padded - keys), value=-1)[:, None]
        sees = sees & same[:, None]
    powers = torch.arange(1, config.n_heads + 1, device=device) * (config.alibi_bias_max / config.n_heads)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
    alibi = (-distance * (2.0**-powers)[:, None, None]).to(dtype)
    return torch.where(sees, alibi, torch.finfo(dtype).min)[..., :keys].expand(len(hidden), -1, -1, -1)


AutoConfig.register(MosaicGPTConfig.model_type, MosaicGPTConfig)
AutoModelForCausalLM.register(MosaicGPTConfig, MosaicGPT)
