"""Whole runs on this machine: through the launcher, with the real model, data and strategies, at toy size."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from checkout import ROOT, environment, launch
from runs import LOCAL, lines, losses

from hpc_mm import attempt
from hpc_mm.data.order import Order
from hpc_mm.data.schema import Sample, Text
from hpc_mm.data.shards import ShardReader, ShardWriter, read_manifest
from hpc_mm.data.store import open_store


class Ended(NamedTuple):
    """A run that is over."""

    folder: Path
    result: subprocess.CompletedProcess[str]


def go(folder: Path, store: Path, *words: str) -> Ended:
    """Launch a small run; ``words`` stand in the place of ``LOCAL``'s of the same keys."""
    keys = {word.partition("=")[0] for word in words}
    small = [word for word in LOCAL if word.partition("=")[0] not in keys]
    values = environment(ROOT, folder, HPC_MM_STORE=str(store), TORCH_EXTENSIONS_DIR=str(folder / "extensions"))
    return Ended(folder / "runs" / "toy", launch(values, *small, *words))


def well(run: Ended) -> Path:
    """The folder of a run that must have ended well."""
    assert run.result.returncode == 0, run.result.stdout + run.result.stderr
    return run.folder


@pytest.fixture(scope="module")
def broken(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store with pairs that cannot be read."""
    store = tmp_path_factory.mktemp("broken") / "store"
    subprocess.run(["cp", "-r", str(shapes), str(store)], check=True)
    for tar in (store / "shapes" / "train-pairs").glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    return store


MIXED = ["sources.documents.min_images=0", "sources.documents.batch=2", "train.steps=3"]


@pytest.fixture(scope="module")
def mixed(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of whose documents every second one has no image; in some step of two, one has and the other has not."""
    store = tmp_path_factory.mktemp("mixed")
    documents = open_store(f"{store}/shapes/train-documents")
    reader = ShardReader(open_store(f"{shapes}/shapes/train-pairs"), 1)
    with ShardWriter(documents, "mixed") as writer:
        for number in range(8):
            sample = reader.read("train-pairs-000000.tar", number)
            writer.add(sample if number % 2 else Sample(f"text{number}", (Text("a large red circle"),)))
    for name in ("train-pairs", "train-questions", "tokenizer.json"):
        (store / "shapes" / name).symlink_to(shapes / "shapes" / name)
    order = Order(read_manifest(documents).samples, seed=42, window=16)
    with_image = order.run(0, 6)[:, 2] % 2
    assert any(with_image[2 * step] != with_image[2 * step + 1] for step in range(3))
    return store


@pytest.fixture(scope="module")
def single(shapes: Path, broken: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Undisturbed runs of a single process, without DeepSpeed, two at a time: one alone keeps a single core busy."""
    wanted: dict[str, tuple[Path, list[str]]] = {
        "alone": (shapes, []),
        "mixed": (mixed, MIXED),
        "infinite": (shapes, ["train.warmup=0", "train.learning_rate=1e30", "train.max_nonfinite=2"]),
        "unreadable": (broken, []),
    }
    with ThreadPoolExecutor(2) as pool:
        runs = {
            name: pool.submit(go, tmp_path_factory.mktemp(name), store, "nodes=1", "strategy=ddp", *words)
            for name, (store, words) in wanted.items()
        }
        return {name: run.result() for name, run in runs.items()}


@pytest.fixture(scope="module")
def alone(single: dict[str, Ended]) -> Path:
    """The run that all others are compared with."""
    return well(single["alone"])


def test_the_single_process_learns_and_says_what_it_did(alone: Path) -> None:
    found = lines(alone)
    assert [line["step"] for line in found] == list(range(1, 7))
    assert found[-1]["loss"] < found[0]["loss"]
    last = found[-1]
    assert last["loss"] == pytest.approx(
        last["loss/documents"] + last["loss/pairs"] + 0.2 * last["loss/questions"], rel=1e-6
    )
    assert 0 <= last["data_wait"] < 1 and 0 <= last["padding"] < 1 and last["memory_gb"] > 0
    assert last["mfu"] is None  # the peak of a CPU is not known
    assert (last["skipped"], last["unreadable"], last["left_out"]) == (0, 0, 0)
    assert (alone / "checkpoints" / "step-00000006" / "manifest.json").exists()


# Also a run that goes on elsewhere, below, has 3 ranks of ddp, and 2 of ZeRO-3 with micro-steps.
@pytest.mark.chaos
@pytest.mark.parametrize(
    "split",
    [
        ["nodes=2", "strategy=zero2", "train.accumulate=2"],
        ["nodes=1", "strategy=ddp", "train.accumulate=2"],
        ["nodes=2", "strategy=ddp"],
    ],
    ids=lambda words: "-".join(words),
)
def test_the_loss_does_not_depend_on_how_a_batch_is_split(
    split: list[str], alone: Path, shapes: Path, tmp_path: Path
) -> None:
    run = well(go(tmp_path, shapes, *split))
    for found, expected in zip(losses(run), losses(alone), strict=True):
        assert found == pytest.approx(expected, rel=2e-4)


def test_a_rank_without_images_does_not_hang_the_others_under_zero3(
    single: dict[str, Ended], mixed: Path, tmp_path: Path
) -> None:
    """One document per rank and step, every second one without an image."""
    run = well(go(tmp_path, mixed, "nodes=2", "strategy=zero3", *MIXED))
    for found, expected in zip(losses(run), losses(well(single["mixed"])), strict=True):
        assert found == pytest.approx(expected, rel=2e-4)
    assert not (tmp_path / "extensions").exists(), "something was compiled, which nobody should wait for"


def ended_after(steps: int, values: dict[str, str], *words: str) -> Path:
    """The folder of a run that was told to end after so many of its six steps."""
    run = Path(values["HPC_MM_RUNS"]) / "toy"
    command = [sys.executable, "-m", "hpc_mm.launch", *LOCAL, *words]
    launcher = subprocess.Popen(command, env=values, stdout=subprocess.DEVNULL)
    while not (run / "metrics.jsonl").exists() or len(lines(run)) < steps:
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait() == 1
    return run


def test_a_run_that_was_ended_loses_no_step_and_goes_on_exactly(alone: Path, shapes: Path, tmp_path: Path) -> None:
    """SIGTERM saves after the step, on all ranks, though no checkpoint was due."""
    values = environment(ROOT, tmp_path, HPC_MM_STORE=str(shapes))
    words = ["nodes=1", "strategy=ddp"]
    run = ended_after(1, values, *words)
    done = lines(run)[-1]["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    ended = attempt.read(run)
    assert (ended["from"], ended["ending"], ended["step"]) == (0, "ended", done)
    again = launch(values, *LOCAL, *words)
    assert again.returncode == 0, again.stderr
    assert "going on with it" in again.stdout
    assert losses(run) == losses(alone)
    assert f"resuming at step {done}" in (run / "submissions" / "002" / "node0.log").read_text()
    assert attempt.read(run)["ending"] == "finished"


def test_a_run_goes_on_with_other_nodes_and_another_strategy(alone: Path, shapes: Path, tmp_path: Path) -> None:
    """3 nodes of ddp take batches of 4 and 8 in unequal shares; 2 nodes of ZeRO-3 take over."""
    values = environment(ROOT, tmp_path, HPC_MM_STORE=str(shapes))
    run = ended_after(2, values, "nodes=3", "strategy=ddp")
    again = launch(values, *LOCAL, "nodes=2", "strategy=zero3")
    assert again.returncode == 0, again.stderr
    for said in ("nodes: 3 -> 2", "train.accumulate: 1 -> 2", "over 2 ranks x 2 micro-steps"):
        assert said in again.stdout
    for found, expected in zip(losses(run), losses(alone), strict=True):
        assert found == pytest.approx(expected, rel=2e-4)


def test_non_finite_steps_are_skipped_and_then_stop_the_run(single: dict[str, Ended]) -> None:
    run, result = single["infinite"]
    assert result.returncode == 1
    assert "stopped: 3 steps had a non-finite loss or gradient" in result.stderr
    assert lines(run)[-1]["skipped"] == 2


def test_too_many_unreadable_samples_stop_the_run_and_are_named(single: dict[str, Ended]) -> None:
    run, result = single["unreadable"]
    assert result.returncode == 1
    assert "samples of pairs" in result.stderr and "are unreadable" in result.stderr
    assert "unreadable sample" in (run / "submissions" / "001" / "node0.log").read_text()
