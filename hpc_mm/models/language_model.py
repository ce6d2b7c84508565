"""Causal language models of transformers, their tokenizers, and the few token rows that a multimodal model adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hpc_mm.config import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN, ConfigError, Language, unknown
from hpc_mm.models import mosaic_gpt  # noqa: F401  # known to transformers once imported
from hpc_mm.models.mpt_attention import fuse_attention
from hpc_mm.models.token_head import TokenHead

END_OF_TEXT = ("</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>")  # how a bare tokenizer.json may call it


# ---------------------------------------------------------------- tokenizer


def load_tokenizer(language: Language) -> Any:
    """The language model's tokenizer plus ``<|endofchunk|>``, ``<image>`` and, where it has no padding, ``<PAD>``.

    They are added in this order, behind the last id; tokens that it already has keep their ids. ``base_size`` on the
    result is the number of ids before that: rows from there on are new.
    """
    source = language.tokenizer or language.name
    tokenizer = bare_tokenizer(source) if source.endswith(".json") else named_tokenizer(source, language)
    if tokenizer.eos_token is None:
        raise ConfigError(f"tokenizer {source!r} has no end-of-text token; known names: {', '.join(END_OF_TEXT)}")
    tokenizer.base_size = len(tokenizer)
    tokens = [ENDOFCHUNK_TOKEN, IMAGE_TOKEN]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def bare_tokenizer(source: str) -> Any:
    """That of a tokenizer.json, with its end and padding tokens, if it has them, by their usual names."""
    if not Path(source).is_file():
        raise ConfigError(f"language.tokenizer={source!r}: no such file")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=source)
    known = tokenizer.get_vocab()
    tokenizer.eos_token = next((token for token in END_OF_TEXT if token in known), None)
    if PAD_TOKEN in known:
        tokenizer.pad_token = PAD_TOKEN
    return tokenizer


def named_tokenizer(source: str, language: Language) -> Any:
    """That of a hub id or folder."""
    if not source:
        raise ConfigError("language.name and language.tokenizer are both empty; one of them must name a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=language.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {source!r}: {str(error).strip().splitlines()[0]}") from None


# ---------------------------------------------------------------- language model


def load_language(language: Language, tokenizer: Any) -> Any:
    """A causal language model in fp32: of ``architecture`` with random weights, or of ``name`` with its own."""
    model = _random(language, tokenizer) if language.architecture else _pretrained(language)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokenizer.base_size:
        raise ConfigError(
            f"language model {language.name or language.architecture['model_type']!r} has {rows} token rows, fewer "
            f"than the {tokenizer.base_size} tokens of its tokenizer"
        )
    if model.get_output_embeddings() is None:
        raise ConfigError(f"language model {language.name!r} has no output head of its own, which transformers' have")
    fuse_attention(model)
    return model


def _random(language: Language, tokenizer: Any) -> Any:
    values = {"vocab_size": len(tokenizer), **language.architecture}
    kind = values.pop("model_type", None)
    if kind is None:
        raise ConfigError("language.architecture needs model_type, such as llama, opt, gpt_neox, mistral, qwen2, mpt")
    try:
        legal = AutoConfig.for_model(kind)
    except ValueError:
        raise ConfigError(f"language.architecture: unknown model_type {kind!r}; llama and mpt are two") from None
    for name in values:
        if not hasattr(legal, name):
            raise unknown(f"key in language.architecture of {kind}", name, legal.to_dict())
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    except (ValueError, StrictDataclassError) as error:
        raise ConfigError(f"language.architecture of {kind}: {str(error).strip().splitlines()[-1].strip()}") from None


def _pretrained(language: Language) -> Any:
    where = f"language.name={language.name!r}"
    with told(where):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            language.name,
            trust_remote_code=language.trust_remote_code,
            dtype=torch.float32,
            output_loading_info=True,
        )
    refuse_missing(where, loaded)
    return model


@contextmanager
def told(where: str) -> Iterator[None]:
    """What transformers says of a model that it cannot load, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {str(error).strip().splitlines()[0]}") from None
    except StrictDataclassError as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[-1].strip()}") from None


def refuse_missing(where: str, loaded: Mapping[str, Any]) -> None:
    """ConfigError where weights of a model were not in its files."""
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise ConfigError(f"{where}: {len(missing)} weights are missing, such as {missing[0]}")


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's layers: the first ModuleList with ``num_hidden_layers`` entries."""
    depth = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ConfigError(f"{type(model).__name__} has no list of {depth} decoder layers")


# ---------------------------------------------------------------- new token rows


class TokenEmbedding(nn.Module):
    """The language model's table up to the first new id, and the new rows, a parameter of their own, from there on."""

    def __init__(self, base: nn.Module, new_rows: nn.Parameter, first_new: int) -> None:
        super().__init__()
        self.base = base
        self.new_rows = new_rows
        self.first_new = first_new

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, width)."""
        base: Tensor = self.base(ids.clamp(max=self.first_new - 1))
        new = functional.embedding((ids - self.first_new).clamp(min=0), self.new_rows)
        return torch.where((ids >= self.first_new)[..., None], new.to(base.dtype), base)


def add_token_rows(model: Any, tokenizer: Any, given: Any) -> None:
    """Put the wrappers of the new rows around the model's embedding and head.

    A tokenizer that came with the special tokens adds none: their rows are the language model's own. Table rows beyond
    the tokenizer's length (MPT pads its table) are not used.
    """
    first_new: int = tokenizer.base_size
    new = len(tokenizer) - first_new
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    in_rows = out_rows = None
    if new:
        in_rows = _new_rows(embedding.weight[:first_new], new)
        out_rows = in_rows if tied else _new_rows(head.weight[:first_new], new)
        model.set_input_embeddings(TokenEmbedding(embedding, in_rows, first_new))
    model.set_output_embeddings(TokenHead(head, out_rows, first_new, given))
    model.config.get_text_config().vocab_size = len(tokenizer)


def _new_rows(table: Tensor, count: int) -> nn.Parameter:
    """Rows drawn from a normal distribution with each column's mean and the spread of the old ones."""
    with torch.no_grad():
        mean, spread = table.float().mean(dim=0), table.float().std(dim=0)
        return nn.Parameter((mean + spread * torch.randn(count, table.shape[1])).to(table.dtype))
