"""Checkpoints on disk: what is found, what is passed over, and that what is loaded is what was saved."""

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hpc_mm import checkpoint


class Objective(torch.nn.Module):
    """What train.py hands to accelerate: a module with the model in it; half of this one is frozen."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        self.model[1].requires_grad_(False)


class Process:
    """A rank that trains on its own, as after every start."""

    def __init__(self, seed: int = 0) -> None:
        self.accelerator = Accelerator(cpu=True)
        objective = Objective(seed)
        optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=0.1)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)

    def step(self, number: int) -> None:
        batch = torch.full((2, 4), float(number))
        self.objective.model(batch).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path, step: int, keep: int = 9) -> Path:
        return checkpoint.save(self.accelerator, self.objective, folder, {"step": step}, keep)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.objective.model.state_dict().items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1, 2 and 3."""
    process = Process()
    for step in (1, 2, 3):
        process.step(step)
        process.save(tmp_path, step)
    return tmp_path


def test_goes_on_bit_for_bit(saved: Path) -> None:
    undisturbed, restarted = Process(), Process(seed=7)
    restarted.objective.model[1].load_state_dict(undisturbed.objective.model[1].state_dict())  # frozen: from its source
    for step in (1, 2, 3, 4):
        undisturbed.step(step)
    assert checkpoint.resume(restarted.accelerator, restarted.objective, saved) == {"step": 3}
    restarted.step(4)
    for name, value in undisturbed.weights().items():
        assert torch.equal(value, restarted.weights()[name]), name


def test_only_what_learns_is_stored(saved: Path) -> None:
    from safetensors.torch import load_file

    newest = checkpoint.newest(saved)
    assert newest is not None
    assert set(load_file(newest / "weights.safetensors")) == {"0.weight", "0.bias"}
    assert not list(newest.glob("state/*model*"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


FILES = ["weights.safetensors", "state/optimizer.bin", "progress.json"]


@pytest.mark.parametrize(
    ("name", "harm"),
    [*itertools.product(FILES, [cut, flip, Path.unlink]), ("manifest.json", cut), ("manifest.json", Path.unlink)],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    saved: Path, name: str, harm: object, caplog: pytest.LogCaptureFixture
) -> None:
    newest = checkpoint.path_of(saved, 3)
    harm(newest / name)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(saved) == checkpoint.path_of(saved, 2)
    if not (name == "manifest.json" and harm is Path.unlink):  # without its mark it was never a checkpoint
        assert str(newest) in caplog.text and name in caplog.text


def test_what_was_not_finished_is_never_used(saved: Path) -> None:
    partial = checkpoint.path_of(saved, 4).with_name("step-00000004.partial")
    checkpoint.path_of(saved, 3).rename(partial)  # as if killed just before the move
    assert checkpoint.newest(saved) == checkpoint.path_of(saved, 2)
    process = Process()
    checkpoint.resume(process.accelerator, process.objective, saved)
    process.save(saved, 4)
    assert checkpoint.newest(saved) == checkpoint.path_of(saved, 4) and not partial.exists()


def test_the_newest_are_kept(saved: Path) -> None:
    (checkpoint.path_of(saved, 1) / "manifest.json").unlink()  # as if killed while removing it
    checkpoint.path_of(saved, 2).rename(saved / "checkpoints" / "step-00000002.partial")  # or while saving it
    process = Process()
    process.save(saved, 4, keep=2)
    assert [checkpoint.step_of(path) for path in checkpoint.finished(saved)] == [3, 4]
    assert len(list((saved / "checkpoints").iterdir())) == 2


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    newest = checkpoint.path_of(saved, 3)
    with pytest.raises(ValueError, match="is of another model"):
        checkpoint.load_weights(torch.nn.Linear(4, 4), newest)
    wider = torch.nn.Sequential(torch.nn.Linear(4, 5))
    with pytest.raises(ValueError, match=r"0.weight has shape \(4, 4\), not \(5, 4\)"):
        checkpoint.load_weights(wider, newest)


def test_progress_is_plain_json(saved: Path) -> None:
    assert json.loads((checkpoint.path_of(saved, 2) / "progress.json").read_text()) == {"step": 2}
