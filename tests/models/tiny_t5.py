"""Small CLIP-FlanT5s, a ragged batch for them, and transformers' own T5 and CLIP with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import TOWER
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from hpc_mm.config import IMAGE_PLACE, ClipFlanT5, Language, Vision
from hpc_mm.models.clip_flant5 import ClipFlanT5Model, build, load_tokenizer

WORDS = 60
PATCHES = 4
SHAPE: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
FLAN = {**SHAPE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def tokenizer_file(folder: Path) -> str:
    special = ["<PAD>", "<s>", "</s>", "<image>", "<|endofchunk|>"]
    known = {token: place for place, token in enumerate([*special, *(f"w{i}" for i in range(5, WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="w5"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def configured(tokenizer: str, architecture: dict[str, Any] = FLAN, **values: Any) -> ClipFlanT5:
    vision = Vision(architecture={**TOWER, "layers": 3}, tokens="penultimate")
    return ClipFlanT5(vision=vision, language=Language(tokenizer=tokenizer, architecture=architecture), **values)


def made(config: ClipFlanT5, seed: int = 0, precision: Any = "fp32") -> ClipFlanT5Model:
    return build(config, load_tokenizer(config.language), seed, precision)


def rows() -> Rows:
    """Text around the image, two images, none, and an image alone; ragged on both sides."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, WORDS, (4, 9), generator=generator)
    lengths = torch.tensor([9, 7, 5, 1])
    for row, place in ((0, 3), (1, 0), (1, 4), (3, 0)):
        ids[row, place] = IMAGE_PLACE
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = ids * mask
    labels = torch.randint(5, WORDS, (4, 6), generator=generator)
    labels[torch.arange(6) >= torch.tensor([6, 2, 4, 1])[:, None]] = -100
    return ids, mask, torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([1, 2, 0, 1]), labels


# ---------------------------------------------------------------- transformers' own


def their_t5(model: ClipFlanT5Model) -> T5ForConditionalGeneration:
    """Transformers' T5 with the model's weights and eager attention, its head untied by hand where ours is."""
    facts = {**model.config.language.architecture, "vocab_size": len(model.language.shared.weight)}
    theirs = T5ForConditionalGeneration(T5Config(**facts, decoder_start_token_id=0, attn_implementation="eager"))
    theirs.lm_head.weight = torch.nn.Parameter(torch.zeros_like(theirs.lm_head.weight))
    theirs.load_state_dict(model.language.state_dict())
    return theirs.eval()


def their_tower(layers: int, seed: int = 0) -> CLIPVisionModel:
    """A random CLIP tower of transformers of our tower's size, with the activation of TOWER."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=layers, hidden_act="gelu"))
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower.eval()


def their_inputs(model: ClipFlanT5Model, tower: CLIPVisionModel, batch: Rows) -> tuple[Tensor, Tensor]:
    """Encoder inputs and mask by a loop over rows and pieces, as LLaVA describes it."""
    ids, mask, images, _, _ = batch
    seen = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    first, _, second = model.projector
    features = iter(second(torch.nn.functional.gelu(first(seen))))
    found = []
    for row, own in zip(ids, mask, strict=True):
        pieces = [
            next(features) if one == IMAGE_PLACE else model.language.shared(one)[None] for one in row[: own.sum()]
        ]
        found.append(torch.cat(pieces))
    lengths = torch.tensor([len(row) for row in found])
    inputs = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
    return inputs, torch.arange(inputs.shape[1]) < lengths[:, None]
