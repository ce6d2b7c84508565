"""The model on every language family: training, generation, freezing, positions, precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from tiny import BATCH, FAMILIES, WORDS, ragged, sharpen
from torch import Tensor

from hpc_mm.config import ConfigError
from hpc_mm.models.flamingo import FlamingoModel

Make = Callable[..., FlamingoModel]
EVERYTHING = ("vision", "language", "resampler", "cross_attention", "new_tokens")
families = pytest.mark.parametrize("family", FAMILIES)


def loss_of(model: FlamingoModel, batch: BATCH) -> Tensor:
    ids = batch[0]
    logits = model(*batch)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@families
def test_a_step_lowers_the_loss(make: Make, batch: BATCH, family: str) -> None:
    model = make(family, trainable=EVERYTHING)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = loss_of(model, batch)
    before.backward()
    optimizer.step()
    assert loss_of(model.eval(), batch) < before


@families
def test_generation_sees_the_images(make: Make, family: str) -> None:
    model = make(family).eval()
    sharpen(model)
    ids, mask, images, counts = ragged(left=True)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    one = model.generate(ids, mask, images, counts, **how)
    other = model.generate(ids, mask, -3 * images, counts, **how)
    assert one.shape == (4, 18)
    assert torch.equal(one[:, :12], ids)
    assert torch.equal(one[2], other[2])  # the row without images
    assert not torch.equal(one, other)


@families
def test_generation_with_a_cache_equals_one_without(make: Make, family: str) -> None:
    model = make(family).eval()
    sharpen(model)
    ids, mask, images, counts = ragged(left=True)
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(
        model.generate(ids, mask, images, counts, **how),
        model.generate(ids, mask, images, counts, use_cache=False, **how),
    )


@families
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_after_padding_equals_each_row_alone(make: Make, family: str, beams: int) -> None:
    model = make(family).eval()
    sharpen(model)
    ids, mask, images, counts = ragged(left=True)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    together = model.generate(ids, mask, images, counts, **how)[:, 12:]
    for row, own in enumerate(images.split(counts.tolist())):
        prompt = ids[row : row + 1, mask[row].bool()]
        alone = model.generate(prompt, torch.ones_like(prompt), own, counts[row : row + 1], **how)
        assert torch.equal(alone[0, prompt.shape[1] :], together[row]), row


def test_images_are_encoded_once_for_all_beams(make: Make) -> None:
    model = make().eval()
    seen = []
    model.vision.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    ids, mask, images, counts = ragged(left=True)
    assert len(model.generate(ids, mask, images, counts, num_beams=3, max_new_tokens=4)) == 4
    sampled = model.generate(ids, mask, images, counts, num_return_sequences=2, do_sample=True, max_new_tokens=4)
    assert len(sampled) == 8
    assert seen == [4, 4]


def test_generated_image_tokens_do_not_break(make: Make) -> None:
    model = make().eval()
    ids, mask, images, counts = ragged(left=True)

    def only_images(batch: int, sent: Tensor) -> list[int]:
        return [model.image_id]

    found = model.generate(ids, mask, images, counts, max_new_tokens=3, prefix_allowed_tokens_fn=only_images)
    assert (found[:, 12:] == model.image_id).all()


def test_ends_at_endofchunk(make: Make) -> None:
    model = make().eval()
    model.language.get_output_embeddings().new_rows.data[0] = 0.0
    ids, mask, images, counts = ragged(left=True)

    def first_end(batch: int, sent: Tensor) -> list[int]:
        return [model.end_id]

    found = model.generate(ids, mask, images, counts, max_new_tokens=5, prefix_allowed_tokens_fn=first_end)
    assert found.shape == (4, 13)


@families
@pytest.mark.parametrize("trainable", [("resampler", "cross_attention", "new_tokens"), EVERYTHING])
def test_every_learning_parameter_gets_a_gradient(make: Make, family: str, trainable: tuple[str, ...]) -> None:
    model = make(family, trainable=trainable)
    loss_of(model, ragged(left=False)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (model.part_of(name) in trainable), name
    assert model.resampler.latents.grad.abs().sum() > 0


def test_a_batch_without_images_gives_zero_gradients_not_none(make: Make) -> None:
    model = make(trainable=EVERYTHING)
    ids = torch.randint(1, WORDS, (2, 8))
    loss_of(model, (ids, torch.ones_like(ids), torch.zeros(0, 3, 16, 16), torch.tensor([0, 0]))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        unused = name.startswith(("vision.", "resampler.")) or ".attn" in name.partition("gated_cross_attn_layer")[2]
        assert bool(parameter.grad.count_nonzero()) != unused or model.part_of(name) == "new_tokens", name


def test_nothing_is_a_target(make: Make, batch: BATCH) -> None:
    model = make()
    logits = model(*batch, positions=torch.zeros_like(batch[0], dtype=torch.bool))
    assert logits.shape == (0, model.vocabulary)
    (logits.sum() * 0.0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@families
def test_logits_at_positions_are_those_of_all(make: Make, batch: BATCH, family: str) -> None:
    model = make(family).eval()
    positions = torch.rand(batch[0].shape, generator=torch.Generator().manual_seed(0)) < 0.3
    torch.testing.assert_close(model(*batch, positions=positions), model(*batch)[positions])
    assert model(*batch).shape == (4, 12, model.vocabulary)


def test_a_row_does_not_depend_on_the_others(make: Make, batch: BATCH) -> None:
    model = make().eval()
    ids, mask, images, counts = batch
    logits = model(ids, mask, images, counts)
    first = 0
    for row, count in enumerate(counts.tolist()):
        own = images[first : first + count]
        alone = model(ids[row : row + 1], mask[row : row + 1], own, counts[row : row + 1])
        torch.testing.assert_close(alone[0], logits[row], atol=1e-5, rtol=1e-4)
        first += count


def test_frozen_parts_stay_without_dropout(make: Make, batch: BATCH) -> None:
    frozen, learning = make("opt"), make("opt", trainable=EVERYTHING)
    assert frozen.training and torch.equal(frozen(*batch), frozen(*batch))
    assert not torch.equal(learning(*batch), learning(*batch))
    assert not any(module.training for module in [*frozen.vision.modules(), *frozen.language.modules()])


def test_frozen_weights_do_not_move_and_new_rows_do(make: Make, batch: BATCH) -> None:
    model = make("mpt")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    loss_of(model, batch).backward()
    optimizer.step()
    moved = {model.part_of(name) for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"resampler", "cross_attention", "new_tokens"}


def test_seed_decides_and_the_global_generator_is_left_alone(make: Make) -> None:
    state = torch.get_rng_state()
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(one.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.resampler.latents, other.resampler.latents)
    assert not torch.equal(one.vision.conv1.weight, other.vision.conv1.weight)


@pytest.mark.parametrize("trainable", [("resampler", "cross_attention", "new_tokens"), EVERYTHING])
def test_gradient_checkpointing_changes_nothing(make: Make, batch: BATCH, trainable: tuple[str, ...]) -> None:
    plain = make(trainable=trainable)
    saving = make(trainable=trainable, gradient_checkpointing=True)
    for model in (plain, saving):
        loss_of(model, batch).backward()
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.parametrize(("family", "checkpointing"), [("llama", False), ("llama", True), ("mpt", True)])
def test_compilation_changes_nothing(make: Make, batch: BATCH, family: str, checkpointing: bool) -> None:
    plain, compiled = make(family), make(family, gradient_checkpointing=checkpointing)
    compiled.compile_parts(backend="aot_eager")  # traces forward and backward; code generation alone is left out
    for images in (4, 3):  # another shape: compiled again, or for any
        ids, mask, pictures, counts = (part[:images] for part in batch)
        sample = (ids, mask, pictures[: int(counts.sum())], counts)
        for model in (plain, compiled):
            model.zero_grad()
            loss_of(model, sample).backward()
        assert [name for name, _ in plain.named_parameters()] == [name for name, _ in compiled.named_parameters()]
        for (name, one), two in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, msg=name)
    torch._dynamo.reset()


def test_bf16(make: Make, batch: BATCH) -> None:
    model = make().eval()
    full = model(*batch)
    ids, mask, images, counts = batch
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(*batch).float(), full, atol=0.05, rtol=0.05)
    half = model.to(torch.bfloat16)
    assert half(ids, mask, images, counts).dtype == torch.bfloat16  # images are cast to the tower's type
    torch.testing.assert_close(half(ids, mask, images, counts).float(), full, atol=0.05, rtol=0.05)
    ids, mask, images, counts = ragged(left=True)
    assert half.generate(ids, mask, images, counts, max_new_tokens=3, num_beams=2).shape[0] == 4


def test_vision_tokens_before_and_after_the_last_norm(make: Make) -> None:
    before, after = make(), make(tokens="after_ln_post")
    images = torch.randn(2, 3, 16, 16)
    raw, normed = before.vision(images)[1], after.vision(images)[1]
    assert raw.shape == (2, 4, 32)
    torch.testing.assert_close(after.vision.ln_post(raw), normed)
    assert not any(name.startswith(("vision.ln_post", "vision.proj")) for name, _ in before.named_parameters())


def test_decay_is_for_matrices_of_trained_towers_and_cross_attention(make: Make) -> None:
    model = make("opt", trainable=EVERYTHING)
    decays = {name for name, parameter in model.named_parameters() if model.decays(name, parameter)}
    layer = "language.model.decoder.layers.1"
    assert {f"{layer}.gated_cross_attn_layer.attn.to_q.weight", f"{layer}.decoder_layer.fc1.weight"} <= decays
    assert {"vision.conv1.weight", f"{layer}.gated_cross_attn_layer.ff.1.weight"} <= decays
    never = ("norm", "bias", "_gate", "embed", "resampler", "new_rows", ".ff.0.")
    assert not [name for name in decays if any(word in name for word in never)]


@pytest.mark.parametrize(("every", "blocks"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (4, [3])])
def test_blocks_stand_before_every_nth_layer(make: Make, every: int, blocks: list[int]) -> None:
    model = make(cross_attn_every_n_layers=every)
    layers = model.language.get_submodule(model.layers_name)
    assert [number for number, layer in enumerate(layers) if layer.gated_cross_attn_layer is not None] == blocks


# ---------------------------------------------------------------- from what export wrote


def test_exported_weights_are_those_of_all_files(make: Make, tmp_path: Path) -> None:
    trained = {name: value.data for name, value in make(seed=1).named_parameters() if value.requires_grad}
    save_torch_state_dict(trained, tmp_path, max_shard_size="100KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    found = dict(make(seed=2, weights=str(tmp_path), opened=False).named_parameters())
    assert all(torch.equal(found[name], value) for name, value in trained.items())
    files[1].unlink()
    with pytest.raises(ConfigError, match=f"lacks 1 of {len(files)} files of weights, such as {files[1].name}"):
        make(weights=str(tmp_path))


@pytest.mark.parametrize("part", ["resampler", "cross_attention"])
def test_an_export_without_a_part_that_only_training_makes_is_refused(make: Make, tmp_path: Path, part: str) -> None:
    model = make()
    others = {name: value.data for name, value in model.named_parameters() if model.part_of(name) != part}
    save_file(others, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"no weights of {part}; its run did not train them"):
        make(weights=str(tmp_path))
