"""Every strategy on two CPU processes: equal losses, agreement on a NaN that one rank meets, exact going on."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

from hpc_mm.command import accelerate_line, environment
from hpc_mm.config import with_overrides
from hpc_mm.local import free_port
from hpc_mm.recipes.toy import toy

WORKER = ROOT / "tests" / "strategy_worker.py"


def ranks(folder: Path, strategy: str, precision: str) -> list[dict[str, list[list[float]]]]:
    """What both ranks found."""
    run = with_overrides(toy(), {"strategy": strategy, "precision": precision})
    line = accelerate_line(run, folder, "0", "127.0.0.1", str(free_port()))
    line = line.replace("--num_machines 2", "--num_machines 1").partition(" -m hpc_mm.train")[0]
    values = {**os.environ, **environment(run, 1), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [*shlex.split(line), str(WORKER), str(folder), strategy, precision]
    ended = subprocess.run(words, cwd=ROOT, env=values, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    return ranks(tmp_path_factory.mktemp("ddp"), "ddp", "fp32")[0]


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("zero1", "bf16"), ("zero1", "fp32"), ("zero2", "fp32"), ("zero3", "fp32"), ("fsdp", "fp32")],
)
def test_strategies_agree(strategy: str, precision: str, ddp: dict[str, list[list[float]]], tmp_path: Path) -> None:
    found, other = ranks(tmp_path, strategy, precision)
    assert json.dumps(found) == json.dumps(other), "the ranks disagree"
    assert found["again"] == found["steps"][4:], "going on from the checkpoint is not exact"
    norms = [norm for _, norm in found["steps"]]
    assert [math.isfinite(norm) for norm in norms] == [True, True, False, True, True, True]
    tolerance = 1e-4 if precision == "fp32" else 3e-2  # bf16 keeps 8 bits
    for ours, theirs in zip(found["steps"], ddp["steps"], strict=True):
        if math.isfinite(ours[1]):
            assert ours[0] == pytest.approx(theirs[0], rel=tolerance)


def test_ddp_goes_on_exactly(ddp: dict[str, list[list[float]]]) -> None:
    assert ddp["again"] == ddp["steps"][4:]
