"""Tokenizers, language models from architectures and folders, and the rows of new tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import BATCH, FAMILIES, WORDS
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from hpc_mm.config import ConfigError, Language
from hpc_mm.models.flamingo import FlamingoModel
from hpc_mm.models.language_model import load_language, load_tokenizer

Make = Callable[..., FlamingoModel]


def test_special_tokens_come_last_in_this_order(tokenizer_file: str) -> None:
    tokenizer = load_tokenizer(Language(tokenizer=tokenizer_file))
    assert tokenizer.base_size == WORDS
    assert tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>", "<PAD>"]) == [60, 61, 62]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (0, 62, 63)
    ids = tokenizer("<image>w5 w6<|endofchunk|>")["input_ids"]
    assert ids == [61, 5, 6, 60]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "w5 w6"


def test_a_folder_keeps_its_own_padding(tokenizer_file: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Language(tokenizer=tokenizer_file))
    tokenizer.pad_token = "w3"
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(Language(name=str(tmp_path)))
    assert (again.pad_token_id, again.base_size, len(again)) == (3, 63, 63)


@pytest.fixture
def full_tokenizer(tokenizer_file: str, tmp_path: Path) -> str:
    """A tokenizer.json that was trained with the special tokens, in the midst of its vocabulary."""
    content = json.loads(Path(tokenizer_file).read_text())
    vocabulary = content["model"]["vocab"]
    for token, number in (("<PAD>", 10), ("<image>", 11), ("<|endofchunk|>", 12)):
        del vocabulary[f"w{number}"]
        vocabulary[token] = number
    file = tmp_path / "full.json"
    file.write_text(json.dumps(content))
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(["<PAD>", "<image>", "<|endofchunk|>"])
    tokenizer.save(str(file))
    return str(file)


def test_tokens_that_are_there_keep_their_ids_and_rows(make: Make, full_tokenizer: str) -> None:
    tokenizer = load_tokenizer(Language(tokenizer=full_tokenizer))
    assert tokenizer.convert_tokens_to_ids(["<PAD>", "<image>", "<|endofchunk|>"]) == [10, 11, 12]
    assert len(tokenizer) == tokenizer.base_size == WORDS


def test_a_model_without_new_rows_trains_and_generates(make: Make, full_tokenizer: str) -> None:
    model = make(tokenizer=full_tokenizer, trainable=("language", "new_tokens"))
    assert not [name for name, _ in model.named_parameters() if model.part_of(name) == "new_tokens"]
    ids = torch.tensor([[11, 5, 6, 12]])
    image = torch.randn(1, 3, 16, 16)
    logits = model(ids, torch.ones_like(ids), image, torch.tensor([1]), positions=ids == 5)
    assert logits.shape == (1, WORDS)
    logits.logsumexp(-1).sum().backward()
    assert model.generate(ids, torch.ones_like(ids), image, torch.tensor([1]), max_new_tokens=2).shape[1] <= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_new_rows_extend_table_and_head(make: Make, batch: BATCH, family: str) -> None:
    model = make(family).eval()
    embedding, head = model.language.get_input_embeddings(), model.language.get_output_embeddings()
    table = torch.cat([embedding.base.weight[:WORDS], embedding.new_rows])
    assert torch.equal(embedding(batch[0]), table[batch[0]])
    hidden = torch.randn(2, 3, 32)
    out = torch.cat([head.base.weight[:WORDS], head.new_rows])
    torch.testing.assert_close(head(hidden), hidden @ out.T)
    tied = family in ("opt", "mpt", "mosaic_gpt")
    assert (head.new_rows is embedding.new_rows) == (head.base.weight is embedding.base.weight) == tied


def test_new_rows_are_drawn_around_the_old(make: Make) -> None:
    embedding = make("llama", architecture={"vocab_size": 64}).language.get_input_embeddings()
    old, new = embedding.base.weight[:WORDS], embedding.new_rows
    assert new.shape == (3, 32)
    assert 0.5 < (new.std() / old.std()).item() < 2.0
    assert len({tuple(row.tolist()) for row in new}) == 3


def test_weights_of_a_folder(make: Make, tmp_path: Path, tokenizer_file: str) -> None:
    values = dict(FAMILIES["llama"])
    saved = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), vocab_size=64, **values))
    saved.to(torch.bfloat16).save_pretrained(tmp_path)
    language = Language(name=str(tmp_path), tokenizer=tokenizer_file)
    loaded = load_language(language, load_tokenizer(language))
    assert torch.equal(loaded.model.embed_tokens.weight, saved.model.embed_tokens.weight.float())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "/nowhere/at/all"}, "nowhere"),
        ({"architecture": {"hidden_size": 32}}, "model_type"),
        ({"architecture": {"model_type": "lama"}}, "unknown model_type 'lama'"),
        ({"architecture": {"model_type": "llama", "hiden_size": 32}}, "did you mean hidden_size"),
        ({"architecture": {**FAMILIES["llama"], "vocab_size": 50}}, "50 token rows, fewer than the 60"),
        ({"architecture": {**FAMILIES["llama"], "num_attention_heads": 5}}, "language.architecture"),
    ],
)
def test_mistakes_are_told_in_one_line(tokenizer_file: str, values: dict, message: str) -> None:
    language = Language(tokenizer=tokenizer_file, **values)
    with pytest.raises(ConfigError, match=message) as error:
        load_language(language, load_tokenizer(language))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("values", [{}, {"tokenizer": "/nowhere/tokenizer.json"}, {"tokenizer": "/nowhere"}])
def test_missing_tokenizers(values: dict) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer"):
        load_tokenizer(Language(**values))


def test_a_tokenizer_without_end_of_text(tokenizer_file: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.json"
    file.write_text(Path(tokenizer_file).read_text().replace("</s>", "END"))
    with pytest.raises(ConfigError, match="no end-of-text token"):
        load_tokenizer(Language(tokenizer=str(file)))
