"""ZeRO-3 over two processes equals one process, though one rank sees images and the other none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("zero3_worker.py")


@pytest.mark.parametrize("family", ["mpt"])  # its head is tied to its table, and so are the new rows
def test_zero3(family: str, tokenizer_file: str) -> None:
    pytest.importorskip("deepspeed")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*launcher, str(WORKER), family, tokenizer_file], env=environment, capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    assert "equal tokens" in ended.stdout
