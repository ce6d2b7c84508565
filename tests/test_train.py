import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from hpc_mm.config import Train
from hpc_mm.optimizer import learning_rate
from hpc_mm.train import main


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_equal_those_of_transformers(schedule: str, warmup: int) -> None:
    train = Train(steps=40, warmup=warmup, schedule=schedule, learning_rate=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = {
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, 40),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, 40),
    }[schedule]()
    for step in range(40):
        assert learning_rate(train, step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "run=FOLDER is missing"),
        (["run"], "not key=value"),
        (["rum=x"], "did you mean run"),
        (["run=/nowhere/at/all"], "no run at /nowhere/at/all"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1
