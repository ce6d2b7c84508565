"""Equality with open_flamingo 2.0.1 on random weights in fp32, in both directions."""

from __future__ import annotations

import re
from typing import Any

import open_clip
import pytest
import torch
from open_flamingo.src.flamingo import Flamingo as Reference
from open_flamingo.src.flamingo_lm import FlamingoLMMixin
from open_flamingo.src.utils import extend_instance
from tiny import FAMILIES, TOWER, open_gates, ragged, sharpen
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from hpc_mm.config import Flamingo, Language, Vision
from hpc_mm.models.flamingo import FlamingoModel, build, load_tokenizer
from hpc_mm.models.openflamingo_weights import load_openflamingo, openflamingo_state

LAYERS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers", "llama": "model.layers"}
pytestmark = pytest.mark.parametrize(("family", "every"), [(family, every) for family in LAYERS for every in (1, 2)])


def reference(family: str, every: int, tokenizer: Any) -> Reference:
    """open_flamingo's model as its factory makes it. Today's open_clip gives it patch tokens after ln_post."""
    torch.manual_seed(every)
    values = {"vocab_size": 64, **FAMILIES[family]}
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    extend_instance(language, FlamingoLMMixin)
    language.set_decoder_layers_attr_name(LAYERS[family])
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=8, width=8, heads=1, layers=1)
    clip = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**TOWER, output_tokens=True), text)
    end, image = tokenizer.convert_tokens_to_ids(["<|endofchunk|>", "<image>"])
    model = Reference(clip, language, end, image, vis_dim=TOWER["width"], cross_attn_every_n_layers=every)
    sharpen(model)
    open_gates(model)
    return model.eval()


@pytest.fixture
def pair(family: str, every: int, tokenizer_file: str) -> tuple[Reference, FlamingoModel]:
    config = Language(tokenizer=tokenizer_file, architecture=FAMILIES[family])
    tokenizer = load_tokenizer(config)
    theirs = reference(family, every, tokenizer)
    vision = Vision(architecture=TOWER, tokens="after_ln_post")
    ours = build(Flamingo(vision=vision, language=config, cross_attn_every_n_layers=every), tokenizer, seed=3)
    load_openflamingo(ours, theirs.state_dict())
    return theirs, ours.eval()


def padded(images: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Their form: (B, images of the longest row, 1, 3, S, S), zero images behind the real ones."""
    rows = images.new_zeros(len(counts), int(counts.max()), 1, *images.shape[1:])
    for row, own in enumerate(images.split(counts.tolist())):
        rows[row, : len(own), 0] = own
    return rows


def test_logits_and_losses(pair: tuple[Reference, FlamingoModel]) -> None:
    theirs, ours = pair
    ids, mask, images, counts = ragged(left=False)
    labels = ids.masked_fill((mask == 0) | (ids == ours.image_id), -100)
    with torch.no_grad():
        expected = theirs(padded(images, counts), ids, mask, labels=labels)
        logits = ours(ids, mask, images, counts)
    real = mask.bool()
    assert expected.logits[real].std() > 0.3  # the logits say something
    torch.testing.assert_close(logits[real], expected.logits[real], atol=1e-5, rtol=0)
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected.loss, atol=1e-6, rtol=0)


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens(pair: tuple[Reference, FlamingoModel], beams: int) -> None:
    theirs, ours = pair
    ids, mask, images, counts = ragged(left=True)
    how = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "pad_token_id": ours.pad_id}
    how["suppress_tokens"] = [ours.image_id]  # a generated image token throws the reference off all rows' images
    how |= {"length_penalty": 0.0} if beams > 1 else {}
    expected = theirs.generate(padded(images, counts), ids, mask, **how)
    assert torch.equal(ours.generate(ids, mask, images, counts, **how), expected)


def test_weights_there_and_back(pair: tuple[Reference, FlamingoModel]) -> None:
    theirs, ours = pair
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    released = {
        key for key in before if re.search(r"^perceiver|gated_cross_attn_layer\.|embed(_tokens|_in)\.|lm_head", key)
    }
    state = openflamingo_state(ours)
    assert set(state) == released - ({"lang_encoder.lm_head.weight"} if theirs_tied(theirs) else set())
    for parameter in theirs.parameters():
        parameter.data.zero_()
    theirs.load_state_dict(state, strict=False)
    for key in released:
        assert torch.equal(theirs.state_dict()[key], before[key]), key


def theirs_tied(theirs: Reference) -> bool:
    language = theirs.lang_encoder
    return language.get_output_embeddings().weight is language.get_input_embeddings().weight
