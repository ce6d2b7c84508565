"""The released checkpoint format: both versions' keys, merged tables, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, WORDS
from torch import Tensor

from hpc_mm.config import ConfigError
from hpc_mm.models.flamingo import FlamingoModel
from hpc_mm.models.openflamingo_weights import load_openflamingo, openflamingo_state

Make = Callable[..., FlamingoModel]


def learnt(model: FlamingoModel) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in model.named_parameters()
        if model.part_of(name) in ("resampler", "cross_attention", "new_tokens")
    }


def assert_loaded(model: FlamingoModel, source: FlamingoModel) -> None:
    found, expected = learnt(model), learnt(source)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_file_round_trip(make: Make, family: str, tmp_path: Path) -> None:
    source, model = make(family, seed=1), make(family, seed=2)
    state = openflamingo_state(source)
    tables = {key: len(value) for key, value in state.items() if "gated" not in key and "perceiver" not in key}
    assert set(tables.values()) == {WORDS + 3}  # base tokens, endofchunk, image, PAD
    torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / "checkpoint_3.pt")
    load_openflamingo(model, tmp_path / "checkpoint_3.pt")
    assert_loaded(model, source)


def test_keys_of_version_1_of_wrappers_and_of_copies(make: Make) -> None:
    source, model = make(seed=1), make(seed=2)
    old = {}
    for key, value in openflamingo_state(source).items():
        name = key.replace("lang_encoder.model.layers.", "lang_encoder.gated_cross_attn_layers.")
        old["module." + name.replace(".gated_cross_attn_layer.", ".")] = value
    old["module.lang_encoder.old_decoder_blocks.0.self_attn.q_proj.weight"] = torch.zeros(32, 32)
    old["module.vision_encoder.proj"] = torch.zeros(3)
    assert any("gated_cross_attn_layers.1.attn.to_q" in key for key in old)
    load_openflamingo(model, old)
    assert_loaded(model, source)


def test_gpt_neox_head_under_its_old_name(make: Make) -> None:
    source, model = make("gpt_neox", seed=1), make("gpt_neox", seed=2)
    state = openflamingo_state(source)
    state["lang_encoder.embed_out.weight"] = state.pop("lang_encoder.lm_head.weight")
    load_openflamingo(model, state)
    assert_loaded(model, source)


def test_unused_rows_of_the_base_table_stay(make: Make) -> None:
    source, model = make("mpt", seed=1), make("mpt", seed=2)
    unused = model.language.transformer.wte.base.weight[WORDS:].clone()
    load_openflamingo(model, openflamingo_state(source))
    table = model.language.transformer.wte.base.weight
    assert torch.equal(table[WORDS:], unused)
    assert torch.equal(table[:WORDS], source.language.transformer.wte.base.weight[:WORDS])


def test_a_checkpoint_of_another_shape_is_refused(make: Make, tmp_path: Path) -> None:
    state = openflamingo_state(make())
    with pytest.raises(ConfigError, match="lacks 22 weights"):
        load_openflamingo(make(cross_attn_every_n_layers=1), state)
    with pytest.raises(ConfigError, match="no place in this model"):
        load_openflamingo(make(resampler_depth=1), state)
    with pytest.raises(ConfigError, match=r"resampler.latents has shape \(4, 32\), this model's has \(5, 32\)"):
        load_openflamingo(make(resampler_latents=5), state)
    with pytest.raises(ConfigError, match="has 62 token rows, this model's tokenizer 63"):
        load_openflamingo(make(), {**state, "lang_encoder.lm_head.weight": torch.zeros(62, 32)})
    with pytest.raises(ConfigError, match="No such file"):
        load_openflamingo(make(), tmp_path / "none.pt")


class Toucher:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., int], tuple[Path, bytes]]:
        return Path.write_bytes, (self.file, b"")


def test_a_pickle_that_runs_code_is_refused(make: Make, tmp_path: Path) -> None:
    torch.save({"model_state_dict": Toucher(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(ConfigError, match="could run code"):
        load_openflamingo(make(), tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_a_file_of_something_else_is_refused(make: Make, tmp_path: Path) -> None:
    model, file = make(), tmp_path / "checkpoint.pt"
    file.write_text("<html>404</html>")
    with pytest.raises(ConfigError, match="no whole file"):
        load_openflamingo(model, file)
    torch.save(openflamingo_state(model), file, _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match="no whole file"):
        load_openflamingo(model, file)
    for content in (torch.zeros(3), [1], {"model_state_dict": 1}, {"epoch": 1}):
        torch.save(content, file)
        with pytest.raises(ConfigError, match="no state dict of OpenFlamingo"):
            load_openflamingo(model, file)


@pytest.mark.parametrize("weights", ["checkpoint.pt", "", "~"])
def test_a_model_is_built_from_them(make: Make, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = make(seed=1)
    torch.save({"model_state_dict": openflamingo_state(source)}, tmp_path / "checkpoint.pt")
    built = make(seed=2, weights=weights if weights == "~" else str(tmp_path / weights), opened=False)
    assert_loaded(built, source)
