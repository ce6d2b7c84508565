"""Whole runs on this machine: through the launcher, with the real model, data and strategies, at toy size."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkout import ROOT, environment, launch
from runs import LOCAL, SMALL, lines, losses

from hpc_mm import attempt
from hpc_mm.data.schema import Sample, Text
from hpc_mm.data.shards import ShardReader, ShardWriter, read_manifest
from hpc_mm.data.store import open_store
from hpc_mm.data.stream import Order


def go(folder: Path, store: Path, *words: str) -> Path:
    """Launch a small run that must end well; its folder."""
    values = environment(ROOT, folder, HPC_MM_STORE=str(store), TORCH_EXTENSIONS_DIR=str(folder / "extensions"))
    result = launch(values, *LOCAL, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    name = next((word.partition("=")[2] for word in words if word.startswith("name=")), "toy")
    return folder / "runs" / name


@pytest.fixture(scope="module")
def alone(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of a single process, without DeepSpeed: what all others are compared with."""
    return go(tmp_path_factory.mktemp("alone"), shapes, "nodes=1", "strategy=ddp")


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


@pytest.mark.parametrize(
    "split",
    [
        ["nodes=1", "strategy=ddp", "train.accumulate=2"],
        ["nodes=2", "strategy=ddp"],
        ["nodes=2", "strategy=zero2", "train.accumulate=2"],
    ],
    ids=lambda words: "-".join(words),
)
def test_the_loss_does_not_depend_on_how_a_batch_is_split(
    split: list[str], alone: Path, shapes: Path, tmp_path: Path
) -> None:
    run = go(tmp_path, shapes, *split)
    for found, expected in zip(losses(run), losses(alone), strict=True):
        assert found == pytest.approx(expected, rel=2e-4)
    assert not (tmp_path / "extensions").exists(), "something was compiled, which nobody should wait for"


def test_a_rank_without_images_does_not_hang_the_others_under_zero3(shapes: Path, tmp_path: Path) -> None:
    """One document per rank and step, every second one without an image."""
    store = tmp_path / "mixed"
    documents = open_store(f"{store}/shapes/train-documents")
    reader = ShardReader(open_store(f"{shapes}/shapes/train-pairs"), 1)
    with ShardWriter(documents, "mixed") as writer:
        for number in range(8):
            sample = reader.read("train-pairs-000000.tar", number)
            writer.add(sample if number % 2 else Sample(f"text{number}", (Text("a large red circle"),)))
    for name in ("train-pairs", "train-questions", "tokenizer.json"):
        (store / "shapes" / name).symlink_to(shapes / "shapes" / name)
    words = ["sources.documents.min_images=0", "sources.documents.batch=2", "train.steps=3"]
    order = Order(read_manifest(documents).samples, seed=42, window=16)
    with_image = [order.locate(position).sample % 2 for position in range(6)]
    assert any(with_image[2 * step] != with_image[2 * step + 1] for step in range(3))
    small = [word for word in LOCAL if not word.startswith(("sources.documents", "train.steps"))]
    runs = {}
    for name, split in (("split", ["nodes=2", "strategy=zero3"]), ("alone", ["nodes=1", "strategy=ddp"])):
        values = environment(ROOT, tmp_path, HPC_MM_STORE=str(store))
        result = launch(values, *small, *words, *split, f"name={name}")
        assert result.returncode == 0, result.stdout + result.stderr
        runs[name] = losses(tmp_path / "runs" / name)
    for found, expected in zip(runs["split"], runs["alone"], strict=True):
        assert found == pytest.approx(expected, rel=2e-4)


def test_a_run_that_was_ended_loses_no_step_and_goes_on_exactly(alone: Path, shapes: Path, tmp_path: Path) -> None:
    """SIGTERM saves after the step, on all ranks, though no checkpoint was due."""
    values = environment(ROOT, tmp_path, HPC_MM_STORE=str(shapes))
    command = [sys.executable, "-m", "hpc_mm.launch", *LOCAL, "nodes=1", "strategy=ddp"]
    run = tmp_path / "runs" / "toy"
    first = subprocess.Popen(command, env=values, stdout=subprocess.DEVNULL)
    while not (run / "metrics.jsonl").exists() or not lines(run):
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 1
    done = lines(run)[-1]["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    ended = attempt.read(run)
    assert (ended["from"], ended["ending"], ended["step"]) == (0, "ended", done)
    again = subprocess.run(command, env=values, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "going on with it" in again.stdout
    assert losses(run) == losses(alone)
    assert f"resuming at step {done}" in (run / "submissions" / "002" / "node0.log").read_text()
    assert attempt.read(run)["ending"] == "finished"


def test_a_run_goes_on_with_other_nodes_and_another_strategy(alone: Path, shapes: Path, tmp_path: Path) -> None:
    """3 nodes of ddp take batches of 4 and 8 in unequal shares; 2 nodes of ZeRO-3 take over."""
    words = ["train.save_every=3", "train.steps=6"]
    values = environment(ROOT, tmp_path, HPC_MM_STORE=str(shapes))
    small = [word for word in LOCAL if not word.startswith("train.steps")]
    command = [sys.executable, "-m", "hpc_mm.launch", *small, *words, "nodes=3", "strategy=ddp"]
    run = tmp_path / "runs" / "toy"
    first = subprocess.Popen(command, env=values, stdout=subprocess.DEVNULL)
    while not list(run.glob("checkpoints/step-*3/manifest.json")):
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 1
    again = launch(values, *small, *words, "nodes=2", "strategy=zero3")
    assert again.returncode == 0, again.stderr
    for said in ("nodes: 3 -> 2", "train.accumulate: 1 -> 2", "over 2 ranks x 2 micro-steps"):
        assert said in again.stdout
    for found, expected in zip(losses(run), losses(alone), strict=True):
        assert found == pytest.approx(expected, rel=2e-4)


def test_non_finite_steps_are_skipped_and_then_stop_the_run(shapes: Path, tmp_path: Path) -> None:
    values = environment(ROOT, tmp_path, HPC_MM_STORE=str(shapes))
    words = ["nodes=1", "strategy=ddp", "train.warmup=0", "train.learning_rate=1e30", "train.max_nonfinite=2"]
    result = launch(values, "cluster=local", *[word for word in SMALL if "warmup" not in word], *words)
    assert result.returncode == 1
    assert "stopped: 3 steps had a non-finite loss or gradient" in result.stderr
    assert lines(tmp_path / "runs" / "toy")[-1]["skipped"] == 2


def test_too_many_unreadable_samples_stop_the_run_and_are_named(shapes: Path, tmp_path: Path) -> None:
    store = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(shapes), str(store)], check=True)
    for tar in (store / "shapes" / "train-pairs").glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    values = environment(ROOT, tmp_path, HPC_MM_STORE=str(store))
    result = launch(values, *LOCAL, "nodes=1", "strategy=ddp")
    assert result.returncode == 1
    assert "samples of pairs" in result.stderr and "are unreadable" in result.stderr
    assert "unreadable sample" in (tmp_path / "runs" / "toy" / "submissions" / "001" / "node0.log").read_text()
