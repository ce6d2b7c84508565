"""Every strategy on two CPU processes with uneven data: one rank has images and the other has none, or no row at all.

None hangs; losses are equal, ranks agree on a NaN that one of them meets, going on is exact, and every other strategy
reads the checkpoints.
"""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from strategy_worker import SAVED_STEP, tiny_model, tiny_run, tiny_tokenizer

from hpc_mm import checkpoint
from hpc_mm.command import accelerate_line, environment
from hpc_mm.local import free_port
from hpc_mm.sharding import KINDS, Fragment

WORKER = ROOT / "tests" / "strategy_worker.py"


def ranks(folder: Path, strategy: str, precision: str, *other: str) -> list[dict[str, Any]]:
    """What both ranks found."""
    run = tiny_run(strategy, precision)
    line = accelerate_line(run, folder, "0", "127.0.0.1", str(free_port()))
    line = line.replace("--num_machines 2", "--num_machines 1").partition(" -m hpc_mm.train")[0]
    values = {**os.environ, **environment(run, 1), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [*shlex.split(line), str(WORKER), str(folder), strategy, precision, *other]
    ended = subprocess.run(words, cwd=ROOT, env=values, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def ddp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ddp(ddp_folder: Path) -> dict[str, Any]:
    return ranks(ddp_folder, "ddp", "fp32")[0]


def whole(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The saved state of every parameter, put together from all ranks' files."""
    model = tiny_model(tiny_run("ddp", "fp32"), tiny_tokenizer())
    learning = [item for item in model.named_parameters() if item[1].requires_grad]
    state = {name: {kind: torch.full((value.numel(),), math.nan) for kind in KINDS} for name, value in learning}
    fragments = [Fragment(name, tuple(value.shape), 0, state[name]) for name, value in learning]
    checkpoint.load(fragments, checkpoint.path_of(folder, SAVED_STEP))
    return state


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("zero1", "bf16"),
        pytest.param("zero1", "fp32", marks=pytest.mark.chaos),
        ("zero2", "fp32"),
        ("zero3", "fp32"),
        ("fsdp", "fp32"),
        pytest.param("zero2_offload", "fp32", marks=pytest.mark.chaos),  # DeepSpeed compiles its CPU Adam
        pytest.param("zero3_offload", "fp32", marks=pytest.mark.chaos),
    ],
)
def test_strategies_agree(strategy: str, precision: str, ddp: dict[str, Any], ddp_folder: Path, tmp_path: Path) -> None:
    found, second = ranks(tmp_path, strategy, precision, str(ddp_folder))
    assert json.dumps(found) == json.dumps(second), "the ranks disagree"
    exact = 1e-5 if strategy.endswith("offload") else 0  # CPU Adam rounds its bias correction otherwise after a restart
    for ours, theirs in zip(found["again"], found["steps"][SAVED_STEP:], strict=True):
        assert ours == pytest.approx(theirs, rel=exact, abs=0), "going on from the checkpoint is not exact"
    norms = [norm for _, norm in found["steps"]]
    assert [math.isfinite(norm) for norm in norms] == [True, True, False, True, True, True]
    tolerance = 1e-4 if precision == "fp32" else 3e-2  # bf16 keeps 8 bits
    for ours, theirs in zip(found["steps"], ddp["steps"], strict=True):
        if math.isfinite(ours[1]):
            assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    for ours, theirs in zip(found["from other"], ddp["steps"][SAVED_STEP:], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance), "going on from ddp's checkpoint"
    theirs = whole(ddp_folder)
    for name, kinds in whole(tmp_path).items():
        for kind, tensor in kinds.items():
            expected = theirs[name][kind]
            near = tolerance * float(expected.abs().max())
            torch.testing.assert_close(tensor, expected, rtol=0, atol=near, msg=f"{kind} of {name}")


def test_ddp_goes_on_exactly(ddp: dict[str, Any]) -> None:
    assert ddp["again"] == ddp["steps"][SAVED_STEP:]
