"""The released formats: round trips, what others wrote, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from tiny_t5 import FLAN, SHAPE, configured, made, rows, their_tower, tokenizer_file
from torch import Tensor
from transformers import CLIPVisionModel

from hpc_mm.config import ClipFlanT5, ConfigError, Lora
from hpc_mm.models.clip_flant5 import ClipFlanT5Model
from hpc_mm.models.clip_flant5_weights import load_weights, save_projector, save_released

pytestmark = pytest.mark.usefixtures("one_thread")
TIED = {**SHAPE, "feed_forward_proj": "relu"}
LORA = Lora(rank=3, dropout=0.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ClipFlanT5]:
    file = tokenizer_file(tmp_path_factory.mktemp("tokenizer"))

    def config(architecture: dict[str, Any] = FLAN, **values: Any) -> ClipFlanT5:
        return configured(file, architecture, **values)

    return config


Config = Callable[..., ClipFlanT5]


def same(one: ClipFlanT5Model, other: ClipFlanT5Model, parts: tuple[str, ...] = ("projector", "language")) -> bool:
    """Whether all weights of some parts are equal."""
    found = dict(other.named_parameters())
    return all(torch.equal(found[name], value) for name, value in one.named_parameters() if one.part_of(name) in parts)


def upstream(model: ClipFlanT5Model, tower: CLIPVisionModel | None = None) -> dict[str, Tensor]:
    """What upstream's class holds: aliases of the table, and a tower."""
    state = {name: value.detach().clone() for name, value in model.language.named_parameters()}
    for alias in ("encoder.embed_tokens", "decoder.embed_tokens", "embed_tokens"):
        state[f"{alias}.weight"] = state["shared.weight"].clone()
    state.setdefault("lm_head.weight", state["shared.weight"].clone())
    state.update({f"mm_projector.{name}": value.detach() for name, value in model.projector.named_parameters()})
    if tower is not None:
        own = {f"vision_tower.vision_tower.vision_model.{name}": value for name, value in tower.state_dict().items()}
        own["vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        state.update(own)
    return state


def written(state: dict[str, Tensor], folder: Path, model_type: str = "t5", **how: Any) -> Path:
    save_torch_state_dict(state, folder, **how)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


PICKLES: dict[str, Any] = {"safe_serialization": False, "filename_pattern": "pytorch_model{suffix}.bin"}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_projector_file(config: Config, tmp_path: Path, prefix: str) -> None:
    source, file = made(config(), seed=1), tmp_path / "mm_projector.bin"
    save_projector(source, file)
    state = torch.load(file, weights_only=True)
    assert sorted(state) == [f"mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("bias", "weight")]
    torch.save({prefix + name: value.bfloat16() for name, value in state.items()}, file)
    model = made(config(weights=str(file)), seed=2)
    for name, value in source.projector.named_parameters():
        assert torch.equal(model.projector.get_parameter(name), value.bfloat16().float())
    assert not same(model, source, ("language",))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')  # stage 1's folder
    again = made(config(weights=str(tmp_path)), seed=3)
    assert same(again, model, ("projector",))


@pytest.mark.parametrize("architecture", [FLAN, TIED], ids=["flan", "tied"])
@pytest.mark.parametrize("lora", [Lora(), LORA], ids=["whole", "lora"])
def test_released_folder_round_trip(config: Config, tmp_path: Path, architecture: dict[str, Any], lora: Lora) -> None:
    source = made(config(architecture, lora=lora), seed=1).eval()
    for name, parameter in source.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_released(source, tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["model_type"] == "clip_t5" and facts["vocab_size"] == 60
    assert facts["tie_word_embeddings"] == ("tie_word_embeddings" not in architecture)
    assert (
        torch.load(tmp_path / "pytorch_model.bin", weights_only=True).keys()
        == upstream(made(config(architecture))).keys()
    )
    model = made(config(architecture, weights=str(tmp_path)), seed=2).eval()
    ids, mask, images, counts, labels = rows()
    features = source.encode(images)
    torch.testing.assert_close(
        model.logits(ids, mask, features, counts, labels),
        source.logits(ids, mask, features, counts, labels),
        atol=1e-5,
        rtol=1e-5,
    )
    assert lora.rank or same(model, source)


@pytest.mark.parametrize("model_type", ["t5", "clip_t5"])
@pytest.mark.parametrize(
    "how",
    [PICKLES, {**PICKLES, "max_shard_size": "40KB"}, {}, {"max_shard_size": "40KB"}],
    ids=["bin", "bins", "safetensors", "several"],
)
def test_upstream_folder_with_a_tower(config: Config, tmp_path: Path, how: dict[str, Any], model_type: str) -> None:
    source, tower = made(config(), seed=1), their_tower(3)
    folder = written(upstream(source, tower), tmp_path, model_type, **how)
    assert len([file for file in folder.iterdir() if file.suffix in (".bin", ".safetensors")]) > (
        "max_shard_size" in how
    )
    model = made(config(weights=str(folder)), seed=2)
    assert same(model, source)
    images = torch.randn(2, 3, 16, 16)
    expected = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(model.vision(images)[1], expected, atol=1e-5, rtol=1e-5)


def test_weights_go_below_lora(config: Config, tmp_path: Path) -> None:
    source = made(config(), seed=1)
    folder = written(upstream(source), tmp_path)
    model = made(config(lora=LORA, weights=str(folder)), seed=2)
    found = {name.replace(".base_layer.", "."): value for name, value in model.named_parameters()}
    assert all(
        torch.equal(found[name], value) for name, value in source.named_parameters() if not name.startswith("vision.")
    )


@pytest.mark.parametrize("lora", [Lora(), LORA], ids=["whole", "lora"])
def test_what_export_wrote(config: Config, tmp_path: Path, lora: Lora) -> None:
    source = made(config(lora=lora), seed=1)
    trained = {name: value.detach() for name, value in source.named_parameters() if value.requires_grad}
    save_torch_state_dict(trained, tmp_path)
    (tmp_path / "run.json").write_text("{}")
    model = made(config(lora=lora, weights=str(tmp_path)), seed=2)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in trained.items())
    save_file({"projector.0.weight": trained["projector.0.weight"][:4].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"projector.0.weight has shape \(4, 32\), in this model it is of shape"):
        made(config(weights=str(tmp_path)))
    save_file({"language.shared.weight": torch.zeros(60, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="no weights of projector"):
        made(config(weights=str(tmp_path)))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("weights", ["zhiqiulin/clip-flant5-xl", "{folder}/none.bin", "{folder}", "{folder}/run"])
def test_a_path_is_never_a_hubs_name(config: Config, tmp_path: Path, weights: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")  # of a run, and not of what was exported
    with pytest.raises(ConfigError, match="there is none") as error:
        made(config(weights=weights.format(folder=tmp_path)))
    assert "\n" not in str(error.value)


def without(state: dict[str, Tensor], word: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if word not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {**s, "shared.weight": s["shared.weight"][:59].clone()},
            r"shared.weight has shape \(59, 32\), in this model",
        ),
        (
            lambda s: {**s, "encoder.embed_tokens.weight": s["shared.weight"] + 1},
            "differs from another copy of the same table",
        ),
        (lambda s: without(s, "lm_head"), "lacks 1 weights of this model, such as language.lm_head.weight"),
        (lambda s: without(s, "mm_projector"), "lacks 4 weights of this model, such as projector.0.bias"),
        (
            lambda s: {**s, "decoder.block.2.layer.0.layer_norm.weight": torch.zeros(32)},
            "in this model it is not there",
        ),
        (lambda s: {**s, "mm_projector.4.weight": torch.zeros(2)}, "mm_projector.4.weight has shape"),
        (lambda s: without(s, "layers.0.mlp.fc1"), "lacks 2 weights of this model, such as vision.transformer"),
        (
            lambda s: without(s, "layers.1.self_attn.k_proj"),
            "lacks 2 weights of this model, such as vision.transformer",
        ),
        (
            lambda s: {n.replace("layers.2.", "layers.3."): v for n, v in s.items()},
            "resblocks.3.* in this model it is not",
        ),
    ],
    ids=["rows", "alias", "head", "projector", "layers", "projectors", "tower", "keys", "deep"],
)
def test_what_does_not_fit_is_told_in_one_line(config: Config, tmp_path: Path, change: Any, message: str) -> None:
    folder = written(change(upstream(made(config()), their_tower(3))), tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        made(config(weights=str(folder)))
    assert "\n" not in str(error.value)


def test_files_that_are_none(config: Config, tmp_path: Path) -> None:
    model = made(config())
    file = tmp_path / "mm_projector.bin"
    for content, message in (
        ({"mm_projector.0.weight": torch.zeros(32, 32)}, "lacks 3 weights of this model, such as 0.bias"),
        ({"lm_head.weight": torch.zeros(1)}, "lm_head.weight is none of a projector"),
        ({"epoch": 1}, "no state dict of a projector"),
        (Path, "could run code"),
    ):
        torch.save(content, file)
        with pytest.raises(ConfigError, match=message):
            load_weights(model, str(file))
    for text, message in (("{", "config.json"), ("[]", "no JSON object"), ('{"model_type": "llava"}', "must be t5 or")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_weights(model, str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text("<html>")
        with pytest.raises(ConfigError, match=name):
            load_weights(model, str(tmp_path))
        (tmp_path / name).unlink()
