"""Both stages of CLIP-FlanT5 on this machine: through the launcher, with the real model, data and strategies."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkout import ROOT, environment, launch
from runs import lines

from hpc_mm import checkpoint
from hpc_mm.answerer import Weights, find, trained
from hpc_mm.config import ConfigError, read_run

SMALL = [
    "cluster=local",
    "train.steps=4",
    "train.save_every=2",
    "train.log_every=1",
    "train.warmup=1",
    "train.keep=5",
    "model.language.architecture.num_layers=2",
    "model.language.architecture.d_ff=64",
]
STAGE1 = ["recipe=clip_flant5_toy_stage1", "sources.captions.batch=8"]
STAGE2 = ["recipe=clip_flant5_toy_stage2", "sources.questions.batch=8"]
ALONE = ["nodes=1", "strategy=ddp"]


def go(values: dict[str, str], *words: str) -> str:
    """What the launcher said of a run that ended well."""
    result = launch(values, *SMALL, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def refused(values: dict[str, str], *words: str) -> str:
    """The line about a user's mistake."""
    result = launch(values, *SMALL, *words)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


@pytest.fixture(scope="module")
def values(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(ROOT, tmp_path_factory.mktemp("stages"), HPC_MM_STORE=str(shapes))


@pytest.fixture(scope="module")
def runs(values: dict[str, str]) -> Path:
    """Both stages, each by one process and by two nodes, which need not wait for each other's kind."""
    with ThreadPoolExecutor(2) as pool:
        stages1 = [
            pool.submit(go, values, *STAGE1, *ALONE),
            pool.submit(go, values, *STAGE1, "name=stage1_zero2", "nodes=2", "strategy=zero2"),
        ]
        for stage in stages1:
            stage.result()
        stages2 = [
            pool.submit(go, values, *STAGE2, *ALONE),
            pool.submit(go, values, *STAGE2, "name=stage2_zero3", "nodes=2", "strategy=zero3"),
        ]
        for stage in stages2:
            stage.result()
    return Path(values["HPC_MM_RUNS"])


@pytest.mark.parametrize(
    ("one", "two"), [("clip_flant5_toy_stage1", "stage1_zero2"), ("clip_flant5_toy_stage2", "stage2_zero3")]
)
def test_the_loss_does_not_depend_on_how_a_batch_is_split(runs: Path, one: str, two: str) -> None:
    assert losses(runs / one)[-1] < losses(runs / one)[0]
    assert losses(runs / two) == pytest.approx(losses(runs / one), rel=2e-4)


def test_a_stage_trains_its_parts_alone_and_the_second_begins_where_the_first_ended(runs: Path) -> None:
    first, second = (runs / f"clip_flant5_toy_stage{stage}" for stage in (1, 2))
    end = checkpoint.read_weights(checkpoint.chosen(first, "4"))
    assert set(end) == {f"projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    start = Path(read_run(second).start)
    assert start.is_relative_to(second), "what it began with stays its own, whatever the first stage does"
    assert (start / "origin.txt").read_text() == str(checkpoint.path_of(first, 4))
    assert all(torch.equal(value, end[name]) for name, value in checkpoint.read_weights(start).items())
    trained = checkpoint.read_weights(checkpoint.chosen(second, "4"))
    assert {name.partition(".")[0] for name in trained} == {"projector", "language"}
    moved = max(float((trained[name] - end[name]).abs().max()) for name in end)
    assert 0 < moved < 0.02  # four steps of Adam at 1e-3 from there, not from random weights


def test_the_weights_that_a_run_began_with_must_be_there(runs: Path, tmp_path: Path) -> None:
    run = read_run(runs / "clip_flant5_toy_stage2")
    lost = run.model_copy(update={"start": str(tmp_path / "start")})
    with pytest.raises(ConfigError, match="start="):
        trained(Weights(lost, runs / "clip_flant5_toy_stage2", "0"), "fp32")


def test_what_is_exported_needs_no_other_run(runs: Path, tmp_path: Path) -> None:
    """Nor does what the first stage has trained come over what the second has."""
    folder = runs / "clip_flant5_toy_stage2"
    result = subprocess.run([sys.executable, "-m", "hpc_mm.export", f"run={folder}", f"out={tmp_path / 'out'}"])
    assert result.returncode == 0
    model, _ = trained(find(str(folder), "4"), "fp32")
    alone, _ = trained(find(str(tmp_path / "out"), "latest"), "fp32")
    for (name, value), (other, found) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert name == other and torch.equal(value, found)


def test_a_stage_that_was_ended_goes_on_exactly(runs: Path, values: dict[str, str]) -> None:
    words = [*STAGE2, *ALONE, "name=ended"]
    run = runs / "ended"
    command = [sys.executable, "-m", "hpc_mm.launch", *SMALL, *words]
    launcher = subprocess.Popen(command, env=values, stdout=subprocess.DEVNULL)
    while not (run / "metrics.jsonl").exists() or not lines(run):
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait() == 1
    assert "going on with it" in go(values, *words)
    assert losses(run) == losses(runs / "clip_flant5_toy_stage2")


def test_batches_by_length(runs: Path, values: dict[str, str]) -> None:
    words = [*STAGE2, *ALONE, "name=by_length", "sources.questions.order=length"]
    assert "hpc_mm.measure" in refused(values, *words)
    subprocess.run([sys.executable, "-m", "hpc_mm.measure", *SMALL, *words], env=values, check=True)
    go(values, *words)
    random = [line["padding"] for line in lines(runs / "clip_flant5_toy_stage2")]
    sorted_ = [line["padding"] for line in lines(runs / "by_length")]
    assert sum(sorted_) < 0.5 * sum(random)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["start=nowhere"], "nowhere"),
        (["name=clip_flant5_toy_stage2", "start=stage1_zero2"], "began with"),
        (["start=", "model.language.architecture={}", "model.language.name=google/flan-t5-xl"], "start=RUN"),
        (["model.language.architecture.d_model=64"], "d_model: 128 -> 64"),
        (["sources.questions.form=pairs", "sources.questions.template=none"], "clip_flant5 takes chat"),
        (["sources.questions.template=none"], "t5_v1"),
        (["model.lora.rank=4", "model.trainable=projector"], "lora.rank=4"),
    ],
)
def test_mistakes_are_told_before_anything_is_queued(
    runs: Path, values: dict[str, str], words: list[str], said: str
) -> None:
    keys = {word.partition("=")[0] for word in words}
    kept = [word for word in SMALL[1:] if not ({"model.language.architecture"} & keys and "architecture" in word)]
    named = [] if "name" in keys else ["name=mistaken"]
    result = launch(values, "cluster=local", *kept, *STAGE2, *ALONE, *named, *words)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert said in result.stderr
    assert not (runs / "mistaken" / "submissions").exists()
