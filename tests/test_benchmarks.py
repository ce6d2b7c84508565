"""The measurements beside open_flamingo run from end to end; at this size their numbers say nothing."""

import subprocess
import sys

import pytest
import torch
from checkout import ROOT


def output(*words: str) -> str:
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return ended.stdout


def test_training_step() -> None:
    """Ends with an error where the losses of the two sides differ."""
    assert output("benchmarks/training_step.py", "size=tiny").count("1.00 times; losses") == 2


def test_gpu_on_a_cpu() -> None:
    found = output("benchmarks/gpu.py", "device=cpu", "size=tiny")
    for word in ("parity in bf16", "hpc_mm, packed rows", "times open_flamingo", "loader:", "times what tiny takes"):
        assert word in found


@pytest.mark.chaos  # half a minute of imports
def test_without_a_gpu_nothing_is_measured() -> None:
    if not torch.cuda.is_available():
        assert output("benchmarks/gpu.py") == "no GPU here: nothing was measured\n"


def test_metrics(java: None) -> None:
    """Ends with an error where the scores of the two sides differ."""
    found = output("benchmarks/metrics.py", "images=60", "questions=300", "rated=30", "rounds=1")
    assert found.count("times pycocoevalcap") == 4
    assert found.count("times open_flamingo") == 1
    assert found.count("times the definition") == 1


def test_vqascore() -> None:
    """Ends with an error where the scores of the two sides differ."""
    assert "scores equal to" in output("benchmarks/vqascore.py", "size=tiny")


@pytest.mark.chaos  # as on a GPU
def test_vqascore_in_bf16() -> None:
    assert "scores equal to" in output("benchmarks/vqascore.py", "size=tiny", "precision=bf16")


def test_lengths() -> None:
    """Ends with an error where the lengths of the two sides differ."""
    assert "samples per second of one core" in output("benchmarks/lengths.py", "samples=40", "rounds=1")
