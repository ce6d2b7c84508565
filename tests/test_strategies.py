"""Every strategy on two CPU processes with uneven data: one rank has images and the other has none, or no row at all.

None hangs; losses are those of one process, ranks agree on a NaN that one of them meets, going on is exact, and a
checkpoint of one process is read by two on every strategy, and theirs by one.
"""

import json
import math
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from checkout import ROOT
from strategy_cases import CASES, SAVED_STEP, model_of, run_of, tokenizer_of
from strategy_worker import Rank

from hpc_mm import checkpoint
from hpc_mm.command import accelerate_line, environment
from hpc_mm.local import free_port
from hpc_mm.models import token_head
from hpc_mm.sharding import KINDS, Fragment

WORKER = ROOT / "tests" / "strategy_worker.py"
Found = dict[str, Any]


def ranks(folder: Path, strategy: str, precision: str, other: Path, cases: tuple[str, ...]) -> None:
    """Two processes that train these cases."""
    run = run_of("stage2", strategy, precision)
    line = accelerate_line(run, folder, "0", "127.0.0.1", str(free_port()))
    line = line.replace("--num_machines 2", "--num_machines 1").partition(" -m hpc_mm.train")[0]
    values = {**os.environ, **environment(run, 1), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [*shlex.split(line), str(WORKER), str(folder), strategy, precision, str(other), ",".join(cases)]
    ended = subprocess.run(words, cwd=ROOT, env=values, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]


def one_process(case: str, monkeypatch: pytest.MonkeyPatch) -> Rank:
    monkeypatch.setattr(token_head, "LOGITS", token_head.LOGITS)  # which Rank changes
    accelerator = partial(Accelerator, cpu=True, gradient_accumulation_steps=2)
    return Rank(case, run_of(case, "ddp", "fp32", ranks=1), lambda run: accelerator())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Found]]:
    """What one process finds in every case, and where its checkpoints are."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for case in CASES:
            rank = one_process(case, monkeypatch)
            found[case] = {"steps": rank.train(folder / case), "again": rank.go_on(folder / case)}
    return folder, found


def whole(case: str, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The saved state of every parameter, put together from all ranks' files."""
    run = run_of(case, "ddp", "fp32")
    learning = [
        item for item in model_of(case, run, tokenizer_of(case, run)).named_parameters() if item[1].requires_grad
    ]
    state = {name: {kind: torch.full((value.numel(),), math.nan) for kind in KINDS} for name, value in learning}
    fragments = [Fragment(name, tuple(value.shape), 0, state[name]) for name, value in learning]
    checkpoint.load(fragments, checkpoint.path_of(folder, SAVED_STEP))
    return state


USUAL = {  # the rest takes minutes; two_stages has both stages under ddp, ZeRO-2 and ZeRO-3, cluster/training ZeRO-1
    ("ddp", "fp32"): ("flamingo",),
    ("zero2", "fp32"): ("flamingo",),
    ("zero3", "bf16"): ("flamingo", "stage2"),
    ("fsdp", "fp32"): ("flamingo", "lora"),
}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "zero2_offload", "zero3_offload")  # these compile CPU Adam


@pytest.mark.parametrize(
    ("strategy", "precision", "cases"),
    [
        *((*how, cases) for how, cases in USUAL.items()),
        *(
            pytest.param(strategy, precision, tuple(CASES), marks=pytest.mark.chaos)
            for strategy in STRATEGIES
            for precision in ("fp32", "bf16")
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_strategies_agree(
    strategy: str,
    precision: str,
    cases: tuple[str, ...],
    alone: tuple[Path, dict[str, Found]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks(tmp_path, strategy, precision, alone[0], cases)
    exact = 1e-5 if strategy.endswith("offload") else 0  # CPU Adam rounds its bias correction otherwise after a restart
    tolerance = 1e-4 if precision == "fp32" else 3e-2  # bf16 keeps 8 bits
    for case in cases:
        found, second = (json.loads((tmp_path / case / f"rank{rank}.json").read_text()) for rank in range(2))
        assert json.dumps(found) == json.dumps(second), f"{case}: the ranks disagree"
        check_going_on(case, found["again"], found["steps"][SAVED_STEP:], exact)
        check_losses(case, found, alone[1][case], tolerance)
        check_state(case, tmp_path, alone[0], tolerance)
        again = one_process(case, monkeypatch).go_on(tmp_path / case)
        check_going_on(f"{case}, by one process", again, found["steps"][SAVED_STEP:], tolerance)


def check_going_on(said: str, ours: list[list[float]], theirs: list[list[float]], tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=0), f"{said}: going on from the checkpoint"


def check_losses(case: str, found: Found, alone: Found, tolerance: float) -> None:
    norms = [norm for _, norm in found["steps"]]
    assert [math.isfinite(norm) for norm in norms] == [True, True, False, True, True, True], case
    for ours, theirs in zip(found["steps"], alone["steps"], strict=True):
        if math.isfinite(ours[1]):
            assert ours[0] == pytest.approx(theirs[0], rel=tolerance), case
    check_going_on(f"{case}, of one process", found["from other"], alone["steps"][SAVED_STEP:], tolerance)


def check_state(case: str, ours: Path, theirs: Path, tolerance: float) -> None:
    expected = whole(case, theirs / case)
    for name, kinds in whole(case, ours / case).items():
        for kind, tensor in kinds.items():
            rounding = 1 if kind == "weight" else 3  # a gradient's is larger, and that of its square twice so
            near = rounding * tolerance * float(expected[name][kind].abs().max())
            said = f"{case}: {kind} of {name}"
            torch.testing.assert_close(tensor, expected[name][kind], rtol=0, atol=near, msg=said)


def test_one_process_goes_on_exactly(alone: tuple[Path, dict[str, Found]]) -> None:
    for case, found in alone[1].items():
        assert found["again"] == found["steps"][SAVED_STEP:], case
