"""T5 encoder-decoders of transformers and their tokenizers, with the output head that they were trained with.

The first T5 has one table for tokens and head, and rescales what goes into the head; T5 v1.1 and FlanT5 have a head of
their own (``tie_word_embeddings`` false in config.json). transformers 5 ties both, and writes the head's weights over
the tokens' table.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from hpc_mm.config import ConfigError, Language, unknown
from hpc_mm.models.language_model import bare_tokenizer, named_tokenizer, refuse_missing, told
from hpc_mm.models.token_head import head_output


def load_tokenizer(language: Language) -> Any:
    """The tokenizer, whose every text ends with its end token; ``base_size`` is the number of ids.

    A bare tokenizer.json learns to end so. ConfigError where padding is not token 0, which T5's decoder begins with.
    """
    source = language.tokenizer or language.name
    tokenizer = bare_tokenizer(source) if source.endswith(".json") else named_tokenizer(source, language)
    end, end_id = tokenizer.eos_token, tokenizer.eos_token_id
    if end is None or tokenizer.pad_token_id != 0:
        raise ConfigError(
            f"tokenizer {source!r} has the end token {end!r} and the padding token {tokenizer.pad_token!r} as "
            f"{tokenizer.pad_token_id}; T5 wants an end token, and padding as 0"
        )
    if source.endswith(".json"):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, end_id)]
        )
    if tokenizer("")["input_ids"] != [end_id]:
        raise ConfigError(f"tokenizer {source!r} does not end every text with {end!r}, as T5's do")
    tokenizer.base_size = len(tokenizer)
    return tokenizer


class UntiedT5(T5ForConditionalGeneration):  # type: ignore[misc]
    """A T5 whose head is its own."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        name: table for name, table in T5ForConditionalGeneration._tied_weights_keys.items() if name != "lm_head.weight"
    }


class EncoderAttention(T5Attention):  # type: ignore[misc]
    """Attention of an encoder whose first layer puts what must not be seen into the bias that all layers take.

    transformers' own makes the sum of the two, (B, heads, T, T), anew in every layer, and keeps it for backward.
    """

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None, **given: Any
    ) -> Any:
        """``mask`` is (B, 1, 1 or T, T) bool: true where a place, or each of its own, may be looked at."""
        if position_bias is None:
            length = hidden_states.shape[1]
            position_bias = self.compute_bias(length, length, device=hidden_states.device)
            if mask is not None:
                position_bias = position_bias.masked_fill(~mask, torch.finfo(position_bias.dtype).min)
        return super().forward(hidden_states, position_bias=position_bias, **given)


def share_bias(encoder: Any) -> None:
    """Let every layer's attention run so."""
    for block in encoder.block:
        block.layer[0].SelfAttention.__class__ = EncoderAttention


class Head(nn.Module):
    """The output head in fp32, whatever its weights are kept in; rows beyond the tokenizer's are not used."""

    def __init__(self, weight: nn.Parameter, vocabulary: int) -> None:
        super().__init__()
        self.weight = weight
        self.vocabulary = vocabulary

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """(..., width) -> logits (..., vocabulary), or the sum of the cross-entropy of ``targets`` (selected,)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return head_output(hidden.float(), self.weight.float(), None, None, self.vocabulary, targets)


def load_t5(language: Language, tokenizer: Any, dropout: float) -> Any:
    """A T5 in fp32: of ``architecture`` with random weights, or of ``name`` with its own."""
    model = _random(language, tokenizer, dropout) if language.architecture else _pretrained(language, dropout)
    rows = model.shared.weight.shape[0]
    if rows < len(tokenizer):
        raise ConfigError(
            f"language model {language.name or 't5'!r} has {rows} token rows, fewer than the {len(tokenizer)} tokens "
            "of its tokenizer"
        )
    model.set_input_embeddings(model.shared)  # one module, not three with one table
    share_bias(model.encoder)
    model.lm_head = Head(model.lm_head.weight, len(tokenizer))
    model.config.vocab_size = len(tokenizer)
    return model


def _of(config: T5Config) -> type[T5ForConditionalGeneration]:
    return T5ForConditionalGeneration if config.scale_decoder_outputs else UntiedT5


def _random(language: Language, tokenizer: Any, dropout: float) -> Any:
    given = dict(language.architecture)
    kind = given.pop("model_type", "t5")
    if kind != "t5":
        raise ConfigError(f"language.architecture: model_type={kind!r} must be t5")
    legal = {name for name in T5Config().to_dict() if name != "dropout_rate"}  # the model's config says that
    for name in given:
        if name not in legal:
            raise unknown("key in language.architecture of t5", name, legal)
    values = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **given}
    try:
        config = T5Config(**values, decoder_start_token_id=0, dropout_rate=dropout)
    except (ValueError, StrictDataclassError) as error:
        raise ConfigError(f"language.architecture of t5: {str(error).strip().splitlines()[-1].strip()}") from None
    config._attn_implementation = "sdpa"
    model = _of(config)(config)
    if not config.scale_decoder_outputs:  # transformers draws an untied head so large that all but one token are lost
        nn.init.normal_(model.lm_head.weight, std=config.d_model**-0.5)
    return model


def _pretrained(language: Language, dropout: float) -> Any:
    where = f"language.name={language.name!r}"
    with told(where):
        config = AutoConfig.from_pretrained(language.name)
        if config.model_type != "t5":
            raise ConfigError(f"{where} is a {config.model_type}; it must be a T5, such as google/flan-t5-xl")
        model, loaded = _of(config).from_pretrained(
            language.name,
            dtype=torch.float32,
            dropout_rate=dropout,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    refuse_missing(where, loaded)
    return model
