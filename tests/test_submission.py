"""What a run may begin with: the weights of another one, none of them lost."""

import shutil
from pathlib import Path

import judges
import pytest
import torch
from safetensors.torch import load_file
from small_run import STEP, save_checkpoint

from hpc_mm import checkpoint, export
from hpc_mm.answerer import find, trained
from hpc_mm.config import ConfigError, Run, read_run
from hpc_mm.families import family_of, initial
from hpc_mm.models.clip_flant5 import load_tokenizer
from hpc_mm.submission import frozen_start

LORA = {"model.lora.rank": "4"}


def model_of(run: Run) -> torch.nn.Module:
    return initial(run, family_of(run), load_tokenizer(run.model.language))  # type: ignore[no-any-return]


def ended(folder: Path, **values: str) -> Path:
    """A run folder with a checkpoint of weights that only it has."""
    judges.write_run(folder, **values)
    model = model_of(read_run(folder))
    generator = torch.Generator().manual_seed(len(folder.name))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    save_checkpoint(folder, model)
    return folder


def kept(run: Path) -> str:
    """Its checkpoint, as that which another run began with."""
    return str(checkpoint.path_of(run, STEP))


def begun_with(run: Path, folder: Path, **values: str) -> Run:
    return frozen_start(judges.run_of(folder, start=str(run), **values), folder / "next")[0]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return ended(tmp_path / "whole")


def test_updates_are_put_upon_what_another_run_has_trained(whole: Path, tmp_path: Path) -> None:
    run = ended(tmp_path / "updates", start=kept(whole), **LORA)
    found = {name.replace(".base_layer.", "."): value for name, value in model_of(read_run(run)).named_parameters()}
    before = checkpoint.read_weights(checkpoint.path_of(whole, STEP))
    assert all(torch.equal(found[name], value) for name, value in before.items())
    assert export.main([f"run={run}", f"out={tmp_path / 'out'}"]) == 0
    model, _ = trained(find(str(run), str(STEP)), "fp32")
    alone, _ = trained(find(str(tmp_path / "out"), "latest"), "fp32")
    for (name, value), (other, same) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert name == other and torch.equal(value, same), name
    assert set(before) - set(checkpoint.read_weights(checkpoint.path_of(run, STEP))) < set(
        load_file(tmp_path / "out" / "model.safetensors")
    )


def test_weights_that_are_in_no_checkpoint_of_the_run_are_not_lost(whole: Path, tmp_path: Path) -> None:
    run = ended(tmp_path / "updates", start=kept(whole), **LORA)
    with pytest.raises(ConfigError, match=r"itself began with \d+ weights that it has not trained, such as language"):
        begun_with(run, tmp_path, **LORA)
    run = ended(tmp_path / "projector", start=kept(whole), **{"model.trainable": "projector"})
    with pytest.raises(ConfigError, match=r"give model\.weights=FOLDER"):
        begun_with(run, tmp_path)
    run = ended(tmp_path / "again", start=kept(whole))
    assert begun_with(run, tmp_path).start == str(tmp_path / "next" / "start")


def test_the_weights_below_are_the_same(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([f"run={whole}", f"out={out}"]) == 0
    weights = {"model.weights": str(out)}
    run = ended(tmp_path / "updates", **weights, **LORA)
    with pytest.raises(ConfigError, match=f"model.weights={out}; give the same here"):
        begun_with(run, tmp_path, **LORA)
    assert begun_with(run, tmp_path, **weights, **LORA)


@pytest.mark.parametrize("values", [LORA, {"model.trainable": "projector"}])
def test_an_export_has_the_weights_that_a_run_was_given(whole: Path, tmp_path: Path, values: dict[str, str]) -> None:
    assert export.main([f"run={whole}", f"out={tmp_path / 'below'}"]) == 0
    run = ended(tmp_path / "run", **{"model.weights": str(tmp_path / "below")}, **values)
    assert export.main([f"run={run}", f"out={tmp_path / 'out'}"]) == 0
    model, _ = trained(find(str(run), str(STEP)), "fp32")
    alone, _ = trained(find(str(tmp_path / "out"), "latest"), "fp32")
    again = model_of(judges.run_of(tmp_path, **{"model.weights": str(tmp_path / "out")}, **values))
    for (name, value), same, other in zip(
        model.named_parameters(), alone.parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(value, same) and torch.equal(value, other), name


def test_a_projector_that_a_run_was_given_is_in_its_checkpoint(whole: Path, tmp_path: Path) -> None:
    assert export.main([f"run={whole}", f"out={tmp_path / 'out'}", "form=projector"]) == 0
    file = tmp_path / "out" / "mm_projector.bin"
    run = ended(tmp_path / "stage1", **{"model.weights": str(file), "model.trainable": "projector"})
    file.unlink()
    assert begun_with(run, tmp_path)
    assert export.main([f"run={run}", f"out={tmp_path / 'alone'}"]) == 0
    assert all(name.startswith("projector.") for name in load_file(tmp_path / "alone" / "model.safetensors"))


def test_what_a_run_began_with_is_found_where_the_run_is(whole: Path, tmp_path: Path) -> None:
    run = ended(tmp_path / "updates", start=kept(whole), **LORA)
    whole.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"began with {kept(whole)}, where no weights are any more"):
        begun_with(run, tmp_path, **LORA)
    shutil.copytree(kept(tmp_path / "elsewhere"), run / "start")
    with pytest.raises(ConfigError, match=r"itself began with \d+ weights that it has not trained"):
        begun_with(run, tmp_path, **LORA)


@pytest.mark.parametrize("values", [{}, {"model.lora.rank": "8"}, {**LORA, "model.lora.alpha": "8"}])
def test_other_updates_are_refused(tmp_path: Path, values: dict[str, str]) -> None:
    run = ended(tmp_path / "updates", **LORA)
    assert begun_with(run, tmp_path, **LORA, **{"model.lora.dropout": "0.5"})
    with pytest.raises(ConfigError, match=r"LoRA of other values: model\.lora\.") as error:
        begun_with(run, tmp_path, **values)
    assert "\n" not in str(error.value)
