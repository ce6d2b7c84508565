"""The main job on a real Slurm of four nodes, with shards in a real Ceph."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, environment, launch
from jobs import job_of, wait
from runs import SMALL, losses

pytestmark = pytest.mark.usefixtures("slurm")


@pytest.fixture(scope="module")
def user(ceph: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user whose site's store is in Ceph and holds a small shapes corpus."""
    folder = tmp_path_factory.mktemp("user")
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    values = {**environment(ROOT, folder), **keys, "HPC_MM_STORE": ceph}
    sizes = ["documents=60", "pairs=120", "heldout=8"]
    subprocess.run([sys.executable, "data_prep/shapes.py", *sizes], env=values, cwd=ROOT, check=True)
    return values


@pytest.fixture(scope="module")
def alone(user: dict[str, str]) -> list[list[float]]:
    """Losses of one process without DeepSpeed."""
    result = launch(user, *SMALL, "cluster=local", "name=alone", "nodes=1", "strategy=ddp")
    assert result.returncode == 0, result.stdout + result.stderr
    return losses(Path(user["HPC_MM_RUNS"]) / "alone")


def train_on_four_nodes(user: dict[str, str], name: str, *words: str) -> list[list[float]]:
    small = [word for word in SMALL if word.partition("=")[0] not in {key.partition("=")[0] for key in words}]
    result = launch(user, *small, "cluster=slurm", "nodes=4", f"name={name}", *words)
    assert result.returncode == 0, result.stderr
    run = Path(user["HPC_MM_RUNS"]) / name
    state = wait(job_of(run), seconds=600)
    assert state == "COMPLETED", "".join(log.read_text()[-2000:] for log in run.glob("submissions/001/*.log"))
    return losses(run)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_four_nodes_lose_as_one_process_does(strategy: str, user: dict[str, str], alone: list[list[float]]) -> None:
    found = train_on_four_nodes(user, strategy, f"strategy={strategy}")
    for step, (ours, expected) in enumerate(zip(found, alone, strict=True), start=1):
        print(f"{strategy} on 4 nodes, step {step}: documents and pairs {ours}; one process {expected}")
        assert ours == pytest.approx(expected, rel=2e-4)


def test_bf16_on_four_nodes_agrees_to_its_rounding(user: dict[str, str], alone: list[list[float]]) -> None:
    found = train_on_four_nodes(user, "bf16", "strategy=zero2", "precision=bf16", "loader.workers=2")
    for ours, expected in zip(found, alone, strict=True):
        assert ours == pytest.approx(expected, rel=2e-2)  # bf16 keeps 8 bits: 2**-8 is 4e-3 per operation
