"""CLIP-FlanT5 against transformers' own T5 and CLIP; what learns, and what a row depends on."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftModelForSeq2SeqLM
from tiny_t5 import (
    FLAN,
    PATCHES,
    SHAPE,
    configured,
    made,
    rows,
    their_inputs,
    their_t5,
    their_tower,
    tokenizer_file,
)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config

from hpc_mm.config import ClipFlanT5, ConfigError, Language, Lora
from hpc_mm.models.clip_flant5 import ClipFlanT5Model, load_tokenizer
from hpc_mm.models.clip_flant5_weights import open_clip_names
from hpc_mm.models.lora import save_adapter
from hpc_mm.models.t5 import UntiedT5

pytestmark = pytest.mark.usefixtures("one_thread")
TIED = {**SHAPE, "feed_forward_proj": "relu"}
LORA = Lora(rank=3, dropout=0.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tokenizer_file(tmp_path_factory.mktemp("tokenizer"))


def learning(model: ClipFlanT5Model) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def open_updates(model: ClipFlanT5Model) -> None:
    """LoRA's second matrices are zero at first."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("architecture", [FLAN, TIED], ids=["flan", "tied"])
def test_inputs_logits_and_loss_are_those_of_transformers(tokenizer: str, architecture: dict[str, Any]) -> None:
    model, tower, batch = made(configured(tokenizer, architecture)).eval(), their_tower(3), rows()
    model.vision.load_state_dict(
        {
            name: value
            for name, value in open_clip_names(tower.state_dict()).items()
            if name in model.vision.state_dict()
        }
    )
    ids, mask, images, counts, labels = batch
    inputs, seen = their_inputs(model, tower, batch)
    read = []
    model.language.encoder.register_forward_pre_hook(
        lambda _module, _args, given: read.append(given["inputs_embeds"]), with_kwargs=True
    )
    theirs = their_t5(model)
    expected = theirs(inputs_embeds=inputs, attention_mask=seen, labels=labels)
    found = model.logits(ids, mask, model.encode(images), counts, labels)
    assert read[0].shape == (4, 5 + 2 * PATCHES, 32)
    torch.testing.assert_close(read[0][seen], inputs[seen], atol=1e-5, rtol=1e-5)
    kept = labels != -100
    torch.testing.assert_close(found[kept], expected.logits[kept], atol=1e-5, rtol=1e-5)
    loss = model(ids, mask, images, counts, labels) / kept.sum()
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert loss.dtype == found.dtype == torch.float32


def test_text_alone_equals_transformers_on_ids(tokenizer: str) -> None:
    model = made(configured(tokenizer)).eval()
    ids, mask, _, _, labels = (part[2:3] for part in rows())
    none = torch.zeros(0, 3, 16, 16)
    found = model.logits(ids, mask, model.encode(none), torch.tensor([0]), labels)
    expected = their_t5(model)(input_ids=ids, attention_mask=mask, labels=labels).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_head_is_untied_where_the_language_models_is(tokenizer: str, tmp_path: Path) -> None:
    untied, tied = made(configured(tokenizer)), made(configured(tokenizer, TIED))
    assert tied.language.lm_head.weight is tied.language.shared.weight
    assert untied.language.lm_head.weight is not untied.language.shared.weight
    names = {name for name, _ in untied.named_parameters()}
    assert {"language.lm_head.weight", "language.shared.weight"} <= names
    assert not any("embed_tokens" in name for name in names)
    config = T5Config(**FLAN, vocab_size=64, decoder_start_token_id=0)  # rows beyond the tokenizer's, as FlanT5 has
    saved = UntiedT5(config)
    saved.save_pretrained(tmp_path)
    for _ in range(2):  # as transformers 5 writes it, and as FlanT5's config.json says it
        language = Language(name=str(tmp_path), tokenizer=tokenizer)
        model = made(ClipFlanT5(vision=configured(tokenizer).vision, language=language, dropout=0.25))
        assert torch.equal(model.language.lm_head.weight, saved.lm_head.weight)
        assert torch.equal(model.language.shared.weight, saved.shared.weight)
        dropouts = {module.p for module in model.language.modules() if isinstance(module, torch.nn.Dropout)}
        assert dropouts == {0.25} and model.language.decoder.block[0].layer[0].SelfAttention.dropout == 0.25
        text = (tmp_path / "config.json").read_text().replace('"scale_decoder_outputs": false,', "")
        (tmp_path / "config.json").write_text(text.replace('embeddings": true', 'embeddings": false'))
    ids, mask, images, counts, labels = rows()
    assert model.logits(ids, mask, model.encode(images), counts, labels).shape == (4, 6, 60)


# ---------------------------------------------------------------- rows and images


def test_a_row_does_not_depend_on_the_others(tokenizer: str) -> None:
    model = made(configured(tokenizer)).eval()
    ids, mask, images, counts, labels = rows()
    together = model.logits(ids, mask, model.encode(images), counts, labels)
    own = images.split(counts.tolist())
    for row in range(4):
        length, answer = int(mask[row].sum()), int((labels[row] != -100).sum())
        alone = model.logits(
            ids[row : row + 1, :length],
            mask[row : row + 1, :length],
            model.encode(own[row]),
            counts[row : row + 1],
            labels[row : row + 1, :answer],
        )
        torch.testing.assert_close(alone[0], together[row, :answer], atol=1e-5, rtol=1e-5)


def test_an_answer_depends_on_its_images_alone(tokenizer: str) -> None:
    model = made(configured(tokenizer)).eval()
    ids, mask, images, counts, labels = rows()
    before = model.logits(ids, mask, model.encode(images), counts, labels)
    images[2] *= -3  # the second row's second
    after = model.logits(ids, mask, model.encode(images), counts, labels)
    assert [bool((one != other).any()) for one, other in zip(before, after, strict=True)] == [False, True, False, False]


def run(model: ClipFlanT5Model, shared: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients where the samples of ``rows`` share rows so."""
    ids, mask, images, counts, labels = rows()
    own = images.split(counts.tolist())

    def joined(table: Tensor, kept: Tensor, value: int) -> tuple[Tensor, Tensor]:
        pad = partial(pad_sequence, batch_first=True)
        tokens = [torch.cat([table[i][kept[i]] for i in row]) for row in shared]
        numbers = [torch.cat([torch.full((int(kept[i].sum()),), n) for n, i in enumerate(row)]) for row in shared]
        return pad(tokens, padding_value=value), pad(numbers, padding_value=-1)

    (input_ids, segments), (answers, answer_segments) = joined(ids, mask > 0, 0), joined(labels, labels != -100, -100)
    model.zero_grad()
    loss = model(
        input_ids,
        (segments >= 0).long(),
        torch.cat([own[i] for row in shared for i in row]),
        torch.tensor([sum(int(counts[i]) for i in row) for row in shared]),
        answers,
        segments=segments,
        answer_segments=answer_segments,
    )
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in learning(model).items()}


@pytest.mark.parametrize("values", [{}, {"trainable": ("projector",)}, {"lora": LORA, "gradient_checkpointing": True}])
@pytest.mark.parametrize("architecture", [FLAN, TIED], ids=["flan", "tied"])
@pytest.mark.parametrize("shared", [[[0, 1, 2, 3]], [[3, 0], [2, 1]], [[2, 3, 1], [0]]])
def test_samples_that_share_a_row_do_not_see_each_other(
    tokenizer: str, values: dict[str, Any], architecture: dict[str, Any], shared: list[list[int]]
) -> None:
    model = made(configured(tokenizer, architecture, dropout=0.0, **values))
    open_updates(model)
    ids, mask, images, counts, labels = rows()
    plain = model(ids, mask, images, counts, labels)
    alone, packed = run(model, [[i] for i in range(4)]), run(model, shared)
    torch.testing.assert_close(alone[0], plain, atol=0, rtol=1e-6)
    torch.testing.assert_close(packed[0], plain, atol=0, rtol=1e-6)
    for name, gradient in alone[1].items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(packed[1][name], gradient, atol=1e-5 * max(scale, 1), rtol=1e-4, msg=name)


def test_shared_rows_in_bf16(tokenizer: str) -> None:
    model = made(configured(tokenizer, dropout=0.0), precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        alone, packed = run(model, [[i] for i in range(4)]), run(model, [[0, 1, 2, 3]])
    torch.testing.assert_close(packed[0], alone[0], atol=0, rtol=2e-3)
    for name, gradient in alone[1].items():
        assert (packed[1][name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_generation_follows_the_logits(tokenizer: str) -> None:
    model = made(configured(tokenizer)).eval()
    ids, mask, images, counts, _ = rows()
    features = model.encode(images)
    answers = model.generate(ids, mask, features, counts, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answers.shape == (4, 5)
    logits = model.logits(ids, mask, features, counts, answers)
    logits[..., model.end_id] = -torch.inf
    assert torch.equal(logits.argmax(dim=-1), answers)


def test_image_spec(tokenizer: str) -> None:
    spec = made(configured(tokenizer)).image_spec
    assert (spec.size, spec.square, spec.tokens) == (16, "pad", PATCHES)
    assert made(configured(tokenizer, square="crop")).image_spec.square == "crop"


# ---------------------------------------------------------------- what learns


@pytest.mark.parametrize("trainable", [("projector",), ("language",), ("projector", "language")])
@pytest.mark.parametrize("images", [4, 0])
def test_what_learns_gets_a_gradient(tokenizer: str, trainable: Any, images: int) -> None:
    model = made(configured(tokenizer, trainable=trainable))
    ids, mask, pictures, counts, labels = rows()
    if not images:
        ids, mask, pictures, counts, labels = ids[2:3], mask[2:3], pictures[:0], counts[2:3], labels[2:3]
    model(ids, mask, pictures, counts, labels).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (model.part_of(name) in trainable), name
        if parameter.grad is not None and name.startswith("projector."):
            assert bool(parameter.grad.any()) == bool(images), name


def test_no_target_gives_zero_gradients(tokenizer: str) -> None:
    model = made(configured(tokenizer))
    ids, mask, images, counts, labels = rows()
    loss = model(torch.zeros_like(ids[:1, :1]), mask[:1, :1] * 0, images[:0], counts[2:3], labels[:1] * 0 - 100)
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in learning(model).values())


@pytest.mark.parametrize("values", [{}, {"trainable": ("projector",)}, {"lora": LORA}])
def test_a_step_lowers_the_loss_and_moves_what_learns(tokenizer: str, values: dict[str, Any]) -> None:
    model, batch = made(configured(tokenizer, dropout=0.0, **values)), rows()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(learning(model).values(), lr=1e-3)
    losses = []
    for _ in range(3):
        losses.append(model(*batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(learning(model))


def test_a_frozen_language_model_keeps_its_dropout_and_the_tower_has_none(tokenizer: str) -> None:
    model, batch = made(configured(tokenizer, trainable=("projector",), dropout=0.5)), rows()
    assert not torch.equal(model(*batch), model(*batch))
    assert torch.equal(model.encode(batch[2]), model.encode(batch[2])) and not model.vision.training
    assert torch.equal(model.eval()(*batch), model(*batch))


def test_decay_is_of_matrices(tokenizer: str) -> None:
    model = made(configured(tokenizer))
    decays = {name for name, parameter in model.named_parameters() if model.decays(name, parameter)}
    assert {"projector.0.weight", "language.lm_head.weight"} <= decays
    assert "language.encoder.block.0.layer.0.SelfAttention.q.weight" in decays
    assert not [name for name in decays if any(word in name for word in ("shared", "bias", "norm"))]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("images", [4, 0])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"trainable": ("projector",)},
        {"lora": Lora(rank=3, dropout=0.1)},
        {"lora": LORA, "trainable": ("language",)},  # the encoder reads what has no gradient
    ],
)
def test_gradient_checkpointing_changes_nothing(
    tokenizer: str, values: dict[str, Any], images: int, precision: str
) -> None:
    plain = made(configured(tokenizer, **values), precision=precision)
    saving = made(configured(tokenizer, gradient_checkpointing=True, **values), precision=precision)
    ids, mask, pictures, counts, labels = rows()
    if not images:
        ids, mask, pictures, counts, labels = ids[2:3], mask[2:3], pictures[:0], counts[2:3], labels[2:3]
    for model in (plain, saving):
        open_updates(model)
        torch.manual_seed(3)  # of dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(ids, mask, pictures, counts, labels).backward()
    for (name, one), other in zip(learning(plain).items(), learning(saving).values(), strict=True):
        assert one.grad is not None and torch.equal(one.grad, other.grad), name
        assert bool(one.grad.any()) == bool(images or not name.startswith("projector.")), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.chaos  # most of a minute
def test_compilation_changes_nothing(tokenizer: str) -> None:
    small = {**FLAN, "num_layers": 1}
    plain, compiled = (made(configured(tokenizer, small, dropout=0.0, gradient_checkpointing=True)) for _ in range(2))
    compiled.compile_parts(backend="aot_eager")
    for model in (plain, compiled):
        model(*rows()).backward()
    for (name, one), other in zip(learning(plain).items(), learning(compiled).values(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    torch._dynamo.reset()


@pytest.mark.parametrize("values", [{}, {"trainable": ("projector",)}, {"lora": LORA}])
def test_bf16(tokenizer: str, values: dict[str, Any]) -> None:
    full, half = (
        made(configured(tokenizer, **values)).eval(),
        made(configured(tokenizer, **values), precision="bf16").eval(),
    )
    assert {p.dtype for p in half.parameters() if not p.requires_grad} <= {torch.bfloat16}
    assert {p.dtype for p in learning(half).values()} == {torch.float32}
    ids, mask, images, counts, labels = rows()
    expected = full.logits(ids, mask, full.encode(images), counts, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = half.logits(ids, mask, half.encode(images), counts, labels)
        half(*rows()).backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1)
    whole = copy.deepcopy(full).to(torch.bfloat16)  # without autocast, as DeepSpeed runs it
    torch.testing.assert_close(
        whole.logits(ids, mask, whole.encode(images), counts, labels), expected, atol=0.1, rtol=0.1
    )


def test_seed_decides(tokenizer: str) -> None:
    state = torch.get_rng_state()
    one, same, other = (made(configured(tokenizer, lora=LORA), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    for name in ("vision.conv1.weight", "projector.0.weight", "language.lm_head.weight"):
        assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize("values", [{}, {"trainable": ("projector",)}, {"lora": LORA}])
def test_training_flops(tokenizer: str, values: dict[str, Any]) -> None:
    model = made(configured(tokenizer, {**FLAN, "num_decoder_layers": 3}, dropout=0.0, **values))
    ids = torch.randint(5, 60, (2, 30))
    ids[:, 3] = -200
    labels = torch.randint(5, 60, (2, 8))
    with FlopCounterMode(display=False) as counter:
        model(ids, torch.ones_like(ids), torch.randn(2, 3, 16, 16), torch.tensor([1, 1]), labels).backward()
    source = 2 * (29 + PATCHES)
    estimate = model.training_flops(tokens=source + 16, pairs=source**2 // 2, images=2, targets=16)
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.05)


# ---------------------------------------------------------------- LoRA


def test_lora_trains_its_updates_and_the_projector(tokenizer: str) -> None:
    names = set(learning(made(configured(tokenizer, lora=LORA))))
    updates = {name for name in names if ".lora_" in name}
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in updates} == {*"qkvo", "wi_0", "wi_1", "wo"}
    assert len(updates) == 2 * (2 * 7 + 2 * 11)
    assert names - updates == {f"projector.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert set(learning(made(configured(tokenizer, lora=LORA, trainable=("language",))))) == updates


def test_lora_starts_as_the_model_without_and_ends_as_the_merged_one(tokenizer: str) -> None:
    model, plain = made(configured(tokenizer, lora=LORA)).eval(), made(configured(tokenizer)).eval()
    plain.projector.load_state_dict(model.projector.state_dict())
    ids, mask, images, counts, labels = rows()

    def logits(of: ClipFlanT5Model) -> Tensor:
        return of.logits(ids, mask, of.encode(images), counts, labels)

    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)
    open_updates(model)
    assert not torch.allclose(logits(model), logits(plain), atol=1e-2)
    for name, value in model.named_parameters():
        if name.endswith(".lora_A.default.weight"):
            stem = name.removesuffix(".lora_A.default.weight")
            delta = model.get_parameter(f"{stem}.lora_B.default.weight") @ value * LORA.alpha / LORA.rank
            plain.get_parameter(f"{stem}.weight").data += delta
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks it
def test_peft_reads_the_updates(tokenizer: str, tmp_path: Path) -> None:
    model = made(configured(tokenizer, lora=LORA)).eval()
    open_updates(model)
    save_adapter(LORA, "google/flan-t5-xl", dict(learning(model)), tmp_path)
    theirs = their_t5(made(configured(tokenizer)))
    read = PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert isinstance(read, PeftModelForSeq2SeqLM)
    ids, mask, _, _, labels = (part[2:3] for part in rows())
    found = model.logits(ids, mask, model.encode(torch.zeros(0, 3, 16, 16)), torch.tensor([0]), labels)
    expected = read(input_ids=ids, attention_mask=mask, labels=labels).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({**FLAN, "model_type": "llama"}, "model_type='llama' must be t5"),
        ({**FLAN, "num_head": 4}, "did you mean num_heads"),
        ({**FLAN, "feed_forward_proj": "a-b-c"}, "feed_forward_proj"),
        ({**FLAN, "vocab_size": 50}, "50 token rows, fewer than the 60 tokens"),
    ],
)
def test_mistakes_are_told_in_one_line(tokenizer: str, architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        made(configured(tokenizer, architecture))
    assert "\n" not in str(error.value)


def test_lora_of_a_frozen_language_model_is_refused(tokenizer: str) -> None:
    with pytest.raises(ValueError, match="not in trainable"):
        configured(tokenizer, lora=LORA, trainable=("projector",))


def test_every_text_ends_with_eos(tokenizer: str) -> None:
    loaded = load_tokenizer(Language(tokenizer=tokenizer))
    assert loaded("w9 w10")["input_ids"] == [9, 10, 2] and loaded("")["input_ids"] == [2]
    assert (loaded.base_size, loaded.pad_token_id, loaded.eos_token_id) == (60, 0, 2)
