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

from hpc_mm import checkpoint, export
from hpc_mm.answerer import FIRST, Weights, find, trained
from hpc_mm.config import IMAGE_PLACE, ConfigError, Run, read_run, with_overrides

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
PACKED = "sources.questions.pack_tokens=512"
LORA = ["model.lora.rank=4", "sources.questions.order=length"]  # updates have a dropout of 0.05


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
    """Both stages, each by one process and by two nodes, of which the second packs chats into rows."""
    with ThreadPoolExecutor(2) as pool:
        stages1 = [
            pool.submit(go, values, *STAGE1, *ALONE),
            pool.submit(go, values, *STAGE1, "name=stage1_zero2", "nodes=2", "strategy=zero2"),
        ]
        for stage in stages1:
            stage.result()
        stages2 = [
            pool.submit(go, values, *STAGE2, *ALONE),
            pool.submit(go, values, *STAGE2, "name=stage2_zero3", "nodes=2", "strategy=zero3", PACKED),
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


def test_packing_leaves_no_padding(runs: Path) -> None:
    alone, packed = (
        [line["padding"] for line in lines(runs / name)] for name in ("clip_flant5_toy_stage2", "stage2_zero3")
    )
    assert sum(packed) == 0 < sum(alone)  # a rank's four chats are one row


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


@pytest.mark.chaos  # a killed run with LoRA goes on below
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


@pytest.fixture(scope="module")
def lora(runs: Path, values: dict[str, str]) -> Path:
    """A second stage with LoRA, and batches by length."""
    words = [*STAGE2, *ALONE, *LORA, "name=lora"]
    assert "hpc_mm.measure" in refused(values, *words)
    subprocess.run([sys.executable, "-m", "hpc_mm.measure", *SMALL, *words], env=values, check=True)
    go(values, *words)
    return runs / "lora"


def test_batches_by_length_have_less_padding(runs: Path, lora: Path) -> None:
    random, by_length = ([line["padding"] for line in lines(run)] for run in (runs / "clip_flant5_toy_stage2", lora))
    assert sum(by_length) < 0.5 * sum(random)


def test_lora_goes_on_with_the_same_bits_after_a_kill(lora: Path, values: dict[str, str]) -> None:
    words = [*STAGE2, *ALONE, *LORA, "name=lora_killed"]
    run = lora.with_name("lora_killed")
    command = [sys.executable, "-m", "hpc_mm.launch", *SMALL, *words]
    launcher = subprocess.Popen(command, env=values, stdout=subprocess.DEVNULL)
    while not checkpoint.finished(run):
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    while "being launched" in (said := launch(values, *SMALL, *words)).stderr:  # by what has not ended with it yet
        time.sleep(0.1)
    assert said.returncode == 0 and "going on with it" in said.stdout, said.stdout + said.stderr
    assert losses(run) == losses(lora)
    ends = [checkpoint.read_weights(checkpoint.chosen(folder, "4")) for folder in (run, lora)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_checkpoint_with_lora_holds_what_learns(lora: Path) -> None:
    end = checkpoint.read_weights(checkpoint.chosen(lora, "4"))
    assert {name.partition(".")[0] for name in end if ".lora_" not in name} == {"projector"}
    updates = {name: value for name, value in end.items() if ".lora_" in name}
    assert len(updates) == 2 * (2 * 7 + 1 * 11)  # of an encoder of two layers and a decoder of one
    assert all(value.any() for value in updates.values())


def exported(run: Path, out: Path, *words: str) -> Path:
    assert export.main([f"run={run}", f"out={out}", *words]) == 0
    return out


def scores(run: Run, folder: Path, step: str) -> torch.Tensor:
    """Logits of some answers."""
    model, tokenizer = trained(Weights(run, folder, step), "fp32")
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(3, len(tokenizer), (2, 3, 9), generator=generator)
    ids[:, 2] = IMAGE_PLACE
    features = model.eval().encode(torch.randn(3, 3, 64, 64, generator=generator))
    with torch.no_grad():
        return model.logits(ids, torch.ones_like(ids), features, torch.ones(3), labels)  # type: ignore[no-any-return]


def test_what_is_exported_of_lora_is_the_same_model(lora: Path, values: dict[str, str], tmp_path: Path) -> None:
    run = read_run(lora)
    expected, before = scores(run, lora, "4"), scores(run, lora, FIRST)
    assert not torch.allclose(expected, before, atol=1e-3)
    ours = find(str(exported(lora, tmp_path / "ours")), "latest")
    assert torch.equal(scores(ours.run, ours.folder, ours.step), expected)
    assert (tmp_path / "ours" / "adapter" / "adapter_config.json").is_file()
    words = [*STAGE2, *ALONE, "name=mistaken", "start=", f"model.weights={ours.folder}"]
    assert "model.lora.rank: 4 -> 0" in refused(values, *words)
    merged = with_overrides(
        run,
        {"model.lora.rank": "0", "start": "", "model.weights": str(exported(lora, tmp_path / "out", "form=released"))},
    )
    torch.testing.assert_close(scores(merged, lora, FIRST), expected, atol=1e-4, rtol=1e-4)
    file = exported(lora, tmp_path / "projector", "form=projector") / "mm_projector.bin"
    projector = with_overrides(run, {"start": "", "model.weights": str(file)})
    model, _ = trained(Weights(projector, lora, FIRST), "fp32")
    end = checkpoint.read_weights(checkpoint.chosen(lora, "4"))
    assert all(torch.equal(value, end[f"projector.{name}"]) for name, value in model.projector.named_parameters())


@pytest.mark.chaos  # half a minute
def test_a_run_begins_with_lora_and_goes_on_training_it_on_two_nodes(lora: Path, values: dict[str, str]) -> None:
    words = [*STAGE2, *LORA, "name=lora_more", "start=lora", "nodes=2", "strategy=zero3"]
    go(values, *words)
    end = checkpoint.read_weights(checkpoint.chosen(lora, "4"))
    start = checkpoint.read_weights(Path(read_run(lora.with_name("lora_more")).start))
    more = checkpoint.read_weights(checkpoint.chosen(lora.with_name("lora_more"), "4"))
    assert start.keys() == end.keys() == more.keys()
    assert all(torch.equal(start[name], end[name]) for name in end)
    assert 0 < max(float((more[name] - end[name]).abs().max()) for name in end) < 0.02


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
        (["start=lora"], "model.lora.rank: 4 -> 0"),
        (["start=lora", "model.lora.rank=4", "model.lora.alpha=8"], "model.lora.alpha: 16.0 -> 8.0"),
    ],
)
def test_mistakes_are_told_before_anything_is_queued(
    lora: Path, values: dict[str, str], words: list[str], said: str
) -> None:
    keys = {word.partition("=")[0] for word in words}
    kept = [word for word in SMALL[1:] if not ({"model.language.architecture"} & keys and "architecture" in word)]
    named = [] if "name" in keys else ["name=mistaken"]
    result = launch(values, "cluster=local", *kept, *STAGE2, *ALONE, *named, *words)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert said in result.stderr
    assert not (lora.parent / "mistaken" / "submissions").exists()
