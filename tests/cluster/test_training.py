"""The main job through the launcher on the real Slurm, from shards in the real Ceph: one process is what all must
equal, whatever the nodes, the strategy, the warnings and the restarts."""

import json
import random
import subprocess
import time
from pathlib import Path

import pytest
import questions
import samples
from checkout import launch
from jobs import appears, ends_well, start_now, stepped, submit, wait
from runs import lines, losses, small

from hpc_mm import attempt

pytestmark = pytest.mark.usefixtures("slurm")
STEPS = "train.steps=8"  # which the learning rate goes by; enough to be warned among them


@pytest.fixture(scope="module")
def alone(user: dict[str, str]) -> list[list[float]]:
    """Losses of one process without DeepSpeed."""
    result = launch(user, *small(STEPS), "cluster=local", "name=alone", "nodes=1", "strategy=ddp")
    assert result.returncode == 0, result.stdout + result.stderr
    return losses(Path(user["HPC_MM_RUNS"]) / "alone")


def assert_as_one_process(ours: list[list[float]], alone: list[list[float]], said: str, rel: float = 2e-4) -> None:
    for step, (found, expected) in enumerate(zip(ours, alone, strict=True), start=1):
        print(f"{said}, step {step}: documents, pairs and questions {found}; one process {expected}")
        assert found == pytest.approx(expected, rel=rel)


@pytest.mark.chaos
def test_four_nodes_lose_as_one_process_does(user: dict[str, str], alone: list[list[float]]) -> None:
    run, job, _ = submit(user, "zero3", STEPS, "nodes=4", "strategy=zero3")
    ends_well(run, job)
    assert_as_one_process(losses(run), alone, "ZeRO-3 on 4 nodes")


@pytest.mark.parametrize(
    "words",
    [
        ["strategy=zero1"],
        pytest.param(["strategy=ddp", "precision=bf16"], marks=pytest.mark.chaos),
        pytest.param(["strategy=zero2", "precision=bf16"], marks=pytest.mark.chaos),
    ],
    ids="-".join,
)
def test_a_warned_job_requeues_itself_and_loses_no_step(
    words: list[str], user: dict[str, str], alone: list[list[float]]
) -> None:
    """With reading workers; bit for bit the losses of the job left in peace, which are those of one process."""
    name = "-".join(word.partition("=")[2] for word in words)
    words = [STEPS, "nodes=2", "loader.workers=2", *words]
    quiet, job, _ = submit(user, f"quiet-{name}", *words)
    ends_well(quiet, job)
    rel = 2e-2 if "precision=bf16" in words else 2e-4  # bf16 keeps 8 bits, and differences add up over steps
    assert_as_one_process(losses(quiet), alone, f"{name} on 2 nodes", rel)
    run, job, _ = submit(user, f"warned-{name}", *words)
    stepped(run, 2)
    warned = time.time()
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    start_now(job)
    done = max(line["step"] for line in lines(run))
    assert done < 8, "the job was over before it could be warned"
    back = stepped(run, done + 1)
    ends_well(run, job)
    assert losses(run) == losses(quiet)
    logs = (run / "submissions" / "001" / "node0.log").read_text()
    assert f"leaving at step {done}" in logs and f"resuming at step {done}" in logs
    bare = time.time()
    subprocess.run(["srun", "--nodes=2", "--mem=100M", "true"], check=True)
    bare = time.time() - bare
    print(f"from the signal to the first new step: {back - warned:.1f} s on 2 nodes; a bare srun: {bare:.1f} s")


@pytest.mark.chaos
def test_nodes_may_change_from_start_to_start(user: dict[str, str], alone: list[list[float]]) -> None:
    """4 nodes, then 2, then 3, of ZeRO-3: scancel ends each after a step, which is all that a user types."""
    words = ["strategy=zero3", STEPS]
    run, job, _ = submit(user, "elastic", *words, "nodes=4")
    for nodes, step in ((2, 1), (3, 3)):
        stepped(run, step)
        subprocess.run(["scancel", job], check=True)
        wait(job)
        done = attempt.read(run)["step"]
        assert attempt.read(run)["ending"] == "ended" and done < 8
        run, job, said = submit(user, "elastic", *words, f"nodes={nodes}")
        assert f"-> {nodes}" in said and "the same samples in every step" in said
    ends_well(run, job)
    assert "resuming at step" in (run / "submissions" / "003" / "node0.log").read_text()
    for ours, expected in zip(losses(run), alone, strict=True):
        assert ours == pytest.approx(expected, rel=2e-4)


def test_checkpoints_are_evaluated_by_jobs_of_their_own(user: dict[str, str], tmp_path: Path) -> None:
    """Of the first such checkpoint while training goes on, of the last one after it."""
    facts = {str(i): {"captions": [samples.sentence(random.Random(i * 5 + k)) for k in range(5)]} for i in range(9)}
    tested, trained = ({name: facts[name] for name in facts if (int(name) < 3) == test} for test in (True, False))
    data = questions.write_splits(tmp_path / "coco", test=tested, train=trained)
    said = f"data={data} shots=2 query_set=6 decoding.beams=1 decoding.max_new_tokens=4 examples=0 tasks=2 gpus=0"
    words = ["evaluate.every=2", f"evaluate.benchmarks.coco={said} slurm.cpus_per_task=1 slurm.memory=1G slurm.time=10"]
    words += ["nodes=1", "strategy=ddp", "train.save_every=2", "train.keep=1", "train.steps=3"]
    run, job, _ = submit(user, "evaluated", *words)
    for step in (2, 3):
        appears(run / f"eval/coco/step-{step}/results.json", seconds=300)
    ends_well(run, job)
    log = (run / f"submissions/001/job-{job}.log").read_text()
    for step in (2, 3):
        (found,) = json.loads((run / f"eval/coco/step-{step}/results.json").read_text())["scores"]
        assert found["values"]["questions"]["count"] == 3
        assert log.count(f"step {step} is evaluated by coco: jobs ") == 1
    assert "not evaluated" not in log
