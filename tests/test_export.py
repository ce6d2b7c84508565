"""A run's weights as one safetensors folder."""

from pathlib import Path

import judges
import pytest
import torch
from safetensors.torch import load_file
from small_run import save_checkpoint
from test_checkpoint import Process

from hpc_mm.config import read_run, with_overrides
from hpc_mm.export import main
from hpc_mm.models.clip_flant5 import ClipFlanT5Model, build, load_tokenizer
from hpc_mm.recipes.toy import toy


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Process]:
    """A run folder with a checkpoint, and the process that wrote it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(toy().model_dump_json())
    (folder / "tokenizer.json").write_text("{}")
    process = Process()
    process.step(1)
    assert process.save(folder, 1) is None
    return folder, process


def test_the_folder_holds_the_trained_weights(run: tuple[Path, Process], tmp_path: Path) -> None:
    folder, process = run
    out = tmp_path / "weights"
    assert main([f"run={folder}", f"out={out}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "run.json", "tokenizer.json"]
    found, expected = load_file(out / "model.safetensors"), process.weights()
    assert set(found) == {"0.weight", "0.bias"}
    for name, value in found.items():
        assert torch.equal(value, expected[name])
    assert main([f"run={folder}", f"out={tmp_path / 'half'}", "step=1", "precision=bf16"]) == 0
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(half["0.weight"], expected["0.weight"].bfloat16())


def judge(folder: Path, seed: int, weights: str = "") -> ClipFlanT5Model:
    config = with_overrides(read_run(folder).model, {"weights": weights})
    return build(config, load_tokenizer(config.language), seed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("form", "files", "parts"),
    [
        ("released", ["config.json", "pytorch_model.bin", "tokenizer.json"], ("projector", "language")),
        ("projector", ["mm_projector.bin", "tokenizer.json"], ("projector",)),
    ],
)
def test_upstreams_forms(form: str, files: list[str], parts: tuple[str, ...], precision: str, tmp_path: Path) -> None:
    folder = judges.write_run(tmp_path / "run")
    source = judge(folder, seed=1)
    save_checkpoint(folder, source)
    out = tmp_path / "weights"
    assert main([f"run={folder}", f"out={out}", f"form={form}", f"precision={precision}"]) == 0
    assert sorted(path.name for path in out.iterdir()) == files
    model = judge(folder, 2, str(out / "mm_projector.bin" if form == "projector" else out))
    initial = judge(folder, 2)
    for name, value in source.named_parameters():
        expected = value if precision == "fp32" else value.bfloat16().float()
        if source.part_of(name) not in parts:
            expected = initial.get_parameter(name)
        assert torch.equal(model.get_parameter(name), expected), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run={run}"], "out=FOLDER is missing"),
        (["out={run}/new"], "run=FOLDER is missing"),
        (["run={run}", "out={run}"], "it exists"),
        (["run={run}", "out={run}/new", "step=7"], "unknown step in"),
        (["run={run}", "out={run}/new", "precision=fp8"], "precision='fp8'"),
        (["run={run}", "out={run}/new", "form=released"], "form=released is of model.family=clip_flant5"),
        (["run={run}", "out={run}/new", "form=gguf"], "form='gguf'"),
        (["run=/nowhere", "out={run}/new"], "no run at /nowhere"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, run: tuple[Path, Process], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    assert main([word.format(run=folder) for word in words]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1
    assert not (folder / "new").exists()
