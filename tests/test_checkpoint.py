"""Checkpoints on disk: what is found, what is passed over, and that what is loaded is what was saved, however split."""

import itertools
import json
import logging
import multiprocessing
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hpc_mm import checkpoint, sharding
from hpc_mm.config import ConfigError
from hpc_mm.sharding import KINDS, Fragment


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
        self.parts = (self.accelerator, *self.accelerator.prepare(objective, optimizer))
        self.model = objective.model

    def step(self, number: int) -> None:
        batch = torch.full((2, 4), float(number))
        self.model(batch).square().sum().backward()
        self.parts[2].step()
        self.parts[2].zero_grad()

    def save(self, folder: Path, step: int, keep: int = 9, keep_every: int = 0) -> str | None:
        """The problem, if there was one."""
        saver = checkpoint.Saver(self.accelerator, folder, keep, keep_every)
        saver.start(sharding.own(*self.parts), {"step": step, "updates": step})
        _, problem, _ = saver.finish()
        if saver.removing is not None:
            saver.removing.join()
        return problem

    def resume(self, folder: Path) -> Path | None:
        found = checkpoint.find(self.accelerator, folder)
        if found is not None:
            checkpoint.load(sharding.held(*self.parts), found)
            sharding.restored(*self.parts, checkpoint.read_progress(found)["updates"])
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1, 2 and 3."""
    process = Process()
    for step in (1, 2, 3):
        process.step(step)
        assert process.save(tmp_path, step) is None
    return tmp_path


def test_goes_on_bit_for_bit(saved: Path) -> None:
    undisturbed, restarted = Process(), Process(seed=7)
    restarted.model[1].load_state_dict(undisturbed.model[1].state_dict())  # frozen: from its source
    for step in (1, 2, 3, 4):
        undisturbed.step(step)
    assert restarted.resume(saved) == checkpoint.path_of(saved, 3)
    restarted.step(4)
    for name, value in undisturbed.weights().items():
        assert torch.equal(value, restarted.weights()[name]), name


def test_training_goes_on_while_a_snapshot_is_written(tmp_path: Path) -> None:
    process = Process()
    process.step(1)
    before = process.weights()
    saver = checkpoint.Saver(process.accelerator, tmp_path, keep=1)
    saver.start(sharding.own(*process.parts), {"step": 1, "updates": 1})
    process.step(2)
    path, problem, seconds = saver.finish()
    assert (path, problem, saver.writing) == (checkpoint.path_of(tmp_path, 1), None, None) and seconds > 0
    other = Process(seed=3)
    checkpoint.load_weights(other.model, path)
    assert torch.equal(other.weights()["0.weight"], before["0.weight"])
    assert not torch.equal(other.weights()["0.weight"], process.weights()["0.weight"])


def test_only_what_learns_is_stored_and_the_library_reads_it(saved: Path) -> None:
    newest = checkpoint.newest(saved)
    assert newest is not None
    assert checkpoint.shapes_of(newest) == {"0.weight": (4, 4), "0.bias": (4,)}
    stored = load_file(newest / "rank-00000.safetensors")
    assert set(stored) == {f"{kind}:0:{name}" for kind in KINDS for name in ("0.weight", "0.bias")}
    assert stored["weight:0:0.weight"].shape == (16,)


# ---------------------------------------------------------------- any split


SHAPES = {"wide": (3, 7), "bias": (5,), "scalar": (1,), "deep": (2, 3, 4)}


def split(values: dict[str, dict[str, torch.Tensor]], cuts: dict[str, list[int]]) -> Iterator[list[Fragment]]:
    """Ranks' fragments: parameter by parameter, cut at any places; some ranks may get nothing of some."""
    for rank in range(len(next(iter(cuts.values()))) - 1):
        found = []
        for name, tensors in values.items():
            start, end = cuts[name][rank : rank + 2]
            if end > start:
                found.append(Fragment(name, SHAPES[name], start, {kind: tensors[kind][start:end] for kind in tensors}))
        yield found


@st.composite
def cut_places(draw: st.DrawFn) -> dict[str, list[int]]:
    ranks = draw(st.integers(1, 5))
    found = {}
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        inner = draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1))
        found[name] = [0, *sorted(inner), size]
    return found


def state(fill: float | None = None) -> dict[str, dict[str, torch.Tensor]]:
    size = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    if fill is not None:
        return {name: {kind: torch.full((count,), fill) for kind in KINDS} for name, count in size.items()}
    return {name: {kind: torch.randn(count) for kind in KINDS} for name, count in size.items()}


@settings(max_examples=60, deadline=None)
@given(before=cut_places(), after=cut_places())
def test_any_split_is_read_by_any_other(
    before: dict[str, list[int]], after: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, written, found = tmp_path_factory.mktemp("split"), state(), state(fill=float("nan"))
    for rank, fragments in enumerate(split(written, before)):
        data = b"".join(tensor.numpy().tobytes() for part in fragments for tensor in part.tensors.values())
        (folder / f"rank-{rank:05d}.safetensors").write_bytes(checkpoint.header(fragments) + data)
    ranks = list(split(found, after))
    for rank, fragments in enumerate(ranks):
        checkpoint.load(fragments, folder, rank, len(ranks))
    for name, tensors in written.items():
        for kind, values in tensors.items():
            assert torch.equal(found[name][kind], values)


@given(length=st.integers(0, 40), parts=st.integers(1, 9))
def test_parts_make_up_the_whole(length: int, parts: int) -> None:
    values = torch.arange(length)
    whole = Fragment("name", (length,), 3, {"weight": values})
    found = [whole.part(index, parts) for index in range(parts)]
    assert torch.equal(torch.cat([part.tensors["weight"] for part in found]), values)
    assert [part.start for part in found if len(part)] == [
        int(part.tensors["weight"][0]) + 3 for part in found if len(part)
    ]
    assert max(map(len, found)) - min(map(len, found)) <= 1


# ---------------------------------------------------------------- damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


FILES = ["rank-00000.safetensors", "progress.json"]


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
    assert process.resume(saved) == checkpoint.path_of(saved, 2) and not partial.exists()
    process.save(saved, 4)
    assert checkpoint.newest(saved) == checkpoint.path_of(saved, 4)


def save_for_ever(process: Process, folder: Path) -> None:
    """Checkpoints in which every value is the step; each is on its way to the disk while the next is computed."""
    torch.set_num_threads(1)  # those of the parent are not there after a fork
    saver = checkpoint.Saver(process.accelerator, folder, keep=2)
    found = process.resume(folder)
    step = checkpoint.step_of(found) if found else 0
    while True:
        step += 1
        fragments = sharding.own(*process.parts)
        for fragment in fragments:
            for tensor in fragment.tensors.values():
                tensor.fill_(step)
        if saver.writing is not None:
            saver.finish()
        saver.start(fragments, {"step": step, "updates": step})


def test_killed_at_any_moment_it_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    random, reached, process = Random(0), 0, Process()
    for _ in range(20):
        child = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(process, tmp_path))
        child.start()
        while not any(checkpoint.step_of(path) > reached for path in checkpoint.finished(tmp_path)):
            assert child.is_alive()
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))  # several saves' time
        child.kill()
        child.join()
        found = checkpoint.newest(tmp_path)
        assert found is not None and checkpoint.step_of(found) > reached, "a checkpoint was lost"
        reached = checkpoint.step_of(found)
        values = torch.cat([value.flatten() for value in checkpoint.read_weights(found).values()])
        assert (values == reached).all() and checkpoint.read_progress(found)["updates"] == reached


def test_a_full_disk_keeps_the_checkpoint_before(saved: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))  # bytes of a file; the error comes while it is written
    try:
        problem = Process().save(saved, 4, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert problem is not None and "rank-00000.safetensors" in problem and "File too large" in problem
    assert [path.name for path in sorted((saved / "checkpoints").iterdir())] == [f"step-0000000{i}" for i in (1, 2, 3)]
    assert checkpoint.newest(saved) == checkpoint.path_of(saved, 3)
    assert Process().save(saved, 4, keep=1) is None  # with room again
    assert checkpoint.newest(saved) == checkpoint.path_of(saved, 4)


def test_the_newest_are_kept(saved: Path) -> None:
    (checkpoint.path_of(saved, 1) / "manifest.json").unlink()  # as if killed while removing it
    checkpoint.path_of(saved, 2).rename(saved / "checkpoints" / "step-00000002.partial")  # or while saving it
    process = Process()
    assert process.resume(saved) == checkpoint.path_of(saved, 3)
    process.save(saved, 4, keep=2)
    assert [checkpoint.step_of(path) for path in checkpoint.finished(saved)] == [3, 4]
    assert len(list((saved / "checkpoints").iterdir())) == 2


def test_a_damaged_checkpoint_never_costs_a_good_one(saved: Path) -> None:
    """It is newer than what is saved next, and only one is kept."""
    flip(checkpoint.path_of(saved, 3) / "rank-00000.safetensors")
    process = Process()
    assert process.resume(saved) == checkpoint.path_of(saved, 2)
    assert checkpoint.finished(saved)[-1] == checkpoint.path_of(saved, 2)
    process.step(3)
    assert process.save(saved, 3, keep=1) is None
    assert checkpoint.newest(saved) == checkpoint.path_of(saved, 3)
    process.save(saved, 4, keep=1)
    assert [path.name for path in (saved / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_chosen_step_is_verified(saved: Path) -> None:
    assert checkpoint.chosen(saved, "2") == checkpoint.path_of(saved, 2)
    flip(checkpoint.path_of(saved, 2) / "rank-00000.safetensors")
    with pytest.raises(ConfigError, match="step-00000002 is damaged: rank-00000"):
        checkpoint.chosen(saved, "2")


def test_checkpoints_of_every_so_many_steps_are_kept_for_good(tmp_path: Path) -> None:
    process = Process()
    for step in range(1, 8):
        process.save(tmp_path, step, keep=2, keep_every=3)
    assert [checkpoint.step_of(path) for path in checkpoint.finished(tmp_path)] == [3, 6, 7]


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    newest = checkpoint.path_of(saved, 3)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="is of another model"):
        checkpoint.load_weights(torch.nn.Linear(4, 4), newest)
    wider = torch.nn.Sequential(torch.nn.Linear(4, 5))
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"0.weight has shape \(4, 4\), not \(5, 4\)"):
        checkpoint.load_weights(wider, newest)
    more = [Fragment("1.weight", (1, 4), 0, {"weight": torch.zeros(4)})]
    with pytest.raises(checkpoint.DamagedCheckpoint, match="lacks 4 values"):
        checkpoint.load(more, newest)


def test_progress_is_plain_json(saved: Path) -> None:
    found = json.loads((checkpoint.path_of(saved, 2) / "progress.json").read_text())
    assert found == checkpoint.read_progress(checkpoint.path_of(saved, 2)) == {"step": 2, "updates": 2}
