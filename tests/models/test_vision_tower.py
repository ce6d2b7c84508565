"""Towers from an architecture and from a folder; QuickGELU is never lost."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from tiny import TOWER

from hpc_mm.config import ConfigError, Vision
from hpc_mm.models.vision_tower import image_spec, load_vision, needs_quick_gelu

TEXT = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def folder(path: Path, quick_gelu: bool) -> open_clip.CLIP:
    """A CLIP folder as open_clip writes them."""
    shape, text = open_clip.CLIPVisionCfg(**TOWER), open_clip.CLIPTextCfg(**TEXT)
    model = open_clip.CLIP(16, shape, text, quick_gelu=quick_gelu)
    sizes = {"embed_dim": 16, "vision_cfg": TOWER, "text_cfg": TEXT, "quick_gelu": quick_gelu}
    facts = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": facts}))
    torch.save(model.state_dict(), path / "open_clip_pytorch_model.bin")
    return model


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("tokens", ["before_ln_post", "after_ln_post"])
def test_a_folders_tower_gives_its_own_tokens(tmp_path: Path, quick_gelu: bool, tokens: str) -> None:
    whole = folder(tmp_path, quick_gelu).visual.eval()
    tower = load_vision(Vision(name=f"local-dir:{tmp_path}", tokens=tokens)).eval()
    images = torch.randn(2, 3, 16, 16)
    norm = tokens == "after_ln_post"
    expected = whole.forward_intermediates(images, indices=1, normalize_intermediates=norm, output_fmt="NLC")
    torch.testing.assert_close(tower(images)[1], expected["image_intermediates"][0])
    assert any(type(module).__name__ == "QuickGELU" for module in tower.modules()) == quick_gelu


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_penultimate_tokens_are_what_the_last_layer_reads(tmp_path: Path, quick_gelu: bool) -> None:
    whole = folder(tmp_path, quick_gelu).visual.eval()
    tower = load_vision(Vision(name=f"local-dir:{tmp_path}", tokens="penultimate")).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = whole.forward_intermediates(images, indices=2, output_fmt="NLC")
    torch.testing.assert_close(tower(images)[1], expected["image_intermediates"][0])
    assert not any(name.startswith(("transformer.resblocks.1", "ln_post", "proj")) for name in tower.state_dict())


def test_image_spec(tmp_path: Path) -> None:
    folder(tmp_path, quick_gelu=False)
    spec = image_spec(load_vision(Vision(name=f"local-dir:{tmp_path}")))
    assert (spec.size, spec.mean, spec.std) == (16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    plain = image_spec(load_vision(Vision(architecture=TOWER)))
    assert (plain.size, plain.mean) == (16, open_clip.OPENAI_DATASET_MEAN)


def test_openai_weights_keep_quick_gelu(caplog: pytest.LogCaptureFixture) -> None:
    assert needs_quick_gelu("ViT-L-14", "openai")
    assert "runs with QuickGELU" in caplog.text
    assert needs_quick_gelu("ViT-L-14-quickgelu", "openai")
    assert not needs_quick_gelu("ViT-L-14", "laion2b_s32b_b82k")
    assert not needs_quick_gelu("ViT-L-14", "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "ViT-XXS-99", "pretrained": ""}, "ViT-XXS-99"),
        ({"name": "local-dir:/nowhere"}, "nowhere"),
        ({"architecture": {"image_sise": 16}}, "did you mean image_size"),
        ({"architecture": {**TOWER, "width": 40}}, "no multiple of head_width"),
        ({"architecture": {**TOWER, "layers": [1, 1, 1, 1]}}, "no plain vision transformer"),
    ],
)
def test_mistakes_are_told_in_one_line(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_vision(Vision(**values))
    assert "\n" not in str(error.value)
