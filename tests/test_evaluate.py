"""Captions before and after training: real weights, real checkpoints, scored by our own CIDEr."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import samples
import torch
from accelerate import Accelerator
from torch import nn

from hpc_mm import checkpoint, export, metrics, sharding
from hpc_mm.config import ConfigError, Run, with_overrides
from hpc_mm.data.schema import Sample
from hpc_mm.data.shards import ShardWriter
from hpc_mm.data.store import open_store
from hpc_mm.evaluate import Captions, evaluate, main
from hpc_mm.models.flamingo import build, load_tokenizer
from hpc_mm.recipes.toy import toy

SCRIPT = Path(__file__).resolve().parents[1] / "eval" / "toy.py"
REFERENCES = [["a red circle", "the circle"], ["a large blue star"], ["two small squares", "of the left"]]
SMALLER = {
    "model.vision.architecture": '{"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}',
    "model.language.architecture.hidden_size": "32",
    "model.language.architecture.intermediate_size": "64",
    "model.language.architecture.num_hidden_layers": "2",
    "model.language.architecture.tie_word_embeddings": "false",  # a tied one says its last input again
    "model.resampler_depth": "1",
    "model.resampler_latents": "4",
}


class Objective(nn.Module):
    """Holds the model as a training run's objective does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with one checkpoint, at step 7, of weights that are not the first ones."""
    with ShardWriter(open_store(str(tmp_path / "store" / "heldout")), "heldout") as writer:
        for number, references in enumerate(REFERENCES):
            image, text = samples.pair(number).parts
            writer.add(Sample(f"sample{number}", (image, text), {"references": references}))
    folder = tmp_path / "runs" / "toy"
    folder.mkdir(parents=True)
    samples.tokenizer([" ".join(samples.WORDS)]).backend_tokenizer.save(str(folder / "tokenizer.json"))
    run: Run = with_overrides(
        toy(), {"name": "toy", "model.language.tokenizer": str(folder / "tokenizer.json"), **SMALLER}
    )
    (folder / "run.json").write_text(run.model_dump_json())
    model = build(run.model, load_tokenizer(run.model.language), seed=1234)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    parts = (accelerator, *accelerator.prepare(Objective(model), optimizer))
    saver = checkpoint.Saver(accelerator, folder, keep=1)
    saver.start(sharding.own(*parts), {"step": 7, "updates": 7})
    saver.finish()
    return folder


@pytest.fixture
def options(run_folder: Path, tmp_path: Path) -> Captions:
    return Captions(run=str(run_folder), data=str(tmp_path / "store" / "heldout"), max_new_tokens=6, batch=2)


def rows(run_folder: Path, step: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_folder / "eval" / f"captions-step-{step}.jsonl").read_text().splitlines()]


def test_captions_and_scores_before_and_after(options: Captions, run_folder: Path) -> None:
    summary = evaluate(options)
    assert json.loads((run_folder / "eval" / "captions.json").read_text()) == summary
    assert [score["step"] for score in summary["scores"]] == [0, 7]
    for score in summary["scores"]:
        found = rows(run_folder, score["step"])
        assert [row["id"] for row in found] == ["sample0", "sample1", "sample2"]
        assert [row["references"] for row in found] == REFERENCES
        captions = [str(row["caption"]) for row in found]
        assert score["cider"] == pytest.approx(100 * metrics.cider(captions, REFERENCES))
        assert not any("<" in caption for caption in captions), "special tokens are no part of a caption"
    assert rows(run_folder, 0) != rows(run_folder, 7)
    assert not list(run_folder.rglob("*.partial"))


def test_the_same_weights_give_the_same_captions(options: Captions, run_folder: Path) -> None:
    evaluate(options)
    first = rows(run_folder, 0), rows(run_folder, 7)
    evaluate(options.model_copy(update={"batch": 3}))
    assert (rows(run_folder, 0), rows(run_folder, 7)) == first


def test_only_some_samples(options: Captions, run_folder: Path) -> None:
    assert evaluate(options.model_copy(update={"samples": 2, "steps": ("7",)}))["samples"] == 2
    assert len(rows(run_folder, 7)) == 2


def test_the_script_prints_the_scores(options: Captions, run_folder: Path) -> None:
    words = [f"run={run_folder}", f"data={options.data}", "max_new_tokens=6"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CIDEr x 100" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run="], "run=FOLDER is missing"),
        (["run=/nowhere/at/all"], "no run at /nowhere/at/all"),
        (["stps=0"], "did you mean steps?"),
        (["steps=9"], "unknown step in"),
        (["data=/nowhere/at/all"], "/nowhere/at/all"),
        (["prompt=a red"], "prompt='a red' has no <image>"),
        (["prompt=<image> a <image>"], "must stand there once"),
    ],
)
def test_a_users_mistake_is_one_line(
    options: Captions, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options, arguments) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def test_no_checkpoint_yet(options: Captions, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in checkpoint.finished(run_folder):
        (path / "manifest.json").unlink()
    assert main(options, []) == 2
    assert "has no whole checkpoint yet" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 700])
def test_a_heldout_tar_that_is_missing_or_cut(options: Captions, size: int, capsys: pytest.CaptureFixture[str]) -> None:
    tar = Path(options.data, "heldout-000000.tar")
    os.truncate(tar, size) if size else tar.unlink()
    assert main(options, ["steps=0"]) == 2
    complaint = capsys.readouterr().err
    assert "heldout-000000.tar" in complaint and complaint.count("\n") == 1


def test_a_checkpoint_of_another_model(options: Captions, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.model_validate_json((run_folder / "run.json").read_text())
    other = with_overrides(run, {"model.resampler_latents": "5"})
    (run_folder / "run.json").write_text(other.model_dump_json())
    assert main(options, ["steps=7"]) == 2
    complaint = capsys.readouterr().err
    assert "resampler.latents has shape (4, 32), not (5, 32)" in complaint and complaint.count("\n") == 1


def test_another_run_starts_from_what_was_exported(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    assert export.main([f"run={run_folder}", f"out={out}"]) == 0
    run: Run = Run.model_validate_json((out / "run.json").read_text())
    tokenizer = load_tokenizer(run.model.language)
    model = build(with_overrides(run.model, {"weights": str(out)}), tokenizer, seed=run.train.seed)
    expected = build(run.model, tokenizer, seed=run.train.seed)
    checkpoint.load_weights(expected, checkpoint.path_of(run_folder, 7))
    for (name, value), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other), name
    with pytest.raises(ConfigError, match="latents has shape"):
        build(with_overrides(run.model, {"weights": str(out), "resampler_latents": "5"}), tokenizer, seed=0)
