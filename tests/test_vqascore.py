"""VQAScore beside transformers' own T5 and CLIP, one pair at a time; and that neighbours do not change a bit of it."""

import io
import math
import random
from typing import Any

import judges
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from hpc_mm.answerer import Weights, trained
from hpc_mm.config import ConfigError
from hpc_mm.metrics import vqascore
from hpc_mm.models.clip_flant5 import ClipFlanT5Model
from hpc_mm.vqascore import VqaScorer

pytestmark = pytest.mark.usefixtures("one_thread")

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipFlanT5Model, Any]:
    folder = tmp_path_factory.mktemp("judge")
    return trained(Weights(judges.run_of(folder), folder, "0"), "fp32")


def scorer(parts: tuple[ClipFlanT5Model, Any], **how: Any) -> VqaScorer:
    return VqaScorer(*parts, "cpu", **how)


def every(images: int, texts: int) -> list[tuple[int, int]]:
    return [(image, text) for image in range(images) for text in range(texts)]


# ---------------------------------------------------------------- an independent computation


def clip_of(tower: Any) -> CLIPVisionModel:
    """transformers' CLIP with the weights of open_clip's tower."""
    layers = tower.transformer.resblocks
    width = tower.conv1.out_channels
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=layers[0].mlp.c_fc.out_features,
        num_hidden_layers=len(layers) + 1,  # the last one, which nobody reads, is random
        num_attention_heads=layers[0].attn.num_heads,
        image_size=tower.image_size[0],
        patch_size=tower.patch_size[0],
        hidden_act="gelu",
        attn_implementation="eager",
    )
    model = CLIPVisionModel(config).eval()
    own = {
        "embeddings.class_embedding": tower.class_embedding,
        "embeddings.patch_embedding.weight": tower.conv1.weight,
        "embeddings.position_embedding.weight": tower.positional_embedding,
        "pre_layrnorm.weight": tower.ln_pre.weight,
        "pre_layrnorm.bias": tower.ln_pre.bias,
    }
    pairs = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for number, layer in enumerate(layers):
        for kind in ("weight", "bias"):
            for theirs, ours in {**pairs, "self_attn.out_proj": "attn.out_proj"}.items():
                own[f"encoder.layers.{number}.{theirs}.{kind}"] = getattr(layer.get_submodule(ours), kind)
            joined = getattr(layer.attn, f"in_proj_{kind}")
            for name, part in zip("qkv", joined.chunk(3), strict=True):
                own[f"encoder.layers.{number}.self_attn.{name}_proj.{kind}"] = part
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    missing, strange = model.load_state_dict({prefix + name: value for name, value in own.items()}, strict=False)
    assert not strange
    assert all("post_layernorm" in name or "layers." in name or "position_ids" in name for name in missing), missing
    return model


def t5_of(language: Any) -> T5ForConditionalGeneration:
    config = T5Config(**{**language.config.to_dict(), "dropout_rate": 0.0})
    config._attn_implementation = "eager"
    model = T5ForConditionalGeneration(config).eval()
    weights = {name: value for name, value in language.state_dict().items() if "lm_head" not in name}
    model.load_state_dict(weights, strict=False)
    model.lm_head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)  # one of its own
    model.lm_head.weight.data.copy_(language.lm_head.weight.data)
    assert torch.equal(model.shared.weight, language.shared.weight)
    return model


def alone(model: ClipFlanT5Model, tokenizer: Any, image: bytes, text: str) -> float:
    """A pair's score, from the definition."""
    pixels = torch.from_numpy(np.array(Picture.open(io.BytesIO(image)).convert("RGB"))).permute(2, 0, 1) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        states = clip_of(model.vision)((pixels - mean)[None] / std, output_hidden_states=True).hidden_states
        first, _, second = model.projector
        patches = second(functional.gelu(first(states[-2][:, 1:])))
        t5 = t5_of(model.language)
        before = tokenizer(f"{SYSTEM} USER: ")["input_ids"]
        after = tokenizer(f'\nDoes this figure show "{text}"? Please answer yes or no. ASSISTANT: ')["input_ids"]
        embed = lambda ids: t5.shared(torch.tensor([ids]))  # noqa: E731
        inputs = torch.cat([embed(before), patches, embed(after)], dim=1)
        labels = torch.tensor([tokenizer("Yes")["input_ids"]])
        return math.exp(-t5(inputs_embeds=inputs, labels=labels).loss.item())


def test_scores_are_those_of_transformers_own_modules(parts: tuple[ClipFlanT5Model, Any]) -> None:
    model, tokenizer = parts
    images, texts = judges.images(4), judges.texts(5)
    pairs = every(4, 5)
    found = scorer(parts).score(images, texts, pairs)
    expected = [alone(model, tokenizer, images[i], texts[t]) for i, t in pairs]
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-4)
    assert max(found) > 100 * min(found)


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
def test_a_score_is_the_same_bits_whatever_is_scored_beside_it(
    parts: tuple[ClipFlanT5Model, Any], keep_bytes: int
) -> None:
    images, texts = judges.images(4), judges.texts(9)
    pairs = every(4, 9)
    judge = scorer(parts, keep_bytes=keep_bytes)
    together = dict(zip(pairs, judge.score(images, texts, pairs).tolist(), strict=True))
    assert len({len(judge.prompt(text, "")) for text in texts}) > 3
    shuffled = random.Random(0).sample(pairs, len(pairs))
    for batch in (1, 7, 32):
        judge = scorer(parts, batch=batch, keep_bytes=keep_bytes)
        found: dict[tuple[int, int], float] = {}
        for start in range(0, len(shuffled), batch):
            some = shuffled[start : start + batch]
            found |= zip(some, judge.score(images, texts, some).tolist(), strict=True)
        assert found == together


def test_a_score_is_exp_of_the_mean_and_p_yes_leaves_the_end_out(parts: tuple[ClipFlanT5Model, Any]) -> None:
    judge, images, texts, pairs = scorer(parts), judges.images(2), judges.texts(3), every(2, 3)
    both = judge.log_probabilities(images, texts, pairs)
    assert both.shape == (6, 2) and (both < 0).all()
    assert judge.score(images, texts, pairs).tolist() == np.exp(both.mean(axis=1)).tolist()
    assert judge.score(images, texts, pairs, "p_yes").tolist() == np.exp(both[:, 0]).tolist()
    assert vqascore([[0.0, 0.0]], "p_yes") == vqascore([[0.0, 0.0]]) == 1


def test_the_template_decides_the_encoders_text(parts: tuple[ClipFlanT5Model, Any]) -> None:
    _, tokenizer = parts
    question = 'Does this figure show "a red {star}"? Please answer yes or no.'
    around = {"t5_v1": (f"{SYSTEM} USER: ", f"\n{question} ASSISTANT: "), "t5_plain": ("", question)}
    for template, (before, after) in around.items():
        ids = scorer(parts, template=template).prompt("a red {star}", "text")
        assert ids.tolist() == [*tokenizer(before)["input_ids"], -200, *tokenizer(after)["input_ids"]]
        assert tokenizer(before)["input_ids"][-1] == tokenizer(after)["input_ids"][-1] == tokenizer.eos_token_id


def test_each_image_is_encoded_once(parts: tuple[ClipFlanT5Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    judge, images, texts = scorer(parts), judges.images(3), judges.texts(4)
    seen: list[int] = []
    encode = judge.model.encode

    def counted(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(judge.model, "encode", counted)
    judge.score([*images, images[0]], texts, every(4, 4))
    assert seen == [1, 1, 1], "an image that is there twice too"
    judge.score(images, texts, every(3, 4))
    assert seen == [1, 1, 1], "what was kept is not encoded again"


def test_text_that_would_be_a_special_token_is_removed_and_counted(parts: tuple[ClipFlanT5Model, Any]) -> None:
    judge = scorer(parts)
    texts = {"one": "a <image> red star</s>", "two": "a  red star", "three": "<PAD>blue"}
    assert judge.check(texts) == 2
    assert judge.prompt(texts["one"], "one").tolist() == judge.prompt(texts["two"], "two").tolist()


def test_texts_that_cannot_be_asked_about_are_named(parts: tuple[ClipFlanT5Model, Any]) -> None:
    judge = scorer(parts, max_tokens=50)
    longest = 50 - len(judge.prompt("red", "text")) + 1
    assert len(judge.prompt("red " * longest, "text")) == 50
    with pytest.raises(ConfigError, match=r"^item 3, text 1: its question has 51 tokens, .* at most 50"):
        judge.check({"item 3, text 1": "red " * (longest + 1)})
    with pytest.raises(ConfigError, match=r"^item 4 is empty$"):
        judge.check({"item 4": " </s> "})
    with pytest.raises(ConfigError, match=r"^image 1: an image cannot be read"):
        judge.score([judges.images(1)[0], b"no image"], ["red"], [(0, 0), (1, 0)])


def test_in_bf16_a_score_is_the_same_bits_among_others_with_the_same_batch(
    parts: tuple[ClipFlanT5Model, Any],
) -> None:
    images, texts, pairs = judges.images(3), judges.texts(4), every(3, 4)
    judge = scorer(parts, precision="bf16", batch=4)
    together = judge.score(images, texts, pairs).tolist()
    assert [judge.score(images, texts, [pair]).item() for pair in pairs] == together
    assert together != scorer(parts).score(images, texts, pairs).tolist()
