"""metrics.jsonl, and Weights & Biases beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_mm.config import with_overrides
from hpc_mm.meter import Records
from hpc_mm.recipes.toy import toy

VALUES = {"step": 1, "loss": 2.5, "lr": 1e-3, "samples_per_s": 3.0, "data_wait": 0.5, "mfu": None}


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_says_where_it_stands(tmp_path: Path) -> None:
    Records(toy(), tmp_path).write(VALUES)
    (found,) = records(tmp_path)
    assert found["time"] > 1.7e9
    assert found == {**VALUES, "steps": 600, "time": found["time"]}


def test_a_step_that_is_done_again_stands_there_once(tmp_path: Path) -> None:
    written = Records(toy(), tmp_path)
    for step in (1, 2, 3):
        written.write({**VALUES, "step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    again = Records(toy(), tmp_path)
    again.cut(2)
    again.write({**VALUES, "step": 3, "loss": 1.0})
    assert [(line["step"], line["loss"]) for line in records(tmp_path)] == [(1, 2.5), (2, 2.5), (3, 1.0)]


@pytest.mark.parametrize("mode", ["offline", "off"])
def test_wandb_offline_and_off(mode: str, tmp_path: Path) -> None:
    """In a process of its own: wandb starts a service that outlives a test."""
    code = (
        "import sys, pathlib; from hpc_mm.config import with_overrides; from hpc_mm.meter import Records;"
        "from hpc_mm.recipes.toy import toy; run = with_overrides(toy(), {'tracking.wandb': sys.argv[1]});"
        f"records = Records(run, pathlib.Path(sys.argv[2])); records.write({VALUES!r}); records.close()"
    )
    subprocess.run([sys.executable, "-c", code, mode, str(tmp_path)], check=True, capture_output=True)
    assert len(records(tmp_path)) == 1
    written = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(written) == (mode == "offline")
    if mode == "offline":
        assert b"samples_per_s" in written[0].read_bytes()


def test_another_mode_is_refused() -> None:
    with pytest.raises(Exception, match="'online', 'offline' or 'off'"):
        with_overrides(toy(), {"tracking.wandb": "sometimes"})
