"""Answers beside what the model gives for each prompt alone, without kept features, caches or shared beginnings."""

from __future__ import annotations

import random

import numpy as np
import pytest
import samples
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from hpc_mm.answering import Candidates, FlamingoAnswers
from hpc_mm.benchmark import Decoding
from hpc_mm.config import ConfigError, Flamingo, Language, Vision
from hpc_mm.data.batch import normalised
from hpc_mm.data.images import decode
from hpc_mm.data.schema import Image, Sample, Text
from hpc_mm.features import Features
from hpc_mm.models.flamingo import FlamingoModel, build, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 128
FAMILIES = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"max_position_embeddings": CONTEXT},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "max_position_embeddings": CONTEXT},
}
CLASSES = [
    "red",
    "red circle",
    "red circle left",
    "red star",
    "blue",
    "of the left",
    "of the right",
    "of",
    "red circle",
]
DECODING = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = ["</s>", "<unk>", *samples.WORDS, *(f"w{number}" for number in range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return str(file)


def made(tokenizer_file: str, family: str) -> tuple[FlamingoModel, object]:
    """A model whose matrices are large and whose gates are open, so that texts and images matter."""
    language = Language(tokenizer=tokenizer_file, architecture={"model_type": family, **FAMILIES[family]})
    tower = {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
    config = Flamingo(vision=Vision(architecture=tower), language=language, resampler_depth=1, resampler_latents=4)
    tokenizer = load_tokenizer(language)
    model = build(config, tokenizer, seed=0).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(1.0)
        elif parameter.ndim > 1 and name.startswith("language"):
            parameter.data.mul_(4.0)
    return model, tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def parts(request: pytest.FixtureRequest, tokenizer_file: str) -> tuple[FlamingoModel, object]:
    return made(tokenizer_file, request.param)


@pytest.fixture(scope="module")
def llama(tokenizer_file: str) -> tuple[FlamingoModel, object]:
    return made(tokenizer_file, "llama")


def prompt(number: int, shots: int) -> Sample:
    """Demonstrations of a set of five images, and a question about an image of its own."""
    draw = random.Random(number)
    found: list[Text | Image] = []
    for demonstration in draw.sample(range(5), shots):
        caption = Text(f" {samples.sentence(draw)} <|endofchunk|>\n")
        found += [Image(samples.encoded(samples.picture(demonstration))), caption]
    return Sample(f"q{number}", (*found, Image(samples.encoded(samples.picture(100 + number))), Text(" the")))


def prompts(count: int) -> list[Sample]:
    """With nought to three shots, and one without any image."""
    return [*(prompt(number, shots=number % 4) for number in range(count - 1)), Sample("blind", (Text("a red"),))]


def inputs(model: FlamingoModel, tokenizer: object, sample: Sample) -> tuple[Tensor, Tensor]:
    """Tokens (1, T) and pixels of one prompt, as the tests have it."""
    text = "".join(part.text if isinstance(part, Text) else "<image>" for part in sample.parts)
    pictures = [decode(image.data or b"", model.image_spec) for image in sample.images]
    return torch.tensor([tokenizer(text)["input_ids"]]), normalised(pictures, model.image_spec)


def alone(model: FlamingoModel, tokenizer: object, sample: Sample, beams: int) -> str:
    """Written without any key, value or feature that was kept."""
    ids, images = inputs(model, tokenizer, sample)
    how = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False, "use_cache": False}
    how |= {"length_penalty": 0.0} if beams > 1 else {}
    written = model.generate(ids, torch.ones_like(ids), images, torch.tensor([len(images)]), **how)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_those_of_each_prompt_alone(parts: tuple[FlamingoModel, object], beams: int) -> None:
    asked = prompts(10)
    texts = FlamingoAnswers(*parts, "cpu", batch=4).generate(asked, Decoding(max_new_tokens=6, beams=beams))
    assert texts == [alone(*parts, sample, beams) for sample in asked]
    assert len(set(texts)) > 2  # they say something


@pytest.mark.parametrize("keep_bytes", [0, 5000, 2**20])
def test_texts_do_not_depend_on_the_batch_nor_on_what_is_kept(
    llama: tuple[FlamingoModel, object], keep_bytes: int
) -> None:
    asked = prompts(33)
    of_batch = [
        FlamingoAnswers(*llama, "cpu", batch, keep_bytes=keep_bytes).generate(asked, DECODING) for batch in (1, 7, 32)
    ]
    assert of_batch[0] == of_batch[1] == of_batch[2]


def test_scores_are_those_of_each_candidate_alone(parts: tuple[FlamingoModel, object]) -> None:
    model, tokenizer = parts
    asked = prompts(6)
    scores = FlamingoAnswers(model, tokenizer, "cpu", batch=4).score(asked, CLASSES)
    assert scores.shape == (6, 9) and scores.std() > 0.1
    for sample, found in zip(asked, scores, strict=True):
        ids, images = inputs(model, tokenizer, sample)
        for name, score in zip(CLASSES, found, strict=True):
            own = torch.tensor([tokenizer(name, add_special_tokens=False)["input_ids"]])
            both = torch.cat([ids, own], dim=1)
            with torch.no_grad():
                logits = model(both, torch.ones_like(both), images, torch.tensor([len(images)]))
            chances = logits[0, ids.shape[1] - 1 : -1].log_softmax(dim=-1)
            expected = chances.gather(1, own[0, :, None]).mean().item()
            assert score == pytest.approx(expected, abs=1e-5), name


def test_scores_are_the_same_bits_whatever_is_asked_together(
    llama: tuple[FlamingoModel, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(12)
    whole = FlamingoAnswers(*llama, "cpu", batch=7).score(asked, CLASSES)
    others = FlamingoAnswers(*llama, "cpu", keep_bytes=5000)
    for start, end in ((7, 12), (0, 1), (1, 7)):
        assert np.array_equal(others.score(asked[start:end], CLASSES), whole[start:end])
    others.generate(asked[:3], DECODING)
    assert np.array_equal(others.score(asked[::-1], CLASSES), whole[::-1])
    monkeypatch.setattr("hpc_mm.answering.CACHED", 60)  # a row or two of candidates at a time: another rounding
    np.testing.assert_allclose(others.score(asked, CLASSES), whole, atol=1e-5, rtol=0)


def test_features_are_the_same_bits_whichever_images_are_encoded_together(
    llama: tuple[FlamingoModel, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where several are encoded at once, the last of them beside copies."""
    asked = [prompt(number, shots=3) for number in range(8)]

    def features(answers: FlamingoAnswers, *samples: Sample) -> dict[bytes, Tensor]:
        return answers._encoded([answers._prompt(sample, 1) for sample in samples])

    for size in (1, 8):
        monkeypatch.setattr("hpc_mm.features.at_once", lambda device, size=size: size)
        whole = features(FlamingoAnswers(*llama, "cpu"), *asked)
        assert len(whole) == 13
        for keep_bytes in (0, 5000, 2**20):
            answers = FlamingoAnswers(*llama, "cpu", keep_bytes=keep_bytes)
            for some in (asked[6:], asked[3:4], asked[::-1]):
                found = features(answers, *some)
                assert found and all(torch.equal(feature, whole[digest]) for digest, feature in found.items())


def test_every_image_is_encoded_once(llama: tuple[FlamingoModel, object], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = llama
    asked = [prompt(number, shots=3) for number in range(8)]  # 8 images of their own, and the five of the set
    for size, batches in ((1, [1] * 13), (8, [8, 8])):
        monkeypatch.setattr("hpc_mm.features.at_once", lambda device, size=size: size)
        answers, seen = FlamingoAnswers(model, tokenizer, "cpu", batch=4), []
        hook = model.vision.register_forward_hook(lambda _module, given, _found, seen=seen: seen.append(len(given[0])))
        answers.generate(asked, DECODING)
        answers.score(asked, CLASSES)
        hook.remove()
        assert seen == batches


def test_features_of_images_that_were_not_used_longest_are_dropped() -> None:
    kept = Features(limit=3 * 40)
    for name in (b"a", b"b", b"c"):
        kept.put(name, torch.zeros(10))
    assert kept.get(b"a") is not None
    kept.put(b"d", torch.zeros(20))
    assert [kept.get(name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, False, True]
    assert kept.bytes == 120
    kept.put(b"e", torch.zeros(31))  # more than all may take
    assert not kept.kept and kept.bytes == 0


def test_candidates_share_what_they_begin_with() -> None:
    tree = Candidates([(1,), (1, 2, 3), (1, 2, 4), (1, 5), (6, 7), (6,)])
    assert tree.rows.tolist() == [[6, 0], [1, 2]]
    assert tree.places.tolist()[1:5] == [1, 1, 1, 0]
    assert Candidates([(1,), (2,)]).rows.shape[1] == 0


def written_by(llama: tuple[FlamingoModel, object], *found: Text | Image) -> list[int]:
    return FlamingoAnswers(*llama, "cpu")._prompt(Sample("q", found), 1).input_ids.tolist()


def test_only_image_parts_are_images_and_only_endofchunk_is_a_token(llama: tuple[FlamingoModel, object]) -> None:
    model, tokenizer = llama
    picture = Image(samples.encoded(samples.picture(0)))
    harmless = written_by(llama, Text("a red "), picture, Text("circle"))
    assert harmless.count(model.image_id) == 1
    assert written_by(llama, Text("a <image>red </s>"), picture, Text("<ima<image>"), Text("ge>circle")) == harmless
    for end in ([Text("circle<|endofchunk|>\n")], [Text("circle"), Text("<|endofchunk|>")]):
        assert written_by(llama, *end) == [*written_by(llama, Text("circle")), model.end_id]
    two_shots = Sample("q", (Text("red<|endofchunk|>blue<|endofchunk|>"), picture, Text("the")))
    assert FlamingoAnswers(model, tokenizer, "cpu").generate([two_shots], DECODING) == [
        alone(model, tokenizer, two_shots, beams=3)
    ]


def test_a_prompt_of_the_whole_context_and_one_longer(parts: tuple[FlamingoModel, object]) -> None:
    answers = FlamingoAnswers(*parts, "cpu")
    fits = Sample("fits", (Text("red " * (CONTEXT - 6)),))
    assert len(answers.generate([fits], DECODING)) == 1
    long = Sample("q7", (Text("red " * (CONTEXT - 5)),))
    with pytest.raises(ConfigError, match=r"question q7: its prompt of 123 tokens and 6 of .* context of 128"):
        answers.generate([fits, long], DECODING)
    with pytest.raises(ConfigError, match=r"question q7: .* and 6 of an answer"):
        answers.score([fits, long], ["red", "a red circle of the left"])
    picture = Sample("picture", (Text("red " * (CONTEXT - 7)), Image(None, "there"), Text("")))  # not read yet
    for given in (DECODING, ["red", "a red circle of the left"]):
        answers.check([fits, picture], given)
        with pytest.raises(ConfigError, match=r"question q7: its prompt of 123 tokens and 6 of .* context of 128"):
            answers.check([fits, long], given)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((Image(key="somewhere"), Text("a")), "question q: part 0 is an image without its bytes"),
        ((Image(b"no picture"), Text("a")), "question q: an image cannot be read"),
        ((Text("</s>"),), "question q: its prompt is empty"),
    ],
)
def test_a_prompt_that_cannot_be_asked(
    llama: tuple[FlamingoModel, object], found: tuple[Text | Image, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        FlamingoAnswers(*llama, "cpu").generate([prompt(0, 1), Sample("q", found)], DECODING)


def test_candidates_that_cannot_be_scored(llama: tuple[FlamingoModel, object]) -> None:
    answers = FlamingoAnswers(*llama, "cpu")
    with pytest.raises(ConfigError, match="candidate '<image>' has no token"):
        answers.score(prompts(1), ["red", "<image>"])
    with pytest.raises(ConfigError, match="no candidates"):
        answers.score(prompts(1), [])


def test_nothing_asked(llama: tuple[FlamingoModel, object]) -> None:
    answers = FlamingoAnswers(*llama, "cpu")
    assert answers.generate([], DECODING) == [] and answers.score([], CLASSES).shape == (0, 9)


def test_bf16(llama: tuple[FlamingoModel, object]) -> None:
    exact = FlamingoAnswers(*llama, "cpu").score(prompts(4), CLASSES)
    rounded = FlamingoAnswers(*llama, "cpu", precision="bf16")
    np.testing.assert_allclose(rounded.score(prompts(4), CLASSES), exact, atol=1.0)
    assert len(rounded.generate(prompts(4), DECODING)) == 4
